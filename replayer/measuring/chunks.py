"""One chunk of two tensors after the other: what `measures` adds up.

1. `scan` goes over both in float64, in memory that is reused, and gives the figures of each chunk
   and a histogram of the absolute differences, for the percentiles.
2. A chunk with a NaN or an infinity, and dtypes that float64 does not simply hold, are done by
   `exact`, with memory of their own, scaled where squares would leave float64's range.

Elements that are NaN or infinite on either side are counted, and left out of everything else.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, TypeVar

import torch

from recorder.scripting import scripted

from .elements import apart, as_numbers, is_plain, signed_bits
from .ulps import is_unsigned, max_ulp

CHUNK = 1 << 17
"""Elements worked on at once; as float64, the five buffers of them stay in a processor's cache."""
BINS = 1 << 15
_SCANNED = 15  # so many of `Figures`, the first, are from `_scan`
MOST_ODD = 1 << 18
"""Of a segment's differences that float32's upper half rounds, so many are kept."""
_SAFE = 400  # squares of numbers within 2 to the plus or minus this add up in float64

_memory = threading.local()

T = TypeVar("T")
R = TypeVar("R")
Pair = tuple[torch.Tensor, torch.Tensor]


class Map(Protocol):
    """A function like `map`."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterable[R]:
        """Do as `map` does, perhaps on several threads."""


class Figures(NamedTuple):
    """Of one chunk, over elements finite on both sides; x is the baseline's, y the target's.

    Sums are in units of 2 to the power that `scales` has: of x, of y, of y - x. Places are -1 where
    nothing is above 0, or above what an earlier chunk has.
    """

    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    dd: float = 0.0
    signed: float = 0.0
    total: float = 0.0
    changed: float = 0.0
    mismatched: float = 0.0
    max_beyond: float = 0.0
    max_beyond_at: float = -1.0
    max_abs: float = 0.0
    max_abs_at: float = -1.0
    max_rel: float = 0.0
    max_rel_at: float = -1.0
    max_ulp: float = 0.0
    odd_at: float = -1.0
    scales: tuple[int, int, int] = (0, 0, 0)
    nan_a: int = 0
    nan_b: int = 0
    inf_a: int = 0
    inf_b: int = 0


def _scan(
    a: torch.Tensor,
    b: torch.Tensor,
    ia: torch.Tensor,
    ib: torch.Tensor,
    shift: int,
    mask: int,
    wide: torch.Tensor,
    narrow: torch.Tensor,
    narrow_bits: torch.Tensor,
    size: int,
    rtol: float,
    atol: float,
    collect: int,
) -> tuple[list[float], torch.Tensor, list[torch.Tensor]]:
    """Return the first 15 of `Figures` of each chunk, and the histogram of those that are finite.

    Then come the differences that float32's upper half rounds, up to about `collect` of them. `ia`
    and `ib` are the elements' bits. `shift` is where the sign is among them and `mask` has the
    other bits set, or `shift` is 0 for integers, -1 for dtypes whose bits are not to be compared.
    """
    found: list[float] = []
    odd: list[torch.Tensor] = []
    collected = 0
    histogram = torch.zeros(32768, dtype=torch.int64)
    best = 0.0
    best_rel = 0.0
    best_beyond = 0.0
    total = a.numel()
    start = 0
    while start < total:
        n = min(size, total - start)
        one = a.narrow(0, start, n)
        other = b.narrow(0, start, n)
        bits = ia.narrow(0, start, n)
        other_bits = ib.narrow(0, start, n)
        x = wide.narrow(0, 0, n)
        x.copy_(one)
        if shift >= 0 and torch.equal(bits, other_bits):
            square = float(torch.dot(x, x))
            found += [square, square, square, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]
            found += [0.0, -1.0, 0.0, -1.0, 0.0]
            if square - square == 0.0:
                histogram[0] += n
            start += n
            continue
        y = wide.narrow(0, size, n)
        d = wide.narrow(0, 2 * size, n)
        w = wide.narrow(0, 3 * size, n)
        t = wide.narrow(0, 4 * size, n)
        y.copy_(other)
        torch.sub(y, x, out=d)
        xx = float(torch.dot(x, x))
        yy = float(torch.dot(y, y))
        dd = float(torch.dot(d, d))
        found += [xx, yy, float(torch.dot(x, y)), dd]
        if not (xx - xx == 0.0 and yy - yy == 0.0 and dd - dd == 0.0):
            found += [0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, -1.0, 0.0, -1.0, 0.0]
            start += n
            continue
        torch.abs(d, out=w)
        found.append(float(d.sum()))
        found.append(float(w.sum()))
        f = narrow.narrow(0, 0, n)
        f.copy_(w)
        codes = narrow_bits.narrow(0, 0, n).bitwise_right_shift_(16)
        counts = torch.bincount(codes, minlength=32768)
        histogram += counts
        changed = -1.0
        if collect > 0:
            codes.bitwise_left_shift_(16)
            t.copy_(f)
            if float(t.sub_(w).abs_().amax()) == 0.0:
                changed = float(n - int(counts[0].item()))
            elif collected < collect:
                odd.append(w.masked_select(t.ne(0.0)))
                collected += odd[-1].numel()
        if changed < 0.0:
            torch.sign(w, out=d)
            changed = float(d.sum())
        found.append(changed)
        x.abs_()
        most = float(w.amax())
        torch.div(w, x, out=d)
        relative = float(d.amax())
        has_zero = relative - relative != 0.0
        if has_zero:  # an x of zero: its relative difference is undefined
            d.masked_fill_(x.eq(0.0), 0.0)
            relative = float(d.amax())
        if most <= atol or (not has_zero and relative <= rtol * (1.0 - 1e-9)):
            found += [0.0, 0.0, -1.0]
        else:
            torch.mul(x, rtol, out=t)
            t.add_(atol)
            torch.gt(w, t, out=t)
            mismatched = float(t.sum())
            beyond = 0.0
            at = -1.0
            if mismatched > 0.0:
                beyond = float(t.mul_(w).amax())
                if beyond > best_beyond:
                    best_beyond = beyond
                    at = float(t.eq(beyond).nonzero()[0].item() + start)
            found += [mismatched, beyond, at]
        at = -1.0
        if most > best:
            best = most
            at = float(w.eq(most).nonzero()[0].item() + start)
        found += [most, at]
        at = -1.0
        if relative > best_rel:
            best_rel = relative
            at = float(d.eq(relative).nonzero()[0].item() + start)
        found += [relative, at]
        ulp = 0.0
        if shift > 0 and float(bits.bitwise_xor(other_bits).amin()) >= 0.0:
            steps = other_bits.sub(bits)  # of one sign each, floats are as far apart as their bits
            ulp = max(float(steps.amax()), -float(steps.amin()))
        elif shift > 0:
            sign = bits.bitwise_right_shift(shift)
            p = (bits.bitwise_and(mask).bitwise_xor_(sign)).sub_(sign)
            sign = other_bits.bitwise_right_shift(shift)
            q = (other_bits.bitwise_and(mask).bitwise_xor_(sign)).sub_(sign)
            x.copy_(p)
            y.copy_(q)
            ulp = float(x.sub_(y).abs_().amax())
        found.append(ulp)
        start += n
    return found, histogram, odd


_scan = scripted(_scan)


class Scanned(NamedTuple):
    """Of a segment.

    Attributes:
        figures: those of each chunk; places are indices into the segment.
        histogram: how many differences have which `code` >> 16, of shape [2^15].
        odd: the differences that float32's upper half rounds, of shape [m]; None where there may be
            too many.
    """

    figures: list[Figures]
    histogram: torch.Tensor
    odd: torch.Tensor | None


def scan(a: torch.Tensor, b: torch.Tensor, rtol: float, atol: float) -> Scanned:
    """Return what a segment's measures are made of.

    Args:
        a: the baseline's elements, of shape [n], contiguous, on the CPU.
        b: the target's, likewise.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """
    size = min(CHUNK, a.numel())
    starts = range(0, a.numel(), size)
    if not is_plain(a, b):
        parts = [exact(a[i : i + size], b[i : i + size], rtol, atol, i) for i in starts]
        histogram = functools.reduce(torch.add, (counts for _, counts, _ in parts))
        return Scanned([figures for figures, _, _ in parts], histogram, None)
    wide, other_wide = as_numbers(a), as_numbers(b)
    bits, other_bits, shift, mask = wide, other_wide, -1, 0
    if a.dtype == b.dtype and not is_unsigned(a.dtype):
        bits, other_bits = signed_bits(a), signed_bits(b)
        shift = bits.dtype.itemsize * 8 - 1 if a.dtype.is_floating_point else 0
        mask = (1 << shift) - 1
    # Of wider floats, nearly all differences are rounded.
    collect = MOST_ODD if max(a.dtype.itemsize, b.dtype.itemsize) <= 2 else 0
    flat, histogram, odd = _scan(
        wide, other_wide, bits, other_bits, shift, mask, *buffers(size), size, rtol, atol, collect
    )
    found = []
    for number, i in enumerate(starts):
        row = flat[number * _SCANNED : (number + 1) * _SCANNED]
        one, other = a[i : i + size], b[i : i + size]
        if not all(map(math.isfinite, row[:4])):
            figures, counts, differences = exact(one, other, rtol, atol, i)
            histogram += counts
            odd.append(differences[_is_rounded(differences)])
        else:
            figures = Figures._make([*row, *Figures()[_SCANNED:]])
            if shift <= 0:
                steps = figures.max_abs if shift == 0 else max_ulp(one, other)
                figures = figures._replace(max_ulp=steps)
        found.append(figures)
    if sum(part.numel() for part in odd) >= collect:
        return Scanned(found, histogram, None)
    nothing = torch.empty(0, dtype=torch.float64, device="cpu")
    return Scanned(found, histogram, torch.cat([nothing, *odd]))


def _is_rounded(w: torch.Tensor) -> torch.Tensor:
    """Whether float32's upper half is not w, in float64, itself."""
    codes = w.to(torch.float32).view(torch.int32) >> 16 << 16
    return codes.view(torch.float32).to(torch.float64) != w


def exact(
    one: torch.Tensor, other: torch.Tensor, rtol: float, atol: float, start: int
) -> tuple[Figures, torch.Tensor, torch.Tensor]:
    """Return the figures of a chunk, whatever it holds, its histogram, and its differences.

    Args:
        one: the baseline's elements, of shape [n].
        other: the target's.
        rtol: relative tolerance.
        atol: absolute tolerance.
        start: the index of its first element.
    """
    x, y, d, w, size, excluded = apart(one, other)
    is_complex = d.numel() > w.numel()
    relative = w / size
    small = (size < 2.0**-500) & (size > 0)
    unsafe = small | w.isinf() | size.isinf()
    if bool(unsafe.any()):  # a difference or modulus may be out of range, or have lost digits
        scale = torch.full_like(w, 0.25).masked_fill_(small, 2.0**500)
        scale = scale.repeat_interleave(d.numel() // w.numel())
        apart_by = _modulus(y * scale - x * scale, is_complex)
        relative = torch.where(unsafe, apart_by / _modulus(x * scale, is_complex), relative)
    relative.masked_fill_((size == 0) | excluded, 0.0)
    counts: dict[str, int] = {}
    disagree, odd_at = 0, -1
    if bool(excluded.any()):
        counts, disagree, odd_at = _not_finite(one, other, excluded)
    scales = [_exponent(x), _exponent(y), _exponent(d)]
    if bool(d.isfinite().all()):
        d = _times(d, -scales[2])
    else:
        scales[2] = max(scales) + 1
        d = _times(y, -scales[2]) - _times(x, -scales[2])
    x, y = _times(x, -scales[0]), _times(y, -scales[1])
    beyond = (w > atol + rtol * size) | w.isinf()
    figures = Figures(
        float(torch.dot(x, x)),
        float(torch.dot(y, y)),
        float(torch.dot(x, y)),
        float(torch.dot(d, d)),
        float(d.sum()),
        float(_modulus(d, is_complex).sum()),
        float((w > 0).sum()) + disagree,
        float(beyond.sum()) + disagree,
        *_greatest(w.masked_fill(~beyond, 0.0), start),
        *_greatest(w, start),
        *_greatest(relative, start),
        max_ulp(one, other, excluded),
        float(odd_at + start) if odd_at >= 0 else -1.0,
        (scales[0], scales[1], scales[2]),
        **counts,
    )
    kept = w[~excluded]
    codes = code(kept, is_wide=not is_plain(one, other))
    return figures, torch.bincount(codes >> 16, minlength=BINS), kept


def _not_finite(
    one: torch.Tensor, other: torch.Tensor, excluded: torch.Tensor
) -> tuple[dict[str, int], int, int]:
    """Count elements NaN or infinite on one side and not so on the other, and find the first."""
    x, y = (as_numbers(values).to(torch.complex128)[excluded] for values in (one, other))
    nan_a, nan_b, differ = x.isnan(), y.isnan(), x != y
    counts = {
        "nan_a": int((nan_a & ~nan_b).sum()),
        "nan_b": int((nan_b & ~nan_a).sum()),
        "inf_a": int((x.isinf() & differ).sum()),
        "inf_b": int((y.isinf() & differ).sum()),
    }
    disagree = differ & ~(nan_a & nan_b)
    places = excluded.nonzero().flatten()[disagree]
    return counts, places.numel(), int(places[0]) if places.numel() else -1


def _greatest(values: torch.Tensor, start: int) -> tuple[float, float]:
    """Return the greatest of some values and its index; 0 and -1 where none is above 0."""
    most = float(values.max())
    return (most, float((values == most).nonzero()[0].item() + start)) if most > 0 else (0.0, -1.0)


def _modulus(values: torch.Tensor, is_complex: bool) -> torch.Tensor:
    """Return the modulus of numbers, of shape [n], or [2 n] where they are complex."""
    return (torch.view_as_complex(values.view(-1, 2)) if is_complex else values).abs()


def _exponent(values: torch.Tensor) -> int:
    """Return e where values are to be scaled by 2^-e before they are squared, else 0."""
    e = math.frexp(float(values.abs().max()))[1]
    return e if abs(e) > _SAFE else 0


def _times(values: torch.Tensor, e: int) -> torch.Tensor:
    """Return values times 2^e; in two steps, since 2^e itself may be out of range."""
    half = e // 2
    return values * math.ldexp(1.0, half) * math.ldexp(1.0, e - half) if e else values


def code(w: torch.Tensor, is_wide: bool = False) -> torch.Tensor:
    """Return integers below 2^31 that are in the order of w, absolute differences in float64.

    They are the bits of w as float32, or, where w may be beyond that, the upper half of its own.
    """
    if is_wide:
        return w.view(torch.int64) >> 32
    return w.to(torch.float32).view(torch.int32).to(torch.int64)


def buffers(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return memory for five chunks as float64, and one as float32 and as its bits.

    It is a thread's own, and kept: fresh pages cost most.
    """
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    kept = getattr(_memory, "buffers", None)
    if kept is None or kept[1].numel() < size:
        with torch.inference_mode(False):  # else it could be used under that mode alone
            wide = torch.empty(5 * size, dtype=torch.float64, device="cpu")
            narrow = torch.empty(size, dtype=torch.float32, device="cpu")
            kept = _memory.buffers = wide, narrow, narrow.view(torch.int32)
    return kept
