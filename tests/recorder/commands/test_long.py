"""What is too long for a line, or not known, is cut where it is printed, and kept where it is."""

from __future__ import annotations

import json

import polars as pl
import pytest
import torch
from click.testing import CliRunner

from recorder import Recorder, Recording, tap
from recorder.sizes import format_shape
from recorder.tags import label
from replayer.cli import main

LONGEST = 400  # characters of a line


def printed(*words):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


@pytest.fixture
def odd(tmp_path):
    """A recording with long values, names and shapes, and one whose manifest lacks a shape."""
    whole, lacking = tmp_path / "whole", tmp_path / "lacking"
    for run in (whole, lacking):
        with Recorder(run):
            tap("x", torch.ones(3), where="w" * 9_000)
            tap("n" * 9_000, torch.ones([1] * 60))
            tap("text", "s" * 400_000)
            tap("list", list(range(50_000)))
    (part,) = lacking.glob("rank-*/*.parquet")
    shape = pl.when(pl.col("name") == "x").then(None).otherwise("shape")
    rows = pl.read_parquet(part, memory_map=False)  # the file is written anew
    rows.with_columns(shape=shape.cast(pl.List(pl.Int64))).write_parquet(part)
    return whole, lacking


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_no_line_is_long_and_a_shape_that_is_not_known_is_no_end(odd, command):
    for run in odd:
        text = printed(command, run)
        assert max(map(len, text.splitlines())) < LONGEST
    assert "?" in text


def test_no_line_of_a_diff_is_long(odd):
    whole, lacking = odd
    text = printed("diff", whole, lacking)
    assert max(map(len, text.splitlines())) < 3 * LONGEST
    assert "shapes [3] in A and ? in B" in text


def test_what_is_cut_is_kept(odd):
    whole, _ = odd
    assert Recording.open(whole).rows()["name"].str.len_chars().max() == 9_000
    text = json.dumps(json.loads(printed("show", whole, "--json")))
    assert "s" * 400_000 in text and "w" * 9_000 in text


def test_a_tap_that_is_refused_for_its_long_name_is_told_in_short(run, capsys):
    with Recorder(run):
        tap("n" * 60_000, torch.ones(2))
    assert max(map(len, capsys.readouterr().err.splitlines())) < LONGEST


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (None, "?"),
        ([], "[]"),
        ([2, None], "[2, ?]"),
        (list(range(16)), str(list(range(16)))),
        ([1] * 100_000, "[1, 1, 1, ..., 1] (100000 dims)"),
    ],
)
def test_shapes_are_written_in_a_line(shape, text):
    assert format_shape(shape) == text


def test_labels_are_cut_value_by_value():
    assert label("q", {"layer": 3, "where": "x" * 200}) == f"q layer=3 where={'x' * 97}..."
