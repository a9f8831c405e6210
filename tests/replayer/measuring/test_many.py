"""Small pairs that are measured many at once have the figures that each has by itself."""

from __future__ import annotations

import math
import random

import polars as pl
import pytest
import torch

from recorder import Recorder, tap
from replayer import diff
from replayer.diffing import small
from replayer.diffing.columns import COLUMNS, figures_of
from replayer.measuring.elements import unravelled
from replayer.measuring.many import measure_many
from replayer.measuring.measures import measure
from replayer.rules import Rules

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (), (1,), (7,), (300,), (16, 16), (4, 5, 6), (1, 33), (33, 1), (2, 3, 4, 5), (32, 32), (3, 700),
    (64, 2), (8, 1, 8),
)  # fmt: skip
KINDS = (
    "noise", "row", "shifted", "scaled", "zeros", "constant", "not finite", "one", "other",
    "masked", "massive", "same", "negated",
)  # fmt: skip
ALIKE = ("numel", "rtol", "atol", "bitwise", "nan_a", "nan_b", "inf_a", "inf_b", "odd_at")
NEARLY = {"cosine": lambda row: 1.0, "bias": lambda row: row["mean_abs"]}


def baseline(rng, shape, dtype):
    size = 10 ** rng.choice([0, 0, 0, -3, 2] if dtype == torch.float16 else [0, 0, -4, -7, -20, 15])
    x, what = torch.randn(shape) * size, rng.random()
    if what < 0.1:
        x = torch.zeros(shape)
    elif what < 0.2:
        x = x.masked_fill(torch.rand(shape) < 0.3, 0.0)
    elif what < 0.25 and x.dim() > 1:
        x[0] = 0.0
    elif what < 0.3:
        x = torch.full(shape, float(size))
    return x.to(dtype)


def apart(rng, x, kind):
    """Return a baseline and a target that differ in some way."""
    a, y = x.clone(), x.double()
    noisy = y * (1 + 1e-6 * torch.randn_like(y))
    place = rng.randrange(x.numel())
    if kind == "noise":
        y = y * (1 + 10 ** rng.uniform(-9, -1) * torch.randn_like(y))
    elif kind == "row":
        y = noisy
        y.view(-1, x.shape[-1] if x.dim() else 1)[0] *= -1
    elif kind == "shifted":
        y = y + rng.choice([1, 1e-3])
    elif kind == "scaled":
        y = y * rng.choice([1.5, 0.99, 2])
    elif kind in ("zeros", "constant"):
        y = torch.full_like(y, 0.0 if kind == "zeros" else rng.choice([1.0, 3e-5]))
    elif kind == "not finite":
        y.view(-1)[place] = rng.choice([math.nan, math.inf])
    elif kind == "one":
        y.view(-1)[place] += rng.choice([1e-3, 5.0])
    elif kind == "other":
        y = torch.randn_like(y)
    elif kind == "masked":
        which = torch.rand(x.shape) < 0.3
        y, a = noisy.masked_fill(which, -1e4), a.masked_fill(which, -1e4)
    elif kind == "massive":
        y = noisy
        y.view(-1)[0] *= 300
        a.view(-1)[0] *= 300
    elif kind == "negated":
        y = -y
    return a, y.to(x.dtype)


def is_near(name, value, other, row):
    if value == other:
        return True
    if not (isinstance(value, float) and isinstance(other, float)):
        return False
    size = NEARLY[name](row) if name in NEARLY else max(abs(value), abs(other))
    return abs(value - other) <= 1e-12 * size


@pytest.mark.quick
@pytest.mark.parametrize("seed", range(60))
def test_each_pair_has_the_figures_it_has_by_itself(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape, dtype = rng.choice(SHAPES), rng.choice(DTYPES)
    only = rng.choice(KINDS) if rng.random() < 0.4 else None
    sides = [
        apart(rng, baseline(rng, shape, dtype), only or rng.choice(KINDS))
        for _ in range(rng.choice([1, 2, 5, 17]))
    ]
    a, b = (torch.stack(side) for side in zip(*sides, strict=True))
    is_gradient = rng.random() < 0.3
    found, kept = measure_many(a, b, is_gradient=is_gradient)
    for at, i in enumerate(kept):
        alone = figures_of(measure(a[i], b[i], is_gradient=is_gradient))
        row = {name: values[at] for name, values in found.items()}
        if row["error_row_at"] is not None:
            rest = [-1] * len(shape[-1:])
            row["error_row_at"] = [*unravelled(row["error_row_at"], shape[:-1]), *rest]
        assert {*alone} - {*row} <= {*ALIKE}
        for name, value in row.items():
            assert is_near(name, value, alone.get(name), alone), (i, name, value, alone.get(name))


def test_most_pairs_are_measured_at_once():
    a = torch.randn(50, 8, 8)
    _, kept = measure_many(a, a * (1 + 1e-6 * torch.randn(50, 8, 8)))
    assert kept == list(range(50))


def test_a_pair_that_is_not_finite_is_left_alone_and_the_others_are_not():
    a = torch.randn(5, 8)
    b = a + 1
    b[2, 3] = math.nan
    b[4] = a[4]
    assert measure_many(a, b)[1] == [0, 1, 3]


def recorded(folder, seed):
    """Record pairs of many shapes and kinds, in an order of their own, some of them gradients."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pairs = []
    gentle = rng.random() < 0.5
    for _ in range(40):
        shape, dtype = rng.choice(((4, 8), (64,), (2, 3, 16))), rng.choice(DTYPES)
        kind = rng.choice(("noise", "same") if gentle else KINDS)
        pairs.append(apart(rng, baseline(rng, shape, dtype), kind))
    growth = [10 ** (-7 + 0.2 * i) for i in range(20)]
    x = torch.randn(16, 16)
    pairs += [(x, x * (1 + size * torch.randn(16, 16))) for size in growth if gentle]
    for name, side in (("a", 0), ("b", 1)):
        with Recorder(folder / name):
            for i, pair in enumerate(pairs):
                tap(f"x{i % 3}", pair[side], i=i)
    return folder / "a", folder / "b"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", [{}, {"rtol": 1e-3}, {"threshold": "rel_diff < 1e-9"}])
def test_a_diff_is_the_same_one_by_one(tmp_path, monkeypatch, seed, options):
    a, b = recorded(tmp_path, seed)
    at_once = diff(a, b, **options)
    monkeypatch.setattr(small, "_FEWEST", 1 << 30)
    alone = diff(a, b, **options)
    assert at_once.status == alone.status and at_once.counts() == alone.counts()
    for name in COLUMNS:
        for row, value, other in zip(
            alone.table.iter_rows(named=True), at_once.table[name], alone.table[name], strict=True
        ):
            if isinstance(value, pl.Series):
                value, other = value.to_list(), None if other is None else other.to_list()
            both_nan = value != value and other != other
            assert both_nan or is_near(name, value, other, row), (name, value, other)


def test_many_are_judged_as_each_is_by_itself():
    rng, rows = random.Random(0), []
    for _ in range(2000):
        error = 10 ** rng.uniform(-8, 0.5)
        rows.append(
            {
                "name": "x",
                "kind": rng.choice(["tensor", "grad"]),
                "rtol": rng.choice([1.6e-2, 1.3e-6, 1e-3]),
                "mismatched": rng.choice([0, 3]),
                "max_ulp": rng.choice([1, 5]),
                "l2_a": rng.choice([0.0, 1.0, 1.0]),
                "error": rng.choice([None, error, error]),
                "error_extreme": rng.choice([0.0, 0.01]),
                "error_row": error * rng.uniform(1, 20),
                "error_typical": error * rng.uniform(0.01, 1),
                "error_element": error * rng.uniform(1, 300),
                "fits_at": rng.choice([None, None, None, [1]]),
            }
        )
    table = pl.DataFrame(rows, infer_schema_length=None)
    for rules in (Rules(), Rules(rtol=1e-3)):
        by_itself = [rules.outcome(row, {})["outcome"] for row in rows]
        assert rules.outcomes(table).to_list() == by_itself
        assert {*by_itself} == {"close", "differs"}
