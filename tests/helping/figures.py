"""What the figures of a diff mean, one element after the other: the reference of their tests."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from replayer.measuring.measures import measure

INF, NAN, HUGE, TINY = math.inf, math.nan, 1.7e308, 5e-324


FLOAT8 = [
    getattr(torch, name)
    for name in (
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    )
    if hasattr(torch, name)
]


FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64, *FLOAT8]


COMPLEX = [torch.complex32, torch.complex64, torch.complex128]


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
INTEGERS += [torch.uint16, torch.uint32, torch.uint64]


DTYPES = [*FLOATS, *COMPLEX, *INTEGERS, torch.bool]


def elements(tensor):
    """Every element as a pair of numbers, real and imaginary part, exactly."""
    flat = tensor.detach().resolve_conj().flatten()
    if flat.is_complex():
        flat = flat.to(torch.complex128)
        return [(one.real, one.imag) for one in flat.tolist()]
    if flat.is_floating_point():
        flat = flat.to(torch.float32 if flat.dtype.itemsize == 1 else torch.float64)
    return [(one, 0) for one in flat.tolist()]


def root(square):
    """The square root of a fraction, to some 100 digits."""
    if not square:
        return Fraction(0)
    power = 350 + (max(0, square.denominator.bit_length() - square.numerator.bit_length()) + 1) // 2
    return Fraction(math.isqrt((square.numerator << 2 * power) // square.denominator), 1 << power)


def rounded(fraction):
    try:
        return float(fraction)
    except OverflowError:
        return INF if fraction > 0 else -INF


def is_nan(one):
    return any(map(math.isnan, one))


def is_inf(one):
    return any(map(math.isinf, one))


def expected(a, b, rtol, atol):
    """All figures but `bitwise`, the places and the steps."""
    pairs = list(zip(elements(a), elements(b), strict=True))
    odd = [any(not math.isfinite(v) for v in (*x, *y)) for x, y in pairs]
    disagree = sum(
        bad and x != y and not (is_nan(x) and is_nan(y))
        for bad, (x, y) in zip(odd, pairs, strict=True)
    )
    found = {
        "numel": len(pairs),
        "nan_a": sum(is_nan(x) and not is_nan(y) for x, y in pairs),
        "nan_b": sum(is_nan(y) and not is_nan(x) for x, y in pairs),
        "inf_a": sum(is_inf(x) and x != y for x, y in pairs),
        "inf_b": sum(is_inf(y) and x != y for x, y in pairs),
    }
    kept = [
        (tuple(map(Fraction, x)), tuple(map(Fraction, y)))
        for bad, (x, y) in zip(odd, pairs, strict=True)
        if not bad
    ]
    d = [(y[0] - x[0], y[1] - x[1]) for x, y in kept]
    w = [root(dr * dr + di * di) if di else abs(dr) for dr, di in d]
    size = [root(re * re + im * im) if im else abs(re) for (re, im), _ in kept]
    found["changed"] = disagree + sum(one > 0 for one in w)
    beyond = [
        one for one, of in zip(w, size, strict=True) if one > Fraction(atol) + Fraction(rtol) * of
    ]
    found["mismatched"] = disagree + len(beyond)
    if not kept:
        return found
    xx, yy, xy, dd = (
        sum((p * q for u, v in pairs for p, q in zip(u, v, strict=True)), Fraction())
        for pairs in (
            [(x, x) for x, _ in kept],
            [(y, y) for _, y in kept],
            kept,
            [(one, one) for one in d],
        )
    )
    relative = [one / of for one, of in zip(w, size, strict=True) if of]
    n, ordered = len(w), sorted(w)
    complex_ = a.is_complex() or b.is_complex()
    cosine = xy / root(xx * yy) if xx and yy else Fraction(xx == yy)
    return found | {
        "max_beyond": rounded(max(beyond, default=Fraction())),
        "l2_a": rounded(root(xx)),
        "l2_b": rounded(root(yy)),
        "max_abs": rounded(max(w)),
        "max_rel": rounded(max(relative)) if relative else None,
        "mean_abs": rounded(sum(w) / n),
        "bias": None if complex_ else rounded(sum(one for one, _ in d) / n),
        "rel_diff": rounded(dd / (xx + yy)) if dd else 0.0,
        "cosine": float(cosine),
        "p50": rounded(ordered[-(-n * 500 // 1000) - 1]),
        "p99": rounded(ordered[-(-n * 990 // 1000) - 1]),
        "p999": rounded(ordered[-(-n * 999 // 1000) - 1]),
    }


def check_values(a, b, found, name):
    """The greatest figure is that of the elements at its place, and the values are theirs."""
    at = getattr(found, f"{name}_at")
    if not getattr(found, name):
        assert at is None
        return
    x, y = elements(a)[at], elements(b)[at]
    if a.is_complex() or b.is_complex():
        assert getattr(found, f"{name}_a") is None and getattr(found, f"{name}_b") is None
    else:
        assert getattr(found, f"{name}_a") == float(x[0])
        assert getattr(found, f"{name}_b") == float(y[0])
    one = expected(*(t.flatten()[at : at + 1] for t in (a, b)), 0, 0)[name]
    assert one == pytest.approx(getattr(found, name), rel=1e-9, abs=0)


PERCENTILES = ("p50", "p99", "p999")


def check(a, b, **options):
    """Measure a pair, and hold all that comes out against the reference."""
    found = measure(a, b, **options)
    wanted = expected(a, b, found.rtol, found.atol)
    for name, value in wanted.items():
        got = getattr(found, name)
        if value is None or isinstance(value, int):
            assert got == value, name
        else:
            least = 1e-9 if name == "cosine" else 2.0**-1042 if name in PERCENTILES else 2 * TINY
            digits = 1e-6 if name in PERCENTILES else 1e-9
            assert got == pytest.approx(value, rel=digits, abs=least), name
    if "max_abs" in wanted:
        check_values(a, b, found, "max_abs")
        check_values(a, b, found, "max_rel")
    else:
        assert found.max_abs is None and found.cosine is None and found.max_ulp is None
    return found


def filled(dtype, n, seed, scale=1.0):
    """Numbers of a dtype, over its range where it is small."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (n,), generator=generator).to(dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        ends = torch.iinfo(dtype)
        values = torch.randint(0, 1 << 16, (n,), generator=generator).tolist()
        span = ends.max - ends.min
        return torch.tensor([ends.min + span * value // 65535 for value in values], dtype=dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = torch.randn(n, dtype=wide, generator=generator) * scale
    return (values.abs() if "e8m0" in str(dtype) else values).to(dtype)
