"""Rows never wait for figures: a statistics thread that is slow, or stopped for good."""

from __future__ import annotations

import os
import shutil
import threading

import polars as pl
import pytest
import torch

from recorder import Recorder, Recording, filling, step, tap
from recorder.format import disk
from recorder.format.schema import STATISTICS
from recorder.format.tables import add_to_parquet
from recorder.verify import Checker
from recorder.writing import staging as staging_module
from recorder.writing import store as store_module
from recorder.writing import summaries as summaries_module
from recorder.writing import writer as writer_module
from recorder.writing.staging import Staging
from replayer import diff

MIB = 1 << 20


@pytest.fixture
def gate(monkeypatch):
    """Let no statistics be gathered until told to."""
    gate = threading.Event()
    real, many = summaries_module.Statistics.add, summaries_module.of_many

    def add(self, raw):
        if threading.current_thread().name == "graft-statistics":  # not verify's
            gate.wait(60)
        real(self, raw)

    def of_many(*args):
        gate.wait(60)
        return many(*args)

    monkeypatch.setattr(summaries_module.Statistics, "add", add)
    monkeypatch.setattr(summaries_module, "of_many", of_many)
    yield gate
    gate.set()


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(store_module, "_ROWS_A_SHARD", 16)


def wait_for(condition):
    tick = threading.Event()
    for _ in range(2000):
        if condition():
            return
        tick.wait(0.005)
    raise AssertionError("it never came to that")


def counts(run):
    return Recording.open(run).rows().height if run.exists() else 0


def test_no_row_waits_for_a_statistics_thread_that_is_stopped_for_good(
    run, gate, small_parts, monkeypatch, capsys
):
    monkeypatch.setattr(writer_module, "_FIGURES_SECONDS", 0.1)
    staged = 4 * MIB  # of which the 200 taps take 12: the room of what waits for figures is taken
    with Recorder(run, staging=staged) as recorder:
        for i in range(200):
            tap("x", torch.full((16 << 10,), float(i)), i=i)
            if i % 20 == 19:
                step()
        wait_for(lambda: recorder._writer.rows_written == 200)
        open_still = Recording.open(run)
        assert open_still.rows().height == 200
        assert open_still.load(0, "x", step=9, i=199)[0] == 199
        assert len(list(run.rglob("*.parquet"))) >= 12  # parts are sealed meanwhile
        assert recorder.progress().dropped == 0
    back = Recording.open(run)
    assert back.claims()[0]["state"] == "complete" and back.claims()[0]["rows"] == 200
    rows = back.rows()
    assert rows.height == 200 and all(rows[name].null_count() == 200 for name in STATISTICS)
    gate.set()  # it would stop those who fill in too
    (report,) = Checker(run).ranks()
    assert (report.filled, report.unfilled, report.problems) == (200, 0, [])
    means = Recording.open(run).rows().sort("seq")["mean"]
    assert means.to_list() == [float(i) for i in range(200)]
    err = capsys.readouterr().err
    assert "200 records without statistics, which were not gathered in time; graft verify" in err


@pytest.mark.parametrize("keep_last", [None, 2])
def test_figures_that_come_late_are_put_where_their_rows_are_sealed(
    run, gate, small_parts, keep_last, capsys
):
    with Recorder(run, keep_last=keep_last, staging=64 * MIB) as recorder:
        for i in range(100):
            tap("x", torch.full((100,), float(i)), i=i)
            if i % 10 == 9:
                step()
        wait_for(lambda: run.exists() and Recording.open(run).rows()["seq"].max() == 99)
        assert Recording.open(run).rows()["mean"].null_count() >= 1
        gate.set()
        wait_for(lambda: not Recording.open(run).rows()["mean"].null_count())
        assert recorder.state == "running"
    rows = Recording.open(run).rows().sort("seq")
    assert rows.height == (20 if keep_last else 100)
    for name in ("mean", "min", "max"):
        assert rows[name].to_list() == [float(i) for i in range(100)][-rows.height :]
    assert all(not rank.problems for rank in Checker(run).ranks())
    assert "without statistics" not in capsys.readouterr().err


def test_a_manifest_that_is_replaced_while_it_is_read_is_read_again(run, monkeypatch):
    """Its parts may be gathered from two files else: polars opens what it reads more than once."""
    with Recorder(run):
        for i in range(3):
            tap("x", torch.full((100,), float(i)), i=i)
    (path,) = run.rglob("*.parquet")
    real, read = pl.read_parquet, []

    def replaced(*args, **options):
        frame = real(*args, **options)
        read.append(frame)
        if len(read) < 3:
            frame.with_columns(mean=pl.lit(float(len(read)))).write_parquet(path)
        if len(read) == 1:
            raise pl.exceptions.ComputeError("some of this file and some of that")
        return frame

    monkeypatch.setattr(pl, "read_parquet", replaced)
    assert Recording.open(run).rows()["mean"].to_list() == [2.0, 2.0, 2.0]
    assert len(read) == 3


@pytest.mark.parametrize("fsync", ["off", "shard", "step"])
@pytest.mark.parametrize("keep_last", [None, 2])
def test_what_takes_the_place_of_what_is_on_the_device_is_there_first(
    run, gate, small_parts, monkeypatch, fsync, keep_last
):
    synced, placed = set(), {}

    class Watched:
        def __getattr__(self, name):
            return getattr(os, name)

        def open(self, *given):
            file = os.open(*given)
            synced.discard(os.fstat(file).st_ino)  # the number of one that is gone
            return file

        def fsync(self, file):
            synced.add(os.fstat(file).st_ino)
            os.fsync(file)

        def replace(self, old, new):
            if str(new).endswith(".parquet"):
                placed.setdefault(new.name, []).append(old.stat().st_ino in synced)
            old.replace(new)

    monkeypatch.setattr(disk, "os", Watched())
    with Recorder(run, fsync=fsync, keep_last=keep_last, staging=64 * MIB):
        for i in range(96):
            tap("x", torch.full((100,), float(i)), i=i)
            if i % 12 == 11:
                step()
        wait_for(lambda: run.exists() and Recording.open(run).rows()["seq"].max() == 95)
        gate.set()
    assert max(map(len, placed.values())) > 1  # some were replaced
    assert {is_there for each in placed.values() for is_there in each} == {fsync != "off"}


def test_a_killed_job_leaves_rows_whose_figures_had_not_come(run, gate, small_parts, tmp_path):
    with Recorder(run) as recorder:
        for i in range(40):
            tap("x", torch.full((100,), float(i)), i=i)
        wait_for(lambda: recorder._writer.rows_written == 40)
        killed = tmp_path / "killed"
        shutil.copytree(run, killed)
        gate.set()
    back = Recording.open(killed)
    assert back.rows().height == 40 and back.load(0, "x", i=39)[0] == 39
    assert back.rows()["mean"].null_count() == 40
    assert Recording.open(run).rows()["mean"].null_count() == 0
    found = diff(killed, run)
    assert set(found.pairs["outcome"]) == {"equal"}


def test_what_is_unknown_of_one_side_does_not_decide_a_diff(
    run, gate, small_parts, tmp_path, monkeypatch
):
    monkeypatch.setattr(writer_module, "_FIGURES_SECONDS", 0.05)
    for path, factor in ((run, 1.0), (tmp_path / "other", 1.5)):
        with Recorder(path):
            for i in range(20):
                tap("x", torch.full((100,), factor * i), i=i)
        gate.set()  # the second has them
    pairs = diff(run, tmp_path / "other").pairs
    assert pairs.filter(pl.col("outcome") == "differs").height == 19  # all but the zeros


def test_a_disk_that_refuses_late_figures_costs_these_alone(run, gate, small_parts, monkeypatch):
    with Recorder(run) as recorder:
        for i in range(40):
            tap("x", torch.full((100,), float(i)), i=i)
        wait_for(lambda: recorder._writer.rows_written == 40)

        def refuse(*args, **how):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(store_module, "add_to_parquet", refuse)
        gate.set()
    back = Recording.open(run)
    assert back.claims()[0]["state"] == "complete"
    assert back.rows().height == 40 and back.rows()["mean"].null_count() == 32


def test_the_statistics_of_stats_alone_are_waited_for(run, gate, small_parts):
    threading.Timer(0.6, gate.set).start()
    with Recorder(run, level="stats", staging=4 * MIB):
        for i in range(100):
            tap("x", torch.full((64 << 10,), float(i)), i=i)
    rows = Recording.open(run).rows()
    assert rows.height == 100 and rows["mean"].null_count() == 0


def test_room_that_is_lent_is_taken_back_in_order_and_only_when_it_is_needed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(staging_module.time, "monotonic", lambda: now[0])
    staging = Staging(1024, patience=1.0)

    def put(nbytes=256):
        part = staging.put(torch.zeros(nbytes, dtype=torch.uint8), 1, hold=False)
        if part is not None:
            part.payload = part
        return part

    def taken():
        return [part.is_taken_back for part in parts]

    parts = [put() for _ in range(4)]
    staging.lend(parts)
    staging.release(parts[:3])
    assert put(128) is None and not any(taken())  # there is patience still
    now[0] = 2.0
    assert put(128) is not None and taken() == [True, False, False, False]
    staging.give_back(parts[:2])  # one that was taken already, and one that was not
    assert put(128) is not None and taken() == [True, False, False, False]
    now[0] = 4.0
    assert put(512) is None  # the last is not released
    assert taken() == [True, False, True, False]


def test_figures_are_added_to_rows_that_have_none_and_to_no_others(run, record):
    from recorder.format.schema import COLUMNS

    record(lambda rank: [tap("x", torch.full((3,), float(i)), i=i) for i in range(3)])
    (path,) = run.rglob("*.parquet")
    frame = pl.read_parquet(path)
    bare = frame.with_columns(mean=pl.when(pl.col("seq") == 1).then(None).otherwise(pl.col("mean")))
    bare.write_parquet(path)
    rows = [{"seq": seq, "mean": 7.0} for seq in (0, 1, 99)]
    add_to_parquet(path, rows, COLUMNS, STATISTICS)
    assert pl.read_parquet(path)["mean"].to_list() == [0.0, 7.0, 2.0]
    add_to_parquet(path.with_name("gone.parquet"), rows, COLUMNS, STATISTICS)
    assert not path.with_name("gone.parquet").exists()


class TestWhatVerifyFillsIn:
    @pytest.fixture
    def bare(self, run, gate, small_parts, monkeypatch):
        """Make a recording whose statistics never came."""
        monkeypatch.setattr(writer_module, "_FIGURES_SECONDS", 0.05)

        def made(**settings):
            with Recorder(run, **settings):
                for i, value in enumerate(values()):
                    tap("x", value, i=i)
                tap("n", 3)
            gate.set()
            return run

        return made

    def test_what_is_missing_is_what_was_recorded_and_nothing_else(self, bare, tmp_path):
        run = bare()
        before = Recording.open(run).rows().sort("seq")
        assert before["nan_count"].null_count() == before.height
        (report,) = Checker(run).ranks()
        assert (report.filled, report.unfilled, report.problems) == (before.height - 1, 0, [])
        with Recorder(tmp_path / "other"):
            for i, value in enumerate(values()):
                tap("x", value, i=i)
            tap("n", 3)
        rows, other = (
            Recording.open(path).rows().sort("seq") for path in (run, tmp_path / "other")
        )
        assert rows.select(STATISTICS).equals(other.select(STATISTICS))
        others = [name for name in rows.columns if name not in STATISTICS]
        assert rows.select(others).equals(before.select(others))
        (again,) = Checker(run).ranks()
        assert (again.filled, again.unfilled, again.problems) == (0, 0, [])

    def test_large_payloads_are_taken_in_piece_by_piece(self, run, gate, monkeypatch):
        monkeypatch.setattr(writer_module, "_FIGURES_SECONDS", 0.05)
        value = torch.randn(3 * MIB + 5, dtype=torch.float64)
        with Recorder(run):
            tap("x", value)
        gate.set()
        (report,) = Checker(run).ranks()
        assert report.filled == 1
        row = Recording.open(run).rows().row(0, named=True)
        assert row["mean"] == pytest.approx(value.mean().item(), rel=1e-12, abs=1e-15)
        assert row["max"] == value.max().item()

    def test_equal_bytes_have_the_statistics_of_each_dtype_they_were_tapped_as(
        self, run, gate, monkeypatch, tmp_path
    ):
        """They are stored once: what they mean is each record's own."""
        monkeypatch.setattr(writer_module, "_FIGURES_SECONDS", 0.05)
        raw = torch.randn(64, generator=torch.Generator().manual_seed(0)).view(torch.uint8)
        dtypes = [
            *(torch.uint8, torch.int8, torch.int16, torch.int64, torch.float32, torch.bfloat16),
            *(torch.float64, torch.complex64, torch.float8_e5m2, torch.bool),
        ]

        def job():
            for i, dtype in enumerate(dtypes):
                tap("x", (raw & 1 if dtype is torch.bool else raw).view(dtype), i=i)
                tap("two", torch.zeros(8, dtype=torch.uint8).view(dtype), i=i)

        with Recorder(run):
            job()
        gate.set()
        (report,) = Checker(run).ranks()
        assert report.filled == 2 * len(dtypes) and not report.problems
        with Recorder(tmp_path / "other"):
            job()
        rows, others = (
            Recording.open(path).rows().sort("seq") for path in (run, tmp_path / "other")
        )
        assert rows["tensor"].n_unique() == 3
        assert rows.select("seq", *STATISTICS).equals(others.select("seq", *STATISTICS))

    @pytest.mark.parametrize("level", ["digests", "stats"])
    def test_what_nobody_asked_for_or_nothing_is_left_of_stays_so(self, bare, level):
        (report,) = Checker(bare(level=level)).ranks()
        assert (report.filled, report.unfilled, report.problems) == (0, 0, [])

    def test_a_damaged_record_has_none_and_the_others_have(self, bare):
        run = bare()
        (shard, *_) = sorted(run.rglob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        (report,) = Checker(run).ranks()
        assert report.damaged and report.filled
        rows = Recording.open(run).rows()
        assert rows["nan_count"].null_count() == 1 + report.damaged

    def test_what_cannot_be_written_is_said(self, bare, monkeypatch):
        run = bare()

        def refuse(*args, **how):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(filling, "add_to_parquet", refuse)
        (report,) = Checker(run).ranks()
        assert report.filled == 0 and report.unfilled and not report.problems
        assert report.why == "Read-only file system"

    def test_those_of_a_recording_that_goes_on_are_left_and_that_is_said(self, run, gate):
        with Recorder(run) as recorder:
            for i in range(3):
                tap("x", torch.full((100,), float(i)), i=i)
            wait_for(lambda: recorder._writer.rows_written == 3)
            (open_still,) = Checker(run).ranks()
            assert open_still.unfilled == 3 and "still being recorded" in open_still.why
            gate.set()

    def test_the_command_says_what_it_did(self, bare, shell):
        run = bare()
        shown = shell(shell.graft, "show", run)
        assert "20 records of these without statistics, which were not gathered" in shown.stderr
        assert "of these" not in shell(shell.graft, "show", run, "--filter", "i > 99").stderr
        said = shell(shell.graft, "verify", run)
        assert said.returncode == 0 and "statistics of 20 records filled in" in said.stdout
        assert "filled in" not in shell(shell.graft, "verify", run).stdout
        assert "of these" not in shell(shell.graft, "show", run, "--json").stderr


def values():
    g = torch.Generator().manual_seed(0)
    for i in range(20):
        value = torch.randn(50 + i, generator=g).to(
            [torch.float32, torch.bfloat16, torch.int16, torch.float64][i % 4]
        )
        if i == 4:
            value[0] = float("nan")
        yield value if i != 7 else value[:0]


def test_where_no_core_is_free_a_job_that_is_held_waits_for_no_statistics(run, monkeypatch, capsys):
    monkeypatch.setattr(writer_module, "_cores", lambda: 2)
    with Recorder(run, staging=16 * MIB):
        for i in range(64):
            tap("x", torch.full((MIB // 2,), float(i)), i=i)
    missing = Recording.open(run).rows()["nan_count"].null_count()
    assert missing and f"{missing} records without statistics" in capsys.readouterr().err
    (report,) = Checker(run).ranks()
    assert report.filled == missing and not report.problems
    assert Recording.open(run).rows().sort("seq")["mean"].to_list() == [float(i) for i in range(64)]
