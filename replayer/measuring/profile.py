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

`rows` adds up each row; `judged` and `_fitted` judge what was added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch

from recorder.scripting import scripted

from .chunks import Map
from .elements import as_numbers, unravelled
from .rows import DD, DD_EXTREME, X4, XD, XX, XX_EXTREME, D, N, add_up

MOST_ROWS = 1 << 22
SMALL = 0.75  # of the median row's root mean square
SMALL_ERROR = 4.0  # times the error of the others
MASSIVE = 4.0  # times the median row's root mean square
FAR = 0.9  # of a row's size: so many of the rows may be left of larger numbers, where rows have
FEW, FEW_OF_SHORT, SHORT = 1 / 16, 1 / 2, 16  # as many elements, and where fewer
LEFT_OF_GRADIENT = 20.0  # times the median row's error, of gradients, whatever the row's size
ODD, ODD_GRADIENT = 12.0, 100.0  # times the median row's error, that a row's own direction has
ODD_LONG, LONG = 4.0, 64  # the same of rows of so many numbers
UNITS = 4.0  # of rounding at the median row's size, that a small row may be off by
SHARE = 0.9  # of |d|^2 that a direction explains, of an index or a row
SHARE_OF_ALL = 0.3  # the same of the whole: of many rows, the errors do not agree by chance
LEAST = 8 - 1e-3  # numbers that a direction is told by, which are not added up exactly
LEFT_OF_Y = 0.5  # of |y|^2, that a factor may leave
LEAST_LEFT = 1e-12  # of |d|^2, that any direction leaves
_ODDS = 30.0  # natural logarithm of the odds against a direction by chance


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


class ProfileRow(TypedDict):
    """A profile as a table has it; `error_row_at` and `fits_at` are `row_at` and `along`."""

    error: float
    error_extreme: float
    error_row: float
    error_row_at: list[int] | None
    error_typical: float
    error_element: float
    factor: float | None
    offset: float | None
    fits_at: list[int] | None


def as_row(found: Profile) -> ProfileRow:
    """Return a profile as a part of a table's row."""
    return {
        "error": found.whole,
        "error_extreme": found.extreme,
        "error_row": found.row,
        "error_row_at": None if found.row_at is None else list(found.row_at),
        "error_typical": found.typical,
        "error_element": found.element,
        "factor": found.factor,
        "offset": found.offset,
        "fits_at": None if found.along is None else list(found.along),
    }


def profile(
    a: torch.Tensor,
    b: torch.Tensor,
    eps: float,
    unit: float,
    *,
    is_gradient: bool = False,
    run: Map = map,
) -> Profile:
    """Return where the error of a pair lies.

    Args:
        a: the baseline's tensor, on the CPU, of a floating or complex dtype.
        b: the target's, of the same shape.
        eps: the unit of rounding: of the coarser dtype, the step from 1 to the next number.
        unit: a factor no further from 1 than this is none; and no offset is that small, by the
            root mean square.
        is_gradient: whether rows are sums of larger numbers, as those of gradients are.
        run: like `map`, over parts of the tensors, perhaps on several threads.
    """
    if not a.numel():
        return Profile()
    return profile_of(added_up(a, b, run), eps, unit, is_gradient)


class Added(NamedTuple):
    """What the rows of a pair add up to.

    Attributes:
        sums: of each row, of shape [rows, 11], float64; its columns are those of `rows`.
        leading: sizes of the dims whose indices are rows.
        dims: how many dims there are.
        scale: what numbers were multiplied by for them.
    """

    sums: torch.Tensor
    leading: tuple[int, ...]
    dims: int
    scale: float


def added_up(a: torch.Tensor, b: torch.Tensor, run: Map = map, most_rows: int = MOST_ROWS) -> Added:
    """Add up the rows of a pair, of at least one element.

    Args:
        a: the baseline's tensor, on the CPU, of a floating or complex dtype.
        b: the target's, of the same shape.
        run: like `map`, over parts of the tensors, perhaps on several threads.
        most_rows: where there are more, a row is an index of fewer dims.
    """
    dims = a.dim()
    if a.is_complex() or b.is_complex():
        a, b = (torch.view_as_real(as_numbers(t).to(torch.complex128)) for t in (a, b))
    leading = leading_of(a.shape, dims, most_rows)
    rows = math.prod(leading)
    one, other = (as_numbers(t.detach()).reshape(rows, -1) for t in (a, b))
    sums, scale = add_up(one, other, run)
    return Added(sums, leading, dims, scale)


def profile_of(added: Added, eps: float, unit: float, is_gradient: bool) -> Profile:
    """Return where the error of a pair lies, given what its rows add up to; see `profile`."""
    sums, leading = added.sums, added.leading
    rest = (-1,) * (added.dims - len(leading))
    errors, elements, typical = judged(sums, eps, is_gradient)
    at = int(errors.argmax())
    row = float(errors[at])
    whole = sums.sum(0).tolist()
    found = _fitted(sums, errors, typical, leading, unit, is_gradient)
    return Profile(
        relative(whole[DD], whole[XX]),
        relative(whole[DD_EXTREME], whole[XX_EXTREME]),
        row,
        (*unravelled(at, leading), *rest) if row else None,
        typical,
        float(elements.max()),
        found.factor,
        None if found.offset is None else found.offset / added.scale,
        None if found.along is None else (*found.along, *rest),
    )


def leading_of(sizes: Sequence[int], dims: int, most_rows: int) -> tuple[int, ...]:
    """Return the sizes of the dims whose indices are rows."""
    keep = max(0, dims - 1)
    while math.prod(sizes[:keep]) > most_rows:
        keep -= 1
    return tuple(sizes[:keep])


def relative(error: float, size: float) -> float:
    """Return the root of a ratio of sums of squares; infinite where something is off nothing."""
    if not error:
        return 0.0
    return math.sqrt(error / size) if size and error < math.inf else math.inf


def relative_of_rows(error: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Return the same as `relative` of each row, 0 of one without size."""
    found = (error / size).sqrt().nan_to_num(0.0, float("inf"))
    return found.masked_fill(error.isinf(), float("inf"))


relative_of_rows = scripted(relative_of_rows)


def judged(
    sums: torch.Tensor,
    eps: float,
    is_gradient: bool,
    of_gradient: float = LEFT_OF_GRADIENT,
    few_numbers: float = LEAST,
    units: float = UNITS,
    short: int = SHORT,
    small: float = SMALL,
    small_error: float = SMALL_ERROR,
    far: float = FAR,
    few: float = FEW,
    few_of_short: float = FEW_OF_SHORT,
    massive: float = MASSIVE,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the relative errors of rows and of their elements, and the rows' median error.

    Args:
        sums: the rows', of shape [rows, 11]. What larger numbers left when they cancelled has no
            error, of itself and of its elements.
        eps: the unit of rounding.
        is_gradient: whether rows are sums of larger numbers.

    What else it is given are this module's constants, which compiled code does not see.
    """
    xx, yy, _xd, dd, _d, x4, n, element, xx_extreme, yy_extreme, dd_extreme = sums.unbind(1)
    square = torch.maximum(xx, yy)
    error = relative_of_rows(dd, square)
    there = square > 0
    if not bool(there.any()):
        return error, element, 0.0
    m = n.clamp(min=1)
    large = (square / m).sqrt()
    off = (dd / m).sqrt()
    usual = float(large[there].median())
    if is_gradient:
        # What few numbers make comes out further off, once in a while.
        times = of_gradient * (1 + 2 * (xx.square() < few_numbers * x4).to(torch.float64))
        left = off <= (times * float(off[there].median())).clamp(min=units * eps * usual)
    else:
        twice = (n < short).to(torch.float64) + 1  # one large error is not made up for by others
        left = large <= twice * small * usual
        if bool(left.any()):
            # The root mean square of the error beside each row, of rows that are not massive.
            taking_part = (large <= massive * usual).to(torch.float64)
            others_dd = dd * taking_part
            others_n = n * taking_part
            others_dd = (others_dd.sum() - others_dd).clamp(min=0.0)
            others_n = (others_n.sum() - others_n).clamp(min=1.0)
            left = left & (off <= twice * small_error * (others_dd / others_n).sqrt())
            is_far = left & (error > far)
            most = few if float(n.sum()) >= short * n.size(0) else few_of_short
            if int(is_far.sum()) > most * int(there.sum()):  # many rows are a part of their own
                left = left & ~is_far
    typical = float(error[there].median())
    # An element of a small row is small beside those of others, too.
    element = element * (large / usual).nan_to_num(1.0).clamp(max=1.0)
    error = error.masked_fill(left, 0.0)
    element = element.masked_fill(left, 0.0)
    if not is_gradient:  # whose extremes are left of larger numbers, too
        outer = relative_of_rows(dd_extreme, torch.maximum(xx_extreme, yy_extreme))
        error = torch.maximum(error, outer)
    return error, element, typical


judged = scripted(judged)


class _Fit(NamedTuple):
    """A factor or an offset, and the place where it fits, in the dims of rows."""

    factor: float | None = None
    offset: float | None = None
    along: tuple[int, ...] | None = None


def _fitted(
    sums: torch.Tensor,
    errors: torch.Tensor,
    typical: float,
    leading: tuple[int, ...],
    unit: float,
    is_gradient: bool,
) -> _Fit:
    """Return the factor or offset that explains an error: of all, of an index of one dim, or a row.

    Of those the first that fits, and of indices and rows the one that explains most. Where few
    numbers made a row, such as the gradient of a query that two keys answer, its error is a
    multiple of it. So a row counts where it is far more off than the rest, and of gradients so does
    an index.
    """
    if not bool((sums[:, DD] > unit**2 * sums[:, XX]).any()):
        return _Fit()  # no part of an error is larger than it
    odd: torch.Tensor | float = ODD_GRADIENT
    odds = _ODDS + math.log(1 + sum(leading) + len(sums))
    of_all = SHARE if is_gradient else SHARE_OF_ALL
    found = _direction(sums.unsqueeze(0), unit, odds, of_all)
    if found is not None:
        return found.fit._replace(along=(-1,) * len(leading))
    best: tuple[float, _Fit] = (0.0, _Fit())
    shaped = sums.reshape(*leading, sums.shape[1])
    several = [dim for dim, size in enumerate(leading) if size > 1]
    for dim in several if len(several) > 1 else ():
        places = shaped.movedim(dim, 0).reshape(leading[dim], -1, sums.shape[1])
        found = _direction(places, unit, odds, SHARE)
        if found is not None and found.explained > best[0]:
            if is_gradient and found.error <= odd * typical:
                continue
            along = tuple(found.place if i == dim else -1 for i in range(len(leading)))
            best = found.explained, found.fit._replace(along=along)
    if best[1].along is not None or not leading:
        return best[1]
    if not is_gradient:
        like = sums[:, XX].square() / sums[:, X4]
        odd = torch.where(like >= LONG, ODD_LONG, ODD)
    at = (errors > odd * typical).nonzero().flatten()
    found = _direction(sums[at].unsqueeze(1), unit, odds, SHARE)
    if found is None:
        return _Fit()
    return found.fit._replace(along=(*unravelled(int(at[found.place]), leading),))


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
    at, shares = candidates(places, unit, least)
    if not at.numel():  # as a rule
        return None
    places, (share_x, share_1) = places[at], shares
    sums = places.sum(1)
    xx, dd, n = sums[:, XX], sums[:, DD], sums[:, N]
    row_x, row_d, row_n = places[..., XX], places[..., DD], places[..., N]
    factor, offset = sums[:, XD] / xx, sums[:, D] / n
    f, o = factor.unsqueeze(1), offset.unsqueeze(1)
    rest_x = row_d - 2 * f * places[..., XD] + f.square() * row_x
    rest_1 = row_d - 2 * o * places[..., D] + o.square() * row_n
    like = (row_x.square() / places[..., X4]).nan_to_num(0.0)
    share_x = share_x * _is_no_chance(rest_x, row_d, like, odds)
    share_1 = share_1 * _is_no_chance(rest_1, row_d, row_n, odds)
    explained = torch.maximum(share_x, share_1) * dd
    best = int(explained.argmax())
    if not explained[best]:
        return None
    if share_x[best] >= share_1[best]:
        fit = _Fit(1 + float(factor[best]), None)
    else:
        fit = _Fit(None, float(offset[best]))
    error = math.sqrt(float(dd[best] / xx[best]))
    return _Found(int(at[best]), float(explained[best]), error, fit)


def candidates(
    places: torch.Tensor,
    unit: float,
    least: float,
    left_of_y: float = LEFT_OF_Y,
    least_left: float = LEAST_LEFT,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the places with a direction, and what of |d|^2 a factor there explains, and an offset.

    A share is 0 where it is too little, or what it belongs to is too near 1 or 0, and of a factor
    where y is mostly something else.
    """
    xx, yy, xd, dd, d, _x4, n = places.sum(1).unbind(1)[:7]
    share_x = xd.square() / (xx * dd)
    share_1 = d.square() / (n * dd)
    # Of two that have nothing in common, y - x has the direction of -x, half of it.
    is_of_x = (1 - share_x) * dd <= left_of_y * yy + least_left * dd
    fits_x = (share_x >= least) & (xd.abs() > unit * xx) & is_of_x
    fits_1 = (share_1 >= least) & (d.abs() > unit * (xx * n).sqrt())
    at = (fits_x | fits_1).nonzero().flatten()
    shares = [s.masked_fill(~fits, 0.0)[at] for s, fits in ((share_x, fits_x), (share_1, fits_1))]
    return at, shares


candidates = scripted(candidates)


def _is_no_chance(
    rest: torch.Tensor, error: torch.Tensor, m: torch.Tensor, odds: float
) -> torch.Tensor:
    """Whether a direction leaves too little of the rows' errors, of shape [places, rows]."""
    left = (rest / error).nan_to_num(1.0).clamp(min=LEAST_LEFT)
    m = m * (error > 0)
    evidence = -0.5 * ((m - 1).clamp(min=0.0) * left.log()).sum(1)
    # All rows as one: where they are short, and of one size.
    whole = (rest.sum(1) / error.sum(1)).nan_to_num(1.0).clamp(min=LEAST_LEFT)
    sized = m * error
    alike = (sized.sum(1) / error.amax(1)).nan_to_num(0.0)
    evidence = torch.maximum(evidence, -0.5 * (alike - 1).clamp(min=0.0) * whole.log())
    return (m.sum(1) >= LEAST) & (evidence > odds)
