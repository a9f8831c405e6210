"""Rows of records, the parts of their other dims put together as one side wants them.

1. `Joining.find` says which keys were recorded, in every part that is needed for them.
2. `Joining.rows` brings them, and lets a `plan` put the parts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from recorder.bits import as_bits
from recorder.errors import BlocksMissing, LayoutError, ReplicasDiffer
from recorder.layouts.assemble import assemble
from recorder.layouts.plan import Plan, plan, whole
from recorder.sizes import count

from .gather import Gathered, rest_of
from .places import Found, real_rows
from .records import Held, Record, Records, Source
from .same import Several, apart, check_same, place_text


@dataclass(frozen=True)
class Cells:
    """Which combinations of some keys were recorded; with one group of rows, which keys.

    Attributes:
        is_found: of all of them, the last group's the fastest: bool, flat.
        found: for each part that is needed the places of those, where there is one group.
        records: those that have any of them.
        grids: for each part what was recorded of all combinations, where there are several groups.
        several: those that were recorded several times.
    """

    is_found: torch.Tensor
    found: dict[int, Found]
    records: list[Record]
    grids: dict[int, torch.Tensor] = field(default_factory=dict)
    several: Several = field(default_factory=Several)


class Joining:
    """Makes rows of records.

    Args:
        source: the recording.
        records: those of some name and tags.
        receiver: what is wanted of each row.
        replicas: what to do with rows that were recorded several times: see `ReplaySettings`.
        check: whether to hold what is read against its digest.
    """

    def __init__(
        self, source: Source, records: Records, receiver: Held, *, replicas: str, check: bool
    ) -> None:
        self.source, self.records, self.receiver = source, records, receiver
        self.replicas = replicas
        self._gathered = Gathered(source, check=check)

    def notes(self, several: Several) -> list[str]:
        """Return what to know of rows, a clause each."""
        notes = [several.note(self.replicas)]
        if self._gathered.in_part:
            number = count(len(self._gathered.in_part), "record")
            notes.append(f"{number} read in part, without their digests")
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
        found = {part: records.places[part].find(keys[0]) for part in needed}
        is_found = torch.ones(len(keys[0]), dtype=torch.bool, device="cpu")
        for one in found.values():
            is_found &= one.times > 0
        used: set[int] = set()
        for part in range(len(records.parts)):
            places = found[part] if part in found else records.places[part].find(keys[0])
            used |= {*records_at(records, part, places.of(is_found & (places.times > 0))).tolist()}
        found = {part: one.of(is_found) for part, one in found.items()}
        return Cells(is_found, found, [records.every[i] for i in sorted(used)])

    def check(self, cells: Cells) -> Several:
        """Hold rows that were recorded several times against the first of them.

        Raises:
            ReplicasDiffer: they are apart by more than rounding, and that is an error.
            DamagedRecording: a record cannot be read.
        """
        several = cells.several
        for part, found in cells.found.items():
            several = several.and_(self.check_part(part, found))
        return several

    def check_part(self, part: int, found: Found) -> Several:
        """As `check`, of one part's rows."""
        if self.replicas == "error":
            return check_same(self.records, part, found, self._gathered)
        return Several(int((found.times > 1).sum()))

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
            flat = made.reshape(-1, *made.shape[len(sizes) :])
            return flat[cells.is_found][which]
        tensors = {
            part: self.of_part(part, Found(one.first[which], one.times[which]))
            for part, one in cells.found.items()
        }
        return self._assembled(tensors, [len(next(iter(tensors.values())))])

    def of_part(self, part: int, found: Found) -> torch.Tensor:
        """Return a part's rows: [rows, other dims]; of several the one that was asked for."""
        places, every = self.records.places[part], self.records.every
        at = found.first if self.replicas != "last" else found.first + found.times - 1
        taken = self._gathered.rows(every, places.record[at], places.row[at])
        if self.replicas != "mean" or not bool((found.times > 1).any()):
            return taken
        if not (taken.dtype.is_floating_point or taken.dtype.is_complex):
            raise LayoutError(f"rows of {taken.dtype} have no mean", "take the first of them")
        wide = torch.complex128 if taken.dtype.is_complex else torch.float64
        total = taken.to(wide)
        for j in range(1, int(found.times.max())):
            which = (found.times > j).nonzero().flatten()
            at = found.first[which] + j
            total[which] += self._gathered.rows(every, places.record[at], places.row[at]).to(wide)
        counts = found.times.view(-1, *[1] * (total.dim() - 1))
        return (total / counts).to(taken.dtype)

    def _needed(self, sizes: Sequence[int]) -> list[int]:
        """Return the parts that the receiver's block is made of."""
        if 0 in sizes:
            return [0]
        found = self._plan(sizes)
        needed = sorted({rank for move in found.moves for ranks in move.ranks for rank in ranks})
        return needed or [0]

    def _plan(self, sizes: Sequence[int]) -> Plan:
        parts, receiver = self.records.parts, self.receiver
        blocks = [part.block(i, sizes) for i, part in enumerate(parts)]
        try:
            return plan(blocks, world_of(parts), receiver.block(0, sizes), receiver.world_size)
        except BlocksMissing as err:
            raise BlocksMissing(
                f"not all parts of these rows were recorded: {parts_text(parts)}", err.advice
            ) from None

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
            self._plan(sizes),
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

    def _grids(self, keys: Sequence[torch.Tensor], needed: Sequence[int]) -> Cells:
        records, sizes = self.records, [len(one) for one in keys]
        grids: dict[int, torch.Tensor] = {}
        is_found = torch.ones(sizes, dtype=torch.bool, device="cpu")
        used: list[Record] = []
        several = Several()
        for part in needed:
            found = records.places[part].find(keys[0])
            numbers = records_at(records, part, found.of(found.times > 0)).tolist()
            there = [records.every[i] for i in sorted(numbers)]
            used += there
            grids[part], filled, own = self._grid(part, there, keys)
            is_found &= filled
            several = several.and_(own)
        return Cells(is_found.flatten(), {}, used, grids, several)

    def _grid(
        self, part: int, there: Sequence[Record], keys: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, Several]:
        """Return what records of one part have of all combinations, and which these are."""
        sizes = [len(one) for one in keys]
        first = next(one for one in self.records.every if one.part == part)
        made: torch.Tensor | None = None
        filled = torch.zeros(sizes, dtype=torch.bool, device="cpu")
        again, worst = torch.zeros(sizes, dtype=torch.bool, device="cpu"), 0.0
        for record in reversed(there) if self.replicas == "last" else there:
            into, out_of = [], []
            for wanted, make, group in zip(keys, self.records.keys, record.groups, strict=True):
                rows = real_rows(group.ids)
                own = make.of(group.ids[rows])
                at = torch.searchsorted(wanted, own).clamp_(max=max(len(wanted) - 1, 0))
                has = wanted[at] == own if len(wanted) else own < own
                into.append(at[has])
                out_of.append(rows[has])
            if not all(map(len, into)):
                continue
            tensor = self._gathered.whole(record)
            if made is None:
                made = torch.zeros((*sizes, *rest_of(first)), dtype=tensor.dtype, device="cpu")
            if made.dtype != tensor.dtype:
                raise LayoutError(f"there are records of {made.dtype} and of {tensor.dtype}")
            source, target = _mesh(out_of), _mesh(into)
            values, before = as_bits(tensor)[source], filled[target]
            kept = as_bits(made)[target]
            if bool(before.any()):
                again[target] |= before
                off = apart(kept[before].view(made.dtype), values[before].view(made.dtype))
                if self.replicas == "error" and bool(off.beyond.any()):
                    raise ReplicasDiffer(
                        f"a combination of rows was recorded at {place_text(record, 0)} and "
                        f"before, and there it is off by {float(off.whole.max()):.3g} of its size, "
                        "which is no rounding",
                        "match on what differs, too, as with --match-on name,step",
                    )
                worst = max(worst, float(off.whole.max()))
            kept[~before] = values[~before]
            as_bits(made)[target] = kept
            filled[target] = True
        if made is None:
            made = self._gathered.whole(first).new_zeros((*sizes, *rest_of(first)))
        return made, filled, Several(int(again.sum()), worst)


def whole_of(records: Records) -> Held:
    """Return all of a row that the parts are parts of, in the order of their dims.

    Raises:
        LayoutError: they contradict each other, or do not say enough.
    """
    groups = len(records.keys)
    blocks = [part.block(i, [1] * groups) for i, part in enumerate(records.parts)]
    found = whole(blocks, world_of(records.parts))
    return Held(found.dims, (), found.shape[groups:])


def world_of(parts: Sequence[Held]) -> int:
    """Return how many ranks a job has of which each holds a part of its own."""
    return max(len(parts), *(part.world_size for part in parts))


def parts_text(parts: Sequence[Held]) -> str:
    """Say which parts of rows there are."""
    axes = [axis for axis, _ in parts[0].mesh]
    there = ", ".join(
        " ".join(f"{axis}={dict(part.mesh)[axis][0]}" for axis in axes) or "one"
        for part in parts[:8]
    )
    sizes = " ".join(f"{axis} of {n}" for axis, (_, n) in parts[0].mesh)
    return f"of {parts[0].dims.text!r:.200} over {sizes}, there is {there}"


def records_at(records: Records, part: int, found: Found) -> torch.Tensor:
    """Return the numbers of all records that have some keys."""
    places = records.places[part]
    starts = found.first.repeat_interleave(found.times)
    within = torch.arange(len(starts), device="cpu")
    within -= (found.times.cumsum(0) - found.times).repeat_interleave(found.times)
    found_at: torch.Tensor = places.record[starts + within].unique()
    return found_at


def _mesh(places: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return indices that combine as a grid."""
    n = len(places)
    return tuple(
        one.to(torch.int64).view([-1 if i == g else 1 for i in range(n)])
        for g, one in enumerate(places)
    )
