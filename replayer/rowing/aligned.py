"""The rows of one receiver's tensor, from wherever the baseline computed them.

1. `Aligned.make` makes keys of the target's ids, and lets `Joining` bring what was recorded.
2. What is not found, and padding, keeps the target's values: `Aligned.put` writes the others.
3. For a transform, `Aligned.received` brings the rows of each part as they stand in the target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field

import torch

from recorder.bits import as_bits
from recorder.errors import DamagedRecording, LayoutError, MissingRecord, TransformError
from recorder.format.payload import parse_dtype
from recorder.format.schema import ManifestRow
from recorder.layouts.dims import Dims
from recorder.layouts.rowed import Rowed, moved, moved_back
from recorder.mesh import FrozenMesh
from recorder.ranks import Rank
from recorder.sizes import count

from ..log import AS_THEY_STAND, LEFT_OUT, SEQ_BITS
from .held import Held, Record, Source, held_by, rest_of
from .joining import Joining, lacking_text, parts_text
from .places import Found, real_rows
from .records import Records
from .same import Several

_SAME_ROWS = ("tp", "etp")
"""Axes along which all ranks have the same rows."""


@dataclass(frozen=True)
class Made:
    """What replaces the rows of a tensor that were found.

    Attributes:
        rows: [rows, other dims of the receiver]: what was recorded, on the CPU.
        cells: which of the tensor's rows these are, padding counted: [rows].
        missing: how many rows were not found.
        senders: for each sender rank the `seq` of the first record that was used.
        records: those that have one of the rows, or none at all, as in the log's `rows_from`.
        note: what to know of it.
        elsewhere: as of `Several`.
    """

    rows: torch.Tensor = field(repr=False)
    cells: torch.Tensor = field(repr=False)
    missing: int
    senders: list[int | None]
    records: list[int]
    note: str
    elsewhere: int = 0


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
        step: as of `Joining`.

    Attributes:
        groups: those of its rows that are matched.
        cells: which of its rows were found by the latest `make`.
        left_out: that ids of records could not be read, "" where all could.
        one_sided: along which dims one side alone says which row is which, "" where along none.
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
        step: int | None = None,
    ) -> None:
        self._source, self._replicas, self._check = source, replicas, check
        self._records, self._target, self._world = records, target, source.world_size
        self.cells = torch.empty(0, dtype=torch.int64, device="cpu")
        self.groups = [groups[j] for j in records.pairs]
        alone = [one.label for j, one in enumerate(groups) if j not in records.pairs]
        number = count(len(records.damaged), "record")
        self.left_out = f"{number} {LEFT_OUT}" if records.damaged else ""
        self.one_sided = _said_alone(alone, records.alone)
        own = held_by(dims, self.groups, target.shape, rank.rank, mesh, rank.world_size)
        _check_sums(own, records)
        self._joining = Joining(source, records, own, replicas=replicas, check=check, step=step)

    @property
    def own(self) -> torch.Tensor:
        """The target's rows, padding too: [rows, other dims]."""
        return self.front(self._target.detach())

    @property
    def first(self) -> ManifestRow:
        """The manifest row of the first record that may have its rows."""
        return self._records.every[0].row

    def front(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the target's shape by rows, as `own` is."""
        made = moved(tensor, [group.at for group in self.groups])
        return made.reshape(math.prod(made.shape[: len(self.groups)]), *self._rest)

    @property
    def _rest(self) -> tuple[int, ...]:
        return self._joining.receiver.shape

    @property
    def damaged(self) -> DamagedRecording | None:
        """The first reason why ids of a record could not be read."""
        for err in self._records.damaged:
            return DamagedRecording(err.path, err.fact)  # one that was raised holds frames
        return None

    @property
    def guesses(self) -> str:
        """What `make` took for granted that should be said aloud."""
        return self._joining.guesses

    def with_padding(self, rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """See `Joining`."""
        return self._joining.with_padding(rows, own)

    def put(self, rows: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Return the target with other rows in some places.

        Args:
            rows: of the target's dtype, and on its device.
            cells: which.
        """
        made = self.own.clone()
        as_bits(made).index_copy_(0, cells.to(made.device), as_bits(rows))
        sizes = [len(group.ids) for group in self.groups]
        at = [group.at for group in self.groups]
        return moved_back(made.reshape(*sizes, *made.shape[1:]), self._target.shape, at)

    def mask(self, cells: torch.Tensor) -> torch.Tensor:
        """Return which elements of the target some of its rows are: bool, of its shape."""
        sizes = [len(group.ids) for group in self.groups]
        found = torch.zeros(math.prod(sizes), dtype=torch.bool, device=self._target.device)
        found[cells.to(found.device)] = True
        found = found.view(*sizes, *[1] * len(self._rest)).expand(*sizes, *self._rest)
        return moved_back(found, self._target.shape, [group.at for group in self.groups])

    def make(self) -> Made:
        """Return the rows that were recorded.

        Raises:
            MissingRecord: none of them was.
            LayoutError: the layouts contradict each other, or a part was not recorded.
            ReplicasDiffer: a row was recorded several times, and differently.
            DamagedRecording: a record cannot be read.
        """
        real = [real_rows(group.ids) for group in self.groups]
        wanted = math.prod(map(len, real))
        if not wanted:
            rows = torch.empty((0, *self._rest), dtype=self._target.dtype, device="cpu")
            nothing = torch.empty(0, dtype=torch.int64, device="cpu")
            is_empty = not all(len(group.ids) for group in self.groups)
            note = "it has no rows" if is_empty else "all of its rows are padding"
            return Made(rows, nothing, 0, [None] * self._world, self._records.bare, note)
        unique = [
            _distinct(make.of(group.ids[at]), is_sorted=len(self.groups) > 1)
            for make, group, at in zip(self._records.keys, self.groups, real, strict=True)
        ]
        cells = self._joining.find([values for values, _ in unique])
        # Where each of the target's rows stands among the distinct ones, and among all of its own.
        at = torch.zeros(1, dtype=torch.int64, device="cpu")
        cell = torch.zeros(1, dtype=torch.int64, device="cpu")
        for (values, inverse), own, group in zip(unique, real, self.groups, strict=True):
            at = (at[:, None] * len(values) + inverse).flatten()
            cell = (cell[:, None] * len(group.ids) + own).flatten()
        there = cells.is_found[at]
        of_parts = {part: mask[at] for part, mask in cells.there.items()}
        if not bool(there.any()):
            if (err := self.damaged) is not None:  # and it may have had them
                raise err
            why = self._why_none(wanted, [values for values, _ in unique], of_parts)
            raise MissingRecord(why, rows=wanted)
        several = self._joining.check(cells)
        rows = self._joining.rows(cells)
        number = (cells.is_found.to(torch.int64).cumsum(0) - 1)[at[there]]
        if len(number) != len(rows) or not torch.equal(number, torch.arange(len(rows))):
            rows = rows.index_select(0, number)
        return self._made(rows, cell[there], wanted, cells.records, several, of_parts)

    def of_others(self, records: Records) -> Made:
        """Return what other records, of other tags, have of the same rows; as `make`."""
        if records.pairs != [*range(len(self.groups))]:
            raise LayoutError("they have rows along other dims")
        other = copy(self)
        other._records = records
        other._joining = Joining(
            self._source,
            records,
            self._joining.receiver,
            replicas=self._replicas,
            check=self._check,
        )
        return other.make()

    def received(self) -> tuple[Made, list[tuple[ManifestRow, torch.Tensor]]]:
        """Return what was found, and of each part the rows as they stand in the target, for a
        transform: in its order and its dims of rows, zeros where none was found.

        Each comes with the manifest row of the first record of its part.

        Raises:
            TransformError: rows along several dims that have ids of their own.
            MissingRecord: as `make`, as all others.
        """
        if len(self.groups) > 1:
            raise TransformError(
                "rows along several dims, with ids of their own, cannot be handed to a transform; "
                "declare dims on both sides and name none"
            )
        group, records = self.groups[0], self._records
        own = real_rows(group.ids)
        keys = records.keys[0].of(group.ids[own])
        every = [records.find((part,), keys) for part in range(len(records.parts))]
        of_parts = {part: one.times > 0 for part, one in enumerate(every)}
        there = torch.stack([*of_parts.values()]).all(0)
        if len(own) and not bool(there.any()):
            if (err := self.damaged) is not None:
                raise err
            raise MissingRecord(self._why_none(len(own), [keys], of_parts), rows=len(own))
        every = [one.of(there) for one in every]
        several, received = Several(), []
        for part, one in enumerate(every):
            several = several.and_(self._joining.check_part(one))
            first = records.first(part)
            received.append((first.row, self._as_received(first, one, own[there])))
        nothing, used = torch.empty((0, *self._rest), device="cpu"), records.having(every)
        return self._made(nothing, own[there], len(own), used, several, of_parts), received

    def _made(
        self,
        rows: torch.Tensor,
        cells: torch.Tensor,
        wanted: int,
        used: Sequence[Record],
        several: Several,
        of_parts: Mapping[int, torch.Tensor],
    ) -> Made:
        self.cells = cells
        logged = [one.logged for one in used if one.logged is not None]
        senders: list[int | None] = [None] * self._world
        for number in reversed(logged):
            senders[number >> SEQ_BITS] = number & (1 << SEQ_BITS) - 1
        notes = [*self._joining.notes(several), lacking_text(self._records, of_parts)]
        return Made(
            rows,
            cells,
            wanted - len(cells),
            senders,
            sorted({*logged, *self._records.bare}),
            "; ".join(filter(None, notes)),
            several.elsewhere,
        )

    def _as_received(self, first: Record, found: Found, cells: torch.Tensor) -> torch.Tensor:
        """Return a part's rows with the target's dims of rows in place of the records'."""
        group = self.groups[0]
        dtype = parse_dtype(first.row["dtype"], "the manifest")
        sizes = [self._target.shape[i] for i in group.at]
        made = torch.zeros((math.prod(sizes), *rest_of(first)), dtype=dtype, device="cpu")
        if len(cells):
            as_bits(made).index_copy_(0, cells, as_bits(self._joining.of_part(found)))
        made = made.reshape(*sizes, *made.shape[1:])
        at = first.groups[0].at
        before = sum(i not in at for i in range(min(at)))
        rows, rest = range(len(sizes)), range(len(sizes), made.dim())
        return made.permute([*rest[:before], *rows, *rest[before:]])

    def _why_none(
        self, wanted: int, keys: Sequence[torch.Tensor], of_parts: Mapping[int, torch.Tensor]
    ) -> str:
        records, parts = self._records, self._records.parts
        every = [records.find((part,), keys[0]) for part in range(len(parts))]
        there = sum(bool((one.times > 0).any()) for one in every)
        if there and len(keys) == 1 and len(parts) > 1:
            lacking = lacking_text(records, of_parts)
            return (
                f"none of its {count(wanted, 'row')} was recorded in all parts that it is made of: "
                f"{parts_text(parts)}, and only {there} of these have any"
                f"{': ' * bool(lacking)}{lacking}; record all ranks"
            )
        known = sum(len(records.places[one.number].keys) for one in every)
        return (
            f"no row in common: none of its {count(wanted, 'row')} is among the {known} that "
            f"{count(len(records.every), 'record')} of this name and tags have; are these other "
            "tokens, or ids with another salt?"
        )


def _distinct(keys: torch.Tensor, *, is_sorted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys, each once, and for each of them all its number among these."""
    values, inverse = keys.unique(return_inverse=True)
    if is_sorted or len(values) < len(keys):
        return values, inverse
    return keys, torch.arange(len(keys), device="cpu")  # as they stand: nothing needs moving then


def _said_alone(receivers: Sequence[str], senders: Sequence[str]) -> str:
    """Say along which dims the target alone says which row is which, and the baseline alone."""
    said = [
        f"{one} says which row is which along {' and '.join(dims)}, and {other} does not: taken "
        f"along it {AS_THEY_STAND}"
        for one, other, dims in (
            ("the target", "the baseline", receivers),
            ("the baseline", "the target", senders),
        )
        if dims
    ]
    return "; ".join(said)


def _check_sums(own: Held, records: Records) -> None:
    """Refuse summands of rows that another rank need not have: which holds the sum is not known.

    Along tensor parallelism all ranks have the same rows, and along other axes mostly others.
    """
    for axis, how in own.dims.partial:
        size = dict(own.mesh).get(axis, (0, 1))[1]
        alike = all((axis, how) in held.dims.partial for held in records.parts)
        if size > 1 and axis not in _SAME_ROWS and not alike:
            raise LayoutError(
                f"its dims say that ranks along {axis} hold summands, and each may have rows of "
                "its own, so that none can be given the sum for the others",
                "tap it once it is summed up, or tap summands on both sides",
            )
