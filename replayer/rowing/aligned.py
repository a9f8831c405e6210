"""The rows of one receiver's tensor, from wherever the baseline computed them.

1. `Aligned.of` puts the target's rows in front, and makes their ids keys.
2. `Aligned.make` finds the places of each, in every part of the other dims that the receiver needs,
   gathers them, and lets a `plan` put the parts together.
3. What is not found, and padding, keeps the target's values: `Aligned.put` writes the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from recorder.bits import as_bits
from recorder.errors import (
    BlocksMissing,
    LayoutError,
    MissingRecord,
    TransformError,
)
from recorder.format.payload import parse_dtype
from recorder.format.schema import ManifestRow
from recorder.layouts.assemble import assemble
from recorder.layouts.dims import Dims
from recorder.layouts.plan import Plan, plan
from recorder.layouts.rowed import Rowed, moved, moved_back
from recorder.mesh import FrozenMesh
from recorder.ranks import Rank
from recorder.sizes import count

from ..log import SEQ_BITS
from .gather import Gathered, rest_of
from .grid import Grid
from .places import Found, real_rows
from .records import Record, Records, Source, held_by, seqs_of
from .same import Several, check_same


@dataclass(frozen=True)
class Made:
    """What replaces the rows of a tensor that were found.

    Attributes:
        rows: [rows, other dims of the receiver]: what was recorded, on the CPU.
        cells: which of the tensor's rows these are, padding counted: [rows].
        missing: how many rows were not found.
        padding: how many are padding.
        senders: for each sender rank the `seq` of the first record that was used.
        records: those that have one of the rows, or none at all, as in the log's `rows_from`.
        note: what to know of it.
    """

    rows: torch.Tensor = field(repr=False)
    cells: torch.Tensor = field(repr=False)
    missing: int
    padding: int
    senders: list[int | None]
    records: list[int]
    note: str


class Aligned:
    """One receiver's tensor, to be made of rows.

    Args:
        source: the recording.
        records: those of its name and tags.
        groups: its own rows, of which `records.pairs` says which belong to the records'.
        dims: its layout.
        target: the tensor.
        mesh: where its rank stands.
        rank: its rank.
        replicas: what to do with rows that were recorded several times: see `ReplaySettings`.
        check: whether to hold what is read against its digest.
    """

    def __init__(
        self,
        source: Source,
        records: Records,
        groups: Sequence[Rowed],
        dims: Dims,
        target: torch.Tensor,
        mesh: FrozenMesh | None,
        rank: Rank,
        *,
        replicas: str,
        check: bool,
    ) -> None:
        self._source, self._records = source, records
        self._groups = [groups[j] for j in records.pairs]
        self._target, self._replicas = target, replicas
        self._part = held_by(dims, self._groups, target.shape, rank.rank, mesh, rank.world_size)
        self._gathered = Gathered(source, check=check)

    @property
    def own(self) -> torch.Tensor:
        """The target's rows, padding too: [rows, other dims]."""
        return self.front(self._target.detach())

    def front(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the target's shape by rows, as `own` is."""
        made = moved(tensor, [group.at for group in self._groups])
        n = math.prod(made.shape[: len(self._groups)])
        return made.reshape(n, *made.shape[len(self._groups) :])

    @property
    def first(self) -> ManifestRow:
        """The manifest row of the first record that may have its rows."""
        return self._records.every[0].row

    def put(self, rows: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Return the target with other rows in some places.

        Args:
            rows: of the target's dtype, and on its device.
            cells: which.
        """
        made = self.own.clone()
        as_bits(made).index_copy_(0, cells.to(made.device), as_bits(rows))
        sizes = [len(group.ids) for group in self._groups]
        at = [group.at for group in self._groups]
        return moved_back(made.reshape(*sizes, *made.shape[1:]), self._target.shape, at)

    def make(self) -> Made:
        """Return the rows that were recorded.

        Raises:
            MissingRecord: none of them was.
            LayoutError: the layouts contradict each other, or a part was not recorded.
            ReplicasDiffer: a row was recorded several times, and differently.
            DamagedRecording: a record cannot be read.
        """
        real = [real_rows(group.ids) for group in self._groups]
        keys = [
            make.of(group.ids[at])
            for make, group, at in zip(self._records.keys, self._groups, real, strict=True)
        ]
        wanted = math.prod(len(at) for at in real)
        padding = math.prod(len(group.ids) for group in self._groups) - wanted
        unique = [one.unique(return_inverse=True) for one in keys]
        if not wanted:
            rest = self.own.shape[1:]
            dtype = self._target.dtype
            nothing = torch.empty((0, *rest), dtype=dtype, device="cpu")
            cells = torch.empty(0, dtype=torch.int64, device="cpu")
            senders: list[int | None] = [None] * self._source.world_size
            note = "all of its rows are padding" if padding else "it has no rows"
            return Made(nothing, cells, 0, padding, senders, self._numbers(()), note)
        sizes = [len(values) for values, _ in unique]
        needed = self._needed(sizes)
        if len(self._groups) == 1:
            made, is_found, used, several = self._of_one(unique[0][0], needed)
        else:
            made, is_found, used, several = self._of_grid([u for u, _ in unique], needed)
        # Where each of the target's rows stands among the unique ones, and among all of its own.
        at = torch.zeros(1, dtype=torch.int64, device="cpu")
        cell = torch.zeros(1, dtype=torch.int64, device="cpu")
        for (values, inverse), own, group in zip(unique, real, self._groups, strict=True):
            at = (at[:, None] * len(values) + inverse).flatten()
            cell = (cell[:, None] * len(group.ids) + own).flatten()
        there = is_found[at]
        if not bool(there.any()):
            raise MissingRecord(self._why_none(wanted, [values for values, _ in unique]))
        number = is_found.to(torch.int64).cumsum(0) - 1
        rows = made.index_select(0, number[at[there]])
        return Made(
            rows,
            cell[there],
            int((~there).sum()),
            padding,
            seqs_of(self._latest(used), self._source.world_size),
            self._numbers(used),
            self._note(several),
        )

    def received(self) -> tuple[Made, list[tuple[ManifestRow, torch.Tensor]]]:
        """Return what was found, and of each part the rows as they stand in the target, for a
        transform: in its order and its dims of rows, zeros where none was found.

        Each comes with the manifest row of the first record of its part.

        Raises:
            TransformError: rows along several dims that have ids of their own.
            MissingRecord: as `make`, as all others.
        """
        if len(self._groups) > 1:
            raise TransformError(
                "rows along several dims, with ids of their own, cannot be handed to a transform; "
                "declare dims on both sides and name none"
            )
        group, records = self._groups[0], self._records
        own = real_rows(group.ids)
        keys = records.keys[0].of(group.ids[own])
        every = range(len(records.parts))
        found = {part: records.places[part].find(keys) for part in every}
        there = torch.stack([one.times > 0 for one in found.values()]).all(0)
        if not bool(there.any()) and len(own):
            raise MissingRecord(self._why_none(len(own), [keys]))
        several, result = Several(), []
        used: set[int] = set()
        for part, one in found.items():
            one = _of(one, there)
            several = several.and_(self._several(part, one))
            used |= {*_records_at(records, part, one).tolist()}
            first = next(record for record in records.every if record.part == part)
            result.append((first.row, self._as_received(first, part, one, own[there])))
        chosen = [records.every[i] for i in sorted(used)]
        made = Made(
            torch.empty(0),
            own[there],
            len(own) - int(there.sum()),
            len(group.ids) - len(own),
            seqs_of(self._latest(chosen), self._source.world_size),
            self._numbers(chosen),
            self._note(several),
        )
        return made, result

    def _as_received(
        self, first: Record, part: int, found: Found, cells: torch.Tensor
    ) -> torch.Tensor:
        """Return a part's rows with the target's dims of rows in place of the records'."""
        group = self._groups[0]
        dtype = parse_dtype(first.row["dtype"], "the manifest")
        sizes = [self._target.shape[i] for i in group.at]
        made = torch.zeros((math.prod(sizes), *rest_of(first)), dtype=dtype, device="cpu")
        if len(cells):
            as_bits(made).index_copy_(0, cells, as_bits(self._taken(part, found)))
        made = made.reshape(*sizes, *made.shape[1:])
        at = first.groups[0].at
        before = sum(i not in at for i in range(min(at)))
        rows, rest = range(len(sizes)), range(len(sizes), made.dim())
        return made.permute([*rest[:before], *rows, *rest[before:]])

    def _latest(self, used: Iterable[Record]) -> list[Record]:
        """Return those of the latest attempt: another's `seq` is that of something else."""
        latest = self._records.latest
        return [one for one in used if latest.get(one.row["rank"]) == one.row["attempt"]]

    def _numbers(self, used: Iterable[Record]) -> list[int]:
        """Return records as in the log; those without rows too, which no tap has more use for."""
        every = self._latest((*used, *self._records.bare))
        return sorted({one.row["rank"] << SEQ_BITS | one.row["seq"] for one in every})

    def _note(self, several: Several) -> str:
        notes = [several.note(self._replicas)]
        if self._gathered.in_part:
            number = count(len(self._gathered.in_part), "record")
            notes.append(f"{number} read in part, without their digests")
        return "; ".join(filter(None, notes))

    def _why_none(self, wanted: int, keys: Sequence[torch.Tensor]) -> str:
        every, parts = self._records.every, self._records.parts
        places = self._records.places[: len(parts)]
        there = sum(bool((one.find(keys[0]).times > 0).any()) for one in places)
        if there and len(keys) == 1 and len(parts) > 1:
            return (
                f"none of its {count(wanted, 'row')} was recorded in all parts that it is made of: "
                f"{self._parts_text()}, and only {there} of these have any; record all ranks"
            )
        known = sum(len(one.keys) for one in places)
        return (
            f"no row in common: none of its {count(wanted, 'row')} is among the {known} that "
            f"{count(len(every), 'record')} of this name and tags have; are these other tokens, or "
            "ids with another salt?"
        )

    def _needed(self, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the parts that the receiver's block is made of, those that are the same together.

        Ranks that share a head hold the same of each row, and so do their parts.
        """
        found = self._plan(sizes)
        return sorted({ranks for move in found.moves for ranks in move.ranks}) or [(0,)]

    def _plan(self, sizes: Sequence[int]) -> Plan:
        parts = self._records.parts
        blocks = [part.block(i, sizes) for i, part in enumerate(parts)]
        world = max(len(parts), *(part.world_size for part in parts))
        try:
            return plan(blocks, world, self._part.block(0, sizes), self._part.world_size)
        except BlocksMissing as err:
            raise BlocksMissing(
                f"not all parts of these rows were recorded: {self._parts_text()}",
                err.advice,
            ) from None
        except LayoutError as err:
            raise self._of_parts(err) from None

    def _of_parts(self, err: LayoutError) -> LayoutError:
        """Return an error of the layouts' said of parts, whose numbers are no ranks'."""
        parts = range(len(self._records.parts))
        firsts = [next(one for one in self._records.every if one.part == i) for i in parts]
        where = [
            f"part {i} is rank {one.row['rank']}'s at step {one.row['step']}"
            for i, one in enumerate(firsts)
        ]
        found = err.of("", {"rank": "part"})
        if "part " in found.fact or "parts " in found.fact:
            found = type(found)(f"{found.fact} ({', '.join(where[:8])})", found.advice)
        return found

    def _parts_text(self) -> str:
        parts = self._records.parts
        there = ", ".join(
            " ".join(f"{axis}={at}" for axis, (at, _) in part.mesh) or "one" for part in parts[:8]
        )
        sizes = " ".join(f"{axis} of {n}" for axis, (_, n) in parts[0].mesh)
        return f"of {parts[0].dims.text!r:.200} over {sizes}, there is {there}"

    def _assembled(self, tensors: dict[int, torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
        """Return the parts as the receiver's: [*sizes, other dims]."""
        shape = (*sizes, *self._part.shape)
        if len(tensors) == 1 and self._is_plain():
            return next(iter(tensors.values()))
        parts = self._records.parts
        blocks = [part.block(i, sizes) for i, part in enumerate(parts)]
        receiver = self._part.block(0, sizes)
        made = assemble(
            self._plan(sizes), blocks, receiver, lambda rank, share: tensors[rank], lambda r: ""
        )
        return made.reshape(shape)

    def _is_plain(self) -> bool:
        """Whether both sides hold the same of each row, in the same order."""
        one, other = self._records.parts[0], self._part
        if len(self._records.parts) > 1 or one.mesh or other.mesh:
            return False
        names = [[dim.names for dim in part.dims.dims] for part in (one, other)]
        plain = not (one.dims.sizes or other.dims.sizes or one.dims.padded or other.dims.padded)
        return plain and names[0] == names[1] and one.shape == other.shape

    def _of_one(
        self, keys: torch.Tensor, needed: Sequence[tuple[int, ...]]
    ) -> tuple[torch.Tensor, torch.Tensor, list[Record], Several]:
        """Return rows that were found, which they are of some keys, their records."""
        records = self._records
        found = {}
        for parts in needed:
            part = records.together(parts)
            found[parts[0]] = part, records.places[part].find(keys)
        is_found = torch.ones(len(keys), dtype=torch.bool, device="cpu")
        for _, one in found.values():
            is_found &= one.times > 0
        used: set[int] = set()
        for part, one in found.values():
            used |= {*_records_at(records, part, _of(one, is_found)).tolist()}
        others = {*range(len(records.parts))} - {part for parts in needed for part in parts}
        for part in others:  # they are not asked for, but known
            other = records.places[part].find(keys)
            there = _of(other, is_found & (other.times > 0))
            used |= {*_records_at(records, part, there).tolist()}
        several = Several()
        tensors: dict[int, torch.Tensor] = {}
        if bool(is_found.any()):
            for first, (part, one) in found.items():
                one = _of(one, is_found)
                several = several.and_(self._several(part, one))
                tensors[first] = self._taken(part, one)
        chosen = [records.every[i] for i in sorted(used)]
        if not tensors:
            empty = torch.empty((0, *self._part.shape), dtype=self._target.dtype, device="cpu")
            return empty, is_found, chosen, several
        made = self._assembled(tensors, [int(is_found.sum())])
        return made, is_found, chosen, several

    def _several(self, part: int, found: Found) -> Several:
        if self._replicas == "error":
            return check_same(self._records, part, found, self._gathered)
        return Several(int((found.times > 1).sum()))

    def _taken(self, part: int, found: Found) -> torch.Tensor:
        """Return the rows at places, [rows, other dims]; of several the one that was asked for."""
        places, every = self._records.places[part], self._records.every
        at = found.first if self._replicas != "last" else found.first + found.times - 1
        taken = self._gathered.rows(every, places.record[at], places.row[at])
        if self._replicas != "mean" or not bool((found.times > 1).any()):
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

    def _of_grid(
        self, keys: Sequence[torch.Tensor], needed: Sequence[tuple[int, ...]]
    ) -> tuple[torch.Tensor, torch.Tensor, list[Record], Several]:
        """Return rows along several groups, each of which is a combination, as `_of_one` does."""
        records, sizes = self._records, [len(one) for one in keys]
        tensors: dict[int, torch.Tensor] = {}
        is_found = torch.ones(sizes, dtype=torch.bool, device="cpu")
        used: list[Record] = []
        several = Several()
        for parts in needed:
            part = records.together(parts)
            found = records.places[part].find(keys[0])
            numbers = _records_at(records, part, _of(found, found.times > 0)).tolist()
            grid = Grid(keys, records.keys, self._gathered, self._replicas)
            used += [one for one in (records.every[i] for i in sorted(numbers)) if grid.add(one)]
            first = next(one for one in records.every if one.part == parts[0])
            tensors[parts[0]] = grid.made(first)
            is_found &= grid.filled
            several = several.and_(grid.several)
        made = self._assembled(tensors, sizes)
        flat = made.reshape(math.prod(sizes), *made.shape[len(sizes) :])
        is_found = is_found.flatten()
        return flat[is_found], is_found, used, several


def _of(found: Found, which: torch.Tensor) -> Found:
    return Found(found.first[which], found.times[which])


def _records_at(records: Records, part: int, found: Found) -> torch.Tensor:
    """Return the numbers of all records that have some keys."""
    places = records.places[part]
    if not len(found.times):
        return torch.empty(0, dtype=torch.int64, device="cpu")
    starts = found.first.repeat_interleave(found.times)
    within = torch.arange(len(starts), device="cpu")
    ends = found.times.cumsum(0) - found.times
    within -= ends.repeat_interleave(found.times)
    found_at: torch.Tensor = places.record[starts + within].unique()
    return found_at
