"""Corners in which a diff was, or would be, silently wrong: each is found, or said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffs import X, each, only, over, padded

from recorder import tap
from recorder.errors import UsageError
from recorder.format.shard import read_header
from replayer import diff
from replayer.diffing import work
from replayer.measuring.measures import measure
from replayer.showing.lines import lines, objects


def heads(tensor, world):
    """A job whose ranks have some heads each."""
    return lambda rank: tap("q", tensor.chunk(world, 1)[rank], dims="t h[tp] d")


def damage(run, name, at):
    """Flip a bit of a recorded tensor, `at` bytes from its start."""
    row = run.find(0, name)
    (shard,) = run.path.rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[read_header(shard)[row["tensor"]][0] + at] ^= 1
    shard.write_bytes(data)


EXACT = [  # of what is no float: in A, in B, and in a second run of A
    (True, False, False),
    ("a", "b", "c"),
    ([1, "a"], [1, "b"], [1, "c"]),
    (2**53, 2**53 + 1, 2**53),
    (20_000_000, 20_000_001, 20_000_000),
    ([1, 2**53], [1, 2**53 + 1], [1, 2**53]),
    ([1.5, 2**60], [1.5, 2**60 + 1], [1.5, 2**60]),
    ([1, 2, 3], [1, 2, 4], [1, 2, 3]),
]


def test_values_that_are_no_floats_are_compared_exactly(held):
    ours, theirs, _ = zip(*EXACT, strict=True)
    rows = held(each(ours), each(theirs)).pairs.select("outcome", "bitwise", "mismatched").rows()
    assert rows == [("differs", False, 1)] * len(EXACT)


def test_the_floor_gives_no_room_to_values_that_are_compared_exactly(held, recorded, tmp_path):
    ours, theirs, again = zip(*EXACT, strict=True)
    found = held(each(ours), each(theirs), floor=recorded(tmp_path / "again", each(again)))
    assert found.pairs["outcome"].to_list() == ["differs"] * len(EXACT)
    assert found.pairs["times_floor"][:3].to_list() == [None] * 3
    assert "--floor has no noise for 6 pairs" in found.notes[-1]


def test_a_float_and_an_integer_of_one_value_are_close_and_not_bitwise(held):
    found = held(lambda rank: tap("v", 5), lambda rank: tap("v", 5.0))
    assert (only(found)["outcome"], only(found)["bitwise"], found.status) == ("close", False, 0)


def test_a_list_and_one_value_are_of_unequal_shape(held):
    found = held(lambda rank: tap("v", 5), lambda rank: tap("v", [5]))
    assert only(found)["outcome"] == "shape" and found.status == 1
    assert only(found)["message"] == "a list on one side, one value on the other"


def test_lists_of_unequal_length_say_both(held):
    found = held(lambda rank: tap("v", [1, 2]), lambda rank: tap("v", [1]))
    assert only(found)["message"] == "a list of 2 in A and of 1 in B"


def test_long_values_are_shortened_in_lines_and_whole_in_json(held):
    found = held(lambda rank: tap("v", "a" * 500), lambda rank: tap("v", "a" * 499 + "b"))
    (said,) = [line for line in lines(found) if line.startswith("first divergence bitwise")]
    assert len(said) < 200 and said.count("...") == 2
    (row,) = map(json.loads, objects(found))
    assert row["value_a"] == "a" * 500


def test_the_floor_gives_no_room_to_dtypes_without_arithmetic(held, recorded, tmp_path):
    raw = torch.arange(8, dtype=torch.uint8)
    bits = [(raw + i).view(torch.bits8) for i in range(3)]
    again = recorded(tmp_path / "again", lambda rank: tap("x", bits[2]))
    row = only(held(bits[0], bits[1], floor=again))
    assert (row["outcome"], row["times_floor"]) == ("differs", None)


def test_a_wrong_replica_is_found_whatever_its_number(held):
    found = held(
        lambda rank: tap("x", torch.ones(4), dims="h"),
        lambda rank: tap("x", torch.ones(4) + (rank == 66), dims="h"),
        worlds=(1, 70),
    )
    assert [(r["outcome"], r["ranks_b"]) for r in found.pairs.iter_rows(named=True)] == [
        ("differs", [66]),
        ("equal", [0]),
    ]
    assert found.status == 1 and found.first("tolerance")["rank"] == 66


def test_more_replicas_than_are_compared_are_an_error_that_says_so(held, monkeypatch):
    monkeypatch.setattr("replayer.pairing.blocks._MOST_VARIANTS", 3)
    found = held(
        lambda rank: tap("x", torch.ones(4), dims="h"),
        lambda rank: tap("x", torch.full((4,), rank + 1.0), dims="h"),
        worlds=(1, 5),
        threshold="max_abs < 100",
    )
    assert found.pairs["outcome"].to_list() == ["equal", "close", "close", "error"]
    assert found.status == 1
    assert "hold 5 different tensors, of which 3 were compared" in found.pairs["message"][-1]


def test_a_rank_that_did_not_record_a_replicated_tap_is_missed(held):
    def job(missing):
        return lambda rank: tap("x", X, dims="t h d") if rank != missing else None

    found = held(job(None), job(1), worlds=(3, 3))
    rows = [(r["outcome"], r["rank"]) for r in found.pairs.iter_rows(named=True)]
    assert rows == [("equal", None), ("only_a", 1)] and found.status == 1
    assert "only in A: 1, the first x step=0 rank=1" in lines(found)
    assert diff(found.b, found.a).counts()["only_b"] == 1


@pytest.mark.parametrize(("ignore_missing", "status"), [(False, 1), (True, 0)])
def test_worlds_that_differ_miss_a_rank_that_never_recorded(
    recorded, tmp_path, ignore_missing, status
):
    a, b = (
        recorded(tmp_path / name, lambda rank: tap("x", X, dims="t h d"), world)
        for name, world in (("A", 2), ("B", 3))
    )
    assert diff(a, b).status == 0
    shutil.rmtree(b.path / "rank-00001")
    found = diff(a.path, b.path, ignore_missing=ignore_missing)
    assert found.counts()["equal"] == 1 and found.status == status


@pytest.mark.parametrize(
    ("dims", "worlds", "shape", "said"),
    [
        ("t[cp:zigzag]", (2, 2), (4,), "have the lengths [8], B's [4, 4]"),
        ("b s", (1, 1), (2, 8), "A's ranks' sequences have the lengths [8], B's [4, 4]"),
    ],
)
def test_equal_bytes_of_other_sequences_are_not_equal(held, dims, worlds, shape, said):
    def job(lengths):
        def run(rank):
            x = torch.arange(16.0).reshape(2, 8) if len(shape) > 1 else torch.arange(4.0) + 4 * rank
            tap("x", x, dims=dims, extras={"seq_lens": lengths})

        return run

    meshes = (over("cp", 2),) * 2 if worlds == (2, 2) else (None, None)
    found = held(job([8]), job([4, 4]), worlds, meshes)
    assert only(found)["outcome"] == "error" and found.status == 1
    assert said in only(found)["message"]
    assert only(found)["bitwise"] is None
    assert diff(found.a, found.a).status == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [("b s d", "(b*s) d"), ("(b*s) d", "b s d"), ("(b*s) d", "(b*s) d")],
)
def test_padding_is_left_out_of_fused_dims_too(held, one, other):
    found = held(padded(7, one, -1.0), padded(5, other, 3.0))
    assert (only(found)["outcome"], only(found)["numel"]) == ("equal", 32)
    assert "padding left out: 6 of 14 in A" in only(found)["message"]


@pytest.mark.parametrize("at", [4 * 10, 4 * 100_000], ids=["in a token", "in padding"])
def test_damaged_bytes_of_a_large_padded_tensor_are_found(recorded, tmp_path, at):
    def job(fill):
        x = torch.full((2, 140_000), fill)
        x[:, :100] = torch.arange(200.0).view(2, 100)
        return lambda rank: tap("x", x, dims="b s", extras={"seq_lens": [100, 100]})

    a, b = recorded(tmp_path / "A", job(0.0)), recorded(tmp_path / "B", job(1.0))
    damage(b, "x", at)
    found = diff(a.path, b.path)
    assert (only(found)["outcome"], found.status) == ("error", 2)
    assert "do not have the digest that was recorded" in only(found)["message"]


VOCABULARY = torch.arange(21.0).view(7, 3)


PADDED = torch.cat([VOCABULARY, torch.full((1, 3), 99.0)])


@pytest.mark.parametrize("facts", ["# v:padded", "# v=7"])
@pytest.mark.parametrize("swapped", [False, True])
def test_padding_that_one_side_declares_is_compared_with_the_others_plain_rows(
    held, facts, swapped
):
    declared = lambda rank: tap("l", PADDED.chunk(2)[rank], dims=f"v[tp] d {facts}")  # noqa: E731
    sides = [(declared, 2, over("tp", 2)), (lambda rank: tap("l", VOCABULARY, dims="v d"), 1, None)]
    (a, *one), (b, *other) = sides[::-1] if swapped else sides
    worlds, meshes = zip(one, other, strict=True)
    row = only(held(a, b, worlds, meshes))
    assert (row["outcome"], row["shape_a"]) == ("equal", [7, 3])


@pytest.mark.parametrize(("facts", "rows"), [("# v:padded", 8), ("# v=7", 7)])
def test_padding_that_a_declares_is_compared_with_as_many_plain_rows(held, facts, rows):
    plain = lambda rank: tap("l", PADDED, dims="v d")  # noqa: E731
    row = only(held(lambda rank: tap("l", PADDED, dims=f"v d {facts}"), plain))
    assert (row["outcome"], row["shape_a"]) == ("equal", [rows, 3])


def parted(wrong=None):
    return lambda rank: tap("x", torch.full((4,), 1.0 + (rank == wrong)), dims="h")


@pytest.mark.parametrize("mesh_a", [None, over("dp", 1)], ids=["no mesh", "dp=1"])
def test_each_part_of_the_data_is_held_against_a_baseline_of_one(held, mesh_a):
    found = held(parted(), parted(1), (1, 2), (mesh_a, over("dp", 2)))
    rows = [(r["outcome"], r["ranks_b"], r["message"]) for r in found.pairs.iter_rows(named=True)]
    assert rows == [("equal", [0], "dp=0"), ("differs", [1], "dp=1")]


def test_parts_of_the_data_in_a_alone_are_held_against_b(held):
    found = held(parted(1), parted(), (2, 1), (over("dp", 2), None))
    rows = [(r["outcome"], r["ranks_a"], r["rank"]) for r in found.pairs.iter_rows(named=True)]
    assert rows == [("equal", [0], 0), ("differs", [1], 0)]


def test_parts_of_the_data_of_other_numbers_are_not_comparable(held):
    found = held(parted(1), parted(2), (2, 3), (over("dp", 2), over("dp", 3)))
    assert only(found)["outcome"] == "error" and found.status == 1
    assert "had data of their own over dp, and stood at other places" in only(found)["message"]


def test_the_manifest_alone_cannot_compare_other_layouts(held):
    found = held(
        heads(X, 4), heads(X, 2), (4, 2), (over("tp", 4), over("tp", 2)), manifest_only=True
    )
    row = only(found)
    assert (row["outcome"], row["bitwise"], found.status) == ("error", None, 1)
    assert "the layouts differ, and only the tensors can tell" in row["message"]
    assert found.first("bitwise") is None and found.first("tolerance") is None
    said = lines(found)
    for how in ("bitwise", "beyond tolerance"):
        assert f"no divergence {how} in what could be compared; 1 pair could not" in said


def partial(parts):
    return lambda rank: tap("x", parts[rank], dims="t h[tp:partial] d")


def with_padding(fill):
    x = torch.cat([torch.ones(10), torch.full((2,), fill)])
    return lambda rank: tap("x", x, dims="v # v=10")


@pytest.mark.parametrize(
    ("a", "b", "world"),
    [
        (partial([X, X]), partial([3 * X, -X]), 2),
        (with_padding(0.0), with_padding(900.0), 1),
        (padded(7, "b s d", 0.0), padded(7, "b s d", 900.0), 1),
    ],
    ids=["summands", "declared padding", "padding by lengths"],
)
def test_statistics_prove_nothing_of_summands_and_padding(held, a, b, world):
    meshes = (over("tp", 2),) * 2 if world == 2 else (None, None)
    found = held(a, b, (world, world), meshes, manifest_only=True)
    assert (only(found)["outcome"], only(found)["at_least"]) == ("error", None)
    assert diff(found.a, found.b).status == 0


def test_digests_of_one_layout_say_that_it_differs_and_statistics_of_parts_nothing(held):
    meshes = (over("tp", 2),) * 2
    found = held(heads(X, 2), heads(3 * X, 2), (2, 2), meshes, manifest_only=True)
    row = only(found)
    assert (row["outcome"], row["bitwise"], row["at_least"]) == ("unmeasured", False, None)
    said = lines(found)
    assert "first divergence bitwise: q step=0 rank=0: the bytes differ" in said
    assert "no divergence beyond tolerance in what could be compared; 1 pair could not" in said


def test_the_manifest_alone_goes_with_no_option_that_reads(apart):
    with pytest.raises(UsageError, match="--floor needs the tensors; leave --manifest-only out"):
        diff(*apart, manifest_only=True, floor=apart[0])
    with pytest.raises(UsageError, match="--by needs the tensors; leave --manifest-only out"):
        diff(*apart, manifest_only=True, by="0")


LARGE = torch.ones(6, 8, 16)


LARGE[:, 0] = 1e6  # a head of the first rank


def wrong_at_the_second_rank(value):
    y = LARGE.clone()
    y[0, 0, 0] += 0.5  # within tolerance, and the greatest difference
    y[3, 6, 2] = value
    return y


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.1])
def test_the_rank_named_holds_what_is_not_finite_or_beyond_tolerance(held, value):
    meshes = (over("tp", 2),) * 2
    wrong = wrong_at_the_second_rank(value)
    found = held(heads(LARGE, 2), heads(wrong, 2), (2, 2), meshes, atol=1e-5)
    row = found.first("tolerance")
    assert (row["rank"], row["ranks_differ"], row["max_abs_at"]) == (1, [1], [0, 0, 0])
    assert row["max_beyond_at" if value == 1.1 else "odd_at"] == [3, 6, 2]
    assert "first divergence bitwise: q step=0 rank=1: " in lines(found)[3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_place_of_what_is_not_finite_is_said(held, value):
    said = lines(held(LARGE, wrong_at_the_second_rank(value)))[3]
    assert "1 NaN in B alone" in said or "1 Inf in B alone" in said
    assert "the first at [3, 6, 2]" in said


def test_the_rank_named_holds_the_zero_of_the_other_sign(held):
    zeros, signed = torch.zeros(6, 8, 16), torch.zeros(6, 8, 16)
    signed[0, 7, 0] = -0.0
    found = held(heads(zeros, 2), heads(signed, 2), (2, 2), (over("tp", 2),) * 2)
    row = only(found)
    assert (row["outcome"], row["bitwise"], row["changed"]) == ("close", False, 0)
    assert (row["rank"], row["ranks_differ"]) == (1, [1])


def test_both_tensors_of_a_row_can_be_had(held):
    meshes = (over("tp", 4), over("tp", 2))
    found = held(heads(X, 4), heads(X + 1, 2), (4, 2), meshes)
    two = found.tensors(only(found))
    assert torch.equal(two.a, X) and torch.equal(two.b, X + 1)
    assert two.dim_names == ("t", "h", "d")


def test_the_tensors_of_a_replica_are_those_of_its_row(held):
    found = held(
        lambda rank: tap("x", torch.zeros(4), dims="h"),
        lambda rank: tap("x", torch.full((4,), float(rank)), dims="h"),
        worlds=(1, 3),
    )
    seen = {r["rank"]: float(found.tensors(r).b[0]) for r in found.pairs.iter_rows(named=True)}
    assert seen == {0: 0.0, 1: 1.0, 2: 2.0}


def test_there_are_no_tensors_of_what_was_equal_by_digest(held):
    found = held(X, X)
    assert found.tensors(only(found)) is None


def test_tags_are_columns_beside_the_name_and_never_take_a_columns_place(held):
    job = lambda rank: tap("x", X, layer=2, outcome="good")  # noqa: E731
    table = held(job, job).with_tags()
    assert table.columns[1:4] == ["name", "layer", "tag.outcome"]
    assert table.select("layer", "tag.outcome", "outcome").rows() == [(2, "good", "equal")]


def test_a_rank_that_skipped_a_tap_counts_where_the_other_side_cannot_tell(held):
    def skips(rank):
        if rank != 2:
            tap("x", X, dims="t h d")
        tap("y", X, dims="t h d")

    def whole(rank):
        tap("x", X, dims="t h d")
        tap("y", X, dims="t h d")

    found = held(whole, skips, worlds=(1, 4), meshes=(None, over("tp", 4)))
    assert found.status == 1
    assert (
        "1 key recorded by most ranks of B and not by all, such as x, not by rank 2" in found.notes
    )
    assert (
        held(whole, skips, worlds=(1, 4), meshes=(None, over("tp", 4)), ignore_missing=True).status
        == 0
    )


def test_stages_of_a_pipeline_skip_nothing(held):
    def stage(rank):
        tap("x", X, dims="t h d", layer=rank)

    def whole(rank):
        for layer in range(2):
            tap("x", X, dims="t h d", layer=layer)

    mesh = (None, lambda rank: {"pp": (rank, 2)})
    assert held(whole, stage, worlds=(1, 2), meshes=mesh).status == 0


def test_all_replicas_with_the_same_wrong_bytes_are_named(held):
    wrong = X.clone()
    wrong[:, 0] += 1
    found = held(
        heads(X, 2),
        lambda rank: tap("q", wrong.chunk(2, 1)[rank % 2], dims="t h[tp] d"),
        worlds=(2, 4),
        meshes=(over("tp", 2), lambda rank: {"cp": (rank // 2, 2), "tp": (rank % 2, 2)}),
    )
    assert only(found)["ranks_differ"] == [0, 2]


def test_a_size_without_padding_on_one_side_cuts_the_other(held):
    p = torch.arange(8.0)
    p[7] = 99
    plain, sized = (lambda rank, d=dims: tap("l", p, dims=d) for dims in ("v", "v # v=7"))
    for a, b in ((plain, sized), (sized, plain)):
        row = only(held(a, b))
        assert (row["outcome"], row["shape_a"]) == ("equal", [7])


def test_other_zeros_are_found_without_a_mask_of_places(held, monkeypatch):
    monkeypatch.setattr("replayer.diffing.work.SEGMENT", 100)
    zeros = torch.zeros(6, 8, 16)
    y = zeros.clone()
    y[2, 4, 1] = -0.0
    found = held(heads(zeros, 2), heads(y, 4), worlds=(2, 4), meshes=(over("tp", 2), over("tp", 4)))
    assert (only(found)["rank"], only(found)["ranks_differ"]) == (2, [2])


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
PACKED = [getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name)]


@pytest.mark.parametrize("manifest_only", [False, True])
@pytest.mark.parametrize("dtype", [*FLOAT8, *PACKED], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_bytes_against_what_they_may_mean_are_an_error_of_that_pair(
    held, dtype, swapped, manifest_only
):
    """Packed experts and 8-bit caches: one side has the dtype, the other uint8."""
    raw = torch.arange(40, 48, dtype=torch.uint8)
    sides = [raw.view(dtype), raw + 1]

    def job(value, norm):
        def tapped(rank):
            tap("norm", norm)
            tap("w", value)

        return tapped

    a, b = reversed(sides) if swapped else sides
    found = held(job(a, X), job(b, X + 1), manifest_only=manifest_only)
    outcomes = dict(found.pairs.select("name", "outcome").iter_rows())
    if manifest_only:
        assert outcomes["w"] == "unmeasured"
    else:
        assert outcomes == {"norm": "differs", "w": "error"}
        (message,) = found.pairs.filter(name="w")["message"]
        assert "one may hold the other's bytes" in message and "x.view(torch.uint8)" in message
    assert found.status == 1


def test_a_failure_that_nobody_foresaw_is_its_pair_s_row(held, monkeypatch):
    def broken(a, b, **options):
        if a.numel() == 3:
            raise RuntimeError("no kernel\nfor this")
        return measure(a, b, **options)

    monkeypatch.setattr(work, "measure", broken)
    found = held(each([X, X[0, 0, :3]]), each([X + 1, X[0, 0, :3] + 1]))
    assert found.pairs["outcome"].to_list() == ["differs", "error"]
    assert found.pairs["message"][1] == "not compared: RuntimeError: no kernel for this"
    assert found.status == 1


@pytest.mark.parametrize("how", [{}, {"manifest_only": True}])
@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.full((4, 2), float("nan")), "only NaN or infinities"),
        (torch.full((4, 2), complex("nan")), "only NaN or infinities"),
        (torch.full((4, 2), float("-inf")), "only NaN or infinities"),
        (torch.tensor([float("nan"), float("inf")]), "only NaN or infinities"),
        (float("nan"), "only NaN or infinities"),
        ([float("nan"), float("-inf")], "only NaN or infinities"),
        (torch.ones(0, 3), "no element"),
    ],
    ids=["nan", "complex", "infinite", "both", "value", "values", "empty"],
)
def test_green_over_nothing_is_said_and_is_not_green(held, value, what, how):
    found = held(each([value, value]), each([value, value]), **how)
    assert found.counts()["equal"] == 2 and found.status == 1
    first = "v i=0 step=0 rank=0" if isinstance(value, torch.Tensor) else "v i=0 (value) step=0"
    said = f"no number was compared in 2 pairs: {what} in 2, the first {first}"
    assert any(line.startswith(said) for line in lines(found))
    beside = held(each([value, X]), each([value, X]), **how)
    assert beside.status == 0 and beside.over_nothing["tags"].to_list() == ['{"i":0}']
    said = f"no number was compared in 1 pair: {what} in 1, the first {first}"
    assert any(line.startswith(said) for line in lines(beside))


def test_nan_of_two_dtypes_is_nothing_and_some_numbers_beside_nan_are_something(held):
    nan = torch.full((3,), float("nan"))
    assert held(each([nan]), each([nan.bfloat16()])).status == 1
    some = torch.tensor([float("nan"), 1.0])
    for value in (some, "text", "NaN", [], [float("nan"), 1.0]):
        found = held(each([value]), each([value]))
        assert found.status == 0 and found.over_nothing.is_empty()


def test_ranks_of_which_some_hold_nothing_hold_something(recorded, tmp_path):
    def job(rank):
        tap("h", torch.ones(2 * (1 - rank), 3), dims="t[dp] h")

    meshes = lambda rank: {"dp": (rank, 2)}  # noqa: E731
    runs = [recorded(tmp_path / name, job, 2, meshes).path for name in "AB"]
    found = diff(*runs)
    assert found.over_nothing.is_empty() and found.status == 0
