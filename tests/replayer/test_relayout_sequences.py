"""Sequences that are padded, or in another order, and heads that ranks share: through replays."""

from __future__ import annotations

import pytest
import torch

from recorder import Recorder, Recording, declare_mesh, tap
from replayer import Replayer, diff

LENGTHS = [3, 5]
PACKED = torch.arange(8.0)[:, None].expand(8, 4).contiguous()  # token i holds i


@pytest.fixture(autouse=True)
def undeclared():
    yield
    declare_mesh()


def batch(fill, left=False):
    rows = torch.full((2, 5, 4), fill)
    for row, tokens in zip(rows, PACKED.split(LENGTHS), strict=True):
        row[-len(tokens) :] = tokens if left else row[-len(tokens) :]
        row[: len(tokens)] = row[: len(tokens)] if left else tokens
    return rows


def record(run, x, dims, **extras):
    with Recorder(run):
        tap("h", x, dims=dims, extras=extras or None)
    return Recording.open(run)


def replay(run, x, dims, **extras):
    with Replayer(run) as session:
        tap("h", x, dims=dims, extras=extras or None)
    return session.log().select("outcome", "message").row(0)


def test_rows_that_are_padded_on_the_left_get_their_own_tokens(run, tmp_path):
    one = record(run, PACKED, "t h", seq_lens=LENGTHS)
    target = torch.full((2, 5, 4), -1.0)
    found = replay(run, target, "b s h", seq_lens=LENGTHS, padding="left")
    assert found == ("grafted", "") and torch.equal(target, batch(-1.0, left=True))
    other = record(
        tmp_path / "left", batch(9.0, left=True), "b s h", seq_lens=LENGTHS, padding="left"
    )
    for a, b in ((one, other), (other, one)):
        assert diff(a.path, b.path).status == 0
    right = record(tmp_path / "right", batch(7.0), "b s h", seq_lens=LENGTHS, padding="right")
    assert diff(right.path, other.path).status == 0
    target = torch.full((2, 5, 4), -1.0)
    found = replay(tmp_path / "left", target, "b s h", seq_lens=LENGTHS, padding="right")
    assert found == ("grafted", "") and torch.equal(target, batch(-1.0))


def test_where_padding_stands_is_said_where_nobody_says(run, capsys):
    record(run, PACKED, "t h", seq_lens=LENGTHS)
    target = torch.full((2, 5, 4), -1.0)
    outcome, message = replay(run, target, "b s h", seq_lens=LENGTHS)
    assert outcome == "grafted" and torch.equal(target, batch(-1.0))
    told = "padding was taken to stand behind each sequence"
    assert told in message and f"tap h: {told}" in capsys.readouterr().err


def test_the_same_sequences_in_another_order_are_refused(run):
    record(run, batch(-9.0), "b s h", seq_lens=LENGTHS)
    target = torch.full((2, 5, 4), -1.0)
    outcome, message = replay(run, target, "b s h", seq_lens=LENGTHS[::-1])
    assert outcome == "error" and (target == -1).all()
    assert "the lengths [3, 5], the target's [5, 3]; feed both the same input" in message
    found = replay(run, target, "b s h", seq_lens=LENGTHS, padding="right")
    assert found[0] == "grafted" and torch.equal(target, batch(-1.0))


@pytest.mark.parametrize("said", [False, True])
def test_key_heads_that_ranks_share(run, said):
    """2 heads over 4 ranks, of which each two share one."""
    heads = torch.stack([torch.full((3, 2), float(i)) for i in range(2)], 1)
    record(run, heads, "s kv d")
    for rank in range(4):
        declare_mesh(tp=(rank, 4))
        target = torch.full((3, 1, 2), -1.0)
        with Replayer(run, rank=rank, world_size=4) as session:
            tap("h", target, dims="s kv[tp/2] d" if said else "s kv[tp] d")
        outcome, message = session.log().select("outcome", "message").row(0)
        if said or rank == 0:
            assert outcome == "grafted" and (target == rank // 2).all()
        else:
            assert outcome == "error" and "kv[tp:repeat]" in message and (target == -1).all()
