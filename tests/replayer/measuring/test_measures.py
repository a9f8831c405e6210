"""The figures of a pair of tensors, against rational numbers."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from figures import (
    COMPLEX,
    DTYPES,
    FLOAT8,
    FLOATS,
    HUGE,
    INF,
    INTEGERS,
    NAN,
    TINY,
    check,
    expected,
    filled,
)

from recorder.bits import why_not_by_value
from recorder.errors import CaptureError
from replayer.measuring.measures import Incomparable, exact_sum, measure, tolerances

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore:.*Half support is experimental"),
]


INTEGERS += [torch.uint16, torch.uint32, torch.uint64]


def each(*values, repeat=1):
    return list(itertools.product(*values, repeat=repeat))


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# Dtypes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_figures_of_each_dtype(dtype, small):
    a, b = filled(dtype, 77, 1), filled(dtype, 77, 2)
    b[:30] = a[:30]
    check(a, b)


@pytest.mark.parametrize("one", DTYPES, ids=str)
def test_figures_of_two_dtypes(one):
    for other in DTYPES:
        if other != one and not why_not_by_value(one, other):
            check(filled(one, 11, 1, 3.0), filled(other, 11, 2, 3.0))


@pytest.mark.parametrize("other", [torch.bfloat16, torch.int64, torch.complex64], ids=str)
def test_bool_and_another_dtype(other, small):
    check(filled(torch.bool, 50, 1), filled(other, 50, 2).abs().to(other))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64], ids=str)
def test_long_integers_differ_by_what_float64_does_not_hold(dtype):
    a = torch.tensor([2**62 + 1, 2**53, 7, 2**63 - 1], dtype=dtype)
    b = torch.tensor([2**62 + 4, 2**53 + 1, 7, 2**63 - 2], dtype=dtype)
    found = check(a, b)
    assert (found.max_abs, found.max_ulp, found.changed, found.bias) == (3, 3, 3, 0.75)


def test_bias_of_long_integers_that_cancel():
    a = torch.tensor([2**62 + 1, -(2**61), 2**55 + 3])
    b = torch.tensor([-(2**61) + 3, 2**62 - 4, 2**55 + 4])
    assert check(a, b).bias == -1 / 3


def test_long_integers_at_the_ends_of_their_range():
    a = torch.tensor([-(2**63), 2**63 - 1, 0], dtype=torch.int64)
    found = check(a, a.flip(0))
    assert found.max_ulp == 2**63 - 1
    b, c = (torch.tensor(v, dtype=torch.uint64) for v in ([0, 2**64 - 1], [2**64 - 1, 0]))
    assert check(b, c).max_ulp == 2**63 - 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([2**24 + 1]), torch.tensor([2.0**24])),
        (torch.tensor([2**53 + 1]), f64(2.0**53)),
        (torch.tensor([2**63 - 1]), torch.tensor([2.0**63])),
        (torch.tensor([2**60 + 1]), torch.tensor([2.0**60], dtype=torch.complex64)),
        (torch.tensor([2**64 - 1], dtype=torch.uint64), torch.tensor([-1])),
        (torch.tensor([2**63], dtype=torch.uint64), torch.tensor([-(2**63)])),
    ],
)
def test_integers_and_what_they_would_be_rounded_to_are_different(a, b):
    found = check(a, b)
    assert (found.changed, found.bitwise) == (1, False)
    assert check(b, a).max_abs == found.max_abs


@pytest.mark.parametrize("one", DTYPES, ids=str)
def test_tolerances_are_those_of_torch_testing(one):
    for other in DTYPES:
        wanted = torch.testing._comparison.default_tolerances(one, other)
        assert tolerances(one, other) == wanted


def test_tolerances_can_be_given():
    a, b = f64(1.0, 10.0, 100.0), f64(1.2, 11.0, 120.0)
    assert check(a, b).mismatched == 3
    assert check(a, b, rtol=0.15).mismatched == 2
    assert check(a, b, rtol=0.0, atol=1.5).mismatched == 1
    assert check(a, b, rtol=0.0, atol=0.0).mismatched == 3


@pytest.mark.parametrize("dtype", [torch.bits8, torch.bits16], ids=str)
def test_a_dtype_without_arithmetic_is_compared_by_its_bits(dtype):
    raw = torch.arange(8, dtype=torch.uint8)
    other = raw.clone()
    other[2:4] += 1  # one element of 16 bits, two of 8
    wrong = 2 // dtype.itemsize
    found = measure(raw.view(dtype), other.view(dtype))
    assert (found.numel, found.changed, found.mismatched) == (8 // dtype.itemsize, wrong, wrong)
    assert not found.bitwise and found.max_abs is None
    assert measure(raw.view(dtype), raw.clone().view(dtype)).bitwise


@pytest.mark.parametrize("dtype", [torch.bits8, torch.quint4x2, *FLOAT8], ids=str)
def test_bytes_and_what_they_may_mean_are_not_compared(dtype):
    raw = torch.arange(4, dtype=torch.uint8)
    for pair in ((raw.view(dtype), raw), (raw, raw.view(dtype))):
        with pytest.raises(Incomparable, match="one may hold the other's bytes"):
            measure(*pair)


def test_a_tensor_that_no_recording_holds_is_refused():
    one = torch.ones(3, device="meta")
    with pytest.raises(CaptureError, match="meta device"):
        measure(one, one)


SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, TINY, HUGE, -HUGE, 1.0 + 2**-52]


# Values


@pytest.mark.parametrize("x", SPECIAL)
def test_special_values_among_ordinary_ones(x):
    for y in SPECIAL:
        check(f64(1.0, x, 2.0), f64(1.5, y, 2.0))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float16),
        (torch.complex64, torch.complex64),
        (torch.complex64, torch.complex128),
        (torch.complex128, torch.float32),
    ],
    ids=str,
)
def test_nan_and_infinity(one, other, small):
    for x, y in each([0.0, 1.0, INF, -INF, NAN], repeat=2):
        a, b = filled(one, 20, 1), filled(other, 20, 2)
        a[9], b[9] = x, y
        check(a, b)


@pytest.mark.parametrize(
    ("x", "y"),
    each([complex(NAN, INF), complex(INF, 1), complex(INF, 2), 1 + 1j], repeat=2),
)
def test_a_complex_element_is_nan_or_infinite_by_either_part(x, y):
    a = torch.tensor([1 + 1j, x], dtype=torch.complex128)
    check(a, torch.tensor([2 - 1j, y], dtype=torch.complex128))


def test_an_integer_against_nan():
    found = check(torch.tensor([1, 2, 2**60 + 1]), torch.tensor([NAN, 2.0, INF]))
    assert (found.nan_b, found.inf_b, found.changed, found.max_abs) == (1, 1, 2, 0.0)
    check(torch.tensor([1, 2], dtype=torch.uint16), torch.tensor([NAN, 2.5]))


@pytest.mark.parametrize("dtype", [d for d in FLOATS if d.itemsize > 1], ids=str)
def test_no_element_that_is_finite_on_both_sides(dtype):
    found = check(torch.tensor([NAN, 1.0, INF], dtype=dtype), torch.tensor([NAN, NAN, 2.0]))
    assert (found.changed, found.mismatched) == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.complex64])
@pytest.mark.parametrize(("x", "y"), each([0, 3], repeat=2))
def test_all_zero(dtype, x, y, small):
    found = check(torch.full((40,), x, dtype=dtype), torch.full((40,), y, dtype=dtype))
    assert found.rel_diff == (0.0 if x == y else 1.0)
    assert found.cosine == pytest.approx(1.0 if x == y else 0.0)


def test_no_relative_difference_to_zeros():
    zeros = torch.zeros(40)
    assert measure(zeros, zeros + 1).max_rel is None
    assert measure(zeros, zeros).max_rel is None
    assert check(torch.tensor([0.0, 2.0]), torch.tensor([5.0, 3.0])).max_rel == 0.5


@pytest.mark.parametrize("scale", [TINY, 1e-308, 1e-200, 1e-130, 1e130, 1e200, 1e307])
@pytest.mark.parametrize("other", [TINY, 1e-308, 1.0, 1e307])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_magnitudes_far_apart_in_one_tensor_and_across_both(dtype, scale, other, small):
    a = filled(dtype, 20, 1) * scale
    b = filled(dtype, 20, 2) * scale
    b[5:10] *= 0.5
    mixed = a.clone()
    mixed[7:18] = filled(dtype, 11, 3) * other
    check(a, b)
    check(mixed, b)
    check(a, mixed)


def test_sums_and_differences_beyond_the_range():
    found = check(f64(HUGE, 1.0, 1.0), f64(-HUGE, 1.0, 1.0))
    assert (found.max_abs, found.mean_abs) == (INF, pytest.approx(HUGE / 1.5))
    found = check(f64(HUGE, HUGE), f64(-HUGE, -HUGE))
    assert (found.max_abs, found.mean_abs, found.bias, found.p50) == (INF, INF, -INF, INF)
    assert found.max_rel == 2.0
    assert found.cosine == pytest.approx(-1.0)
    check(f64(HUGE, -HUGE, 1.0), f64(-HUGE, HUGE, 4.0))


def test_moduli_beyond_the_range():
    a = torch.tensor([HUGE + HUGE * 1j, 1j], dtype=torch.complex128)
    assert check(a, -a / 2).max_rel == pytest.approx(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_differences_that_float32_does_not_hold(dtype, small):
    most = torch.finfo(dtype).max
    a = torch.linspace(0.5, 1, 60) * most
    check(a.to(dtype), -a.flip(0).to(dtype))
    check(a.to(dtype) * 1e-30, a.flip(0).to(dtype) * -1e-38)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_subnormal_values_of_narrow_dtypes(dtype, small):
    a = torch.arange(40).to(torch.int16 if dtype.itemsize == 2 else torch.int32).view(dtype)
    assert check(a, a.flip(0)).max_ulp == 39


def test_one_wrong_element_in_many(small):
    a = filled(torch.float32, 250, 1)
    b = a.clone()
    b[133] += 0.25
    found = check(a, b)
    assert (found.changed, found.max_abs_at, found.max_rel_at) == (1, 133, 133)
    assert (found.p50, found.p99) == (0.0, 0.0)


def test_the_first_of_equal_places(small):
    a, b = torch.ones(100), torch.ones(100)
    b[[31, 40, 90]] = 2.0
    found = check(a, b)
    assert (found.max_abs_at, found.max_rel_at) == (31, 31)
    assert (found.max_abs_a, found.max_abs_b) == (1.0, 2.0)


def test_zeros_of_either_sign_do_not_differ(small):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64):
        zeros = torch.zeros(20, dtype=dtype)
        found = check(zeros, -zeros)
        assert (found.changed, found.max_ulp, found.bitwise) == (0, 0, False)


# Cancellation


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1e16, 1.0, -1e16], [0.0, 0.0, 3.0]),
        ([HUGE, -HUGE, 1e-310], [0.0, 0.0, 0.0]),
        ([HUGE, HUGE, -HUGE, -HUGE, 0.0], [0.0, 0.0, 0.0, 0.0, TINY * 1000]),
        ([1e300, 1.0, -1e300], [1e-300, 1e280, -1e280]),
        ([1e16 / 3, 1e16 / 7, 0.1], [1e16 / 7, 1e16 / 3, 0.3]),
        ([1e308] * 10, [1e308] * 9 + [1e308 - 1e292]),
        ([1e308] * 10 + [-1e308] * 10, [2.0] * 20),
        ([1.0, 1e-20], [1.0 + 2**-52, 1e-20 - 2**-52]),
        ([0.0, -3e30, -1e28], [HUGE, -HUGE, 1.0]),
    ],
)
def test_bias_where_it_cancels(x, y):
    found, wanted = check(f64(*x), f64(*y)), expected(f64(*x), f64(*y), 0, 0)["bias"]
    assert wanted and found.bias == pytest.approx(wanted, rel=1e-12, abs=TINY)


@pytest.mark.parametrize("seed", range(0, 8, 2))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bias_where_all_but_one_difference_cancel(dtype, seed, small):
    d = filled(dtype, 30, seed).double() * 2.0 ** (15 * seed)
    b = torch.cat([d, -d, f64(1e-3)]).to(dtype)
    b = b[torch.randperm(61, generator=torch.Generator().manual_seed(seed))]
    found = check(torch.zeros(61, dtype=dtype), b)
    assert found.bias == pytest.approx(float(b.new_tensor(1e-3)) / 61, rel=1e-12)


def test_bias_that_cancels_beside_nan(small):
    a = torch.tensor([1e20, -1e20, 1.0, NAN, 1.0] * 9)
    b = torch.tensor([2e20, -2e20, 1.5, 1.0, INF] * 9)
    assert check(a, b).bias == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_a_sum_is_exact(n):
    values = filled(torch.float64, n, n) * torch.pow(2.0, torch.arange(n).double() % 1900 - 950)
    assert exact_sum(values) == sum(map(Fraction, values.tolist()))
    assert exact_sum(values.new_empty(0)) == 0


def test_rel_diff_and_cosine_of_nearly_equal_tensors():
    a = filled(torch.float64, 50, 1)
    found = check(a, a * (1 + 2**-50))
    assert 0 < found.rel_diff < 1e-29
    assert found.cosine <= 1.0


# Shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(dtype):
    found = measure(torch.empty(0, 3, dtype=dtype), torch.empty(0, 3, dtype=dtype))
    assert (found.numel, found.bitwise, found.changed, found.max_abs) == (0, True, 0, None)
    assert (found.rel_diff, found.cosine, found.max_ulp) == (0.0, 1.0, 0)


def test_empty_of_two_dtypes_or_without_arithmetic():
    empty = torch.empty(0)
    assert measure(empty, empty.bfloat16()).bitwise
    assert measure(empty.view(torch.bits8), empty.view(torch.bits8)).bitwise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scalar(dtype):
    a, b = filled(dtype, 1, 1).reshape(()), filled(dtype, 1, 2).reshape(())
    check(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128, torch.uint16])
def test_views_that_are_not_contiguous(dtype, small):
    a, b = filled(dtype, 96, 1), filled(dtype, 96, 2)
    check(a[::2], b[1::2])
    check(a.view(8, 12).t(), b.view(12, 8))
    check(a[:1].expand(20), b[:20])


def test_conjugate_views(small):
    a, b = filled(torch.complex64, 40, 1), filled(torch.complex64, 40, 2)
    assert measure(a.conj(), a.conj().resolve_conj()).bitwise
    check(a.conj(), b)
    assert measure(a.conj().imag, -a.imag).bitwise
    check(a.conj().imag, b.imag)


def test_parameters():
    assert check(torch.nn.Parameter(torch.ones(3)), torch.zeros(3)).max_abs == 1.0


def test_shapes_have_to_be_equal():
    with pytest.raises(ValueError, match=r"shapes \[2, 3\] and \[3, 2\] are not equal"):
        measure(torch.ones(2, 3), torch.ones(3, 2))


# What torch says


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in COMPLEX], ids=str)
def test_mismatched_is_what_isclose_counts(dtype):
    a = filled(dtype, 400, 1)
    noise = 1 + (filled(torch.float64, 400, 2) * 2 * tolerances(dtype, dtype)[0]).abs()
    b = (a.double() * noise).to(dtype) if dtype.is_floating_point else a.clone()
    b[::7] = filled(dtype, 58, 3)
    if dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        a[3:7] = torch.tensor([INF, NAN, INF, NAN])
        b[3:7] = torch.tensor([INF, NAN, -INF, 1.0])
    found = measure(a, b)
    wide = [t.float().double() if t.dtype.itemsize == 1 else t.double() for t in (b, a)]
    close = torch.isclose(*wide, found.rtol, found.atol, equal_nan=True)
    assert found.mismatched == int((~close).sum()) > 0


# Bits


def test_bitwise_tells_zeros_apart():
    assert not measure(torch.tensor([0.0]), torch.tensor([-0.0])).bitwise
    assert not measure(torch.tensor([0.0]), torch.tensor([-0.0]).double()).bitwise
    assert measure(torch.tensor([-0.0]), torch.tensor([-0.0]).double()).bitwise
    a = torch.tensor([0.0], dtype=torch.complex64)
    assert not measure(a, torch.complex(f64(0.0), f64(-0.0))).bitwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bitwise_tells_payloads_of_nan_apart(dtype):
    a = torch.tensor([NAN], dtype=dtype)
    b = a.clone()
    b.view(torch.uint8)[0] += 1
    found = measure(a, b)
    assert b.isnan().all() and not found.bitwise and found.changed == 0
    assert measure(a, a.clone()).bitwise


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.permutations([*FLOATS[:4], *COMPLEX], 2)), ids=str
)
def test_bitwise_of_two_dtypes_is_by_value(one, other):
    a = torch.tensor([1.0, -0.0, 2.0, -3.5, NAN, INF])
    a, b = a.to(one), a.to(other)
    assert measure(a, b).bitwise
    b[2] = 2.5
    assert not measure(a, b).bitwise


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.int8, torch.uint64], ids=str)
def test_bitwise_of_integers_and_another_dtype(other):
    a = torch.tensor([0, 1, 100])
    assert measure(a, a.to(other)).bitwise and measure(a.to(other), a).bitwise
    assert not measure(a, (a + 1).to(other)).bitwise
