"""One rank's block of a tensor, and the indices of the whole that lie in each of its dims.

1. `coordinates` says where the block's rank stands on the axes that its layout names.
2. `Sizes` knows the size of every sender's block and so where each begins, however uneven they are.
3. Of receivers one block is known; `Receiver.indices` finds how the whole is cut to have it.
4. Both cut the whole by one axis after another, the outermost first, in `_cut`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import LayoutError
from ..mesh import FrozenMesh
from . import runs as r
from .dims import TOKENS, Cut, Dim, Dims
from .lengths import Lengths
from .runs import Runs

SEQUENCES_OVER = "cp"
"""The axis that cuts each sequence of flattened tokens, and not the line of them."""
Places = Mapping[str, tuple[int, int]]
"""Axis -> a rank's coordinate and the axis's size."""
_RULES = {"chunk": r.chunk, "split": r.split}
_Part = Callable[[tuple[int, ...], int, int], tuple[int, int]]


@dataclass(frozen=True)
class Block:
    """What is known of one rank's tensor.

    Attributes:
        rank: the rank.
        dims: its layout.
        shape: its sizes.
        mesh: where the rank stands; None where nobody said.
        extras: its tap's, as JSON; "" where they say nothing of tokens.
    """

    rank: int
    dims: Dims
    shape: tuple[int, ...]
    mesh: FrozenMesh | None = None
    extras: str = ""

    def check(self, whose: str) -> None:
        """Refuse a block that does not have the dims its layout names.

        Raises:
            LayoutError: another number of dims, or a `1` that is not of size 1.
        """
        if len(self.dims.dims) != len(self.shape):
            raise LayoutError(
                f"{whose} dims {self.dims.text!r:.200} name {len(self.dims.dims)}, and its tensor "
                f"has the shape {list(self.shape)}",
                "mend the dims at the tap",
            )
        for dim, size in zip(self.dims.dims, self.shape, strict=True):
            if not dim.names and size != 1:
                raise LayoutError(
                    f"{whose} dims {self.dims.text!r:.200} say 1 where its tensor has {size}",
                    "mend the dims at the tap",
                )


def coordinates(block: Block, world_size: int) -> Places:
    """Return where a block's rank stands on the axes its layout names, and on all its mesh has.

    An axis that the mesh does not have is one of size 1: the job runs without it. Where nobody
    declared a mesh, an axis that stands alone is taken to be that of all ranks.

    Raises:
        LayoutError: nobody says where the rank stands.
    """
    dims, mesh = block.dims, dict(block.mesh or ())
    if dims.mesh is not None:
        known = {
            axis: (mesh[axis][0] if at is None and axis in mesh else at, size)
            for axis, (at, size) in dims.mesh.items()
        }
        return {**mesh, **_complete(block, known, world_size)}
    if block.mesh is not None:
        return {**dict.fromkeys(dims.axes, (0, 1)), **mesh}
    return _complete(block, dict.fromkeys(dims.axes, (None, world_size)), world_size)


def _complete(
    block: Block, known: Mapping[str, tuple[int | None, int]], world_size: int
) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for axis, (at, size) in known.items():
        if at is None and size != 1 and (len(known) > 1 or size != world_size):
            axes = ", ".join(f"{axis}=(rank, size)" for axis in known)
            raise LayoutError(
                f"nobody says where rank {block.rank} stands on the axes of the dims "
                f"{block.dims.text!r:.200}",
                f"declare it in the job: recorder.declare_mesh({axes})",
            )
        found[axis] = (block.rank if at is None and size > 1 else at or 0, size)
    return found


def _cuts_of(dim: Dim, sizes: Mapping[str, int]) -> list[Cut]:
    """Return the axes that do cut a dim: those of more than one rank."""
    return [cut for cut in dim.cuts if sizes[cut.axis] > 1]


class Sizes:
    """The sizes of all senders' blocks along one dim: where each begins, where the whole ends.

    Args:
        dim: the dim.
        axes: axis -> size.
        local: for each block its places on the axes, its size, and its rank.
        total: the size of the whole where that is known, as for a DTensor.
        lengths: of the sequences, if the dim is one of flattened tokens.

    Attributes:
        total: the size of the whole.
        is_open: whether where blocks begin hangs on the size of one that nobody recorded.
        ends_open: whether the size of the whole does.

    Raises:
        LayoutError: blocks that cannot be parts of one whole.
    """

    def __init__(
        self,
        dim: Dim,
        axes: Mapping[str, int],
        local: Sequence[tuple[Places, int, int]],
        total: int | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        self.dim = dim
        self._axes = axes
        self._cuts = _cuts_of(dim, axes)
        self._local: dict[tuple[int, ...], int] = {}
        self._totals: dict[tuple[int, ...], int] = {}
        self._runs: dict[tuple[int, ...], Runs] = {}
        first: dict[tuple[int, ...], int] = {}
        for places, size, rank in local:
            key = self.key(places)
            if self._local.setdefault(key, size) != size:
                raise LayoutError(
                    f"dim {dim} has {self._local[key]} on $rank {first[key]} and {size} on "
                    f"$rank {rank}, and no axis that cuts it tells them apart",
                    "name the axis "
                    "in the dims, and where each rank stands in recorder.declare_mesh",
                )
            first.setdefault(key, rank)
        self._known = total is not None
        self.is_open = self.ends_open = False
        self.total = total if total is not None else self._add_up(()) or 0
        self.lengths = lengths.fitted(self.total) if lengths and dim.names == (TOKENS,) else None
        if self.lengths is not None and sum(self.lengths.room) > self.total:
            if self._cuts and self._cuts[0].axis == SEQUENCES_OVER:
                raise LayoutError(
                    f"dim {dim}: $senders have {self.total} tokens in all, and the extras give "
                    f"sequences of {sum(self.lengths.room)}",
                    "give the lengths of these tokens",
                )
            self.lengths = None  # of other tokens, such as all that a decode step attends to

    def key(self, places: Places) -> tuple[int, ...]:
        """Return the coordinates that matter along this dim."""
        return tuple(places[cut.axis][0] for cut in self._cuts)

    def runs(self, key: tuple[int, ...]) -> Runs:
        """Return the indices of the whole that the block at some coordinates has.

        Raises:
            LayoutError: its size is not what its layout says.
        """
        if key not in self._runs:
            lengths = None if self._known else self.lengths  # a placement cuts the line of them
            found = _cut(self._cuts, key, self._axes, self.total, self._part, lengths)
            if r.length(found) != self._local[key]:
                where = " ".join(
                    f"{cut.axis}={k}/{self._axes[cut.axis]}"
                    for cut, k in zip(self._cuts, key, strict=True)
                )
                raise LayoutError(
                    f"dim {self.dim}: the block at {where} has {self._local[key]}, and "
                    f"{self.total} in all give it {r.length(found)}",
                    "mend the dims at the tap",
                )
            self._runs[key] = found
        return self._runs[key]

    def _part(self, prefix: tuple[int, ...], k: int, n: int) -> tuple[int, int]:
        if self._known:
            return r.chunk(n, self._axes[self._cuts[len(prefix)].axis], k)
        before = sum(self._totals[(*prefix, j)] for j in range(k))
        return before, self._totals[(*prefix, k)]

    def _add_up(self, prefix: tuple[int, ...]) -> int | None:
        """Return the size of all blocks at coordinates that begin so; None where there are none.

        A block that is not there is taken to be as large as its largest sibling.
        """
        if len(prefix) == len(self._cuts):
            return self._local.get(prefix)
        parts = [
            self._add_up((*prefix, k)) for k in range(self._axes[self._cuts[len(prefix)].axis])
        ]
        largest = max((n for n in parts if n is not None), default=None)
        if largest is None:
            return None
        self._look_for_gaps(parts)
        sizes = [largest if n is None else n for n in parts]
        self._totals.update({(*prefix, k): n for k, n in enumerate(sizes)})
        return sum(sizes)

    def _look_for_gaps(self, parts: Sequence[int | None]) -> None:
        """Note what hangs on the size of blocks that are not there.

        Blocks never grow along an axis, whether cut as `torch.chunk` or as `torch.tensor_split`:
        between two of one size all have it.
        """
        before: int | None = None
        gap = False
        for size in parts:
            gap = gap or size is None
            if gap and size is not None:
                self.is_open |= before != size
                gap = False
            before = size if size is not None else before
        self.ends_open |= gap


@dataclass(frozen=True)
class Receiver:
    """A receiver's block, placed.

    Attributes:
        dims: its layout.
        shape: its sizes.
        places: where it stands.
        lengths: of the sequences in its flattened tokens.
    """

    dims: Dims
    shape: tuple[int, ...]
    places: Places
    lengths: Lengths | None

    def cuts(self, j: int) -> list[Cut]:
        """Return the axes that cut its dim `j`."""
        return _cuts_of(self.dims.dims[j], {axis: n for axis, (_, n) in self.places.items()})

    def whole(self, j: int) -> int | None:
        """Return the size of the whole along dim `j` where this block alone tells, else None."""
        if self.dims.shape is not None:
            return self.dims.shape[j]
        return None if self.cuts(j) else self.shape[j]

    def even(self, j: int) -> int:
        """Return the size of a whole whose blocks along dim `j` are all as large as this one."""
        return self.shape[j] * math.prod(self.places[cut.axis][1] for cut in self.cuts(j))

    def indices(self, j: int, size: int, padded: bool = False) -> tuple[int, Runs] | None:
        """Return the size of the whole along dim `j`, and which of its indices the block has.

        Args:
            j: the dim.
            size: what the whole is to have, its padding left out.
            padded: whether it may have padding behind that.

        Returns:
            None where no whole of that size has such a block.

        Raises:
            LayoutError: it depends on how the dim is cut, which was not declared.
        """
        whole, even = self.whole(j), self.even(j)
        lengths = self._lengths_over(j)
        if lengths is not None and not lengths.is_borrowed:
            size = max(size, sum(lengths.room))
        if whole is not None:
            totals = [whole] if whole == size or (padded and whole > size) else []
        else:
            # Padded to a multiple, or cut unevenly: where both are possible, both begin there.
            totals = [even, size] if padded and even > size else [size]
        for total in totals:
            found = self._cut(j, total)
            if found is not None:
                return total, found
        return None

    def _lengths_over(self, j: int) -> Lengths | None:
        """Return the lengths of the sequences that dim `j` is cut by, each by itself."""
        cuts = self.cuts(j)
        if self.dims.dims[j].names != (TOKENS,) or self.dims.mesh is not None:
            return None
        return self.lengths if cuts and cuts[0].axis == SEQUENCES_OVER else None

    def _cut(self, j: int, total: int) -> Runs | None:
        dim, cuts = self.dims.dims[j], self.cuts(j)
        axes = {axis: n for axis, (_, n) in self.places.items()}
        key = tuple(self.places[cut.axis][0] for cut in cuts)
        lengths = self._lengths_over(j)
        if lengths is not None:
            lengths = lengths.fitted(total)
            if sum(lengths.room) > total:
                return None
        found: dict[str, Runs] = {}
        for rule in _RULES:

            def part(prefix: tuple[int, ...], k: int, n: int, rule: str = rule) -> tuple[int, int]:
                cut = cuts[len(prefix)]
                return _RULES[cut.rule or rule](n, axes[cut.axis], k)

            got = _cut(cuts, key, axes, total, part, lengths)
            if r.length(got) == self.shape[j] and got not in found.values():
                found[rule] = got
        if len(found) > 1:
            first, axis = {rule: got[0][0] for rule, got in found.items()}, cuts[0].axis
            raise LayoutError(
                f"dim {dim}: of {total}, a block of {self.shape[j]} can begin at {first['chunk']}, "
                f"as torch.chunk cuts, or at {first['split']}, as torch.tensor_split",
                "declare "
                f"which at $receiver's tap: {dim.label}[{axis}:chunk] or {dim.label}[{axis}:split]",
            )
        return next(iter(found.values()), None)


def _cut(
    cuts: Sequence[Cut],
    key: tuple[int, ...],
    axes: Mapping[str, int],
    total: int,
    part: _Part,
    lengths: Lengths | None,
) -> Runs:
    """Cut the indices 0 to `total` by one axis after another.

    Args:
        cuts: the axes of more than one rank, the outermost first.
        key: the coordinate on each.
        axes: axis -> size.
        total: how many indices there are.
        part: (coordinates so far, coordinate, size of what is cut) -> start and length, for an axis
            in natural order.
        lengths: of the sequences, which an axis `cp` cuts each by itself.
    """
    found: Runs = [(0, total)]
    for i, (cut, k) in enumerate(zip(cuts, key, strict=True)):
        n = axes[cut.axis]
        if i == 0 and lengths is not None and cut.axis == SEQUENCES_OVER:
            pieces = _of_sequences(total, lengths.room, n, k, cut.zigzag)
        elif cut.zigzag:
            pieces = r.zigzag(r.length(found), n, k)
        else:
            pieces = [part(key[:i], k, r.length(found))]
        found = r.merged(run for piece in pieces for run in r.sliced(found, *piece))
    return r.merged(found)


def _of_sequences(
    total: int, rooms: Sequence[int], parts: int, k: int, zigzag: bool
) -> list[tuple[int, int]]:
    """Return the positions of rank `k`'s part of each sequence, and of what lies behind them."""
    found, at = [], 0
    for room in rooms:
        pieces = r.zigzag(room, parts, k) if zigzag else [r.chunk(room, parts, k)]
        found += [(at + start, n) for start, n in pieces]
        at += room
    start, n = r.chunk(max(0, total - at), parts, k)
    return [*found, (at + start, n)]
