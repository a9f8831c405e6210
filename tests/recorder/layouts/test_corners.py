"""Corners of layouts, a plan each: what is certain is done, what is not is asked about."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch

from recorder.errors import LayoutError
from recorder.layouts.assemble import assemble
from recorder.layouts.blocks import Block
from recorder.layouts.parse import parse_dims
from recorder.layouts.plan import plan, whole
from recorder.mesh import frozen


def block(rank, dims, shape, extras=None, **axes):
    return Block(rank, parse_dims(dims), shape, frozen(axes), json.dumps(extras) if extras else "")


def carried(senders, receiver, receivers=1):
    """Senders as (block, tensor); return the receiver's block."""
    blocks = [one for one, _ in senders]
    made = plan(blocks, len(blocks), receiver, receivers)
    return assemble(made, blocks, receiver, lambda rank, share: senders[rank][1], lambda rank: "")


def sent(dims, tensors, axis="tp", extras=None):
    n = len(tensors)
    return [
        (block(k, dims, tuple(t.shape), extras, **{axis: (k, n)}), t) for k, t in enumerate(tensors)
    ]


def refused(senders, receiver, said, receivers=1):
    with pytest.raises(LayoutError) as caught:
        carried(senders, receiver, receivers)
    assert said in str(caught.value)


def test_a_padded_sender_and_a_target_that_cannot_tell_how_much_of_it():
    v = sent("v[tp] # v:padded", list(torch.arange(12.0).chunk(4)))
    assert carried(v, block(0, "v", (10,), tp=(0, 1))).tolist() == list(range(10))
    refused(v, block(2, "v[tp:chunk]", (2,), tp=(2, 3)), "declare its size without padding", 3)
    declared = block(2, "v[tp:chunk] # v=8", (2,), tp=(2, 3))
    assert carried(v, declared, 3).tolist() == [6, 7]
    alike = block(1, "v[tp] # v:padded", (6,), tp=(1, 2))
    assert carried(v, alike, 2).tolist() == list(range(6, 12))


def test_tokens_to_sequences_that_are_cut_so_that_their_length_is_not_known():
    t = sent("t", [torch.arange(7.0)], extras={"seq_lens": [4, 3]})
    refused(t, block(3, "b s[sp]", (2, 1), sp=(3, 4)), "as in '# s=SIZE'", 4)
    got = carried(t, block(3, "b s[sp:chunk] # s=10", (2, 1), sp=(3, 4)), 4)
    assert got.tolist() == [[0], [0]], "that is all padding"
    got = carried(t, block(0, "b s[sp:chunk] # s=10", (2, 3), sp=(0, 4)), 4)
    assert got.tolist() == [[0, 1, 2], [4, 5, 6]]


def test_fused_batch_and_sequence_that_lengths_do_not_divide():
    t = sent("t", [torch.arange(7.0)], extras={"seq_lens": [3, 2, 2]})
    refused(t, block(0, "(b*s)", (10,)), "do not make 3 sequences of one length")
    assert carried(t, block(0, "(b*s)", (9,))).tolist() == [0, 1, 2, 3, 4, 0, 5, 6, 0]


def test_two_cut_dims_of_a_fused_one_whose_sizes_nobody_says():
    whole_one = torch.arange(48.0).view(6, 8)
    ab = sent("(a*b)", [whole_one.flatten()])
    here = {"tp": (0, 4), "cp": (2, 3)}
    refused(ab, block(0, "a[tp] b[cp]", (2, 2), **here), "declare it at the target's tap", 12)
    got = carried(ab, block(0, "a[tp:chunk] b[cp:chunk] # a=6 b=8", (2, 2), **here), 12)
    assert torch.equal(got, whole_one[:2, 6:])


def test_lengths_that_each_data_parallel_rank_has_of_its_own():
    rows = [[4, 3], [5, 2]]
    senders = []
    for k, lengths in enumerate(rows):
        tokens = torch.arange(7.0) + 10 * k
        senders.append((block(k, "t", (7,), {"seq_lens": lengths}, dp=(k, 2)), tokens))
    got = carried(senders, block(1, "t", (7,), {"seq_lens": [5, 2]}, dp=(1, 2)), 2)
    assert got.tolist() == list(range(10, 17))
    other = [(block(k, "b s", (2, 5), {"seq_lens": r}, dp=(k, 2)), torch.zeros(2, 5))
             for k, r in enumerate(rows)]  # fmt: skip
    here = {"dp": (0, 2)}
    assert carried(other, block(0, "b s", (2, 5), {"seq_lens": [4, 3]}, **here), 2).numel() == 10
    said = "have the lengths [4, 3], the target's [1]"
    refused(other, block(0, "b s", (2, 5), {"seq_lens": [1]}, **here), said, 2)


@pytest.mark.parametrize(
    "extras",
    [
        {"seq_lens": [4, -1]}, {"seq_lens": 7}, {"cu_seqlens": [1, 4]}, {"cu_seqlens": [0, 4, 3]},
        {"seq_lens": [4, 3], "padded_seq_lens": [4]}, {"seq_lens": [4], "padded_seq_lens": [3]},
    ],
)  # fmt: skip
def test_lengths_that_are_none_are_not_passed_over(extras):
    t = sent("t[cp]", list(torch.arange(8.0).chunk(2)), "cp", extras)
    with pytest.raises(LayoutError, match=r"extras\['|the extras give"):
        carried(t, block(0, "t", (8,)))


def test_lengths_of_other_tokens_do_no_harm_unless_they_are_needed():
    """A decode step: a token each of sequences that are longer."""
    decode = {"seq_lens": [100, 200]}
    assert carried(sent("t", [torch.ones(2)], extras=decode), block(0, "t", (2,))).numel() == 2
    over_cp = sent("t[cp]", [torch.ones(1)] * 2, "cp", decode)
    refused(over_cp, block(0, "t", (2,)), "the extras give sequences of 300")


def test_padding_of_each_sequence_is_told_apart_from_the_tokens():
    tokens = torch.tensor([1.0, 2, 3, 0, 4, 5, 0, 0])
    extras = {"cu_seqlens": [0, 3, 5], "cu_seqlens_padded": [0, 4, 8]}
    t = sent("t", [tokens], extras=extras)
    assert carried(t, block(0, "t", (5,))).tolist() == [1, 2, 3, 4, 5]
    assert carried(t, block(0, "t", (8,))).tolist() == tokens.tolist()
    refused(t, block(0, "t", (9,)), "give the extras of both taps their lengths")


def test_a_scalar_dtensor_and_an_empty_one():
    for shape in ((), (0, 3)):
        dims = f"DTensor {list(shape)} tp:0/1=Replicate()"
        one = [(Block(0, parse_dims(dims), shape), torch.full(shape, 3.0))]
        got = carried(one, Block(0, parse_dims(dims), shape))
        assert got.shape == shape and (got == 3).all()
        assert whole([one[0][0]], 1).shape == shape


def test_a_dtensor_receiver_knows_its_whole_shape():
    senders = sent("h", [torch.arange(10.0)])
    nine = Block(0, parse_dims("DTensor [9] tp:0/2=Shard(dim=0)"), (5,))
    refused(senders, nine, "the senders have 10 in all", 2)
    ten = Block(1, parse_dims("DTensor [10] tp:1/2=Shard(dim=0)"), (5,))
    assert carried(senders, ten, 2).tolist() == [5, 6, 7, 8, 9]


def test_a_dtensor_may_name_its_dims_and_its_own_cuts():
    placed = "DTensor [2, 6] tp:1/2=Shard(dim=1)"
    assert str(parse_dims(f"b h[tp] # {placed}").dims[1]) == "h[tp]"
    assert parse_dims(f"b h # h=5 # {placed}").sizes == {"h": 5}
    for wrong in ("b[tp] h", "b h[tp:zigzag]", "b h[tp/2]", "b[tp:partial] h", "b h c"):
        with pytest.raises(LayoutError, match="contradict|name 3 dims"):
            parse_dims(f"{wrong} # {placed}")


def test_an_axis_that_no_mesh_declares_is_named_where_sizes_do_not_fit():
    """Sequence parallelism whose axis nobody declared, on the receiver's ranks and the senders'."""
    said = "no axis sp is declared on {} ranks here, so nothing is cut over it: declare_mesh(sp="
    one = sent("s h", [torch.zeros(8, 2)])
    for dims in ("s[sp] h", "s[sp] h # DTensor [4, 2] tp:1/2=Replicate()", "(s*h)[sp]"):
        shape = (8,) if "*" in dims else (4, 2)
        refused(one, block(1, dims, shape, tp=(1, 2)), said.format("the target's"), 2)
    cut = sent("s[sp] h", [torch.zeros(4, 2)] * 2)
    with pytest.raises(LayoutError) as caught:
        carried(cut, block(0, "s h", (8, 2)))
    assert said.format("the senders'") in str(caught.value)
    assert "padded" not in str(caught.value) and "SIZE" not in str(caught.value)
    # A job of one rank runs without the axis, and a declared one is not the reason.
    with pytest.raises(LayoutError) as caught:
        carried(one, block(0, "s[sp] h", (6, 2), tp=(0, 1)))
    assert "no axis" not in str(caught.value)
    with pytest.raises(LayoutError) as caught:
        carried(one, block(1, "s[sp] h", (2, 2), sp=(1, 2)), 2)
    assert "no axis" not in str(caught.value)


def test_data_parallel_ranks_of_dtensors_on_a_part_of_the_mesh():
    text = "DTensor [4] tp:{}/2=Shard(dim=0)"
    senders = []
    for rank, (d, k) in enumerate((d, k) for d in range(2) for k in range(2)):
        dims = parse_dims(text.format(k))
        mesh = frozen({"dp": (d, 2), "tp": (k, 2)})
        senders.append((Block(rank, dims, (2,), mesh), torch.full((2,), 10.0 * d + k)))
    receiver = Block(3, parse_dims(text.format(1)), (2,), frozen({"dp": (1, 2), "tp": (1, 2)}))
    assert carried(senders, receiver, 4).tolist() == [11, 11]


@pytest.mark.parametrize(
    "text",
    [
        f"DTensor [{'9' * 5000}] tp:0/1=Replicate()",
        f"b # b={'9' * 5000}",
        f"DTensor [2] tp:0/{'9' * 5000}=Replicate()",
        "DTensor [2] tp:0/0=Shard(dim=0)",
        "DTensor [2] tp:3/2=Shard(dim=0)",
        "DTensor [2] tp:0/2=Shard(dim=7)",
        "DTensor [2] tp:0/2=_StridedShard(dim=0, sf=3)",
        "DTensor [2] tp:0/2=Partial(product)",
        "DTensor [2] tp:0/2=Odd(1)",
        "DTensor [2] tp:0/2=",
        "(" * 5000,
        "a " * 100,
        "1[tp]",
        "(a*a)",
        "h[tp:zigzag+natural]",
        "h[tp:chunk+split]",
        "h # h:fill=x",
        "h # q=3",
        "h[tp] # tp:replicated",
    ],
)
def test_dims_from_strangers_are_a_clear_error(text):
    with pytest.raises(LayoutError) as caught:
        parse_dims(text)
    assert len(str(caught.value)) < 800


def test_a_mesh_of_more_ranks_than_there_are():
    sender = block(0, "h[tp]", (2,), tp=(0, 1 << 39))
    refused([(sender, torch.ones(2))], block(0, "h", (2,)), "more ranks than the 1 there are")


def test_a_large_gap_is_found_soon():
    sender = block(0, "h[tp] d", (1, 10**9), tp=(0, 2))
    with pytest.raises(LayoutError, match=r"dim h\[tp\]: no sender recorded index 1 and 0 more"):
        plan([sender], 2, block(0, "h d", (2, 10**9)), 1)
    sender = block(0, "(h*d)[tp]", (10**9,), tp=(0, 2))
    with pytest.raises(LayoutError, match="index 1000000000 and 999999999 more"):
        plan([sender], 2, block(0, "(h*d)", (2 * 10**9,)), 1)


def test_averages_maxima_and_float8_sums():
    for how, expected in (("avg", 2.0), ("max", 3.0), ("min", 1.0), ("sum", 4.0)):
        texts = [f"DTensor [2] tp:{k}/2=Partial({how})" for k in range(2)]
        senders = [
            (Block(k, parse_dims(text), (2,)), torch.full((2,), 1.0 + 2 * k))
            for k, text in enumerate(texts)
        ]
        assert carried(senders, block(0, "h", (2,))).tolist() == [expected] * 2
    small = sent("h[tp:partial]", [torch.ones(2).to(torch.float8_e5m2)] * 2)
    assert carried(small, block(0, "h", (2,))).float().tolist() == [2, 2]
    refused(
        sent("h[tp:partial]", [torch.ones(2, dtype=torch.bool)] * 2), block(0, "h", (2,)), "no sum"
    )


def test_another_default_device_changes_nothing():
    big = torch.arange(200.0).view(100, 2)
    senders = sent("a (x*y)[tp]", [big[:, k : k + 1].clone() for k in range(2)])
    with torch.device("meta"):
        got = carried(senders, block(0, "(a*x) y # x=1 y=2", (100, 2)))
    assert torch.equal(got, big)


def cut_in(whole_one, n, how):
    parts = whole_one.tensor_split(n) if how == "split" else whole_one.chunk(n)
    return [*parts, *[whole_one[:0]] * (n - len(parts))]


def test_a_block_that_nobody_recorded_never_shifts_the_others():
    """By brute force: right, or refused; and refused where nothing tells."""
    done = asked = 0
    for size, n, m in itertools.product(range(1, 13), range(2, 5), range(1, 5)):
        whole_one = torch.arange(float(size))
        for how, its in itertools.product(("chunk", "split"), repeat=2):
            blocks, wanted = cut_in(whole_one, n, how), cut_in(whole_one, m, its)
            for lost in range(n):
                senders = {
                    k: (block(k, "h[tp]", (len(b),), tp=(k, n)), b)
                    for k, b in enumerate(blocks)
                    if k != lost
                }
                held = [one for one, _ in senders.values()]
                for k in range(m):
                    receiver = block(k, f"h[tp:{its}]", (len(wanted[k]),), tp=(k, m))
                    try:
                        made = plan(held, n, receiver, m)
                    except LayoutError:
                        asked += 1
                        continue
                    got = assemble(
                        made, held, receiver, lambda rank, share, s=senders: s[rank][1],
                        lambda rank: "",
                    )  # fmt: skip
                    assert torch.equal(got, wanted[k]), (size, n, how, lost, m, its, k)
                    done += 1
    assert done > 500 and asked > 500


@pytest.mark.thorough
def test_tokens_and_sequences_however_they_are_cut_and_padded():
    """Random lengths, paddings and cuts of t and b s to each other: right, or refused."""
    rng = random.Random(7)
    done = 0
    for _ in range(3_000):
        real = [rng.randint(0, 5) for _ in range(rng.randint(1, 3))]
        tokens = torch.arange(1.0, 1 + sum(real))
        sides = [random_tokens(rng, real, tokens) for _ in range(2)]
        (dims, extras, n, axis, blocks, _), (its, its_extras, m, its_axis, _, expected) = sides
        if dims[0] == its[0] == "b":
            continue  # where no side has tokens, lengths mean nothing
        senders = [
            (block(k, dims, tuple(b.shape), extras, **{axis: (k, n)}), b)
            for k, b in enumerate(blocks)
        ]
        for k in range(m):
            receiver = block(k, its, tuple(expected[k].shape), its_extras, **{its_axis: (k, m)})
            try:
                got = carried(senders, receiver, m)
            except LayoutError:
                continue
            # Padding is zero in what is made, and in what is expected.
            assert torch.equal(got, expected[k]), (real, dims, extras, n, its, its_extras, m, k)
            done += 1
    assert done > 1_500


def random_tokens(rng, real, tokens):
    """Return one side's dims, extras, ranks, axis, blocks with junk for padding, and with zeros."""
    n, axis = rng.choice((1, 1, 2, 3)), rng.choice(("cp", "sp"))
    zigzag = axis == "cp" and rng.random() < 0.5
    if rng.random() < 0.5:
        multiple = 2 * n if zigzag else n if axis == "cp" else 1
        room = [-(-length // multiple) * multiple for length in real]
        tail = rng.choice((0, n))
        if axis == "sp":
            tail = rng.choice((0, -sum(room) % n))  # what is padded is so to a multiple
        made = []
        for junk in (99.0, 0.0):
            rows = [filled(part, m, junk) for part, m in zip(tokens.split(real), room, strict=True)]
            behind = torch.full((tail,), junk)
            if axis == "sp":
                made.append(cut_in(torch.cat([*rows, behind]), n, "chunk"))
                continue
            cut = two_ends if zigzag else one_end
            parts = [[*(cut(row, n, k) for row in rows), one_end(behind, n, k)] for k in range(n)]
            made.append([torch.cat(part) for part in parts])
        how = ":zigzag" if zigzag else ":chunk" if axis == "sp" else ""
        return f"t[{axis}{how}]", {"seq_lens": real, "padded_seq_lens": room}, n, axis, *made
    size = max(real) + rng.randint(0, 2)
    made = []
    for junk in (99.0, 0.0):
        rows = torch.stack([filled(part, size, junk) for part in tokens.split(real)])
        made.append([part.t() for part in cut_in(rows.t(), n, "chunk")])
    return f"b s[{axis}:chunk] # s={size}", {"seq_lens": real}, n, axis, *made


def filled(part, size, junk):
    return torch.cat([part, torch.full((size - len(part),), junk)])


def one_end(row, n, k):
    return cut_in(row, n, "chunk")[k]


def two_ends(row, n, k):
    parts = cut_in(row, 2 * n, "chunk")
    return torch.cat([parts[k], parts[2 * n - 1 - k]])


def test_a_dtensor_over_an_axis_called_cp_is_cut_as_it_says():
    tokens = torch.arange(8.0)
    senders = [
        (Block(k, parse_dims(f"t # DTensor [8] cp:{k}/2=Shard(dim=0)"), (4,), None,
               '{"seq_lens": [4, 4]}'), part)
        for k, part in enumerate(tokens.chunk(2))
    ]  # fmt: skip
    assert torch.equal(carried(senders, block(0, "t", (8,))), tokens)


@pytest.mark.parametrize(
    ("ours", "shape", "theirs", "wanted", "said"),
    [
        ("v d # v=10", (12, 2), "(v*d)", (24,), "dim v is padded"),
        ("(v*d)", (24,), "v d # v=10", (12, 2), "dim v is padded"),
        ("b s # s=3", (2, 4), "t", (8,), "dim s is padded"),
        ("(h*d) # h=8", (24,), "h d", (6, 4), "dim h has 6, and its parts 8"),
        ("(a*b) c", (6, 4), "a (b*c)", (4, 6), "has 6, and its parts 4 x b"),
        ("s b h", (2, 3, 4), "t", (24,), "dim h is only in the sender's dims"),
    ],
)
def test_sizes_that_contradict_each_other_across_fused_dims(ours, shape, theirs, wanted, said):
    values = torch.zeros(shape)
    with pytest.raises(LayoutError) as caught:
        carried([(block(0, ours, shape), values)], block(0, theirs, wanted))
    assert said in str(caught.value)


def test_what_the_readme_shows():
    values = torch.randn(2, 8, 4, 3)
    blocks = [
        torch.cat([part.chunk(4, 1)[i] for i in (k, 3 - k)], 1)
        for part in values.chunk(2, 2)
        for k in range(2)
    ]
    senders = [
        (block(r, "b s[cp:zigzag] h[tp] d", tuple(b.shape), tp=(r // 2, 2), cp=(r % 2, 2)), b)
        for r, b in enumerate(blocks)
    ]
    got = carried(senders, block(1, "b s (h*d)[tp]", (2, 8, 6), tp=(1, 2)), 2)
    assert torch.equal(got, values.flatten(2)[..., 6:])


def test_tokens_belong_to_a_sequence_without_a_batch():
    tokens = torch.randn(6, 4)
    for dims, shape in (("1 s h", (1, 6, 4)), ("s 1 h", (6, 1, 4)), ("s h", (6, 4))):
        one = [(block(0, dims, shape), tokens.view(shape))]
        assert torch.equal(carried(one, block(0, "t h", (6, 4))), tokens)
        back = [(block(0, "t h", (6, 4)), tokens)]
        assert torch.equal(carried(back, block(0, dims, shape)), tokens.view(shape))


def test_a_million_tokens_in_another_order_take_no_time():
    values = torch.arange(1_000_000).view(1000, 1000, 1)  # s b h
    one = [(block(0, "s b h", (1000, 1000, 1)), values)]
    made = plan([one[0][0]], 1, block(0, "t h", (1_000_000, 1)), 1)
    assert made.pieces <= 2_002
    got = carried(one, block(0, "t h", (1_000_000, 1)))
    assert torch.equal(got[:, 0], values.transpose(0, 1).flatten())


def test_an_axis_of_experts_that_one_side_lacks():
    senders = [
        (block(0, "e[ep] h", (1, 4), ep=(0, 2)), torch.arange(4.0).view(1, 4)),
        (block(1, "e[ep] h", (0, 4), ep=(1, 2)), torch.zeros(0, 4)),
    ]
    assert carried(senders, block(0, "h", (4,))).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("extras", ["[1]", "null", "[", "[" * 3000, '{"seq_lens":[' + "9" * 5000])
def test_extras_from_strangers(extras):
    stranger = Block(0, parse_dims("t"), (4,), None, extras)
    with pytest.raises(LayoutError, match="expected a JSON object"):
        plan([stranger], 1, block(0, "t", (4,)), 1)


def test_long_dims_are_refused_soon():
    for text in ("DTensor [4] " + "a" * 60_000, "h[" + "tp," * 50_000 + "tp]", "a" * 60_000):
        with pytest.raises(LayoutError, match="characters, expected at most"):
            parse_dims(text)
