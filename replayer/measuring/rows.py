"""What a profile is made of: each row's sums over a pair of tensors, without what masks left.

1. `_great` finds what masks left, by the exponents of all numbers, or of some where that is enough.
2. `add_up` adds up each row, chunk by chunk; `_sums` does a chunk: in float32 where that holds the
   numbers and, of a row, the squares and fourth powers, which takes a third of the time, else in
   float64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from recorder.scripting import scripted

from .chunks import Map, Pair

EXTREME = 16.0
"""Times what a row usually holds, which is the square of its mean root."""

_CHUNK = 1 << 16  # elements worked on at once; they stay in a processor's cache
_AT_ONCE = 1 << 20  # elements that one thread takes
_FEW_SAMPLES = 14  # binades of elements
_SAMPLED, _STRIDE = 1 << 18, 17  # elements, of which one of so many shows whether there is a gap
_GAP = 3  # binades without a number, below what is great
_LEAST_BELOW, _SHARE_BELOW = 16, 64  # numbers below it at least, and one of so many
_EXPONENT = {torch.float32: (23, 8), torch.float64: (52, 11)}  # the place of its bits, how many
_SCALED = {torch.float32: (10, 100), torch.float64: (200, 1000)}  # binades from 1; by how many
_HIGH = 50  # binades above 1, whose squares float32 does not add up
_SAFE_SQUARE = 2.0**-60  # the mean of a row's squares, at least, whose sums float32 holds
_TINY, _HUGE = 2.0**-40, 2.0**60  # within these, numbers and differences are scaled exactly
_NARROW = (torch.float32, torch.bfloat16, torch.float16)

# Columns of what is added up, of a row
XX, YY, XD, DD, D, X4, N, ELEMENT, XX_EXTREME, YY_EXTREME, DD_EXTREME = range(11)
_POWERS = (2, 2, 2, 2, 1, 4, 0, 0)  # of numbers, that a column but for those of extremes adds up


def add_up(one: torch.Tensor, other: torch.Tensor, run: Map = map) -> tuple[torch.Tensor, float]:
    """Return the sums of two matrices' rows, and what numbers were multiplied by for them.

    Args:
        one: the baseline's, of shape [rows, n], real, not empty.
        other: the target's, of the same shape.
        run: like `map`, over parts of the matrices, perhaps on several threads.

    Returns:
        The sums, of shape [rows, 11], float64; see the columns above. Those of extremes have a
        scale of their own.
    """
    is_narrow = all(t.dtype in _NARROW for t in (one, other))
    dtype = torch.float32 if is_narrow else torch.float64
    parts = [part for block in _cut((one, other), _AT_ONCE) for part in block]
    great, top, highest = _great(one, other, parts, dtype, run)
    scale, outer = (_scale(e, dtype) for e in (top, highest))
    is_far = is_narrow and highest > _HIGH
    if is_narrow:
        outer = 1.0 if is_far else scale

    def of_chunk(pair: Pair) -> torch.Tensor:
        if is_narrow:
            return _sums_narrow(*pair, great, scale, outer, is_far)
        x, y = (t.to(dtype) for t in pair)
        # What is next to the largest of float64 has infinite squares, and is infinitely far off.
        return _sums(x, y, great, scale, outer, False, EXTREME).nan_to_num(math.inf, math.inf)

    def of_part(part: Pair) -> torch.Tensor:
        return torch.cat([_joined(map(of_chunk, block)) for block in _cut(part, _CHUNK)])

    found = list(run(of_part, parts))
    across = -(-one.shape[1] // _AT_ONCE)
    sums = torch.cat([_joined(found[i : i + across]) for i in range(0, len(found), across)])
    return sums, 1.0 if is_narrow else scale


def _scale(exponent: int, dtype: torch.dtype) -> float:
    """Return what brings numbers of such an exponent near 1, if they are far from it."""
    near, most = _SCALED[dtype]
    return 1.0 if abs(exponent) < near else math.ldexp(1.0, max(-most, min(most, -exponent)))


def _cut(pair: Pair, size: int) -> Iterator[list[Pair]]:
    """Yield blocks of rows, each as the parts that its columns are cut into."""
    if pair[0].numel() <= size:
        yield [pair]
        return
    each = max(1, size // pair[0].shape[1])
    for block in zip(*(t.split(each) for t in pair), strict=True):
        yield list(zip(*(t.split(size, 1) for t in block), strict=True))


def _joined(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sums of rows, given those of their parts."""
    total, *others = parts
    for part in others:
        most = torch.maximum(total[:, ELEMENT], part[:, ELEMENT])
        total = total + part
        total[:, ELEMENT] = most
    return total


def _great(
    one: torch.Tensor,
    other: torch.Tensor,
    parts: Sequence[Pair],
    dtype: torch.dtype,
    run: Map,
) -> tuple[float, int, int]:
    """Return from where on numbers are great by a gap, as `_great_from` does.

    A sample without a gap, from whose greatest to the greatest of all there is none either, has as
    many exponents or fewer than all have: then there is none.
    """
    if one.numel() >= _SAMPLED:
        few, of_other = (t.reshape(-1)[::_STRIDE].unsqueeze(0) for t in (one, other))
        great, _, highest = _great_from(_binades((few, of_other), dtype), dtype)
        most = [max(found) for found in zip(*run(_greatest, parts), strict=True)]
        if great == math.inf and all(map(math.isfinite, most)) and min(most) > 0:
            bound = math.frexp(min(most))[1] - 1
            if bound - highest <= _GAP:
                return great, bound, bound
    counts = functools.reduce(torch.add, run(lambda part: _binades(part, dtype), parts))
    return _great_from(counts, dtype)


def sums_of_pairs(
    one: torch.Tensor, other: torch.Tensor, pairs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `add_up` does of many pairs at once, bit by bit the same, in units of 1.

    Args:
        one: the baselines' rows, of shape [pairs * rows, n], of dtypes that float32 holds.
        other: the targets'.
        pairs: how many pairs there are.

    Returns:
        The sums, of shape [pairs, rows, 11]; and of which pairs they are known, of shape [pairs]:
        not of those where some numbers are great by a gap, or far from the others and from 1.
    """
    x, y = one.to(torch.float32), other.to(torch.float32)
    size = torch.minimum(x.abs(), y.abs()).view(pairs, -1)
    place, bits = _EXPONENT[torch.float32]
    codes = (size.view(torch.int32) >> place).bitwise_and_((1 << bits) - 1)
    codes += torch.arange(pairs, dtype=torch.int32).unsqueeze(1) << bits
    counts = torch.bincount(codes.view(-1), minlength=pairs << bits).view(pairs, 1 << bits)
    highest, is_known = _ungapped(counts)
    heights, height_of = highest.unique(return_inverse=True)
    scales = torch.tensor([_scale(e, torch.float32) for e in heights.tolist()])
    is_scaled = bool((scales != 1.0).any())
    if is_scaled:
        # Scaled before they are subtracted, numbers have the same difference, but at the ends of
        # what float32 holds.
        scale, most = scales[height_of], torch.maximum(x.abs(), y.abs()).view(pairs, -1)
        tiny = torch.minimum(_or_one(x), _or_one(y)).view(pairs, -1).amin(1) < _TINY
        is_known &= (scale == 1.0) | ((most.amax(1) * scale < _HUGE) & ((scale > 1.0) | ~tiny))
        each = torch.where(is_known, scale, 1.0).repeat_interleave(len(x) // pairs)
        each = each.unsqueeze(1)
        found = _sums(x * each, y * each, math.inf, 1.0, 1.0, False, EXTREME)
    else:
        found = _sums(x, y, math.inf, 1.0, 1.0, False, EXTREME)
    is_held = found.isfinite().all(1) & (found[:, XX] >= _SAFE_SQUARE * found[:, N])
    if is_scaled:
        units = [_units(scale, scale) for scale in (*scales.tolist(), 1.0)]
        unit_of = torch.where(is_known, height_of, len(scales))
        back = torch.tensor(units, dtype=torch.float64)[unit_of]
        found *= back.repeat_interleave(len(x) // pairs, 0)
    if not bool(is_held.all()):
        _add_up_again(found, x, y, is_held, math.inf)
    return found.view(pairs, -1, found.shape[1]), is_known


def _units(scale: float, outer: float) -> list[float]:
    """Return what brings sums of numbers that were multiplied back, those of extremes apart."""
    return [scale**-power for power in _POWERS] + [outer**-2] * 3


def _or_one(values: torch.Tensor) -> torch.Tensor:
    """Return the magnitudes of numbers, 1 for zeros."""
    return values.abs().masked_fill(values == 0, 1.0)


def _ungapped(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the greatest exponent of each pair, and of which none is far above those below.

    Args:
        counts: how often each has which, of shape [pairs, 256].
    """
    bias = (counts.shape[1] >> 1) - 1
    counts[:, 0] = 0  # as `_great_from` has it
    counts[:, -1] = 0
    seen = counts.any(0).nonzero().flatten()
    if not seen.numel():
        nothing = torch.zeros(len(counts), dtype=torch.int64)
        return nothing, torch.ones_like(nothing, dtype=torch.bool)
    first = int(seen[0])
    used = counts[:, first : int(seen[-1]) + 1]
    places = torch.arange(first, first + used.shape[1])
    there = torch.where(used > 0, places, -1)
    before = there.cummax(1).values
    highest = torch.where(before[:, -1] < 0, 0, before[:, -1] - bias)
    below = used.cumsum(1) - used
    least = (used.sum(1, keepdim=True) // _SHARE_BELOW).clamp_(min=_LEAST_BELOW)
    gap = (there[:, 1:] - before[:, :-1] > _GAP) & (before[:, :-1] >= 0)
    is_great = (gap & (below[:, 1:] >= least)).any(1)
    return highest, ~is_great & (highest <= _HIGH)


def has_gap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a sample of two matrices has numbers that are great by a gap, as masks leave them.

    Fewer than one in some hundreds may be missed, which are extremes of their rows.

    Args:
        one: the baseline's, of at most 32 bits, not empty.
        other: the target's, of the same shape.
    """
    stride = max(1, min(_STRIDE, one.numel() >> _FEW_SAMPLES))
    few, of_other = (t.reshape(-1)[::stride].unsqueeze(0) for t in (one, other))
    return _great_from(_binades((few, of_other), torch.float32), torch.float32)[0] < math.inf


def _greatest(pair: Pair) -> tuple[float, float]:
    """Return the greatest magnitude of each side; NaN or infinite where something is."""
    found = [torch.stack(torch.aminmax(t)).to(torch.float64).abs().amax() for t in pair]
    return float(found[0]), float(found[1])


def _binades(pair: Pair, dtype: torch.dtype) -> torch.Tensor:
    """Count the exponents that numbers have on both sides, of the smaller of two."""
    place, bits = _EXPONENT[dtype]
    counts = torch.zeros(1 << bits, dtype=torch.int64, device="cpu")
    for block in _cut(pair, _CHUNK):
        for x, y in block:
            counts += _exponents(x.to(dtype), y.to(dtype), place, 1 << bits)
    return counts


def _exponents(x: torch.Tensor, y: torch.Tensor, place: int, many: int) -> torch.Tensor:
    size = torch.minimum(x.abs(), y.abs()).reshape(-1)
    bits = size.view(dtype=torch.int32) if place == 23 else size.view(dtype=torch.int64)
    return torch.bincount((bits >> place) & (many - 1), minlength=many)


_exponents = scripted(_exponents)


def _great_from(counts: torch.Tensor, dtype: torch.dtype) -> tuple[float, int, int]:
    """Return from where on numbers are great by a gap, and how high others are, and all.

    It is 2^k where no number of both sides is within a factor of 8 below, and at least a 64th of
    all is below that: what masks add, or channels that are massive. Infinite where there is none.
    The heights are the exponents of the greatest.

    Args:
        counts: of the exponents, from `_binades`.
        dtype: whose exponents they are.
    """
    bias = (1 << _EXPONENT[dtype][1] - 1) - 1
    used = counts[:-1].tolist()  # the last is of what is not finite
    used[0] = 0  # zeros, and what is next to nothing
    there = [i for i, count in enumerate(used) if count]
    if not there:
        return math.inf, 0, 0
    least, below = max(_LEAST_BELOW, sum(used) // _SHARE_BELOW), 0
    highest = there[-1] - bias
    for low, high in itertools.pairwise(there):
        below += used[low]
        if high - low > _GAP and below >= least:
            return math.ldexp(1.0, high - bias), low - bias, highest
    return math.inf, highest, highest


def _sums_narrow(
    one: torch.Tensor,
    other: torch.Tensor,
    great: float,
    scale: float,
    outer: float,
    is_far: bool,
) -> torch.Tensor:
    """Return what `_sums` does, without scale; in float32 but for rows whose sums need more."""
    x, y = one.to(torch.float32), other.to(torch.float32)
    found = _sums(x, y, great, scale, outer, is_far, EXTREME)
    square, n = found[:, XX], found[:, N]
    is_held = found.isfinite().all(1) & (square >= _SAFE_SQUARE * n)
    if scale != 1.0:
        found *= torch.tensor(_units(scale, outer), dtype=torch.float64)
    if not bool(is_held.all()):
        _add_up_again(found, x, y, is_held, great)
    return found


def _add_up_again(
    found: torch.Tensor, x: torch.Tensor, y: torch.Tensor, is_held: torch.Tensor, great: float
) -> None:
    """Put in `found` the sums of rows that float32 does not hold."""
    at = (~is_held).nonzero().flatten()
    at = at[((x[at] != 0) | (y[at] != 0)).any(1)]
    if at.numel():
        found[at] = _sums(x[at].double(), y[at].double(), great, 1.0, 1.0, False, EXTREME)


def _sums(
    x: torch.Tensor,
    y: torch.Tensor,
    great: float,
    scale: float,
    outer: float,
    is_far: bool,
    extreme: float,
) -> torch.Tensor:
    """Return the columns of rows, of shape [rows, 11], float64.

    Args:
        x: the baseline's numbers, of shape [rows, n], float32 or float64.
        y: the target's.
        great: what is so far from zero on both sides is no part of its row.
        scale: what numbers are multiplied by, a power of two.
        outer: the same of extremes.
        is_far: whether these are added up in float64.
        extreme: times what a row usually holds, that an extreme is.
    """
    d = y - x
    n = torch.full_like(x[:, 0], float(x.size(1)))
    if not bool(torch.isfinite(d.sum())):
        used = torch.isfinite(x) & torch.isfinite(y)
        n = used.to(x.dtype).sum(1)
        x = x.masked_fill(~used, 0.0)
        y = y.masked_fill(~used, 0.0)
        d = y - x
    w = x.abs()
    sized = n  # how many are not zero, before small ones become it
    if bool(w.amin() == 0.0):
        sized = (w > 0.0).to(x.dtype).sum(1)
    unscaled_x = x
    unscaled_y = y
    if scale != 1.0:
        x = x * scale
        y = y * scale
        d = d * scale
        w = w * scale
    inner = d
    square = x.square()
    xx = square.sum(1)
    outer_sums = torch.zeros(x.size(0), 3, dtype=torch.float64)
    # No mean root is below (mean)^3 / (mean square)^2, by the convexity of norms' logarithms.
    mean = w.sum(1) / sized
    least = extreme * mean * (mean.square() / (xx / sized))
    has_great = great < float("inf")
    if has_great or not bool((w.amax(1) <= least).logical_or(sized == 0.0).all()):
        smaller = torch.minimum(w, y.abs())
        roots = w.sqrt()
        is_great = torch.zeros_like(w[:1])
        if has_great:
            is_great = (smaller >= great * scale).to(x.dtype)
            greats = is_great.sum(1)
            is_mixed = (greats < sized).to(x.dtype)  # else the row is great, and not a part of it
            is_great = is_great * is_mixed.unsqueeze(1)
            sized = sized - greats * is_mixed
            roots = roots * (1.0 - is_great)
        usual = (roots.sum(1) / sized.clamp(min=1.0)).square()
        is_extreme = (smaller > extreme * usual.unsqueeze(1)).to(x.dtype)
        is_extreme = torch.maximum(is_extreme, is_great)
        count = is_extreme.sum(1)
        if bool((count > 0.0).any()):
            outer_x = unscaled_x * is_extreme
            outer_y = unscaled_y * is_extreme
            if is_far:
                outer_x = outer_x.to(torch.float64)
                outer_y = outer_y.to(torch.float64)
            if outer != 1.0:
                outer_x = outer_x * outer
                outer_y = outer_y * outer
            outer_sums = torch.stack(
                [
                    outer_x.square().sum(1),
                    outer_y.square().sum(1),
                    (outer_y - outer_x).square().sum(1),
                ],
                1,
            ).to(torch.float64)
            n = n - count
            sized = sized - (is_extreme - is_great).sum(1)
            is_inner = 1.0 - is_extreme
            x = x * is_inner
            y = y * is_inner
            inner = d * is_inner
            square = x.square()
            xx = square.sum(1)
    root = (xx / sized.clamp(min=1.0)).sqrt()
    by_size = d.abs() / torch.maximum(w, root.unsqueeze(1))
    if bool((root == 0.0).any()):
        by_size = by_size.nan_to_num(0.0, float("inf"))
    sums = torch.stack(
        [
            xx,
            y.square().sum(1),
            (x * inner).sum(1),
            inner.square().sum(1),
            inner.sum(1),
            square.square().sum(1),
            n,
            by_size.amax(1),
        ],
        1,
    )
    return torch.cat([sums.to(torch.float64), outer_sums], 1)


_sums = scripted(_sums)
