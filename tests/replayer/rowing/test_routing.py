"""Routing replay: a server's choices of experts, grafted into a trainer token by token."""

from __future__ import annotations

import pytest
import torch
from tokened import BATCH, LENGTH, TOKENS, batch, randn, server

from recorder import Recorder, rows, tap, token_rows
from recorder.tokens.hashing import before
from recorder.tokens.known import known_of
from replayer import Replayer, diff

LAYERS, EXPERTS, CHOSEN = 3, 8, 2
SCORES = [randn(BATCH, LENGTH, EXPERTS, seed=i) for i in range(LAYERS)]
NOISY = [scores + 0.1 * randn(*scores.shape, seed=9) for scores in SCORES]


def chosen(scores):
    """Return (indices, weights) of each layer."""
    found = [one.softmax(-1).topk(CHOSEN) for one in scores]
    return [(one.indices, one.values) for one in found]


def taps(routes, scores=None):
    made = {}
    for i, (indices, weights) in enumerate(routes):
        if scores is not None:
            made["scores", (("layer", i),)] = scores[i]
        made["experts", (("layer", i),)] = indices
        made["weights", (("layer", i),)] = weights
    return made


def trained(replay_of, scores, tokens=TOKENS, pad=2, **options):
    """Replay onto a trainer, one padded batch; return the session and what layers ended with."""
    mask = torch.ones(BATCH, LENGTH + pad, dtype=torch.long)
    mask[:, LENGTH:] = 0
    ids = token_rows(torch.nn.functional.pad(tokens, (0, pad)), attention_mask=mask)
    routes = []
    with Replayer(replay_of, **options) as session, rows({"b s": ids}):
        for i, (indices, weights) in enumerate(chosen(scores)):
            indices = torch.nn.functional.pad(indices, (0, 0, 0, pad), value=-7)
            weights = torch.nn.functional.pad(weights, (0, 0, 0, pad), value=-7.0)
            tap("experts", indices, dims="b s x", layer=i)
            tap("weights", weights, dims="b s x", layer=i)
            routes.append((indices, weights))
    return session, routes


def messages(session, name="experts"):
    log = session.log()
    return log.filter(log["name"] == name)["message"].to_list()


def test_every_token_gets_the_server_s_experts_and_weights(tmp_path):
    server(tmp_path / "base", taps(chosen(SCORES)))
    session, routes = trained(tmp_path / "base", NOISY, strict=True)
    for (indices, weights), (there, weigh) in zip(routes, chosen(SCORES), strict=True):
        assert torch.equal(indices[:, :LENGTH], there) and torch.equal(weights[:, :LENGTH], weigh)
        assert bool((indices[:, LENGTH:] == -7).all()) and bool((weights[:, LENGTH:] == -7).all())
    flips = [
        int((a.sort(-1).values != b.sort(-1).values).any(-1).sum())
        for (a, _), (b, _) in zip(chosen(SCORES), chosen(NOISY), strict=True)
    ]
    assert messages(session) == [f"{n} of 40 rows chose others" for n in flips]
    assert session.summary().notes == ()


def test_rows_that_the_server_did_not_compute_keep_the_trainer_s(tmp_path):
    server(tmp_path / "base", taps(chosen(SCORES)), drop=(1,))
    session, routes = trained(tmp_path / "base", NOISY)
    log = session.log()
    assert log["rows_found"].to_list() == [28] * 6 and log["rows_missing"].to_list() == [12] * 6
    indices, own = routes[1][0], chosen(NOISY)[1][0]
    assert torch.equal(indices[:, 3:6], own[:, 3:6])
    assert torch.equal(indices[:, 6:LENGTH], chosen(SCORES)[1][0][:, 6:])
    assert session.summary().notes[0] == (
        "rows: 168 grafted, 72 not recorded in 6 taps, which kept their values, the first: experts "
        "layer=0 step=0 on rank 0"
    )
    assert session.problems(True) == [
        "--strict: 72 rows of 6 taps had no record, the first: experts layer=0 step=0 on rank 0"
    ]


def test_a_table_that_is_another_layer_s_is_said(tmp_path, capsys):
    routes = chosen(SCORES)
    server(tmp_path / "base", taps([routes[(i + 1) % LAYERS] for i in range(LAYERS)]))
    session, _ = trained(tmp_path / "base", NOISY)
    said = "what the target chose was recorded as experts layer=0: is the table off by one?"
    assert said in messages(session)[1]
    assert said in capsys.readouterr().err
    batch(tmp_path / "b", taps(chosen(SCORES)))
    found = diff(tmp_path / "base", tmp_path / "b", filter='name == "experts"').pairs["message"]
    assert "B's rows are those of experts layer=0 in A" in found[1]


@pytest.mark.parametrize(("by", "word"), [(1, "behind"), (-1, "before")])
def test_a_table_that_is_another_token_s_is_said(tmp_path, capsys, by, word):
    routes = [
        (torch.roll(indices, by, 1), torch.roll(weights, by, 1))
        for indices, weights in chosen(SCORES)
    ]
    server(tmp_path / "base", taps(routes))
    session, _ = trained(tmp_path / "base", NOISY)
    said = (
        f"what the target chose for most tokens was recorded for the token {word} each: is the "
        "table off by one token?"
    )
    assert all(said in message for message in messages(session))
    assert said in capsys.readouterr().err
    batch(tmp_path / "b", taps(chosen(SCORES)))
    there = "behind" if by > 0 else "before"
    for message in diff(tmp_path / "base", tmp_path / "b").pairs["message"]:
        assert f"each row of B is A's of the token {there} it" in message


def test_zeros_for_the_rows_of_a_prompt_are_said(tmp_path, capsys):
    routes = [(indices.clone(), weights) for indices, weights in chosen(SCORES)]
    for indices, _ in routes:
        indices[:, :4] = 0
    server(tmp_path / "base", taps(routes))
    session, _ = trained(tmp_path / "base", SCORES)
    said = "16 grafted rows of 40 have index 0 in all 2 places: nothing was chosen there"
    assert all(said in message for message in messages(session))
    assert said in capsys.readouterr().err
    batch(tmp_path / "b", taps(chosen(SCORES)))
    found = diff(tmp_path / "base", tmp_path / "b", filter='name == "experts"')
    assert found.status == 1
    assert all(
        "in A 16 rows of 40 have index 0 in all 2 places" in message
        for message in found.pairs["message"]
    )


def test_indices_without_their_weights_are_said(tmp_path):
    server(tmp_path / "base", taps(chosen(SCORES)))
    session, routes = trained(tmp_path / "base", NOISY, filter='name == "experts"')
    assert session.summary().notes == (
        "experts layer=0 was grafted, and weights, recorded beside it with the same shape, was "
        "not: what is chosen is the baseline's, and how it is weighed the target's; graft both, or "
        "tap where the weights follow from the indices",
    )
    assert torch.equal(routes[0][1][:, :LENGTH], chosen(NOISY)[0][1])


def test_weights_that_the_server_did_not_record_are_said(tmp_path):
    made = taps(chosen(SCORES))
    server(tmp_path / "base", {about: one for about, one in made.items() if about[0] == "experts"})
    session, routes = trained(tmp_path / "base", NOISY)
    assert session.summary().notes == (
        "experts layer=0 was grafted, and weights, tapped beside it with as many numbers a row, "
        "was not recorded: what is chosen is the baseline's, and how it is weighed the target's; "
        "tap it in the baseline too, if these are its weights",
    )
    assert torch.equal(routes[0][1][:, :LENGTH], chosen(NOISY)[0][1])


def test_scores_or_other_rows_that_were_not_recorded_are_no_weights(tmp_path):
    made = taps(chosen(SCORES))
    server(tmp_path / "base", {about: one for about, one in made.items() if about[0] == "experts"})
    (indices, weights), scores = chosen(NOISY)[0], NOISY[0]
    with Replayer(tmp_path / "base") as session, rows({"b s": token_rows(TOKENS)}):
        tap("experts", indices, dims="b s x", layer=0)
        tap("scores", scores, dims="b s e", layer=0)
        tap("weights", weights, dims="b s x", layer=1)
        tap("mask", weights > 0.1, dims="b s x", layer=0)
    with Replayer(tmp_path / "base") as other, rows({"b s": token_rows(TOKENS)[:, :5]}):
        tap("weights", weights[:, :5].contiguous(), dims="b s x", layer=0)
    assert session.summary().notes == other.summary().notes == ()


@pytest.mark.parametrize("is_same", [True, False])
def test_without_rows_the_shapes_say_what_stands_beside_a_choice(tmp_path, is_same):
    (indices, weights), *_ = chosen(SCORES)
    with Recorder(tmp_path / "base"):
        tap("experts", indices)
    with Replayer(tmp_path / "base") as session:
        tap("experts", indices)
        tap("weights", weights if is_same else weights[:, 1:])
    assert bool(session.summary().notes) == is_same


def test_clean_routes_are_not_suspected(tmp_path, capsys):
    server(tmp_path / "base", taps(chosen(SCORES)))
    for scores in (SCORES, NOISY):
        trained(tmp_path / "base", scores)
    assert capsys.readouterr().err == ""


def test_a_diff_counts_flips_and_their_margins_layer_by_layer(tmp_path):
    server(tmp_path / "a", taps(chosen(SCORES), SCORES))
    batch(tmp_path / "b", taps(chosen(NOISY)))
    pairs = diff(tmp_path / "a", tmp_path / "b", filter='name == "experts"').pairs
    pairs = pairs.sort("tags")
    for i, row in enumerate(pairs.iter_rows(named=True)):
        x, y = chosen(SCORES)[i][0].flatten(0, 1), chosen(NOISY)[i][0].flatten(0, 1)
        other = (x.sort(1).values != y.sort(1).values).any(1)
        scores = SCORES[i].flatten(0, 1).double()
        a, b = (scores.gather(1, one).sort(1).values for one in (x, y))
        margins = (a - b).abs().amax(1)[other]
        assert row["flips"] == int(other.sum()) > 0
        assert row["margin"] == pytest.approx(float(margins.max()))
        assert row["margin_typical"] == pytest.approx(float(margins.median()))


def test_another_order_of_the_same_experts_is_no_flip(tmp_path):
    server(tmp_path / "a", taps(chosen(SCORES)))
    batch(tmp_path / "b", taps([(i.flip(-1), w.flip(-1)) for i, w in chosen(SCORES)]))
    pairs = diff(tmp_path / "a", tmp_path / "b", filter='name == "experts"').pairs
    assert pairs["flips"].to_list() == [0] * LAYERS


def test_the_hash_goes_backwards():
    tokens = torch.randint(-5, 1 << 40, (400,), generator=torch.Generator().manual_seed(1))
    ids = token_rows(tokens, salt="x")
    known = known_of(ids)
    candidates = before(ids, known.tokens, known.positions)
    assert bool((candidates[:, 1:] == ids[:-1]).any(0).all())
