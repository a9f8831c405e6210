"""How much two tensors differ: the figures of the replay log.

`rel_diff` is `1 - 2<x, y> / (|x|^2 + |y|^2)` in float64, 0 for equal tensors and for two of zeros,
and 1 or more for unrelated ones; it is computed as `|x - y|^2 / (|x|^2 + |y|^2)`, the same number
without the cancellation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from recorder.capture import as_bits
from recorder.statistics import has_statistics

_CHUNK = 1 << 18  # elements


@dataclass(frozen=True)
class Difference:
    """Figures over all elements; None where a NaN or an infinity leaves them undefined.

    Attributes:
        rel_diff: relative difference, see the module's docstring.
        max_abs: greatest absolute difference.
        mean_abs: mean absolute difference.
        changed: elements that differ; NaN equals NaN, and 0.0 equals -0.0.
        numel: elements compared.
    """

    rel_diff: float | None
    max_abs: float | None
    mean_abs: float | None
    changed: int
    numel: int


def difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Compare two tensors of equal shape and dtype, in float64 (complex128), chunk by chunk."""
    numel = a.numel()
    if numel == 0:
        return Difference(0.0, 0.0, 0.0, 0, 0)
    if not has_statistics(a.dtype):
        changed = int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
        return Difference(None, None, None, changed, numel)
    if torch.equal(a, b):  # several times faster than the figures
        return Difference(0.0, 0.0, 0.0, 0, numel)
    changed, most, summed, squares, total = 0, 0.0, 0.0, 0.0, 0.0
    for one, other in zip(_chunks(a), _chunks(b), strict=True):
        x, y = _wide(one), _wide(other)
        equal = _equal(one, other, x, y)
        changed += equal.numel() - int(equal.sum())
        apart = torch.where(equal, 0.0, (x - y).abs())  # infinities of one sign are equal
        peak = float(apart.max())
        most = peak if math.isnan(peak) or peak > most else most  # a NaN stays: nothing exceeds it
        summed += float(apart.sum())
        squares += float(apart.square().sum())
        total += float(x.abs().square().sum() + y.abs().square().sum())
    relative = 0.0 if changed == 0 else math.nan
    if changed and math.isfinite(total) and total > 0:
        relative = squares / total
    return Difference(_defined(relative), _defined(most), _defined(summed / numel), changed, numel)


def _equal(
    one: torch.Tensor, other: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    if one.dtype.is_floating_point or one.dtype.is_complex:
        return (x == y) | ((x != x) & (y != y))
    # Integers beyond 2^53 differ before they are widened, not always after.
    return as_bits(one) == as_bits(other)


def _chunks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.detach().reshape(-1).split(_CHUNK))


def _wide(x: torch.Tensor) -> torch.Tensor:
    if x.dtype.is_complex:
        return x.to(torch.complex128)
    if x.dtype.is_floating_point and x.dtype.itemsize == 1:
        x = x.to(torch.float32)  # 8-bit floats convert to few dtypes directly
    return x.to(torch.float64)


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
