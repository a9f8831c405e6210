"""Two sides' records of one name and tags, row by row, whatever step and batch each was in.

1. `Common.of` finds the ids that both sides have, in the order of their positions where these are
   known, else in the order in which the baseline computed them.
2. `Common.twos` brings these rows of both sides, as many at a time as a bound of memory allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from recorder.errors import BadRows, LayoutError, ReplicasDiffer
from recorder.format.schema import ManifestRow
from recorder.layouts.parse import layout_of
from recorder.layouts.rowed import rowed
from recorder.recording import Recording
from recorder.sizes import count
from recorder.tokens.hashing import previous

from ..log import joined
from ..rowing.held import Held, paired
from ..rowing.joining import Cells, Joining, whole_of
from ..rowing.places import Keys, Places, among, real_rows
from ..rowing.records import Records
from ..rowing.same import apart
from .blocks import SIDES
from .tensors import Two

_MOST_COMBINED = 1 << 24
_FEWEST_SHIFTED = 3
Shared = dict[object, tuple[list[Places], list[Keys]]]


class Place(NamedTuple):
    """Where a row was recorded: its step, rank, and index along the dims of its rows."""

    step: int
    rank: int
    row: int


@dataclass
class TwoOfRows(Two):
    """Two tensors to compare, of rows that both sides have, with what tells them apart.

    Attributes:
        common: what they are rows of.
        start: the number of the first among those in common.
    """

    common: Common = field(kw_only=True, repr=False)
    start: int = field(default=0, kw_only=True)


class _Side:
    """One side's records, joined to whole rows."""

    def __init__(self, name: str, source: Recording, records: Records, check: bool) -> None:
        self.name, self.source, self.records, self.check = name, source, records, check
        self.ids = [
            _distinct([one.groups[g].ids for one in records.every], keys)
            for g, keys in enumerate(records.keys)
        ]

    def found(self, joining: Joining, keys: Sequence[torch.Tensor]) -> Cells:
        """Return which keys it has; what is wrong with it is said of this side."""
        with _said_of(self.name):
            return joining.find(keys)

    def joining(self, receiver: Held) -> Joining:
        """Return what brings its rows."""
        return Joining(self.source, self.records, receiver, replicas="error", check=self.check)

    def place(self, cells: Cells, at: int) -> Place:
        """Return where a cell that was found was recorded first."""
        found = next(iter(cells.found.values()))
        places = self.records.places[found.number]
        number = int(found.first[at])
        record = self.records.every[int(places.record[number])]
        return Place(record.row["step"], record.row["rank"], int(places.row[number]))


class Common:
    """The rows that two sides have in common.

    Attributes:
        both: how many.
        only_a: how many the baseline has alone.
        only_b: how many the target has alone.
        apart: of which side rows that were recorded several times are not the same, and what.
        several: what to know of rows that were recorded several times.
    """

    def __init__(self, a: _Side, b: _Side) -> None:
        self._a, self._b = a, b
        _check_numbers(a, b)
        wanted = []
        for ids, others, keys in zip(a.ids, b.ids, b.records.keys, strict=True):
            _, has = among(keys.of(others).sort().values, keys.of(ids))
            wanted.append(ids[has])
        total = math.prod(map(len, wanted))
        if len(wanted) > 1 and total > _MOST_COMBINED:
            raise LayoutError(
                f"{total} combinations of rows along several dims are more than can be compared"
            )
        self._ids: torch.Tensor | None = None
        self._known: torch.Tensor | None = None
        with _said_of(a.name):
            self._receiver = whole_of(a.records)
        self._of_a, self._of_b = a.joining(self._receiver), b.joining(self._receiver)
        self._cells = self._found(wanted) if total else None
        self.both = 0 if self._cells is None else int(self._cells[0].is_found.sum())
        lost = total - self.both  # both sides have their ids, and not in all parts
        self.only_a, self.only_b = (
            lost + sum(map(len, side.ids)) - sum(map(len, wanted)) for side in (a, b)
        )
        self.apart: list[str] = []
        self.several: list[str] = []
        if self._cells is not None:
            self._check()

    @classmethod
    def of(
        cls,
        a: Recording,
        rows_a: Sequence[ManifestRow],
        b: Recording,
        rows_b: Sequence[ManifestRow],
        *,
        check: bool,
        shared: tuple[Shared, Shared],
    ) -> Common:
        """Return what records of two sides have in common.

        Args:
            a: the baseline.
            rows_a: its rows, in the order in which they count.
            b: the target.
            rows_b: its rows.
            check: whether to hold what is read against its digest.
            shared: places of other records of either side, and to be added to.

        Raises:
            LayoutError: they cannot be paired, or do not say enough.
            DamagedRecording: ids are not there.
        """
        names = [_names(source, rows[0]) for source, rows in ((a, rows_a), (b, rows_b))]
        pairs = paired(names[0], names[1], ("A", "B"))
        with _said_of("A"):
            of_a = Records.of(a, rows_a, lambda own: pairs, shared[0], check=check)
        back = [(j, i) for i, j in pairs]
        with _said_of("B"):
            of_b = Records.of(b, rows_b, lambda own: back, shared[1], check=check)
        return cls(_Side("A", a, of_a, check), _Side("B", b, of_b, check))

    @property
    def why_none(self) -> str:
        """Why there is nothing to compare, where both sides have no row in common."""
        if not (self.only_a or self.only_b):
            return "all of its rows are padding, on both sides"
        return (
            f"no row in common: A has {self.only_a} and B {self.only_b}; are these other tokens, "
            "or ids with another salt?"
        )

    @property
    def one_sided(self) -> str:
        """Say along which dims one side alone tells rows apart, "" where along none."""
        sides = (("A", self._a, "B"), ("B", self._b, "A"))
        return "; ".join(
            f"{name} says which row is which along {' and '.join(side.records.alone)}, and {other} "
            "does not: compared along it as they stand"
            for name, side, other in sides
            if side.records.alone
        )

    def said_alone(self, share: float) -> str:
        """Return that more than a share of a side's rows is on that side alone, "" where not."""
        sides = (("A", self.only_a, "B"), ("B", self.only_b, "A"))
        said = [
            f"{alone} of {alone + self.both} rows of {name} are not in {other}"
            for name, alone, other in sides
            if alone > share * (alone + self.both)
        ]
        if not said:
            return ""
        return f"{' and '.join(said)}; more may be with --missing-rows"

    @property
    def dim_names(self) -> tuple[str, ...]:
        """What the dims of the compared tensors are called: that of rows, then the others."""
        first = self._a.records.every[0]
        names = [group.label if len(group.names) == 1 else "t" for group in first.groups]
        rest = self._receiver.dims.dims[len(first.groups) :]
        return ("*".join(names), *(dim.label for dim in rest))

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of what is compared."""
        return (self.both, *self._receiver.shape)

    @property
    def ranks(self) -> list[tuple[int, ...]]:
        """The ranks that recorded any of it, of both sides."""
        every = self._cells or ()
        return [tuple(sorted({one.row["rank"] for one in cells.records})) for cells in every]

    @property
    def row_bytes(self) -> int:
        """The bytes of one row of both sides, or about as many."""
        total = 0
        for side in (self._a, self._b):
            for part in range(len(side.records.parts)):
                one = side.records.first(part)
                rows = math.prod(len(group.ids) for group in one.groups)
                total += one.row["nbytes"] // max(1, rows)
        return max(1, total)

    def twos(self, memory: int) -> Iterator[TwoOfRows]:
        """Yield the rows of both sides, in pieces of at most about `memory` bytes.

        Raises:
            LayoutError: parts cannot be put together.
            DamagedRecording: a record cannot be read.
        """
        if self._cells is None:
            return
        ranks = self.ranks
        # Grids, of several groups, are there as a whole.
        size = max(1, self.both if self._ids is None else memory // self.row_bytes)
        for start in range(0, self.both, size):
            which = slice(start, start + size)
            one, other = (
                self._of_a.rows(self._cells[0], which),
                self._of_b.rows(self._cells[1], which),
            )
            some = f"rows {start + 1} to {min(start + size, self.both)} of {self.both}"
            note = joined(some if self.both > size else "", self.one_sided)
            yield TwoOfRows(
                one, other, self.dim_names, ranks[0], ranks[1], note, common=self, start=start
            )

    def ids(self, number: int) -> list[int]:
        """Return the id of a row in common; [] where several groups tell rows apart."""
        return [] if self._ids is None else self._ids[number].reshape(-1).tolist()

    def places(self, number: int) -> tuple[Place, Place] | None:
        """Return where a row in common was recorded; None where several groups tell rows apart."""
        if self._cells is None or self._ids is None:
            return None
        a, b = self._cells
        return self._a.place(a, number), self._b.place(b, number)

    def known(self, number: int) -> tuple[int, int] | None:
        """Return the position and the token of a row in common; None where nobody said."""
        if self._known is None:
            return None
        position, token = self._known[number].tolist()
        return (position, token) if position >= 0 else None

    def shift(self, two: TwoOfRows, most: float) -> int:
        """Return -1 where the target's rows are the baseline's of the token before, 1 of the next.

        0 where they are neither, or where nobody said which tokens they are.

        Args:
            two: some of these rows.
            most: the share of them that may be none of these.
        """
        before = self._before()
        if before is None or two.a.dtype != two.b.dtype:
            return 0
        end = two.start + len(two.a)
        own = before[two.start : end]
        has = (own >= two.start) & (own < end)
        if int(has.sum()) < _FEWEST_SHIFTED:
            return 0
        there, here = own[has] - two.start, has.nonzero().flatten()
        for by, (one, other) in ((-1, (there, here)), (1, (here, there))):
            off = apart(two.a[one], two.b[other]).beyond
            if float(off.to(torch.float64).mean()) < most:
                return by
        return 0

    def also(self, rows: Sequence[ManifestRow], start: int, size: int) -> torch.Tensor | None:
        """Return of other records of the baseline the same rows, whole: [rows, other dims].

        None where they are not all there.

        Args:
            rows: the records, in the order in which they count.
            start: the number of the first row.
            size: how many.
        """
        if self._ids is None:
            return None
        a = self._a
        try:
            names = _names(a.source, a.records.every[0].row)
            records = Records.of(a.source, rows, lambda own: paired(own, names), {}, check=a.check)
            joining = Joining(a.source, records, whole_of(records), replicas="first", check=a.check)
            cells = joining.find([records.keys[0].of(self._ids[start : start + size])])
            return joining.rows(cells) if bool(cells.is_found.all()) else None
        except LayoutError:
            return None

    def _before(self) -> torch.Tensor | None:
        """Return for each row in common the number of the one of the token before, -1 without."""
        if self._ids is None or self._known is None:
            return None
        positions, tokens = self._known.unbind(1)
        return previous(self._ids, tokens, positions)

    def order(self, start: int, size: int) -> torch.Tensor:
        """Return the numbers of some rows by where they stand in their sequences."""
        if self._known is None:
            return torch.arange(size, device="cpu")
        at = self._known[start : start + size, 0]
        last = torch.where(at < 0, 1 << 62, at)
        return last.argsort(stable=True)

    def _found(self, wanted: Sequence[torch.Tensor]) -> tuple[Cells, Cells]:
        """Return the cells of both sides, those of either alone left out, and note their ids."""
        sides = ((self._a, self._of_a), (self._b, self._of_b))
        keys = [
            [make.of(ids) for make, ids in zip(side.records.keys, wanted, strict=True)]
            for side, _ in sides
        ]
        if len(wanted) > 1:
            return self._combined(keys)
        one, other = (
            side.found(joining, own) for (side, joining), own in zip(sides, keys, strict=True)
        )
        has = one.is_found & other.is_found
        self._ids = wanted[0][has]
        self._known = self._facts(self._ids)
        return _kept(one, has), _kept(other, has)

    def _combined(self, keys: list[list[torch.Tensor]]) -> tuple[Cells, Cells]:
        """Return grids of both sides in one order, and which of their cells count."""
        sizes = [len(one) for one in keys[0]]
        cells, grids, found = [], [], []
        sides = ((self._a, self._of_a), (self._b, self._of_b))
        for (side, joining), own in zip(sides, keys, strict=True):
            order = [one.sort() for one in own]  # as a grid is made
            one = side.found(joining, [values for values, _ in order])
            mesh = torch.meshgrid(*(indices.argsort() for _, indices in order), indexing="ij")
            found.append(one.is_found.view(sizes)[mesh].flatten())
            grids.append({part: made[mesh] for part, made in one.grids.items()})
            cells.append(one)
        both = found[0] & found[1]
        made = [
            Cells(both, {}, one.records, grid, one.several)
            for one, grid in zip(cells, grids, strict=True)
        ]
        return made[0], made[1]

    def _check(self) -> None:
        assert self._cells is not None
        for side, joining, cells in zip(
            (self._a, self._b), (self._of_a, self._of_b), self._cells, strict=True
        ):
            try:
                several = joining.check(cells)
            except ReplicasDiffer as err:
                self.apart.append(f"within {side.name}, {err.fact}; {err.advice}")
                continue
            if note := several.note("first"):
                self.several.append(f"{side.name}: {note}")

    def _facts(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Return position and token of ids, [rows, 2], -1 where nobody said."""
        if ids.dim() > 1:
            return None
        found = torch.full((len(ids), 2), -1, dtype=torch.int64, device="cpu")
        ordered, at = ids.sort()
        is_known = False
        for side in (self._a, self._b):
            for own, known in _facts_of(side):
                there, has = among(ordered, own)
                found[at[there[has]]] = known[has].to(torch.int64)
                is_known |= bool(has.any())
        return found if is_known else None


@contextmanager
def _said_of(side: str) -> Iterator[None]:
    """Have errors of layouts and ids speak of a side of a diff."""
    try:
        yield
    except LayoutError as err:
        raise err.of(side, SIDES) from None


def _check_numbers(a: _Side, b: _Side) -> None:
    """Refuse ids that are of one number on one side, and of two on the other."""
    for ids, others in zip(a.ids, b.ids, strict=True):
        one, other = (math.prod(side.shape[1:]) for side in (ids, others))
        if one != other and len(ids) and len(others):
            raise BadRows(
                f"A's rows are told apart by {count(one, 'number')} each, and B's by {other}",
                "give both the same ids",
            )


def _kept(cells: Cells, has: torch.Tensor) -> Cells:
    """Return some of the cells that were found, of one group of rows."""
    which = (cells.is_found.to(torch.int64).cumsum(0) - 1)[has]
    found = {part: places.of(which) for part, places in cells.found.items()}
    return Cells(has, found, cells.records)


def _facts_of(side: _Side) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids and what is known of them, once for each record of ids."""
    rows = {(one.row["rows"], one.row["rank"]): one.row for one in side.records.every}
    for row in rows.values():
        for taken in side.source.ids(row)[:1]:
            known = side.source.known(row, taken.names)
            ids = taken.ids.reshape(-1)
            if known is not None and len(ids) == len(known):
                yield ids, known


def _names(source: Recording, row: ManifestRow) -> list[tuple[str, ...]]:
    dims = layout_of(row["dims"] or "", row["kind"])
    return [one.names for one in rowed(dims, tuple(row["shape"] or ()), source.ids(row))]


def _distinct(every: Sequence[torch.Tensor], keys: Keys) -> torch.Tensor:
    """Return the ids of records, each once, in the order in which they come; no padding."""
    ids = torch.cat([one[real_rows(one)] for one in every])
    _, at = keys.of(ids).unique(return_inverse=True)
    first = torch.full((int(at.max()) + 1 if len(at) else 0,), len(ids), dtype=torch.int64)
    first.scatter_reduce_(0, at, torch.arange(len(ids)), "amin")
    return ids[first.sort().values]
