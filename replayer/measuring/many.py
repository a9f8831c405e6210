"""The figures of many small pairs of one dtype and shape at once, as `measures` has them.

Alone, a small pair is a hundred calls of torch, whatever it holds. Here each call does all pairs:

1. `measure_many` has a row a pair, in float64, and takes what `chunks.scan` takes of each.
2. `profiles` adds up the rows of all tensors, and judges them as `profile` does.

Whatever is out of the ordinary is left to the way of single pairs: all of a pair where something is
not finite or nothing but bits differs, and its profile where masks left numbers, numbers are far
from 1, or a direction of its error may be.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch

from .elements import signed_bits
from .measures import CANCELLED, exact_bias, tolerances
from .profiles import Columns, profiles

MOST = 1 << 14
"""Elements of a pair, whose percentiles are taken by sorting."""
AT_ONCE = 1 << 17
"""Elements of each side at once; the buffers of them, as float64, stay in a processor's cache."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDER = 1e-9  # by so much a bound is wider than that of the way of single pairs

_memory = threading.local()


def measure_many(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    is_gradient: bool = False,
) -> tuple[Columns, list[int]]:
    """Compare pairs of tensors on the CPU, all at once.

    Args:
        a: the baselines', of shape [pairs, ...], of one of `DTYPES`, contiguous; together at most
            `AT_ONCE` elements, of a pair from 1 to `MOST`.
        b: the targets', of the same shape and dtype.
        rtol: relative tolerance; by default torch's for the dtype.
        atol: absolute tolerance, likewise.
        is_gradient: whether they are gradients, whose rows are sums of larger numbers.

    Returns:
        The figures of `Measures` but for those that all have alike, and of `as_row`, a list each,
        places as indices; and which pairs they are of. The others are to be measured one by one.
    """
    usual = tolerances(a.dtype, b.dtype)
    rtol = usual[0] if rtol is None else rtol
    atol = usual[1] if atol is None else atol
    one, other = a.reshape(len(a), -1), b.reshape(len(b), -1)
    x, y, d, t = _buffers(one.shape)
    x.copy_(one)
    y.copy_(other)
    torch.sub(y, x, out=d)
    xx, yy, xy, dd = (torch.mul(*pair, out=t).sum(1) for pair in ((x, x), (y, y), (x, y), (d, d)))
    signed = d.sum(1)
    w = d.abs_()
    total = w.sum(1)
    n = one.shape[1]
    changed = torch.sign(w, out=t).sum(1)
    is_held = (xx + yy + dd).isfinite() & (changed > 0)
    if not bool(is_held.any()):
        return {}, []
    if not bool(is_held.all()):
        at = is_held.nonzero().flatten()
        found, kept = measure_many(a[at], b[at], rtol=rtol, atol=atol, is_gradient=is_gradient)
        return found, [int(at[i]) for i in kept]
    x.abs_()
    most, most_at = w.max(1)
    torch.div(w, x, out=t)
    relative, relative_at = t.max(1)
    has_zero = ~relative.isfinite()
    if bool(has_zero.any()):  # an x of zero: its relative difference is undefined
        relative, relative_at = t.masked_fill_(x.eq(0.0), 0.0).max(1)
    beyond, beyond_at = torch.zeros_like(most), torch.full_like(most_at, -1)
    mismatched = torch.zeros_like(most)
    # A little below, no element is beyond tolerance for certain.
    may_be = (most > atol) & (has_zero | (relative > rtol * (1.0 - _WIDER)))
    if bool(may_be.any()):
        torch.mul(x, rtol, out=y)
        torch.gt(w, y.add_(atol), out=y)
        mismatched = y.sum(1)
        beyond, beyond_at = y.mul_(w).max(1)
    ulp = _steps(signed_bits(one), signed_bits(other), x, y)
    ranks = [max(1, math.ceil(n * q / 1000)) for q in (500, 990, 999)]
    half = w.topk(n - ranks[0] + 1, dim=1, sorted=False).values  # faster than `kthvalue`
    high = half.topk(n - ranks[1] + 1, dim=1).values
    percentiles = half.amin(1), high[:, -1], high[:, n - ranks[2]]
    bias = signed / n
    for i in (signed.abs() < CANCELLED * (1 + _WIDER) * total).nonzero().flatten().tolist():
        bias[i] = exact_bias([(one[i], other[i])], n)
    norm = xx.sqrt() * yy.sqrt()
    cosine = (xy / xx.sqrt() / yy.sqrt()).clamp_(-1.0, 1.0)
    is_some = xx > 0
    columns: Columns = {
        "changed": _whole(changed),
        "mismatched": _whole(mismatched),
        "max_beyond": beyond.tolist(),
        "max_beyond_at": _places(beyond_at, beyond),
        "max_abs": most.tolist(),
        "max_abs_at": most_at.tolist(),
        "max_abs_a": _at(one, most_at),
        "max_abs_b": _at(other, most_at),
        "max_rel": _where(is_some, relative.tolist()),
        "max_rel_at": _places(relative_at, relative),
        "max_rel_a": _where(relative > 0, _at(one, relative_at)),
        "max_rel_b": _where(relative > 0, _at(other, relative_at)),
        "mean_abs": (total / n).tolist(),
        "bias": bias.tolist(),
        "rel_diff": (dd / (xx + yy)).tolist(),
        "cosine": torch.where(norm > 0, cosine, 0.0).tolist(),
        **{
            name: values.tolist()
            for name, values in zip(("p50", "p99", "p999"), percentiles, strict=True)
        },
        "l2_a": xx.sqrt().tolist(),
        "l2_b": yy.sqrt().tolist(),
        "max_ulp": _whole(ulp),
    }
    columns |= profiles(a, b, ulp > 1, is_gradient)
    return columns, list(range(len(a)))


def _buffers(shape: Sequence[int]) -> list[torch.Tensor]:
    """Return memory for four tensors of a shape, as float64; a thread's own, and kept."""
    kept: torch.Tensor | None = getattr(_memory, "buffers", None)
    size = math.prod(shape)
    if kept is None or kept.shape[1] < size:
        with torch.inference_mode(False):  # else it could be used under that mode alone
            kept = _memory.buffers = torch.empty(4, size, dtype=torch.float64, device="cpu")
    return [row[:size].view(*shape) for row in kept]


def _whole(values: torch.Tensor) -> list[int]:
    return values.to(torch.int64).tolist()


def _where(there: torch.Tensor, values: list[Any]) -> list[Any]:
    if bool(there.all()):
        return values
    return [v if is_there else None for v, is_there in zip(values, there.tolist(), strict=True)]


def _places(at: torch.Tensor, most: torch.Tensor) -> list[int | None]:
    """Return the places of what is greatest, None where that is 0."""
    return _where(most > 0, at.tolist())


def _at(values: torch.Tensor, at: torch.Tensor) -> list[float]:
    return values.gather(1, at.unsqueeze(1)).flatten().double().tolist()


def _steps(
    bits: torch.Tensor, other: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Return the greatest distance in units in the last place of each pair.

    Args:
        bits: the baselines' elements as integers, of shape [pairs, n].
        other: the targets'.
        x: memory to work in, float64, of that shape.
        y: likewise.
    """
    if int(bits.bitwise_xor(other).amin()) >= 0:
        steps = other.sub(bits)  # of one sign each, floats are as far apart as their bits
        return torch.maximum(steps.amax(1).double(), -steps.amin(1).double())
    shift = bits.dtype.itemsize * 8 - 1
    for one, into in ((bits, x), (other, y)):
        sign = one.bitwise_right_shift(shift)
        into.copy_(one.bitwise_and((1 << shift) - 1).bitwise_xor_(sign).sub_(sign))
    return x.sub_(y).abs_().amax(1)
