"""Chunks, segments and percentiles, on one thread or several, compiled or not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
from figures import (
    DTYPES,
    FLOATS,
    HUGE,
    INF,
    NAN,
    TINY,
    check,
    filled,
)

from replayer.measuring import chunks, measures, quantiles
from replayer.measuring.measures import measure

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore:.*Half support is experimental"),
]


KINDS = [torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.int64]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 23, 24, 25, 31, 33, 47, 48, 49])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_sizes_around_those_of_chunks_and_segments(dtype, n, small):
    check(filled(dtype, n, 1), filled(dtype, n, 2))


@pytest.mark.parametrize("dtype", KINDS[:4], ids=str)
@pytest.mark.parametrize("at", [0, 8, 23, 24, 50, 99])
def test_a_nan_in_some_chunk(dtype, at, small):
    a, b = filled(dtype, 100, 1), filled(dtype, 100, 2)
    b[at] = NAN
    check(a, b)
    check(b, a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32], ids=str)
def test_percentiles_within_one_code(dtype, small):
    """The differences agree in all digits that the histograms look at."""
    steps = torch.arange(100, dtype=torch.float64).flip(0)
    a, b = steps * 2.0**-10, torch.full((100,), 2.0**30).double()
    found = check(a.to(dtype), b.to(dtype))
    assert found.p50 <= found.p99 <= found.p999 <= found.max_abs


def test_percentiles_that_share_codes_or_not(small):
    for dtype in (torch.float32, torch.float64):
        for powers in ([0] * 90 + [1] * 10, [-40] * 49 + [0] * 49 + [40] * 2, [*range(100)]):
            d = torch.pow(2.0, torch.tensor(powers, dtype=torch.float64)) * 1.0000001
            check(torch.zeros(100, dtype=dtype), d.to(dtype))
            check(torch.full((100,), 1e-3, dtype=dtype), -d.to(dtype))


def test_percentiles_of_tiny_and_huge_differences(small):
    a = torch.arange(100) * TINY
    check(a, torch.zeros(100).double())
    b = torch.linspace(0.2, 1, 100).double() * HUGE
    check(b, -b)
    check(b.float(), -b)
    c = torch.linspace(0.6, 1, 100) * torch.finfo(torch.float32).max
    check(c, -c.flip(0))


def test_percentiles_beside_infinity(small):
    a, b = filled(torch.float32, 100, 1), filled(torch.float32, 100, 2)
    a[10:70], b[20:60] = INF, -INF
    check(a, b)
    check(a.double(), b.double())
    most = torch.finfo(torch.float32).max
    check(torch.where(a.isinf(), a, most), torch.full((100,), -most))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_chunks_of_the_usual_size(dtype):
    n = 2 * chunks.CHUNK + 100
    a, b = filled(dtype, n, 1), filled(dtype, n, 2)
    found = measure(a, b)
    w = (b.double() - a.double()).abs()
    assert found.mean_abs == pytest.approx(float(w.mean()), rel=1e-12)
    ordered = w.sort().values
    ranks = [-(-n * q // 1000) for q in (500, 990, 999)]
    wanted = [float(ordered[r - 1]) for r in ranks]
    digits = 0 if dtype == torch.bfloat16 else 1e-6  # of floats of 16 bits they are exact
    assert [found.p50, found.p99, found.p999] == pytest.approx(wanted, rel=digits, abs=0)
    assert (found.max_abs, found.max_abs_at) == (float(w.max()), int(w.argmax()))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_threads_change_no_bit(dtype, small):
    a, b = filled(dtype, 120, 1), filled(dtype, 120, 2)
    with ThreadPoolExecutor(4) as pool:
        assert measure(a, b, run=pool.map) == measure(a, b)


def test_threads_change_no_bit_of_chunks_of_the_usual_size(monkeypatch):
    monkeypatch.setattr(measures, "SEGMENT", chunks.CHUNK + 1000)
    a, b = filled(torch.float32, 300_000, 1), filled(torch.float32, 300_000, 2)
    with ThreadPoolExecutor(4) as pool:
        assert measure(a, b, run=pool.map) == measure(a, b)


def test_what_speed_depends_on_is_compiled():
    for function in (chunks._scan, quantiles._refine):
        assert isinstance(function, torch.jit.ScriptFunction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_or_not_gives_the_same(dtype, small, monkeypatch):
    a, b = filled(dtype, 90, 1), filled(dtype, 90, 2)
    b[:20] = a[:20]
    if dtype in FLOATS[:4]:
        b[50:52] = torch.tensor([NAN, INF])
    found = measure(a, b)
    monkeypatch.setattr(chunks, "_scan", chunks._scan.__wrapped__)
    monkeypatch.setattr(quantiles, "_refine", quantiles._refine.__wrapped__)
    assert asdict(measure(a, b)) == asdict(found)
