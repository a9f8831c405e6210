"""What rows add up to, of dtypes that float32 holds, is what float64 makes of it."""

from __future__ import annotations

import dataclasses
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from replayer.measuring import rows
from replayer.measuring.profile import profile
from replayer.measuring.rows import DD_EXTREME, ELEMENT, XX, XX_EXTREME, add_up


def pair(seed):
    """Two matrices of numbers as jobs have them, and of those that they have once in a while."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = rng.randint(1, 60), rng.randint(1, 200)
    a = torch.randn(shape, dtype=torch.float64) * 10 ** rng.uniform(-25, 20)
    if rng.random() < 0.3:
        a = a.relu()
    if rng.random() < 0.3:  # rows of other sizes
        a *= 10 ** torch.empty(shape[0], 1, dtype=torch.float64).uniform_(-12, 5)
    if rng.random() < 0.3:  # a massive channel
        a[:, 0] = a.abs().max() * 10 ** rng.uniform(1, 4)
    b = a * (1 + 10 ** rng.uniform(-6, -1) * torch.randn(shape, dtype=torch.float64))
    if rng.random() < 0.4:  # a mask
        fill = rng.choice([0.0, -1e4, -3.38e38, float("-inf")])
        masked = torch.rand(shape) < rng.random()
        a, b = a.masked_fill(masked, fill), b.masked_fill(masked, fill)
    if rng.random() < 0.2:
        a[rng.randrange(shape[0]), 0] = float("nan")
    if rng.random() < 0.2:
        b[rng.randrange(shape[0])] = 0.0
    dtype = rng.choice([torch.float32, torch.bfloat16])
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("seed", range(150))
def test_float32_adds_up_what_float64_does(seed):
    one, other = pair(seed)
    found, _ = add_up(one, other)
    expected, scale = add_up(one.double(), other.double())
    assert scale == 1.0  # float64 holds all of it as it is
    size = expected[:, [0, 1]].amax(1).sqrt()
    least = torch.stack([size**p for p in (2, 2, 2, 2, 1, 4)], 1) * 1e-9
    for column in range(6):
        torch.testing.assert_close(
            found[:, column] / least[:, column].clamp(min=1e-290),
            expected[:, column] / least[:, column].clamp(min=1e-290),
            rtol=1e-4,
            atol=1e4,
        )
    torch.testing.assert_close(found[:, 6:8], expected[:, 6:8], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[:, XX_EXTREME:], expected[:, XX_EXTREME:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(1, 500_000), (3, 70_000), (700, 300), (4_000, 3)])
def test_threads_and_parts_change_nothing(shape, monkeypatch):
    torch.manual_seed(0)
    a = torch.randn(shape, dtype=torch.float64)
    b = a * (1 + 1e-3 * torch.randn(shape, dtype=torch.float64))
    whole, _ = add_up(a, b)
    assert whole.shape == (shape[0], 11)
    monkeypatch.setattr(rows, "_AT_ONCE", 1 << 15)
    monkeypatch.setattr(rows, "_CHUNK", 1 << 12)
    with ThreadPoolExecutor(3) as pool:
        parts, _ = add_up(a, b, pool.map)
    torch.testing.assert_close(parts[:, :ELEMENT], whole[:, :ELEMENT])
    torch.testing.assert_close(parts[:, ELEMENT], whole[:, ELEMENT], rtol=0.05, atol=0)
    assert parts[:, XX].sum() == pytest.approx(float(a.square().sum()))


@pytest.mark.parametrize("exponent", [-300, -200, 199, 300])
def test_float64_is_scaled_where_its_squares_and_fourth_powers_are_out_of_range(exponent):
    torch.manual_seed(0)
    a = torch.randn(5, 40, dtype=torch.float64)
    a[:, 3] = 100.0
    b = a * (1 + 1e-3 * torch.randn(5, 40, dtype=torch.float64)) + 0.25
    usual = profile(a, b, 2.0**-52, 1e-7)
    assert usual.offset == pytest.approx(0.25, rel=1e-2) and usual.extreme > 0
    far = profile(a * 2.0**exponent, b * 2.0**exponent, 2.0**-52, 1e-7)
    assert far.offset == pytest.approx(usual.offset * 2.0**exponent)
    assert far == dataclasses.replace(usual, offset=far.offset)


def test_a_mask_of_the_largest_number_hides_no_row_of_float64():
    torch.manual_seed(0)
    a = torch.randn(6, 64, dtype=torch.float64)
    b = a * (1 + 1e-12 * torch.randn(6, 64, dtype=torch.float64))
    b[4] = torch.randn(64, dtype=torch.float64)
    masked = torch.rand(6, 64) < 0.3
    a, b = (t.masked_fill(masked, -torch.finfo(torch.float64).max) for t in (a, b))
    found = profile(a, b, 2.0**-52, 1e-7)
    assert found.row_at == (4, -1)
    assert found.row > 0.9
    assert found.extreme == 0.0


def test_a_mask_of_the_largest_number_on_one_side_is_infinitely_far_off():
    a = torch.randn(6, 64, dtype=torch.float64)
    b = a.clone()
    b[2, 3] = torch.finfo(torch.float64).max
    found = profile(a, b, 2.0**-52, 1e-7)
    assert found.row == found.whole == float("inf")
    assert found.row_at == (2, -1)


def test_extremes_are_added_up_without_overflow():
    a = torch.ones(4, 64)
    a[:, 5] = 3e38
    b = a.clone()
    b[:, 5] = 1.5e38
    found, _ = add_up(a, b)
    assert found[:, DD_EXTREME].tolist() == pytest.approx([1.5e38**2] * 4)
