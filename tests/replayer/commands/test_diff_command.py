"""`graft diff` as it is typed: what it prints, where, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from typed import graft

from recorder import Recorder, declare_mesh, step, tap
from replayer import diff


def make(folder: Path, world: int, fault: float = 0.0, steps: int = 2) -> Path:
    """Record a tensor-parallel job of three layers, with a fault in layer 1."""
    noise = torch.Generator().manual_seed(0)
    whole = torch.randn(steps, 3, 4, 8, 2, generator=noise)
    for rank in range(world):
        declare_mesh(tp=(rank, world))
        with Recorder(folder, rank=rank, world_size=world):
            for s in range(steps):
                for layer in range(3):
                    q = whole[s, layer] * (1 + fault * (layer == 1))
                    tap("attn_q", q.chunk(world, 1)[rank], dims="s h[tp] d", layer=layer)
                    tap("hidden", q.sum((1, 2)), dims="s", layer=layer)
                step()
    declare_mesh()
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "A": make(folder / "A", 4),
        "same": make(folder / "same", 2),
        "fault": make(folder / "fault", 2, 0.5),
    }


def test_equal_recordings_of_other_layouts_end_with_0(runs):
    done = graft("diff", runs["A"], runs["same"], "--filter", 'name == "attn_q"')
    assert done.exit_code == 0, done.output
    assert "6 pairs: 6 equal bit for bit" in done.stdout
    assert "no divergence beyond tolerance" in done.stdout


def test_a_fault_is_named_by_lines_that_start_with_first_divergence(runs):
    done = graft("diff", runs["A"], runs["fault"])
    assert done.exit_code == 1
    firsts = [line for line in done.stdout.splitlines() if line.startswith("first divergence")]
    assert len(firsts) == 2
    assert all("attn_q layer=1 step=0 rank=" in line for line in firsts)
    assert done.stderr == ""


def test_the_first_divergence_is_marked_in_the_table_and_on_top_of_it(runs):
    done = graft("diff", runs["A"], runs["fault"])
    table = done.stdout.split("\n\n")[1].splitlines()
    assert table[0].split()[:4] == ["tap", "step", "rank", "outcome"]
    assert table[1].startswith("first attn_q layer=1")


@pytest.mark.parametrize("width", [80, 60])
def test_the_table_fits_the_terminal(runs, width, monkeypatch):
    monkeypatch.setattr("replayer.commands.diff.terminal_width", lambda: width)
    done = graft("diff", runs["A"], runs["fault"])
    table = done.stdout.split("\n\n")[1].splitlines()
    assert max(map(len, table)) <= width
    assert "rel_diff" in table[0] and "outcome" in table[0]


def test_json_is_an_object_a_line_and_nothing_else(runs):
    done = graft("diff", runs["A"], runs["fault"], "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1 and len(rows) == 12
    assert {row["outcome"] for row in rows} == {"equal", "differs"}
    (first,) = [row for row in rows if row["first"]]
    assert first["name"] == "attn_q" and first["tags"] == {"layer": 1} and first["step"] == 0


def test_the_table_is_written_as_parquet(runs, tmp_path):
    graft("diff", runs["A"], runs["fault"], "--parquet", tmp_path / "d.parquet")
    table = pl.read_parquet(tmp_path / "d.parquet")
    assert table.equals(diff(runs["A"], runs["fault"]).table)
    assert [path.name for path in tmp_path.iterdir()] == ["d.parquet"]


def test_the_page_is_written_whole(runs, tmp_path):
    page = tmp_path / "d.html"
    done = graft("diff", runs["A"], runs["fault"], "--by", "h", "--html", page)
    assert done.exit_code == 1
    text = page.read_text()
    assert text.startswith("<!") and text.rstrip().endswith("</html>")
    assert "first divergence bitwise: attn_q layer=1" in text
    assert "d.html" in {path.name for path in tmp_path.iterdir()}


def test_by_a_dim_says_which_indices_are_the_worst(runs):
    done = graft("diff", runs["A"], runs["fault"], "--by", "h", "--filter", 'name == "attn_q"')
    assert "along h, 8 of 8 beyond tolerance: " in done.stdout


def test_a_limit_says_how_many_more_there_are(runs):
    done = graft("diff", runs["A"], runs["fault"], "--limit", 1)
    assert "... and 3 more pairs, not equal; see --limit" in done.stdout


def test_thresholds_decide_on_the_status(runs):
    words = ("diff", runs["A"], runs["fault"], "--threshold")
    assert graft(*words, "rel_diff < 0.5").exit_code == 0
    assert graft(*words, "attn_*: rel_diff < 0.5").exit_code == 1


def test_nothing_matched_is_said_and_ends_with_1(runs):
    done = graft("diff", runs["A"], runs["same"], "--step-offset", 7)
    assert done.exit_code == 1
    assert "nothing matched: A has steps 0 to 1, B has 7 to 8" in done.stderr


def test_two_names_for_one_tap_can_be_brought_together(tmp_path):
    for name, tapped in (("A", "h.0.attn"), ("B", "layers.0.self_attn")):
        with Recorder(tmp_path / name):
            tap(tapped, torch.ones(2))
    words = ("diff", tmp_path / "A", tmp_path / "B")
    assert graft(*words).exit_code == 1
    renamed = graft(*words, "--rename", "h.{layer}.attn=layers.{layer}.self_attn")
    assert renamed.exit_code == 0, renamed.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is not a recording"),
        (["A", "--filter", "layer <"], "not a Python expression"),
        (["A", "--match-on", ""], "names an empty tag"),
        (["A", "--rename", "x"], "should be A's name for it, =, and B's"),
        (["A", "--threshold", "layer < 3"], "speaks of no measure"),
        (["A", "--rtol", "-1"], "--rtol is -1"),
        (["A", "--floor", "nowhere"], "nowhere is not a recording"),
        (["A", "--html", "no/such/folder/d.html"], "is not a folder"),
        (["A", "--parquet", "/"], "is a folder"),
        (["A", "--memory", "much"], "much"),
        (["A", "--workers", "0"], "0"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_2(runs, words, said):
    words = [runs["A"] if word == "A" else word for word in words]
    done = graft("diff", runs["A"], *words)
    assert done.exit_code == 2 and said in done.stderr
    assert "Traceback" not in done.output and not done.stdout


@pytest.mark.slow
def test_ranks_of_a_torchrun_share_the_work_and_give_the_same_table(shell, runs, tmp_path):
    shell.write("numpy.py", "raise ModuleNotFoundError('numpy')")  # which is no dependency
    words = ("diff", runs["A"], runs["fault"], "--by", "h", "--parquet")
    alone = shell(shell.graft, words, "alone.parquet")
    many = shell(shell.torchrun(2, "-m", "replayer.cli"), words, "many.parquet")
    assert alone.returncode == many.returncode == 1, many.stderr
    assert alone.stdout == many.stdout
    tables = [pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("alone", "many")]
    assert tables[0].equals(tables[1])
