"""Gradients that are laid out otherwise than their values: as summands, mostly."""

from __future__ import annotations

import pytest
import torch

from recorder import Recorder, Recording, declare_mesh, tap
from recorder.errors import LayoutError, ReplicasDiffer
from recorder.layouts.parse import gradient_dims, parse_dims
from replayer import Replayer, diff

X = torch.arange(24.0).reshape(6, 4)
PARTIAL = "h # grad: h[tp:partial]"


@pytest.fixture(autouse=True)
def undeclared():
    yield
    declare_mesh()


def backward(rank, ranks, dims, mesh=None):
    """A norm's weight that sees a part of the tokens on each rank; return its gradient."""
    declare_mesh(**mesh) if mesh else declare_mesh()
    w = torch.ones(4, requires_grad=True)
    tapped = tap("norm_weight", w, dims=dims, grad=True)
    (X.chunk(ranks)[rank] * tapped).sum().backward()
    return w.grad


def record(run, ranks, dims, meshes=None):
    for rank in range(ranks):
        with Recorder(run, rank=rank, world_size=ranks):
            backward(rank, ranks, dims, meshes and meshes[rank])
    return Recording.open(run)


def replay(run, ranks, dims, meshes=None, **options):
    """Return each rank's gradient, and what came of grafting it."""
    grads, found = [], []
    for rank in range(ranks):
        with Replayer(run, rank=rank, world_size=ranks, **options) as session:
            grads.append(backward(rank, ranks, dims, meshes and meshes[rank]) * 1)
        log = session.log()
        found.append(log.filter(log["kind"] == "grad").select("outcome", "message").row(0))
    return grads, found


def over(axis, n):
    return [{axis: (k, n)} for k in range(n)]


def test_summands_add_up_to_the_gradient_of_one(run, tmp_path):
    one = record(run, 1, "h")
    grads, found = replay(run, 2, PARTIAL, over("tp", 2))
    assert [o for o, _ in found] == ["grafted"] * 2
    assert torch.equal(grads[0] + grads[1], X.sum(0))
    two = record(tmp_path / "two", 2, PARTIAL, over("tp", 2))
    assert torch.equal(two.load_logical("norm_weight", kind="grad"), X.sum(0))
    assert torch.equal(two.load_logical("norm_weight"), torch.ones(4))
    for a, b in ((one, two), (two, one)):
        assert diff(a.path, b.path).counts()["equal"] == 2
    grads, found = replay(tmp_path / "two", 1, "h")
    assert found == [("grafted", "")] and torch.equal(grads[0], X.sum(0))
    grads, found = replay(tmp_path / "two", 3, PARTIAL, over("tp", 3))
    assert torch.equal(sum(grads), X.sum(0))
    grads, found = replay(tmp_path / "two", 2, PARTIAL, over("tp", 2))
    assert torch.equal(grads[1], X[3:].sum(0)), "cut alike, each has its own"


@pytest.mark.parametrize("meshes", [None, over("tp", 2)])
def test_a_gradient_that_may_be_a_summand_is_not_written(run, meshes):
    record(run, 1, "h")
    grads, found = replay(run, 2, "h", meshes)
    for outcome, message in found:
        assert outcome == "error" and message.startswith(
            "of the gradient of 'h', ranks along tp may each hold the whole or a summand, and the "
            "dims do not say which; say it at the target's tap: 'h # grad: h' or "
            "'h # grad: h[tp:partial]', or name a transform"
        )
    assert torch.equal(grads[0] + grads[1], X.sum(0)), "left as they were"
    grads, found = replay(run, 2, "h # grad: h", meshes)
    assert [o for o, _ in found] == ["grafted"] * 2 and torch.equal(grads[1], X.sum(0))


def test_replicated_gradients_that_differ_are_refused_with_the_way_to_say_it(run, tmp_path):
    two = record(run, 2, "h", over("cp", 2))
    _, ((outcome, message),) = replay(run, 1, "h")
    assert outcome == "error" and (
        "if each holds a summand of the gradient, say so at the tap, as in "
        "dims='h # grad: h[cp:partial]'" in message
    )
    with pytest.raises(ReplicasDiffer, match=r"h # grad: h\[cp:partial\]"):
        two.load_logical("norm_weight", kind="grad")
    one = record(tmp_path / "one", 1, "h")
    messages = " ".join(filter(None, diff(one.path, two.path).pairs["message"]))
    assert "if each rank of B holds a summand of this gradient" in messages


def test_gradients_that_are_whole_on_all_senders_go_to_any_number(run):
    for rank in range(2):
        with Recorder(run, rank=rank, world_size=2):
            backward(0, 1, "h", over("tp", 2)[rank])
    grads, found = replay(run, 3, "h", over("tp", 3))
    assert found == [("grafted", "")] * 3 and torch.equal(grads[2], X.sum(0))


def test_between_like_jobs_each_rank_has_its_own(run):
    record(run, 2, PARTIAL, over("tp", 2))
    grads, _ = replay(run, 2, PARTIAL, over("tp", 2))
    assert torch.equal(grads[0], X[:3].sum(0)) and torch.equal(grads[1], X[3:].sum(0))


def test_the_gradient_of_a_cut_value_is_cut_alike_and_needs_no_word(run):
    for rank in range(2):
        declare_mesh(tp=(rank, 2))
        with Recorder(run, rank=rank, world_size=2):
            x = torch.ones(2, requires_grad=True)
            (tap("x", x * 1, dims="h[tp]", grad=True) * (rank + 2)).sum().backward()
    declare_mesh()
    with Replayer(run) as session:
        x = torch.ones(4, requires_grad=True)
        tap("x", x * 1, dims="h", grad=True).sum().backward()
    assert x.grad.tolist() == [2, 2, 3, 3] and session.log()["outcome"].unique().to_list() == [
        "grafted"
    ]


def test_an_axis_with_a_second_name_is_cut_by_either(run):
    """Sequence parallelism cuts over tensor parallelism's ranks: they are no axis of their own."""
    with Recorder(run):
        x = torch.ones(4, requires_grad=True)
        (tap("x", x * 1, dims="t", grad=True) * torch.arange(4.0)).sum().backward()
    for rank in range(2):
        declare_mesh(tp=(rank, 2), sp=(rank, 2))
        with Replayer(run, rank=rank, world_size=2) as session:
            x = torch.ones(2, requires_grad=True)
            tap("x", x * 1, dims="t[sp]", grad=True).sum().backward()
        assert session.log()["outcome"].to_list() == ["grafted"] * 2
        assert x.grad.tolist() == [2.0 * rank, 2.0 * rank + 1]


def test_the_text_of_a_gradient_s_layout():
    text = "b s h # tp:replicated # grad: b s[cp] h[tp:partial] # s=8"
    assert parse_dims(text).replicated == {"tp"} and not parse_dims(text).partial
    assert gradient_dims(text) == "b s[cp] h[tp:partial] # s=8"
    placed = "h # grad: h # DTensor [4] tp:0/2=Partial(sum)"
    assert gradient_dims(placed) == "h # DTensor [4] tp:0/2=Partial(sum)"
    assert gradient_dims("h # h=4") == ""
    for wrong in ("h # grad: h[", "h # grad: h # grad: h", "h # grad: h[tp:odd]"):
        with pytest.raises(LayoutError, match="cannot be read"):
            parse_dims(wrong)
