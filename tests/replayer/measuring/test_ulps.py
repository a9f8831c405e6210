"""Steps between representable values."""

from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch
from figures import (
    FLOAT8,
    INF,
    NAN,
)

from replayer.measuring.measures import measure

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore:.*Half support is experimental"),
]


def stepped(values, count):
    for _ in range(count):
        values = torch.nextafter(values, torch.full_like(values, INF))
    return values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", [1.0, -1.0, 0.0, -1e-45, 0.99999, -2.0000002])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_steps_are_those_of_nextafter(dtype, start, count):
    a = torch.tensor([start], dtype=dtype)
    assert measure(a, stepped(a, count)).max_ulp == count
    assert measure(stepped(a, count), a).max_ulp == count


def values_of(dtype):
    """Every finite value of a dtype of 8 or 16 bits, ascending, zero once."""
    bits = torch.arange(1 << 8 * dtype.itemsize)
    every = bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
    numbers = every.to(torch.float32)
    return sorted({value for value in numbers.tolist() if math.isfinite(value)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FLOAT8], ids=str)
@pytest.mark.parametrize("beside", [0.0, NAN])
def test_steps_are_places_among_all_values(dtype, beside, small):
    values = values_of(dtype)
    rank = {value: i for i, value in enumerate(values)}
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        i, j = torch.randint(0, len(values), (2,), generator=generator).tolist()
        a = torch.tensor([values[i], beside], dtype=torch.float32).to(dtype)
        b = torch.tensor([values[j], beside], dtype=torch.float32).to(dtype)
        assert measure(a, b).max_ulp == abs(rank[values[i]] - rank[values[j]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_of_values_far_apart(dtype):
    def ordered(value):
        packed = struct.pack(">f" if dtype == torch.float32 else ">d", abs(value))
        magnitude = int.from_bytes(packed, "big")
        return magnitude if value > 0 else -magnitude

    for x, y in itertools.product([0.0, -0.0, 1.5, -3e38, 3e38, 1e-40, -1e-44], repeat=2):
        a, b = (torch.tensor([value], dtype=dtype) for value in (x, y))
        wanted = abs(ordered(a.item()) - ordered(b.item()))
        assert measure(a, b).max_ulp == pytest.approx(min(wanted, 2**63 - 1), rel=1e-15)


@pytest.mark.parametrize(
    ("one", "other", "coarse"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16, torch.float8_e4m3fn),
        (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e5m2),
        (torch.float8_e5m2fnuz, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        (torch.int32, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_steps_between_two_dtypes_are_the_coarser_ones(one, other, coarse):
    a, b = torch.tensor([1.0, 2.0]).to(one), torch.tensor([1.0, 3.0]).to(other)
    wanted = measure(a.to(coarse), b.to(coarse)).max_ulp
    assert measure(a, b).max_ulp == measure(b, a).max_ulp == wanted > 0


def test_steps_beyond_the_range_of_the_coarser_dtype():
    most = torch.finfo(torch.float16).max
    a, b = torch.tensor([most], dtype=torch.float16), torch.tensor([1e30])
    assert measure(a, b).max_ulp == measure(b, a).max_ulp == 1
    assert measure(-a, -b).max_ulp == 1
    assert measure(a, torch.tensor([most])).max_ulp == 0


def test_steps_of_complex_elements_are_those_of_their_parts():
    a = torch.tensor([1 + 2j, 3 - 1j])
    b = torch.complex(a.real, stepped(a.imag, 7))
    assert measure(a, b).max_ulp == 7
    assert measure(a.to(torch.complex32), (a + 2**-8).to(torch.complex32)).max_ulp == 4
    assert measure(a.real, b.real.to(torch.complex64)).max_ulp == 0
    b[0] = complex(1, NAN)
    assert measure(a, b).max_ulp == 7
