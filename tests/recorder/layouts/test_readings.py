"""What a receiver's block can be, where one size and one place leave more than one reading."""

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

KEPT = -7.0


def block(rank, dims, shape, extras=None, **axes):
    return Block(
        rank, parse_dims(dims), tuple(shape), frozen(axes), json.dumps(extras) if extras else ""
    )


def sent(dims, tensors, meshes=None, extras=None):
    meshes = meshes or [{} for _ in tensors]
    return [
        (block(k, dims, t.shape, extras, **at), t)
        for k, (t, at) in enumerate(zip(tensors, meshes, strict=True))
    ]


def carried(senders, receiver, receivers=1):
    """Return what a receiver that holds KEPT everywhere is given, and the note."""
    blocks = [one for one, _ in senders]
    made = plan(blocks, len(blocks), receiver, receivers)
    got = assemble(made, blocks, receiver, lambda rank, share: senders[rank][1], lambda rank: "")
    got = keep_padding(made, receiver.shape, got, torch.full(receiver.shape, KEPT, dtype=got.dtype))
    return got.tolist(), made.note


def refused(senders, receiver, said, receivers=1):
    with pytest.raises(LayoutError) as caught:
        carried(senders, receiver, receivers)
    assert said in str(caught.value)


def over(**axes):
    meshes = [{}]
    for axis, size in axes.items():
        meshes = [{**mesh, axis: (k, size)} for mesh in meshes for k in range(size)]
    return meshes


def test_two_axes_that_cut_unevenly_as_declared():
    senders = sent("d", [torch.arange(12.0)])
    got = []
    for k, at in enumerate(over(cp=2, sp=4)):
        size = 0 if at["sp"][0] == 3 else 2
        got += carried(senders, block(k, "d[cp:chunk,sp:chunk] # d=12", (size,), **at), 8)[0]
    assert got == list(range(12))


def test_two_axes_and_a_size_that_say_neither_padding_nor_how_it_is_cut():
    """A size that is declared is that without padding; that it was taken so is said."""
    senders, at = sent("d", [torch.arange(12.0)]), {"cp": (1, 2), "sp": (0, 4)}
    got, note = carried(senders, block(4, "d[cp,sp] # d=12", (2,), **at), 8)
    assert got == [8, 9] and note == (
        "dim d[cp,sp]: taken to be padded to 16; if it is not, write d[cp:chunk,sp:chunk]"
    )
    got, note = carried(senders, block(4, "d[cp,sp] # d=12 d:padded", (2,), **at), 8)
    assert got == [8, 9] and note == ""
    # The first block begins at the first index, whichever it is.
    at = {"cp": (0, 2), "sp": (0, 4)}
    assert carried(senders, block(0, "d[cp,sp] # d=12", (2,), **at), 8) == ([0, 1], "")


def test_padding_of_a_dim_that_the_other_side_has_fused():
    whole = torch.arange(12.0).view(6, 2)
    senders = sent("(e*b)", [whole.flatten()])
    got = []
    for k, at in enumerate(over(cp=2, tp=2)):
        for facts in ("e=6", "e=6 e:padded"):
            receiver = block(k, f"e[cp,tp] b # {facts}", (2, 2), **at)
            rows = carried(senders, receiver, 4)[0]
        got += rows
    assert got == [*whole.tolist(), [KEPT, KEPT], [KEPT, KEPT]], "the last block is padding alone"
    padded = torch.cat([whole, torch.full((2, 2), 99.0)])
    back = sent("e[cp,tp] b # e=6", list(padded.chunk(4)), over(cp=2, tp=2))
    assert carried(back, block(0, "(e*b)", (12,)))[0] == list(range(12))
    assert carried(back, block(0, "(b*e)", (12,)))[0] == whole.t().flatten().tolist()


def test_packed_tokens_cut_as_tensor_split_does():
    """Sequences of 4 and 5 over 3 ranks: 2 1 1 and 2 2 1, where torch.chunk has 2 2 0 and 2 2 1."""
    extras = {"seq_lens": [4, 5]}
    first, second = torch.arange(9.0).split([4, 5])
    blocks = [
        torch.cat([a, b])
        for a, b in zip(first.tensor_split(3), second.tensor_split(3), strict=True)
    ]
    for dims in ("t[cp]", "t[cp:split]"):  # their sizes tell as much
        senders = sent(dims, blocks, over(cp=3), extras)
        assert carried(senders, block(0, "t", (9,), extras))[0] == list(range(9))
    senders = sent("t", [torch.arange(9.0)], extras=extras)
    for k, wanted in enumerate(blocks):
        receiver = block(k, "t[cp:split]", wanted.shape, extras, cp=(k, 3))
        assert carried(senders, receiver, 3)[0] == wanted.tolist()


def test_packed_tokens_whose_cut_is_open_are_asked_about():
    """7 over 3 ranks in 6 chunks: 2 2 2 1 0 0, or 2 1 1 1 1 1, both with 2 on the second rank."""
    extras = {"seq_lens": [7]}
    senders = sent("t", [torch.arange(7.0)], extras=extras)
    said = "declare which at the target's tap: t[cp:zigzag+chunk]"
    refused(senders, block(1, "t[cp:zigzag]", (2,), extras, cp=(1, 3)), said, 3)
    receiver = block(1, "t[cp:zigzag+split]", (2,), extras, cp=(1, 3))
    assert carried(senders, receiver, 3)[0] == [2, 5]


@pytest.mark.parametrize("rule", ["chunk", "split"])
def test_zigzag_where_twice_the_ranks_do_not_divide(rule):
    whole = torch.arange(5.0)
    parts = list(whole.chunk(4) if rule == "chunk" else whole.tensor_split(4))
    parts += [whole[:0]] * (4 - len(parts))
    blocks = [torch.cat([parts[k], parts[3 - k]]) for k in range(2)]
    senders = sent(f"s[cp:zigzag+{rule}]", blocks, over(cp=2))
    assert carried(senders, block(0, "s", (5,)))[0] == list(range(5))
    for k, wanted in enumerate(blocks):
        receiver = block(k, f"s[cp:zigzag+{rule}]", wanted.shape, cp=(k, 2))
        assert carried(sent("s", [whole]), receiver, 2)[0] == wanted.tolist()


def test_one_padded_sequence_without_a_batch():
    """It is one line that cp cuts, padding and all: not packed tokens with padding behind."""
    extras = {"seq_lens": [2]}
    tokens = torch.tensor([1.0, 2.0, 99.0, 99.0])
    senders = sent("s[cp]", list(tokens.chunk(2)), over(cp=2), extras)
    got, note = carried(senders, block(0, "t", (2,)))
    assert got == [1, 2] and note.startswith("padding was taken to stand behind each sequence")
    zigzag = [tokens[[0, 3]], tokens[[1, 2]]]
    senders = sent("s[cp:zigzag]", zigzag, over(cp=2), extras)
    assert carried(senders, block(0, "t", (2,), extras))[0] == [1, 2]
    senders = sent("t", [tokens[:2]], extras=extras)
    for k, wanted in enumerate(([1, KEPT], [2, KEPT])):
        assert carried(senders, block(k, "s[cp:zigzag]", (2,), cp=(k, 2)), 2)[0] == wanted


def test_sequences_in_a_line_that_may_each_be_cut_by_itself():
    senders = sent("t", [torch.arange(8.0)], extras={"seq_lens": [4, 4]})
    said = "of which nobody says whether each is cut by itself; call the dim t if each is"
    refused(senders, block(0, "s[cp]", (4,), cp=(0, 2)), said, 2)
    assert carried(senders, block(0, "s[sp]", (4,), sp=(0, 2)), 2)[0] == [0, 1, 2, 3]


def test_batch_and_sequence_in_even_blocks_need_no_size():
    extras = {"seq_lens": [3, 4]}
    senders = sent("t", [torch.arange(7.0)], extras=extras)
    rows = torch.tensor([[0, 1, 2, KEPT], [3, 4, 5, 6]])
    for k in range(2):
        receiver = block(k, "b s[sp]", (2, 2), extras, sp=(k, 2))
        got, note = carried(senders, receiver, 2)
        assert got == rows.chunk(2, 1)[k].tolist()
        assert "s was taken to have 4 in all, as blocks of one size make it" in note
        receiver = block(k, "b[dp] s", (1, 4), extras, dp=(k, 2))
        assert carried(senders, receiver, 2)[0] == rows.chunk(2)[k].tolist()
        receiver = block(k, "(b*s)[sp]", (4,), extras, sp=(k, 2))
        assert carried(senders, receiver, 2)[0] == rows.flatten().chunk(2)[k].tolist()
    uneven = block(1, "b s[sp:chunk]", (2, 2), extras, sp=(1, 2))
    refused(senders, uneven, "declare it at the target's tap, as in '# s=SIZE'", 2)


def test_key_heads_that_are_fewer_than_the_ranks():
    """2 heads over 4 ranks: ranks 0 and 1 share the first, 2 and 3 the second."""
    heads = torch.arange(2.0)
    senders = sent("kv", [heads])
    said = "can begin at 1, as torch.chunk cuts, or at 0, where 2 ranks share each block"
    refused(senders, block(1, "kv[tp]", (1,), tp=(1, 4)), said, 4)
    for k in (2, 3):
        receiver = block(k, "kv[tp]", (1,), tp=(k, 4))
        refused(senders, receiver, "if 2 ranks hold the same, write kv[tp:repeat]", 4)
    _, note = carried(senders, block(1, "kv[tp] # kv=2", (1,), tp=(1, 4)), 4)
    assert note == "dim kv[tp]: taken to be padded to 4; if it is not, write kv[tp:repeat]"
    for k in range(4):
        receiver = block(k, "kv[tp/2]", (1,), tp=(k, 4))
        assert carried(senders, receiver, 4)[0] == [k // 2]
    back = sent("kv[tp/2]", [heads[k // 2 : k // 2 + 1] for k in range(4)], over(tp=4))
    assert carried(back, block(0, "kv", (2,)))[0] == [0, 1]
    back = sent("kv[tp]", [heads[k // 2 : k // 2 + 1] for k in range(4)], over(tp=4))
    said = "if 2 ranks of the senders hold the same, write kv[tp:repeat] where they are recorded"
    refused(back, block(0, "kv", (2,)), said)
    # One head for all, on any number of ranks; and as many ranks as heads.
    assert carried(sent("kv", [heads[1:]]), block(3, "kv[tp/4]", (1,), tp=(3, 4)), 4)[0] == [1]
    assert carried(senders, block(1, "kv[tp/2]", (2,), tp=(0, 1)), 1)[0] == [0, 1]
    refused(senders, block(1, "kv[tp/3]", (1,), tp=(1, 4)), "do not make groups of 3", 4)


@pytest.mark.parametrize("text", ["kv[tp/0]", "kv[tp/]", "kv[tp/x]", "kv[tp/2:partial]"])
def test_a_share_that_is_none(text):
    with pytest.raises(LayoutError, match="cannot be read"):
        parse_dims(text)


@pytest.mark.parametrize("facts", ["d=8, s=8", "d=8,s=8", "d=8; s=8", "d = 8"])
def test_facts_with_more_than_spaces_between_them_are_told_so(facts):
    with pytest.raises(LayoutError, match="with nothing but spaces between two of them"):
        parse_dims(f"s d # {facts}")


def test_blocks_whose_sizes_hang_on_data_are_taken_rank_by_rank():
    """Experts' tokens: 1 2 2 of 5, where a rule would begin the second at 2."""
    tokens = torch.arange(5.0)
    senders = sent("t[ep]", list(tokens.split([1, 2, 2])), over(ep=3))
    for k, wanted in enumerate(tokens.split([1, 2, 2])):
        got, note = carried(senders, block(k, "t[ep]", wanted.shape, ep=(k, 3)), 3)
        assert got == wanted.tolist() and "blocks of unequal sizes: taken rank by rank" in note
    refused(senders, block(1, "t[ep]", (4,), ep=(1, 2)), "its blocks are of unequal sizes", 2)
    empty = sent("t[ep] h", [torch.ones(3, 4), torch.ones(0, 4)], over(ep=2))
    assert carried(empty, block(0, "t[ep] h", (3, 4), ep=(0, 2)), 2)[0] == [[1.0] * 4] * 3
    assert carried(empty, block(1, "t[ep] h", (0, 4), ep=(1, 2)), 2)[0] == []


def test_padding_on_the_left():
    extras = {"seq_lens": [3, 5]}
    left = {**extras, "padding": "left"}
    senders = sent("t", [torch.arange(8.0)], extras=extras)
    rows = [[KEPT, KEPT, 0, 1, 2], [3, 4, 5, 6, 7]]
    assert carried(senders, block(0, "b s", (2, 5), left))[0] == rows
    back = sent("b s", [torch.tensor(rows)], extras={**extras, "padding_side": "left"})
    assert carried(back, block(0, "t", (8,)))[0] == list(range(8))
    _, note = carried(senders, block(0, "b s", (2, 5), extras))
    assert "padding was taken to stand behind each sequence" in note
    _, note = carried(senders, block(0, "b s", (2, 5), {**extras, "padding": "right"}))
    assert note == ""
    batch = sent("b s", [torch.tensor(rows)], extras=left)
    said = "the senders' padding stands on the left and nobody says where the target's stands"
    refused(batch, block(0, "b s", (2, 5), extras), said)
    assert carried(batch, block(0, "b s", (2, 5), left))[0] == rows
    odd = block(0, "b s", (2, 5), {**extras, "padding": "both"})
    refused(senders, odd, "extras['padding'] is 'both', expected 'left' or 'right'")


def test_batches_whose_sequences_are_in_another_order():
    batch = sent("b s", [torch.zeros(2, 5)], extras={"seq_lens": [3, 5]})
    said = "the lengths [3, 5], the target's [5, 3]; feed both the same input, in the same order"
    refused(batch, block(0, "b s", (2, 5), {"seq_lens": [5, 3]}), said)
    of_others = block(0, "b s", (2, 5), {"seq_lens": [100, 3]})
    refused(batch, of_others, "the lengths [3, 5], the target's [100, 3]")


def test_empty_blocks_that_a_rule_would_give_too():
    """2 2 1 0 of 5: torch.chunk's, where torch.tensor_split has 2 1 1 1, or what experts have."""
    tokens = torch.arange(5.0)
    for sizes in ([2, 1, 1, 1], [2, 2, 1, 0]):
        parts = tokens.split(sizes)
        senders = sent("t[ep]", list(parts), over(ep=4))
        for k, wanted in enumerate(parts):
            got, _ = carried(senders, block(k, "t[ep]", wanted.shape, ep=(k, 4)), 4)
            assert got == wanted.tolist()
    senders = sent("h[tp]", list(parts), over(tp=4))
    said = "of 5, a block of 1 can begin at 4, as torch.chunk cuts, or at 3, as torch.tensor_split"
    refused(senders, block(2, "h[tp]", (1,), tp=(2, 4)), said, 4)
    # One head on two of four ranks: since the others have none, no two of them share one.
    heads = torch.arange(2.0)
    senders = sent("kv[tp]", [heads[:1], heads[1:], heads[:0], heads[:0]], over(tp=4))
    assert carried(senders, block(1, "kv[tp]", (1,), tp=(1, 4)), 4)[0] == [1]
