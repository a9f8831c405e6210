"""Do what a plan says: copy the senders' parts into the receiver's block, one sender at a time.

1. `assemble` makes the block, from one sender after the other; its padding is zero.
2. `keep_padding` puts the target's own values, or a fill, where the block has padding.
3. `_copy` copies pieces along the groups of dims; one in very many pieces is gathered by index.

Elements travel as integers, so that no copy on the way can change a NaN's payload. Partial results
are added in float64 (float32 for dtypes of 16 bits or fewer), in the order of the ranks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..bits import as_bits
from ..errors import LayoutError, ReplicasDiffer, UsageError
from .blocks import Block
from .dims import REPLICAS
from .plan import Move, Plan
from .runs import Piece

Read = Callable[[int, float], torch.Tensor]
"""(sender rank, which part of its elements is needed) -> its tensor."""
_MANY_PIECES = 64


def check_replicas(choice: str) -> str:
    """Return what to do with replicas that differ, or raise `UsageError` where it is no choice."""
    if choice not in REPLICAS:
        raise UsageError(f"replicas is {choice!r}; choose one of {', '.join(REPLICAS)}")
    return choice


def assemble(
    plan: Plan,
    senders: Sequence[Block],
    receiver: Block,
    read: Read,
    digest: Callable[[int], str],
    replicas: str = "error",
) -> torch.Tensor:
    """Return the receiver's block, on the CPU, of the senders' dtype; its padding is zero.

    Args:
        plan: what to copy.
        senders: the blocks it was made from.
        receiver: the block it was made for.
        read: brings a sender's tensor.
        digest: of a sender's tensor; equal ones need not be read to be equal.
        replicas: what to do where ranks that should hold the same do not: an `error`, take the
            `first`, the `last`, or their `mean`.

    Raises:
        LayoutError: the senders' dtypes differ, or cannot be reduced.
        ReplicasDiffer: see `replicas`.
    """
    blocks = {block.rank: block for block in senders}
    made: torch.Tensor | None = None
    for move in plan.moves:
        values = _values(plan, move, blocks, read, digest, replicas)
        if made is None:
            made = _empty(plan, values.dtype)
        elif values.dtype != made.dtype:
            raise LayoutError(
                f"$rank {move.ranks[0][0]} recorded {values.dtype} and others {made.dtype}"
            )
        _copy(as_bits(made), as_bits(values), move.pieces)
    if made is None:  # all padding, without elements, or none of a sum that another rank holds
        made = torch.zeros(plan.shape, dtype=read(senders[0].rank, 0.0).dtype, device="cpu")
    return _ungrouped(made, plan, receiver.shape)


def _empty(plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    made = torch.empty(plan.shape, dtype=dtype, device="cpu")
    if plan.has_padding:
        as_bits(made).zero_()
    return made


def keep_padding(
    plan: Plan, shape: Sequence[int], made: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Return a receiver's block with the target's values, or a fill, where it has padding.

    Args:
        plan: what says where that is.
        shape: the receiver's sizes.
        made: the block, of the target's dtype and on its device.
        target: what the receiver holds now.

    Raises:
        LayoutError: the fill is no value of the dtype.
    """
    if not plan.has_padding:
        return made
    groups = [pair.receivers for pair in plan.pairs]
    into, kept = _grouped(made, groups).clone(), _grouped(target.detach(), groups)
    for dim, (padding, fill) in enumerate(zip(plan.padding, plan.fills, strict=True)):
        for at, n in padding:
            if fill is None:
                as_bits(into).narrow(dim, at, n).copy_(as_bits(kept).narrow(dim, at, n))
                continue
            into.narrow(dim, at, n).copy_(_value_of(fill, into.dtype))
    return _ungrouped(into, plan, shape)


def _value_of(fill: float, dtype: torch.dtype) -> torch.Tensor:
    """Return a fill as an element; one that is rounded to a float is fine."""
    wide = torch.tensor(fill, dtype=torch.float64, device="cpu")
    one = wide.to(dtype)
    back = one.to(torch.float64)
    rounded = dtype.is_floating_point and bool(back.isfinite()) and math.isfinite(fill)
    if not (rounded or dtype.is_complex or torch.equal(back.nan_to_num(1.5), wide.nan_to_num(1.5))):
        raise LayoutError(f"the fill {fill} is not a value of {dtype}", "declare one that is")
    return one


def _grouped(tensor: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """View a tensor with one dim a group of its dims, these fused in the group's order."""
    order = [i for group in groups for i in group]
    rest = [i for i in range(tensor.dim()) if i not in order]  # of size 1
    sizes = [math.prod(tensor.shape[i] for i in group) for group in groups]
    return tensor.permute([*order, *rest]).reshape(sizes)


def _ungrouped(made: torch.Tensor, plan: Plan, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor of one dim a group as the receiver's."""
    order = [i for pair in plan.pairs for i in pair.receivers]
    places = [*order, *(i for i in range(len(shape)) if i not in order)]
    split = made.reshape([shape[i] for i in places])
    return split.permute([places.index(i) for i in range(len(places))])


def _values(
    plan: Plan,
    move: Move,
    blocks: dict[int, Block],
    read: Read,
    digest: Callable[[int], str],
    replicas: str,
) -> torch.Tensor:
    """Return the tensor a move copies from, with one dim a group: a block, or several reduced."""
    groups = [pair.senders for pair in plan.pairs]
    share = move.elements / max(1, math.prod(blocks[move.ranks[0][0]].shape))
    one = functools.partial(_one, plan, move, read, digest, replicas, share)
    summands = (_grouped(one(ranks), groups) for ranks in move.ranks)
    first = next(summands)
    if not plan.reduction:
        return first
    total = _wide(first, plan.reduction)
    for other in summands:
        if other.dtype != first.dtype:
            raise LayoutError("partial results have different dtypes")
        if plan.reduction in ("sum", "avg"):
            total += other.to(total.dtype)
        elif plan.reduction == "max":
            total = torch.maximum(total, other.to(total.dtype))
        else:
            total = torch.minimum(total, other.to(total.dtype))
    if plan.reduction == "avg":
        total /= len(move.ranks)
    return total.to(first.dtype)


def _wide(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
    """Return a copy to reduce others into."""
    if tensor.dtype.is_complex and reduction in ("sum", "avg"):
        return tensor.to(torch.complex128, copy=True)
    if tensor.dtype.is_floating_point:
        wide = torch.float32 if tensor.dtype.itemsize <= 2 else torch.float64
        return tensor.to(wide, copy=True)
    if tensor.dtype == torch.bool or tensor.dtype.is_complex or reduction == "avg":
        raise LayoutError(f"partial results of {tensor.dtype} have no {reduction}")
    return tensor.to(torch.int64, copy=True)


def _one(
    plan: Plan,
    move: Move,
    read: Read,
    digest: Callable[[int], str],
    replicas: str,
    share: float,
    ranks: tuple[int, ...],
) -> torch.Tensor:
    """Return the tensor that replicas hold."""
    different: dict[str, int] = {}
    for rank in ranks:
        different.setdefault(digest(rank), rank)
    if len(different) == 1 or replicas == "first":
        return read(ranks[0], share)
    if replicas == "last":
        return read(ranks[-1], share)
    if replicas == "mean":
        return _mean(ranks, read)
    groups = [pair.senders for pair in plan.pairs]
    first = read(ranks[0], 1.0)
    for rank in list(different.values())[1:]:
        other = read(rank, 1.0)
        used = [_used(_grouped(tensor, groups), plan, move) for tensor in (first, other)]
        wrong = _difference(*used)
        if wrong:
            count = f" ({len(different)} of the {len(ranks)} ranks that hold it are different)"
            raise ReplicasDiffer(
                f"${{rank}}s {ranks[0]} and {rank} should hold the same block, and {wrong}"
                f"{count if len(different) > 2 else ''}; that may be the fault you look for",
                "if they hold other data, name the axis that tells them apart in "
                "recorder.declare_mesh and in the dims",
            )
    return first  # they differ in padding alone, or in how they write zero


def _used(tensor: torch.Tensor, plan: Plan, move: Move) -> torch.Tensor:
    """Return the elements that a move copies, where they go, and zeros elsewhere."""
    found = torch.zeros(plan.shape, dtype=tensor.dtype, device="cpu")
    _copy(as_bits(found), as_bits(tensor), move.pieces)
    return found


def _mean(ranks: Sequence[int], read: Read) -> torch.Tensor:
    first = read(ranks[0], 1.0)
    if not (first.dtype.is_floating_point or first.dtype.is_complex):
        raise LayoutError(f"replicas of {first.dtype} have no mean", "take the first of them")
    wide = torch.complex128 if first.dtype.is_complex else torch.float64
    total = first.to(wide, copy=True)
    for rank in ranks[1:]:
        total += read(rank, 1.0).to(wide)
    return (total / len(ranks)).to(first.dtype)


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """Say how two tensors of one shape differ; "" where all their elements are equal."""
    if a.dtype != b.dtype:
        return f"are of {a.dtype} and {b.dtype}"
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        apart = as_bits(a) != as_bits(b)
        x, y = a.to(torch.float64), b.to(torch.float64)
    else:
        wide = torch.complex128 if a.dtype.is_complex else torch.float64
        x, y = a.to(wide), b.to(wide)
        apart = (x != y) & ~((x != x) & (y != y))
    count = int(apart.sum())
    if not count:
        return ""
    most = float((x - y).abs()[apart].max())
    return f"differ in {count} of {a.numel()} elements, at most by {most:.6g}"


def _copy(into: torch.Tensor, out_of: torch.Tensor, pieces: tuple[tuple[Piece, ...], ...]) -> None:
    """Copy pieces along each dim, all combinations of them."""
    choices: list[list[tuple[slice, slice]]] = []
    gathered: list[tuple[int, torch.Tensor]] = []
    for dim, group in enumerate(pieces):
        if len(group) > _MANY_PIECES:
            there, here = (
                torch.cat([torch.arange(at, at + p.length, device="cpu") for p, at in starts])
                for starts in ([(p, p.into) for p in group], [(p, p.out_of) for p in group])
            )
            out_of = out_of.index_select(dim, here)
            gathered.append((dim, there))
            choices.append([(slice(None), slice(None))])
            continue
        choices.append(
            [
                (slice(p.into, p.into + p.length), slice(p.out_of, p.out_of + p.length))
                for p in group
            ]
        )
    for combination in itertools.product(*choices):
        target = into[tuple(there for there, _ in combination)]
        source = out_of[tuple(here for _, here in combination)]
        if not gathered:
            target.copy_(source)
        elif len(gathered) == 1:
            target.index_copy_(gathered[0][0], gathered[0][1], source)
        else:
            target[_mesh_of(target, dict(gathered))] = source


def _mesh_of(target: torch.Tensor, places: dict[int, torch.Tensor]) -> tuple[Any, ...]:
    """Return indices along every dim of a tensor, some of them given, that combine as a grid."""
    found = []
    for dim, n in enumerate(target.shape):
        index = places.get(dim, torch.arange(n, device="cpu"))
        found.append(index.view([-1 if i == dim else 1 for i in range(target.dim())]))
    return tuple(found)
