"""Exact percentiles of absolute differences that are too many to sort.

1. A histogram by the upper half of each difference's `code` tells which 2^16 codes a percentile is
   among. Where nearly all of these are one number, as between floats of 16 bits, that is it.
2. Else `_refine` counts the codes one by one, and so finds its code.
3. Differences of one code are as good as equal. Where float32 rounds few, all others of a code are
   one number. Else `Cell` has the smallest and the greatest of a code, and where those are not
   equal, the few there are get sorted, or, if many, bisected.

A percentile is the smallest value that at least so many per cent are not above: definition 1 of
Hyndman and Fan, "Sample Quantiles in Statistical Packages" (1996), numpy's `inverted_cdf`.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator, Sequence

import torch

from recorder.scripting import scripted

from .chunks import CHUNK, Map, Pair, buffers, code
from .elements import apart, as_numbers, is_plain

_SORTED = 1 << 14  # differences that are sorted straight away
_COLLECTED = 1 << 22  # those of a cell that are
_HALF = 1 << 16

Segments = Sequence[Pair]


def _differ(
    a: torch.Tensor,
    b: torch.Tensor,
    start: int,
    n: int,
    wide: torch.Tensor,
    narrow: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Return the absolute differences of a chunk in float64; `narrow` gets them as float32."""
    x = wide.narrow(0, 0, n)
    y = wide.narrow(0, size, n)
    x.copy_(a.narrow(0, start, n))
    y.copy_(b.narrow(0, start, n))
    y.sub_(x).abs_()
    f = narrow.narrow(0, 0, n)
    f.copy_(y)
    added = float(y.sum())
    if added - added != 0.0:  # some are NaN or infinite
        f.masked_fill_(y.isfinite().logical_not_(), float("nan"))  # behind all that count
    return y


_differ = scripted(_differ)


def _refine(
    a: torch.Tensor,
    b: torch.Tensor,
    lows: list[int],
    wide: torch.Tensor,
    narrow: torch.Tensor,
    narrow_bits: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Count the differences by code, for 2^16 codes from each of `lows` on.

    `lows` ascend and lie at least 2^16 apart. Place 0 of the result is for codes before the first,
    and after the 2^16 of each follows one for those between it and the next.
    """
    counts = torch.zeros(len(lows) * 65537 + 1, dtype=torch.int64)
    ones = torch.ones(size, dtype=torch.int64)
    total = a.numel()
    start = 0
    while start < total:
        n = min(size, total - start)
        _differ(a, b, start, n, wide, narrow, size)
        codes = narrow_bits.narrow(0, 0, n)
        place = codes.sub(lows[0] - 1).clamp_(0, 65537)
        for low in lows[1:]:
            place.add_(codes.sub(low - 1).clamp_(0, 65537))
        counts.index_add_(0, place.to(torch.int64), ones.narrow(0, 0, n))
        start += n
    return counts


_refine = scripted(_refine)


def _scan_cells(
    a: torch.Tensor,
    b: torch.Tensor,
    wanted: list[int],
    wide: torch.Tensor,
    narrow: torch.Tensor,
    narrow_bits: torch.Tensor,
    size: int,
) -> list[list[float]]:
    """Return the smallest, the greatest and the number of the differences of each wanted code."""
    found = [[float("inf"), float("-inf"), 0.0] for _ in wanted]
    total = a.numel()
    start = 0
    while start < total:
        n = min(size, total - start)
        y = _differ(a, b, start, n, wide, narrow, size)
        codes = narrow_bits.narrow(0, 0, n)
        for i, one in enumerate(wanted):
            inside = codes.eq(one)
            if bool(inside.any()):
                values = y.masked_select(inside)
                found[i][0] = min(found[i][0], float(values.amin()))
                found[i][1] = max(found[i][1], float(values.amax()))
                found[i][2] += float(values.numel())
        start += n
    return found


_scan_cells = scripted(_scan_cells)


def percentiles(
    segments: Segments,
    histogram: torch.Tensor,
    ranks: Sequence[int],
    odd: torch.Tensor | None,
    rounded: torch.Tensor | None,
    run: Map,
) -> list[float]:
    """Return the differences of some ranks, counted from 1 at the smallest.

    Args:
        segments: both sides' elements, of shape [n] each.
        histogram: how many differences have which upper half of their code, of shape [2^15].
        ranks: ascending, from 1 to how many there are.
        odd: the differences that float32's upper half rounds; all others of one upper half are
            one number. None where they are not known.
        rounded: those that float32 rounds, likewise.
        run: like `map`, perhaps on several threads.
    """
    if sum(a.numel() for a, _ in segments) <= _SORTED:
        found = torch.cat([w for pair in segments for w in _chunks(*pair)])
        return [float(found.kthvalue(rank).values) for rank in ranks]
    wide = not is_plain(*segments[0])
    above = histogram.cumsum(0)
    places = [int(torch.searchsorted(above, rank)) for rank in ranks]
    if odd is not None:
        below = [int(above[place - 1]) if place else 0 for place in places]
        return [
            _among(odd, place, 16, rank - less, int(above[place]) - less)
            for rank, place, less in zip(ranks, places, below, strict=True)
        ]
    lows = sorted(set(places))
    first_codes = [low * _HALF for low in lows]
    counts = functools.reduce(
        torch.add, run(lambda pair: _counted(pair, first_codes, wide), segments)
    )
    found_codes, within, sizes = [], [], []
    for rank, place in zip(ranks, places, strict=True):
        rest = rank - int(above[place - 1] if place else 0)
        first = lows.index(place) * (_HALF + 1) + 1
        inner = counts[first : first + _HALF].cumsum(0)
        last = int(torch.searchsorted(inner, rest))
        found_codes.append(place * _HALF + last)
        before = int(inner[last - 1] if last else 0)
        within.append(rest - before)
        sizes.append(int(inner[last]) - before)
    if rounded is not None:
        cells_of = zip(found_codes, within, sizes, strict=True)
        return [_among(rounded, one, 0, rank, size) for one, rank, size in cells_of]
    wanted = sorted(set(found_codes))
    ends = zip(*run(lambda pair: _ends(pair, wanted, wide), segments), strict=True)
    cells = {
        one: Cell(segments, one, wide, list(parts), run)
        for one, parts in zip(wanted, ends, strict=True)
    }
    return [cells[one].ranked(rank) for one, rank in zip(found_codes, within, strict=True)]


def _among(odd: torch.Tensor, one: int, shift: int, rank: int, size: int) -> float:
    """Return the difference of a rank among the `size` whose code without `shift` bits is `one`.

    All of them are float32's number of that code, but for those that are odd.
    """
    number = float(struct.unpack("f", struct.pack("i", one << shift))[0])
    exact = odd[code(odd) >> shift == one].sort().values
    below = int((exact < number).sum())
    same = size - exact.numel()
    if below < rank <= below + same:
        return number
    return float(exact[rank - 1 if rank <= below else rank - 1 - same])


def _counted(pair: Pair, lows: list[int], wide: bool) -> torch.Tensor:
    """Count a segment's differences by code as `_refine` does."""
    a, b = pair
    if not wide:
        size = min(CHUNK, a.numel())
        return _refine(as_numbers(a), as_numbers(b), lows, *buffers(size), size)
    counts = torch.zeros(len(lows) * (_HALF + 1) + 1, dtype=torch.int64)
    for w in _chunks(a, b):
        codes = code(w, is_wide=True)
        places = torch.zeros_like(codes)
        for low in lows:
            places += (codes - (low - 1)).clamp_(0, _HALF + 1)
        counts += torch.bincount(places, minlength=counts.numel())
    return counts


def _chunks(a: torch.Tensor, b: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the absolute differences of elements finite on both sides, chunk by chunk."""
    for start in range(0, a.numel(), CHUNK):
        chunk = apart(a[start : start + CHUNK], b[start : start + CHUNK])
        yield chunk.w[~chunk.excluded] if bool(chunk.excluded.any()) else chunk.w


Ends = tuple[float, float, int]
"""The smallest of some differences, the greatest, and how many there are."""


def _ends(pair: Pair, wanted: list[int], wide: bool) -> list[Ends]:
    """Return the ends of those of a segment's differences that have each of some codes."""
    if not wide:
        a, b = map(as_numbers, pair)
        size = min(CHUNK, a.numel())
        cells = _scan_cells(a, b, wanted, *buffers(size), size)
        return [(low, high, int(n)) for low, high, n in cells]
    ends = [(math.inf, -math.inf, 0)] * len(wanted)
    for w in _chunks(*pair):
        codes = code(w, wide)
        for i, one in enumerate(wanted):
            found = w[codes == one]
            if found.numel():
                low, high, n = ends[i]
                low, high = min(low, float(found.min())), max(high, float(found.max()))
                ends[i] = low, high, n + found.numel()
    return ends


class Cell:
    """The differences that have one code.

    Args:
        segments: both sides' elements.
        wanted: the code.
        wide: as for `code`.
        ends: of the differences of each segment.
        run: like `map`.
    """

    def __init__(
        self, segments: Segments, wanted: int, wide: bool, ends: list[Ends], run: Map
    ) -> None:
        self._segments, self._code, self._wide, self._run = segments, wanted, wide, run
        self._low = min(low for low, _, _ in ends)
        self._high = max(high for _, high, _ in ends)
        self._count = sum(n for _, _, n in ends)

    def _members(self, pair: Pair) -> Iterator[torch.Tensor]:
        for w in _chunks(*pair):
            yield w[code(w, self._wide) == self._code]

    def ranked(self, rank: int) -> float:
        """Return the difference of a rank, counted from 1 at the cell's smallest."""
        if self._low == self._high:
            return self._low
        if self._count <= _COLLECTED:
            parts = self._run(lambda pair: torch.cat(list(self._members(pair))), self._segments)
            return float(torch.cat(list(parts)).sort().values[rank - 1])
        low, high = _bits(self._low), _bits(self._high)
        while low < high:
            middle = (low + high) // 2
            below = functools.partial(self._up_to, bound=_value(middle))
            if sum(self._run(below, self._segments)) >= rank:
                high = middle
            else:
                low = middle + 1
        return _value(low)

    def _up_to(self, pair: Pair, bound: float) -> int:
        return sum(int((found <= bound).sum()) for found in self._members(pair))


def _bits(value: float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0])


def _value(bits: int) -> float:
    return float(struct.unpack("d", struct.pack("q", bits))[0])
