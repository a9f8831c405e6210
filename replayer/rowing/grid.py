"""Rows along several groups of dims, each a combination of ids: one cell of a grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from recorder.bits import as_bits
from recorder.errors import LayoutError, ReplicasDiffer
from recorder.format.payload import parse_dtype
from recorder.tags import label

from .gather import Gathered
from .held import Record, rest_of
from .places import UNKNOWN, Keys, among, real_rows
from .same import APART, Apart, Several, apart, place_text

_Rows = tuple[torch.Tensor, ...]


class _Apart(NamedTuple):
    """Cells of which a record has what an earlier one has not.

    Attributes:
        cells: along each group.
        off: how far they are apart.
        earlier: the numbers of the records that had them first.
        later: the number of the record.
        rows: its rows along the first group.
    """

    cells: _Rows
    off: Apart
    earlier: torch.Tensor
    later: int
    rows: torch.Tensor


class Grid:
    """What records of one part have of some combinations.

    Args:
        wanted: for each group of rows the keys that are asked for, sorted, each once.
        keys: what makes ids integers, for each group.
        gathered: reads records.
        replicas: what to do with cells that were recorded several times.
        step: as of `Joining`.

    Attributes:
        filled: which cells are there.
    """

    def __init__(
        self,
        wanted: Sequence[torch.Tensor],
        keys: Sequence[Keys],
        gathered: Gathered,
        replicas: str,
        step: int | None = None,
    ) -> None:
        self._wanted, self._keys = wanted, keys
        self._gathered, self._replicas = gathered, replicas
        self.filled = torch.zeros([len(one) for one in wanted], dtype=torch.bool, device="cpu")
        self._made: torch.Tensor | None = None
        self._total: torch.Tensor | None = None
        self._times = torch.zeros(self.filled.shape, dtype=torch.int64, device="cpu")
        self._from = torch.zeros(self.filled.shape, dtype=torch.int64, device="cpu")
        self._records: list[Record] = []
        self._worst = 0.0
        self._step = step
        self._elsewhere = torch.zeros_like(self.filled)
        self._apart: list[_Apart] = []

    def checked(self, found: torch.Tensor) -> Several:
        """Return how many cells were recorded several times, and how far they are apart.

        Args:
            found: which of them all parts have: those alone are taken.

        Raises:
            ReplicasDiffer: one was recorded differently, and that is an error.
            LayoutError: they have no mean.
        """
        for one in self._apart:
            there = found[one.cells]
            if bool(there.any()):
                raise self._differ(one, int(torch.where(there, one.off.whole, -1.0).argmax()))
        several = int(((self._times > 1) & found).sum())
        made = self._made
        if several and self._replicas == "mean" and self._total is None and made is not None:
            raise LayoutError(f"rows of {made.dtype} have no mean", "take the first of them")
        return Several(several, self._worst, int((self._elsewhere & found).sum()))

    def made(self, first: Record) -> torch.Tensor:
        """Return the cells, zeros where none was found: [*groups, other dims].

        Args:
            first: a record of the part, for what they are where there are none.
        """
        if self._made is None:
            dtype = parse_dtype(first.row["dtype"], "the manifest")
            return torch.zeros((*self.filled.shape, *rest_of(first)), dtype=dtype, device="cpu")
        if self._total is not None:
            again = self._times > 1
            counts = self._times[again].view(-1, *[1] * (self._made.dim() - self.filled.dim()))
            self._made[again] = (self._total[again] / counts).to(self._made.dtype)
        return self._made

    def add(self, record: Record) -> bool:
        """Take a record's cells, the next in the order in which they count; whether it has any.

        Raises:
            LayoutError: it is of another dtype.
            DamagedRecording: it cannot be read.
        """
        into, out_of = [], []
        for group, keys, wanted in zip(record.groups, self._keys, self._wanted, strict=True):
            rows = real_rows(group.ids)
            own = keys.of(group.ids[rows])
            at, has = among(wanted, own)
            has &= own != UNKNOWN
            into.append(at[has])
            out_of.append(rows[has])
        if not all(map(len, into)):
            return False
        tensor = self._gathered.whole(record)
        if self._made is None:
            shape = (*self.filled.shape, *tensor.shape[self.filled.dim() :])
            self._made = torch.zeros(shape, dtype=tensor.dtype, device="cpu")
        if self._made.dtype != tensor.dtype:
            raise LayoutError(f"records of {self._made.dtype} and {tensor.dtype} under one name")
        self._records.append(record)
        for target, source in _once(into, out_of):
            self._fill(target, _taken(tensor, _mesh(source)), source[0])
        return True

    def _fill(self, target: _Rows, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Take cells, each of them once."""
        assert self._made is not None  # `add` made it
        cells = _mesh(target)
        before = self.filled[cells]
        held = _taken(self._made, cells)
        again = before.nonzero(as_tuple=True)
        if len(again[0]):
            self._compare(cells, _taken(held, again), _taken(values, again), again, rows)
        if self._replicas == "mean":
            self._add_up(cells, values)
        new = torch.ones_like(before) if self._replicas == "last" else ~before
        bits = as_bits(held)
        bits[new] = as_bits(values)[new]
        as_bits(self._made)[cells] = bits
        self._from[cells] = torch.where(new, len(self._records) - 1, self._from[cells])
        self.filled[cells] = True
        self._times[cells] += 1

    def _compare(
        self, cells: _Rows, held: torch.Tensor, values: torch.Tensor, at: _Rows, rows: torch.Tensor
    ) -> None:
        off = apart(held, values)
        self._worst = max(self._worst, float(off.whole.max()))
        if self._records[-1].row["step"] == self._step:
            steps = torch.tensor([one.row["step"] for one in self._records], device="cpu")
            own = tuple(o.flatten()[i] for o, i in zip(cells, at, strict=True))
            self._elsewhere[own] |= off.changed & (steps[self._from[own]] != self._step)
        if self._replicas != "error" or not bool(off.beyond.any()):
            return
        where = [one[off.beyond] for one in at]
        whole = tuple(own.flatten()[one] for own, one in zip(cells, where, strict=True))
        off = Apart(*(one[off.beyond] for one in off))
        earlier = self._from[whole]
        self._apart.append(_Apart(whole, off, earlier, len(self._records) - 1, rows[where[0]]))

    def _differ(self, one: _Apart, at: int) -> ReplicasDiffer:
        earlier, later = self._records[int(one.earlier[at])], self._records[one.later]
        return ReplicasDiffer(
            f"a row of {label(later.row['name'], later.row['tags'])} was recorded at "
            f"{place_text(earlier, None)} and at {place_text(later, int(one.rows[at]))}, and there "
            f"it is off by {float(one.off.whole[at]):.3g} of its size, at most by "
            f"{float(one.off.most[at]):.6g}, which is no rounding",
            APART,
        )

    def _add_up(self, cells: _Rows, values: torch.Tensor) -> None:
        assert self._made is not None
        if not (values.dtype.is_floating_point or values.dtype.is_complex):
            return  # which has no mean, and needs none where each cell comes once
        wide = torch.complex128 if values.dtype.is_complex else torch.float64
        if self._total is None:
            self._total = torch.zeros(self._made.shape, dtype=wide, device="cpu")
        self._total[cells] += values.to(wide)


def _taken(tensor: torch.Tensor, at: _Rows) -> torch.Tensor:
    """Return a copy of some elements, bit by bit."""
    bits = as_bits(tensor)[at]
    if tensor.element_size() < 16:
        return bits.view(tensor.dtype)
    return torch.view_as_complex(bits.view(torch.float64))


def _once(
    into: Sequence[torch.Tensor], out_of: Sequence[torch.Tensor]
) -> Iterator[tuple[_Rows, _Rows]]:
    """Yield the places of a record's rows so that no cell comes twice at once, in their order."""
    numbers = [_times_before(one) for one in into]
    for turn in itertools.product(*(range(int(one.max()) + 1) for one in numbers)):
        chosen = [one == n for one, n in zip(numbers, turn, strict=True)]
        yield (
            tuple(one[which] for one, which in zip(into, chosen, strict=True)),
            tuple(one[which] for one, which in zip(out_of, chosen, strict=True)),
        )


def _times_before(values: torch.Tensor) -> torch.Tensor:
    """Return for each value how many before it are equal."""
    ordered, order = values.sort(stable=True)
    starts = torch.searchsorted(ordered, ordered)
    found = torch.empty_like(values)
    found[order] = torch.arange(len(values), device="cpu") - starts
    return found


def _mesh(places: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    n = len(places)
    return tuple(
        one.to(torch.int64).view([-1 if i == g else 1 for i in range(n)])
        for g, one in enumerate(places)
    )
