"""A closer look at a pair that is far off: where its error lies, and what it looks like.

Elements that are more than 16 times what their row usually holds on both sides take no part in it,
nor does what is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from recorder.bits import as_bits

from .chunks import Pair
from .look import Look, Moved, Place, Spread, Zeros
from .profile import Added
from .rows import DD, EXTREME, XD, XX, YY, D, N

_CHUNK = 1 << 16  # elements at once
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


def _chunks(x: torch.Tensor, y: torch.Tensor) -> Iterator[Pair]:
    rows, n = math.prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1
    one, other = (t.reshape(rows, n) for t in (x, y))
    size = max(1, _CHUNK // n)
    yield from zip(one.split(size), other.split(size), strict=True)


def looked_at(added: Added, x: torch.Tensor, y: torch.Tensor, most: float) -> Look:
    """Return what a closer look at a pair shows.

    Args:
        added: what its rows add up to.
        x: the baseline's, real, on the CPU.
        y: the target's, of the same shape.
        most: the relative error that rounding comes to at most.
    """
    columns, zeros = _columns(added, x, y)
    parts = _parts(added, columns, x.shape)
    dims = {str(dim): dim for dim in range(x.dim())}
    lines = {**parts, str(x.dim() - 1): columns} if columns.shape[0] > 1 else parts
    look: Look = {
        "columns": _spread(columns),
        "rows": _spread(added.sums),
        "samples": {"own": _crossings(y), "base": _crossings(x)},
        "shares": _shares(parts, added.sums, columns),
    }
    factors = {name: _factors(part, most) for name, part in parts.items()}
    places = {
        name: _place(lines[name], most, _Lines(y, dim), _Lines(x, dim))
        for name, dim in dims.items()
        if name in lines
    }
    moved = {name: _moved(x, y, dim) for name, dim in dims.items()}
    if told := {name: found for name, found in factors.items() if found}:
        look["factors"] = told
    if few := {name: place for name, place in places.items() if place}:
        look["places"] = few
    if others := {name: found for name, found in moved.items() if found}:
        look["moved"] = others
    if zeros is not None:
        look["zeros"] = zeros
    is_there = zeros is None or zeros["share"] < 0.5
    if is_there and (fits := _narrower(x, y)):
        look["fits"] = fits
    return look


def _parts(added: Added, columns: torch.Tensor, shape: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the sums of what a factor may belong to: each row, column, index of a dim.

    Those of which one has too few numbers to tell are left out.
    """
    sums, rows, n = added.sums, len(added.sums), len(columns)
    parts = {"row": sums} if n >= 2 and rows * (n - 1) >= 2 * _FEWEST else {}
    if rows >= _FEWEST and n >= 2:
        parts["column"] = columns
    shaped = sums.reshape(*added.leading, sums.shape[1])
    for dim, size in enumerate(added.leading):
        if 1 < size <= math.prod(shape) // _FEWEST:
            parts[str(dim)] = shaped.movedim(dim, 0).reshape(size, -1, sums.shape[1]).sum(1)
    return parts


def _shares(
    parts: Mapping[str, torch.Tensor], sums: torch.Tensor, columns: torch.Tensor
) -> dict[str, float]:
    """Return what of the squared error each explanation takes."""
    dd = max(float(sums[:, DD].sum()), torch.finfo(torch.float64).tiny)
    found = {name: float((_fitted(part) * part[:, XD]).sum()) for name, part in parts.items()}
    if "column" in parts:
        found["bias"] = float(columns[:, D].square().sum() / len(sums))
    if "row" in parts:
        found["offset"] = float((sums[:, D].square() / sums[:, N]).nansum())
    return {name: _short(explained / dd) for name, explained in found.items()}


def _fitted(part: torch.Tensor) -> torch.Tensor:
    """Return by how much each one's own factor is off 1."""
    return (part[:, XD] / part[:, XX]).nan_to_num(0.0, 0.0, 0.0)


def _factors(part: torch.Tensor, most: float) -> list[float]:
    """Return the least and the greatest factor of those that are wrong, [] where none is."""
    wrong = part[:, DD] > most**2 * part[:, XX]
    if not bool(wrong.any()):
        return []
    return [_short(1 + float(of(_fitted(part)[wrong]))) for of in (torch.amin, torch.amax)]


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
        return t.reshape(-1, 1).to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
    total = math.prod(others)
    if total <= _SAMPLES:
        at = torch.arange(total)
    else:
        at = torch.randint(total, (_SAMPLES,), generator=torch.Generator().manual_seed(0))
    places: Any = (slice(None), *torch.unravel_index(at, others))
    lines = t.movedim(dim, 0)[places]
    return lines.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)


def _crossings(t: torch.Tensor) -> list[list[float]]:
    """Return the elements where four rows and eight columns cross, evenly spaced."""
    rows, n = math.prod(t.shape[:-1]), t.shape[-1] if t.dim() else 1
    at = [i * rows // _ROWS for i in range(_ROWS)], [i * n // _FEW for i in range(_FEW)]
    few = t.reshape(rows, n)[at[0]][:, at[1]].to(torch.float64)
    return [[_short(value) for value in row] for row in few.nan_to_num(0.0, 0.0, 0.0).tolist()]


def _narrower(x: torch.Tensor, y: torch.Tensor) -> str:
    """Return the coarsest format that has bits enough for each element of y, but not of x.

    Exponents are not asked about: a scale may have been taken out. A few numbers that are repeated
    tell nothing: zeros have no bits at all.
    """
    if len(y.reshape(-1)[:_CHUNK].unique()) < _FEWEST:
        return ""
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
