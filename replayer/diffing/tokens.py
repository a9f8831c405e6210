"""Of pairs compared row by row: which row a difference is in, and where that was computed."""

from __future__ import annotations

import torch

from ..measuring.by import measure_rows
from ..measuring.measures import Measures
from ..pairing.rows import TwoOfRows
from ..rowing.same import apart
from .columns import DiffRow

_CHUNK_BYTES = 64 << 20
MOSTLY, FEWER = 0.5, 0.6
"""Of a pair's rows: from when on it is asked which others they are; how many times as many may be
off then."""


def rows_off(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the share of rows that are apart by more than rounding; 1 if that cannot be told."""
    if a.dtype != b.dtype or not len(a):
        return 1.0
    return float(apart(a, b).beyond.to(torch.float64).mean())


def facts_of(two: TwoOfRows, at: int) -> DiffRow:
    """Return which row the index of a compared tensor is, and where both sides computed it."""
    common, number = two.common, two.start + at
    found: DiffRow = {"row": common.ids(number) or None}
    known, places = common.known(number), common.places(number)
    if known is not None:
        found["position"], found["token"] = known
    if places is not None:
        found["at_a"], found["at_b"] = list(places[0]), list(places[1])
    return found


def first_off(two: TwoOfRows, found: Measures) -> DiffRow:
    """Return which row is the first that is off by more than rounding, by its position.

    Of those that all are within, it is the first that is not equal bit for bit.
    """
    order = two.common.order(two.start, len(two.a))
    changed: int | None = None
    row_bytes = max(1, (two.a.numel() * two.a.itemsize) // max(1, len(two.a)))
    for which in order.split(max(1, _CHUNK_BYTES // row_bytes)):
        a, b = two.a[which], two.b[which]
        if a.dtype != b.dtype:
            wide = torch.promote_types(a.dtype, b.dtype)
            off = apart(a.to(wide), b.to(wide), coarser(a.dtype, b.dtype))
        else:
            off = apart(a, b)
        beyond = off.beyond
        if found.rtol or found.atol:
            figures = measure_rows(a, b, (0,), found.rtol, found.atol)
            mismatched = torch.tensor(figures["mismatched"]) > 0 if figures else beyond
            beyond = beyond & mismatched
        if bool(beyond.any()):
            return facts_of(two, int(which[int(beyond.to(torch.uint8).argmax())]))
        if changed is None and bool(off.changed.any()):
            changed = int(which[int(off.changed.to(torch.uint8).argmax())])
    return facts_of(two, changed) if changed is not None else {}


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Return of two dtypes the one that rounds more; the first where it is no float."""
    floats = [t for t in (a, b) if t.is_floating_point or t.is_complex]
    return max(floats, key=lambda t: float(torch.finfo(t).eps), default=a)
