"""What `graft diff` writes: whole or not at all, where it was told, never over a recording."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import polars as pl
import pytest
import torch
import typed

from recorder import tap


@pytest.fixture(scope="module")
def runs(recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        recorded(folder / name, lambda rank, t=t: tap("x", t)).path
        for name, t in (("A", torch.ones(3)), ("B", torch.zeros(3)))
    ]


@pytest.fixture
def graft(runs):
    """Run `graft diff` of the two recordings, whose tensors differ, in this process."""

    def graft(*words: object):
        return typed.graft("diff", *runs, *words)

    return graft


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_link_is_followed_and_stays_a_link(graft, tmp_path):
    real, link = tmp_path / "real.html", tmp_path / "link.html"
    real.write_text("old")
    link.symlink_to(real)
    assert graft("--html", link).exit_code == 1
    assert link.is_symlink() and link.resolve() == real
    assert real.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "real.html"]


@pytest.mark.parametrize("name", ["d.html", "rank-00000/d.html", "recording.json"])
@pytest.mark.parametrize("option", ["--html", "--parquet"])
def test_a_file_inside_a_recording_is_refused_and_the_recording_stays_whole(
    graft, runs, option, name
):
    before = contents(runs[0])
    done = graft(option, runs[0] / name)
    assert done.exit_code == 2
    assert f"{runs[0] / name} is inside a recording; name a file elsewhere" in done.stderr
    assert contents(runs[0]) == before


def test_a_link_into_a_recording_is_refused(graft, runs, tmp_path):
    (tmp_path / "folder").symlink_to(runs[0])
    (tmp_path / "file").symlink_to(runs[0] / "recording.json")
    before = contents(runs[0])
    for path in (tmp_path / "folder" / "d.html", tmp_path / "file"):
        done = graft("--html", path)
        assert done.exit_code == 2 and "is inside a recording" in done.stderr
    assert contents(runs[0]) == before


def test_one_file_for_two_outputs_is_refused_by_whatever_name(graft, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "d")
    for other in (tmp_path / "d", tmp_path / ".." / tmp_path.name / "d", tmp_path / "link"):
        done = graft("--html", tmp_path / "d", "--parquet", other)
        assert done.exit_code == 2
        assert "is named twice; give each output a file of its own" in done.stderr
    assert not (tmp_path / "d").exists()


def test_a_pipe_is_written_through_and_stays_a_pipe(graft, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    assert graft("--html", pipe).exit_code == 1
    reader.join(30)
    assert got and got[0].startswith("<!DOCTYPE html>") and got[0].rstrip().endswith("</html>")
    assert pipe.is_fifo()


@pytest.mark.parametrize("option", ["--html", "--parquet"])
def test_the_null_device_stays_a_device(graft, option):
    assert graft(option, os.devnull).exit_code == 1
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(graft, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        graft("--html", tmp_path / "d.html", "--parquet", tmp_path / "d.parquet")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [mode] * 2


def test_a_file_that_is_there_is_replaced_by_a_whole_one(graft, tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"old")
    graft("--parquet", tmp_path / "d.parquet")
    assert pl.read_parquet(tmp_path / "d.parquet")["outcome"].to_list() == ["differs"]
    assert [path.name for path in tmp_path.iterdir()] == ["d.parquet"]


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@full
def test_a_page_for_a_full_device_is_one_sentence_and_status_2(graft):
    done = graft("--html", "/dev/full")
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert "cannot be written: No space left on device; make room, or choose" in done.stderr


@pytest.mark.processes
@full
def test_output_to_a_full_device_is_one_sentence_and_status_2(runs):
    with Path("/dev/full").open("w") as device:
        done = subprocess.run(
            [sys.executable, "-m", "replayer.cli", "diff", *map(str, runs)],
            stdout=device, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "Error: the output cannot be written: No space left on device; make room, or choose "
        "another place\n"
    )


def test_a_factor_without_a_floor_is_refused(graft):
    done = graft("--floor-factor", "2")
    assert done.exit_code == 2
    assert "--floor-factor needs a noise floor; give --floor A2 too" in done.stderr


@pytest.mark.parametrize("words", [("--workers", "0"), ("--memory", "0"), ("--memory", "0B")])
def test_no_threads_and_no_memory_are_refused(graft, words):
    done = graft(*words)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert "0 is not in the range" in done.stderr or "is not positive" in done.stderr


@pytest.mark.parametrize("by", ["--1", "²"])
def test_by_what_is_no_number_is_said(graft, by):
    done = graft(f"--by={by}")
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert f"--by {by}: no tensor that differs has such a dim" in done.stderr


@full
def test_a_table_for_a_full_device_is_one_sentence_and_status_2(graft):
    done = graft("--parquet", "/dev/full")
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert "/dev/full cannot be written" in done.stderr
