"""What a target computed by itself at a graft, against what replaces it: how far off, and how.

x is the baseline's element, y the target's own, d is y - x. Beyond the figures of `profile`:

scale     y is this many times x, by least squares, whether or not that explains the error
cosine    between d and x

Where the error is near what rounding may come to (`most_rounding`), a closer look says
where it lies and what it looks like (`Look`).

Elements that are more than 16 times what their row usually holds on both sides take no part in the
closer look, nor does what is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from recorder.bits import as_bits
from recorder.scripting import scripted

from .chunks import Pair
from .elements import as_numbers, unravelled
from .look import Look, Moved, Place, Spread, Zeros
from .profile import Added, Profile, added_up, profile_of
from .rows import DD, EXTREME, XD, XX, YY, D, N, has_gap

_MOST_ROWS = 1 << 17  # 88 bytes each
_CHUNK, _QUICK = 1 << 16, 1 << 18  # elements at once
_ELEMENT = 20.0  # times a row's limit, that an element may be off by without a closer look
_FINE, _COARSE = 32.0, 3.0  # units of rounding: of 32 bits and more, and of fewer
_SIXTEEN = torch.finfo(torch.float16).eps
_LOOKED_AT, _FAR_ROW = 0.75, 8.0  # of `most_rounding`, of all and of a row
_STANDS_OUT = 8.0  # times the median index's error
_MOST_LINES, _SAMPLES = 2048, 64  # lines of a dim that are sought elsewhere, by so many elements
_WRONG_LINE, _SAME_LINE = 0.1, 0.1  # of a line's size; of its error
_NAMED, _FEW, _ROWS = 8, 8, 4  # indices; elements of each; rows
_FEWEST = 16  # numbers that an explanation is told by
_FRACTION = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
_FORMATS = (
    # bits of fraction
    (2, "float8_e5m2"),
    (3, "float8_e4m3"),
    (7, "bfloat16"),
    (10, "float16 or TF32"),
    (23, "float32"),
)


@dataclass(frozen=True)
class OwnError:
    """Of one graft; see the module's docstring.

    Attributes:
        profile: where the error lies.
        size: root mean square of the elements of either side, the larger, without extremes.
        odd: elements that are NaN or infinite on one side alone.
        scale: y is this many times x; None where that was not asked, since no row is off by much.
        cosine: between d and x; likewise.
        look: what a closer look shows, {} where none was taken.
    """

    profile: Profile = field(default_factory=Profile)
    size: float = 0.0
    odd: int = 0
    scale: float | None = None
    cosine: float | None = None
    look: Look = field(default_factory=Look)


def most_rounding(eps: float) -> float:
    """Return the relative error that rounding of a segment comes to at most.

    Of clean segments with exact inputs, float32 showed at most 8 units of 2^-24 (26 where few keys
    are attended to), bfloat16 1.7 units of 2^-8.

    Args:
        eps: the step from 1 to the next number, of the coarser dtype.
    """
    return (_FINE if eps < _SIXTEEN else _COARSE) * eps / 2


def own_error(
    x: torch.Tensor, y: torch.Tensor, eps: float, unit: float, *, is_gradient: bool
) -> OwnError:
    """Return how a target's own tensor differs from what replaces it.

    Args:
        x: what replaces it, of a floating or complex dtype.
        y: its own, of the same shape.
        eps: as of `profile`.
        unit: likewise.
        is_gradient: likewise.
    """
    x, y = (as_numbers(t.detach().cpu()) for t in (x, y))
    if not x.numel() or torch.equal(x, y):
        return OwnError()
    if clean := _clean(x, y, min(unit, _LOOKED_AT * most_rounding(eps))):
        return clean
    added = added_up(x, y, most_rows=_MOST_ROWS)
    found = profile_of(added, eps, unit, is_gradient)
    xx, yy, xd, dd, n = (float(added.sums[:, i].sum()) for i in (XX, YY, XD, DD, N))
    is_far = max(found.whole, found.extreme) > _LOOKED_AT * most_rounding(eps)
    look = Look()
    if (is_far or found.row > _FAR_ROW * most_rounding(eps)) and dd and not x.is_complex():
        look = _looked_at(added, x, y, most_rounding(eps))
    return OwnError(
        found,
        math.sqrt(max(xx, yy) / n) / added.scale if n else 0.0,
        _odd(x, y),
        1 + xd / xx if xx else math.inf,
        xd / math.sqrt(xx * dd) if xx and dd else 0.0,
        look,
    )


def _clean(x: torch.Tensor, y: torch.Tensor, limit: float) -> OwnError | None:
    """Return the error of a pair that is off by little in each row and element; None of others.

    It takes a third of the time of `added_up`, and finds no more: where no row is off by a unit of
    rounding, no factor and no offset is.
    """
    if x.dtype.itemsize > 4 or x.dtype.is_complex:
        return None
    rows, n = math.prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1
    if rows > _MOST_ROWS:
        return None
    one, other = (as_numbers(t).reshape(rows, n) for t in (x, y))
    if has_gap(one, other):
        return None
    parts = []
    for a, b in zip(*(t.split(max(1, _QUICK // n)) for t in (one, other)), strict=True):
        part = _light(a.to(torch.float32), b.to(torch.float32), EXTREME)
        if not bool(part[:, -1].all()):
            return None
        parts.append(part)
    xx, dd, outer_xx, outer_dd, most, _ = torch.cat(parts).to(torch.float64).unbind(1)
    there = xx > 0
    # Differences of sums in float32 leave a millionth, which is less than rounding's square.
    outer = (outer_dd.clamp(min=0) / outer_xx).sqrt().nan_to_num(0.0, 0.0, 0.0)
    if bool(((dd > 0) & ~there).any()) or not bool(there.any()):
        return None
    errors = torch.maximum((dd / xx).sqrt().masked_fill(~there, 0.0), outer)
    elements = (most / (xx / n).sqrt()).masked_fill(~there, 0.0)
    if float(errors.max()) > limit or float(elements.max()) > _ELEMENT * limit:
        return None
    at = int(errors.argmax())
    total = float(xx.sum())
    found = Profile(
        whole=math.sqrt(float(dd.sum()) / total),
        row=float(errors[at]),
        row_at=(*unravelled(at, x.shape[:-1]), *(-1,) * min(1, x.dim())),
        typical=float(errors[there].median()),
        element=float(elements.max()),
    )
    return OwnError(found, math.sqrt(total / x.numel()))


def _light(x: torch.Tensor, y: torch.Tensor, extreme: float) -> torch.Tensor:
    """Return of each row the sums of squares of x and y - x, without extremes and of these alone.

    Then the greatest |y - x| that is none, and a flag: 1 where all is finite and float32 holds the
    sums, else 0. Extremes are those of x, as `rows` has them.
    """
    d = y - x
    w = x.abs()
    sized = torch.full_like(x[:, 0], float(x.size(1)))
    if bool(w.amin() == 0.0):
        sized = (w > 0.0).to(x.dtype).sum(1).clamp(min=1.0)
    xx = (x * x).sum(1)
    dd = (d * d).sum(1)
    mean = w.sum(1) / sized
    square = xx / sized
    outer_xx = torch.zeros_like(xx)
    outer_dd = torch.zeros_like(xx)
    off = d.abs()
    most = w.amax(1)
    has_none = most <= extreme * mean * (mean * mean / square)  # no mean root is below that
    if not bool((has_none | (xx == 0.0)).all()):
        usual = (w.sqrt().sum(1) / sized).square()
        is_inner = (w <= extreme * usual.unsqueeze(1)).to(x.dtype)
        inner_x = x * is_inner
        inner_d = d * is_inner
        off = off * is_inner
        outer_xx = xx
        outer_dd = dd
        xx = (inner_x * inner_x).sum(1)
        dd = (inner_d * inner_d).sum(1)
        outer_xx = outer_xx - xx
        outer_dd = outer_dd - dd
    is_held = (square > 1e-18) & (square < 1e18) & torch.isfinite(outer_dd + dd)
    is_held = is_held | ((xx == 0.0) & (dd == 0.0))
    return torch.stack([xx, dd, outer_xx, outer_dd, off.amax(1), is_held.to(x.dtype)], 1)


_light = scripted(_light)


def _odd(x: torch.Tensor, y: torch.Tensor) -> int:
    """Count the elements that are finite on one side alone, or other kinds of not finite."""
    if bool((as_numbers(x).sum() + as_numbers(y).sum()).isfinite()):
        return 0
    found = 0
    for one, other in _chunks(x, y):
        both = one.isfinite() & other.isfinite()
        same = (one == other) | (one.isnan() & other.isnan())
        found += int((~both & ~same).sum())
    return found


def _chunks(x: torch.Tensor, y: torch.Tensor) -> Iterator[Pair]:
    rows, n = math.prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1
    one, other = (as_numbers(t).reshape(rows, n) for t in (x, y))
    size = max(1, _CHUNK // n)
    yield from zip(one.split(size), other.split(size), strict=True)


def _looked_at(added: Added, x: torch.Tensor, y: torch.Tensor, most: float) -> Look:
    columns, zeros = _columns(added, x, y)
    sums, n = added.sums, x.shape[-1] if x.dim() else 1
    dd = max(float(sums[:, DD].sum()), torch.finfo(torch.float64).tiny)
    rows = len(sums)
    shares: dict[str, float] = {}
    factors: dict[str, list[float]] = {}
    places: dict[str, Place] = {}
    moved: dict[str, Moved] = {}
    parts = {"row": sums} if n >= 2 and rows * (n - 1) >= 2 * _FEWEST else {}
    if rows >= _FEWEST and n >= 2:
        parts["column"] = columns
        shares["bias"] = float(columns[:, D].square().sum() / rows) / dd
    shaped = sums.reshape(*added.leading, sums.shape[1])
    several = [dim for dim, size in enumerate(added.leading) if 1 < size <= x.numel() // _FEWEST]
    for dim in several:
        parts[str(dim)] = shaped.movedim(dim, 0).reshape(x.shape[dim], -1, sums.shape[1]).sum(1)
    if "row" in parts:
        shares["offset"] = float((sums[:, D].square() / sums[:, N]).nansum()) / dd
    for name, part in parts.items():
        fitted = (part[:, XD] / part[:, XX]).nan_to_num(0.0, 0.0, 0.0)
        shares[name] = float((fitted * part[:, XD]).sum()) / dd
        wrong = part[:, DD] > most**2 * part[:, XX]
        if bool(wrong.any()):
            factors[name] = [
                _short(1 + float(of(fitted[wrong]))) for of in (torch.amin, torch.amax)
            ]
    last = x.dim() - 1
    for dim in [*several, last] if n > 1 else several:
        part = columns if dim == last else parts[str(dim)]
        if place := _place(part, most, *(_Lines(t, dim) for t in (y, x))):
            places[str(dim)] = place
    for dim in range(x.dim()):
        if found := _moved(x, y, dim):
            moved[str(dim)] = found
    look: Look = {
        "columns": _spread(columns),
        "rows": _spread(sums),
        "samples": {"own": _crossings(y), "base": _crossings(x)},
    }
    look["shares"] = {name: _short(share) for name, share in shares.items()}
    if factors:
        look["factors"] = factors
    if places:
        look["places"] = places
    if moved:
        look["moved"] = moved
    if zeros is not None:
        look["zeros"] = zeros
    is_there = zeros is None or zeros["share"] < 0.5
    if is_there and (fits := _narrower(x, y)):
        look["fits"] = fits
    return look


def _columns(added: Added, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, Zeros | None]:
    """Return the sums of columns, as those of rows, and what zeros there are."""
    n = x.shape[-1] if x.dim() else 1
    found = torch.zeros(n, added.sums.shape[1], dtype=torch.float64)
    zeros = there = 0
    kept = torch.zeros(3, dtype=torch.float64)
    for one, other in _chunks(x, y):
        a, b = (t.to(torch.float64) for t in (one, other))
        used = a.isfinite() & b.isfinite()
        smaller = torch.minimum(a.abs(), b.abs()).masked_fill(~used, 0.0)
        usual = smaller.sqrt().mean(1, keepdim=True).square()
        used &= smaller <= EXTREME * usual.clamp(min=torch.finfo(torch.float64).tiny)
        a, b = a.masked_fill(~used, 0.0), b.masked_fill(~used, 0.0)
        d = b - a
        for column, value in ((XX, a * a), (YY, b * b), (XD, a * d), (DD, d * d), (D, d)):
            found[:, column] += value.sum(0)
        found[:, N] += used.sum(0)
        is_zero = (b == 0) & (a != 0)
        zeros, there = zeros + int(is_zero.sum()), there + int((a != 0).sum())
        rest = a.masked_fill(is_zero, 0.0)
        kept += torch.stack([(rest * rest).sum(), (rest * d).sum(), d[~is_zero].square().sum()])
    share = zeros / there if there else 0.0
    if share < 1e-3:
        return found, None
    xx, xd, dd = kept.tolist()
    return found, {
        "share": _short(share),
        "scale": _short(1 + xd / xx) if xx else 0.0,
        "explained": _short(xd * xd / (xx * dd)) if xx and dd else 1.0,
    }


def _errors(part: torch.Tensor) -> torch.Tensor:
    """Return each index's error, relative to its size, or the usual one where it has little."""
    size = torch.maximum(part[:, XX], part[:, YY])
    usual = size.sum() / (size > 0).sum().clamp(min=1)
    return (part[:, DD] / size.clamp(min=0.01 * float(usual))).sqrt().nan_to_num(0.0, math.inf)


class _Lines(NamedTuple):
    """A few elements of each index of a dim, taken only where they are asked for."""

    tensor: torch.Tensor
    dim: int

    def at(self, indices: list[int]) -> list[list[float]]:
        others = [s for i, s in enumerate(self.tensor.shape) if i != self.dim]
        few = _samples(self.tensor, self.dim, others)[indices, :_FEW]
        return [[_short(value) for value in line] for line in few.tolist()]


def _place(part: torch.Tensor, most: float, own: _Lines, base: _Lines) -> Place | None:
    """Return which few indices are wrong while the others are not, None if they are not few."""
    errors = _errors(part)
    usual = float(errors.median())
    wrong = errors > max(most, _STANDS_OUT * usual)
    count = int(wrong.sum())
    if not 0 < 2 * count <= len(errors):
        return None
    dd = part[:, DD]
    if float(dd[wrong].sum()) < 0.8 * float(dd.sum()):
        return None
    at = wrong.nonzero().flatten().tolist()
    return {
        "at": at[:_NAMED],
        "last": at[-1],
        "count": count,
        "size": len(errors),
        "error": _short(float(errors[wrong].median())),
        "usual": _short(usual),
        "own": own.at(at[:_NAMED]),
        "lines": base.at(at[:_NAMED]),
    }


def _spread(part: torch.Tensor) -> Spread:
    """Return the worst index and how far off it is, the median one, and the worst hundredth."""
    errors, dd = _errors(part), part[:, DD]
    at = int(errors.argmax())
    few = max(1, len(dd) // 100)
    share = float(dd.topk(few).values.sum() / dd.sum().clamp(min=torch.finfo(torch.float64).tiny))
    return {
        "at": at,
        "size": len(errors),
        "worst": _short(float(errors[at])),
        "usual": _short(float(errors.median())),
        "share": _short(share),
    }


def _moved(x: torch.Tensor, y: torch.Tensor, dim: int) -> Moved | None:
    """Return which wrong lines of a dim are other lines of the baseline, None if few are."""
    size = x.shape[dim]
    others = [s for i, s in enumerate(x.shape) if i != dim]
    if not 2 <= size <= _MOST_LINES or math.prod(others) < 4:
        return None
    a, b = _samples(x, dim, others), _samples(y, dim, others)
    length = a.norm(dim=1)
    off = (b - a).norm(dim=1)
    wrong = (off > _WRONG_LINE * torch.maximum(length, b.norm(dim=1))).nonzero().flatten()
    if not len(wrong):
        return None
    apart = torch.cdist(b[wrong], a, compute_mode="donot_use_mm_for_euclid_dist")
    distance, source = apart.min(1)
    found = (distance <= _SAME_LINE * torch.minimum(off[wrong], length[source])) & (
        length[source] > 0
    )
    if int(found.sum()) < max(1, math.ceil(0.8 * len(wrong))):
        return None
    at, came = wrong[found].tolist(), source[found].tolist()
    shifts = {j - i for i, j in zip(at, came, strict=True)}
    return {
        "at": at[:_NAMED],
        "of": came[:_NAMED],
        "found": len(at),
        "wrong": len(wrong),
        "swap": sorted(at) == sorted(came),
        "shift": shifts.pop() if len(shifts) == 1 else None,
    }


def _samples(t: torch.Tensor, dim: int, others: list[int]) -> torch.Tensor:
    """Return some elements of each index of a dim, of shape [size, samples], float64."""
    if not others:
        return as_numbers(t).reshape(-1, 1).to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
    total = math.prod(others)
    if total <= _SAMPLES:
        at = torch.arange(total)
    else:
        at = torch.randint(total, (_SAMPLES,), generator=torch.Generator().manual_seed(0))
    places: Any = (slice(None), *torch.unravel_index(at, others))
    lines = as_numbers(t).movedim(dim, 0)[places]
    return lines.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)


def _crossings(t: torch.Tensor) -> list[list[float]]:
    """Return the elements where four rows and eight columns cross, evenly spaced."""
    rows, n = math.prod(t.shape[:-1]), t.shape[-1] if t.dim() else 1
    at = [i * rows // _ROWS for i in range(_ROWS)], [i * n // _FEW for i in range(_FEW)]
    few = as_numbers(t).reshape(rows, n)[at[0]][:, at[1]].to(torch.float64)
    return [[_short(value) for value in row] for row in few.nan_to_num(0.0, 0.0, 0.0).tolist()]


def _narrower(x: torch.Tensor, y: torch.Tensor) -> str:
    """Return the coarsest format that has bits enough for each element of y, but not of x.

    Exponents are not asked about: a scale may have been taken out.
    """
    for bits, called in _FORMATS:
        if bits < _FRACTION.get(y.dtype, 0) and _has_bits(y, bits):
            return "" if _has_bits(x, bits) else called
    return ""


def _has_bits(t: torch.Tensor, bits: int) -> bool:
    """Whether no element has more than so many bits of fraction."""
    rest = (1 << _FRACTION[t.dtype] - bits) - 1
    parts = as_bits(t).reshape(-1).split(_CHUNK)
    return not any(bool((part & rest).any()) for part in parts)


def _short(value: float) -> float:
    """Return a number with as many digits as a message has."""
    return float(f"{value:.4g}")
