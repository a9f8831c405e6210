"""The figures of `measures` for each index of one dim: a head, an expert, a token."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from recorder.bits import has_statistics

from .elements import as_numbers

_ELEMENTS = 1 << 21


def measure_rows(
    a: torch.Tensor, b: torch.Tensor, dims: tuple[int, ...], rtol: float, atol: float
) -> dict[str, list[Any]]:
    """Compare two tensors index by index of some dims.

    Args:
        a: the baseline's.
        b: the target's, of the same shape.
        dims: the dims whose indices are told apart, row-major.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Returns:
        The columns of `Measures` but for indices, percentiles and steps, a list each; nothing for
        dtypes without arithmetic. Squares are not scaled: beyond float64's range `rel_diff` and
        `cosine` are None.
    """
    if not (has_statistics(a.dtype) and has_statistics(b.dtype)):
        return {}
    rest = [i for i in range(a.dim()) if i not in dims]
    n = math.prod(a.shape[i] for i in dims)
    m = math.prod(a.shape[i] for i in rest)
    one, other = (t.permute([*dims, *rest]).reshape(n, m) for t in (a, b))
    each = max(1, _ELEMENTS // max(1, m))
    parts = [
        _of_rows(one[i : i + each], other[i : i + each], rtol, atol) for i in range(0, n, each)
    ]
    return {name: [v for part in parts for v in part[name]] for name in (parts[0] if parts else ())}


def _of_rows(
    one: torch.Tensor, other: torch.Tensor, rtol: float, atol: float
) -> dict[str, list[Any]]:
    """Return the figures of rows, of shape [n, m]; long ones are added up part by part."""
    parts = [
        _sums(one[:, i : i + _ELEMENTS], other[:, i : i + _ELEMENTS], rtol, atol)
        for i in range(0, max(1, one.shape[1]), _ELEMENTS)
    ]
    total = functools.reduce(torch.add, (sums for sums, _ in parts))
    most = functools.reduce(torch.maximum, (greatest for _, greatest in parts))
    xx, yy, xy, dd, signed, summed, changed, mismatched, finite, *counts = total
    norm = xx + yy
    rel_diff = torch.where(changed == 0, 0.0, dd / norm)
    cosine = (xy / (xx.sqrt() * yy.sqrt())).clamp(-1, 1)
    cosine = torch.where((xx == 0) | (yy == 0), ((xx == 0) & (yy == 0)).double(), cosine)
    found = {
        "changed": changed, "mismatched": mismatched, "max_abs": most[0], "max_beyond": most[1],
        "mean_abs": summed / finite, "bias": signed / finite, "rel_diff": rel_diff,
        "cosine": cosine, "l2_a": xx.sqrt(), "l2_b": yy.sqrt(),
        **dict(zip(("nan_a", "nan_b", "inf_a", "inf_b"), counts, strict=True)),
    }  # fmt: skip
    whole = ("changed", "mismatched", "nan_a", "nan_b", "inf_a", "inf_b")
    return {
        name: [int(v) for v in values.tolist()] if name in whole else _defined(values)
        for name, values in found.items()
    }


def _defined(values: torch.Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def _sums(
    one: torch.Tensor, other: torch.Tensor, rtol: float, atol: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what adds up along rows, of shape [13, n], and what is greatest, of shape [2, n].

    That is the greatest difference, and the greatest of those beyond tolerance.
    """
    x, y = as_numbers(one), as_numbers(other)
    is_complex = x.is_complex() or y.is_complex()
    wide = torch.complex128 if is_complex else torch.float64
    # Integers beyond 2^53 differ before they are widened, not always after.
    apart = x != y if x.dtype == y.dtype else None
    x, y = x.to(wide), y.to(wide)
    apart = x != y if apart is None else apart
    finite = x.isfinite() & y.isfinite()
    agree = ~finite & (~apart | (x.isnan() & y.isnan()))
    nan = x.isnan(), y.isnan()
    inf = x.isinf() & apart, y.isinf() & apart
    x, y = x.masked_fill(~finite, 0), y.masked_fill(~finite, 0)
    d = y - x
    w, size = d.abs(), x.abs()
    disagree = ~finite & ~agree
    mismatched = (w > atol + rtol * size) | disagree
    if rtol == atol == 0:
        mismatched = (apart & finite) | disagree
    dot = (x.real * y.real + x.imag * y.imag) if is_complex else x * y
    signed = torch.full_like(w, math.nan) if is_complex else d
    parts = (
        size.square(), y.abs().square(), dot, w.square(), signed, w,
        (apart & finite) | disagree, mismatched, finite,
        nan[0] & ~nan[1], nan[1] & ~nan[0], *inf,
    )  # fmt: skip
    found = torch.stack([part.to(torch.float64).sum(1) for part in parts])
    if not w.shape[1]:
        return found, torch.full((2, w.shape[0]), math.nan, dtype=torch.float64)
    return found, torch.stack([w.amax(1), w.masked_fill(~mismatched, 0).amax(1)])
