"""Corners of what a diff is told: thresholds, matching, renaming, an index of a dim."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from diffs import X, each, only, over, padded

from recorder import step, tap
from recorder.errors import UsageError
from replayer import Diff, diff
from replayer.showing.lines import lines


def by_index(found: Diff) -> list[tuple[str, int, str]]:
    rows = found.table.filter(pl.col("by").is_not_null())
    return list(rows.select("by", "index", "outcome").iter_rows())


def test_not_over_a_measure_that_there_is_none_of_does_not_pass(held):
    ours, theirs = each(["a", torch.full((4,), float("nan"))]), each(["b", torch.ones(4)])
    found = held(ours, theirs, threshold="not rel_diff > 0.1 and nan_a < 9")
    assert found.pairs["outcome"].to_list() == ["differs"] * 2


def test_a_misspelt_measure_is_refused_with_the_closest(apart):
    with pytest.raises(UsageError, match="speaks of 'mismatchd', neither a measure nor a tag") as e:
        diff(*apart, threshold="rel_diff < 1 or mismatchd == 0")
    assert "closest: mismatched" in str(e.value)


def test_a_threshold_on_a_tag_of_the_taps_is_not_taken_for_a_misspelling(held):
    job = lambda rank: tap("x", X, mismatchd=0)  # noqa: E731
    assert held(job, job, threshold="rel_diff < 1 and mismatchd == 0").notes == ()


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        ("attn*: max_abs < 1", "fits no tap; taps: x"),
        ("max_abs < 1 and expert < 2", "no tap carries the tag 'expert'"),
    ],
)
def test_a_threshold_that_fits_nothing_is_said(apart, threshold, said):
    assert diff(*apart, threshold=threshold).notes == (
        f"--threshold {threshold!r}{':' * ('carries' in said)} {said}",
    )


@pytest.mark.parametrize("threshold", ["p99 < 1e-12", "max_ulp < 1"])
def test_indices_are_judged_by_tolerance_where_a_threshold_speaks_of_what_they_lack(
    held, threshold
):
    y = X.clone()
    y[2] += 1e-6
    y[4] += 1.0
    found = held(X, y, by="0", threshold=threshold)
    assert only(found)["outcome"] == "differs"
    outcomes = [outcome for _, _, outcome in by_index(found)]
    assert outcomes == ["equal", "equal", "close", "equal", "differs", "equal"]


def test_indices_are_judged_by_a_threshold_on_what_they_have(held):
    y = X.clone()
    y[2] += 1e-6
    y[4] += 1.0
    outcomes = [o for _, _, o in by_index(held(X, y, by="0", threshold="max_abs < 1e-9"))]
    assert outcomes == ["equal", "equal", "differs", "equal", "differs", "equal"]


def stages(values):
    """A job of two stages with two layers each."""

    def job(rank):
        for layer in (2 * rank, 2 * rank + 1):
            tap("h", torch.full((2, 3), float(values[layer])), dims="s d", layer=layer)

    return job


@pytest.mark.parametrize("match_on", ["order", "name"])
def test_taps_that_only_matching_brings_together_are_no_blocks_of_one_tensor(held, match_on):
    found = held(
        stages([0, 1, 2, 3]), stages([0, 1, 9, 3]), (2, 2), (over("pp", 2),) * 2, match_on=match_on
    )
    rows = {r["tags"]: r for r in found.pairs.iter_rows(named=True)}
    assert {tags: row["outcome"] for tags, row in rows.items()} == {
        '{"layer":0}': "equal",
        '{"layer":1}': "equal",
        '{"layer":2}': "differs",
        '{"layer":3}': "equal",
    }
    wrong = rows['{"layer":2}']
    assert (wrong["ranks_a"], wrong["ranks_b"], wrong["tags_b"]) == ([1], [1], None)
    assert (wrong["max_abs_a"], wrong["max_abs_b"]) == (2.0, 9.0)
    assert found.notes == ()


def test_by_order_a_tag_on_one_side_alone_contradicts_nothing(held):
    found = held(
        lambda rank: (tap("x", X, layer=1), tap("x", X)),
        lambda rank: (tap("x", X), tap("x", X, layer=1)),
        match_on="order",
    )
    assert found.counts()["equal"] == 2 and found.notes == ()


def test_by_order_another_value_of_a_tag_is_said(held):
    jobs = [lambda rank, n=n: tap("x", X, layer=n) for n in (1, 2)]
    (said,) = held(*jobs, match_on="order").notes
    assert "1 pair of 1 have names or tags that contradict each other" in said
    assert "the first: x layer=1 with x layer=2" in said


def test_two_renamings_can_swap_names(held):
    def job(one, other):
        return lambda rank: (tap(one, X), tap(other, 2 * X))

    found = held(job("a", "b"), job("b", "a"), rename=["a=b", "b=a"])
    assert found.pairs.select("name", "name_b", "outcome").rows() == [
        ("a", "b", "equal"),
        ("b", "a", "equal"),
    ]


def test_a_renamed_tap_is_not_renamed_again(held):
    def job(one, other):
        return lambda rank: (tap(one, X), tap(other, 2 * X))

    found = held(job("a", "b"), job("b", "c"), rename=["a=b", "b=c"])
    assert found.pairs.select("name", "name_b", "outcome").rows() == [
        ("a", "b", "equal"),
        ("b", "c", "equal"),
    ]


def test_a_place_that_contradicts_a_tag_is_no_fit(held):
    found = held(
        lambda rank: tap("attn", X, layer=3),
        lambda rank: tap("h.3.attn", X, layer=4),
        rename="attn=h.{layer}.attn",
    )
    assert (found.counts()["only_a"], found.counts()["only_b"]) == (1, 1)


@pytest.mark.parametrize("tags", [{}, {"layer": 3}])
def test_a_place_with_zeros_before_it_is_the_whole_number(held, tags):
    found = held(
        lambda rank: tap("attn", X, layer=3),
        lambda rank: tap("h.03.attn", X, **tags),
        rename="attn=h.{layer}.attn",
    )
    assert (only(found)["outcome"], only(found)["name_b"]) == ("equal", "h.03.attn")


def test_a_place_with_zeros_before_it_stays_as_it_was_written(held):
    jobs = [lambda rank, n=n: tap(n, X) for n in ("layers.03.attn", "h.03.attn")]
    found = held(*jobs, rename="layers.{layer}.attn=h.{layer}.attn")
    assert only(found)["outcome"] == "equal"


def test_what_moved_is_found_on_each_rank_where_ranks_tap_differently(held):
    def job(names):
        def run(rank):
            for name in names[rank]:
                tap(name, torch.ones(2))

        return run

    found = held(job(["xyz", "uvw"]), job(["xyz", "vwu"]), worlds=(2, 2))
    moved = found.pairs.filter("reordered")
    assert moved.select("name", "rank").rows() == [("u", 1)]
    assert "in another order: 1, the first u step=0 rank=1" in lines(found)


@pytest.mark.parametrize("by", ["--1", "²", "-", "", "-4"])
def test_by_what_is_no_dim_is_said(apart, by):
    found = diff(*apart, by=by)
    assert f"--by {by}: no tensor that differs has such a dim" in found.notes[-1]
    assert found.table.height == 1


@pytest.mark.parametrize("by", ["s", "b", "t"])
def test_by_batch_or_sequence_is_token_by_token_where_padding_is_left_out(held, by):
    found = held(padded(7, "b s d", 1.0), padded(5, "b s d", 1.0, wrong=1.0), by=by)
    wanted = [("t", i, "differs" if i < 3 else "equal") for i in range(8)]
    assert by_index(found) == wanted and found.notes == ()


def test_by_a_dim_that_a_has_fused_says_so(held):
    fused = lambda rank: tap("x", torch.ones(2, 6), dims="t (h*d)")  # noqa: E731
    apart = lambda rank: tap("x", 2 * torch.ones(2, 3, 2), dims="t h d")  # noqa: E731
    found = held(fused, apart, by="h")
    assert "(h*d) has it fused: the dims are A's" in found.notes[-1]
    assert len(by_index(diff(found.b, found.a, by="h"))) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step_offset": 1 << 70}, "--step-offset is 1180591620717411303424; no job has as many"),
        ({"step_offset": -(1 << 63)}, "--step-offset is -9223372036854775808; no job has as many"),
        ({"workers": 0}, "--workers is 0; give a number from 1 on"),
        ({"memory": 0}, "--memory is 0; give a number from 1 on"),
        ({"floor_factor": -1.0}, "--floor-factor is -1.0; give a finite number from 0 on"),
    ],
)
def test_numbers_out_of_range_are_refused(apart, options, said):
    with pytest.raises(UsageError) as caught:
        diff(*apart, **options)
    assert said in str(caught.value)


def test_there_is_no_first_divergence_of_another_kind(apart):
    with pytest.raises(UsageError, match="no first divergence 'x'; ask for bitwise, tolerance or"):
        diff(*apart).first("x")


def test_one_string_or_folder_is_taken_for_a_list_of_it(held, recorded, tmp_path):
    again = recorded(tmp_path / "again", lambda rank: tap("x", X + 1e-3))
    a, b = (
        recorded(tmp_path / n, lambda r, n=n, t=t: tap(n, t))
        for n, t in (("x", X), ("y", X + 1e-3))
    )
    assert diff(a, b, rename="x=y").status == 1
    for floor in (again, again.path, str(again.path)):
        assert diff(a, b, rename="x=y", floor=floor).status == 0
    assert diff(a, b, rename="x=y", threshold="x: max_abs < 1").status == 0


def test_the_counts_of_all_outcomes_are_the_pairs(held):
    def job(*values):
        def run(rank):
            for i, value in enumerate(values):
                tap("x", value, i=i)
            step()

        return run

    zeros = torch.zeros(3)
    found = held(
        job(zeros, zeros, zeros, zeros),
        job(zeros, zeros + 1e-9, zeros + 1, torch.zeros(4), zeros),
        by="0",
    )
    counts = found.counts()
    assert {name: n for name, n in counts.items() if n} == {
        "equal": 1, "close": 1, "differs": 1, "shape": 1, "only_b": 1,
    }  # fmt: skip
    assert sum(counts.values()) == found.pairs.height == 5 and found.compared == 4


def test_a_tag_to_match_on_that_no_tap_carries_is_refused(held):
    with pytest.raises(UsageError, match="names 'nmae', which no tap carries; there are name"):
        held(X, X, match_on="nmae,layer")


def test_matching_without_the_name_warns_where_names_contradict(held):
    found = held(
        lambda rank: tap("k", X, layer=0), lambda rank: tap("zz", X, layer=0), match_on="layer"
    )
    assert "the first: k layer=0 with zz layer=0" in found.notes[0]


@pytest.mark.parametrize("text", ["rel_diff", "x*: max_abs", "not rel_diff", "max_abs < 1 or 1"])
def test_a_threshold_that_is_no_comparison_is_refused(held, text):
    with pytest.raises(UsageError, match="neither true nor false"):
        held(X, X + 1, threshold=text)


def test_speaking_of_nan_excuses_no_infinity(held):
    y = X.clone()
    y[0, 0, 0] = float("inf")
    assert held(X, y, threshold="max_abs < 0.1 and nan_b == 0").status == 1
    assert held(X, y, threshold="max_abs < 0.1 and inf_b <= 1").status == 0


def test_times_floor_needs_a_floor(held):
    with pytest.raises(UsageError, match="there is no --floor"):
        held(X, X + 1, threshold="times_floor < 3")


def test_a_renaming_is_turned_round_only_where_that_fits_both_sides(held):
    def job(rank):
        tap("attn_q", X)

    found = held(job, job, rename="attn_q=q")
    assert found.status == 0 and "fits no tap of B" in found.notes[0]


def test_true_is_not_1(held):
    assert held(lambda rank: tap("v", True), lambda rank: tap("v", 1)).status == 1


def test_the_line_names_the_element_farthest_beyond_where_another_is_farther_within(held):
    large = torch.ones(6, 8, 16)
    large[:, 0] = 1e6
    y = large.clone()
    y[0, 0, 0] += 0.5
    y[3, 6, 2] += 0.1
    found = held(large, y, atol=1e-5)
    assert "1 of 768 elements beyond tolerance, the farthest by 0.1 at [3, 6, 2]" in lines(found)[3]
