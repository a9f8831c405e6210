"""A target's own error, and the closer look at it, against what was planted."""

from __future__ import annotations

import math

import pytest
import torch

from replayer.measuring.choice import choice
from replayer.measuring.measures import units
from replayer.measuring.own import _clean, most_rounding, own_error
from replayer.measuring.profile import added_up, profile_of

EPS = torch.finfo(torch.float32).eps


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def own(x, y, *, is_gradient=False):
    return own_error(x, y, *units(x.dtype, y.dtype), is_gradient=is_gradient)


def rounded(x, seed=1):
    """As another order of summands leaves it: a few units off, in no direction."""
    return x + 2 * EPS * x.abs().mean() * randn(*x.shape, seed=seed)


def test_equal_tensors_have_no_error_and_no_look():
    x = randn(4, 8)
    assert own(x, x.clone()).profile.whole == 0 and own(x, x.clone()).look == {}


def test_rounding_is_not_looked_at():
    x = randn(2, 16, 64)
    found = own(x, rounded(x))
    assert 0 < found.profile.whole < most_rounding(EPS) / 2 and found.look == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_factor_is_the_scale_and_lies_along_the_baseline(dtype):
    x = randn(2, 16, 64).to(dtype)
    found = own(x, 4 * x)
    assert found.scale == pytest.approx(4) and found.cosine == pytest.approx(1)
    assert found.size == pytest.approx(4 * float(x.double().square().mean().sqrt()), rel=1e-3)


def test_parts_of_a_sum_have_scales_that_add_up_to_one():
    parts = randn(2, 4, 8, 32)
    x = parts.sum(0)
    assert math.fsum(own(x, part).scale for part in parts) == pytest.approx(1, abs=1e-5)


def test_a_head_of_its_own_factor_is_a_place_and_a_share():
    x = randn(2, 16, 8, 16)
    y = rounded(x)
    y[:, :, 3] *= 1.05
    look = own(x, y).look
    assert look["places"]["2"]["at"] == [3] and look["places"]["2"]["count"] == 1
    assert look["shares"]["2"] > 0.99 and look["factors"]["2"] == pytest.approx([1.05, 1.05])


def test_each_row_and_each_column_may_have_its_own_factor():
    x = randn(64, 96)
    by_row = own(x, x * (1 + 0.1 * randn(64, 1, seed=2))).look["shares"]
    by_column = own(x, x * (1 + 0.1 * randn(96, seed=2))).look["shares"]
    assert by_row["row"] > 0.99 > 0.5 > by_row["column"]
    assert by_column["column"] > 0.99 > 0.5 > by_column["row"]


def test_a_vector_added_to_each_row_is_a_bias():
    x = randn(64, 96)
    shares = own(x, x + 0.1 * randn(96, seed=2)).look["shares"]
    assert shares["bias"] > 0.99 and shares["row"] < 0.5


def test_noise_has_no_direction():
    x = randn(64, 96)
    found = own(x, x + 0.1 * randn(64, 96, seed=2))
    assert max(found.look["shares"].values()) < 0.2 and abs(found.cosine) < 0.1


def test_swapped_heads_are_moved_ones():
    x = randn(2, 16, 8, 16)
    y = rounded(x)
    y[:, :, [2, 5]] = y[:, :, [5, 2]]
    moved = own(x, y).look["moved"]
    assert set(moved) == {"2"}
    assert (moved["2"]["at"], moved["2"]["of"], moved["2"]["swap"]) == ([2, 5], [5, 2], True)


def test_tokens_shifted_by_one_have_a_shift():
    x = randn(2, 32, 48)
    y = torch.cat([x[:, :1], x[:, :-1]], 1)
    moved = own(x, y).look["moved"]["1"]
    assert moved["shift"] == -1 and moved["found"] == 31


def test_zeros_of_dropout_and_the_factor_of_the_rest():
    x = randn(64, 96)
    kept = (torch.rand(64, 96, generator=torch.Generator().manual_seed(3)) > 0.1).float()
    zeros = own(x, x * kept / 0.9).look["zeros"]
    assert zeros["share"] == pytest.approx(0.1, abs=0.02)
    assert zeros["scale"] == pytest.approx(1 / 0.9, rel=1e-3) and zeros["explained"] > 0.99


@pytest.mark.parametrize("scale", [1.0, 2.0**-9])
@pytest.mark.parametrize(
    ("narrow", "called"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16 or TF32"),
        (torch.float8_e4m3fn, "float8_e4m3"),
        (torch.float8_e5m2, "float8_e5m2"),
    ],
)
def test_values_that_a_coarser_dtype_holds(narrow, called, scale):
    x = randn(64, 96)
    assert own(x * scale, x.to(narrow).float() * scale).look["fits"] == called
    assert "fits" not in own(x.to(narrow).float(), (2 * x).to(narrow).float()).look


def test_what_is_not_finite_on_one_side_is_counted():
    x = randn(8, 8)
    y = x.clone()
    y[0, 0], y[1, 1] = math.nan, math.inf
    x[2, 2] = y[2, 2] = -math.inf
    assert own(x, y).odd == 2 and own(y, y.clone()).odd == 0


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0, 4), (4, 1), (1, 4), (2, 0, 3)])
def test_any_shape_has_an_error(shape):
    x = randn(*shape)
    found = own(x, 2 * x)
    assert found.profile.whole == (pytest.approx(1) if x.numel() else 0)


def test_a_masked_fill_hides_nothing():
    x = randn(4, 32, 32)
    masked = torch.ones(32, 32, dtype=torch.bool).triu(1)
    y = rounded(x)
    y[2] = randn(32, 32, seed=5)
    x, y = (t.masked_fill(masked, torch.finfo(torch.float32).min) for t in (x, y))
    found = own(x, y)
    assert found.profile.whole > 0.3 and found.look["places"]["0"]["at"] == [2]


def test_choices_are_sets_and_near_ties_are_told_by_scores():
    scores = randn(32, 8)
    x = scores.topk(2).indices
    assert choice(x, x.flip(1)).error == 0
    assert choice(x, x.flip(1)).look["choice"]["order"] == 32
    y = x.clone()
    y[5, 1] = scores[5].argmin()
    look = choice(x, y, [scores]).look["choice"]
    margin = float(scores[5].topk(2).values[1] - scores[5].min())
    assert look.pop("margins") == pytest.approx([margin, margin])
    assert look == {"rows": 32, "other": 1, "order": 0, "first": [5], "ties": 0}
    close = scores.clone()
    close[5, y[5, 1]] = close[5, x[5, 1]] - 1e-4
    assert choice(x, y, [close]).look["choice"]["ties"] == 1
    assert "ties" not in choice(x, y, [randn(31, 8)]).look["choice"]


def test_only_few_numbers_of_which_no_two_are_the_same_are_a_set():
    tokens = torch.randint(50, (4, 40), generator=torch.Generator().manual_seed(0))
    assert choice(tokens, tokens.flip(1)).look["choice"]["other"] == 4
    places = torch.arange(100).expand(3, 100)
    assert choice(places, places.flip(1)).look["choice"]["other"] == 3
    dropped = torch.tensor([[3, -1, -1], [2, 5, -1]])
    assert choice(dropped, dropped.flip(1)).look["choice"]["other"] == 0


def test_indices_that_always_stand_for_others():
    x = torch.randint(8, (64, 2), generator=torch.Generator().manual_seed(0))
    y = torch.where(x == 2, 5, torch.where(x == 5, 2, x))
    assert choice(x, y).look["choice"]["stand"] == [[2, 5], [5, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(40))
def test_what_a_quick_look_calls_clean_a_thorough_one_does_too(seed, dtype):
    random = torch.Generator().manual_seed(seed)
    shape = [(40, 96), (3, 17, 64), (2, 5, 4, 130), (7,), (5, 1)][seed % 5]
    x = torch.randn(shape, generator=random) * 10.0 ** (seed % 7 - 3)
    x = [x, x.relu(), torch.nn.functional.silu(x), x.cumsum(-1), x * (x.abs() > 1)][seed // 5 % 5]
    if seed % 3 == 0 and x.shape[-1] > 8:
        x[..., 1] *= 300
    x = x.to(dtype)
    eps, unit = units(dtype, dtype)
    limit = min(unit, 0.75 * most_rounding(eps))
    for size in (0.01, 0.1, 0.3, 0.6, 1.0, 3.0, 100.0):
        noise = size * limit * torch.randn(shape, generator=random)
        y = (x.double() * (1 + noise)).to(dtype)
        if seed % 4 == 1 and x.numel() > 50:  # one row, or a factor
            y = y.clone()
            y[0] = (x[0].double() * (1 + size * limit)).to(dtype)
        quick = _clean(x, y, limit)
        if quick is None or torch.equal(x, y):
            continue
        found = profile_of(added_up(x, y), eps, unit, False)
        assert found.factor is None and found.offset is None
        assert max(found.whole, found.extreme, found.row) <= 1.01 * limit
        assert found.element <= 1.01 * quick.profile.element or found.element < 20 * limit
        assert quick.profile.whole == pytest.approx(found.whole, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_clean_at_a_quick_look(dtype):
    eps, unit = units(dtype, dtype)
    x = torch.nn.functional.silu(randn(4, 64, 256)).to(dtype)
    y = (x.double() * (1 + 0.5 * eps * randn(4, 64, 256, seed=1))).to(dtype)
    assert not torch.equal(x, y) and _clean(x, y, min(unit, 0.75 * most_rounding(eps))) is not None
    y[2, 3] = x[2, 3] * (1 + 4 * eps)
    y[1, 5, 7] += 1
    assert _clean(x, y, min(unit, 0.75 * most_rounding(eps))) is None


NAMES = ["float64", "float16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex32"]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1), (1, 5), (2, 3, 4), (64, 48)])
def test_any_dtype_and_any_fault_is_measured(name, shape):
    dtype, wide = (
        getattr(torch, name, None),
        torch.complex128 if "complex" in name else torch.float64,
    )
    if dtype is None:
        pytest.skip("this torch has no such dtype")
    x = (10 * randn(*shape)).to(wide).to(dtype)
    few = x.to(wide).reshape(-1)
    few[:1] = 0
    for y in (x, torch.zeros_like(x), (2 * x.to(wide)).to(dtype), few.reshape(shape).to(dtype)):
        found = own_error(x, y, *units(dtype, dtype), is_gradient=False).profile
        assert (found.whole + found.extreme > 0) is not torch.equal(x.to(wide), y.to(wide))


@pytest.mark.parametrize("fill", [-1e4, -1e8, 3e5])
def test_what_a_mask_leaves_hides_no_error(fill):
    """In the first rows most numbers are the fill, beside which all others are small."""
    x = randn(64, 128)
    masked = torch.ones(64, 128, dtype=torch.bool).triu(1)
    y = x + 0.01 * randn(64, 128, seed=2)
    x, y = (t.masked_fill(masked, fill) for t in (x, y))
    assert own(x, y).profile.whole == pytest.approx(0.01, rel=0.1)
