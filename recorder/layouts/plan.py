"""From the blocks of all senders to the block of one receiver: what to copy from where to where.

1. `plan` places every sender's block (`blocks`), pairs the dims of both sides (`align`) and holds
   their sizes together (`fit`).
2. Senders at the same coordinates are replicas: one is read. Senders of partial results are added.
3. For each block that is left, `Move` has the indices it shares with the receiver's, along each
   group of dims. Together they must cover all of the receiver's block that is no padding.

Nothing here touches a tensor; `assemble` does what a plan says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import BlocksMissing, LayoutError
from . import runs as r
from .agreeing import check_same, lengths_of, rows_of, told_by, told_in, unbatched
from .align import MEND, Pair, align
from .batches import batched
from .blocks import Block, Sizes, placed
from .cutting import Places
from .data import busy, of_same_data
from .dims import BATCH, SEQUENCE, TOKENS, Dims
from .fit import group_of
from .groups import Group
from .lengths import Lengths
from .receiver import Receiver
from .repeats import settled
from .runs import Piece, Runs


@dataclass(frozen=True)
class Move:
    """What one block, or several that are reduced to one, gives to the receiver's.

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
        moves: what to copy; none where the receiver is to hold none of a sum, but zeros, since
            another rank holds it.
        reduction: how partial results become one: `sum`, `avg`, `min`, `max`; "" where there are
            none.
        shape: the receiver's sizes along each group.
        padding: along each group the receiver's indices that are padding: (start, length).
        fills: for each group what its padding is to hold; None to leave it as it is.
        note: what was taken for granted, "" where nothing was.
        guesses: what of it should be said aloud: what only a declaration can make certain.
    """

    pairs: tuple[Pair, ...]
    moves: tuple[Move, ...]
    reduction: str
    shape: tuple[int, ...]
    padding: tuple[tuple[tuple[int, int], ...], ...]
    fills: tuple[float | None, ...]
    note: str = ""
    guesses: str = ""

    @property
    def has_padding(self) -> bool:
        """Whether a part of the receiver's block is padding."""
        return any(self.padding)

    @property
    def pieces(self) -> int:
        """How many pieces there are, which is what a plan's memory goes by."""
        return sum(len(group) for move in self.moves for group in move.pieces)


def plan(
    senders: Sequence[Block],
    sender_world: int,
    receiver: Block,
    receiver_world: int,
    *,
    as_it_stands: bool = False,
) -> Plan:
    """Return what to copy from the senders' blocks into the receiver's.

    Args:
        senders: the blocks there are, by rank.
        sender_world: how many ranks the senders' job had.
        receiver: the block to be made.
        receiver_world: how many ranks its job has.
        as_it_stands: whether batches are copied index by index, wherever padding stands.

    Raises:
        LayoutError: the layouts contradict each other, or do not say enough, or blocks are missing.
    """
    receiver.check("$receiver's")
    _agreed(senders)
    senders, (receiver,) = settled((senders, sender_world), ([receiver], receiver_world))
    sender_dims, receiver_dims = senders[0].dims, receiver.dims
    if sender_dims.is_named and receiver_dims.is_named:
        sender_dims, receiver_dims = (
            sender_dims.with_tokens(receiver_dims),
            receiver_dims.with_tokens(sender_dims),
        )
    if (
        len(sender_dims.dims) == len(receiver_dims.dims)
        and sender_dims.is_named
        and not receiver_dims.is_named
    ):
        receiver_dims = receiver_dims.renamed(sender_dims)
    elif (
        len(sender_dims.dims) == len(receiver_dims.dims)
        and receiver_dims.is_named
        and not sender_dims.is_named
    ):
        sender_dims = sender_dims.renamed(receiver_dims)
    at = {block.rank: placed(block, sender_world) for block in senders}
    here = placed(receiver, receiver_world)
    axes = _axes(sender_dims, at, sender_world)
    if 0 in receiver.shape:
        return _nothing(receiver.shape)
    chosen, guesses = of_same_data(senders, sender_dims, receiver_dims, at, here)
    told = told_by(chosen, sender_dims), told_in(receiver.extras, receiver_dims)
    check_same(*told)
    sender_dims, receiver_dims = unbatched(told[0], sender_dims, told[1], receiver_dims)
    lengths, receiver_lengths = lengths_of(told[0], sender_dims, told[1], receiver_dims)
    sizes = _sizes(chosen, sender_dims, axes, at, lengths)
    rows = None
    if not as_it_stands:
        rows = rows_of(told[0], sender_dims, sizes, told[1], receiver_dims)
    sized = frozenset((*sender_dims.sizes, *receiver_dims.sizes))
    if sender_dims.is_line and TOKENS not in receiver_dims.sizes:
        sized -= {TOKENS}  # one sequence's size says nothing of what stands behind tokens
    block = Receiver(receiver_dims, receiver.shape, here, receiver_lengths, sized)
    even = [block.even(j) for j in range(len(receiver_dims.dims))]
    pairs = align(sender_dims, [size.total for size in sizes], receiver_dims, even)
    groups: list[Group] = []
    for together in _together(pairs, sender_dims, receiver_dims):
        try:
            if rows is not None and _is_batch(together[0], sender_dims, receiver_dims):
                batch, note = batched(together, sender_dims, sizes, block, rows)
                guesses.append(note)
                if batch is not None:
                    groups.append(batch)
                    continue
            groups += [group_of(p, sender_dims, sizes, block, lengths, rows) for p in together]
        except LayoutError as err:
            given = [i for p in together for i in p.senders]
            taken = [j for p in together for j in p.receivers]
            advice = undeclared(senders[0], given, sender_world, "$senders'")
            advice = advice or undeclared(receiver, taken, receiver_world, "$receiver's")
            if type(err) is not LayoutError or not advice:
                raise
            raise LayoutError(err.fact, f"{advice}, else {MEND}") from None
    pairs = [group.pair for group in groups]
    into = [group.into() for group in groups]
    reduction, zero, chosen = _partial(sender_dims, receiver_dims, at, here, axes, chosen)
    moves = [] if zero else _moves(chosen, sender_dims, sizes, at, axes, groups, into, reduction)
    wanted = math.prod(sum(n for start, n in runs if start != r.PADDING) for runs in into)
    if not zero and sum(move.elements for move in moves) != wanted:
        raise _uncovered(sender_dims, pairs, into, moves, [b.rank for b in senders], sender_world)
    assumed = _assumed(senders, sender_dims, sender_world, "the senders' ranks") or _assumed(
        [receiver], receiver_dims, receiver_world, "the target's ranks"
    )
    guesses += [_one_line(sender_dims, axes, lengths), *(group.note for group in groups)]
    guesses = [guess for guess in guesses if guess]
    return Plan(
        tuple(pairs),
        tuple(moves),
        reduction,
        tuple(r.length(runs) for runs in into),
        tuple(_padding(runs) for runs in into),
        tuple(_fill(receiver_dims, pair) for pair in pairs),
        "; ".join(filter(None, [assumed, *guesses])),
        "; ".join(guesses),
    )


def _is_batch(pair: Pair, sender_dims: Dims, receiver_dims: Dims) -> bool:
    """Whether a pair is one of batch or sequence."""
    dims = [sender_dims.dims[i] for i in pair.senders]
    dims += [receiver_dims.dims[j] for j in pair.receivers]
    return any({BATCH, SEQUENCE} & {*dim.names} for dim in dims)


def _together(pairs: Sequence[Pair], sender_dims: Dims, receiver_dims: Dims) -> list[list[Pair]]:
    """Return the pairs of batch and sequence as one list, and each of the others as one."""
    found: list[list[Pair]] = []
    batch: list[Pair] = []
    for pair in pairs:
        into = batch if _is_batch(pair, sender_dims, receiver_dims) else []
        found += [into] * (not into)
        into.append(pair)
    return found


def _nothing(shape: Sequence[int]) -> Plan:
    """Return the plan for a block without elements, such as that of a rank without tokens."""
    pairs = tuple(Pair((), (j,)) for j in range(len(shape)))
    return Plan(pairs, (), "", tuple(shape), ((),) * len(shape), (None,) * len(shape))


def whole(senders: Sequence[Block], world_size: int, shape: Sequence[int] | None = None) -> Block:
    """Return the block that is the whole tensor, in the senders' dims, their padding left out.

    Args:
        senders: the blocks there are.
        world_size: how many ranks their job had.
        shape: its sizes, where they are known to be others than the blocks say.

    Raises:
        LayoutError: as `plan`.
    """
    _agreed(senders)
    (senders,) = settled((senders, world_size))
    sender_dims = senders[0].dims
    at = {block.rank: placed(block, world_size) for block in senders}
    senders = busy(list(senders), sender_dims, at)
    has_tokens = TOKENS in sender_dims.names
    lengths = told_by(senders, sender_dims).lengths if has_tokens else None
    sizes = _sizes(senders, sender_dims, _axes(sender_dims, at, world_size), at, lengths)
    extras = ""
    found = []
    for dim, size in zip(sender_dims.dims, sizes, strict=True):
        n = sender_dims.sizes.get(dim.names[0]) if len(dim.names) == 1 else None
        if n is None and size.lengths is not None:
            n = sum(size.lengths.real)
            extras = json.dumps({"seq_lens": size.lengths.real})
        found.append(size.total if n is None else n)
    made = tuple(found if shape is None else shape)
    if len(made) != len(sender_dims.dims):
        raise LayoutError(
            f"$senders' dims {sender_dims.text!r:.200} name {len(sender_dims.dims)}, and a "
            f"tensor of the shape {list(made)} is not the whole of that",
            "return one with the dims of g.logical()",
        )
    return Block(0, sender_dims.whole(made), made, (), extras if made == tuple(found) else "")


def _fill(receiver_dims: Dims, pair: Pair) -> float | None:
    dims = [receiver_dims.dims[j] for j in pair.receivers]
    if len(dims) > 1:  # a batch's, each of whose sequences is padded
        return receiver_dims.fills.get(SEQUENCE)
    return receiver_dims.fills.get(dims[0].names[0]) if len(dims[0].names) == 1 else None


def _assumed(blocks: Sequence[Block], dims: Dims, world: int, whose: str) -> str:
    """Say which axis was taken to be that of all ranks, since nobody declared a mesh."""
    if blocks[0].mesh is not None or dims.mesh is not None or not dims.axes or world == 1:
        return ""
    return f"{dims.axes[0]} was taken to be over all {world} of {whose}: no mesh was declared"


def undeclared(block: Block, dims: Iterable[int], world: int, whose: str) -> str:
    """Return what to declare where an axis that cuts some dims was counted as 1, "" else.

    Args:
        block: one of the side's.
        dims: by position.
        world: how many ranks the side's job has.
        whose: the side, as messages call it.
    """
    if world == 1 or (block.mesh is None and block.dims.mesh is None):
        return ""
    known = {*dict(block.mesh or ()), *(block.dims.mesh or ())}
    for i in dims:
        for cut in block.dims.dims[i].cuts:
            if cut.axis not in known:
                return (
                    f"no axis {cut.axis} is declared on {whose} ranks here, so nothing is cut over "
                    f"it: declare_mesh({cut.axis}=(rank, size)) if it is"
                )
    return ""


def _one_line(dims: Dims, axes: Mapping[str, int], lengths: Lengths | None) -> str:
    """Say that flattened tokens were cut as if they were one sequence."""
    cut = any(
        dim.names == (TOKENS,) and [c.axis for c in dim.cuts if axes[c.axis] > 1][:1] == ["cp"]
        for dim in dims.dims
    )
    if not cut or lengths is not None or dims.mesh is not None or dims.is_line:
        return ""
    return "t was taken to be cut over cp as one sequence: the extras give no lengths"


def _agreed(senders: Sequence[Block]) -> Dims:
    """Return the layout that all senders declare."""
    first = senders[0]
    for block in senders:
        block.check(f"$rank {block.rank}'s")
        if not (block.dims is first.dims or block.dims.says_the_same(first.dims)):
            raise LayoutError(
                f"${{rank}}s {first.rank} and {block.rank} declare different layouts, "
                f"{first.dims.text!r:.200} and {block.dims.text!r:.200}",
                MEND,
            )
    return first.dims


def _axes(dims: Dims, at: Mapping[int, Places], world_size: int) -> dict[str, int]:
    """Return the size of each axis that the layout names."""
    axes: dict[str, int] = {}
    for axis in dims.axes:
        sizes = {places[axis][1]: rank for rank, places in at.items()}
        if len(sizes) > 1:
            (a, one), (b, other), *_ = sizes.items()
            raise LayoutError(
                f"the axis {axis} has size {a} on $rank {one} and {b} on $rank {other}",
                "declare the same mesh on all ranks",
            )
        axes[axis] = next(iter(sizes))
    if math.prod(axes.values()) > world_size:
        raise LayoutError(
            f"the axes {' and '.join(f'{axis} of {n}' for axis, n in axes.items())} are of more "
            f"ranks than the {world_size} there are",
            "mend the mesh",
        )
    return axes


def _sizes(
    chosen: Sequence[Block],
    dims: Dims,
    axes: Mapping[str, int],
    at: Mapping[int, Places],
    lengths: Lengths | None,
) -> list[Sizes]:
    return [
        Sizes(
            dim,
            axes,
            [(at[block.rank], block.shape[i], block.rank) for block in chosen],
            dims.known(i, axes),
            lengths,
        )
        for i, dim in enumerate(dims.dims)
    ]


def _partial(
    sender_dims: Dims,
    receiver_dims: Dims,
    at: Mapping[int, Places],
    here: Places,
    axes: Mapping[str, int],
    chosen: list[Block],
) -> tuple[str, bool, list[Block]]:
    """Return how partial results are reduced, whether the receiver holds none, and who gives."""
    held = [(axis, how) for axis, how in receiver_dims.partial if here[axis][1] > 1]
    given = [(axis, how) for axis, how in sender_dims.partial if axes[axis] > 1]
    if held and sorted(held) == sorted(given) and all(here[a][1] == axes[a] for a, _ in held):
        # Summand by summand: both sides cut the sum in the same way.
        same = [b for b in chosen if all(at[b.rank][a][0] == here[a][0] for a, _ in held)]
        return "", False, same
    ways = {how for _, how in given}
    if len(ways) > 1:
        raise LayoutError(
            f"partial results over {' and '.join(a for a, _ in given)} are reduced in different "
            "ways",
            "redistribute the DTensor before the tap",
        )
    zero = any(how == "sum" and here[axis][0] > 0 for axis, how in held)
    return next(iter(ways), ""), zero, chosen


def _moves(
    chosen: Sequence[Block],
    sender_dims: Dims,
    sizes: Sequence[Sizes],
    at: Mapping[int, Places],
    axes: Mapping[str, int],
    groups: Sequence[Group],
    into: Sequence[Runs],
    reduction: str,
) -> list[Move]:
    cut_axes = [axis for axis in sender_dims.cut_axes if axes[axis] > 1]
    partial = [axis for axis, _ in sender_dims.partial if axes[axis] > 1] if reduction else []
    blocks: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for block in chosen:
        if 0 in block.shape:
            continue
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
            raise BlocksMissing(
                f"of the {expected} partial results over {' and '.join(partial)} only those of "
                f"$rank {have} were recorded, so their {reduction} is not known",
                "record all ranks",
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
    sender_dims: Dims,
    pairs: Sequence[Pair],
    into: Sequence[Runs],
    moves: Sequence[Move],
    ranks: Sequence[int],
    world: int,
) -> LayoutError:
    """Return which part of the receiver's block no sender has, along the first dim that tells."""
    absent = sorted(set(range(world)) - set(ranks))
    some = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
    who = f"; $rank {some} recorded none" if absent else ""
    what = f"$senders' blocks do not make up the whole of {sender_dims.text!r:.200}"
    for g, pair in enumerate(pairs):
        gaps = r.missing(into[g], (piece for move in moves for piece in move.pieces[g]))
        if gaps:
            label = " ".join(str(sender_dims.dims[i]) for i in pair.senders)
            more = r.length(gaps) - 1
            what = (
                f"dim {label}: no $sender recorded index {gaps[0][0]} and {more} more that "
                "$receiver's block has"
            )
            break
    return BlocksMissing(f"{what}{who}")
