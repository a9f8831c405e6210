"""The writer behind the job: what it does when it is slower, and what it counts."""

from __future__ import annotations

import json
import os
import pty
import queue
import threading
import time

import pytest
import torch

from recorder import Recorder, Recording, progress, step, tap
from recorder.format import disk, shard, tables
from recorder.progress import Progress, Teller
from recorder.verify import Checker
from recorder.writing import store as store_module
from recorder.writing import writer
from recorder.writing.staging import Staging
from recorder.writing.store import Recent

MIB = 1 << 20


@pytest.fixture
def slow_disk(monkeypatch):
    """Let no payload be written until told to."""
    gate = threading.Event()
    real = store_module.Store.add

    def add(self, payload, data, **where):
        gate.wait(30)
        real(self, payload, data, **where)

    monkeypatch.setattr(store_module.Store, "add", add)
    yield gate
    gate.set()


@pytest.mark.thorough
def test_a_job_is_held_while_nothing_more_can_be_staged_and_hears_of_it_once(
    run, slow_disk, capsys
):
    threading.Timer(1.5, slow_disk.set).start()
    with Recorder(run, staging=8 * MIB) as recorder:
        for i in range(12):
            tap("x", torch.full((MIB // 4,), float(i)), i=i)
        assert recorder.progress().held > 0.5
    lines = capsys.readouterr().err.splitlines()
    (err,) = [line for line in lines if "without statistics" not in line]
    assert "the job taps " in err and "/s are written, so what waits fills" in err
    assert "hold the job until there is room" in err and "--when-full drop" in err
    back = Recording.open(run)
    assert [back.load(0, "x", i=i)[0].item() for i in range(12)] == list(range(12))


def test_taps_are_dropped_and_counted_where_that_was_asked_for(run, slow_disk, capsys):
    with Recorder(run, staging=8 * MIB, when_full="drop") as recorder:
        for i in range(12):
            tap("x", torch.full((MIB // 4,), float(i)), i=i)
        dropped = recorder.progress().dropped
        assert 0 < dropped < 12 and recorder.progress().held == 0
        slow_disk.set()
    back = Recording.open(run)
    kept = back.rows()["tags"].to_list()
    assert len(kept) == 12 - dropped
    for i in range(len(kept)):  # the first ones; their keys are as if nothing had been dropped
        assert back.load(0, "x", i=i)[0] == i
    assert back.claims()[0]["dropped"] == dropped
    assert f"{dropped} taps dropped: nothing more could be staged" in capsys.readouterr().err


@pytest.fixture
def stuck_disk(monkeypatch):
    """Let no write of payloads return while this is cleared."""
    gate, real = threading.Event(), disk.write_at
    gate.set()

    def write_at(file, offset, parts):
        gate.wait(30)
        real(file, offset, parts)

    monkeypatch.setattr(disk, "write_at", write_at)
    yield gate
    gate.set()


def settled(recorder):
    while recorder.progress().waiting:
        time.sleep(0.01)


def test_a_step_is_not_held_for_longer_than_asked_for(run, stuck_disk, capsys):
    with Recorder(run, staging=8 * MIB, max_hold="100ms") as recorder:
        stuck_disk.clear()
        for s in range(3):
            for i in range(20):
                tap("x", torch.full((MIB // 4,), float(s * 20 + i)), i=i)
            tap("large", torch.full((4 * MIB,), float(s)))
            tap("v", s)
            step()
        progress = recorder.progress()
        stuck_disk.set()
    assert 0.3 <= progress.held < 5  # else 30 s
    dropped = progress.dropped
    assert recorder.state == "complete" and 0 < dropped < 66
    back = Recording.open(run)
    assert back.claims()[0]["dropped"] == dropped and back.rows().height == 66 - dropped
    assert back.claims()[0]["max_hold"] == 0.1
    for row in back.rows().filter(back.rows()["name"] == "x").iter_rows(named=True):
        i = json.loads(row["tags"])["i"]
        assert (back.read(row) == row["step"] * 20 + i).all()
    assert not any(one.problems for one in Checker(run).ranks())
    err = capsys.readouterr().err
    assert f"{dropped} taps dropped: writing held the job for longer than --max-hold 100ms" in err


def test_a_payload_of_which_only_some_parts_found_room_in_time_is_left_out_whole(run, stuck_disk):
    with Recorder(run, staging=4 * MIB, max_hold=0.1) as recorder:
        tap("before", torch.arange(1000))
        settled(recorder)
        stuck_disk.clear()
        tap("large", torch.arange(8 * MIB))
        assert recorder.progress().waiting and recorder.progress().dropped == 1
        stuck_disk.set()
        settled(recorder)
        step()
        tap("after", torch.arange(500_000))
    back = Recording.open(run)
    assert back.rows()["name"].to_list() == ["before", "after"]
    assert torch.equal(back.load(0, "after", step=1), torch.arange(500_000))
    assert not any(one.problems for one in Checker(run).ranks())


def test_a_step_of_more_than_a_minute_may_be_held_in_each(run, slow_disk):
    with Recorder(run, staging=8 * MIB, max_hold=0.1) as recorder:
        for i in range(12):
            tap("x", torch.full((MIB // 4,), float(i)), i=i)
        held = recorder.progress().held
        tap("x", torch.zeros(MIB // 4))
        assert recorder.progress().held == held >= 0.1
        recorder._writer._refilled -= 61
        tap("x", torch.zeros(MIB // 4))
        assert recorder.progress().held >= held + 0.1
        slow_disk.set()


def test_the_end_of_a_step_does_not_hold_a_job_any_longer_either(run, slow_disk):
    with Recorder(run, staging=8 * MIB, max_hold=0.05, keep_last=2) as recorder:
        for s in range(4):
            for _ in range(12):
                tap("x", torch.full((MIB // 4,), float(s)))
            step()
        assert recorder.progress().held < 5  # else 30 s
        slow_disk.set()
    assert recorder.state == "complete"


@pytest.mark.parametrize("options", [{"keep_last": 2}, {"fsync": "step"}], ids=str)
def test_the_end_of_a_step_does_not_hold_a_job_whose_taps_are_dropped(run, stuck_disk, options):
    """Not even where the staging memory is full to the last byte."""
    with Recorder(run, staging=4 * MIB, when_full="drop", **options) as recorder:
        tap("w", torch.ones(4))
        settled(recorder)
        stuck_disk.clear()
        quarter = recorder._writer._staging.budget // 4
        for s in range(2):
            for i in range(6):
                tap("x", torch.full((quarter,), i, dtype=torch.uint8), s=s, i=i)
            step()
        assert recorder.progress().dropped and recorder.progress().held == 0
        stuck_disk.set()
    assert recorder.state == "complete"


def test_no_limit_to_the_hold_is_needed_where_taps_are_dropped(run, slow_disk, capsys):
    with Recorder(run, staging=8 * MIB, when_full="drop", max_hold=5):
        for i in range(12):
            tap("x", torch.full((MIB // 4,), float(i)), i=i)
        slow_disk.set()
    assert Recording.open(run).claims()[0]["max_hold"] is None
    assert "dropped: nothing more could be staged" in capsys.readouterr().err


def test_a_payload_whose_first_part_is_in_is_never_dropped_half_way(run):
    big = torch.arange(4 * MIB, dtype=torch.int32)
    with Recorder(run, staging=4 * MIB, when_full="drop"):
        tap("big", big)
    assert torch.equal(Recording.open(run).load(0, "big"), big)


@pytest.mark.thorough
def test_rows_alone_hold_the_job_too(run, monkeypatch):
    """A million scalars are few bytes of payload and gigabytes of rows."""
    monkeypatch.setattr("recorder.writing.staging._PARTS", 50)
    most = 0
    with Recorder(run) as recorder:
        for i in range(2000):
            tap("v", i)
            most = max(most, len(recorder._writer._queue))
    assert most <= 50
    assert Recording.open(run).rows().height == 2000


def test_what_cannot_be_used_is_said(run):
    with pytest.raises(Exception, match="when_full is 'wait'; choose one of hold, drop"):
        Recorder(run, when_full="wait")


def test_equal_payloads_of_any_size_are_written_once(run, monkeypatch):
    written = []
    real = os.pwritev
    monkeypatch.setattr(
        "recorder.format.shard.os.pwritev",
        lambda file, parts, at: (
            written.append(sum(p.nbytes for p in parts)) or real(file, parts, at)
        ),
    )
    small, large = torch.randn(1000), torch.randn(MIB)
    with Recorder(run) as recorder:
        tap("s", small)
        tap("l", large)
        while recorder.progress().waiting:
            time.sleep(0.01)
        before = sum(written)
        for i in range(50):
            tap("s", small, i=i)
            tap("l", large, i=i)
        while recorder.progress().waiting:
            time.sleep(0.01)
        assert sum(written) == before == small.nbytes + large.nbytes
    back = Recording.open(run)
    assert back.rows()["shard"].n_unique() == 1 and back.rows()["tensor"].n_unique() == 2
    assert torch.equal(back.load(0, "l", i=49), large)


def test_recent_forgets_the_oldest_and_keeps_what_is_used():
    recent = Recent(10)
    for i in range(100):
        recent.put(i, -i)
        assert recent.get(3) == (-3 if i >= 3 else None)
        assert recent.get(i) == -i
    assert recent.get(20) is None and recent.get(95) == -95


def test_the_staging_ring_hands_out_nothing_twice_from_many_threads():
    staging = Staging(16 << 10)
    queues: list = [queue.SimpleQueue() for _ in range(2)]
    putting = threading.Lock()
    wrong = []

    def put(value):
        for _ in range(300):
            with putting:
                part = staging.put(torch.full((300,), value, dtype=torch.uint8), 2, hold=True)
                part.payload = value
                for line in queues:
                    line.put((part, value))

    def read(line, seen):
        for _ in range(900):
            part, value = line.get()
            if set(staging.view(part)) != {value}:
                wrong.append(value)
            staging.release([part])
            seen.append(value)

    seen: list = [[], []]
    threads = [threading.Thread(target=put, args=(v,)) for v in (1, 2, 3)]
    threads += [threading.Thread(target=read, args=both) for both in zip(queues, seen, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(seen[0]) == len(seen[1]) == 900 and staging.backlog == 0


def test_progress_is_said_ever_more_rarely_and_only_if_there_is_any(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said = []
    teller = Teller(said.append)
    at = []
    for second in range(1, 300):
        now[0] = float(second)
        written = min(second, 200) * 1_000_000
        before = len(said)
        teller.tell(Progress(written + 500_000, 500_000))
        if len(said) > before:
            at.append(second)
    assert at == [1, 3, 7, 15, 31, 63, 123, 183, 243]
    assert said[1] == "3.0 MB recorded, 1.0 MB/s, 500.0 kB waiting"


def test_progress_tells_of_held_jobs_and_dropped_taps():
    said = []
    teller = Teller(said.append)
    teller._wait = 0
    teller.tell(Progress(2000, 1000, dropped=3, held=2.5) + Progress(10, 0, held=1.0))
    assert "1.0 kB waiting, the job was held 2.5 s, 3 taps dropped" in said[0]


@pytest.mark.slow
def test_a_terminal_sees_progress_and_a_file_does_not(shell):
    shell.write(
        "job.py",
        """
        import time, torch
        from recorder import tap, step
        for i in range(30):
            tap("x", torch.randn(1000), i=i)
            step()
            time.sleep(0.1)
        """,
    )
    words = [*shell.graft, "record", "-o", "run", "--overwrite", "--", *shell.python, "job.py"]
    assert "recorded," not in shell(words).stderr
    ours, theirs = pty.openpty()
    import subprocess

    process = subprocess.Popen(words, cwd=shell.folder, env=shell.env, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            got = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not got:
            break
        shown += got
    os.close(ours)
    assert process.wait() == 0
    assert b"[graft] " in shown and b" recorded, " in shown and b"/s, " in shown
    assert b" waiting" in shown


def test_a_step_or_a_value_alone_needs_no_staging(run):
    with Recorder(run, staging=1):
        tap("v", "text")
        step()
        tap("t", torch.arange(1000))
    back = Recording.open(run)
    assert back.value(0, "v") == "text" and torch.equal(back.load(0, "t", 1), torch.arange(1000))


def large_payloads(monkeypatch):
    """Payloads that do not fit the staging memory at once, with equal beginnings."""
    written = []
    real = os.pwritev
    monkeypatch.setattr(
        disk.os, "pwritev", lambda *args: written.append(real(*args)) or written[-1]
    )
    first = torch.arange(1 << 20, dtype=torch.int32)
    other = first.clone()
    other[-1] = 0
    middle = first.clone()
    middle[1 << 19] = 7
    return first, other, middle, written


def test_a_large_payload_that_repeats_is_written_once(run, monkeypatch):
    first, other, middle, written = large_payloads(monkeypatch)
    with Recorder(run, staging="4MiB") as recorder:
        for i, value in enumerate([first, first, other, other, first, middle, middle]):
            tap("x", value, i=i)
    assert recorder.state == "complete"
    assert sum(written) < 3 * first.nbytes + (64 << 10)
    back = Recording.open(run)
    for i, value in enumerate([first, first, other, other, first, middle, middle]):
        assert torch.equal(back.load(rank=0, name="x", i=i), value)
    assert (back.path / "rank-00000" / "a0-00000.safetensors").stat().st_size < 13 << 20


def test_a_burst_of_small_taps_is_not_dropped_while_there_is_memory(run):
    with Recorder(run, when_full="drop") as recorder:
        for i in range(3_000):
            tap("x", float(i), i=i)
    assert recorder.progress().dropped == 0
    assert Recording.open(run).rows().height == 3_000


def test_an_interrupt_in_the_middle_of_a_tap_leaves_the_staging_memory_usable(run, monkeypatch):
    with Recorder(run, staging="4MiB") as recorder:
        tap("x", torch.zeros(100))
        put = Staging.put_bytes

        def interrupted(self, *args, **kwargs):
            put(self, *args, **kwargs)
            raise KeyboardInterrupt

        for i in range(20):
            monkeypatch.setattr(Staging, "put_bytes", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tap("x", torch.zeros(64 << 10), i=i)
            monkeypatch.setattr(Staging, "put_bytes", put)
        for i in range(20):
            tap("y", torch.full((64 << 10,), float(i)), i=i)
    assert recorder.state == "complete"
    back = Recording.open(run)
    for i in range(20):
        assert torch.equal(back.load(rank=0, name="y", i=i), torch.full((64 << 10,), float(i)))


def test_a_close_that_fails_ends_the_recording_as_failed(run, monkeypatch):
    real = os.close

    def failing(file):
        real(file)
        raise OSError(5, "Input/output error")

    recorder = Recorder(run)
    with recorder:
        tap("x", torch.zeros(100))
        time.sleep(0.3)
        monkeypatch.setattr(shard.os, "close", failing)
    assert recorder.state == "failed" and "Input/output error" in recorder.reason
    monkeypatch.undo()
    assert Recording.open(run).rows().height == 1


@pytest.mark.parametrize("steps", [3, 8, 40])
def test_a_ring_makes_room_in_a_limit_of_a_few_steps(run, steps):
    with Recorder(run, keep_last=2, max_bytes=3 * 400_000):
        for s in range(steps):
            tap("x", torch.full((100_000,), float(s)) + torch.arange(100_000))
            step()
    back = Recording.open(run)
    assert back.rows()["step"].to_list() == [steps - 2, steps - 1] and not back.incomplete()


def test_a_ring_that_has_no_room_for_its_steps_says_so(run, capsys):
    with Recorder(run, keep_last=2, max_bytes=2 * 400_000):
        for s in range(4):
            tap("x", torch.full((100_000,), float(s)) + torch.arange(100_000))
            step()
    said = "--max-bytes has no room for --keep-last 2 and a step more at 'x'"
    assert said in capsys.readouterr().err


def test_ctrl_c_that_polars_raises_in_the_writer_s_thread_loses_nothing(run, monkeypatch):
    """It reaches the main thread by Python's own handler."""
    whole, interrupts = tables._write_frame, iter([KeyboardInterrupt(), KeyboardInterrupt()])

    def interrupted(*args, **options):
        for error in interrupts:
            assert threading.current_thread() is not threading.main_thread()
            raise error
        return whole(*args, **options)

    monkeypatch.setattr(tables, "_write_frame", interrupted)
    with Recorder(run) as session:
        for i in range(20):
            tap("h", torch.full((8,), float(i)))
    assert session.state == "complete" and next(interrupts, None) is None
    assert Recording.open(run).rows().height == 20


def test_a_writer_s_thread_that_ends_for_whatever_reason_is_a_recording_that_failed(
    run, monkeypatch
):
    def ended(self):
        raise SystemExit("why not")

    monkeypatch.setattr(writer.Writer, "_flush", ended)
    with Recorder(run) as session:
        tap("h", torch.ones(8))
    assert session.state == "failed" and "SystemExit: why not" in session.reason
