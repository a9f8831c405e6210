"""Where the errors of many small pairs lie, as `profile` has it of one, all pairs at once.

Rows are added up and judged together. A pair in which masks left numbers, or numbers are far from
1, goes the way of single pairs; so does what was added up of one where a factor or an offset may
explain part of the error, which few rounding errors let think.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .measures import units
from .profile import (
    FAR,
    FEW,
    FEW_OF_SHORT,
    LEAST,
    LEAST_LEFT,
    LEFT_OF_GRADIENT,
    LEFT_OF_Y,
    LONG,
    MASSIVE,
    MOST_ROWS,
    ODD,
    ODD_GRADIENT,
    ODD_LONG,
    SHARE,
    SHARE_OF_ALL,
    SHORT,
    SMALL,
    SMALL_ERROR,
    UNITS,
    Added,
    Profile,
    as_row,
    judged,
    leading_of,
    profile,
    profile_of,
    relative,
    relative_of_rows,
)
from .rows import DD, DD_EXTREME, X4, XD, XX, XX_EXTREME, YY, D, N, sums_of_pairs

_LESS = 1 - 1e-9  # what a direction may explain is less than `profile` asks for by this

Columns = dict[str, list[Any]]


def profiles(a: torch.Tensor, b: torch.Tensor, which: torch.Tensor, is_gradient: bool) -> Columns:
    """Return where the errors of pairs lie, as columns of `as_row`, a place as a row's number.

    Args:
        a: the baselines', of shape [pairs, ...], on the CPU, of float32 or floats of 16 bits.
        b: the targets', of the same shape and dtype.
        which: of which pairs, of shape [pairs]; the others have None.
        is_gradient: whether rows are sums of larger numbers.
    """
    at = which.nonzero().flatten()
    if len(at) == len(a):
        return _profiles(a, b, is_gradient)
    found: Columns = {name: [None] * len(a) for name in as_row(Profile())}
    for name, values in (_profiles(a[at], b[at], is_gradient) if len(at) else {}).items():
        for i, value in zip(at.tolist(), values, strict=True):
            found[name][i] = value
    return found


def _profiles(a: torch.Tensor, b: torch.Tensor, is_gradient: bool) -> Columns:
    pairs, shape = len(a), a.shape[1:]
    eps, unit = units(a.dtype, b.dtype)
    leading = leading_of(shape, len(shape), MOST_ROWS)
    rows = pairs * math.prod(leading)
    sums, is_known = sums_of_pairs(a.reshape(rows, -1), b.reshape(rows, -1), pairs)
    errors, elements, typical, is_judged = _judged(sums, eps, is_gradient)
    for i in (is_known & ~is_judged).nonzero().flatten().tolist():
        errors[i], elements[i], typical[i] = judged(sums[i], eps, is_gradient)
    row, at = errors.max(1)
    whole = sums.sum(1).unbind(1)
    places = [
        place if is_off else None
        for place, is_off in zip(at.tolist(), (row > 0).tolist(), strict=True)
    ]
    columns: Columns = {
        "error": list(map(relative, whole[DD].tolist(), whole[XX].tolist())),
        "error_extreme": list(
            map(relative, whole[DD_EXTREME].tolist(), whole[XX_EXTREME].tolist())
        ),
        "error_row": row.tolist(),
        "error_row_at": places,
        "error_typical": typical.tolist(),
        "error_element": elements.amax(1).tolist(),
        "factor": [None] * pairs,
        "offset": [None] * pairs,
        "fits_at": [None] * pairs,
    }
    may_fit = _may_fit(sums, errors, typical, leading, unit, is_gradient)
    for i in (may_fit | ~is_known).nonzero().flatten().tolist():
        if is_known[i]:
            found = profile_of(Added(sums[i], leading, len(shape), 1.0), eps, unit, is_gradient)
        else:
            found = profile(a[i], b[i], eps, unit, is_gradient=is_gradient)
        for name, value in as_row(found).items():
            columns[name][i] = value
        if found.row_at is not None:
            columns["error_row_at"][i] = _raveled(found.row_at, leading)
    return columns


def _raveled(place: Sequence[int], sizes: Sequence[int]) -> int:
    """Return the number of a row, given its place and the sizes of the dims that it is one of."""
    at = 0
    for index, size in zip(place[: len(sizes)], sizes, strict=True):
        at = at * size + index
    return at


def _judged(
    sums: torch.Tensor, eps: float, is_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `judged` does of each pair, and of which: those without a row of zeros.

    Args:
        sums: of shape [pairs, rows, 11].
        eps: the unit of rounding.
        is_gradient: whether rows are sums of larger numbers.

    Returns:
        The relative errors of rows and of their elements, of shape [pairs, rows], the rows' median
        error, of shape [pairs], and of which pairs they are known, likewise.
    """
    xx, yy, _xd, dd, _d, x4, n, element, xx_extreme, yy_extreme, dd_extreme = sums.unbind(2)
    square = torch.maximum(xx, yy)
    error = relative_of_rows(dd, square)
    m = n.clamp(min=1)
    large = (square / m).sqrt()
    off = (dd / m).sqrt()
    usual = large.median(1, keepdim=True).values
    if is_gradient:
        times = LEFT_OF_GRADIENT * (1 + 2 * (xx.square() < LEAST * x4).to(torch.float64))
        most = times * off.median(1, keepdim=True).values
        left = off <= torch.maximum(most, UNITS * eps * usual)
    else:
        twice = (n < SHORT).to(torch.float64) + 1
        left = large <= twice * SMALL * usual
        if bool(left.any()):
            taking_part = (large <= MASSIVE * usual).to(torch.float64)
            others_dd, others_n = dd * taking_part, n * taking_part
            others_dd = (others_dd.sum(1, keepdim=True) - others_dd).clamp(min=0.0)
            others_n = (others_n.sum(1, keepdim=True) - others_n).clamp(min=1.0)
            left = left & (off <= twice * SMALL_ERROR * (others_dd / others_n).sqrt())
            is_far = left & (error > FAR)
            is_long = n.sum(1) >= SHORT * n.shape[1]
            few = torch.where(is_long, FEW, FEW_OF_SHORT) * n.shape[1]
            left = left & ~(is_far & (is_far.sum(1) > few).unsqueeze(1))
    typical = error.median(1).values
    element = element * (large / usual).nan_to_num(1.0).clamp(max=1.0)
    error, element = error.masked_fill(left, 0.0), element.masked_fill(left, 0.0)
    if not is_gradient:
        outer = relative_of_rows(dd_extreme, torch.maximum(xx_extreme, yy_extreme))
        error = torch.maximum(error, outer)
    return error, element, typical, (square > 0).all(1)


def _may_fit(
    sums: torch.Tensor,
    errors: torch.Tensor,
    typical: torch.Tensor,
    leading: Sequence[int],
    unit: float,
    is_gradient: bool,
) -> torch.Tensor:
    """Return of which pairs a factor or an offset may explain an error, of shape [pairs]."""
    is_off = (sums[..., DD] > _LESS * unit**2 * sums[..., XX]).any(1)
    if not bool(is_off.any()):
        return is_off
    found = _points(sums.sum(1), unit, SHARE if is_gradient else SHARE_OF_ALL)
    for places in _by_dim(sums, leading):
        found |= _points(places, unit, SHARE).any(1)
    odd: torch.Tensor | float = ODD_GRADIENT
    if not is_gradient:
        odd = torch.where(sums[..., XX].square() / sums[..., X4] >= LONG, ODD_LONG, ODD)
    is_odd = errors > _LESS * odd * typical.unsqueeze(1)
    if leading and bool(is_odd.any()):
        found |= (is_odd & _points(sums, unit, SHARE)).any(1)
    return is_off & found


def _by_dim(sums: torch.Tensor, leading: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield the sums of the indices of each of several dims, of shape [pairs, size, 11]."""
    several = [dim for dim, size in enumerate(leading) if size > 1]
    shaped = sums.reshape(len(sums), *leading, sums.shape[-1])
    for dim in several if len(several) > 1 else ():
        places = shaped.movedim(dim + 1, 1).reshape(len(sums), leading[dim], -1, sums.shape[-1])
        yield places.sum(2)


def _points(sums: torch.Tensor, unit: float, least: float) -> torch.Tensor:
    """Return whether an error may have a direction, as `candidates` of `profile` has it, or nearly.

    Args:
        sums: of shape [..., 11].
        unit: what a factor is further from 1 than.
        least: how much of |d|^2 a direction is to explain.
    """
    xx, yy, xd, dd, d, n = (sums[..., column] for column in (XX, YY, XD, DD, D, N))
    share_x = xd.square() / (xx * dd)
    share_1 = d.square() / (n * dd)
    least, unit = least * _LESS, unit * _LESS
    is_of_x = (1 - share_x) * dd * _LESS <= LEFT_OF_Y * yy + LEAST_LEFT * dd
    fits_x = (share_x >= least) & (xd.abs() > unit * xx) & is_of_x
    fits_1 = (share_1 >= least) & (d.abs() > unit * (xx * n).sqrt())
    return fits_x | fits_1
