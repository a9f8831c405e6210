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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from recorder.bits import as_bits, has_statistics
from recorder.scripting import scripted

# Elements; with all that is made of them they fit a core's second-level cache, and are too few for
# torch to take more threads, whose turns would cost more.
_CHUNK = (1 << 15) - 64
_A_THREAD = 1 << 20  # elements that are worth one
_CHUNK_ELSEWHERE = 1 << 19  # on a GPU, where each call costs more than the memory


def _sums(
    a: torch.Tensor,
    b: torch.Tensor,
    bits: tuple[torch.Tensor, torch.Tensor],
    wide: torch.Tensor,
    size: int,
    take_equal: bool,
    by_dot: bool,
) -> torch.Tensor:
    """Return for each chunk what `_Figures` has, in a row.

    Args:
        a: elements.
        b: as many others.
        bits: the same two, as they are compared for being equal throughout.
        wide: memory for two chunks, in float64.
        size: of a chunk, in elements.
        take_equal: whether to ask that of each chunk.
        by_dot: whether to square by `dot`: as fast as memory, but by all threads there are.
    """
    found = []
    ones, others = a.split(size), b.split(size)
    each = size * bits[0].numel() // a.numel()
    one_bits, other_bits = bits[0].split(each), bits[1].split(each)
    x, y = wide.narrow(0, 0, size), wide.narrow(0, size, size)
    for i in range(len(ones)):
        one, other = ones[i], others[i]
        n = one.numel()
        if n < size:  # the last
            x, y = wide.narrow(0, 0, n), wide.narrow(0, n, n)
        x.copy_(one)
        total = torch.dot(x, x) if by_dot else torch.linalg.vector_norm(x, 2.0).square_()
        if take_equal and torch.equal(one_bits[i], other_bits[i]):
            nothing = torch.zeros_like(total)
            found += [total + total, nothing, nothing, nothing, nothing]
        else:
            y.copy_(other)
            more = torch.dot(y, y) if by_dot else torch.linalg.vector_norm(y, 2.0).square_()
            found.append(total + more)
            x.sub_(y)
            found.append(torch.dot(x, x) if by_dot else torch.linalg.vector_norm(x, 2.0).square_())
            x.abs_()
            found.append(x.amax())
            found.append(x.sum())
            x.ne_(0.0)
            found.append(x.sum())
    return torch.stack(found).view(-1, 5)


def _sums_of_one(
    one: torch.Tensor, other: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> list[float]:
    """Return the same of one chunk alone, with the fewest calls: for small tensors these are most.

    Args:
        one: elements.
        other: as many others.
        x: memory for as many, in float64.
        y: likewise.
    """
    x.copy_(one)
    y.copy_(other)
    a, b = float(torch.linalg.vector_norm(x, 2.0)), float(torch.linalg.vector_norm(y, 2.0))
    x.sub_(y)
    apart = float(torch.linalg.vector_norm(x, 2.0))
    x.abs_()
    most, summed = x.amax(), x.sum()
    x.ne_(0.0)
    return [a * a + b * b, apart * apart, float(most), float(summed), float(x.sum())]


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
    elif numel == size and on_cpu:
        rows = [_sums_of_one(one, other, *_work_views(size))]
    else:
        # On a GPU, asking whether chunks are equal would wait for each of them.
        bits = (_words(one), _words(other)) if on_cpu else (one, other)
        if bits[0].numel() != bits[1].numel():
            bits = one, other
        threads = min(torch.get_num_threads(), numel // _A_THREAD) if on_cpu else 1
        rows = (
            _side_by_side(one, other, bits, size, threads)
            if threads > 1
            else _rows(one, other, bits, size)
        )
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


def _rows(
    one: torch.Tensor, other: torch.Tensor, bits: tuple[torch.Tensor, torch.Tensor], size: int
) -> list[list[float]]:
    """Return what `_sums` does of each chunk."""
    on_cpu = one.device.type == "cpu"
    by_dot = not on_cpu or torch.get_num_threads() == 1
    found = _sums(one, other, bits, _work_memory(one.device, size), size, on_cpu, by_dot)
    return found.tolist()


def _side_by_side(
    one: torch.Tensor,
    other: torch.Tensor,
    bits: tuple[torch.Tensor, torch.Tensor],
    size: int,
    threads: int,
) -> list[list[float]]:
    """Return the same, by as many threads as torch would take: it has no say inside a chunk."""
    chunks = -(-one.numel() // size)
    most = -(-chunks // threads) * size
    each = most * bits[0].numel() // one.numel()
    parts = zip(
        one.split(most), other.split(most), bits[0].split(each), bits[1].split(each), strict=True
    )
    try:
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda part: _rows(part[0], part[1], (part[2], part[3]), size), parts)
            return [row for rows in found for row in rows]
    except RuntimeError:  # no threads are to be had any more: the interpreter ends
        return _rows(one, other, bits, size)


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
    """Return memory for two chunks as float64; reused on the CPU, where fresh pages cost most."""
    if device.type != "cpu":
        return torch.empty(2 * size, dtype=torch.float64, device=device)
    kept: torch.Tensor | None = getattr(_memory, "wide", None)
    if kept is None or kept.numel() < 2 * size:
        with torch.inference_mode(False):  # else it could be used under that mode alone
            kept = _memory.wide = torch.empty(2 * size, dtype=torch.float64, device=device)
    return kept


def _work_views(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the memory on the CPU as one chunk and the other; most come in one size."""
    kept: tuple[torch.Tensor, torch.Tensor] | None = getattr(_memory, "views", None)
    if kept is None or kept[0].numel() != size:
        wide = _work_memory(torch.device("cpu"), size)
        with torch.inference_mode(False):  # likewise
            kept = _memory.views = wide[:size], wide[size : 2 * size]
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
