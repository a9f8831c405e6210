"""Diffs of recordings whose rows say which token they are."""

from __future__ import annotations

import pytest
import torch
from tokened import BATCH, LENGTH, TOKENS, batch, randn, server
from typed import graft

from recorder import Recorder, declare_mesh, rows, step, tap, token_rows
from recorder.errors import UsageError
from replayer import diff


def layers(n=3, seed=0):
    return {("h", (("layer", i),)): randn(BATCH, LENGTH, 8, seed=seed + i) for i in range(n)}


def moved(taps, layer, sequence, position, times=1.5):
    """Return taps of which one token is off from a layer on."""
    found = {about: value.clone() for about, value in taps.items()}
    for (_, tags), value in found.items():
        if dict(tags)["layer"] >= layer:
            value[sequence, position] *= times
    return found


def test_a_batch_and_a_server_s_steps_of_the_same_tokens_are_equal(tmp_path):
    batch(tmp_path / "a", layers(), pad=2)
    server(tmp_path / "b", layers())
    for one, other in (("a", "b"), ("b", "a")):
        found = diff(tmp_path / one, tmp_path / other)
        assert found.status == 0
        assert found.counts()["equal"] == 3
        assert found.pairs["how"].to_list() == ["rows"] * 3
        assert found.pairs["rows"].to_list() == [BATCH * LENGTH] * 3
        assert found.pairs.select("rows_a", "rows_b").unique().rows() == [(0, 0)]


def test_rounding_in_another_batch_is_within_tolerance(tmp_path):
    batch(tmp_path / "a", layers())
    server(tmp_path / "b", {about: value * (1 + 1e-7) for about, value in layers().items()})
    found = diff(tmp_path / "a", tmp_path / "b")
    assert (found.status, found.counts()["close"]) == (0, 3)


@pytest.mark.parametrize("position", [0, 4, LENGTH - 1])
def test_the_first_token_that_is_off_is_named_with_its_places_on_both_sides(tmp_path, position):
    batch(tmp_path / "a", layers())
    server(tmp_path / "b", moved(layers(), 1, 2, position))
    row = diff(tmp_path / "a", tmp_path / "b").first("tolerance")
    assert (row["name"], row["tags"]) == ("h", '{"layer":1}')
    assert (row["position"], row["token"]) == (position, int(TOKENS[2, position]))
    assert row["at_a"] == [0, 0, 2 * LENGTH + position]
    assert row["at_b"][:2] == [position // 3, 0]
    printed = graft("diff", tmp_path / "a", tmp_path / "b")
    assert printed.exit_code == 1
    assert (
        f"first divergence beyond tolerance: h layer=1 token {row['token']} at position {position} "
        f"(step=0 rank=0 row {2 * LENGTH + position} in A, step={position // 3} rank=0 row "
    ) in printed.stdout


def test_the_earliest_position_comes_first_whatever_the_order_of_rows(tmp_path):
    taps = layers(1)
    wrong = {about: value.clone() for about, value in taps.items()}
    for sequence, position in ((0, 7), (3, 2), (1, 5)):
        wrong[("h", (("layer", 0),))][sequence, position] += 1
    batch(tmp_path / "a", taps)
    server(tmp_path / "b", wrong)
    row = diff(tmp_path / "b", tmp_path / "a").first("tolerance")
    assert (row["position"], row["token"]) == (2, int(TOKENS[3, 2]))


def test_by_names_each_row_that_is_off_with_its_places(tmp_path):
    batch(tmp_path / "a", layers(1))
    server(tmp_path / "b", moved(moved(layers(1), 0, 1, 3), 0, 2, 8))
    table = diff(tmp_path / "a", tmp_path / "b", by="t").table
    off = table.filter((table["by"] == "t") & (table["outcome"] == "differs"))
    assert sorted(zip(off["position"], off["token"], strict=True)) == [
        (3, int(TOKENS[1, 3])),
        (8, int(TOKENS[2, 8])),
    ]
    assert sorted(at[2] for at in off["at_a"]) == [LENGTH + 3, 2 * LENGTH + 8]
    assert all(at is not None for at in off["at_b"])


def test_ids_that_are_no_tokens_name_a_row_by_its_id(tmp_path):
    value = randn(4, 3)
    for path, factor in ((tmp_path / "a", 1.0), (tmp_path / "b", 2.0)):
        with Recorder(path):
            tap("h", value * factor, dims="t x", rows={"t": [4, 9, 2, 7]})
    row = diff(tmp_path / "a", tmp_path / "b").first("tolerance")
    assert (row["row"], row["position"]) == ([4], None)
    assert "h the row with the id 4 (" in graft("diff", tmp_path / "a", tmp_path / "b").stdout


def test_rows_on_one_side_alone_are_counted_and_beyond_a_share_a_difference(tmp_path):
    batch(tmp_path / "a", layers(1))
    server(tmp_path / "b", layers(1), drop=(0,))
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.status == 0
    assert found.pairs.select("rows", "rows_a", "rows_b").rows() == [(28, 12, 0)]
    found = diff(tmp_path / "a", tmp_path / "b", missing_rows=0.2)
    assert found.status == 1
    assert found.pairs["apart"].to_list() == ["rows"]
    assert "12 of 40 rows of A are not in B" in found.pairs["message"][0]
    assert diff(tmp_path / "a", tmp_path / "b", missing_rows=0.2, ignore_missing=True).status == 0
    server(tmp_path / "c", layers(1), drop=(0, 1, 2))
    assert diff(tmp_path / "a", tmp_path / "c").status == 0
    printed = graft("diff", tmp_path / "a", tmp_path / "c", "--missing-rows", 0.9)
    assert printed.exit_code == 0
    printed = graft("diff", tmp_path / "a", tmp_path / "c", "--missing-rows", 0.5)
    assert printed.exit_code == 1
    assert "rows on one side alone: 1 pair, the first h layer=0" in printed.stdout
    with pytest.raises(UsageError, match="--missing-rows is 1.5; give a share from 0 to 1"):
        diff(tmp_path / "a", tmp_path / "b", missing_rows=1.5)


def test_other_tokens_or_another_salt_have_no_row_in_common(tmp_path):
    batch(tmp_path / "a", layers(1))
    server(tmp_path / "b", layers(1), salt="adapter")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.status == 1
    assert found.pairs["outcome"].to_list() == ["error"]
    assert found.pairs["message"][0] == (
        "no row in common: A has 40 and B 40; are these other tokens, or ids with another salt?"
    )


def test_a_row_that_one_side_computed_twice_and_otherwise_is_said(tmp_path):
    value = randn(3, 4)
    with Recorder(tmp_path / "a"):
        for factor in (1.0, 2.0):
            tap("h", value * factor, dims="t x", rows={"t": [1, 2, 3]})
            step()
    with Recorder(tmp_path / "b"):
        tap("h", value, dims="t x", rows={"t": [3, 2, 1]})
    with Recorder(tmp_path / "c"):
        tap("h", value.flip(0), dims="t x", rows={"t": [3, 2, 1]})
    found = diff(tmp_path / "a", tmp_path / "c")
    assert (found.status, found.pairs["apart"].to_list()) == (1, ["replicas"])
    assert found.pairs["message"][0].startswith(
        "within A, a row of h was recorded at step=0 rank=0 row 0 and at step=1 rank=0 row 0"
    )
    assert diff(tmp_path / "b", tmp_path / "c").status == 1  # of another order, under the same ids
    found = diff(tmp_path / "a", tmp_path / "c", match_on="name,step")
    assert found.counts()["equal"] == 1 and found.counts()["only_a"] == 1


def test_other_dims_are_put_together_over_ranks_and_orders(tmp_path):
    value = randn(6, 4, 8)
    for rank in range(4):
        tp, cp = rank % 2, rank // 2
        with Recorder(tmp_path / "a", rank=rank, world_size=4):
            declare_mesh(tp=(tp, 2), cp=(cp, 2))
            own = [[0, 1, 5], [2, 3, 4]][cp]
            part = value[own][:, 2 * tp : 2 * tp + 2].contiguous()
            tap("q", part, dims="t[cp] g[tp] d", rows={"t": own})
    declare_mesh()
    with Recorder(tmp_path / "b"):
        tap("q", value.permute(2, 0, 1).contiguous(), dims="d t g", rows={"t": list(range(6))})
    for one, other in (("a", "b"), ("b", "a")):
        found = diff(tmp_path / one, tmp_path / other)
        assert (found.status, found.counts()["equal"]) == (0, 1)
    off = value.clone()
    off[4, 3, 2] += 1
    with Recorder(tmp_path / "c"):
        tap("q", off, dims="t g d", rows={"t": list(range(6))})
    row = diff(tmp_path / "a", tmp_path / "c").first("tolerance")
    assert row["row"] == [4] and row["at_a"][1] in (2, 3)


def test_rows_along_two_dims_are_compared_cell_by_cell(tmp_path):
    value = randn(4, 5)
    with Recorder(tmp_path / "a"):
        tap("s", value, dims="q k", rows={"q": [1, 2, 3, 4], "k": [10, 20, 30, 40, 50]})
    order_q, order_k = [2, 0, 3, 1], [4, 1, 0, 2, 3]
    other = value[order_q][:, order_k]
    with Recorder(tmp_path / "b"):
        ids = {"q": [i + 1 for i in order_q], "k": [10 * (i + 1) for i in order_k]}
        tap("s", other, dims="q k", rows=ids)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert (found.status, found.pairs["rows"].to_list()) == (0, [20])
    other = other.clone()
    other[1, 1] += 1
    with Recorder(tmp_path / "c"):
        tap("s", other, dims="q k", rows=ids)
    assert diff(tmp_path / "a", tmp_path / "c").status == 1


def test_pairs_of_more_than_the_memory_come_in_pieces(tmp_path):
    batch(tmp_path / "a", layers(1))
    server(tmp_path / "b", moved(layers(1), 0, 3, 9))
    found = diff(tmp_path / "a", tmp_path / "b", memory=1_000)
    assert found.status == 1
    assert sum(found.pairs["numel"]) == BATCH * LENGTH * 8
    assert "rows 1 to 15 of 40" in found.pairs["message"][0]
    assert found.first("tolerance")["position"] == 9


def test_without_tensors_only_recordings_alike_are_equal(tmp_path):
    batch(tmp_path / "a", layers(1))
    batch(tmp_path / "b", layers(1))
    server(tmp_path / "c", layers(1))
    assert diff(tmp_path / "a", tmp_path / "b", manifest_only=True).status == 0
    assert diff(tmp_path / "a", tmp_path / "c", manifest_only=True).counts()["error"] == 1


def test_one_side_without_ids_is_compared_by_keys(tmp_path):
    value = randn(3, 4)
    with Recorder(tmp_path / "a"):
        tap("h", value, dims="t x")
    with Recorder(tmp_path / "b"), rows(t=[1, 2, 3]):
        tap("h", value, dims="t x")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert (found.status, found.pairs["how"].to_list()) == (0, ["layout"])


def test_gradients_meet_by_the_rows_of_their_tensor(tmp_path):
    weight = randn(4)
    for path, order in ((tmp_path / "a", [0, 1, 2]), (tmp_path / "b", [2, 0, 1])):
        x = randn(3, 4)[order].requires_grad_()
        with Recorder(path), rows(t=[10 + i for i in order]):
            h = tap("h", x * weight, dims="t x", grad=True)
            (h * h * torch.tensor(order)[:, None]).sum().backward()
    found = diff(tmp_path / "a", tmp_path / "b")
    assert (found.status, found.counts()["equal"]) == (0, 2)
    assert sorted(found.pairs["kind"]) == ["grad", "tensor"]


def test_rows_that_both_sides_computed_twice_and_otherwise_alike_are_said(tmp_path):
    for path in (tmp_path / "a", tmp_path / "b"):
        with Recorder(path):
            for more in (0, 1):
                tap("h", randn(3, 4) + more, dims="t x", rows={"t": [1, 2, 3]})
                step()
    found = diff(tmp_path / "a", tmp_path / "b")
    assert (found.status, found.pairs["outcome"].to_list()) == (1, ["equal"])
    assert found.pairs["apart"].to_list() == ["replicas"]
    assert found.pairs["rows"].to_list() == [3]


def test_a_filter_by_step_leaves_records_out_before_rows_are_compared(tmp_path):
    for path, order in ((tmp_path / "a", (0, 1)), (tmp_path / "b", (1, 0))):
        with Recorder(path):
            for i in order:
                tap("h", randn(2, 4, seed=i), dims="t x", rows={"t": [2 * i, 2 * i + 1]})
                step()
    assert diff(tmp_path / "a", tmp_path / "b").pairs["rows"].to_list() == [4]
    found = diff(tmp_path / "a", tmp_path / "b", filter="step == 1")
    assert found.pairs["outcome"].to_list() == ["error"]
    assert found.pairs["message"][0].startswith("no row in common: A has 2 and B 2")


def test_padding_alone_is_nothing_to_compare(tmp_path):
    for path in (tmp_path / "a", tmp_path / "b"):
        with Recorder(path):
            tap("h", randn(3, 4), dims="t x", rows={"t": [-1, -1, -1]})
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.status == 1
    assert found.pairs["message"].to_list() == ["all of its rows are padding, on both sides"]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[1], [2]], "A's rows are told apart by 2 numbers each, and B's by 1; give both the same"),
        ({"e": [1, 2], "f": [1, 2]}, "A has rows along t, and B along e and f; call those that"),
        ([1, 2], "B: some records of h have rows along t and others along e"),
    ],
)
def test_what_is_wrong_with_ids_is_said_of_a_and_b(tmp_path, ids, said):
    with Recorder(tmp_path / "a"):
        tap("h", randn(2, 2), dims="t e", rows={"t": [[1, 2], [3, 4]]})
    with Recorder(tmp_path / "b"):
        if isinstance(ids, dict):
            tap("h", randn(2, 2), dims="e f", rows=ids)
        else:
            tap("h", randn(2, 2), dims="t e", rows={"t": ids})
            if ids == [1, 2]:
                tap("h", randn(2, 2), dims="t e", rows={"t": ids, "e": ids})
    message = diff(tmp_path / "a", tmp_path / "b").pairs["message"][0]
    assert said in message and "baseline" not in message and "target" not in message


def test_a_dim_along_which_one_side_alone_has_ids_is_told(tmp_path):
    for path, ids in (
        (tmp_path / "a", {"t": [1, 2], "e": [5, 6]}),
        (tmp_path / "b", {"t": [2, 1]}),
    ):
        with Recorder(path):
            tap("h", randn(2, 2), dims="t e", rows=ids)
    for one, other, said in (("a", "b", "A"), ("b", "a", "B")):
        message = diff(tmp_path / one, tmp_path / other).pairs["message"][0]
        assert f"{said} says which row is which along e, and " in message


def test_order_says_nothing_of_rows(tmp_path):
    batch(tmp_path / "a", layers())
    server(tmp_path / "b", layers())
    with pytest.raises(UsageError, match="--match-on order pairs taps by their place, whatever"):
        diff(tmp_path / "a", tmp_path / "b", match_on="order")


def test_the_terminal_says_that_rows_are_on_one_side_alone(tmp_path):
    batch(tmp_path / "a", layers(2))
    server(tmp_path / "b", layers(2), drop=(0,))
    assert (
        "rows on one side alone in 2 pairs, not compared, the most at h layer=0: over 28 rows in "
        "common, 12 only in A"
    ) in graft("diff", tmp_path / "a", tmp_path / "b").stdout


def test_ids_that_were_written_to_are_not_said_to_be_the_tokens_they_were(tmp_path):
    ids = token_rows(torch.tensor([101, 102, 103]))
    ids.copy_(ids.flip(0))
    for path, off in ((tmp_path / "a", 0), (tmp_path / "b", 1)):
        with Recorder(path):
            tap("h", randn(3, 4) + off, dims="t x", rows={"t": ids})
    row = diff(tmp_path / "a", tmp_path / "b").first("tolerance")
    assert (row["row"], row["token"]) == ([int(ids[0])], None)
