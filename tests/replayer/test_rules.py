"""When a difference is one: the noise floor, and what statistics prove."""

from __future__ import annotations

import itertools
import math

import polars as pl
import pytest
import torch

from replayer.diffing.bounds import proven
from replayer.rules import Rules, allowance, floors_of
from replayer.thresholds import Threshold

# The noise floor

ROW = {"name": "x", "kind": "tensor", "mismatched": 1, "numel": 4}
KEY = ("x", "{}", "tensor", None)


def against(floor, rel_diff, max_abs, **options):
    rules = Rules(floors={KEY: floor}, **options)
    row = {**ROW, "rel_diff": rel_diff, "max_abs": max_abs}
    return rules.against_floor({"tags": "{}", **row})["times_floor"]


@pytest.mark.parametrize(
    ("rel_diff", "max_abs", "times"),
    [
        (16e-4, 3.0, 4.0),  # by the root of rel_diff
        (1e-4, 5.0, 5.0),  # by max_abs
        (16e-4, None, 4.0),
        (None, 5.0, 5.0),
        (0.0, 0.0, 0.0),
    ],
)
def test_times_the_floor_is_the_greater_of_both_sizes(rel_diff, max_abs, times):
    assert against((1e-4, 1.0), rel_diff, max_abs) == pytest.approx(times)


def test_anything_is_infinitely_many_times_no_noise_and_nothing_is_none():
    assert against((0.0, 0.0), 1e-30, 1e-30) == math.inf
    assert against((0.0, 1.0), 1e-30, 1.0) == math.inf
    assert against((1.0, 0.0), 1e-30, 1e-30) == math.inf
    assert against((0.0, 0.0), 0.0, 0.0) == 0.0


def test_what_no_measure_is_defined_of_is_no_times_the_floor():
    assert against((1.0, 1.0), None, None) is None


@pytest.mark.parametrize(("times", "within"), [(3.0, True), (3.0000001, False)])
def test_as_many_times_the_noise_as_the_factor_is_still_noise(times, within):
    rules = Rules(factor=3.0)
    row = {**ROW, "times_floor": times, "rel_diff": None}
    assert rules.is_within(row, {}) is within


def test_nan_on_one_side_is_no_noise():
    row = {**ROW, "times_floor": 0.0, "nan_b": 1}
    assert not Rules().is_within(row, {})


def test_the_floor_is_the_greatest_of_all_runs_steps_and_ranks_for_each_size():
    def table(*sizes):
        rows = [(*KEY, *size) for size in sizes]
        schema = {
            "name": pl.String, "tags": pl.String, "kind": pl.String, "index": pl.Int64,
            "rel_diff": pl.Float64, "max_abs": pl.Float64,
        }  # fmt: skip
        return pl.DataFrame(rows, schema=schema, orient="row")

    tables = table((1e-4, 1.0), (None, 2.0)), table((1e-6, 0.5), (None, None))
    for order in itertools.permutations(tables):
        assert floors_of(order) == {KEY: (1e-4, 2.0)}
    assert floors_of([table((None, None))]) == {}


def test_not_over_a_measure_that_there_is_none_of_does_not_hold():
    rules = Rules(thresholds=(Threshold.parse("not max_rel > 1"),))
    assert not rules.is_within({**ROW, "max_rel": None}, {})
    assert rules.is_within({**ROW, "max_rel": 0.5}, {})


# What statistics prove

STATISTICS = {"min": 1.0, "max": 1.0, "mean": 1.0, "std": 0.0, "l2": 2.0}  # of four ones
FLOAT32 = 1e-5 + 1.3e-6 + allowance(1.3e-6).element  # how far off one of them may be


def judged(rtol=None, atol=None, dtype="float32", **other):
    """What is proven of four ones and a tensor of other statistics."""
    ours = {**STATISTICS, "nan_count": 0, "inf_count": 0}
    row = {"shape": [4], "dtype": dtype, "dtype_b": dtype, **ours}
    row |= {f"{name}_b": other.get(name, value) for name, value in ours.items()}
    numbers = {
        name: pl.Float64 for name, value in row.items() if not isinstance(value, (str, list))
    }
    return proven(pl.DataFrame([row], schema_overrides=numbers), rtol, atol).row(0)


@pytest.mark.parametrize("name", ["min", "max", "mean"])
@pytest.mark.parametrize(("times", "beyond"), [(0.999, False), (1.001, True)])
def test_a_statistic_proves_a_difference_past_what_may_be_rounding(name, times, beyond):
    off = times * FLOAT32
    least, found = judged(**{name: 1.0 + off})
    assert least == pytest.approx(off, rel=1e-4) and least <= off
    assert found is beyond


@pytest.mark.parametrize(("times", "beyond"), [(0.999, False), (1.001, True)])
def test_the_norm_proves_a_difference_by_the_root_of_how_many_there_are(times, beyond):
    assert judged(l2=2.0 + 2 * times * FLOAT32)[1] is beyond


@pytest.mark.parametrize(
    ("tolerances", "edge"),
    [
        ({"rtol": 0.0}, 1e-5),
        ({"atol": 0.0}, 1.3e-6),
        ({"rtol": 1e-3, "atol": 1e-2}, 1.1e-2),
        ({"rtol": 0.0, "atol": 0.0}, 0.0),
    ],
)
def test_tolerances_that_are_given_leave_no_room_for_rounding(tolerances, edge):
    assert judged(**tolerances, max=1.0 + 0.99 * edge)[1] is False
    assert judged(**tolerances, max=1.0 + 1.01 * edge + 1e-8)[1] is True


def test_sixteen_bits_may_be_further_off():
    edge = 1e-5 + 1.6e-2 + allowance(1.6e-2).element
    assert judged(dtype="bfloat16", max=1.0 + 0.999 * edge)[1] is False
    assert judged(dtype="bfloat16", max=1.0 + 1.001 * edge)[1] is True


@pytest.mark.parametrize("name", ["nan_count", "inf_count"])
def test_other_numbers_of_nan_or_infinities_are_a_difference_without_a_bound(name):
    assert judged(**{name: 1}) == (None, True)


def test_no_statistics_prove_nothing():
    assert judged(**dict.fromkeys(["nan_count", "inf_count", *STATISTICS])) == (None, False)


def test_statistics_of_real_tensors_never_prove_more_than_there_is(held):
    x = torch.ones(4)
    for times in (0.99, 1.01):
        y = x.clone()
        y[0] += times * FLOAT32
        row = held(x, y, manifest_only=True).pairs.row(0, named=True)
        assert row["outcome"] == ("differs" if times > 1 else "unmeasured")
        assert row["at_least"] <= float((y.double() - x.double()).abs().max())
