"""Percentiles of absolute differences that are too many to sort, to a millionth of each.

1. A histogram by the upper half of each difference's `code` tells which 2^16 codes a percentile is
   among. Where nearly all of these are one number, as between floats of 16 bits, that is it.
2. Else `_refine` counts the codes one by one, and so finds its code: float32's nearest number, or,
   of 64-bit and complex elements, a range of a millionth, whose middle is taken.

A percentile is the smallest value that at least so many per cent are not above: definition 1 of
Hyndman and Fan, "Sample Quantiles in Statistical Packages" (1996), numpy's `inverted_cdf`.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence

import torch

from recorder.scripting import scripted

from .chunks import BINS, CHUNK, Map, Pair, buffers, code
from .elements import apart, as_numbers, is_plain

_SORTED = 1 << 14  # differences that are sorted straight away
_HALF = 1 << 16
_INFINITY = 0x7FF00000  # the upper half of float64's
_FLOAT32_MAX = torch.finfo(torch.float32).max

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


def percentiles(
    segments: Segments,
    histogram: torch.Tensor,
    ranks: Sequence[int],
    most: float,
    odd: torch.Tensor | None,
    run: Map,
) -> list[float]:
    """Return the differences of some ranks, counted from 1 at the smallest.

    Each is within 1e-6 of itself, or 2^-1042 where it is below 2^-1022; exact where the differences
    are few, or `odd` are known.

    Args:
        segments: both sides' elements, of shape [n] each.
        histogram: how many differences have which upper half of their code, of shape [2^15].
        ranks: ascending, from 1 to how many there are.
        most: the greatest difference.
        odd: the differences that float32's upper half rounds; all others of one upper half are
            one number. None where they are not known.
        run: like `map`, perhaps on several threads.
    """
    if sum(a.numel() for a, _ in segments) <= _SORTED:
        found = torch.cat([w for pair in segments for w in _chunks(*pair)])
        return [float(found.kthvalue(rank).values) for rank in ranks]
    wide = not is_plain(*segments[0])
    if not wide and most > _FLOAT32_MAX:  # float32 has no code for it
        wide, odd = True, None
        histogram = functools.reduce(torch.add, run(_wide_histogram, segments))
    above = histogram.cumsum(0)
    places = [int(torch.searchsorted(above, rank)) for rank in ranks]
    below = [int(above[place - 1]) if place else 0 for place in places]
    if odd is not None:
        return [
            _among(odd, place, rank - less, int(above[place]) - less)
            for rank, place, less in zip(ranks, places, below, strict=True)
        ]
    lows = sorted(set(places))
    first_codes = [low * _HALF for low in lows]
    counts = functools.reduce(
        torch.add, run(lambda pair: _counted(pair, first_codes, wide), segments)
    )
    values = []
    for rank, place, less in zip(ranks, places, below, strict=True):
        first = lows.index(place) * (_HALF + 1) + 1
        inner = counts[first : first + _HALF].cumsum(0)
        found_code = place * _HALF + int(torch.searchsorted(inner, rank - less))
        values.append(min(_number(found_code, wide), most))
    return values


def _number(one: int, wide: bool) -> float:
    """Return what differences of a code are, nearly."""
    if not wide:
        return float(struct.unpack("f", struct.pack("i", one))[0])
    half = 1 << 31 if 0 < one < _INFINITY else 0
    return float(struct.unpack("d", struct.pack("q", (one << 32) + half))[0])


def _among(odd: torch.Tensor, place: int, rank: int, size: int) -> float:
    """Return the difference of a rank among the `size` whose code has the upper half `place`.

    All of them are float32's number of that half, but for those that are odd.
    """
    number = _number(place * _HALF, wide=False)
    exact = odd[code(odd) >> 16 == place].sort().values
    below = int((exact < number).sum())
    same = size - exact.numel()
    if below < rank <= below + same:
        return number
    return float(exact[rank - 1 if rank <= below else rank - 1 - same])


def _wide_histogram(pair: Pair) -> torch.Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64)
    for w in _chunks(*pair):
        counts += torch.bincount(code(w, is_wide=True) >> 16, minlength=BINS)
    return counts


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
