"""How much two tensors differ: the figures of a diff, exact to the last digits of float64.

x is the baseline's element, y the target's. NaN and infinite elements are counted apart; all other
figures are over the elements that are finite on both sides. Complex elements have no `bias` and no
values at a place.

changed       elements that are not equal; NaN equals NaN, and 0.0 equals -0.0
mismatched    elements with |y - x| > atol + rtol |x|, or NaN or infinite on one side alone: what
              `torch.testing.assert_close(y, x, equal_nan=True)` counts, with its tolerances
max_beyond    greatest |y - x| of those that are finite on both sides; where
l2_a l2_b     |x| and |y|, the roots of the sums of squares
max_abs       greatest |y - x|; where, and both values
max_rel       greatest |y - x| / |x| over x other than 0; where, and both values; None without any
mean_abs      mean |y - x|
bias          mean y - x; exact where it cancels, by the extraction of Rump, Ogita and Oishi,
              "Accurate Floating-Point Summation" (2008)
rel_diff      1 - 2 <x, y> / (|x|^2 + |y|^2), DeepGEMM's `calc_diff`, computed as
              |y - x|^2 / (|x|^2 + |y|^2), the same without the cancellation; 0 for equal tensors, 1
              where one of two is all zero
cosine        <x, y> / (|x| |y|); 1 for two of zeros, 0 where one of two is all zero
p50 p99 p999  percentiles of |y - x|, within a millionth of each, see `quantiles`
max_ulp       greatest distance in units in the last place (Goldberg, "What Every Computer Scientist
              Should Know About Floating-Point Arithmetic", 1991): steps between representable
              values, of the coarser dtype, that is the one with fewer bits of fraction; 0.0 and
              -0.0 are none apart; what is beyond its range is one step further; of integers, the
              greatest difference; at most 2^63 - 1
nan_a nan_b   elements NaN on that side alone; inf_a and inf_b: infinite on that side and not the
              same infinity on the other; odd_at is the first such element
profile       where the error lies, see `profile`; None of what is exact, and where no element is
              more than one step off

1. Both tensors are cut into segments of the same size on any machine; `chunks.scan` does each, on
   several threads where there are some.
2. `_merged` adds the segments' figures up, in order.
3. `quantiles.percentiles` goes over them again, and `profile` once more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from recorder.bits import as_bits, has_statistics, why_not_by_value

from .chunks import Figures, Map, Pair, Scanned, scan
from .elements import apart, as_numbers, widened
from .profile import Profile, profile
from .quantiles import percentiles

SEGMENT = 1 << 22
"""Elements that one thread does at a time."""
CANCELLED = 1e-5  # of the mean |y - x|; a bias below that is added up again, exactly
_SUM_CHUNK = 1 << 18
_SIXTEEN = torch.finfo(torch.float16).eps

# torch.testing.assert_close: rtol, atol; others 0, 0
_TOLERANCES = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
    torch.complex32: (1e-3, 1e-5),
    torch.complex64: (1.3e-6, 1e-5),
    torch.complex128: (1e-7, 1e-7),
}


@dataclass(frozen=True)
class Measures:
    """The figures of one pair; see the module's docstring. None where they are not defined."""

    numel: int
    rtol: float
    atol: float
    bitwise: bool
    changed: int
    mismatched: int
    max_beyond: float | None = None
    max_beyond_at: int | None = None
    odd_at: int | None = None
    max_abs: float | None = None
    max_abs_at: int | None = None
    max_abs_a: float | None = None
    max_abs_b: float | None = None
    max_rel: float | None = None
    max_rel_at: int | None = None
    max_rel_a: float | None = None
    max_rel_b: float | None = None
    mean_abs: float | None = None
    bias: float | None = None
    rel_diff: float | None = None
    cosine: float | None = None
    p50: float | None = None
    p99: float | None = None
    p999: float | None = None
    max_ulp: int | None = None
    l2_a: float | None = None
    l2_b: float | None = None
    nan_a: int = 0
    nan_b: int = 0
    inf_a: int = 0
    inf_b: int = 0
    profile: Profile | None = None


class Incomparable(TypeError):
    """Two tensors whose elements mean other things."""


def tolerances(a: torch.dtype, b: torch.dtype) -> tuple[float, float]:
    """Return rtol and atol of a pair of dtypes: of either the larger, as torch.testing has it."""
    pairs = [_TOLERANCES.get(dtype, (0.0, 0.0)) for dtype in (a, b)]
    return max(rtol for rtol, _ in pairs), max(atol for _, atol in pairs)


def units(a: torch.dtype, b: torch.dtype) -> tuple[float, float]:
    """Return, of the coarser of two dtypes, the unit of rounding, and of a factor that is none.

    The latter is the unit of 16 bits, which is rounded to by every operation; wider floats may have
    been computed with less than they can hold, as torch's tolerances take it.
    """
    floats = [t for t in (a, b) if t.is_floating_point or t.is_complex]
    eps = max(torch.finfo(t).eps for t in floats)
    return eps, max(eps, tolerances(a, b)[0] if eps < _SIXTEEN else 0.0)


def measure(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    is_gradient: bool = False,
    run: Map = map,
) -> Measures:
    """Compare two tensors on the CPU.

    Args:
        a: the baseline's, of any shape and dtype.
        b: the target's, of the same shape; of another dtype it is compared by value.
        rtol: relative tolerance; by default torch's for the pair of dtypes.
        atol: absolute tolerance, likewise.
        is_gradient: whether they are gradients, whose rows are sums of larger numbers.
        run: like `map`, over segments of the tensors, perhaps on several threads.

    Raises:
        ValueError: the shapes differ.
        Incomparable: the dtypes are not each other's values.
    """
    if why := why_not_by_value(a.dtype, b.dtype):
        raise Incomparable(why)
    if a.shape != b.shape:
        raise ValueError(f"shapes {list(a.shape)} and {list(b.shape)} are not equal")
    usual = tolerances(a.dtype, b.dtype)
    rtol = usual[0] if rtol is None else rtol
    atol = usual[1] if atol is None else atol
    one, other = _flat(a), _flat(b)
    segments = list(zip(one.split(SEGMENT), other.split(SEGMENT), strict=True))
    same = a.dtype == b.dtype
    bitwise = same and all(run(_same_bits, segments))
    if not (has_statistics(a.dtype) and has_statistics(b.dtype)):
        changed = sum(run(_changed_bits, segments))
        return Measures(a.numel(), rtol, atol, bitwise, changed, changed)
    if a.numel() == 0:
        return Measures(0, rtol, atol, True, 0, 0, rel_diff=0.0, cosine=1.0, max_ulp=0)
    parts = list(run(lambda pair: scan(*pair, rtol, atol), segments))
    figures = [
        _shifted(figure, i * SEGMENT) for i, part in enumerate(parts) for figure in part.figures
    ]
    changed = int(sum(figure.changed for figure in figures))
    if not same and not changed:
        bitwise = all(run(_same_signs, segments))
    merged = _merged(segments, figures, parts, run)
    is_rounded = a.dtype in _TOLERANCES or b.dtype in _TOLERANCES
    if changed and is_rounded and merged.get("max_ulp", 0) > 1:
        eps, unit = units(a.dtype, b.dtype)
        merged["profile"] = profile(a, b, eps, unit, is_gradient=is_gradient, run=run)
    return Measures(
        a.numel(),
        rtol,
        atol,
        bitwise,
        changed,
        int(sum(figure.mismatched for figure in figures)),
        nan_a=sum(figure.nan_a for figure in figures),
        nan_b=sum(figure.nan_b for figure in figures),
        inf_a=sum(figure.inf_a for figure in figures),
        inf_b=sum(figure.inf_b for figure in figures),
        odd_at=next((int(figure.odd_at) for figure in figures if figure.odd_at >= 0), None),
        **merged,
    )


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()


def _same_bits(pair: Pair) -> bool:
    return torch.equal(*map(as_bits, pair))


def _changed_bits(pair: Pair) -> int:
    one, other = map(as_bits, pair)
    return int((one != other).sum())


def _same_signs(pair: Pair) -> bool:
    """Whether elements of two dtypes that are equal have zeros of one sign, too."""
    a, b = map(as_numbers, pair)
    if a.is_complex() or b.is_complex():
        a, b = (torch.view_as_real(t.to(torch.complex128)) for t in (a, b))
    if not (a.is_floating_point() and b.is_floating_point()):
        return True
    return bool(((torch.signbit(a) == torch.signbit(b)) | a.isnan()).all())


def _shifted(figure: Figures, start: int) -> Figures:
    """Return figures of a segment's chunk with places in the whole tensor."""
    return figure._replace(
        max_beyond_at=figure.max_beyond_at + start if figure.max_beyond_at >= 0 else -1.0,
        odd_at=figure.odd_at + start if figure.odd_at >= 0 else -1.0,
        max_abs_at=figure.max_abs_at + start if figure.max_abs_at >= 0 else -1.0,
        max_rel_at=figure.max_rel_at + start if figure.max_rel_at >= 0 else -1.0,
    )


def _merged(
    segments: list[Pair], figures: list[Figures], parts: list[Scanned], run: Map
) -> dict[str, Any]:
    """Return the figures of the elements that are finite on both sides, by name."""
    histogram = functools.reduce(torch.add, (part.histogram for part in parts))
    finite = int(histogram.sum())
    if not finite:
        return {}
    xx, yy, xy, dd, signed, total = (
        _total(figures, name, by)
        for name, by in (
            ("xx", (2, 0, 0)), ("yy", (0, 2, 0)), ("xy", (1, 1, 0)),
            ("dd", (0, 0, 2)), ("signed", (0, 0, 1)), ("total", (0, 0, 1)),
        )
    )  # fmt: skip
    is_complex = any(t.is_complex() for t in segments[0])
    ranks = [max(1, math.ceil(finite * q / 1000)) for q in (500, 990, 999)]
    found = [0.0] * 3
    if total[0]:
        odd = _all_of([part.odd for part in parts])
        most = max(figure.max_abs for figure in figures)
        found = percentiles(segments, histogram, ranks, most, odd, run)
    return {
        **_place(segments, figures, "max_abs"),
        **(_place(segments, figures, "max_rel") if xx[0] else {}),
        "mean_abs": _ldexp(total[0] / finite, total[1]),
        "bias": None if is_complex else _bias(segments, signed, total, finite, run),
        "rel_diff": _ratio(dd, _plus(xx, yy)),
        "cosine": _cosine(xx, yy, xy),
        **dict(zip(("p50", "p99", "p999"), found, strict=True)),
        **_place(segments, figures, "max_beyond"),
        "l2_a": _root(xx),
        "l2_b": _root(yy),
        "max_ulp": min(int(max(figure.max_ulp for figure in figures)), (1 << 63) - 1),
    }


def _all_of(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


Scaled = tuple[float, int]
"""A number and the power of two that it is in units of."""


def _total(figures: list[Figures], name: str, by: tuple[int, int, int]) -> Scaled:
    """Add up one figure of all chunks.

    Args:
        figures: the chunks'.
        name: the figure.
        by: how often each of a chunk's scales goes into its unit.
    """
    if not any(any(figure.scales) for figure in figures):
        return math.fsum(getattr(figure, name) for figure in figures), 0
    parts = [
        (getattr(figure, name), sum(k * e for k, e in zip(by, figure.scales, strict=True)))
        for figure in figures
        if getattr(figure, name)
    ]
    if not parts:
        return 0.0, 0
    top = max(math.frexp(value)[1] + e for value, e in parts)
    top = top if abs(top) > 900 else 0
    return math.fsum(_ldexp(value, e - top) for value, e in parts), top


def _ldexp(value: float, e: int) -> float:
    """Return value times 2^e, infinite where that is beyond float64."""
    try:
        return math.ldexp(value, e)
    except OverflowError:
        return math.copysign(math.inf, value)


def _plus(one: Scaled, other: Scaled) -> Scaled:
    if not one[0] or not other[0]:
        return one if one[0] else other
    top = max(one[1], other[1])
    return _ldexp(one[0], one[1] - top) + _ldexp(other[0], other[1] - top), top


def _ratio(one: Scaled, other: Scaled) -> float:
    return _ldexp(one[0] / other[0], one[1] - other[1]) if one[0] else 0.0


def _cosine(xx: Scaled, yy: Scaled, xy: Scaled) -> float:
    if not xx[0] or not yy[0]:
        return float(xx[0] == yy[0])
    # Each square's own unit is even, but for what adding up made of it.
    (x, ex), (y, ey) = ((v * 2 ** (e % 2), e - e % 2) for v, e in (xx, yy))
    found = _ldexp(xy[0] / math.sqrt(x) / math.sqrt(y), xy[1] - ex // 2 - ey // 2)
    return max(-1.0, min(1.0, found))


def _root(total: Scaled) -> float:
    value, e = total
    return _ldexp(math.sqrt(value * 2 ** (e % 2)), e // 2)


def _place(segments: list[Pair], figures: list[Figures], name: str) -> dict[str, Any]:
    """Return the greatest of some figure, its index, and both values there."""
    figure = max(figures, key=lambda figure: float(getattr(figure, name)))
    most, at = getattr(figure, name), int(getattr(figure, f"{name}_at"))
    found = {name: most}
    if at >= 0:
        found[f"{name}_at"] = at
        one, other = (as_numbers(t)[at % SEGMENT] for t in segments[at // SEGMENT])
        if name != "max_beyond" and not (one.is_complex() or other.is_complex()):
            found |= {f"{name}_a": float(one), f"{name}_b": float(other)}
    return found


def _bias(segments: list[Pair], signed: Scaled, total: Scaled, n: int, run: Map) -> float:
    if not total[0] or abs(_ratio(signed, total)) >= CANCELLED:
        return _ldexp(signed[0] / n, signed[1])
    return exact_bias(segments, n, run)


def exact_bias(segments: Sequence[Pair], n: int, run: Map = map) -> float:
    """Return the mean of y - x over the `n` elements that are finite on both sides, exactly."""
    bias = sum(run(_exact_difference, segments), Fraction()) / n
    try:
        return float(bias)
    except OverflowError:
        return math.inf if bias > 0 else -math.inf


def _exact_difference(pair: Pair) -> Fraction:
    """Return the sum of y - x, exactly."""
    found = Fraction()
    for a, b in zip(*(t.split(_SUM_CHUNK) for t in pair), strict=True):
        used = ~apart(a, b).excluded
        found += sum(exact_sum(values[used]) for values in widened(b))
        found -= sum(exact_sum(values[used]) for values in widened(a))
    return found


def exact_sum(values: torch.Tensor) -> Fraction:
    """Return the exact sum of `values`, of shape [n], float64, all finite."""
    huge = values.abs() > 2.0**900
    if bool(huge.any()):  # what they are split by could overflow
        return exact_sum(values[huge] * 2.0**-200) * 2**200 + exact_sum(values[~huge])
    found = Fraction()
    room = math.frexp(values.numel() + 2)[1]
    while values.numel() and (most := float(values.abs().max())):
        sigma = math.ldexp(1.0, math.frexp(most)[1] + room)
        part = (values + sigma) - sigma
        found += Fraction(float(part.sum()))
        values = values - part
    return found
