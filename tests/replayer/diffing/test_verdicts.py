"""What a diff calls rounding, and what not, however large or small the numbers around it are."""

from __future__ import annotations

import functools

import pytest
import torch
from diffs import only
from transformer import Options, Transformer

from recorder import Recorder, step, tap
from replayer import diff
from replayer.rules import Allowance, History, Rules, allowance
from replayer.showing.lines import figures, lines, shape_of_error

RANDOM = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=RANDOM)


def causal(n):
    return torch.triu(torch.ones(n, n), 1).bool()


# Large values hide nothing


@pytest.mark.parametrize("fill", ["min", -1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_scores_beside_a_mask_are_no_rounding(held, dtype, fill):
    fill = torch.finfo(dtype).min if fill == "min" else fill
    a, b = (randn(4, 32, 32).to(dtype).masked_fill(causal(32), fill) for _ in "ab")
    row = only(held(a, b))
    assert row["outcome"] == "differs" and row["error"] > 1


def test_rounding_beside_a_mask_is_rounding(held):
    x = randn(4, 32, 32)
    a, b = ((x * f).masked_fill(causal(32), -1e4).bfloat16() for f in (1, 1 + 1e-3))
    assert only(held(a, b))["outcome"] == "close"


def test_one_query_row_beside_a_mask_is_named(held):
    a = randn(1, 64, 64).masked_fill(causal(64), torch.finfo(torch.float32).min)
    b = a.clone()
    b[0, 50, :51] = randn(51)
    row = only(held(a, b))
    assert row["outcome"] == "differs" and row["error_row_at"] == [0, 50, -1]
    assert "the error at [0, 50] of dims 0, 1 is" in figures(row)


def test_one_token_beside_a_padded_vocabulary_is_named(held):
    a = randn(8, 300)
    a[:, 290:] = -1e4
    b = a.clone()
    b[3, :290] = randn(290)
    row = only(held(a.bfloat16(), b.bfloat16()))
    assert row["outcome"] == "differs" and row["error_row_at"] == [3, -1]


def test_one_token_beside_an_attention_sink_is_named(held):
    a = randn(32, 128)
    a[0, 7] = 5e4
    b = a.clone()
    b[9] = randn(128)
    row = only(held(a.bfloat16(), b.bfloat16()))
    assert row["outcome"] == "differs" and row["error_row_at"] == [9, -1]
    assert "the error at index 9 of dim 0 is" in shape_of_error(row)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_any_size_are_judged_alike(held, dtype, scale):
    a = randn(16, 64)
    b = a * (1 + 1e-7 * randn(16, 64))
    assert only(held((a * scale).to(dtype), (b * scale).to(dtype)))["outcome"] in ("close", "equal")
    b[3] = randn(64)
    row = only(held((a * scale).to(dtype), (b * scale).to(dtype)))
    assert row["outcome"] == "differs" and row["error_row_at"] == [3, -1]


def test_where_the_baseline_is_zero_the_absolute_tolerance_decides(held):
    zeros = torch.zeros(4, 32)
    assert only(held(zeros, zeros + 1e-9))["outcome"] == "close"
    assert only(held(zeros, zeros + 1e-3))["outcome"] == "differs"


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0])
def test_zeros_in_place_of_numbers_are_no_rounding(held, size):
    a = size * randn(4, 32)
    assert only(held(a, torch.zeros(4, 32)))["outcome"] == "differs"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.arange(4096), torch.arange(1, 4097)),
        (torch.arange(64) % 2 == 0, torch.arange(64) % 2 == 1),
        (torch.arange(64, dtype=torch.int8), torch.arange(1, 65, dtype=torch.int8)),
        (torch.arange(64), torch.arange(1, 65, dtype=torch.int32)),
        (torch.ones(64).to(torch.float8_e4m3fn), torch.full((64,), 1.125).to(torch.float8_e4m3fn)),
    ],
)
def test_what_is_exact_is_never_rounded(held, a, b):
    assert only(held(a, b))["outcome"] == "differs"


# Rounding has no direction


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_factor_is_no_rounding(held, dtype):
    a = randn(32, 16, 16)
    stale = a.clone()
    stale[3] *= 1.05
    row = only(held(a.to(dtype), stale.to(dtype)))
    assert row["outcome"] == "differs" and row["fits_at"] == [3, -1, -1]
    assert row["factor"] == pytest.approx(1.05, rel=1e-3)
    assert shape_of_error(row) == f"B is {row['factor']:.4f} x A at index 3 of dim 0"
    row = only(held(a.to(dtype), (a * 1.02).to(dtype)))
    assert row["outcome"] == "differs" and row["factor"] == pytest.approx(1.02, rel=1e-3)
    noise = 1 + torch.finfo(dtype).eps / 4 * randn(32, 16, 16)
    assert only(held(a.to(dtype), (a.to(dtype).float() * noise).to(dtype)))["outcome"] == "close"


def test_an_offset_is_no_rounding(held):
    a = randn(32, 64)
    row = only(held(a, a + 1e-4))
    assert row["outcome"] == "differs" and row["offset"] == pytest.approx(1e-4, rel=1e-3)
    assert shape_of_error(row) == "B is A +0.0001"


def test_a_dim_that_is_named_is_called_so(held):
    a = randn(8, 4, 32)
    b = a.clone()
    b[3] *= 1.5

    def job(value):
        return lambda rank: tap("w", value, dims="e i h")

    row = only(held(job(a), job(b)))
    assert shape_of_error(row) == "B is 1.5000 x A at index 3 of dim e"


def test_the_index_of_a_factor_differs_by_itself(held):
    a = randn(8, 4, 32).bfloat16()
    b = a.clone()
    b[3] *= 1.05
    found = held(a, b, by="0")
    rows = found.table.filter(by="0")
    assert rows.filter(outcome="differs")["index"].to_list() == [3]


def test_tolerances_that_are_given_are_taken_at_their_word(held):
    a = randn(8, 64)
    assert only(held(a, a * 1.01, rtol=0.02, atol=0.0))["outcome"] == "close"
    assert only(held(a, a * (1 + 1e-6), rtol=0.0, atol=0.0))["outcome"] == "differs"


def test_a_threshold_may_speak_of_all_of_it(held):
    a = randn(8, 64)
    assert only(held(a, a * 1.01, threshold="factor < 1.02"))["outcome"] == "close"
    assert only(held(a, a * 1.03, threshold="factor < 1.02"))["outcome"] == "differs"
    assert only(held(a, a + 0.1 * randn(8, 64), threshold="error_row < 0.5"))["outcome"] == "close"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.bool])
def test_where_no_factor_is_looked_for_none_is_known(held, dtype):
    a, b = (randn(8, 64).mul(50).clamp(min=0).to(dtype) for _ in range(2))
    for threshold in ("factor < 1.02", "offset < 1", "error_row < 0.1"):
        assert only(held(a, b, threshold=threshold))["outcome"] == "differs"
    assert only(held(a, a, threshold="factor < 1.02"))["outcome"] == "equal"


def test_noise_within_the_floor_is_within_tolerance(held, tmp_path):
    a = randn(8, 64)
    with Recorder(tmp_path / "A2"):
        tap("x", a * 0.99)
    assert only(held(a, a * 1.01, floor=[tmp_path / "A2"]))["outcome"] == "close"


# Rounding accumulates


def deep(tmp_path, change=None, layers=48, dtype=torch.bfloat16):
    """Compare a deep model with itself whose products are split in two; `change` plants a fault."""
    for side, options in (("A", None), ("B", Options(tp=2))):
        model = Transformer(layers, seed=3)

        def seen(name, value, side=side, **tags):
            if change and side == "B":
                value = change(name, value, **tags)
            if name in ("attn_out", "mlp_out", "resid"):
                return tap(name, value, **tags)
            return value

        with Recorder(tmp_path / side):
            model.run(functools.partial(seen), dtype, options)
            step()
    return diff(tmp_path / "A", tmp_path / "B")


def test_a_deep_model_is_within_tolerance_and_says_that_rounding_accumulates(tmp_path):
    found = deep(tmp_path)
    assert found.status == 0 and found.counts()["differs"] == 0
    assert found.pairs["growth"].drop_nulls().len() > 20
    said = [line for line in lines(found) if line.startswith("rounding accumulates")]
    assert len(said) == 1 and "without a jump: by at most 1." in said[0] and "--floor" in said[0]
    assert found.first("tolerance") is None


def test_a_jump_in_a_deep_model_is_the_first_divergence(tmp_path):
    def fault(name, value, layer=None):
        return value * 1.5 if (name, layer) == ("attn_out", 30) else value

    found = deep(tmp_path, fault)
    first = found.first("tolerance")
    assert (first["name"], first["tags"]) == ("attn_out", '{"layer":30}')
    assert first["factor"] == pytest.approx(1.5, rel=0.05) and found.status == 1
    # Behind it the error is inherited, and no rounding any more.
    later = found.pairs.filter(found.pairs["pair"] > first["pair"])
    assert later["growth"].drop_nulls().len() == 0
    assert later.filter(outcome="differs").height > 20


def row_of(name, error, kind="tensor", **other):
    row = {
        "name": name, "kind": kind, "mismatched": 9, "numel": 99, "rtol": 1.3e-6, "max_ulp": 99,
        "l2_a": 1.0, "l2_b": 1.0, "error": error, "error_extreme": 0.0, "error_row": error,
        "error_typical": error, "error_element": error, "fits_at": None,
    }  # fmt: skip
    return {**row, **other}


def test_what_grows_by_a_small_factor_is_rounding_and_a_jump_is_none():
    rules, history = Rules(), History()
    assert history.known(row_of("h", 1.0)) is None
    for error in (5e-6, 1e-5, 1.9e-5, 3.5e-5):
        row = row_of("h", error)
        within = rules.is_within(row, {}, history.known(row))
        assert within
        history.add(row, within, True)
    assert history.growth(row_of("h", 7e-5)) == pytest.approx(2.0)
    jump = row_of("h", 4e-4)
    assert not rules.is_within(jump, {}, history.known(jump))
    history.add(jump, False, True)
    assert history.known(row_of("h", 1e-4)) is None


def test_the_error_of_an_earlier_pair_of_the_name_counts_too():
    rules, history = Rules(), History()
    history.add(row_of("probs", 6e-6), True, True)
    history.add(row_of("resid", 1e-7), True, True)
    assert rules.is_within(row_of("probs", 1.5e-5), {}, history.known(row_of("probs", 1.5e-5)))
    assert not rules.is_within(row_of("mlp", 1.5e-5), {}, history.known(row_of("mlp", 1.5e-5)))


def test_growth_has_a_ceiling(held):
    xs = [randn(64, 256) for _ in range(8)]
    errors = (0.03, 0.058, 0.11, 0.2, 0.38, 0.7, 1.4, 3.0)
    noise = [error * randn(64, 256) for error in errors]

    def job(values):
        return lambda rank: [tap("x", x.bfloat16(), i=i) for i, x in enumerate(values)]

    found = held(job(xs), job([x + d for x, d in zip(xs, noise, strict=True)]))
    assert found.status == 1
    assert found.pairs["outcome"].to_list() == ["close"] * 5 + ["differs"] * 3


@pytest.mark.parametrize(("others", "outcome"), [(2, "close"), (0, "differs")])
def test_a_gradient_that_is_zero_but_for_rounding_is_none_beside_others(held, others, outcome):
    def job(seed):
        noise = torch.randn(64, generator=torch.Generator().manual_seed(seed))

        def run(rank):
            for i in range(others):
                x = tap("w", torch.ones(64, requires_grad=True), grad=True, i=i)
                (x * (torch.arange(64.0) + 1) * (1 + 1e-6 * noise)).sum().backward()
            x = tap("bias", torch.ones(64, requires_grad=True), grad=True)
            (x * noise * 1e-9).sum().backward()

        return run

    rows = held(job(1), job(2)).pairs.filter(kind="grad", name="bias")
    assert rows["outcome"].to_list() == [outcome]


def test_a_threshold_over_the_factor_holds_where_none_fits(held):
    a = randn(8, 64)
    assert only(held(a, a + 0.3 * randn(8, 64), threshold="factor < 1.01"))["outcome"] == "close"


def test_what_a_threshold_let_pass_is_no_rounding_that_others_may_have():
    history = History()
    history.add(row_of("h", 0.5), True, False)
    assert history.known(row_of("h", 0.5)) is None


@pytest.mark.parametrize("rtol", [1.6e-2, 1e-3, 1.3e-6, 1e-7])
def test_a_row_as_far_off_as_it_is_large_never_passes(rtol):
    usual = allowance(rtol)
    row = row_of("h", usual.whole, rtol=rtol, error_row=0.99, error_typical=usual.whole)
    known = Allowance(9.0, 9.0, 9.0)
    assert not Rules().is_within(row, {}, known)
    for name in ("error", "error_extreme", "error_element"):
        far = {**row_of("h", 0.0, rtol=rtol), name: 1.01 * max(usual)}
        assert not Rules().is_within(far, {})
        assert Rules().is_within({**far, name: 0.99 * min(usual)}, {})
