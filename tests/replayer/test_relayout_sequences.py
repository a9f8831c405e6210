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


MASK = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("mask", [MASK, torch.tensor(MASK), torch.tensor(MASK).bool()])
def test_a_mask_says_where_padding_stands(run, tmp_path, mask):
    one = record(run, PACKED, "t h", seq_lens=LENGTHS)
    target = torch.full((2, 5, 4), -1.0)
    assert replay(run, target, "b s h", attention_mask=mask) == ("grafted", "")
    assert torch.equal(target, batch(-1.0, left=True))
    other = record(tmp_path / "b", batch(9.0, left=True), "b s h", attention_mask=mask)
    for a, b in ((one, other), (other, one)):
        assert diff(a.path, b.path).status == 0
    target = torch.full((8, 4), -1.0)
    assert replay(other.path, target, "t h", cu_seqlens=[0, 3, 8])[0] == "grafted"
    assert torch.equal(target, PACKED)


def test_a_mask_with_a_hole_is_refused_in_replay_and_diff(run, tmp_path):
    one = record(run, PACKED, "t h", seq_lens=LENGTHS)
    mask = [[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]
    target = torch.full((2, 5, 4), -1.0)
    outcome, message = replay(run, target, "b s h", attention_mask=mask)
    said = "extras['attention_mask'] has a hole in row 0, [1, 0, 1, 1, 0]; give one whose rows"
    assert outcome == "error" and said in message and (target == -1).all()
    other = record(tmp_path / "b", batch(9.0), "b s h", attention_mask=mask)
    found = diff(one.path, other.path)
    assert found.status == 1 and said in found.pairs["message"][0]


@pytest.mark.parametrize(
    ("dims", "shape"),
    [("b s h", (2, 5, 4)), ("t h", (8, 4)), ("s h", (8, 4)), ("b h", (2, 4)), (None, (2, 5, 4))],
)
def test_another_order_is_refused_in_replay_and_diff_whatever_the_dims(run, tmp_path, dims, shape):
    a = record(run, torch.ones(shape), dims, seq_lens=LENGTHS)
    target = torch.full(shape, -1.0)
    outcome, message = replay(run, target, dims, seq_lens=LENGTHS[::-1])
    assert outcome == "error" and (target == -1).all()
    both = "feed both the same input, in the same order"
    said = f"the senders' sequences have the lengths [3, 5], the target's [5, 3]; {both}"
    assert message.startswith(said)
    for other in (torch.ones(shape), torch.zeros(shape)):
        b = record(tmp_path / str(other.sum()), other, dims, seq_lens=LENGTHS[::-1])
        found = diff(a.path, b.path)
        said = f"A's ranks' sequences have the lengths [3, 5], B's [5, 3]; {both}"
        assert (found.status, found.pairs["message"][0]) == (1, said)
        assert found.pairs["outcome"].to_list() == ["error"]


def test_another_order_is_refused_where_one_side_declares_no_dims(run, tmp_path):
    one = record(run, batch(9.0), "b s h", seq_lens=LENGTHS)
    other = record(tmp_path / "b", batch(7.0), None, seq_lens=LENGTHS[::-1])
    for a, b in ((one, other), (other, one)):
        found = diff(a.path, b.path)
        assert found.pairs["outcome"].to_list() == ["error"]
        assert "feed both the same input, in the same order" in found.pairs["message"][0]
    target = torch.full((2, 5, 4), -1.0)
    for path, dims in ((run, None), (other.path, "b s h")):
        lengths = LENGTHS if dims else LENGTHS[::-1]
        assert replay(path, target, dims, seq_lens=lengths)[0] == "error" and (target == -1).all()


def test_padding_is_told_from_tokens_where_one_side_declares_no_dims(run, tmp_path):
    one = record(run, batch(9.0), "b s h", seq_lens=LENGTHS, padding="right")
    other = record(tmp_path / "b", batch(7.0), None, padding="right")
    wrong = batch(7.0)
    wrong[1, 4] = 99
    third = record(tmp_path / "c", wrong, None, padding="right")
    for a, b, status in ((one, other, 0), (other, one, 0), (one, third, 1), (third, one, 1)):
        found = diff(a.path, b.path)
        assert (found.status, found.pairs["outcome"][0]) == (status, ["equal", "differs"][status])


@pytest.mark.parametrize("dims", ["b s h", None])
def test_a_side_that_only_one_tap_says_is_refused_in_replay_and_diff(run, tmp_path, dims):
    a = record(run, batch(9.0, left=True), dims, seq_lens=LENGTHS, padding="left")
    target = torch.full((2, 5, 4), -1.0)
    for extras in ({}, {"seq_lens": LENGTHS}):
        outcome, message = replay(run, target, dims, **extras)
        assert outcome == "error" and (target == -1).all()
        said = "padding stands on the left and nobody says where the target's stands; pad both"
        assert f"the senders' {said}" in message
        b = record(tmp_path / str(len(extras)), batch(7.0), dims, **extras)
        found = diff(a.path, b.path)
        said = "A's ranks' padding stands on the left and nobody says where B's stands; pad both"
        assert found.status == 1 and said in found.pairs["message"][0]


def test_what_is_padded_is_left_alone_between_like_jobs(run, capsys):
    record(run, batch(9.0), "b s h", seq_lens=LENGTHS, padding="right")
    target = torch.full((2, 5, 4), -1.0)
    assert replay(run, target, "b s h", seq_lens=LENGTHS, padding="right") == ("grafted", "")
    assert torch.equal(target, batch(-1.0)) and "padding" not in capsys.readouterr().err


def test_ranks_with_data_of_their_own_and_no_mesh_keep_to_their_own_lengths(run):
    lengths = [[3, 5], [5, 2]]
    for rank in (0, 1):
        with Recorder(run, rank=rank, world_size=2):
            x = torch.full((2, 5), float(rank))
            tap("h", x, dims="b s", extras={"seq_lens": lengths[rank], "padding": "right"})
    for rank, order, wanted in ((0, 1, "grafted"), (1, 1, "grafted"), (1, -1, "error")):
        extras = {"seq_lens": lengths[rank][::order], "padding": "right"}
        target = torch.full((2, 5), -1.0)
        with Replayer(run, rank=rank, world_size=2) as session:
            tap("h", target, dims="b s", extras=extras)
        assert session.log()["outcome"].to_list() == [wanted]
        assert (target == rank).sum() == (sum(lengths[rank]) if wanted == "grafted" else 0)


def test_axes_without_a_mesh_do_not_hide_another_order(run):
    blocks = [torch.full((1, 5, 2), float(rank)) for rank in range(4)]
    for rank, block in enumerate(blocks):
        with Recorder(run, rank=rank, world_size=4):
            tap("h", block, dims="b[dp] s h[tp]", extras={"seq_lens": LENGTHS})
    for order, wanted in ((1, "grafted"), (-1, "error")):
        for rank, block in enumerate(blocks):
            target = torch.full_like(block, -1)
            with Replayer(run, rank=rank, world_size=4) as session:
                tap("h", target, dims="b[dp] s h[tp]", extras={"seq_lens": LENGTHS[::order]})
            outcome, message = session.log().select("outcome", "message").row(0)
            assert outcome == wanted and (target == (rank if order == 1 else -1)).all()
            assert order == 1 or "the lengths [3, 5], the target's [5, 3]" in message


@pytest.mark.parametrize("left", [False, True])
def test_a_whole_tensor_has_its_padding_where_the_ranks_have_it(run, left):
    full = batch(9.0, left=left)
    side = "left" if left else "right"
    for rank, part in enumerate(full.split(1)):
        declare_mesh(dp=(rank, 2))
        with Recorder(run, rank=rank, world_size=2):
            tap("h", part, dims="b[dp] s h", extras={"seq_lens": LENGTHS, "padding": side})
    declare_mesh()
    assert torch.equal(Recording.open(run).load_logical("h"), full)
    target = torch.full((2, 5, 4), -1.0)
    with Replayer(run, transform=lambda g: g.to_local(g.logical() + 1)):
        extras = {"seq_lens": LENGTHS, "padding": "left"}
        tap("h", target, dims="b s h", extras=extras)
    assert torch.equal(target, batch(-2.0, left=True) + 1)


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
