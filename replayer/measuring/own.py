"""What a target computed by itself at a graft, against what replaces it: how far off, and how.

x is the baseline's element, y the target's own, d is y - x. Beyond the figures of `profile`:

scale     y is this many times x, by least squares, whether or not that explains the error
cosine    between d and x

Where the error is near what rounding may come to (`most_rounding`), a closer look says where it
lies and what it looks like (`Look`).

1. `_clean` is a quick look, which most pairs do not go beyond.
2. `own_error` adds up the rows of the others; what is far off is looked at once more (`closer`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from recorder.scripting import scripted

from .closer import looked_at
from .elements import as_numbers, unravelled
from .look import Look
from .profile import Profile, added_up, profile_of
from .rows import DD, EXTREME, XD, XX, YY, N, has_gap

_MOST_ROWS = 1 << 17  # 88 bytes each
_CHUNK = 1 << 18  # elements at once
_ELEMENT = 20.0  # times a row's limit, that an element may be off by without a closer look
_FINE, _COARSE = 32.0, 3.0  # units of rounding: of 32 bits and more, and of fewer
_SIXTEEN = torch.finfo(torch.float16).eps
_LOOKED_AT, _FAR_ROW = 0.75, 8.0  # of `most_rounding`, of all and of a row


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
        look = looked_at(added, x, y, most_rounding(eps))
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
    one, other = (t.reshape(rows, n) for t in (x, y))
    if has_gap(one, other):
        return None
    parts = []
    for a, b in zip(*(t.split(max(1, _CHUNK // n)) for t in (one, other)), strict=True):
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
    if bool((x.sum() + y.sum()).isfinite()):
        return 0
    found = 0
    for one, other in zip(*(t.reshape(-1).split(_CHUNK) for t in (x, y)), strict=True):
        both = one.isfinite() & other.isfinite()
        same = (one == other) | (one.isnan() & other.isnan())
        found += int((~both & ~same).sum())
    return found
