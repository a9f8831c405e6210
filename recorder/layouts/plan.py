"""From the blocks of all senders to the block of one receiver: what to copy from where to where.

1. `plan` places every sender's block (`blocks`) and pairs the dims of both sides (`align`).
2. Senders at the same coordinates are replicas: one is read. Senders of partial results are added.
3. For each block that is left, `Move` has the indices it shares with the receiver's, along each
   group of dims. Together they must cover all of the receiver's block that is no padding.

Nothing here touches a tensor; `assemble` does what a plan says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import LayoutError
from . import runs as r
from .align import MEND, Group, Pair, align
from .blocks import Block, Lengths, Sizes, coordinates, even_whole
from .dims import TOKENS, Dims
from .groups import group_of
from .runs import Piece, Runs


@dataclass(frozen=True)
class Move:
    """What one block, or the sum of several, gives to the receiver's.

    Attributes:
        ranks: for each partial result, or the one that is none, the ranks that hold it.
        pieces: for each group of dims the indices in common.
    """

    ranks: tuple[tuple[int, ...], ...]
    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def elements(self) -> int:
        """How many elements it gives."""
        return math.prod(sum(piece.length for piece in group) for group in self.pieces)


@dataclass(frozen=True)
class Plan:
    """What to copy.

    Attributes:
        pairs: the groups of dims.
        moves: what to copy; of what each sender has, the rest is not needed.
        reduction: how partial results become one: `sum`, `avg`, `min`, `max`; "" where there are
            none.
        zero: whether the receiver is to hold none of a sum, which another rank holds.
        lengths: the receiver's sizes along each group.
        padding: along each group the receiver's indices that are padding: (start, length).
        fills: for each group what its padding is to hold; None to leave it as it is.
        note: what was taken for granted, "" where nothing was.
    """

    pairs: tuple[Pair, ...]
    moves: tuple[Move, ...]
    reduction: str
    zero: bool
    lengths: tuple[int, ...]
    padding: tuple[tuple[tuple[int, int], ...], ...]
    fills: tuple[float | None, ...]
    note: str = ""

    @property
    def has_padding(self) -> bool:
        """Whether a part of the receiver's block is padding."""
        return any(self.padding)


def plan(senders: Sequence[Block], sender_world: int, receiver: Block, receiver_world: int) -> Plan:
    """Return what to copy from the senders' blocks into the receiver's.

    Args:
        senders: the blocks there are, by rank.
        sender_world: how many ranks the senders' job had.
        receiver: the block to be made.
        receiver_world: how many ranks its job has.

    Raises:
        LayoutError: the layouts contradict each other, or do not say enough, or blocks are missing.
    """
    receiver.check("the target's")
    ours = _agreed(senders)
    theirs = receiver.dims
    if len(ours.dims) == len(theirs.dims) and ours.is_named != theirs.is_named:
        ours, theirs = (
            (ours.renamed(theirs), theirs) if theirs.is_named else (ours, theirs.renamed(ours))
        )
    at = {block.rank: coordinates(block, sender_world) for block in senders}
    here = coordinates(receiver, receiver_world)
    axes = _axes(ours, at)
    chosen = _of_same_data(senders, ours, theirs, at, here)
    lengths = _lengths(senders, receiver)
    sizes = _sizes(chosen, ours, axes, at, lengths)
    local = receiver.shape
    here_axes = {axis: n for axis, (_, n) in here.items()}
    wholes = [even_whole(dim, here_axes, n) for dim, n in zip(theirs.dims, local, strict=True)]
    pairs = align(ours, [s.total for s in sizes], theirs, wholes)
    groups = [group_of(pair, ours, sizes, theirs, local, here, wholes, lengths) for pair in pairs]
    into = [group.into() for group in groups]
    reduction, zero, chosen = _partial(ours, theirs, at, here, axes, chosen)
    moves = _moves(chosen, ours, sizes, at, axes, groups, into, reduction)
    wanted = math.prod(sum(n for start, n in runs if start != r.PADDING) for runs in into)
    given = sum(move.elements for move in moves)
    if given != wanted and not zero:
        raise _uncovered(ours, groups, into, moves, [block.rank for block in senders], sender_world)
    return Plan(
        tuple(pairs),
        tuple(moves),
        reduction,
        zero,
        tuple(r.length(runs) for runs in into),
        tuple(_padding(runs) for runs in into),
        tuple(
            theirs.fills.get(theirs.dims[pair.receivers[0]].names[0])
            if len(pair.receivers) == 1
            else None
            for pair in pairs
        ),
        _assumed(senders, ours, sender_world, "the senders' ranks")
        or _assumed([receiver], theirs, receiver_world, "the target's ranks"),
    )


def _assumed(blocks: Sequence[Block], dims: Dims, world: int, whose: str) -> str:
    """Say which axis was taken to be that of all ranks, since nobody declared a mesh."""
    if blocks[0].mesh is not None or dims.mesh is not None or not dims.axes or world == 1:
        return ""
    return f"{dims.axes[0]} was taken to be over all {world} of {whose}: no mesh was declared"


def _agreed(senders: Sequence[Block]) -> Dims:
    """Return the layout that all senders declare."""
    first = senders[0]
    for block in senders:
        block.check(f"sender rank {block.rank}'s")
        if not block.dims.says_the_same(first.dims):
            raise LayoutError(
                f"sender ranks {first.rank} and {block.rank} declare different layouts, "
                f"{first.dims.text!r:.200} and {block.dims.text!r:.200}; {MEND}"
            )
    return first.dims


def _axes(dims: Dims, at: Mapping[int, Mapping[str, tuple[int, int]]]) -> dict[str, int]:
    """Return the size of each axis that the layout names."""
    axes: dict[str, int] = {}
    for axis in dims.axes:
        sizes = {places[axis][1]: rank for rank, places in at.items()}
        if len(sizes) > 1:
            (a, one), (b, other), *_ = sizes.items()
            raise LayoutError(
                f"the axis {axis} has size {a} on sender rank {one} and {b} on sender rank "
                f"{other}; declare the same mesh on all ranks"
            )
        axes[axis] = next(iter(sizes))
    return axes


def _of_same_data(
    senders: Sequence[Block],
    ours: Dims,
    theirs: Dims,
    at: Mapping[int, Mapping[str, tuple[int, int]]],
    here: Mapping[str, tuple[int, int]],
) -> list[Block]:
    """Leave out senders that had other data, or other layers, where both sides say which."""
    kept = list(senders)
    for axis in sorted(ours.data - set(ours.axes)):
        theirs_too = axis in theirs.data and axis not in theirs.axes
        k, n = here.get(axis, (0, 1))
        sizes = {at[block.rank].get(axis, (0, 1))[1] for block in kept}
        if theirs_too and n > 1 and sizes == {n}:
            same = [block for block in kept if at[block.rank][axis][0] == k]
            kept = same or kept  # where one of them alone recorded it, it is for all
    return kept


def _lengths(senders: Sequence[Block], receiver: Block) -> tuple[Lengths | None, Lengths | None]:
    """Return the sequences' lengths on either side; one that says nothing takes the other's."""
    given = {block.lengths: block.rank for block in senders if block.lengths is not None}
    if len(given) > 1:
        (_, one), (_, other), *_ = given.items()
        raise LayoutError(
            f"sender ranks {one} and {other} give different sequence lengths in their extras; give "
            "those of the whole on every rank"
        )
    ours, theirs = next(iter(given), None), receiver.lengths
    if ours is not None and theirs is not None and ours.real != theirs.real:
        raise LayoutError(
            f"the senders' sequences have the lengths {list(ours.real)!s:.120}, the target's "
            f"{list(theirs.real)!s:.120}; feed both the same input"
        )
    ours, theirs = ours or theirs, theirs or ours
    return ours, theirs


def _sizes(
    chosen: Sequence[Block],
    dims: Dims,
    axes: Mapping[str, int],
    at: Mapping[int, Mapping[str, tuple[int, int]]],
    lengths: tuple[Lengths | None, Lengths | None],
) -> list[Sizes]:
    found = []
    for i, dim in enumerate(dims.dims):
        local: dict[tuple[int, ...], int] = {}
        first: dict[tuple[int, ...], int] = {}
        for block in chosen:
            key = tuple(at[block.rank][c.axis][0] for c in dim.cuts if axes[c.axis] > 1)
            if local.setdefault(key, block.shape[i]) != block.shape[i]:
                raise LayoutError(
                    f"dim {dim} has {local[key]} on sender rank {first[key]} and {block.shape[i]} "
                    f"on sender rank {block.rank}, and no axis that cuts it tells them apart; name "
                    "the axis in the dims, and where each rank stands in recorder.declare_mesh"
                )
            first.setdefault(key, block.rank)
        total = None if dims.shape is None else dims.shape[i]
        fits = lengths[0] if lengths[0] is not None and dim.names == (TOKENS,) else None
        found.append(Sizes(dim, axes, local, total, fits))
        if fits is not None and sum(fits.room) > found[-1].total:
            found[-1] = Sizes(dim, axes, local, total)  # not of these tokens, as in a decode step
    return found


def _partial(
    ours: Dims,
    theirs: Dims,
    at: Mapping[int, Mapping[str, tuple[int, int]]],
    here: Mapping[str, tuple[int, int]],
    axes: Mapping[str, int],
    chosen: list[Block],
) -> tuple[str, bool, list[Block]]:
    """Return how partial results are reduced, whether the receiver holds none, and who gives."""
    held = [(axis, how) for axis, how in theirs.partial if here[axis][1] > 1]
    given = [(axis, how) for axis, how in ours.partial if axes[axis] > 1]
    if held and sorted(held) == sorted(given) and all(here[a][1] == axes[a] for a, _ in held):
        # Summand by summand: both sides cut the sum in the same way.
        same = [b for b in chosen if all(at[b.rank][a][0] == here[a][0] for a, _ in held)]
        return "", False, same
    ways = {how for _, how in given}
    if len(ways) > 1:
        raise LayoutError(
            f"partial results over {' and '.join(a for a, _ in given)} are reduced in different "
            "ways; redistribute the DTensor before the tap"
        )
    zero = any(how == "sum" and here[axis][0] > 0 for axis, how in held)
    return next(iter(ways), ""), zero, chosen


def _moves(
    chosen: Sequence[Block],
    ours: Dims,
    sizes: Sequence[Sizes],
    at: Mapping[int, Mapping[str, tuple[int, int]]],
    axes: Mapping[str, int],
    groups: Sequence[Group],
    into: Sequence[Runs],
    reduction: str,
) -> list[Move]:
    cut_axes = [axis for axis in ours.cut_axes if axes[axis] > 1]
    partial = [axis for axis, _ in ours.partial if axes[axis] > 1] if reduction else []
    blocks: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for block in chosen:
        places = at[block.rank]
        key = tuple(places[axis][0] for axis in cut_axes)
        part = tuple(places[axis][0] for axis in partial)
        blocks.setdefault(key, {}).setdefault(part, []).append(block.rank)
    shared: dict[tuple[int, tuple[tuple[int, ...], ...]], tuple[Piece, ...]] = {}
    found = []
    for key in sorted(blocks):
        places = at[next(iter(blocks[key].values()))[0]]
        pieces = []
        for g, group in enumerate(groups):
            keys = tuple(sizes[i].key(places) for i in group.pair.senders)
            if (g, keys) not in shared:
                runs = [sizes[i].runs(k) for i, k in zip(group.pair.senders, keys, strict=True)]
                shared[g, keys] = tuple(r.common(into[g], group.out_of(runs)))
            pieces.append(shared[g, keys])
        move = Move(tuple(tuple(ranks) for _, ranks in sorted(blocks[key].items())), tuple(pieces))
        if not move.elements:
            continue
        expected = math.prod(axes[axis] for axis in partial)
        if len(move.ranks) != expected:
            have = ", ".join(str(rank) for ranks in move.ranks for rank in ranks)
            raise LayoutError(
                f"of the {expected} partial results over {' and '.join(partial)} only those of "
                f"sender rank {have} were recorded, so their {reduction} is not known; record all "
                "ranks"
            )
        found.append(move)
    return found


def _padding(runs: Runs) -> tuple[tuple[int, int], ...]:
    found, at = [], 0
    for start, n in runs:
        if start == r.PADDING:
            found.append((at, n))
        at += n
    return tuple(found)


def _uncovered(
    ours: Dims,
    groups: Sequence[Group],
    into: Sequence[Runs],
    moves: Sequence[Move],
    ranks: Sequence[int],
    world: int,
) -> LayoutError:
    """Return which part of the receiver's block no sender has, along the first dim that tells."""
    missing = sorted(set(range(world)) - set(ranks))
    who = f"; sender rank {', '.join(map(str, missing[:8]))} recorded none" if missing else ""
    for g, group in enumerate(groups):
        covered = r.merged(sorted({(p.into, p.length) for move in moves for p in move.pieces[g]}))
        have = {at for start, n in covered for at in range(start, start + n)}
        wanted, at = [], 0
        for start, n in into[g]:
            if start != r.PADDING:
                wanted += [(at + i, start + i) for i in range(n) if at + i not in have]
            at += n
        if wanted:
            label = " ".join(str(ours.dims[i]) for i in group.pair.senders)
            return LayoutError(
                f"dim {label}: no sender recorded index {wanted[0][1]} and {len(wanted) - 1} more "
                f"that the target's block has{who}; record all ranks, or name a transform with "
                "--transform"
            )
    return LayoutError(
        f"the senders' blocks do not make up the whole of {ours.text!r:.200}{who}; record all "
        "ranks, or name a transform with --transform"
    )


def whole(senders: Sequence[Block], world_size: int) -> Block:
    """Return the block that is the whole tensor, in the senders' dims, without padding.

    Raises:
        LayoutError: as `plan`.
    """
    ours = _agreed(senders)
    at = {block.rank: coordinates(block, world_size) for block in senders}
    lengths = next((block.lengths for block in senders if block.lengths is not None), None)
    sizes = _sizes(senders, ours, _axes(ours, at), at, (lengths, lengths))
    shape = []
    for dim, size in zip(ours.dims, sizes, strict=True):
        name = dim.names[0] if len(dim.names) == 1 else ""
        n = ours.sizes.get(name, size.total)
        if name == TOKENS and name not in ours.sizes and lengths is not None:
            n = sum(lengths.real) if sum(lengths.room) <= size.total else n
        shape.append(n)
    unpadded = None if lengths is None else Lengths(lengths.real, lengths.real)
    return Block(0, ours.whole(), tuple(shape), (), unpadded)
