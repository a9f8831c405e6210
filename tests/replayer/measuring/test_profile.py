"""Where an error lies and which way it points, against sums in plain Python."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from replayer.measuring.measures import measure, units
from replayer.measuring.profile import profile

EPS, UNIT = units(torch.float32, torch.float32)
RANDOM = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=RANDOM)


def found(a, b, **options):
    return profile(a, b, EPS, UNIT, **options)


def expected(a, b, fill=None, massive=None):
    """Whole, extreme, worst row and median row of matrices, row by row."""
    whole, extreme, rows, usual_rows = [0.0, 0.0], [0.0, 0.0], [], []
    for xs, ys in zip(a.double().tolist(), b.double().tolist(), strict=True):
        pairs = list(zip(xs, ys, strict=True))
        great = [x == y == fill or i == massive for i, (x, y) in enumerate(pairs)]
        sized = [abs(x) for (x, _), out in zip(pairs, great, strict=True) if x and not out]
        usual = (math.fsum(map(math.sqrt, sized)) / max(1, len(sized))) ** 2
        sums, outer = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        for (x, y), out in zip(pairs, great, strict=True):
            if min(abs(x), abs(y)) > 16 * usual or out:
                outer = [s + v for s, v in zip(outer, ((y - x) ** 2, x**2, y**2), strict=True)]
            else:
                sums = [s + v for s, v in zip(sums, ((y - x) ** 2, x**2, y**2), strict=True)]
        extreme = [s + v for s, v in zip(extreme, outer[:2], strict=True)]
        whole = [s + v for s, v in zip(whole, sums[:2], strict=True)]
        if max(sums[1:]):
            usual_rows.append(math.sqrt(sums[0] / max(sums[1:])))
            rows.append(
                max(usual_rows[-1], math.sqrt(outer[0] / max(outer[1:])) if outer[1] else 0.0)
            )
    ratio = [math.sqrt(d / x) if d else 0.0 for d, x in (whole, extreme)]
    return ratio, max(rows), statistics.median_low(usual_rows)


@pytest.mark.parametrize("seed", range(20))
def test_figures_are_those_of_each_row_added_up_by_itself(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rows, n = rng.randint(1, 9), rng.randint(48, 90)
    a = torch.randn(rows, n, dtype=torch.float64) * 10 ** rng.uniform(-3, 3)
    b = a * (1 + 10 ** rng.uniform(-6, -1) * torch.randn(rows, n, dtype=torch.float64))
    massive = 3 if rng.random() < 0.5 else None
    if massive is not None:
        a[:, 3], b[:, 3] = a[:, 3] + 5e3 * float(a.std()), b[:, 3] + 5e3 * float(a.std())
    fill = None
    if rng.random() < 0.5:
        fill = -1e9
        masked = torch.rand(rows, n) < 0.3
        a, b = a.masked_fill(masked, fill), b.masked_fill(masked, fill)
    (whole, extreme), worst, typical = expected(a, b, fill, massive)
    made = found(a, b)
    assert made.whole == pytest.approx(whole, rel=1e-9)
    assert made.extreme == pytest.approx(extreme, rel=1e-9)
    assert made.typical == pytest.approx(typical, rel=1e-9)
    assert made.row == pytest.approx(worst, rel=1e-9)


def test_long_rows_are_added_up_part_by_part():
    a = randn(2, 300_000)
    b = a * (1 + 1e-3 * randn(2, 300_000))
    made = found(a, b)
    d = (b.double() - a.double()).norm(dim=1)
    assert made.row == pytest.approx(float((d / b.double().norm(dim=1)).max()), rel=1e-6)


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1e30, 1e300])
def test_no_scale_of_the_numbers_matters(factor):
    dtype = torch.float64 if factor in (1e-300, 1e300) else torch.float32
    a = randn(8, 64).to(dtype)
    b = a.clone()
    b[3] = randn(64)
    b[5] *= 1.01
    plain, large = found(a, b), found(a * factor, b * factor)
    assert large.row_at == plain.row_at == (3, -1)
    for name in ("whole", "row", "typical", "element"):
        assert getattr(large, name) == pytest.approx(getattr(plain, name), rel=1e-5)


@pytest.mark.parametrize("fills", [[-1e4], [torch.finfo(torch.float32).min], [-1e4, -1e9], [1e6]])
def test_what_masks_left_takes_no_part(fills):
    a = randn(4, 64)
    b = a * (1 + 1e-3 * randn(4, 64))
    plain = found(a, b)
    padded = [torch.cat([t, *(torch.full((4, 500), f) for f in fills)], 1) for t in (a, b)]
    made = found(*padded)
    assert made.whole == pytest.approx(plain.whole, rel=1e-9)
    assert made.row == pytest.approx(plain.row, rel=1e-9)


def test_a_mask_of_two_dtypes_is_one_mask():
    mask = torch.triu(torch.ones(32, 32, dtype=torch.bool), 1)
    a, b = randn(32, 32), randn(32, 32)
    low, high = (torch.finfo(t).min for t in (torch.bfloat16, torch.float32))
    one, other = a.bfloat16().masked_fill(mask, low), b.masked_fill(mask, high)
    assert measure(one, other).profile.whole > 1


def test_a_mask_on_one_side_alone_is_an_error():
    a = randn(8, 64)
    made = found(a.index_fill(1, torch.tensor([3, 4]), -1e4), a)
    assert made.row > 0.9


def test_a_massive_channel_hides_nothing_and_is_judged_apart():
    a = randn(16, 128)
    a[:, 11] = 1000.0
    b = a.clone()
    b[5, :11] = randn(11)
    assert found(a, b).row_at == (5, -1) and found(a, b).row > 0.3
    b = a.clone()
    b[:, 11] *= 1.01
    made = found(a, b)
    assert made.extreme == pytest.approx(0.01, rel=1e-3) and made.whole == 0.0
    assert made.row == pytest.approx(0.01 / 1.01, rel=1e-3)
    b[3, 11] = -1000.0
    assert found(a, b).row == pytest.approx(2.0) and found(a, b).row_at == (3, -1)


@pytest.mark.parametrize(
    ("change", "factor", "along"),
    [
        (lambda t: t.mul_(1.02), 1.02, (-1, -1, -1)),
        (lambda t: t[3].mul_(1.05), 1.05, (3, -1, -1)),
        (lambda t: t[:, 2].mul_(0.9), 0.9, (-1, 2, -1)),
        (lambda t: t[3, 2].mul_(1.05), 1.05, (3, 2, -1)),
        (lambda t: t.neg_(), -1.0, (-1, -1, -1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_factor_is_found_where_it_is(change, factor, along, dtype):
    a = randn(16, 8, 64)
    b = a.clone()
    change(b)
    made = measure(a.to(dtype), b.to(dtype)).profile
    assert made.along == along
    assert made.factor == pytest.approx(factor, rel=2e-3)


def test_an_offset_is_found_where_it_is():
    a = randn(16, 8, 64)
    b = a.clone()
    b[:, 5] += 0.01
    made = found(a, b)
    assert made.along == (-1, 5, -1) and made.factor is None
    assert made.offset == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4096,), (64, 64), (16, 4, 64), (7, 3, 17)])
def test_rounding_has_no_direction(dtype, shape):
    for _ in range(5):
        a = randn(*shape)
        eps = torch.finfo(dtype).eps
        made = measure(a.to(dtype), (a * (1 + 2 * eps * randn(*shape))).to(dtype)).profile
        assert made is None or made.along is None


def test_few_numbers_have_no_direction():
    a = randn(64, 2)
    assert found(a, a * 1.05).along == (-1, -1)  # all together have one
    b = a.clone()
    b[3] *= 1.05
    assert found(a, b).along is None


def test_a_row_that_is_left_of_larger_numbers_is_none_of_its_own():
    a = randn(32, 64)
    a[7] *= 1e-7
    b = a + 1e-7 * randn(32, 64)
    assert found(a, b).row < 1e-5
    b[7] = randn(64)
    assert found(a, b).row_at == (7, -1)


def test_rows_of_a_gradient_may_be_as_far_off_as_the_others_whatever_their_size():
    a = randn(32, 64)
    b = a + 0.1 * randn(32, 64)
    b[4] = a[4] + 1.2 * randn(64)
    assert found(a, b).row > 0.5
    assert found(a, b, is_gradient=True).row < 0.2


@pytest.mark.parametrize("n", [1, 2, 8])
def test_short_rows_are_rows_too(n):
    a = randn(64, n).abs() + 0.5
    b = a.clone()
    b[2] = -b[2]
    made = found(a, b)
    assert made.row_at == (2, -1) and made.row == pytest.approx(2.0)


def test_an_index_of_short_rows_has_a_factor():
    a = randn(2, 8, 3, 3)
    b = a.clone()
    b[:, 2] *= 1.05
    assert found(a, b).along == (-1, 2, -1, -1)


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 0), (1, 1, 1)])
def test_any_shape_has_a_profile(shape):
    a = torch.full(shape, 2.0)
    made = found(a, a * 1.5)
    if a.numel():
        assert made.whole == pytest.approx(0.5)
        assert made.row_at == ((0,) * (len(shape) - 1) + (-1,) if shape else ())
    else:
        assert made.whole == 0.0 and made.row_at is None


def test_complex_numbers_have_rows_too():
    a = torch.view_as_complex(randn(8, 32, 2))
    b = a.clone()
    b[5] *= 1j
    made = measure(a, b).profile
    assert made.row == pytest.approx(math.sqrt(2), rel=1e-6) and made.row_at == (5, -1)


def test_what_is_not_finite_takes_no_part():
    a = randn(4, 32)
    b = a * (1 + 1e-3 * randn(4, 32))
    plain = [t.clone() for t in (a, b)]
    for t in plain:
        t[:, 5] = 0
    a[:, 5], b[:, 5] = -math.inf, -math.inf
    assert found(a, b).whole == pytest.approx(found(*plain).whole, rel=1e-9)


def test_two_masks_that_are_added_hide_nothing():
    mask = torch.zeros(8, 32, 32).masked_fill(torch.triu(torch.ones(32, 32), 1).bool(), -1e4)
    mask[:4, :, 25:] += -1e4
    a, b = randn(8, 32, 32) + mask, randn(8, 32, 32) + mask
    assert found(a, b).whole > 1 and found(a, b).row > 1


@pytest.mark.parametrize("noise", [0.0, 2e-3])
def test_a_part_that_is_small_is_judged_by_itself(noise):
    a = randn(64, 3, 4, 64)
    a[:, 2] *= 0.01
    b = a * (1 + noise * randn(64, 3, 4, 64))
    b[:, 2] = 0.01 * randn(64, 4, 64)
    assert found(a, b).row > 1


def test_a_small_row_beside_exact_ones_is_a_row_of_its_own():
    a = randn(64, 256)
    a[5] *= 0.03
    b = a.clone()
    b[5] = 0
    assert found(a, b).row == pytest.approx(1.0) and found(a, b).row_at == (5, -1)


def test_a_dim_of_size_one_changes_nothing():
    a = randn(64, 4096)
    b = a * (1 + 2e-3 * randn(64, 4096))
    b[5] *= 1.05
    for shape in ((64, 4096), (64, 1, 4096), (1, 64, 1, 4096)):
        made = found(a.reshape(shape), b.reshape(shape))
        assert made.factor == pytest.approx(1.05, rel=1e-3)


def test_a_row_behind_a_stronger_one_that_is_not_odd_is_found():
    a = randn(64, 512)
    a[7] *= 100
    b = a * (1 + 2e-3 * randn(64, 512))
    b[7] *= 1.02
    b[9] *= 1.2
    assert profile(a, b, 2**-7, 0.03).along == (9, -1)


@pytest.mark.parametrize("shape", [(64,), (1000,), (64, 64), (8, 32, 64)])
@pytest.mark.parametrize("times", [1.0, 30.0, 1 / 30])
def test_two_that_have_nothing_in_common_are_no_multiples_of_each_other(shape, times):
    """Their difference has half the direction of -x: B would be 0.0004 x A."""
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=g) for _ in range(2))
    found = profile(a, b * times, 1.2e-7, 1e-5)
    assert found.factor is None and found.offset is None and found.along is None
    for known in (0.0, 0.5, -1.0, 3.0):
        assert profile(a, a * known, 1.2e-7, 1e-5).factor == pytest.approx(known)
    if a.numel() >= 1000:  # of fewer it may be chance
        made = profile(a, a * 0.5 + b * 0.1, 1.2e-7, 1e-5)
        assert made.factor == pytest.approx(0.5, abs=0.1)
