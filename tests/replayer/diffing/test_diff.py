"""What a diff finds, measures and judges: from two recordings to the table and the verdict."""

from __future__ import annotations

import json

import polars as pl
import pytest
import torch
from diffs import only

from recorder import step, tap
from recorder.errors import UsageError
from replayer import diff
from replayer.showing.lines import lines, objects

torch.manual_seed(0)
X = torch.randn(6, 8, 16)  # tokens, heads, head dim


def one_wrong_element(x):
    y = x.clone()
    y[4, 2, 7] += 1.0
    return y


def heads_swapped(x):
    y = x.clone()
    y[:, 2], y[:, 5] = x[:, 5], x[:, 2]
    return y


def one_token_shifted(x):
    y = x.clone()
    y[3] = x[3].roll(1, 0)
    return y


def nan(x):
    y = x.clone()
    y[0, 0, 0] = float("nan")
    return y


PLANTED = {
    # what was planted: (how, which measures find it, which do not)
    "one wrong element": (
        one_wrong_element,
        {"mismatched": (1, 1), "max_abs": (0.999, 1.001), "max_abs_at": [4, 2, 7]},
        {"p50": 0.0, "p99": 0.0},
    ),
    "heads swapped": (
        heads_swapped,
        {"rel_diff": (0.1, 1.0), "cosine": (0.5, 0.9), "mismatched": (190, 192)},
        {"p50": 0.0},
    ),
    "one token shifted": (
        one_token_shifted,
        {"mismatched": (120, 128), "rel_diff": (0.05, 0.4), "p99": (1.0, 10.0)},
        {"p50": 0.0},
    ),
    "sign flipped": (
        lambda x: -x,
        {"cosine": (-1.0, -0.999999), "rel_diff": (1.999999, 2.000001), "changed": (768, 768)},
        {},
    ),
    "rounded to bfloat16": (
        lambda x: x.bfloat16().float(),
        {"max_rel": (1e-3, 2**-8), "mismatched": (500, 768), "max_ulp": (1 << 10, 1 << 16)},
        {},
    ),
    "a NaN": (nan, {"nan_b": (1, 1), "mismatched": (1, 1)}, {"nan_a": 0, "max_abs": 0.0}),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_was_planted_is_found_by_these_measures(held, planted):
    make, finders, blind = PLANTED[planted]
    row = only(held(X, make(X)))
    assert row["outcome"] == "differs"
    for name, expected in finders.items():
        if isinstance(expected, list):
            assert row[name] == expected, name
        else:
            assert expected[0] <= row[name] <= expected[1], (name, row[name])
    for name, value in blind.items():
        assert row[name] == value, name


def test_equal_statistics_do_not_hide_swapped_heads(held):
    a, b = X, heads_swapped(X)
    found = held(a, b)
    rows = [run.rows().row(0, named=True) for run in (found.a, found.b)]
    for name in ("min", "max", "nan_count"):
        assert rows[0][name] == rows[1][name]
    for name in ("mean", "std", "l2"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-12)
    alone = held(a, b, manifest_only=True)
    assert only(alone)["outcome"] == "unmeasured" and alone.status == 1


@pytest.mark.parametrize(
    ("make", "dim", "indices"),
    [
        (heads_swapped, "1", {2, 5}),
        (one_token_shifted, "0", {3}),
        (one_wrong_element, "-1", {7}),
        (nan, "0", {0}),
    ],
)
def test_by_a_dim_the_wrong_indices_alone_differ(held, make, dim, indices):
    found = held(X, make(X), by=dim)
    rows = found.table.filter(pl.col("by").is_not_null())
    assert rows.height == X.shape[int(dim)]
    assert set(rows.filter(pl.col("outcome") == "differs")["index"]) == indices
    assert set(rows.filter(pl.col("outcome") != "differs")["outcome"]) == {"equal"}
    assert found.counts()["differs"] == 1  # rows by index are no pairs


def test_by_a_name_finds_the_head_of_a_sharded_tensor(held):
    def job(values, world):
        return lambda rank: tap("q", values.chunk(world, 1)[rank], dims="s h[tp] d")

    found = held(
        job(X, 4), job(heads_swapped(X), 2), worlds=(4, 2),
        meshes=(lambda r: {"tp": (r, 4)}, lambda r: {"tp": (r, 2)}), by="h",
    )  # fmt: skip
    rows = found.table.filter(pl.col("by") == "h")
    assert rows.filter(pl.col("outcome") == "differs")["index"].to_list() == [2, 5]
    assert found.pairs["ranks_differ"].to_list() == [[0, 1]]


def test_by_a_dim_that_no_tensor_has_names_those_there_are(held):
    found = held(X, -X, by="expert")
    assert found.notes[-1].endswith("no tensor that differs has such a dim; dims: 0, 1, 2")


def test_a_dead_rank_is_a_difference(held):
    def all_ranks(rank):
        tap("x", torch.ones(2))

    def one_dies(rank):
        if rank != 1:
            all_ranks(rank)

    found = held(all_ranks, one_dies, worlds=(2, 2))
    assert found.counts()["only_a"] == 1 and found.status == 1
    assert found.pairs.filter(pl.col("outcome") == "only_a")["rank"].to_list() == [1]


@pytest.mark.slow
def test_one_wrong_element_in_a_billion(tmp_path, recorded):
    a = torch.ones(10**9, dtype=torch.bfloat16)
    recorded(tmp_path / "A", lambda rank: tap("x", a))
    a[123_456_789] = 1.5
    recorded(tmp_path / "B", lambda rank: tap("x", a))
    row = only(diff(tmp_path / "A", tmp_path / "B"))
    assert row["outcome"] == "differs"
    assert (row["mismatched"], row["max_abs"], row["max_abs_at"]) == (1, 0.5, [123_456_789])


# Layouts


def test_logical_tensors_are_compared_whatever_the_layouts(held):
    q = torch.randn(5, 8, 4)
    fused = q.reshape(5, 32)
    found = held(
        lambda rank: tap("q", q.chunk(4, 1)[rank], dims="s h[tp] d"),
        lambda rank: tap("q", fused.chunk(2, 1)[rank].clone(), dims="s (h*d)[tp]"),
        worlds=(4, 2), meshes=(lambda r: {"tp": (r, 4)}, lambda r: {"tp": (r, 2)}),
    )  # fmt: skip
    row = only(found)
    assert (row["outcome"], row["shape_a"], row["dim_names"]) == (
        "equal",
        [5, 8, 4],
        ["s", "h", "d"],
    )
    assert (row["ranks_a"], row["ranks_b"]) == ([0, 1, 2, 3], [0, 1])
    assert found.status == 0


def test_a_baseline_of_one_rank_needs_no_layout(held):
    found = held(
        lambda rank: tap("q", X),
        lambda rank: tap("q", one_wrong_element(X).chunk(2, 1)[rank], dims="s h[tp] d"),
        worlds=(1, 2), meshes=(None, lambda r: {"tp": (r, 2)}),
    )  # fmt: skip
    row = only(found)
    assert row["max_abs_at"] == [4, 2, 7]
    assert (row["rank"], row["ranks_differ"]) == (0, [0])


def test_the_rank_named_holds_the_greatest_difference(held):
    y = X.clone()
    y[1, 7, 3] += 5
    found = held(
        lambda rank: tap("q", X.chunk(4, 1)[rank], dims="s h[tp] d"),
        lambda rank: tap("q", y.chunk(2, 1)[rank], dims="s h[tp] d"),
        worlds=(4, 2), meshes=(lambda r: {"tp": (r, 4)}, lambda r: {"tp": (r, 2)}),
    )  # fmt: skip
    assert (only(found)["rank"], only(found)["ranks_differ"]) == (1, [1])


def test_padding_of_different_lengths_is_left_out(held):
    lens = [3, 5]
    tokens = torch.randn(8, 4)

    def padded(room, dims, fill):
        def job(rank):
            x = torch.full((2, room, 4), fill)
            x[0, :3], x[1, :5] = tokens[:3], tokens[3:]
            if dims.startswith("s b"):
                x = x.transpose(0, 1).contiguous()
            tap("x", x, dims=dims, extras={"seq_lens": lens})

        return job

    flat = lambda rank: tap("x", tokens, dims="t h", extras={"seq_lens": lens})  # noqa: E731
    for other in (padded(5, "b s h", 7.0), padded(9, "s b h", 3.0), flat):
        found = held(padded(7, "b s h", -1.0), other)
        assert only(found)["outcome"] == "equal", only(found)["message"]
        assert only(found)["numel"] == 32
    assert (
        "padding left out: 6 of 14 in A and 2 of 10 in B"
        in only(held(padded(7, "b s h", -1.0), padded(5, "b s h", 7.0)))["message"]
    )


def test_logical_shapes_that_differ_are_said(held):
    found = held(
        lambda rank: tap("x", torch.ones(4, 2), dims="s h"),
        lambda rank: tap("x", torch.ones(4, 3), dims="s h"),
    )
    row = only(found)
    assert row["outcome"] == "shape" and found.status == 1
    assert "logical shapes [4, 2] in A and [4, 3] in B" in row["message"]
    assert found.first("tolerance")["name"] == "x"


def test_wrong_dims_are_no_divergence_and_hide_none(held):
    whole, y = torch.randn(4, 8), torch.randn(4)

    def base(rank):
        tap("h", whole, dims="t h[tp]")
        tap("y", y, dims="t")

    def target(wrong):
        def run(rank):
            tap("h", whole.chunk(2, 1)[rank], dims="t h")  # which forgot [tp]
            tap("y", y + wrong * (y == y[2]), dims="t")

        return run

    found = held(base, target(1), (1, 2))
    first, other = found.pairs.rows(named=True)
    assert first["outcome"] in ("error", "shape") and first["first"] is None
    assert "if 2 ranks hold a part each, write h[tp]" in first["message"]
    assert other["first"] == "both" and found.status == 1
    told = lines(held(base, target(0), (1, 2)))
    assert "no divergence beyond tolerance in what could be compared; 1 pair could not" in told


def test_blocks_whose_wholes_are_of_unequal_shape_are_no_divergence_either(held):
    def job(size, dims):
        def run(rank):
            tap("h", torch.ones(4, size, 3), dims=dims)
            tap("y", torch.full((3,), float(size)), dims="t")

        return run

    found = held(job(8, "s h[tp] e"), job(4, "s h e"), (1, 2))
    first, other = found.pairs.rows(named=True)
    assert (first["outcome"], first["first"], other["first"]) == ("shape", None, "both")
    assert first["message"].endswith("if B's 2 ranks hold a part each, write h[tp] at its tap")


@pytest.mark.parametrize("swapped", [False, True])
def test_a_step_that_one_side_forgot_is_said(held, swapped):
    def job(is_counted):
        def run(rank):
            for _ in range(3):
                for layer in range(2):
                    tap("x", torch.ones(2), layer=layer)
                if is_counted:
                    step()

        return run

    found = held(job(swapped), job(not swapped))
    one, other = "BA" if swapped else "AB"
    assert (
        f"{one} has step 0 alone, {other} steps 0 to 2: call step() at the end of an iteration, or "
        "give --match-on name,layer"
    ) in found.notes
    assert held(job(swapped), job(not swapped), match_on="name,layer").status == 0
    assert not held(job(False), job(False)).notes


def test_ranks_without_a_layout_and_in_other_numbers_ask_for_one(held):
    found = held(
        lambda rank: tap("x", torch.ones(4) * rank),
        lambda rank: tap("x", torch.ones(2) * rank),
        worlds=(2, 4),
    )
    assert set(found.pairs["outcome"]) == {"error", "only_b"}
    assert "declare the dims" in found.pairs["message"][0]
    assert found.first("tolerance") is None and found.status == 1


def test_replicas_that_differ_are_held_against_the_baseline_one_by_one(held):
    def job(wrong):
        return lambda rank: tap("x", torch.ones(4) + (rank == wrong), dims="h")

    found = held(job(None), job(2), worlds=(1, 3))
    rows = {tuple(r["ranks_b"]): r for r in found.pairs.iter_rows(named=True)}
    assert {ranks: row["outcome"] for ranks, row in rows.items()} == {
        (0,): "equal",
        (2,): "differs",
    }
    assert "B's replicas differ among themselves: this is rank 2" in rows[2,]["message"]


def test_ranks_with_data_of_their_own_are_compared_place_by_place(held):
    def job(wrong):
        return lambda rank: tap("x", torch.ones(4) * rank + (rank == wrong), dims="h")

    mesh = lambda rank: {"dp": (rank, 3)}  # noqa: E731
    found = held(job(None), job(1), worlds=(3, 3), meshes=(mesh, mesh))
    assert found.pairs["outcome"].to_list() == ["equal", "differs", "equal"]
    assert [m.split(":")[0] for m in found.pairs["message"]] == ["dp=0", "dp=1", "dp=2"]


def test_a_place_that_nobody_recorded_is_an_error_and_no_match(held):
    mesh = lambda rank: {"dp": (rank, 2)}  # noqa: E731
    full = lambda rank: tap("x", torch.ones(4) * rank, dims="h")  # noqa: E731
    half = lambda rank: full(rank) if rank else None  # noqa: E731
    found = held(full, half, worlds=(2, 2), meshes=(mesh, mesh))
    assert found.pairs["outcome"].to_list() == ["error", "equal", "only_a"]
    assert "no rank of B at dp=0 recorded it" in found.pairs["message"][0]


# Verdicts


def test_the_first_divergences_are_in_execution_order_and_named(held):
    def job(noise, fault):
        def run(rank):
            for s in range(2):
                for layer in range(3):
                    x = torch.full((2, 3), 1.0 + layer)
                    x += noise if layer >= 1 else 0.0
                    tap("out", x + (fault if (s, layer) >= (0, 2) else 0.0), layer=layer)
                step()

        return run

    found = held(job(0.0, 0.0), job(1e-6, 0.5))
    said = lines(found)
    firsts = [line for line in said if line.startswith("first divergence")]
    assert firsts[0].startswith("first divergence bitwise: out layer=1 step=0 rank=0: rel_diff ")
    assert firsts[1].startswith("first divergence beyond tolerance: out layer=2 step=0 rank=0: ")
    assert found.first("bitwise")["tags"] == '{"layer":1}'
    assert found.pairs["first"].to_list()[:3] == [None, "bitwise", "tolerance"]


def test_within_tolerance_is_status_0_and_bitwise_divergence_is_still_named(held):
    found = held(X, X + 1e-7)
    assert (only(found)["outcome"], found.status) == ("close", 0)
    assert found.first("bitwise")["name"] == "x" and found.first("tolerance") is None
    assert "no divergence beyond tolerance" in lines(found)


def test_tolerances_can_be_given(held):
    assert held(X, X + 1e-3).status == 1
    assert held(X, X + 1e-3, atol=1e-2).status == 0
    assert held(X, X * 1.001, rtol=1e-2, atol=0.0).status == 0


@pytest.mark.parametrize(
    ("threshold", "status"),
    [
        (["max_abs < 1e-2"], 0),
        (["max_abs < 1e-4"], 1),
        (["x: max_abs < 1e-2"], 0),
        (["y*: max_abs < 1e-2"], 1),
        (["max_abs < 1e-4", "x: rel_diff < 1e-3 and cosine > 0.99"], 0),
        (["max_abs < (1e-2 if layer is None else 1e-9)"], 0),
    ],
)
def test_thresholds_judge_by_name(held, threshold, status):
    assert held(X, X + 1e-3, threshold=threshold).status == status


def test_a_nan_on_one_side_is_beyond_any_threshold_that_does_not_speak_of_it(held):
    assert held(X, nan(X), threshold=["cosine > 0.5"]).status == 1
    assert held(X, nan(X), threshold=["nan_b <= 1"]).status == 0


@pytest.mark.parametrize(
    ("threshold", "words"),
    [
        ("max_abs <", "not a Python expression"),
        ("name == 'x'", "speaks of no measure"),
        ("a*: open('x')", "cannot be called"),
    ],
)
def test_a_threshold_that_cannot_be_used_says_why(held, threshold, words):
    with pytest.raises(UsageError) as caught:
        held(X, X, threshold=[threshold])
    assert words in str(caught.value)


def test_the_floor_tells_noise_from_a_fault_tag_by_tag(held, tmp_path, recorded):
    def job(seed, fault=0.0):
        def run(rank):
            noise = torch.Generator().manual_seed(seed)
            for layer in range(3):
                x = X + 1e-3 * (layer + 1) * torch.randn(X.shape, generator=noise)
                tap("out", x * (1 + fault) if layer == 2 else x, layer=layer)

        return run

    floor = [recorded(tmp_path / f"floor{i}", job(i)) for i in (5, 6)]
    noisy = held(job(1), job(2), floor=floor)
    assert noisy.status == 0 and set(noisy.pairs["outcome"]) == {"close"}
    assert noisy.pairs["times_floor"].max() < 2
    faulty = held(job(1), job(2, 0.05), floor=floor)
    assert faulty.pairs["outcome"].to_list() == ["close", "close", "differs"]
    assert faulty.pairs["times_floor"][2] > 5
    assert "times the noise floor" in lines(faulty)[-1]
    assert held(job(1), job(2, 0.05), floor=floor, floor_factor=100.0).status == 0


def test_noise_of_zero_makes_any_difference_infinitely_many_times_it(held, tmp_path, recorded):
    again = recorded(tmp_path / "again", lambda rank: tap("x", X))
    assert only(held(X, X + 1, floor=[again]))["times_floor"] == float("inf")
    assert only(held(X, X, floor=[again]))["outcome"] == "equal"


def test_nothing_matched_is_status_1_and_says_what_to_try(held):
    found = held(lambda r: tap("attn", X), lambda r: tap("self_attn", X))
    assert found.status == 1
    assert "A has taps attn; B has self_attn" in found.why_nothing
    assert "--rename" in found.why_nothing


def test_other_steps_are_named_where_nothing_matched(held):
    def late(rank):
        step()
        tap("x", X)

    assert "A has steps 0, B has 1" in held(X, late).why_nothing


def test_a_filter_that_selects_nothing_says_why(held):
    found = held(X, X, filter='name == "y" and lyer == 3')
    assert found.status == 1 and "no tap carried the tag 'lyer'" in found.why_nothing


def test_an_empty_recording_is_named(held):
    assert "is empty" in held(lambda rank: None, X).why_nothing


def test_missing_keys_can_be_told_without_counting(held):
    def more(rank):
        tap("x", X)
        tap("extra", X)

    assert held(X, more).status == 1
    found = held(X, more, ignore_missing=True)
    assert (found.status, found.counts()["only_b"]) == (0, 1)


def test_values_are_compared(held):
    def job(loss, name, ids):
        def run(rank):
            tap("loss", loss)
            tap("name", name)
            tap("ids", ids)

        return run

    found = held(job(1.0, "a", [1, 2]), job(1.0 + 1e-9, "b", [1, 2, 3]))
    assert found.pairs["outcome"].to_list() == ["close", "differs", "shape"]
    assert '"a" in A, "b" in B' in lines(found)[4]


def test_dtypes_that_differ_are_compared_by_value_and_said(held):
    found = held(X, X.bfloat16())
    row = only(found)
    assert (row["dtype_a"], row["dtype_b"], row["outcome"]) == ("float32", "bfloat16", "close")
    assert row["rtol"] == 1.6e-2 and row["max_ulp"] == 0
    exact = held(X.bfloat16().float(), X.bfloat16())
    assert only(exact)["outcome"] == "equal"


# Two speeds


def test_the_manifest_alone_proves_what_statistics_can(held):
    found = held(X, X * 3, manifest_only=True)
    row = only(found)
    assert row["outcome"] == "differs" and row["at_least"] <= float((X * 2).abs().max())
    assert row["at_least"] > 1 and row["rel_diff"] is None


def test_recordings_without_elements_are_compared_by_statistics(held):
    found = held(X, X + 1, level="stats")
    assert only(found)["outcome"] == "differs"
    assert "recorded without elements" in found.notes[-1]
    assert only(held(X, X + 1, level="digests"))["outcome"] == "unmeasured"
    assert held(X, X, level="digests").status == 0


@pytest.mark.thorough
def test_what_is_proven_is_never_less_than_so(held):
    for seed in range(20):
        noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
        b = X + noise * 10.0 ** -(seed % 7)
        found = only(held(X, b, manifest_only=True))
        assert found["at_least"] <= float((b.double() - X.double()).abs().max())


def test_a_damaged_tensor_fails_its_pair_alone_and_is_status_2(held, tmp_path, recorded):
    a = recorded(tmp_path / "a", lambda rank: (tap("x", X), tap("y", X + 1)))
    b = recorded(tmp_path / "b", lambda rank: (tap("x", X + 2), tap("y", X + 1 + 1e-7)))
    (shard,) = b.path.rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    row = b.find(0, "x")
    from recorder.format.shard import read_header

    at = read_header(shard)[row["tensor"]][0]
    data[at] ^= 1
    shard.write_bytes(data)
    found = diff(a.path, b.path)
    assert found.pairs["outcome"].to_list() == ["error", "close"]
    assert found.status == 2
    assert diff(a.path, b.path, check=False).pairs["outcome"].to_list() == ["differs", "close"]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_threads_and_memory_change_nothing_of_the_table(held, tmp_path, workers, memory, recorded):
    def job(seed):
        def run(rank):
            noise = torch.Generator().manual_seed(seed)
            for i in range(30):
                tap("x", torch.randn(200 + i, generator=noise), i=i)

        return run

    a, b = (recorded(tmp_path / str(seed), job(seed)) for seed in (1, 2))
    assert diff(a, b, workers=workers, memory=memory).table.equals(diff(a, b).table)


# What is shown


def test_the_worst_come_first_after_the_first(held):
    def job(faults):
        def run(rank):
            for i, fault in enumerate(faults):
                tap("x", torch.ones(4) * (1 + fault), i=i)

        return run

    found = held(job([0, 0, 0, 0]), job([1e-7, 0.1, 0.9, 0.5]))
    order = [json.loads(tags)["i"] for tags in found.worst()["tags"]]
    assert order == [1, 0, 2, 3]


def test_each_row_is_an_object_of_json_without_nan(held, tmp_path, recorded):
    again = recorded(tmp_path / "again", lambda rank: tap("x", X))
    found = held(X, nan(X), floor=[again])
    (line,) = objects(found)
    row = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert row["tags"] == {} and row["outcome"] == "differs" and row["nan_b"] == 1


def test_options_that_are_no_numbers_are_refused(held):
    with pytest.raises(UsageError, match="--rtol is -1"):
        held(X, X, rtol=-1.0)
    with pytest.raises(UsageError, match="--atol is nan"):
        held(X, X, atol=float("nan"))


def rounding(x, off, fraction=0.001):
    """Return x with a few small elements off, as where large ones cancelled."""
    y = x.clone().flatten()
    small = y.abs().argsort()[: int(fraction * y.numel())]
    y[small] += off
    return y.reshape(x.shape)


LARGE = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "options", "outcome"),
    [
        (lambda x: rounding(x, 1e-4), {}, "close"),
        (lambda x: rounding(x, 1e-3), {}, "differs"),  # too far off
        (lambda x: rounding(x, 1e-4, 0.02), {}, "differs"),  # too many
        (lambda x: rounding(x, 3e-4, 0.009), {}, "differs"),  # too much together
        (lambda x: rounding(x, 1e-4), {"atol": 1e-5}, "differs"),  # as the user says
        (lambda x: rounding(x, float("nan")), {}, "differs"),
    ],
)
def test_a_few_elements_a_little_off_are_taken_for_rounding(held, make, options, outcome):
    row = only(held(LARGE, make(LARGE), **options))
    assert row["mismatched"] > 0 and row["outcome"] == outcome
