"""One rank's block of a tensor, and the indices of the whole that lie in each of its dims.

1. `coordinates` says where the block's rank stands on the axes that its layout names.
2. `Sizes` knows the size of every rank's blocks and so where each begins, however uneven they are;
   of receivers only one is known, and `whole_of` finds the rule that its size follows.
3. `runs_in` cuts the whole dim by one axis after another, the outermost first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from ..errors import LayoutError
from . import runs as r
from .dims import TOKENS, Cut, Dim, Dims, parse_dims
from .mesh import FrozenMesh
from .runs import Runs

SEQUENCES_OVER = "cp"
"""The axis that cuts each sequence of flattened tokens, and not the line of them."""
_RULES = {"chunk": r.chunk, "split": r.split}


class Lengths(NamedTuple):
    """Of the sequences in flattened tokens: without padding, and the room each takes."""

    real: tuple[int, ...]
    room: tuple[int, ...]

    def segments(self, total: int) -> list[tuple[int, int, int]]:
        """Return where tokens stand among all that are real, for `runs.located`."""
        found, at, number = [], 0, 0
        for real, room in zip(self.real, self.room, strict=True):
            found += [(at, real, number), (at + real, room - real, r.PADDING)]
            at, number = at + room, number + real
        found.append((at, total - at, r.PADDING))
        return [segment for segment in found if segment[1] > 0] or [(0, 0, 0)]


@dataclass(frozen=True)
class Block:
    """What is known of one rank's tensor.

    Attributes:
        rank: the rank.
        dims: its layout.
        shape: its sizes.
        mesh: where the rank stands, sorted by axis; None where nobody said.
        lengths: of the sequences in its flattened tokens, None where nobody said.
    """

    rank: int
    dims: Dims
    shape: tuple[int, ...]
    mesh: FrozenMesh = None
    lengths: Lengths | None = field(default=None)

    def check(self, whose: str) -> None:
        """Refuse a block that does not have the dims its layout names.

        Raises:
            LayoutError: another number of dims, or a `1` that is not of size 1.
        """
        if len(self.dims.dims) != len(self.shape):
            raise LayoutError(
                f"{whose} dims {self.dims.text!r:.200} name {len(self.dims.dims)}, and its tensor "
                f"has the shape {list(self.shape)}; mend the dims at the tap"
            )
        for dim, size in zip(self.dims.dims, self.shape, strict=True):
            if not dim.names and size != 1:
                raise LayoutError(
                    f"{whose} dims {self.dims.text!r:.200} say 1 where its tensor has {size}; mend "
                    "the dims at the tap"
                )


def lengths_of(extras: Mapping[str, Any]) -> Lengths | None:
    """Return the sequence lengths in a tap's extras, None where there are none.

    `seq_lens`, or cumulated from 0 as `cu_seqlens` or `cu_seqlens_q`; and where sequences are
    padded each by itself, `padded_seq_lens`, or cumulated `cu_seqlens_padded` or
    `cu_seqlens_q_padded`.
    """

    def read(plain: str, *cumulated: str) -> tuple[int, ...] | None:
        found = extras.get(plain)
        if found is None:
            for name in cumulated:
                ends = extras.get(name)
                if _are_sizes(ends) and ends[0] == 0 and ends == sorted(ends):
                    return tuple(b - a for a, b in itertools.pairwise(ends))
        return tuple(found) if _are_sizes(found) else None

    real = read("seq_lens", "cu_seqlens", "cu_seqlens_q")
    if real is None:
        return None
    room = read("padded_seq_lens", "cu_seqlens_padded", "cu_seqlens_q_padded") or real
    if len(room) != len(real) or any(a > b for a, b in zip(real, room, strict=True)):
        return None
    return Lengths(real, room)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(n) is int and n >= 0 for n in value)


def coordinates(block: Block, world_size: int) -> dict[str, tuple[int, int]]:
    """Return where a block's rank stands on the axes its layout names, and on all its mesh has.

    An axis that the mesh does not have is one of size 1: the job runs without it. Where nobody
    declared a mesh, an axis that stands alone is taken to be that of all ranks.

    Raises:
        LayoutError: nobody says where the rank stands.
    """
    dims, mesh = block.dims, dict(block.mesh or ())
    if dims.mesh is not None:
        known = {
            axis: (mesh.get(axis, (at, 0))[0] if at is None else at, size)
            for axis, (at, size) in dims.mesh.items()
        }
        return _complete(block, known, world_size)
    if block.mesh is not None:
        return {**mesh, **{axis: mesh.get(axis, (0, 1)) for axis in dims.axes}}
    return _complete(block, dict.fromkeys(dims.axes, (None, world_size)), world_size)


def placed(text: str, mesh: FrozenMesh) -> str:
    """Return a layout with a rank's place on each axis that cuts: `b s[cp 0/2] h[tp 1/4]`."""
    try:
        dims = parse_dims(text)
    except LayoutError:
        return text
    places = {**dict(mesh or ()), **(dims.mesh or {})}

    def place(axis: str) -> str:
        at, size = places.get(axis, (None, None))
        return axis if at is None else f"{axis} {at}/{size}"

    words = []
    for dim in dims.dims:
        cuts = [place(cut.axis) + (" zigzag" if cut.zigzag else "") for cut in dim.cuts]
        words.append(dim.label + (f"[{', '.join(cuts)}]" if cuts else ""))
    partial = [f"{place(axis)} {how}" for axis, how in dims.partial]
    return " ".join(words) + (f" (partial: {', '.join(partial)})" if partial else "")


def _complete(
    block: Block, known: Mapping[str, tuple[int | None, int]], world_size: int
) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for axis, (at, size) in known.items():
        if at is None and size != 1 and (len(known) > 1 or size != world_size):
            axes = ", ".join(f"{axis}=(rank, size)" for axis in known)
            raise LayoutError(
                f"nobody says where rank {block.rank} stands on the axes of the dims "
                f"{block.dims.text!r:.200}; declare it in the job: recorder.declare_mesh({axes})"
            )
        found[axis] = (block.rank if at is None and size > 1 else at or 0, size)
    return found


def _cut_by(dim: Dim, sizes: Mapping[str, int]) -> list[Cut]:
    return [cut for cut in dim.cuts if sizes.get(cut.axis, 1) > 1]


class Sizes:
    """The sizes of all blocks along one dim: where each begins, and where the whole ends.

    Args:
        dim: the dim.
        axes: axis -> size.
        local: coordinates on the dim's axes, as `key` returns them -> size of the block there.
        total: the size of the whole where that is known, as for a DTensor.
        lengths: of the sequences, for a dim of flattened tokens.

    Raises:
        LayoutError: blocks that cannot be parts of one whole.
    """

    def __init__(
        self,
        dim: Dim,
        axes: Mapping[str, int],
        local: Mapping[tuple[int, ...], int],
        total: int | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        self.dim = dim
        self._axes = axes
        self._cuts = _cut_by(dim, axes)
        self._local = local
        self._totals: dict[tuple[int, ...], int] = {}
        self._known = total
        self.total = total if total is not None else self._add_up(()) or 0
        self._lengths = lengths if dim.names == (TOKENS,) else None
        self._runs: dict[tuple[int, ...], Runs] = {}

    def key(self, at: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
        """Return the coordinates that matter along this dim."""
        return tuple(at[cut.axis][0] for cut in self._cuts)

    def runs(self, key: tuple[int, ...]) -> Runs:
        """Return the indices of the whole that the block at some coordinates has.

        Raises:
            LayoutError: its size is not what its layout says.
        """
        if key not in self._runs:
            known = self._known is not None

            def part(prefix: tuple[int, ...], k: int, n: int) -> tuple[int, int]:
                if known:
                    return r.chunk(n, self._axes[self._cuts[len(prefix)].axis], k)
                before = sum(self._totals[(*prefix, j)] for j in range(k))
                return before, self._totals[(*prefix, k)]

            found = runs_in(self._cuts, key, self._axes, self.total, part, self._lengths)
            if r.length(found) != self._local[key]:
                raise LayoutError(
                    f"dim {self.dim}: the block at {self._where(key)} has {self._local[key]}, and "
                    f"{self.total} in all give it {r.length(found)}; mend the dims at the tap"
                )
            self._runs[key] = found
        return self._runs[key]

    def _where(self, key: tuple[int, ...]) -> str:
        return " ".join(
            f"{cut.axis}={k}/{self._axes[cut.axis]}" for cut, k in zip(self._cuts, key, strict=True)
        )

    def _add_up(self, prefix: tuple[int, ...]) -> int | None:
        """Return the size of all blocks at coordinates that begin so; None where there are none.

        A block that is not there is taken to be as large as its largest sibling: what is there
        begins where it would begin then, and what is asked of the other is missing.
        """
        if len(prefix) == len(self._cuts):
            return self._local.get(prefix)
        parts = [
            self._add_up((*prefix, k)) for k in range(self._axes[self._cuts[len(prefix)].axis])
        ]
        largest = max((n for n in parts if n is not None), default=None)
        if largest is None:
            return None
        sizes = [largest if n is None else n for n in parts]
        for k, n in enumerate(sizes):
            self._totals[(*prefix, k)] = n
        return sum(sizes)


def runs_in(
    cuts: Sequence[Cut],
    key: tuple[int, ...],
    axes: Mapping[str, int],
    total: int,
    part: Any,
    lengths: Lengths | None = None,
) -> Runs:
    """Cut the indices 0 to `total` by one axis after another.

    Args:
        cuts: the axes of size 2 or more, the outermost first.
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


def even_whole(dim: Dim, axes: Mapping[str, int], local: int) -> int:
    """Return the size of a whole whose blocks are all as large as the one that is known."""
    return local * math.prod(axes[cut.axis] for cut in _cut_by(dim, axes))


def whole_of(
    dim: Dim,
    at: Mapping[str, tuple[int, int]],
    local: int,
    size: int,
    padded: bool,
    lengths: Lengths | None = None,
) -> tuple[int, Runs] | None:
    """Return the size of the whole that a receiver's block is part of, and the block's indices.

    Args:
        dim: the dim.
        at: the receiver's coordinates.
        local: the block's size.
        size: what the whole is to have, its padding left out.
        padded: whether it may have padding behind that.
        lengths: of the sequences, for a dim of flattened tokens.

    Returns:
        None where no whole of that size has such a block.

    Raises:
        LayoutError: it depends on how the dim is cut, which was not declared.
    """
    axes = {axis: n for axis, (_, n) in at.items()}
    cuts = _cut_by(dim, axes)
    key = tuple(at[cut.axis][0] for cut in cuts)
    lengths = lengths if dim.names == (TOKENS,) else None
    totals = [size]
    even = even_whole(dim, axes, local)
    if padded and even > size:
        totals.insert(0, even)
    for total in totals:
        found: dict[str, Runs] = {}
        for rule in _RULES:

            def part(prefix: tuple[int, ...], k: int, n: int, rule: str = rule) -> tuple[int, int]:
                cut = cuts[len(prefix)]
                return _RULES[cut.rule or rule](n, axes[cut.axis], k)

            got = runs_in(cuts, key, axes, total, part, lengths)
            if r.length(got) == local and got not in found.values():
                found[rule] = got
        if len(found) > 1:
            first, axis = {rule: got[0][0] for rule, got in found.items()}, cuts[0].axis
            raise LayoutError(
                f"dim {dim}: of {total}, a block of {local} can begin at {first['chunk']}, as "
                f"torch.chunk cuts, or at {first['split']}, as torch.tensor_split; declare which "
                f"at the target's tap, as {dim.label}[{axis}:chunk] or {dim.label}[{axis}:split]"
            )
        for got in found.values():
            return total, got
    return None
