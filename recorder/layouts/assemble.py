"""Do what a plan says: copy the senders' parts into the receiver's block, one sender at a time.

1. `assemble` makes the block, with the target's own values where it has padding.
2. `_grouped` views a tensor with one dim for each group of the plan, in the plan's order.
3. `_copy` copies pieces along those dims; a dim in very many pieces is gathered by index.

Elements travel as integers, so that no copy on the way can change a NaN's payload. Partial results
are added in float64 (float32 for dtypes of 16 bits or fewer), in the order of the ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..capture import as_bits
from ..errors import LayoutError, ReplicasDiffer
from .blocks import Block
from .plan import Move, Plan
from .runs import Piece

Read = Callable[[int, float], torch.Tensor]
"""(sender rank, which part of its elements is needed) -> its tensor."""
REPLICAS = ("error", "first", "mean")
_MANY_PIECES = 64


def assemble(
    plan: Plan,
    senders: Sequence[Block],
    receiver: Block,
    read: Read,
    digest: Callable[[int], str],
    *,
    target: torch.Tensor | None = None,
    replicas: str = "error",
) -> torch.Tensor:
    """Return the receiver's block, on the CPU, of the senders' dtype.

    Args:
        plan: what to copy.
        senders: the blocks it was made from.
        receiver: the block it was made for.
        read: brings a sender's tensor.
        digest: of a sender's tensor; equal ones need not be read to be equal.
        target: what the receiver holds now, for its padding.
        replicas: what to do where ranks that should hold the same do not: an `error`, take the
            `first`, or their `mean`.

    Raises:
        LayoutError: the senders' dtypes differ, or cannot be reduced.
        ReplicasDiffer: see `replicas`.
    """
    shapes = {block.rank: block for block in senders}
    block: torch.Tensor | None = None
    dtype: torch.dtype | None = None
    for move in plan.moves:
        for values, needed in _values(plan, move, shapes, read, digest, replicas):
            if block is None:
                dtype = values.dtype
                block = _new(plan, receiver, dtype, target)
            elif values.dtype != dtype:
                raise LayoutError(
                    f"sender rank {move.ranks[0][0]} recorded {values.dtype} and others {dtype}; "
                    "name a transform with --transform"
                )
            if not plan.zero:
                _copy(block, as_bits_of(values), needed)
    if block is None or dtype is None:
        # Nothing of the block is anything but padding, or it has no elements.
        one = read(senders[0].rank, 0.0)
        dtype = one.dtype
        block = _new(plan, receiver, dtype, target)
    return _ungrouped(block, plan, receiver, dtype)


def as_bits_of(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor as integers, of one more dim where no integer is wide enough."""
    return as_bits(values)


def _new(
    plan: Plan, receiver: Block, dtype: torch.dtype, target: torch.Tensor | None
) -> torch.Tensor:
    """Return a block with one dim a group, as integers; padding filled, all else to be written."""
    wide = () if dtype.itemsize <= 8 else (2,)
    whole = torch.empty(plan.lengths, dtype=dtype, device="cpu")
    if plan.zero:
        whole.zero_()
        return as_bits(whole)
    if not plan.has_padding:
        return as_bits(whole)
    if target is not None:
        kept = target.detach().to("cpu")
        try:
            whole.copy_(_grouped(kept.to(dtype), receiver, plan, receivers=True))
        except RuntimeError as err:
            raise LayoutError(
                f"the target's padding cannot be kept as {dtype}: {err}; name a transform"
            ) from None
    else:
        as_bits(whole).zero_()
    for dim, (padding, fill) in enumerate(zip(plan.padding, plan.fills, strict=True)):
        if fill is not None:
            for at, n in padding:
                whole.narrow(dim, at, n).fill_(fill)
    assert not wide or as_bits(whole).shape[-1] == 2
    return as_bits(whole)


def _grouped(tensor: torch.Tensor, block: Block, plan: Plan, *, receivers: bool) -> torch.Tensor:
    """View a tensor with one dim a group: its dims in the group's order, fused."""
    groups = [pair.receivers if receivers else pair.senders for pair in plan.pairs]
    order = [i for group in groups for i in group]
    rest = [i for i in range(len(block.shape)) if i not in order]  # of size 1
    extra = list(range(len(block.shape), tensor.dim()))
    moved = tensor.permute(*order, *rest, *extra)
    sizes = [math.prod(block.shape[i] for i in group) for group in groups]
    return moved.reshape(*sizes, *(tensor.shape[i] for i in extra))


def _ungrouped(bits: torch.Tensor, plan: Plan, receiver: Block, dtype: torch.dtype) -> torch.Tensor:
    """Return a block of one dim a group as the receiver's tensor."""
    order = [i for pair in plan.pairs for i in pair.receivers]
    rest = [i for i in range(len(receiver.shape)) if i not in order]
    places = [*order, *rest]
    whole = (
        torch.view_as_complex(bits.view(torch.float64)) if dtype.itemsize > 8 else bits.view(dtype)
    )
    split = whole.reshape([receiver.shape[i] for i in places])
    back = [places.index(i) for i in range(len(places))]
    return split.permute(back) if back else split


def _values(
    plan: Plan,
    move: Move,
    blocks: dict[int, Block],
    read: Read,
    digest: Callable[[int], str],
    replicas: str,
) -> Iterator[tuple[torch.Tensor, tuple[tuple[Piece, ...], ...]]]:
    """Yield the tensors a move copies from, with one dim a group, and which pieces of each."""
    share = move.elements / max(1, math.prod(blocks[move.ranks[0][0]].shape))
    summands = (
        _grouped(
            _one(ranks, read, digest, replicas, share), blocks[ranks[0]], plan, receivers=False
        )
        for ranks in move.ranks
    )
    if not plan.reduction:
        yield next(summands), move.pieces
        return
    for first in (next(summands),):
        total = _wide(first)
        for other in summands:
            if other.dtype != first.dtype:
                raise LayoutError("partial results have different dtypes; name a transform")
            if plan.reduction in ("sum", "avg"):
                total += other
            elif plan.reduction == "max":
                total = torch.maximum(total, other.to(total.dtype))
            else:
                total = torch.minimum(total, other.to(total.dtype))
        if plan.reduction == "avg":
            total /= len(move.ranks)
        yield total.to(first.dtype), move.pieces


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy to add to."""
    if tensor.dtype == torch.bool:
        raise LayoutError("partial results of bool cannot be added; tap them before they are bool")
    if tensor.dtype.is_complex:
        return tensor.to(torch.complex128, copy=True)
    if tensor.dtype.is_floating_point:
        wide = torch.float32 if tensor.dtype.itemsize <= 2 else torch.float64
        return tensor.to(wide, copy=True)
    return tensor.to(torch.int64, copy=True)


def _one(
    ranks: tuple[int, ...],
    read: Read,
    digest: Callable[[int], str],
    replicas: str,
    share: float,
) -> torch.Tensor:
    """Return the tensor that replicas hold."""
    different: dict[str, int] = {}
    for rank in ranks:
        different.setdefault(digest(rank), rank)
    if len(different) == 1 or replicas == "first":
        return read(ranks[0], share)
    tensors = [read(rank, 1.0) for rank in different.values()]
    if replicas == "mean":
        return _mean(ranks, read)
    raise ReplicasDiffer(_difference(list(different.values()), tensors, ranks))


def _mean(ranks: Sequence[int], read: Read) -> torch.Tensor:
    first = read(ranks[0], 1.0)
    if not (first.dtype.is_floating_point or first.dtype.is_complex):
        raise LayoutError(f"replicas of {first.dtype} have no mean; take --replicas first")
    total = first.to(torch.complex128 if first.dtype.is_complex else torch.float64, copy=True)
    for rank in ranks[1:]:
        total += read(rank, 1.0)
    return (total / len(ranks)).to(first.dtype)


def _difference(some: Sequence[int], tensors: Sequence[torch.Tensor], ranks: Sequence[int]) -> str:
    """Say which replicas differ, and by how much."""
    a, b = tensors[0], tensors[1]
    how = f"sender ranks {some[0]} and {some[1]} should hold the same block, and differ"
    if a.shape == b.shape and a.dtype == b.dtype:
        wide: Any = torch.complex128 if a.dtype.is_complex else torch.float64
        x, y = a.to(wide), b.to(wide)
        apart = torch.where((x == y) | ((x != x) & (y != y)), 0.0, (x - y).abs())
        most = float(apart.max()) if apart.numel() else 0.0
        how += f" in {int((apart != 0).sum())} of {apart.numel()} elements, at most by {most:.6g}"
    if len(some) > 2:
        how += f" ({len(some)} of the {len(ranks)} ranks that hold it are different)"
    return (
        f"{how}; that may be the fault you look for. If they hold other data, name the axis that "
        "tells them apart in recorder.declare_mesh and in the dims; to go on all the same, choose "
        "--replicas first or mean"
    )


def _copy(into: torch.Tensor, out_of: torch.Tensor, pieces: tuple[tuple[Piece, ...], ...]) -> None:
    """Copy pieces along each dim, all combinations of them."""
    choices: list[list[tuple[Any, Any]]] = []
    gathered = []
    for dim, group in enumerate(pieces):
        if len(group) <= _MANY_PIECES:
            choices.append(
                [
                    (slice(p.into, p.into + p.length), slice(p.out_of, p.out_of + p.length))
                    for p in group
                ]
            )
            continue
        there = torch.cat([torch.arange(p.into, p.into + p.length) for p in group])
        here = torch.cat([torch.arange(p.out_of, p.out_of + p.length) for p in group])
        choices.append([(slice(None), slice(None))])
        out_of = out_of.index_select(dim, here)
        gathered.append((dim, there))
    for combination in itertools.product(*choices):
        target = into[tuple(there for there, _ in combination)]
        source = out_of[tuple(here for _, here in combination)]
        if not gathered:
            target.copy_(source)
        elif len(gathered) == 1:
            target.index_copy_(gathered[0][0], gathered[0][1], source)
        else:
            index: list[Any] = [
                torch.arange(n).view([-1 if i == d else 1 for i in range(target.dim())])
                for d, n in enumerate(target.shape)
            ]
            for d, there in gathered:
                index[d] = there.view([-1 if i == d else 1 for i in range(target.dim())])
            target[tuple(index)] = source
