"""Whether rows that were recorded several times are the same, but for rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from recorder.bits import as_bits
from recorder.errors import ReplicasDiffer
from recorder.sizes import count
from recorder.tags import label

from .gather import Gathered
from .held import Record
from .places import Found, Places
from .records import Records

APART = (
    "if something else was meant to differ, such as the weights of another step, match on it too, "
    "as with --match-on name,step; if the ids leave something out, add it with salt"
)
_CHUNK_BYTES = 32 << 20
_NOT_YET = -1.0


class Rounding(NamedTuple):
    """How far two computations of one row may be apart: see `rounding`."""

    whole: float
    element: float


def rounding(dtype: torch.dtype) -> Rounding:
    """Return how far apart the same row may be, computed in another batch.

    `whole` bounds the root mean square of the difference over that of the row, `element` the
    greatest difference over the row's greatest element. Batches of other shapes add up in another
    order, and that adds up from layer to layer: in float32 to some 50 units of rounding, in 16 bits
    to a few, since sums are made in more, and in 8 bits to one, which is an eighth of a value.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return Rounding(0.0, 0.0)
    eps = float(torch.finfo(dtype).eps)
    whole = min((1.0 if eps > 0.01 else 4.0 if eps > 1e-5 else 128.0) * eps, 0.25)
    return Rounding(whole, 8.0 * whole)


class Apart(NamedTuple):
    """How far rows are from others: each an element a row.

    Attributes:
        whole: the root mean square of the difference over that of the row.
        beyond: whether it is more than rounding.
        most: the greatest absolute difference.
        changed: whether any bit differs.
    """

    whole: torch.Tensor
    beyond: torch.Tensor
    most: torch.Tensor
    changed: torch.Tensor


def apart(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None = None) -> Apart:
    """Compare rows [rows, ...] of one shape and dtype.

    Args:
        a: some rows.
        b: others.
        dtype: which they were rounded to, if that is another than theirs.
    """
    n = len(a)
    x, y = a.reshape(n, -1), b.reshape(n, -1)
    if not x.shape[1]:
        nothing, no = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.bool)
        return Apart(nothing, no, nothing, no)
    same = (as_bits(x) == as_bits(y)).flatten(1).all(1)
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        far = (x.to(torch.float64) - y.to(torch.float64)).abs()
        return Apart((~same).to(torch.float64), ~same, far.amax(1), ~same)
    if a.dtype.is_complex:
        x, y = (torch.view_as_real(t).reshape(n, -1) for t in (x, y))
    x, y = x.to(torch.float64), y.to(torch.float64)
    equal = (x == y) | (x.isnan() & y.isnan())
    off = torch.where(equal, 0.0, (x - y).abs())
    size = torch.maximum(x.abs().nan_to_num(0, 0, 0), y.abs().nan_to_num(0, 0, 0))
    most, largest = off.amax(1), size.amax(1)
    whole = off.square().mean(1).sqrt() / size.square().mean(1).sqrt().clamp_min(1e-300)
    within = rounding(dtype or a.dtype)
    fine = (whole <= within.whole) & (most <= within.element * largest)
    beyond = ~(same | equal.all(1) | fine)
    return Apart(whole.nan_to_num(torch.inf), beyond, most.nan_to_num(torch.inf), ~same)


class Several(NamedTuple):
    """Rows that were recorded several times.

    Attributes:
        rows: how many.
        whole: their greatest difference, relative to the row; None where it was not measured.
        elsewhere: how many of them are taken from another step than the tap's, which has them with
            other bits.
    """

    rows: int = 0
    whole: float | None = None
    elsewhere: int = 0

    def note(self, which: str) -> str:
        """Say it, "" where there are none."""
        if not self.rows:
            return ""
        taken = {"last": "the last was taken", "mean": "their mean was taken"}
        text = f"{count(self.rows, 'row')} recorded several times: "
        text += taken.get(which, "the first was taken")
        if self.whole and which in ("first", "error"):
            text += f", others are off by {self.whole:.2g} of the row at most"
        elif self.whole:
            text += f", two of them are {self.whole:.2g} of the row apart"
        return text

    def and_(self, other: Several) -> Several:
        """Return both, of other parts of the same rows."""
        known = [one.whole for one in (self, other) if one.whole is not None]
        elsewhere = max(self.elsewhere, other.elsewhere)
        return Several(max(self.rows, other.rows), max(known, default=None), elsewhere)


def check_same(
    records: Records, found: Found, gathered: Gathered, *, is_fine: bool = False
) -> Several:
    """Hold rows that were recorded several times against the first of them, each once.

    Args:
        records: the records.
        found: the rows.
        gathered: reads them.
        is_fine: whether they may be apart by more than rounding.

    Raises:
        ReplicasDiffer: they may not, and are apart by more than rounding; names both places.
    """
    several = found.times > 1
    if not bool(several.any()):
        return Several()
    places = records.places[found.number]
    known = records.checked.get(found.number)
    if known is None:
        known = records.checked[found.number] = torch.full((len(places.keys),), _NOT_YET)
    first, counts = found.first[several], found.times[several]
    todo = known[first] == _NOT_YET
    measured = known.clone() if bool(todo.any()) else known  # all of it, or none counts
    for one, other in _others(records, places, first[todo], counts[todo]):
        a, b = (gathered.rows(places.record[at], places.row[at]) for at in (one, other))
        off = apart(a, b)
        if bool(off.beyond.any()) and not is_fine:
            worst = int(torch.where(off.beyond, off.whole, -1.0).argmax())
            raise _differ(records, places, int(one[worst]), int(other[worst]), off, worst)
        measured[one] = torch.maximum(measured[one], off.whole.to(known.dtype))
    measured[first] = measured[first].clamp_min(0.0)
    records.checked[found.number] = measured
    return Several(int(several.sum()), float(measured[first].max()))


def taken_elsewhere(records: Records, found: Found, gathered: Gathered, step: int) -> int:
    """Return how many rows' first record is of another step than one, which has them otherwise.

    Args:
        records: the records, whose rows were held against each other (`check_same`).
        found: the rows.
        gathered: reads them.
        step: the step.
    """
    places, steps = records.places[found.number], records.steps
    differ = records.checked[found.number][found.first] > 0
    _, first, times = found.of((found.times > 1) & differ)
    own = torch.full_like(first, -1)
    for j in range(int(times.max()) if len(times) else 0):
        at = torch.where(times > j, first + j, first)
        own = torch.where((own < 0) & (steps[places.record[at].long()] == step), at, own)
    which = (own >= 0) & (own != first) & (steps[places.record[first].long()] != step)
    number = 0
    size = _rows_at_once(records)
    pieces = zip(first[which].split(size), own[which].split(size), strict=True)
    for two in pieces if bool(which.any()) else ():
        a, b = (gathered.rows(places.record[at], places.row[at]) for at in two)
        number += int(apart(a, b).changed.sum())
    return number


def _rows_at_once(records: Records) -> int:
    """Return how many rows are compared in one go."""
    one = records.every[0]
    each = max(1, one.row["nbytes"] // max(1, len(one.groups[0].ids)))
    return max(1, _CHUNK_BYTES // each)


def _others(
    records: Records, places: Places, first: torch.Tensor, counts: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield places and those of the same keys that are to be compared with them, in pieces."""
    size = _rows_at_once(records)
    for j in range(1, int(counts.max()) if len(counts) else 0):
        one = first[counts > j]
        other = one + j
        here, there = (records.where.content[places.record[at].long()] for at in (one, other))
        is_same = (here == there) & (places.row[one] == places.row[other])
        one, other = one[~is_same], other[~is_same]
        if len(one):  # nothing is still split into one piece
            yield from zip(one.split(size), other.split(size), strict=True)


def _differ(
    records: Records, places: Places, one: int, other: int, off: Apart, at: int
) -> ReplicasDiffer:
    where = [
        place_text(records.every[int(places.record[p])], int(places.row[p])) for p in (one, other)
    ]
    first = records.every[int(places.record[one])].row
    number = int(off.beyond.sum())
    more = f" ({count(number, 'such row')})" if number > 1 else ""
    return ReplicasDiffer(
        f"a row of {label(first['name'], first['tags'])} was recorded at {where[0]} and at "
        f"{where[1]}, and there it is off by {float(off.whole[at]):.3g} of its size, at most by "
        f"{float(off.most[at]):.6g}, which is no rounding{more}",
        APART,
    )


def place_text(record: Record, row: int | None) -> str:
    """Return where a row was recorded, for messages."""
    about = record.row
    more = [f" {name}={about[name]}" for name in ("occurrence", "attempt") if about[name]]
    number = "" if row is None else f" row {row}"
    return f"step={about['step']} rank={about['rank']}{''.join(more)}{number}"
