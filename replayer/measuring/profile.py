"""Where the error of one pair lies, and which way it points: what tells rounding from a fault.

x is the baseline's element, y the target's, d is y - x. Of rounding, no row has an error as large
as itself, and the error has no direction: it is no multiple of x, and no constant.

whole     |d| / |x|, the root of a ratio of sums of squares, without extremes
extreme   the same of the extremes alone, 0 where there are none
row       the greatest |d| / max(|x|, |y|) of a row, without its extremes, or of these
typical   the median of that, over the rows that are not all zero
element   the greatest |d| of an element, over |x| or the root mean square of its row, or of the
          median row, whichever is larger
factor    y is this many times x, by least squares of y on x; see `_direction`
offset    y is x and this much

A row is an index of all dims but the last. Extremes are elements that on both sides are more than
16 times what their row usually holds, or greater than all else by a gap: a massive channel, an
attention sink, what a mask left. What is not finite takes no part in anything. A row that is small
beside the others, and off by no more than they are, is what was left when larger numbers cancelled:
it is no row of its own, where such rows are few. So is one of a gradient that is off by little more
than the others.

1. `_great_from` finds what masks left.
2. `_added` adds up each row, chunk by chunk; `_sums` does a chunk.
3. `_judged` and `_fitted` judge what was added up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from recorder.scripting import scripted

from .elements import as_numbers

_MOST_ROWS = 1 << 22
_CHUNK = 1 << 17  # elements worked on at once; as float64 they stay in a processor's cache
_EXTREME = 16.0  # times what a row usually holds, which is the square of its mean root
_GAP = 3  # binades without a number, below what is great
_BELOW = 16  # numbers below it at least; of fewer, some are far from the next by chance
_BINADES, _BIAS = 1 << 11, 1023  # of float64, by its bits
_SAFE = (2.0**-200, 2.0**200)  # fourth powers of numbers between these add up in float64
_SMALL = 0.75  # of the median row's root mean square
_SMALL_ERROR = 4.0  # times the error of the others
_MASSIVE = 4.0  # times the median row's root mean square
_FAR = 0.9  # of a row's size: so many of the rows may be left of larger numbers, where rows have
_FEW, _FEW_OF_SHORT, _SHORT = 1 / 16, 1 / 2, 16  # as many elements, and where fewer
_LEFT_OF_GRADIENT = 20.0  # times the median row's error, of gradients, whatever the row's size
_ODD, _ODD_GRADIENT = 12.0, 100.0  # times the median row's error, that a row's own direction has
_ODD_LONG, _LONG = 4.0, 64  # the same of rows of so many numbers
_UNITS = 4.0  # of rounding at the median row's size, that a small row may be off by
_SHARE = 0.9  # of |d|^2 that a direction explains, of an index or a row
_SHARE_OF_ALL = 0.3  # the same of the whole: of many rows, the errors do not agree by chance
_LEAST = 8  # numbers that a direction is told by
_LEAST_LEFT = 1e-12  # of |d|^2, that any direction leaves
_ODDS = 30.0  # natural logarithm of the odds against a direction by chance

# Columns of what is added up, of a row
XX, YY, XD, DD, D, X4, N, XX_EXTREME, YY_EXTREME, DD_EXTREME, ELEMENT = range(11)


@dataclass(frozen=True)
class Profile:
    """Of one pair of tensors; see the module's docstring.

    Attributes:
        whole: relative error.
        extreme: relative error of the extremes.
        row: greatest relative error of a row.
        row_at: that row's index, -1 for the dims that it goes along; None without an error.
        typical: median relative error of the rows.
        element: greatest relative error of an element.
        factor: what x is multiplied by, None where none fits.
        offset: what is added to x, None where none fits.
        along: the place in which one of these two fits, -1 for whole dims.
    """

    whole: float = 0.0
    extreme: float = 0.0
    row: float = 0.0
    row_at: tuple[int, ...] | None = None
    typical: float = 0.0
    element: float = 0.0
    factor: float | None = None
    offset: float | None = None
    along: tuple[int, ...] | None = None


def profile(
    a: torch.Tensor, b: torch.Tensor, eps: float, unit: float, *, is_gradient: bool = False
) -> Profile:
    """Return where the error of a pair lies.

    Args:
        a: the baseline's tensor, on the CPU, of a floating or complex dtype.
        b: the target's, of the same shape.
        eps: the unit of rounding: of the coarser dtype, the step from 1 to the next number.
        unit: a factor no further from 1 than this is none; and no offset is that small, by the
            root mean square.
        is_gradient: whether rows are sums of larger numbers, as those of gradients are.
    """
    dims = a.dim()
    if a.is_complex() or b.is_complex():
        a, b = (torch.view_as_real(as_numbers(t).to(torch.complex128)) for t in (a, b))
    if not a.numel():
        return Profile()
    leading = _leading(a.shape, dims)
    rows = math.prod(leading)
    one, other = (as_numbers(t.detach()).reshape(rows, -1) for t in (a, b))
    great, most = _great_from(one, other)
    exponent = max(-1000, min(1000, -math.frexp(most or 1.0)[1]))
    scale = 1.0 if _SAFE[0] < most < _SAFE[1] else math.ldexp(1.0, exponent)
    sums = _added(one, other, great, scale)
    rest = (-1,) * (dims - len(leading))
    judged = _judged(sums, eps, is_gradient)
    at = int(judged.error.argmax())
    row = float(judged.error[at])
    whole, extreme = sums.sum(0), sums[:, [XX_EXTREME, DD_EXTREME]].sum(0)
    found = _fitted(sums, judged, leading, unit, is_gradient)
    return Profile(
        _relative(whole[DD], whole[XX]),
        _relative(extreme[1], extreme[0]),
        row,
        (*_unravelled(at, leading), *rest) if row else None,
        judged.typical,
        float(judged.element.max()),
        found.factor,
        None if found.offset is None else found.offset / scale,
        None if found.along is None else (*found.along, *rest),
    )


def _leading(sizes: Sequence[int], dims: int) -> tuple[int, ...]:
    """Return the sizes of the dims whose indices are rows."""
    keep = max(0, dims - 1)
    while math.prod(sizes[:keep]) > _MOST_ROWS:
        keep -= 1
    return tuple(sizes[:keep])


def _unravelled(index: int, sizes: Sequence[int]) -> tuple[int, ...]:
    found = []
    for size in reversed(sizes):
        index, at = divmod(index, size)
        found.append(at)
    return tuple(found[::-1])


def _relative(error: torch.Tensor, size: torch.Tensor) -> float:
    """Return the root of a ratio of sums of squares; infinite where something is off nothing."""
    if not error:
        return 0.0
    return math.sqrt(float(error / size)) if size else math.inf


def _great_from(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Return from where on numbers are great by a gap, and the greatest of all.

    It is 2^k where no number of both sides is within a factor of 8 below, and at least a 64th of
    all is below that: what masks add, or channels that are massive. Infinite where there is none.
    """
    counts = torch.zeros(_BINADES, dtype=torch.int64, device="cpu")
    most = 0.0
    for x, y in _flat(one, other):
        size = torch.minimum(x.abs(), y.abs())
        size.masked_fill_(~size.isfinite(), 0.0)
        most = max(most, float(size.amax()))
        counts += torch.bincount(size.view(torch.int64) >> 52, minlength=_BINADES)
    counts[0] = 0  # zeros, and what is next to nothing
    there = counts.nonzero().flatten().tolist()
    below, total = 0, int(counts.sum())
    for low, high in itertools.pairwise(there):
        below += int(counts[low])
        if high - low > _GAP and below >= max(_BELOW, total // 64):
            return math.ldexp(1.0, high - _BIAS), most
    return math.inf, most


def _flat(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for x, y in zip(*(t.reshape(-1).split(_CHUNK) for t in (one, other)), strict=True):
        yield x.to(torch.float64), y.to(torch.float64)


def _added(one: torch.Tensor, other: torch.Tensor, great: float, scale: float) -> torch.Tensor:
    """Return what `_sums` finds of each row, of shape [rows, 11]; of long rows, part by part."""
    rows, n = one.shape
    each = max(1, _CHUNK // n)
    found = []
    for i in range(0, rows, each):
        parts = [
            _sums(x.to(torch.float64), y.to(torch.float64), great, scale, _EXTREME)
            for x, y in zip(*(t[i : i + each].split(_CHUNK, 1) for t in (one, other)), strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            most = torch.maximum(total[:, ELEMENT], part[:, ELEMENT])
            total = total + part
            total[:, ELEMENT] = most
        found.append(total)
    return torch.cat(found)


def _sums(
    x: torch.Tensor, y: torch.Tensor, great: float, scale: float, extreme: float
) -> torch.Tensor:
    """Return the columns of rows, of shape [rows, 11], of x and y in float64, [rows, n]."""
    used = torch.isfinite(x) & torch.isfinite(y)
    if not bool(used.all()):
        x = x.masked_fill(~used, 0.0)
        y = y.masked_fill(~used, 0.0)
    if scale != 1.0:
        x = x * scale
        y = y * scale
    d = y - x
    w = x.abs()
    is_great = (w >= great * scale) & (y.abs() >= great * scale)
    is_mixed = ((w > 0.0) & ~is_great).any(1)  # else the row is great, and not a part of it
    is_great = is_great & is_mixed.unsqueeze(1)
    is_sized = (w > 0.0) & ~is_great
    sized = is_sized.sum(1)
    roots = w.sqrt().masked_fill(~is_sized, 0.0).sum(1)
    most = (roots / sized.clamp(min=1)).square().unsqueeze(1) * extreme
    n = used.sum(1)
    inner = d
    xx_extreme = torch.zeros_like(d[:, 0])
    yy_extreme = xx_extreme
    dd_extreme = xx_extreme
    is_extreme = is_great | ((w > most) & (y.abs() > most) & is_sized)
    if bool(is_extreme.any()):
        outer = is_extreme.to(torch.float64)
        xx_extreme = (x * outer).square().sum(1)
        yy_extreme = (y * outer).square().sum(1)
        dd_extreme = (d * outer).square().sum(1)
        n = n - is_extreme.sum(1)
        sized = sized - (is_extreme & ~is_great).sum(1)
        x = x.masked_fill(is_extreme, 0.0)
        y = y.masked_fill(is_extreme, 0.0)
        inner = d.masked_fill(is_extreme, 0.0)
    square = x.square()
    xx = square.sum(1)
    root = (xx / sized.clamp(min=1)).sqrt().unsqueeze(1)
    by_size = (d.abs() / torch.maximum(w, root)).nan_to_num(0.0, float("inf"))
    return torch.stack(
        [
            xx,
            y.square().sum(1),
            (x * inner).sum(1),
            inner.square().sum(1),
            inner.sum(1),
            square.square().sum(1),
            n.to(torch.float64),
            xx_extreme,
            yy_extreme,
            dd_extreme,
            by_size.amax(1),
        ],
        1,
    )


_sums = scripted(_sums)


class _Rows(NamedTuple):
    """What the rows came to: `error` and `element` of each, 0 for what cancelling left."""

    error: torch.Tensor
    element: torch.Tensor
    typical: float


def _judged(sums: torch.Tensor, eps: float, is_gradient: bool) -> _Rows:
    """Return the relative errors of rows, given their sums, of shape [rows, 11]."""
    square = torch.maximum(sums[:, XX], sums[:, YY])
    error = (sums[:, DD] / square).sqrt().nan_to_num(0.0)
    there = square > 0
    if not bool(there.any()):
        return _Rows(error, sums[:, ELEMENT], 0.0)
    n = sums[:, N].clamp(min=1)
    large, off = (square / n).sqrt(), (sums[:, DD] / n).sqrt()
    usual, usually = (float(values[there].median()) for values in (large, off))
    if is_gradient:
        left = off <= max(_LEFT_OF_GRADIENT * usually, _UNITS * eps * usual)
    else:
        is_short = sums[:, N] < _SHORT  # one large error in it is not made up for by others
        twice = is_short.to(torch.float64) + 1
        near = off <= twice * _SMALL_ERROR * _of_others(sums, large, usual)
        left = (large <= twice * _SMALL * usual) & near
        far = left & (error > _FAR)
        most = _FEW if sums[:, N].sum() >= _SHORT * len(sums) else _FEW_OF_SHORT
        if int(far.sum()) > most * int(there.sum()):  # many rows are a part of their own
            left &= ~far
    typical = float(error[there].median())
    # An element of a small row is small beside those of others, too.
    element = sums[:, ELEMENT] * (large / usual).clamp(max=1.0)
    error, element = error.masked_fill(left, 0.0), element.masked_fill(left, 0.0)
    if not is_gradient:  # whose extremes are left of larger numbers, too
        size = torch.maximum(sums[:, XX_EXTREME], sums[:, YY_EXTREME])
        error = torch.maximum(error, (sums[:, DD_EXTREME] / size).sqrt().nan_to_num(0.0))
    return _Rows(error, element, typical)


def _of_others(sums: torch.Tensor, large: torch.Tensor, usual: float) -> torch.Tensor:
    """Return the root mean square of the error beside each row, of rows that are not massive."""
    taking_part = (large <= _MASSIVE * usual).to(torch.float64)
    dd, n = sums[:, DD] * taking_part, sums[:, N] * taking_part
    return ((dd.sum() - dd) / (n.sum() - n).clamp(min=1)).clamp(min=0.0).sqrt()


class _Fit(NamedTuple):
    """A factor or an offset, and the place where it fits, in the dims of rows."""

    factor: float | None = None
    offset: float | None = None
    along: tuple[int, ...] | None = None


def _fitted(
    sums: torch.Tensor, rows: _Rows, leading: tuple[int, ...], unit: float, is_gradient: bool
) -> _Fit:
    """Return the factor or offset that explains an error: of all, of an index of one dim, or a row.

    Of those the first that fits, and of indices and rows the one that explains most. Where few
    numbers made a row, such as the gradient of a query that two keys answer, its error is a
    multiple of it. So a row counts where it is far more off than the rest, and of gradients so does
    an index.
    """
    odd: torch.Tensor | float = _ODD_GRADIENT
    odds = _ODDS + math.log(1 + sum(leading) + len(sums))
    of_all = _SHARE if is_gradient else _SHARE_OF_ALL
    found = _direction(sums.unsqueeze(0), unit, odds, of_all)
    if found is not None:
        return found.fit._replace(along=(-1,) * len(leading))
    best: tuple[float, _Fit] = (0.0, _Fit())
    shaped = sums.reshape(*leading, sums.shape[1])
    several = [dim for dim, size in enumerate(leading) if size > 1]
    for dim in several if len(several) > 1 else ():
        places = shaped.movedim(dim, 0).reshape(leading[dim], -1, sums.shape[1])
        found = _direction(places, unit, odds, _SHARE)
        if found is not None and found.explained > best[0]:
            if is_gradient and found.error <= odd * rows.typical:
                continue
            along = tuple(found.place if i == dim else -1 for i in range(len(leading)))
            best = found.explained, found.fit._replace(along=along)
    if best[1].along is not None or not leading:
        return best[1]
    if not is_gradient:
        like = sums[:, XX].square() / sums[:, X4]
        odd = torch.where(like >= _LONG, _ODD_LONG, _ODD)
    kept = sums * (rows.error > odd * rows.typical).unsqueeze(1)
    found = _direction(kept.unsqueeze(1), unit, odds, _SHARE)
    if found is None:
        return _Fit()
    return found.fit._replace(along=_unravelled(found.place, leading))


class _Found(NamedTuple):
    """The place of the strongest direction, what of |d|^2 it explains, its error, what it is."""

    place: int
    explained: float
    error: float
    fit: _Fit


def _direction(places: torch.Tensor, unit: float, odds: float, least: float) -> _Found | None:
    """Return the strongest factor or offset that some places have.

    The error of a row points along x (or along a constant) by the cosine c of the angle between the
    two. Of m numbers of no direction, it comes by chance with odds below (1 - c^2)^((m-1)/2), the
    share of a sphere that its cap has. m counts as few where few of x are large, (sum x^2)^2 over
    sum x^4. The odds of a place are those of its rows together, with one factor for all.

    Args:
        places: the sums of each place's rows, of shape [places, rows, 11].
        unit: what a factor is further from 1 than.
        odds: the logarithm of the odds that are no chance.
        least: how much of |d|^2 a direction is to explain.
    """
    sums = places.sum(1)
    xx, dd, n = sums[:, XX], sums[:, DD], sums[:, N]
    row_x, row_d = places[..., XX], places[..., DD]
    factor, offset = sums[:, XD] / xx, sums[:, D] / n
    f, o = factor.unsqueeze(1), offset.unsqueeze(1)
    rest_x = row_d - 2 * f * places[..., XD] + f.square() * row_x
    rest_1 = row_d - 2 * o * places[..., D] + o.square() * places[..., N]
    like = (row_x.square() / places[..., X4]).nan_to_num(0.0)
    fits_x = (factor.abs() > unit) & _is_no_chance(rest_x, row_d, like, odds)
    large = offset.abs() > unit * (xx / n).sqrt()
    fits_1 = large & _is_no_chance(rest_1, row_d, places[..., N], odds)
    share_x = (sums[:, XD].square() / (xx * dd)).nan_to_num(0.0) * fits_x
    share_1 = (sums[:, D].square() / (n * dd)).nan_to_num(0.0) * fits_1
    share = torch.maximum(share_x, share_1)
    explained = share * dd * (share >= least)
    place = int(explained.argmax())
    if not explained[place]:
        return None
    if share_x[place] >= share_1[place]:
        fit = _Fit(1 + float(factor[place]), None)
    else:
        fit = _Fit(None, float(offset[place]))
    error = math.sqrt(float(dd[place] / xx[place]))
    return _Found(place, float(explained[place]), error, fit)


def _is_no_chance(
    rest: torch.Tensor, error: torch.Tensor, m: torch.Tensor, odds: float
) -> torch.Tensor:
    """Whether a direction leaves too little of the rows' errors, of shape [places, rows]."""
    left = (rest / error).nan_to_num(1.0).clamp(min=_LEAST_LEFT)
    m = m * (error > 0)
    evidence = -0.5 * ((m - 1).clamp(min=0.0) * left.log()).sum(1)
    # All rows as one: where they are short, and of one size.
    whole = (rest.sum(1) / error.sum(1)).nan_to_num(1.0).clamp(min=_LEAST_LEFT)
    sized = m * error
    alike = (sized.sum(1) / error.amax(1)).nan_to_num(0.0)
    evidence = torch.maximum(evidence, -0.5 * (alike - 1).clamp(min=0.0) * whole.log())
    return (m.sum(1) >= _LEAST) & (evidence > odds)
