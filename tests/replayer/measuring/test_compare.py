"""The figures of the replay log."""

from __future__ import annotations

import math

import pytest
import torch

from replayer.measuring import compare
from replayer.measuring.compare import difference


def reference(a, b):
    """The figures as people write them, in float64 over whole tensors."""
    x, y = a.double().flatten(), b.double().flatten()
    apart = (x - y).abs()
    relative = 1 - 2 * (x @ y) / (x @ x + y @ y)
    return relative.item(), apart.max().item(), apart.mean().item(), int((x != y).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_agrees_with_a_float64_reference(dtype, noise):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(700, 900, generator=g)
    b = a + noise * torch.randn(700, 900, generator=g)
    a, b = a.to(dtype), b.to(dtype)
    d = difference(a, b)
    relative, most, mean, changed = reference(a, b)
    assert d.rel_diff == pytest.approx(relative, abs=1e-9)
    assert d.max_abs == pytest.approx(most, rel=1e-9)
    assert d.mean_abs == pytest.approx(mean, rel=1e-9)
    assert (d.changed, d.numel) == (changed, 630_000)


def test_tiny_differences_do_not_drown_in_cancellation():
    a = torch.ones(1000, dtype=torch.float64)
    b = a.clone()
    b[0] += 1e-9
    assert difference(a, b).rel_diff == pytest.approx(1e-18 / 2000, rel=1e-6)


def test_defined_cases():
    nan, inf = math.nan, math.inf
    zero = torch.zeros(3)
    assert difference(zero, zero).rel_diff == 0.0
    assert difference(zero, -zero).changed == 0
    assert difference(zero, torch.ones(3)).rel_diff == 1.0
    assert difference(torch.ones(3), -torch.ones(3)).rel_diff == 2.0
    empty = difference(torch.zeros(0), torch.zeros(0))
    assert (empty.rel_diff, empty.changed, empty.numel) == (0.0, 0, 0)
    same = difference(torch.tensor([nan, inf, 1.0]), torch.tensor([nan, inf, 1.0]))
    assert (same.changed, same.rel_diff, same.max_abs) == (0, 0.0, 0.0)
    odd = difference(torch.tensor([nan, 1.0]), torch.tensor([0.0, 1.0]))
    assert (odd.changed, odd.rel_diff, odd.max_abs, odd.mean_abs) == (1, 0.0, 0.0, 0.0)
    none = difference(torch.tensor([nan, inf]), torch.tensor([0.0, -inf]))
    assert (none.changed, none.rel_diff, none.max_abs, none.mean_abs) == (2, None, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_figures_are_over_what_is_finite_on_both_sides(dtype):
    # Logits whose padded vocabulary is masked, on both sides or on one.
    g = torch.Generator().manual_seed(0)
    a = torch.randn(900, 700, generator=g)
    b = a + 0.01 * torch.randn(900, 700, generator=g)
    a[:, 650:] = b[:, 640:] = -math.inf
    b[0, 0], a[0, 1] = math.nan, math.inf
    a, b = a.to(dtype), b.to(dtype)
    d = difference(a, b)
    both = a.float().isfinite() & b.float().isfinite()
    x, y = a.double()[both], b.double()[both]
    apart = (x - y).abs()
    assert d.rel_diff == pytest.approx(((x - y) @ (x - y) / (x @ x + y @ y)).item(), rel=1e-6)
    assert d.max_abs == apart.max().item()
    assert d.mean_abs == pytest.approx(apart.mean().item(), rel=1e-9)
    assert d.numel == 630_000
    assert d.changed == int((a.double() != b.double()).sum())


def test_complex_numbers_that_are_half_finite_are_left_out():
    one = torch.tensor([complex(1, math.inf), 3 + 4j])
    d = difference(one, torch.tensor([1 + 1j, 0j]))
    assert (d.changed, d.max_abs, d.rel_diff) == (2, 5.0, 1.0)


def test_integers_booleans_and_complex_numbers():
    big = torch.tensor([2**60, 5])
    assert difference(big, big + torch.tensor([1, 0])).changed == 1
    assert difference(torch.tensor([True, False]), torch.tensor([True, True])).max_abs == 1
    assert difference(torch.tensor([3 + 4j]), torch.tensor([0j])).max_abs == 5


def test_large_integers_differ_by_what_they_differ():
    for dtype in (torch.int64, torch.uint64):
        one = torch.tensor([(1 << 53) + 1, 5], dtype=dtype)
        other = torch.tensor([1 << 53, 5], dtype=dtype)
        for a, b in ((one, other), (other, one)):
            found = difference(a, b)
            assert (found.changed, found.max_abs, found.mean_abs) == (1, 1.0, 0.5)
    far = difference(torch.tensor([-(1 << 63)]), torch.tensor([(1 << 63) - 1]))
    assert far.max_abs == 2.0**64


def test_memory_made_in_inference_mode_serves_outside_of_it():
    compare._memory.__dict__.clear()
    with torch.inference_mode():
        difference(torch.ones(5), torch.zeros(5))
    assert difference(torch.ones(5), torch.zeros(5)).max_abs == 1.0
