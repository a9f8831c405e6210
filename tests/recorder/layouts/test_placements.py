"""What may be declared beside a DTensor's placements: axes outside its mesh, and what they say."""

from __future__ import annotations

import pytest
import torch

from recorder.errors import LayoutError
from recorder.layouts.assemble import assemble
from recorder.layouts.blocks import Block, placed
from recorder.layouts.parse import parse_dims
from recorder.layouts.plan import plan
from recorder.mesh import frozen

WHOLE = torch.arange(48.0).view(4, 6, 2)  # b s h


def ranks():
    """Coordinates over fsdp and tp, of two ranks each."""
    return [{"fsdp": (f, 2), "tp": (k, 2)} for f in range(2) for k in range(2)]


def dtensors(dims, placement, local, mesh=None):
    """Blocks of DTensors over tp, one for each fsdp, and what each rank holds of the whole."""
    found = []
    for rank, at in enumerate(ranks()):
        tensor = local(at["fsdp"][0], at["tp"][0])
        shape = list(tensor.shape)
        if placement.startswith("Shard"):
            shape[int(placement[10])] *= 2
        text = f"{dims} # DTensor {shape} tp:{at['tp'][0]}/2={placement}"
        axes = at if mesh is None else mesh(at)
        found.append((Block(rank, parse_dims(text), tuple(tensor.shape), frozen(axes)), tensor))
    return found


def carried(senders, receiver, world):
    blocks = [one for one, _ in senders]
    made = plan(blocks, len(blocks), receiver, world)
    return assemble(
        made, blocks, receiver, lambda rank, share: senders[rank][1], lambda rank: str(rank)
    )


def both_ways(found):
    """From the blocks to one rank that has the whole, and back to each."""
    one = Block(0, parse_dims("b s h"), tuple(WHOLE.shape), frozen({}))
    assert torch.equal(carried(found, one, 1), WHOLE)
    for block, tensor in found:
        assert torch.equal(carried([(one, WHOLE)], block, 4), tensor)


def sharded(f, k):
    return WHOLE.chunk(2)[f].chunk(2, 1)[k]


def replicated(f, k):
    return WHOLE.chunk(2)[f]


def test_a_batch_is_cut_over_an_axis_outside_the_dtensor_s_mesh():
    both_ways(dtensors("b[fsdp] s h", "Shard(dim=1)", sharded))
    both_ways(dtensors("b[fsdp] s h", "Replicate()", replicated))


def test_one_row_serves_the_sharded_and_the_replicated_form():
    both_ways(dtensors("b[fsdp] s[tp] h", "Shard(dim=1)", sharded))
    both_ways(dtensors("b[fsdp] s[tp] h", "Replicate()", replicated))


@pytest.mark.parametrize("knows", [True, False])
def test_an_axis_may_have_another_name_than_in_the_mesh(knows):
    """Sequence parallelism's ranks are tensor parallelism's; the job may have no axis sp at all."""

    def mesh(at):
        return {**at, "sp": at["tp"]} if knows else at

    both_ways(dtensors("b[fsdp] s[sp] h", "Shard(dim=1)", sharded, mesh))


def test_an_axis_of_another_place_is_no_other_name_and_cuts_first():
    """s over fsdp outside, and each of its blocks over tp by the placement."""

    def local(f, k):
        return WHOLE.view(4, 6, 2)[:, :4].chunk(2, 1)[f].chunk(2, 1)[k]

    found = dtensors("b s[fsdp,tp] h", "Shard(dim=1)", local)
    assert [placed(one, 4)["fsdp"] for one, _ in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    one = Block(0, parse_dims("b s h"), (4, 4, 2), frozen({}))
    assert torch.equal(carried(found, one, 1), WHOLE[:, :4])
    for block, tensor in found:
        assert torch.equal(carried([(one, WHOLE[:, :4].contiguous())], block, 4), tensor)


def test_sums_over_an_axis_outside_the_mesh():
    found = dtensors("b[fsdp:partial] s h", "Shard(dim=1)", lambda f, k: WHOLE.chunk(2, 1)[k] / 2)
    one = Block(0, parse_dims("b s h"), tuple(WHOLE.shape), frozen({}))
    assert torch.equal(carried(found, one, 1), WHOLE)


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        ("b[tp] s h", "they cut b over tp, and a placement cuts s over it"),
        ("b s[tp:zigzag] h", "they cut s as tp:zigzag, and a placement cuts as torch.chunk does"),
        ("b s[tp,fsdp] h", "s is cut over fsdp, tp, in this order"),
        ("b[tp:partial] s h", "they call it partial over tp, which cuts s"),
    ],
)
def test_a_contradiction_is_refused_and_says_what_contradicts_what(dims, said):
    with pytest.raises(LayoutError) as caught:
        parse_dims(f"{dims} # DTensor [4, 6, 2] tp:0/2=Shard(dim=1)")
    assert said in str(caught.value) and "axes those outside its mesh" in str(caught.value)
