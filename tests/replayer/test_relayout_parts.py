"""A tap whose dims name several tensors one behind the other: recorded, matched and grafted."""

from __future__ import annotations

import pytest
import torch

from recorder import Recorder, Recording, declare_mesh, tap
from replayer import Replayer

B, S, G, R, D = 2, 5, 4, 3, 2
SIZES = {"q": R * D, "k": D, "v": D}  # of a group


@pytest.fixture(autouse=True)
def undeclared():
    yield
    declare_mesh()


def whole(fill=None):
    """Queries, keys and values as s b g x."""
    made = {name: torch.randn(S, B, G, n) for name, n in SIZES.items()}
    return made if fill is None else {n: torch.full_like(t, fill) for n, t in made.items()}


FORMS = {
    # form -> dims, ranks, and what a rank holds of q, k and v
    "one": (f"s b (g*{{q: (r*d) | k: d | v: d}}) # r={R} d={D}", 1, "outside"),
    "inside": (
        f"s b {{q: (g*r*d)[tp] | k: (g*d)[tp] | v: (g*d)[tp]}} # r={R} d={D}", 2, "inside",
    ),
    "outside": (f"s b (g*{{q: (r*d) | k: d | v: d}})[tp] # r={R} d={D}", 2, "outside"),
}  # fmt: skip


def fused(tensors, rank, ranks, how):
    """One tensor of all three as a rank has it, by plain indexing."""
    held = [one.chunk(ranks, 2)[rank] for one in tensors.values()]
    if how == "inside":
        return torch.cat([one.flatten(2) for one in held], 2)
    return torch.cat(held, 3).flatten(2)


def tap_apart(tensors, grad=False):
    """The three as a system has them that computes each for itself: b s (g*r*d)."""
    for name, one in tensors.items():
        tap(name, one, dims="b s (g*r*d)" if name == "q" else "b s (g*d)", grad=grad, layer=1)


def apart(tensors):
    return {n: t.transpose(0, 1).flatten(2).contiguous() for n, t in tensors.items()}


def on_each(run, ranks, session, job, **options):
    for rank in range(ranks):
        declare_mesh(tp=(rank, ranks))
        with session(run, rank=rank, world_size=ranks, **options) as one:
            job(rank)
        if session is Replayer:
            rows = one.log().select("name", "outcome", "message").rows()
            assert all(row[1] == "grafted" for row in rows), rows
            assert {row[0] for row in rows} == {"q", "k", "v"}
    declare_mesh()
    return Recording.open(run)


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_matched_with_tensors_of_their_own(run, form):
    dims, ranks, how = FORMS[form]
    truth = whole()

    def job(rank):
        tap("qkv", fused(truth, rank, ranks, how), dims=dims, layer=1)

    back = on_each(run, ranks, Recorder, job)
    assert set(back.rows()["name"]) == {"q", "k", "v"}
    assert set(back.rows()["tags"]) == {'{"layer":1}'}
    targets = apart(whole(-1.0))
    on_each(run, 1, Replayer, lambda rank: tap_apart(targets))
    for name, one in apart(truth).items():
        assert torch.equal(targets[name], one), name


@pytest.mark.parametrize("form", FORMS)
def test_a_graft_of_parts_reaches_the_whole(run, form):
    dims, ranks, how = FORMS[form]
    truth = whole()
    on_each(run, 1, Recorder, lambda rank: tap_apart(apart(truth)))
    targets = [fused(whole(-1.0), rank, ranks, how) for rank in range(ranks)]
    on_each(run, ranks, Replayer, lambda rank: tap("qkv", targets[rank], dims=dims, layer=1))
    for rank, target in enumerate(targets):
        assert torch.equal(target, fused(truth, rank, ranks, how))


def test_one_part_is_grafted_and_the_others_are_not_touched(run):
    dims, _, how = FORMS["one"]
    truth = whole()
    on_each(run, 1, Recorder, lambda rank: tap_apart(apart(truth)))
    target = fused(whole(-1.0), 0, 1, how)
    with Replayer(run, filter='name == "k"') as session:
        tap("qkv", target, dims=dims, layer=1)
    assert session.log()["outcome"].to_list() == ["grafted"]
    grouped = target.view(S, B, G, -1)
    assert torch.equal(grouped[..., R * D : -D], truth["k"])
    assert (grouped[..., : R * D] == -1).all() and (grouped[..., -D:] == -1).all()


def test_heads_that_ranks_share_in_parts(run):
    """2 groups over 4 ranks, each of which has a half of a group's queries."""
    q, k = torch.randn(S, 2, 4, D), torch.randn(S, 2, D)  # s g r d
    dims = "s {q: (g*r*d)[tp] | k: (g*d)[tp:repeat]} # g=2 r=4 d=2"

    def fused(q, k, rank):
        return torch.cat([q.flatten(1).chunk(4, 1)[rank], k[:, rank // 2]], 1)

    on_each(run, 4, Recorder, lambda rank: tap("qk", fused(q, k, rank), dims=dims))
    targets = {"q": torch.zeros(S, 2 * 4 * D), "k": torch.zeros(S, 2 * D)}
    with Replayer(run, rank=0, world_size=1) as session:
        tap("q", targets["q"], dims="s (g*r*d)")
        tap("k", targets["k"], dims="s (g*d)")
    assert session.log()["outcome"].to_list() == ["grafted", "grafted"]
    assert torch.equal(targets["q"], q.flatten(1)) and torch.equal(targets["k"], k.flatten(1))


def job_with_gradients(values, weights, as_parts):
    """A job whose input has a gradient of its own for each part; returns what it computed."""
    x = values.clone().requires_grad_()
    h = x * 1.0
    if as_parts:
        tap("qkv", h, dims=FORMS["one"][0], grad=True, layer=1)
    grouped = h.view(S, B, G, -1)
    parts = dict(zip(SIZES, grouped.split(list(SIZES.values()), -1), strict=True))
    if not as_parts:
        parts = {n: p.transpose(0, 1).flatten(2) for n, p in parts.items()}
        tap_apart(parts, grad=True)
        parts = {n: p.unflatten(2, (G, -1)).transpose(0, 1) for n, p in parts.items()}
    sum((parts[n] * weights[n]).sum() for n in parts).backward()
    return h.detach(), x.grad


def test_the_gradient_of_a_part_is_its_part_of_the_gradient(run):
    values, weights = fused(whole(), 0, 1, "outside"), whole()
    with Recorder(run):
        job_with_gradients(values, weights, as_parts=True)
    back = Recording.open(run)
    for name in SIZES:
        got = back.load(0, name, kind="grad", layer=1)
        assert torch.equal(got.reshape(weights[name].shape), weights[name]), name


@pytest.mark.parametrize("chosen", [None, "k"])
def test_gradients_of_parts_are_grafted(run, chosen):
    baseline, target = whole(), whole()
    values = fused(whole(), 0, 1, "outside")
    with Recorder(run):
        job_with_gradients(values, baseline, as_parts=False)
    with Replayer(run, filter=chosen and f'name == "{chosen}"') as session:
        h, grad = job_with_gradients(torch.zeros_like(values), target, as_parts=True)
    rows = session.log().select("name", "kind", "outcome").rows()
    names = [chosen] if chosen else list(SIZES)
    assert sorted(rows) == sorted(
        (n, kind, "grafted") for n in names for kind in ("grad", "tensor")
    )
    mixed = {n: baseline[n] if n in names else target[n] for n in SIZES}
    assert torch.equal(grad, fused(mixed, 0, 1, "outside"))
    if chosen is None:
        assert torch.equal(h, values)


def test_a_gradient_in_more_pieces_than_were_recorded_takes_nothing_from_the_other_parts(run):
    def job(backwards):
        x = torch.ones(4, 6, requires_grad=True)
        h = x * 1.0
        tap("ab", h, dims="s {a: e | b: f} # e=2", grad=True)
        for i in range(backwards):
            (h * (i + 1)).sum().backward(retain_graph=True)
        return x.grad

    with Recorder(run):
        job(1)
    with Replayer(run, filter='name == "a"'):
        grad = job(2)
    assert (grad[:, 2:] == 3).all(), "of the second backward too"
    assert (grad[:, :2] == 1).all(), "the record, and zeros for what has none"


def test_parameters_with_parts_have_gradients_too(run):
    weight = torch.nn.Parameter(torch.ones(6, 2))
    with Recorder(run):
        tap("w", weight, dims="{a: e | b: f} h # e=2", grad=True)
        (weight * torch.arange(6.0)[:, None]).sum().backward()
    back = Recording.open(run)
    assert back.load(0, "b", kind="grad")[:, 0].tolist() == [2, 3, 4, 5]
    with Replayer(run):
        with torch.no_grad():
            weight.zero_()
        tap("w", weight, dims="{a: e | b: f} h # e=2")
    assert (weight == 1).all()


def test_a_layout_that_does_not_fit_leaves_the_target_and_is_an_error_of_each_part(run, capsys):
    dims, _, how = FORMS["one"]
    with Recorder(run):
        tap("qkv", fused(whole(), 0, 1, how), dims=dims)
    target = torch.full((S, B, 7), -1.0)
    with Replayer(run) as session:
        tap("qkv", target, dims=dims)
    rows = session.log().select("name", "outcome", "message").rows()
    assert [row[:2] for row in rows] == [(name, "error") for name in "qkv"]
    assert all("has 7 here, which is not what its parts make" in row[2] for row in rows)
    assert (target == -1).all()
    assert capsys.readouterr().err.count("was not grafted") == 1
    with Replayer(run) as session:
        tap("qkv", target, dims="s b {q: h | k")
    assert "is not closed" in session.reason and "was not grafted" in capsys.readouterr().err
