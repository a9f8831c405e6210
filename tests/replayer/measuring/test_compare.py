"""The figures of the replay log."""

from __future__ import annotations

import math
import threading
from fractions import Fraction

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


def exact(a, b):
    """The figures' definitions over what is finite on both sides, in fractions."""
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    changed = sum(x != y and not (x != x and y != y) for x, y in pairs)
    finite = [(Fraction(x), Fraction(y)) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
    apart = [abs(x - y) for x, y in finite]
    total = sum(x * x + y * y for x, y in finite)
    relative = sum(d * d for d in apart) / total if total else Fraction(0)
    return relative, max(apart), sum(apart) / len(apart), changed


def sides(kind, dtype, n, g):
    """Two tensors that differ in one way, before they are of a dtype."""
    a = torch.randn(n, generator=g, dtype=torch.float64)
    b = a + 1e-2 * torch.randn(n, generator=g, dtype=torch.float64)
    if kind == "unrelated":
        b = torch.randn(n, generator=g, dtype=torch.float64)
    elif kind == "of all sizes":  # a difference of two of these is no float32
        a, b = a * 2.0 ** torch.arange(-30, 30).repeat(n // 60 + 1)[:n], b.flip(0)
    elif kind == "tiny":  # whose squares are nothing in the dtype itself
        a, b = a * 2.0**-130, b * 2.0**-130
    elif kind == "huge":  # whose squares are infinite there
        a, b = a * 2.0**124, b * 2.0**124
    elif kind == "signs of zero":
        a[::2], b[::2] = 0.0, -0.0
    elif kind == "some equal":
        b = torch.where(torch.rand(n, generator=g) < 0.7, a, b)
    elif kind == "one differs":
        b = a.clone()
        b[-1] += 1
    elif kind == "not finite here and there":
        a[3], b[3], a[5], b[700], a[-1] = math.nan, math.nan, math.inf, -math.inf, math.nan
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [777, 1024, 1030])  # one chunk, whole chunks, and a rest
@pytest.mark.parametrize(
    "kind",
    [
        "close", "unrelated", "of all sizes", "tiny", "huge", "signs of zero", "some equal",
        "one differs", "not finite here and there",
    ],
)  # fmt: skip
def test_agrees_with_fractions(monkeypatch, kind, n, dtype):
    monkeypatch.setattr(compare, "_CHUNK", 800 if n == 777 else 256)
    a, b = sides(kind, dtype, n, torch.Generator().manual_seed(n))
    relative, most, mean, changed = exact(a, b)
    d = difference(a, b)
    assert d.rel_diff == pytest.approx(float(relative), rel=1e-12)
    assert d.max_abs == pytest.approx(float(most), rel=1e-15)
    assert d.mean_abs == pytest.approx(float(mean), rel=1e-12)
    assert (d.changed, d.numel) == (changed, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_elements_that_begin_anywhere_in_memory(monkeypatch, offset, dtype):
    monkeypatch.setattr(compare, "_CHUNK", 64)
    held = (20 * torch.randn(2, 600, generator=torch.Generator().manual_seed(0))).to(dtype)
    a, b = held[0, offset : offset + 512], held[1, :512]
    b[:200] = a[:200]
    assert difference(a, b).changed == int((a != b).sum())
    assert difference(a, b).max_abs == (a.double() - b.double()).abs().max()


def test_sums_of_chunks_beyond_float64_leave_the_other_figures(monkeypatch):
    monkeypatch.setattr(compare, "_CHUNK", 1)
    a = torch.full((64,), 1.1e154, dtype=torch.float64)
    d = difference(a, torch.zeros_like(a))
    assert (d.rel_diff, d.max_abs, d.changed) == (None, 1.1e154, 64)


def test_interpreted_and_compiled_sums_are_the_same(monkeypatch):
    if not hasattr(compare._sums, "__wrapped__"):
        pytest.skip("torch cannot compile it")
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(n, generator=g), torch.randn(n, generator=g)) for n in (100, 70_000)]
    compiled = [difference(a, b) for a, b in pairs]
    monkeypatch.setattr(compare, "_sums", compare._sums.__wrapped__)
    monkeypatch.setattr(compare, "_sums_of_one", compare._sums_of_one.__wrapped__)
    assert [difference(a, b) for a, b in pairs] == compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int16])
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_several_threads_find_what_one_does(monkeypatch, dtype, threads):
    g = torch.Generator().manual_seed(threads)
    a = torch.randn(3_001, generator=g).mul(100).to(dtype)
    b = a.clone()
    b[::7] += 3
    if dtype.is_floating_point:
        b[1234], a[2000], b[2000] = math.inf, math.nan, math.nan
    monkeypatch.setattr(compare, "_CHUNK", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    alone = compare.difference(a, b)
    asked = []
    real = compare._rows

    def rows(*args):
        asked.append(threading.get_ident())
        return real(*args)

    monkeypatch.setattr(compare, "_rows", rows)
    monkeypatch.setattr(compare, "_A_THREAD", 600)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert compare.difference(a, b) == alone
    assert len(asked) == threads and threading.get_ident() not in asked


def test_where_no_thread_is_to_be_had_one_does_it_all(monkeypatch):
    """As behind the end of the main thread."""

    def none(*args):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    a, b = torch.randn(2, 5_000, generator=torch.Generator().manual_seed(0))
    expected = compare.difference(a, b)
    monkeypatch.setattr(compare, "_A_THREAD", 600)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(compare, "ThreadPoolExecutor", none)
    found = compare.difference(a, b)
    assert (found.changed, found.max_abs) == (expected.changed, expected.max_abs)
    assert found.rel_diff == pytest.approx(expected.rel_diff, rel=1e-13)
