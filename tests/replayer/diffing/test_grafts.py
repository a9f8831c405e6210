"""What a diff says of a recording that a replay made, whose taps it overwrote."""

from __future__ import annotations

import pytest
import torch
from layered import job

from recorder import Recorder, tap
from recorder.tags import label
from replayer import Replayer, diff
from replayer.showing.beside import beside, lines_beside, print_beside, status_of
from replayer.showing.lines import lines, print_diff

WRONG = {("up", 2): lambda x: 2 * x}
TWO = {**WRONG, ("down", 3): lambda x: x + 1}


@pytest.fixture
def runs(tmp_path):
    """Record the right job, and replay a wrong one with some taps grafted; return both folders."""

    def runs(faults, filter, steps=1, **options):
        with Recorder(tmp_path / "base"):
            job(steps=steps)()
        with Replayer(
            tmp_path / "base", filter=filter, out=tmp_path / "out", record="True", **options
        ):
            job(faults, steps=steps)()
        return tmp_path / "base", tmp_path / "out"

    return runs


def said(found, start):
    (line,) = [line for line in lines(found) if line.startswith(start)]
    return line


def test_the_grafted_tap_is_no_divergence_and_the_segment_is_named(runs):
    base, out = runs(WRONG, 'name == "up" and layer == 2')
    found = diff(base, out)
    assert found.pairs.filter("grafted")["tags"].to_list() == ['{"layer":2}']
    assert found.first("tolerance") is None and found.first("bitwise") is None
    assert found.first("grafted")["name"] == "up" and found.status == 0
    assert said(found, "no divergence beyond").endswith("beyond tolerance but at what was grafted")
    assert "B is 2.0000 x A" in said(found, "at a grafted tap, as it was before")
    assert said(found, "nothing beyond tolerance after the graft") == (
        "nothing beyond tolerance after the graft: what is wrong lies between down layer=1 and "
        "up layer=2"
    )


def test_a_second_fault_is_told_from_the_first(runs):
    found = diff(*runs(TWO, 'name == "up" and layer == 2'))
    assert found.first("tolerance")["tags"] == '{"layer":3}'
    assert "first down layer=3 step=0" in said(found, "after the graft, still beyond tolerance")


def test_a_fault_before_the_graft_is_the_first_divergence(runs):
    found = diff(*runs(TWO, 'name == "down" and layer == 3'))
    assert said(found, "first divergence beyond tolerance: up layer=2 step=0")
    assert not [line for line in lines(found) if "after the graft" in line]


def test_several_grafts_are_all_in_question(runs):
    found = diff(*runs(TWO, "layer in (2, 3)"))
    line = said(found, "nothing beyond tolerance after the graft")
    assert line.endswith("up layer=2, or before another of the 2 that were grafted")


def test_a_graft_that_changed_nothing_is_said(runs):
    found = diff(*runs({}, "layer == 1"))
    assert said(found, "2 grafted pairs: within tolerance before the graft too")
    assert found.status == 0


def test_steps_and_other_tags_are_followed(runs):
    base, out = runs(WRONG, 'name == "up" and layer == 2 and step == 1', steps=3)
    found = diff(base, out)
    assert found.pairs.filter("grafted").select("step", "name").rows() == [(1, "up")]
    by_name = diff(base, out, match_on="name,layer")
    assert by_name.pairs.filter("grafted").select("step", "name").rows() == [(1, "up")]


@pytest.mark.parametrize(("filter", "is_grafted"), [("rank == 1", False), ("True", True)])
def test_blocks_are_grafted_where_all_ranks_are(tmp_path, filter, is_grafted):
    """What another rank computed, and nothing overwrote, is wrong all the same."""
    whole, kept = torch.randn(4, 8), []

    def job(rank, factor):
        kept.append(tap("x", factor * whole.chunk(2, 1)[rank], dims="t h[tp]"))
        kept.append(tap("y", torch.ones(3), dims="t"))

    for rank in range(2):
        with Recorder(tmp_path / "base", rank=rank, world_size=2):
            job(rank, 1)
    for rank in range(2):
        options = {"filter": f'name == "x" and ({filter})', "record": "True"}
        options["out"] = tmp_path / "out"
        with Replayer(tmp_path / "base", rank=rank, world_size=2, **options):
            job(rank, 3)
    found = diff(tmp_path / "base", tmp_path / "out")
    row = found.pairs.row(0, named=True)
    assert (row["how"], row["grafted"]) == ("layout", is_grafted)
    assert row["first"] == ("grafted" if is_grafted else "both")
    assert found.status == (0 if is_grafted else 1)


def test_where_nothing_behind_a_graft_is_compared_it_proves_nothing(runs):
    found = diff(*runs({("down", 4): lambda x: x + 5}, "True"))
    assert found.first("tolerance") is None and found.status == 1


def test_a_recording_without_a_log_has_no_grafts(runs):
    base, out = runs(WRONG, "layer == 2")
    assert not diff(out, base).pairs["grafted"].any()


def test_three_side_by_side(runs, tmp_path, capsys):
    base, out = runs(WRONG, 'name == "up" and layer == 2')
    with Recorder(tmp_path / "target"):
        job(WRONG)()
    before, after = diff(base, tmp_path / "target"), diff(base, out)
    table = beside(before, after)
    assert table.row(0, named=True)["name"] == "up" and table.height == 6 + 1
    assert table["outcome"].to_list() == ["differs"] * 7
    assert table["outcome_after"].to_list() == ["differs"] + ["equal"] * 6
    assert status_of(before, after) == 0 and status_of(before, before) == 1
    told = lines_beside(before, after)
    assert told[0].startswith("target: 12 pairs, 7 beyond tolerance; first divergence beyond")
    assert told[1] == (
        "out: 12 pairs, 1 beyond tolerance; nothing beyond tolerance but at what was grafted"
    )
    print_beside(before, after, 80, 3)
    printed = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert printed[0].split() == ["tap", "step", "target", "out"]
    assert printed[1].endswith("<- grafted") and "4 more taps" in printed[-1]
    assert max(map(len, printed)) <= 80


def test_the_table_goes_on_in_the_order_of_execution_from_the_first_divergence(runs, capsys):
    def noisy(x):
        return x * (1 + 1e-7)

    faults = {("up", 0): noisy, ("down", 2): lambda x: 1.001 * x, ("up", 4): lambda x: 9 * x}
    found = diff(*runs(faults, 'name == "nothing of that name"'))
    names = [(row["name"], row["tags"]) for row in found.from_first().iter_rows(named=True)]
    assert names[:3] == [("up", '{"layer":0}'), ("down", '{"layer":2}'), ("up", '{"layer":3}')]
    assert found.worst().height > len(names)  # those before it that are within tolerance
    print_diff(found, 100, 2)
    by_order = capsys.readouterr().out
    assert "see --limit, and --sort size for the worst" in by_order
    print_diff(found, 100, 20, by_size=True)
    by_size = capsys.readouterr().out.split("\n\n")[1].splitlines()
    worst = [label(row["name"], row["tags"]) for row in found.worst().iter_rows(named=True)]
    assert all(tap in line for tap, line in zip(worst, by_size[1:], strict=False))
