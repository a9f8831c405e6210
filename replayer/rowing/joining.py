"""Rows of records, the parts of their other dims put together as one side wants them.

1. `Joining.find` says which keys were recorded, in every part that is needed for them.
2. `Joining.rows` brings them, and lets a `plan` put the parts together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from recorder.errors import BlocksMissing, LayoutError
from recorder.layouts.assemble import assemble, keep_padding
from recorder.layouts.plan import Plan, plan, whole
from recorder.sizes import count

from .gather import Gathered
from .grid import Grid
from .held import Held, Record, Source
from .places import Found
from .records import Records
from .same import Several, check_same, taken_elsewhere

_MOST_PLANS = 256


@dataclass(frozen=True)
class Cells:
    """Which combinations of some keys were recorded; with one group of rows, which keys.

    Attributes:
        is_found: of all of them, the last group's the fastest: bool, flat.
        found: for each part that is needed the places of those, where there is one group.
        records: those that have any of them.
        grids: for each part what was recorded of all combinations, where there are several groups.
        several: those that were recorded several times.
        there: for each part that is needed, which of all combinations it has, as in `is_found`.
    """

    is_found: torch.Tensor
    found: dict[int, Found]
    records: list[Record]
    grids: dict[int, torch.Tensor] = field(default_factory=dict)
    several: Several = field(default_factory=Several)
    there: dict[int, torch.Tensor] = field(default_factory=dict)


class Joining:
    """Makes rows of records.

    Args:
        source: the recording.
        records: those of some name and tags.
        receiver: what is wanted of each row.
        replicas: what to do with rows that were recorded several times: see `ReplaySettings`.
        check: whether to hold what is read against its digest.
        step: the step from which rows should be, if it has them otherwise than others; None where
            that does not matter.

    Attributes:
        assumed: what `find` took for granted, "" where nothing was.
        guesses: what of it should be said aloud.
    """

    def __init__(
        self,
        source: Source,
        records: Records,
        receiver: Held,
        *,
        replicas: str,
        check: bool,
        step: int | None = None,
    ) -> None:
        self.source, self.records, self.receiver = source, records, receiver
        self.replicas, self.step = replicas, step
        self.assumed = self.guesses = ""
        self._gathered = Gathered(source, records, check=check)

    def notes(self, several: Several) -> list[str]:
        """Return what to know of rows, a clause each."""
        notes = [several.note(self.replicas)]
        if self._gathered.in_part:
            number = count(len(self._gathered.in_part), "record")
            notes.append(f"{number} read in part, without their digests")
        notes.append(self.assumed)
        return [note for note in notes if note]

    def find(self, keys: Sequence[torch.Tensor]) -> Cells:
        """Return which keys were recorded, for each group of rows; all of them distinct.

        Raises:
            LayoutError: the layouts contradict each other, or a part was not recorded.
            ReplicasDiffer: with several groups, combinations that were recorded several times and
                differ.
        """
        needed = self._needed([len(one) for one in keys])
        if len(keys) > 1:
            return self._grids(keys, needed)
        records = self.records
        found = {parts[0]: records.find(parts, keys[0]) for parts in needed}
        there = {part: one.times > 0 for part, one in found.items()}
        is_found = torch.stack([*there.values()]).all(0)
        found = {part: one.of(is_found) for part, one in found.items()}
        others = {*range(len(records.parts))}.difference(*needed)  # which are known, too
        more = [records.find((part,), keys[0]).of(is_found) for part in others]
        used = records.having([*found.values(), *more])
        return Cells(is_found, found, used, there=there)

    def check(self, cells: Cells) -> Several:
        """Hold rows that were recorded several times against the first of them.

        Raises:
            ReplicasDiffer: they are apart by more than rounding, and that is an error.
            DamagedRecording: a record cannot be read.
        """
        several = cells.several
        for found in cells.found.values():
            several = several.and_(self.check_part(found))
        return several

    def check_part(self, found: Found) -> Several:
        """As `check`, of one part's rows."""
        is_fine = self.replicas != "error"
        several = check_same(self.records, found, self._gathered, is_fine=is_fine)
        if self.step is None or not several.whole:
            return several
        elsewhere = taken_elsewhere(self.records, found, self._gathered, self.step)
        return several._replace(elsewhere=elsewhere)

    def rows(self, cells: Cells, which: slice = slice(None)) -> torch.Tensor:
        """Return what was recorded of the cells that were found: [cells, other dims], on the CPU.

        Args:
            cells: of `find`.
            which: some of them.

        Raises:
            LayoutError: records of several dtypes, or parts that cannot be put together.
            DamagedRecording: a record cannot be read.
        """
        if cells.grids:
            sizes = next(iter(cells.grids.values())).shape[: len(self.records.keys)]
            made = self._assembled(cells.grids, sizes)
            flat = made.reshape(math.prod(sizes), *made.shape[len(sizes) :])
            return flat[cells.is_found][which]
        tensors = {part: self.of_part(one.of(which)) for part, one in cells.found.items()}
        return self._assembled(tensors, [len(next(iter(tensors.values())))])

    def with_padding(self, rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return rows with the receiver's values, or its fill, where it pads its other dims.

        Args:
            rows: of the receiver's dtype, and on its device: [rows, other dims].
            own: what the receiver has there.

        Raises:
            LayoutError: the fill is no value of the dtype.
        """
        every = (self.receiver, *self.records.parts)
        if not len(rows) or not any(one.dims.sizes or one.dims.padded for one in every):
            return rows
        sizes = [len(rows), *[1] * (len(self.records.keys) - 1)]
        shape = (*sizes, *self.receiver.shape)
        found = self._plan(sizes, self.receiver)
        made = keep_padding(found, shape, rows.reshape(shape), own.reshape(shape))
        return made.reshape(rows.shape)

    def of_part(self, found: Found) -> torch.Tensor:
        """Return a part's rows: [rows, other dims]; of several the one that was asked for."""
        places = self.records.places[found.number]
        at = found.first if self.replicas != "last" else found.first + found.times - 1
        taken = self._gathered.rows(places.record[at], places.row[at])
        if self.replicas != "mean" or not bool((found.times > 1).any()):
            return taken
        if not (taken.dtype.is_floating_point or taken.dtype.is_complex):
            raise LayoutError(f"rows of {taken.dtype} have no mean", "take the first of them")
        wide = torch.complex128 if taken.dtype.is_complex else torch.float64
        total = taken.to(wide)
        for j in range(1, int(found.times.max())):
            which = (found.times > j).nonzero().flatten()
            at = found.first[which] + j
            total[which] += self._gathered.rows(places.record[at], places.row[at]).to(wide)
        counts = found.times.view(-1, *[1] * (total.dim() - 1))
        return (total / counts).to(taken.dtype)

    def _needed(self, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the parts that the receiver's block is made of, those that are the same together.

        Ranks that share a head hold the same of each row, and so do their parts.
        """
        if 0 in sizes:
            return [(0,)]
        sizes = [1] * len(sizes)  # how many rows there are says nothing of their parts
        found = self._plan(sizes, self.receiver)
        self.assumed = "; ".join(filter(None, [*self._alone(), found.guesses]))
        self.guesses, moves = found.guesses, found.moves
        if not moves:  # of a sum that another rank holds: zeros here just where that has it
            moves = self._plan(sizes, self.receiver.with_sums()).moves
        return sorted({ranks for move in moves for ranks in move.ranks}) or [(0,)]

    def _alone(self) -> list[str]:
        """Say which axes were taken to be that of all ranks, since nobody declared a mesh."""
        sides = ((self.records.parts[0], "the senders'"), (self.receiver, "the target's"))
        return [
            f"{held.alone[0]} was taken to be over all {held.alone[1]} of {whose} ranks: no mesh "
            "was declared"
            for held, whose in sides
            if held.alone[0]
        ]

    def _plan(self, sizes: Sequence[int], receiver: Held) -> Plan:
        parts = tuple(self.records.parts)
        try:
            return _planned(parts, receiver, tuple(sizes))
        except BlocksMissing as err:
            raise BlocksMissing(
                f"not all parts of these rows were recorded: {parts_text(parts)}", err.advice
            ) from None
        except LayoutError as err:
            raise of_parts(self.records, err) from None

    def _assembled(self, tensors: dict[int, torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
        """Return the parts as the receiver's: [*sizes, other dims]."""
        shape = (*sizes, *self.receiver.shape)
        if len(tensors) == 1 and self._is_plain():
            return next(iter(tensors.values()))
        if 0 in sizes:
            return next(iter(tensors.values())).new_empty(shape)
        blocks = [part.block(i, sizes) for i, part in enumerate(self.records.parts)]
        receiver = self.receiver.block(0, sizes)
        made = assemble(
            self._plan(sizes, self.receiver),
            blocks,
            receiver,
            lambda rank, share: tensors[rank if rank in tensors else next(iter(tensors))],
            lambda rank: "",
        )
        return made.reshape(shape)

    def _is_plain(self) -> bool:
        """Whether both sides hold the same of each row, in the same order."""
        one, other = self.records.parts[0], self.receiver
        if len(self.records.parts) > 1 or one.mesh or other.mesh:
            return False
        names = [[dim.names for dim in held.dims.dims] for held in (one, other)]
        plain = not (one.dims.sizes or other.dims.sizes or one.dims.padded or other.dims.padded)
        return plain and names[0] == names[1] and one.shape == other.shape

    def _grids(self, keys: Sequence[torch.Tensor], needed: Sequence[tuple[int, ...]]) -> Cells:
        records = self.records
        grids: dict[int, torch.Tensor] = {}
        used: list[Record] = []
        every: dict[int, Grid] = {}
        for parts in needed:
            grid = Grid(keys, records.keys, self._gathered, self.replicas, self.step)
            used += [one for one in records.having([records.find(parts, keys[0])]) if grid.add(one)]
            grids[parts[0]] = grid.made(records.first(parts[0]))
            every[parts[0]] = grid
        is_found = torch.stack([grid.filled for grid in every.values()]).all(0)
        several = Several()
        for grid in every.values():
            several = several.and_(grid.checked(is_found))
        there = {part: grid.filled.flatten() for part, grid in every.items()}
        return Cells(is_found.flatten(), {}, used, grids, several, there)


@lru_cache(maxsize=_MOST_PLANS)
def _planned(parts: tuple[Held, ...], receiver: Held, sizes: tuple[int, ...]) -> Plan:
    """Return what to copy of so many rows; from tap to tap that is mostly the same."""
    blocks = [part.block(i, sizes) for i, part in enumerate(parts)]
    return plan(blocks, world_of(parts), receiver.block(0, sizes), receiver.world_size)


def whole_of(records: Records) -> Held:
    """Return all of a row that the parts are parts of, in the order of their dims.

    Raises:
        LayoutError: they contradict each other, or do not say enough.
    """
    groups = len(records.keys)
    blocks = [part.block(i, [1] * groups) for i, part in enumerate(records.parts)]
    try:
        found = whole(blocks, world_of(records.parts))
    except LayoutError as err:
        raise of_parts(records, err) from None
    return Held(found.dims, (), found.shape[groups:])


def world_of(parts: Sequence[Held]) -> int:
    """Return how many ranks a job has of which each holds a part of its own."""
    return max(len(parts), *(part.world_size for part in parts))


def parts_text(parts: Sequence[Held]) -> str:
    """Say which parts of rows there are."""
    there = ", ".join(
        " ".join(f"{axis}={at}" for axis, (at, _) in part.mesh) or "one" for part in parts[:8]
    )
    sizes = " ".join(f"{axis} of {n}" for axis, (_, n) in parts[0].mesh)
    return f"of {parts[0].dims.text!r:.200} over {sizes}, there is {there}"


def lacking_text(records: Records, there: Mapping[int, torch.Tensor]) -> str:
    """Say of rows that some parts have which others lack them, "" where all have the same.

    Args:
        records: the records.
        there: for each part that is needed, which rows it has: bool, of one length.
    """
    masks = torch.stack([*there.values()])
    partly = masks.any(0) & ~masks.all(0)
    if not bool(partly.any()):
        return ""
    said = []
    for part, mask in zip(there, masks, strict=True):
        if lost := int((partly & ~mask).sum()):
            where = " ".join(f"{axis}={at}" for axis, (at, _) in records.parts[part].mesh)
            ranks = sorted({one.row["rank"] for one in records.every if one.part == part})
            some = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
            said.append(f"{where or 'one'} (rank {some}) lacks {lost}")
    return f"{count(int(partly.sum()), 'row')} recorded in some parts only: {' and '.join(said)}"


def of_parts(records: Records, err: LayoutError) -> LayoutError:
    """Return an error of the layouts' said of parts, whose numbers are no ranks'."""
    firsts = [records.first(part).row for part in range(len(records.parts))]
    where = [
        f"part {i} is rank {row['rank']}'s at step {row['step']}" for i, row in enumerate(firsts)
    ]
    found = err.of("", {"rank": "part"})
    if "part " in found.fact or "parts " in found.fact:
        found = type(found)(f"{found.fact} ({', '.join(where[:8])})", found.advice)
    return found
