"""The blocks of ranks, and the indices of the whole that each of the senders' has.

1. `coordinates` says where a block's rank stands on the axes that its layout names, and `placed`
   which block of them all it has.
2. `Sizes` knows the size of every sender's block and so where each begins, however uneven they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import LayoutError
from ..mesh import FrozenMesh
from . import runs as r
from .cutting import SEQUENCES_OVER, Places, cut_up, cuts_of, declared, is_by_sequence, rules_of
from .dims import TOKENS, Cut, Dim, Dims
from .lengths import Lengths
from .runs import Runs


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
    declared a mesh, an axis that stands alone is taken to be that of all ranks. A DTensor says
    where it stands on the axes of its own mesh.

    Raises:
        LayoutError: nobody says where the rank stands.
    """
    dims, mesh = block.dims, dict(block.mesh or ())
    if dims.mesh is not None:
        known = {
            axis: (mesh[axis][0] if at is None and axis in mesh else at, size)
            for axis, (at, size) in dims.mesh.items()
        }
        placed = _complete(block, known, world_size)
        outside = {axis: mesh.get(axis, (0, 1)) for axis in dims.axes if axis not in placed}
        for axis, others in dims.aliases.items():
            if outside[axis] in [placed[other] for other in others]:
                outside[axis] = (0, 1)  # another name of what a placement says already
        return {**mesh, **placed, **outside}
    if block.mesh is not None:
        return {**dict.fromkeys(dims.axes, (0, 1)), **mesh}
    return _complete(block, dict.fromkeys(dims.axes, (None, world_size)), world_size)


def placed(block: Block, world_size: int) -> Places:
    """Return `coordinates` with neighbours that share a block at one place.

    Raises:
        LayoutError: nobody says where the rank stands, or an axis does not divide so.
    """
    found = dict(coordinates(block, world_size))
    for dim in block.dims.dims:
        for cut in dim.cuts:
            k, n = found[cut.axis]
            if n > 1 and n % cut.share:
                raise LayoutError(
                    f"dim {dim}: the axis {cut.axis} has {n} ranks, which do not make groups of "
                    f"{cut.share} that share a block",
                    "mend the dims at the tap",
                )
            if n > 1:
                found[cut.axis] = (k // cut.share, n // cut.share)
    return found


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


class Sizes:
    """The sizes of all senders' blocks along one dim: where each begins, where the whole ends.

    Args:
        dim: the dim.
        axes: axis -> size.
        local: for each block its places on the axes, its size, and its rank.
        total: the size of the whole where that is known, as for a DTensor.
        lengths: of the sequences, if the dim is one of flattened tokens.

    Attributes:
        dim: the dim.
        cuts: the axes that do cut it.
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
        self.cuts = cuts_of(dim, axes)
        self._local: dict[tuple[int, ...], int] = {}
        self._totals: dict[tuple[int, ...], int] = {}
        self._ending: set[tuple[int, ...]] = set()  # those whose last block nobody recorded
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
            if self.cuts and self.cuts[0].axis == SEQUENCES_OVER:
                raise LayoutError(
                    f"dim {dim}: $senders have {self.total} tokens in all, and the extras give "
                    f"sequences of {sum(self.lengths.room)}",
                    "give the lengths of these tokens",
                )
            self.lengths = None  # of other tokens, such as all that a decode step attends to

    def key(self, places: Places) -> tuple[int, ...]:
        """Return the coordinates that matter along this dim."""
        return tuple(places[cut.axis][0] for cut in self.cuts)

    def runs(self, key: tuple[int, ...]) -> Runs:
        """Return the indices of the whole that the block at some coordinates has.

        Raises:
            LayoutError: its size is not what its layout says, or that leaves more than one.
        """
        if not self._runs:
            self._runs = self._placed()
        return self._runs[key]

    def _placed(self) -> dict[tuple[int, ...], Runs]:
        """Return the indices of each block, where all their sizes together tell which."""
        lengths = None if self._known else self.lengths  # a placement cuts the line of them
        by_rule: dict[tuple[str, ...], dict[tuple[int, ...], Runs]] = {}
        wrong: LayoutError | None = None
        for rules in rules_of(self.cuts, lambda i, cut: cut.zigzag or self._is_by_sequence(i)):
            cut = {
                key: cut_up(self.cuts, key, self._axes, self.total, rules, lengths, self._part)
                for key in self._local
            }
            odd = next((key for key in cut if r.length(cut[key]) != self._local[key]), None)
            if odd is not None:
                wrong = wrong or self._misfit(odd, r.length(cut[odd]))
            elif cut not in by_rule.values():
                by_rule[rules] = cut
        if not by_rule and wrong is not None:
            raise wrong
        if len(by_rule) > 1:
            options = [declared(self.dim, self.cuts, rules) for rules in by_rule]
            raise LayoutError(
                f"dim {self.dim}: blocks of these sizes come of torch.chunk and of "
                "torch.tensor_split, which cut it at other places",
                f"declare which at the tap: {' or '.join(options)}",
            )
        return next(iter(by_rule.values()))

    @property
    def is_regular(self) -> bool:
        """Whether blocks of these sizes come of cutting the whole by a rule.

        Else their sizes hang on data, as those of the tokens that each expert gets.
        """
        if self._known or any(cut.zigzag for cut in self.cuts) or self._is_by_sequence(0):
            return True
        return any(
            all(
                r.length(cut_up(self.cuts, key, self._axes, self.total, rules, None)) == size
                for key, size in self._local.items()
            )
            for rules in rules_of(self.cuts, lambda i, cut: True)
        )

    @property
    def is_uneven(self) -> bool:
        """Whether blocks are of several sizes."""
        return len({*self._local.values()}) > 1

    @property
    def has_empty(self) -> bool:
        """Whether a rank had nothing, so that no others share its block."""
        return 0 in self._local.values()

    @property
    def recorded(self) -> int:
        """How many indices the blocks have that were recorded."""
        return sum(self._local.values())

    @property
    def block(self) -> int:
        """The size of the largest block."""
        return max(self._local.values())

    def at(self, key: tuple[int, ...]) -> int | None:
        """Return the size of the block at some coordinates, None where nobody recorded it."""
        return self._local.get(key)

    def shared(self, size: int) -> int:
        """Return how many neighbours may hold the same block, if a whole is to have some size.

        0 where that does not explain it.
        """
        copies, rest = divmod(self.total, size) if size else (0, 0)
        plain = bool(self.cuts) and not any(c.zigzag or c.rule or c.share > 1 for c in self.cuts)
        if rest or copies < 2 or not plain or self._known:
            return 0
        alike = len({*self._local.values()}) == 1
        return copies if alike and self._axes[self.cuts[-1].axis] % copies == 0 else 0

    def cuts_as(self, cuts: Sequence[Cut], places: Places) -> bool:
        """Whether another layout's cuts, over axes of its own, are the same."""
        over = [(cut, self._axes[cut.axis]) for cut in self.cuts]
        return over == [(cut, places[cut.axis][1]) for cut in cuts]

    def _is_by_sequence(self, i: int) -> bool:
        return is_by_sequence(self.cuts, i, None if self._known else self.lengths)

    def _misfit(self, key: tuple[int, ...], size: int) -> LayoutError:
        where = " ".join(
            f"{cut.axis}={k}/{self._axes[cut.axis]}" for cut, k in zip(self.cuts, key, strict=True)
        )
        return LayoutError(
            f"dim {self.dim}: the block at {where} has {self._local[key]}, and {self.total} in all "
            f"give it {size}",
            "mend the dims at the tap",
        )

    def _part(self, prefix: tuple[int, ...], k: int, n: int) -> tuple[int, int]:
        if self._known:
            return r.chunk(n, self._axes[self.cuts[len(prefix)].axis], k)
        before = sum(self._totals[(*prefix, j)] for j in range(k))
        return before, self._totals[(*prefix, k)]

    def _add_up(self, prefix: tuple[int, ...]) -> int | None:
        """Return the size of all blocks at coordinates that begin so; None where there are none.

        A block that is not there is taken to be as large as the one before it, or as the largest
        where there is none before.
        """
        if len(prefix) == len(self.cuts):
            return self._local.get(prefix)
        cut = self.cuts[len(prefix)]
        parts = [self._add_up((*prefix, k)) for k in range(self._axes[cut.axis])]
        largest = max((n for n in parts if n is not None), default=None)
        if largest is None:
            return None
        sizes: list[int] = []
        for size in parts:
            before = sizes[-1] if sizes and not cut.zigzag else largest
            sizes.append(before if size is None else size)
        self._look_for_gaps(prefix, parts, is_zigzag=cut.zigzag)
        self._totals.update({(*prefix, k): n for k, n in enumerate(sizes)})
        return sum(sizes)

    def _look_for_gaps(
        self, prefix: tuple[int, ...], parts: Sequence[int | None], *, is_zigzag: bool
    ) -> None:
        """Note what hangs on the size of blocks that are not there.

        Blocks never grow along an axis, whether cut as `torch.chunk` or as `torch.tensor_split`:
        between two of one size all have it, and what lacks its last block has at most that size.
        """
        before: int | None = None
        gap = False
        for k, size in enumerate(parts):
            if size is None:
                gap = True
                continue
            if gap:
                self.is_open |= before != size
                gap = False
            before = size
            if (*prefix, k) in self._ending:
                later = [n for n in parts[k + 1 :] if n is not None]
                if later:
                    self.is_open |= is_zigzag or size not in later
                else:
                    gap = True
        if gap and is_zigzag:  # whose last block may be the largest
            self.is_open = True
        elif gap and prefix:
            self._ending.add(prefix)
        elif gap:
            self.ends_open = True
