"""Statistics against whole-tensor float64, however they are gathered."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import pytest
import torch

from recorder import scripting
from recorder.writing import statistics as module
from recorder.writing.statistics import CHUNK, Statistics, of_many, workspace

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
DTYPES += [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]


def gathered(tensor, parts=1):
    one = Statistics(tensor.dtype, workspace())
    for part in tensor.flatten().view(torch.uint8).view(parts, -1):
        one.add(part)
    return one.result()


def expected(tensor):
    x = tensor.flatten()
    x = (x.float() if x.dtype.itemsize == 1 and x.dtype.is_floating_point else x).double()
    finite = x[x.isfinite()]
    return {
        "min": finite.min().item(),
        "max": finite.max().item(),
        "mean": finite.mean().item(),
        "std": finite.std().item(),
        "l2": finite.norm().item(),
        "nan_count": int(x.isnan().sum()),
        "inf_count": int(x.isinf().sum()),
    }


def close(found, wanted):
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-300), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 50.0])
def test_agree_with_float64_over_the_whole(dtype, scale):
    tensor = (torch.randn(3, 700, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    close(gathered(tensor, 3), expected(tensor))
    for row, one in zip(tensor, of_many(tensor.view(torch.uint8), dtype, workspace()), strict=True):
        close(one, expected(row))


def test_more_than_a_chunk():
    tensor = torch.randn(2 * CHUNK + 12345) + 3
    close(gathered(tensor), expected(tensor))


@pytest.mark.parametrize("offset", [1e4, 1e7, 1e12])
def test_a_mean_far_from_zero_costs_no_digits(offset):
    tensor = offset + torch.randn(5000, dtype=torch.float64)
    assert gathered(tensor)["std"] == pytest.approx(tensor.std().item(), rel=1e-9)
    rows = tensor.view(5, 1000)
    many = of_many(rows.view(torch.uint8), torch.float64, workspace())
    for row, one in zip(rows, many, strict=True):
        assert one["std"] == pytest.approx(row.std().item(), rel=1e-9)


def test_what_is_not_finite_is_counted_and_left_out_of_the_rest():
    rows = torch.randn(4, 100)
    rows[1, 3], rows[1, 4], rows[3, 0] = math.nan, math.inf, -math.inf
    rows[2] = 7.0
    found = of_many(rows.view(torch.uint8), torch.float32, workspace())
    for row, one in zip(rows, found, strict=True):
        close(one, expected(row))
    assert found[2]["std"] == 0.0
    nothing = torch.full((2, 3), math.nan)
    for one in of_many(nothing.view(torch.uint8), torch.float32, workspace()):
        assert one["min"] is None and one["l2"] is None and one["nan_count"] == 3


def test_huge_values_overflow_to_nothing_not_to_infinity():
    found = gathered(torch.tensor([1.5e308, -1.5e308, 1.5e308], dtype=torch.float64))
    assert found["max"] == 1.5e308 and found["l2"] is None


def test_one_element_has_no_deviation():
    (found,) = of_many(torch.ones(1, 1).view(torch.uint8), torch.float32, workspace())
    assert found["std"] is None and found["mean"] == 1.0


def test_without_scripting_the_figures_are_the_same(monkeypatch):
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def gone(function):
        raise RuntimeError("removed")

    with warnings.catch_warnings(record=True) as said:
        assert scripting.scripted(double)(torch.ones(2)).tolist() == [2.0, 2.0]
    assert not said
    monkeypatch.setattr(torch.jit, "script", gone)
    assert scripting.scripted(double) is double
    tensor = torch.randn(4, 1000)
    before = gathered(tensor), of_many(tensor.view(torch.uint8), torch.float32, workspace())
    plain = (
        scripting.scripted(module._moments.__wrapped__),
        scripting.scripted(module._moments_of_rows.__wrapped__),
    )
    monkeypatch.setattr(module, "_moments", plain[0])
    monkeypatch.setattr(module, "_moments_of_rows", plain[1])
    assert before == (
        gathered(tensor),
        of_many(tensor.view(torch.uint8), torch.float32, workspace()),
    )


@pytest.mark.parametrize("power", [-1070, -600, -200, 0, 200, 600, 1020])
def test_huge_and_tiny_float64_values(power):
    base = torch.tensor([1.0, 2.0, 3.0, -4.0, 0.5], dtype=torch.float64)
    values = torch.ldexp(base, torch.tensor(power))
    exact = [Fraction(v) for v in values.tolist()]
    mean = sum(exact) / len(exact)
    expected = {
        "mean": float(mean),
        "std": root(sum((v - mean) ** 2 for v in exact) / (len(exact) - 1)),
        "l2": root(sum(v * v for v in exact)),
    }
    wide = workspace()
    one = Statistics(torch.float64, wide)
    for part in (values[:2], values[2:]):
        one.add(part.view(torch.uint8))
    many = of_many(values.view(torch.uint8).reshape(1, -1), torch.float64, wide)[0]
    for found in (one.result(), many):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-12), name


def root(value):
    """Return the root of a fraction, which float64 may not be able to square."""
    shift = 2 * ((value.numerator.bit_length() - value.denominator.bit_length()) // 2)
    scaled = value / (Fraction(2) ** shift)
    return math.ldexp(math.sqrt(float(scaled)), shift // 2)


def test_values_of_all_sizes_in_one_payload():
    sizes = (1e-300, 1e-200, 1.0, 1e-310, 1e200, 1e-5, 1e300, 2.0)
    one = Statistics(torch.float64, workspace())
    for value in sizes:
        one.add(torch.full((3,), value, dtype=torch.float64).view(torch.uint8))
    found = one.result()
    assert found["l2"] == pytest.approx(1e300 * 3**0.5)
    assert found["mean"] == pytest.approx(1e300 / len(sizes))
    assert found["min"] == 1e-310 and found["max"] == 1e300
