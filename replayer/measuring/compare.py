"""How much two tensors differ: the figures of the replay log.

`rel_diff` is `1 - 2<x, y> / (|x|^2 + |y|^2)` in float64, 0 for equal tensors and for two of zeros,
and 1 or more for unrelated ones; it is computed as `|x - y|^2 / (|x|^2 + |y|^2)`, the same number
without the cancellation. All figures are over the elements that are finite on both sides; what
differs elsewhere counts as changed.

1. `_sums` goes over both tensors chunk by chunk, in memory that is reused, and adds up the squares
   and the differences. Each element is widened before anything is computed of it, so that no figure
   rests on float32; what is counted in float32 are flags, fewer than it can count.
2. A chunk whose sums are not finite, or whose elements float64 cannot hold, is done again by
   `_exact`, element by element.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from recorder.bits import as_bits, has_statistics
from recorder.scripting import scripted

_CHUNK = 1 << 15  # elements; with all that is made of them they fit a core's second-level cache
_CHUNK_ELSEWHERE = 1 << 19  # on a GPU, where each call costs more than the memory


def _sums(
    a: torch.Tensor,
    b: torch.Tensor,
    bits: tuple[torch.Tensor, torch.Tensor],
    wide: torch.Tensor,
    flags: torch.Tensor,
    size: int,
    take_equal: bool,
) -> torch.Tensor:
    """Return for each chunk what `_Figures` has, in a row.

    Args:
        a: elements.
        b: as many others.
        bits: the same two, as they are compared for being equal throughout.
        wide: memory for two chunks, in float64.
        flags: memory for one chunk in the tensors' dtype, where that is float32 or float64.
        size: of a chunk, in elements.
        take_equal: whether to ask that of each chunk.
    """
    found = []
    ones, others = a.split(size), b.split(size)
    each = size * bits[0].numel() // a.numel()
    one_bits, other_bits = bits[0].split(each), bits[1].split(each)
    for i in range(len(ones)):
        one, other = ones[i], others[i]
        n = one.numel()
        x = wide.narrow(0, 0, n)
        if take_equal and torch.equal(one_bits[i], other_bits[i]):
            x.copy_(one)
            total = torch.dot(x, x)
            nothing = torch.zeros_like(total)
            found += [total + total, nothing, nothing, nothing, nothing]
        else:
            # It goes first, since it waits least for memory, and the next find the chunk there.
            is_flagged = flags.numel() > 0
            if is_flagged:
                torch.ne(one, other, out=flags.narrow(0, 0, n))
            y = wide.narrow(0, n, n)
            x.copy_(one)
            y.copy_(other)
            both = wide.narrow(0, 0, 2 * n)
            found.append(torch.dot(both, both))
            x.sub_(y)
            found.append(torch.dot(x, x))
            x.abs_()
            found.append(x.amax())
            found.append(x.sum())
            if is_flagged:
                found.append(flags.narrow(0, 0, n).sum().to(torch.float64))
            else:
                found.append(x.ne_(0.0).sum())
    return torch.stack(found).view(-1, 5)


def _sums_of_one(one: torch.Tensor, other: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """Return the same of one chunk alone, with the fewest calls: for small tensors these are most.

    Args:
        one: elements.
        other: as many others.
        wide: memory for twice as many, in float64.
    """
    n = one.numel()
    both = wide.narrow(0, 0, 2 * n)
    x, y = wide.narrow(0, 0, n), wide.narrow(0, n, n)
    x.copy_(one)
    y.copy_(other)
    total = torch.dot(both, both)
    x.sub_(y)
    squares = torch.dot(x, x)
    x.abs_()
    return torch.stack([total, squares, x.amax(), x.sum(), x.ne_(0.0).sum()]).view(-1, 5)


_sums = scripted(_sums)
_sums_of_one = scripted(_sums_of_one)
_memory = threading.local()


@dataclass(frozen=True)
class Difference:
    """Figures over the elements that are finite on both sides; None where there are none.

    Attributes:
        rel_diff: relative difference, see the module's docstring.
        max_abs: greatest absolute difference.
        mean_abs: mean absolute difference.
        changed: of all elements, those that differ; NaN equals NaN, and 0.0 equals -0.0.
        numel: elements compared.
    """

    rel_diff: float | None
    max_abs: float | None
    mean_abs: float | None
    changed: int
    numel: int


def difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Compare two tensors of equal shape and dtype on one device, in float64 (complex128).

    On a GPU the figures are brought to the host once, at the end.
    """
    numel = a.numel()
    if numel == 0:
        return Difference(0.0, 0.0, 0.0, 0, 0)
    if not has_statistics(a.dtype):
        changed = int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
        return Difference(None, None, None, changed, numel)
    one, other = _flat(a), _flat(b)
    on_cpu = one.device.type == "cpu"
    size = min(_CHUNK if on_cpu else _CHUNK_ELSEWHERE, numel)
    if a.dtype.is_complex or (a.dtype.itemsize == 8 and not a.dtype.is_floating_point):
        rows = [[math.nan]] * -(-numel // size)
    elif numel == size:
        rows = _sums_of_one(one, other, _work_memory(one.device, size)).tolist()
    else:
        # On a GPU, asking whether chunks are equal would wait for each of them.
        bits = (_words(one), _words(other)) if on_cpu else (one, other)
        if bits[0].numel() != bits[1].numel():
            bits = one, other
        wide = _work_memory(one.device, size)
        is_flagged = one.dtype in (torch.float32, torch.float64)
        flags = wide[2 * size :].view(one.dtype) if is_flagged else wide[:0]
        rows = _sums(one, other, bits, wide, flags, size, on_cpu).tolist()
    figures = [
        _Figures(row[0], row[1], row[2], row[3], row[4], min(size, numel - i * size))
        if all(map(math.isfinite, row))
        else _exact(one[i * size : (i + 1) * size], other[i * size : (i + 1) * size])
        for i, row in enumerate(rows)
    ]
    changed = int(sum(figure.changed for figure in figures))
    finite = sum(figure.finite for figure in figures)
    if not finite:
        undefined = None if changed else 0.0
        return Difference(undefined, undefined, undefined, changed, numel)
    total = _added(figure.total for figure in figures)
    squares = _added(figure.squares for figure in figures)
    summed = _added(figure.summed for figure in figures)
    most = max(figure.most for figure in figures)
    relative = 0.0 if changed == 0 or most == 0 else math.nan
    if most and math.isfinite(total) and total > 0:
        relative = squares / total
    return Difference(_defined(relative), _defined(most), _defined(summed / finite), changed, numel)


class _Figures(NamedTuple):
    """Of one chunk: sums over its finite elements, the greatest absolute difference, and counts."""

    total: float
    squares: float
    most: float
    summed: float
    changed: float
    finite: int


def _exact(one: torch.Tensor, other: torch.Tensor) -> _Figures:
    """Return the figures of a chunk where infinities, NaN or large integers stand in the way."""
    x, y = _wide(one), _wide(other)
    equal = _equal(one, other, x, y)
    finite = x.isfinite() & y.isfinite()
    apart = torch.where(equal | ~finite, 0.0, (x - y).abs())
    x, y = torch.where(finite, x, 0.0), torch.where(finite, y, 0.0)
    if one.dtype.itemsize == 8 and not one.dtype.is_floating_point and not one.dtype.is_complex:
        # Integers have a difference where float64 has none; it must not leave 64 bits.
        whole = (as_bits(one) - as_bits(other)).abs().to(torch.float64)
        apart = torch.where(apart < 2.0**62, whole, apart)
    return _Figures(
        total=float(x.abs().square().sum() + y.abs().square().sum()),
        squares=float(apart.square().sum()),
        most=float(apart.max()),
        summed=float(apart.sum()),
        changed=float(equal.numel() - int(equal.sum())),
        finite=int(finite.sum()),
    )


def _added(values: Iterable[float]) -> float:
    """Return a sum of numbers that are not negative, rounded once; inf beyond float64."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def _words(flat: torch.Tensor) -> torch.Tensor:
    """Return elements eight bytes at a time, which is faster to compare; else as they are.

    What has the same bits is equal but for NaN, and a chunk with NaN is done again.
    """
    each = 8 // flat.dtype.itemsize
    if not flat.is_contiguous() or flat.numel() % each or flat.storage_offset() % each:
        return flat
    return flat if flat.data_ptr() % 8 else flat.view(torch.int64)


def _work_memory(device: torch.device, size: int) -> torch.Tensor:
    """Return memory for three chunks as float64; reused on the CPU, where fresh pages cost most."""
    if device.type != "cpu":
        return torch.empty(3 * size, dtype=torch.float64, device=device)
    kept: torch.Tensor | None = getattr(_memory, "wide", None)
    if kept is None or kept.numel() < 3 * size:
        with torch.inference_mode(False):  # else it could be used under that mode alone
            kept = _memory.wide = torch.empty(3 * size, dtype=torch.float64, device=device)
    return kept


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements in order; 8-bit floats as float32, since they convert to that."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype.itemsize == 1 and flat.dtype.is_floating_point:
        return flat.to(torch.float32)
    return flat


def _equal(
    one: torch.Tensor, other: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    if one.dtype.is_floating_point or one.dtype.is_complex:
        return (x == y) | ((x != x) & (y != y))
    # Integers beyond 2^53 differ before they are widened, not always after.
    return as_bits(one) == as_bits(other)


def _wide(x: torch.Tensor) -> torch.Tensor:
    if x.dtype.is_complex:
        return x.to(torch.complex128)
    return x.to(torch.float64)


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
