"""`g[tp:repeat]`: heads that are fewer than the ranks, shared by as many as it takes."""

from __future__ import annotations

import pytest
import torch

from recorder.errors import LayoutError
from recorder.layouts.assemble import assemble
from recorder.layouts.blocks import Block
from recorder.layouts.parse import parse_dims
from recorder.layouts.plan import plan, whole
from recorder.mesh import frozen

HEADS = torch.arange(2.0)[:, None].expand(2, 3).contiguous()  # g d


def held(k, ranks, heads=HEADS):
    """What rank k of so many holds of some heads, indexed plainly."""
    if ranks <= len(heads):
        return heads.chunk(ranks)[k]
    return heads[k * len(heads) // ranks][None]


def block(rank, dims, tensor, ranks):
    return Block(rank, parse_dims(dims), tuple(tensor.shape), frozen({"tp": (rank, ranks)}))


def sent(dims, tensors):
    return [(block(k, dims, t, len(tensors)), t) for k, t in enumerate(tensors)]


def carried(senders, receiver, receivers=1):
    blocks = [one for one, _ in senders]
    made = plan(blocks, len(blocks), receiver, receivers)
    return assemble(made, blocks, receiver, lambda rank, share: senders[rank][1], lambda rank: "")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("dims", "other", "flat"),
    [
        ("g[tp:repeat] d", "g d", False),
        ("g[tp:repeat] d # g=2", "(g*d)", False),
        ("(g*d)[tp:repeat]", "g d", True),
        ("(g[tp:repeat]*d) # g=2", "(g*d)", True),
        ("g[tp:repeat] d", "(g*d)", False),
    ],
)
def test_both_ways_between_one_rank_and_ranks_that_share_heads(ranks, dims, other, flat):
    """The size of g is declared, or that of the other side, or what d leaves of a fused dim."""
    one = HEADS.flatten() if "*" in other else HEADS
    blocks = [held(k, ranks).flatten() if flat else held(k, ranks) for k in range(ranks)]
    for k in range(ranks):
        got = carried(sent(other, [one]), block(k, dims, blocks[k], ranks), ranks)
        assert torch.equal(got, blocks[k])
    assert torch.equal(carried(sent(dims, blocks), block(0, other, one, 1)), one)


@pytest.mark.parametrize(("here", "there"), [(2, 4), (4, 2), (4, 8), (4, 4)])
def test_heads_shared_on_both_sides_by_other_numbers_of_ranks(here, there):
    dims = "g[tp:repeat] d # g=2"
    senders = sent(dims, [held(k, here) for k in range(here)])
    for k in range(there):
        wanted = held(k, there)
        assert torch.equal(carried(senders, block(k, dims, wanted, there), there), wanted)


def test_where_both_sides_share_alike_nobody_need_say_how_many_heads_there_are():
    senders = sent("g[tp:repeat] d", [held(k, 4) for k in range(4)])
    for k in range(4):
        receiver = block(k, "(g*d)[tp:repeat]", held(k, 4).flatten(), 4)
        assert torch.equal(carried(senders, receiver, 4), held(k, 4).flatten())


def test_replicas_of_a_head_make_one_head_of_the_whole():
    senders = sent("g[tp:repeat] d # g=2", [held(k, 4) for k in range(4)])
    blocks = [one for one, _ in senders]
    assert whole(blocks, 4).shape == (2, 3)
    several = sent("g[tp:repeat] d", list(torch.randn(8, 3).chunk(4)))
    assert whole([one for one, _ in several], 4).shape == (8, 3), "as two of each are of one rank"


@pytest.mark.parametrize(
    ("dims", "heads", "ranks", "said"),
    [
        ("g[tp:repeat] d # g=3", 1, 4, "g has 3, and tp 4 ranks, of which neither divides the"),
        ("g[tp:repeat] d", 1, 4, "the size of g is not known"),
    ],
)
def test_a_size_that_is_not_known_or_does_not_divide_is_refused(dims, heads, ranks, said):
    blocks = [block(k, dims, torch.zeros(heads, 3), ranks) for k in range(ranks)]
    with pytest.raises(LayoutError) as caught:
        whole(blocks, ranks)
    assert said in str(caught.value) and "# g=SIZE" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["g[tp:repeat+zigzag]", "g[tp/2:repeat]", "g[tp:repeat+partial]", "g[cp,tp:repeat]"]
)
def test_what_repeats_is_not_cut_otherwise(text):
    with pytest.raises(LayoutError, match="contradicts itself|cuts its dim alone"):
        parse_dims(text)


def test_a_cut_at_the_outermost_name_of_a_fused_dim_is_one_of_the_dim():
    assert parse_dims("(g[cp,tp]*r*d)").dims == parse_dims("(g*r*d)[cp,tp]").dims
    with pytest.raises(LayoutError, match="'r' is cut inside .* only the outermost, 'g', can be"):
        parse_dims("(g*r[tp]*d)")
    with pytest.raises(LayoutError, match="is cut twice; write its cuts once"):
        parse_dims("(g[tp]*d)[cp]")


@pytest.mark.parametrize("other", ["(g*d)", "g d"])
def test_fused_heads_that_do_not_fit_are_told_of_repeat(other):
    one = HEADS.flatten() if "*" in other else HEADS
    with pytest.raises(LayoutError) as caught:
        carried(sent(other, [one]), block(2, "(g*d)[tp]", torch.zeros(3), 4), 4)
    said = "if 2 ranks hold the same, write (g*d)[tp:repeat] # g=2 at the target's tap"
    assert said in str(caught.value)
    senders = sent("(g*d)[tp]", [held(k, 4).flatten() for k in range(4)])
    with pytest.raises(LayoutError) as caught:
        carried(senders, block(0, other, one, 1))
    assert "write (g*d)[tp:repeat] # g=2 where they are recorded" in str(caught.value)
