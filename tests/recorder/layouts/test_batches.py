"""Batches on both sides, padded as each has it: a plan each."""

from __future__ import annotations

import json

import pytest
import torch

from recorder.errors import LayoutError
from recorder.layouts.assemble import assemble, keep_padding
from recorder.layouts.blocks import Block
from recorder.layouts.parse import parse_dims
from recorder.layouts.plan import plan
from recorder.mesh import frozen

KEPT = -7
LENGTHS = [2, 3]
TOKENS = [[1, 2], [11, 12, 13]]


def rows(width, left=False, padding=KEPT):
    """Return the sequences padded to a width."""
    pad = [[padding] * (width - len(row)) for row in TOKENS]
    return [p + row if left else row + p for p, row in zip(pad, TOKENS, strict=True)]


def flat(some):
    return [token for row in some for token in row]


def block(rank, dims, shape, extras=None, **axes):
    text = json.dumps(extras) if extras else ""
    return Block(rank, parse_dims(dims), tuple(shape), frozen(axes), text)


def sent(dims, tensors, extras=None, axis="tp"):
    n = len(tensors)
    return [
        (block(k, dims, t.shape, extras, **{axis: (k, n)} if n > 1 else {}), t)
        for k, t in enumerate(tensors)
    ]


def carried(senders, receiver, world=1, receivers=1):
    """Return what a receiver that holds KEPT everywhere is given, and the note."""
    blocks = [one for one, _ in senders]
    by_rank = {one.rank: tensor for one, tensor in senders}
    made = plan(blocks, max(world, len(blocks)), receiver, receivers)
    got = assemble(made, blocks, receiver, lambda rank, share: by_rank[rank], lambda rank: "")
    got = keep_padding(made, receiver.shape, got, torch.full(receiver.shape, KEPT, dtype=got.dtype))
    return got.tolist(), made.note


def refused(senders, receiver, said, world=1, receivers=1):
    with pytest.raises(LayoutError) as caught:
        carried(senders, receiver, world, receivers)
    assert said in str(caught.value)


def told(side="", **more):
    return {"seq_lens": LENGTHS, **({"padding": side} if side else {}), **more}


def mask(width, left):
    return {"attention_mask": [[int(one != KEPT) for one in row] for row in rows(width, left)]}


@pytest.mark.parametrize("left", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("width", [(3, 3), (5, 4), (3, 6)])
@pytest.mark.parametrize("is_mask", [False, True])
def test_each_token_goes_where_its_own_side_has_it(left, width, is_mask):
    said = [
        mask(w, one) if is_mask else told("left" if one else "right")
        for w, one in zip(width, left, strict=True)
    ]
    senders = sent("b s", [torch.tensor(rows(width[0], left[0], -1))], said[0])
    receiver = block(0, "b s", (2, width[1]), said[1])
    assert carried(senders, receiver) == (rows(width[1], left[1]), "")
    fused = block(0, "(b*s)", (2 * width[1],), said[1])
    assert carried(senders, fused)[0] == flat(rows(width[1], left[1]))
    turned = block(0, "s b", (width[1], 2), said[1])
    assert torch.tensor(carried(senders, turned)[0]).t().tolist() == rows(width[1], left[1])


def test_a_batch_that_is_cut_along_both_dims():
    full = torch.tensor(rows(4, True, -1))
    meshes = [{"dp": (i, 2), "sp": (k, 2)} for i in range(2) for k in range(2)]
    extras = told("left")
    parts = [part for row in full.split(1) for part in row.split(2, 1)]
    senders = [
        (block(r, "b[dp] s[sp]", (1, 2), extras, **at), part)
        for r, (at, part) in enumerate(zip(meshes, parts, strict=True))
    ]
    receiver = block(0, "b s", (2, 3), told("right"))
    assert carried(senders, receiver, 4) == (rows(3), "")
    one = sent("b s", [torch.tensor(rows(3))], told("right"))
    for r, at in enumerate(meshes):
        for said in ({"dims": "b[dp] s[sp] # s=4", "extras": extras},
                     {"dims": "b[dp] s[sp]", "extras": mask(4, True)}):  # fmt: skip
            receiver = block(r, said["dims"], (1, 2), said["extras"], **at)
            k, i = at["sp"][0], at["dp"][0]
            assert carried(one, receiver, 1, 4)[0] == [rows(4, True)[i][2 * k : 2 * k + 2]]


def test_where_nobody_says_a_side_a_batch_is_copied_as_it_stands_and_that_is_said():
    for left in (False, True):
        senders = sent("b s", [torch.tensor(rows(4, left, -1))], told())
        got, note = carried(senders, block(0, "b s", (2, 4), told()))
        assert got == rows(4, left, -1)
        assert note.startswith("padding was taken to stand on the same side in both; say where")


def test_a_side_that_one_tap_leaves_out():
    right = sent("b s", [torch.tensor(rows(4))], told("right"))
    got, note = carried(right, block(0, "b s", (2, 4), told()))
    assert got == rows(4) and note.startswith("padding was taken to stand behind each sequence")
    left = sent("b s", [torch.tensor(rows(4, True))], told("left"))
    said = "the senders' padding stands on the left and nobody says where the target's stands"
    refused(left, block(0, "b s", (2, 4), told()), said)
    # Without padding there is nothing to say.
    assert carried(left, block(0, "t", (5,), told())) == (flat(TOKENS), "")
    full = sent("b s", [torch.ones(2, 3)], {"seq_lens": [3, 3]})
    assert carried(full, block(0, "b s", (2, 3), {"seq_lens": [3, 3], "padding": "left"}))[1] == ""


def test_sides_that_differ_where_nobody_gives_lengths():
    senders = sent("b s", [torch.tensor(rows(4, True))], {"padding": "left"})
    said = "the senders' padding stands on the left and the target's padding stands on the right"
    refused(senders, block(0, "b s", (2, 4), {"padding": "right"}), said)
    assert carried(senders, block(0, "b s", (2, 4), {"padding": "left"}))[0] == rows(4, True)


@pytest.mark.parametrize(
    "dims", [("b s", "b s"), ("(b*s)", "b s"), ("t", "b s"), ("b s", "t"), ("t", "t"), ("s", "s")]
)
@pytest.mark.parametrize(
    "other",
    [{"seq_lens": [3, 2]}, {"cu_seqlens": [0, 3, 5]}, {"attention_mask": [[1, 1, 1], [1, 1, 0]]}],
)
def test_another_order_is_refused_however_it_is_said(dims, other):
    shapes = {"b s": (2, 3), "(b*s)": (6,), "t": (5,), "s": (5,)}
    senders = sent(dims[0], [torch.zeros(shapes[dims[0]])], told("right"))
    said = (
        "the senders' sequences have the lengths [2, 3], the target's [3, 2]; feed both the same "
        "input, in the same order"
    )
    refused(senders, block(0, dims[1], shapes[dims[1]], other), said)


def test_another_order_is_refused_where_only_the_batch_is_left():
    senders = sent("b v", [torch.zeros(2, 4)], told())
    said = "the lengths [2, 3], the target's [3, 2]"
    refused(senders, block(0, "b v", (2, 4), {"seq_lens": [3, 2]}), said)
    assert carried(senders, block(0, "b v", (2, 4), told()))[0] == [[0.0] * 4] * 2
    own = [
        (block(k, "b[tp] v", (1, 4), {"seq_lens": [n]}, tp=(k, 2)), torch.zeros(1, 4))
        for k, n in enumerate(LENGTHS)
    ]
    assert carried(own, block(0, "b v", (2, 4), told()))[0] == [[0.0] * 4] * 2


def test_dims_that_fuse_a_batch_with_more_are_held_to_their_sides():
    senders = sent("b (s*h)", [torch.zeros(2, 8)], told("left"))
    said = "the senders' padding stands on the left and nobody says where the target's stands"
    refused(senders, block(0, "b (s*h)", (2, 8), told()), said)
    assert carried(senders, block(0, "b (s*h)", (2, 8), told("left")))[0]


def test_a_mask_whose_rows_are_not_the_tensor_s():
    senders = sent("b s", [torch.tensor(rows(3))], told("right"))
    said = "the target's attention mask has rows of 4, and its sequences 6 with their padding"
    refused(senders, block(0, "b s", (2, 6), mask(4, True)), said)
    refused(sent("t", [torch.ones(5)]), block(0, "b s", (2, 6), mask(4, True)), said)
    assert carried(senders, block(0, "b s", (2, 6), mask(4, False)))[0] == rows(6)


def test_a_size_that_is_declared_is_where_padding_on_the_left_ends():
    """Two ranks hold 2 of 4 each; sequences have room for 3, and the last is padding of the dim."""
    full = torch.tensor([[*row, -1] for row in rows(3, True, -1)])
    senders = sent("b s[tp] # s=3", list(full.chunk(2, 1)), told("left"))
    assert carried(senders, block(0, "t", (5,), told())) == (flat(TOKENS), "")
    assert carried(senders, block(0, "b s", (2, 4), told("right")))[0] == rows(4)
    back = sent("t", [torch.tensor(flat(TOKENS))], told())
    for k in range(2):
        receiver = block(k, "b s[tp] # s=3", (2, 2), told("left"), tp=(k, 2))
        got = carried(back, receiver, 1, 2)[0]
        assert got == [[*row, KEPT][2 * k :][:2] for row in rows(3, True)]
    said = "dim s has 4, and the other side declares 3 without padding; the target's padding stands"
    refused(senders, block(0, "b s", (2, 4), told("left")), said)


def test_padding_on_the_left_of_rows_whose_size_nobody_says():
    senders = sent("b s", [torch.tensor(rows(5, True))], told("left"))
    said = "or where it has 6 in all; declare which at the target's tap: s[tp:chunk] or '# s=6'"
    refused(senders, block(0, "b s[tp:chunk]", (2, 3), told("left"), tp=(0, 2)), said, 1, 2)
    short = sent("b s", [torch.tensor(rows(3))], told("right"))
    said = "which does not tell how many there are in all, and its padding stands on the left"
    refused(short, block(1, "b s[tp:chunk]", (2, 1), told("left"), tp=(1, 2)), said, 1, 2)
    receiver = block(0, "b s[tp:chunk] # s=5", (2, 3), told("left"), tp=(0, 2))
    assert carried(senders, receiver, 1, 2)[0] == [row[:3] for row in rows(5, True)]


def test_a_fill_is_what_stands_in_the_padding_of_sequences():
    senders = sent("t", [torch.tensor(flat(TOKENS))], told())
    got = carried(senders, block(0, "b s # s:fill=0", (2, 4), told("left")))[0]
    assert got == [[0, 0, 1, 2], [0, 11, 12, 13]]


def test_a_block_of_a_batch_that_nobody_recorded():
    full = torch.tensor(rows(4, False))
    senders = sent("b[tp] s", list(full.chunk(2)), told("right"))
    refused(senders[:1], block(0, "b s", (2, 4), told("right")), "no sender recorded index", 2)
    senders = sent("b s[tp]", list(full.chunk(2, 1)), told("right"))
    with pytest.raises(LayoutError, match="recorded"):
        carried(senders[:1], block(0, "b s", (2, 5), told("right")), 2)


def test_a_line_of_several_sequences_belongs_to_a_batch_as_tokens_do():
    senders = sent("s", [torch.tensor(flat(TOKENS))], told())
    assert carried(senders, block(0, "b s", (2, 4), told("left"))) == (rows(4, True), "")
    back = sent("(b*s)", [torch.tensor(flat(rows(4, True, -1)))], told("left"))
    assert carried(back, block(0, "s", (5,), told())) == (flat(TOKENS), "")


def test_tokens_whose_padding_nobody_tells_apart():
    """Ten tokens of two sequences of 2 and 3: rows of a batch, or packed with five behind."""
    packed = sent("t", [torch.tensor(flat(rows(5, False, -1)))], told())
    _, note = carried(packed, block(0, "t", (5,), told()))
    assert note == (
        "padding, 5 of 10 tokens, was taken to stand behind the last sequence; if each has padding "
        "of its own, say so at the tap with extras={'padded_seq_lens': [...]}"
    )
    room = sent("t", [packed[0][1]], told(padded_seq_lens=[5, 5]))
    assert carried(room, block(0, "t", (5,), told())) == (flat(TOKENS), "")
    left = sent("t", [torch.tensor(flat(rows(5, True, -1)))], told("left"))
    said = "padding stands on the left, and of 10 tokens nobody says how much of the 5 of padding"
    refused(left, block(0, "t", (5,), told()), said)
    masked = sent("t", [left[0][1]], mask(5, True))
    said = "attention mask has 5 tokens, and there are 10, of which it does not say where the other"
    refused(masked, block(0, "t", (5,), told()), said)


def test_an_empty_block_may_say_that_it_has_no_sequences():
    senders = [
        (block(0, "t[ep]", (5,), told(), ep=(0, 2)), torch.tensor(flat(TOKENS))),
        (block(1, "t[ep]", (0,), {"seq_lens": []}, ep=(1, 2)), torch.zeros(0, dtype=torch.int64)),
    ]
    assert carried(senders, block(0, "t", (5,), told()), 2)[0] == flat(TOKENS)


def test_senders_that_contradict_each_other_on_the_side():
    senders = sent("b[tp] s", list(torch.tensor(rows(4)).chunk(2)))
    sides = [{"padding": "right"}, {"padding": "left"}]
    senders = [
        (block(one.rank, "b[tp] s", one.shape, side, tp=(one.rank, 2)), tensor)
        for (one, tensor), side in zip(senders, sides, strict=True)
    ]
    said = "padding stands on the left on sender rank 1 and on the right on sender rank 0"
    refused(senders, block(0, "b s", (2, 4)), said)
