"""Recording sessions: folders that are taken, threads, forks, restarts, failing disks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import sys
import threading
import time

import pytest
import torch

from recorder import Recorder, Recording, declare_mesh, step, tap
from recorder.commands import outcome
from recorder.errors import LayoutError, NoSuchRecord, RecordingExists, UsageError
from recorder.format import claims, disk
from recorder.format import shard as shard_module
from recorder.session import from_environment
from recorder.settings import RecordSettings
from recorder.taps.sessions import activate
from recorder.writing import claim
from replayer import Replayer, diff


def one(rank=0):
    tap("x", torch.full((3,), float(rank)))


def test_a_second_recording_into_the_same_place_is_refused_unless_told_otherwise(record, run):
    record(one)
    with pytest.raises(RecordingExists, match="replace it with --overwrite"), Recorder(run):
        pass
    assert Recording.open(run).load(0, "x").sum() == 0
    with Recorder(run, overwrite=True):
        one(7)
    assert Recording.open(run).load(0, "x")[0] == 7


def test_another_world_is_refused(record, run):
    record(one, 2)
    with (
        pytest.raises(RecordingExists, match="of a world of 2, this job has 4"),
        Recorder(run, rank=3, world_size=4),
    ):
        pass


def test_overwriting_with_fewer_ranks_leaves_none_of_the_old(record, run):
    record(one, 4)
    record(lambda rank: one(rank + 10), 2, overwrite=True)
    back = Recording.open(run)
    assert back.world_size == 2 and back.ranks == [0, 1]
    assert back.load(1, "x")[0] == 11


def test_overwriting_removes_nothing_that_is_not_a_recording_s(record, run):
    record(one)
    (run / "notes.txt").write_text("mine")
    record(one, overwrite=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in run.iterdir()) == ["notes.txt", "rank-00000", "recording.json"]


def test_a_recorder_is_used_once(run):
    recorder = Recorder(run)
    with recorder:
        pass
    with pytest.raises(UsageError, match="was used before"), recorder:
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "all"}, "level is 'all'; choose one of tensors, stats, digests"),
        ({"max_bytes": "many"}, "'many' is not a size"),
        ({"filter": "layer <"}, "not a Python expression"),
        ({"rank": 1}, "rank and world_size go together"),
        ({"rank": 2, "world_size": 2}, "rank 2 of a world of 2"),
    ],
)
def test_options_are_checked_by_explicit_errors(run, options, message):
    with pytest.raises(UsageError, match=message):
        Recorder(run, **options)
    assert not run.exists()


def test_an_empty_recording_is_one_too(record, capsys):
    run = record(lambda rank: tap("attn_out", torch.ones(1), layer=0), filter="layr == 0")
    assert run.manifest().height == 0 and run.world_size == 1
    assert "no tap carried the tag 'layr', closest: layer" in capsys.readouterr().err


def test_a_filter_can_read_step_rank_and_kind(record):
    def job(rank):
        for _ in range(3):
            w = torch.ones(2, requires_grad=True)
            tap("x", w * 2)
            tap("w", w, grad=True)
            (w * 3).sum().backward()
            step()

    run = record(job, 2, filter='(step == 1 and rank == 1 and name == "x") or kind == "grad"')
    assert run.rows().select("rank", "step", "name", "kind").rows() == [
        (0, 0, "w", "grad"),
        (0, 1, "w", "grad"),
        (0, 2, "w", "grad"),
        (1, 0, "w", "grad"),
        (1, 1, "x", "tensor"),
        (1, 1, "w", "grad"),
        (1, 2, "w", "grad"),
    ]


def test_taps_from_several_threads_lose_and_mix_nothing(record):
    def worker(thread):
        for i in range(100):
            tap("own", torch.full((50,), thread * 1000 + i), thread=thread, i=i)
            tap("shared", torch.full((5,), 1))

    def job(rank):
        threads = [threading.Thread(target=worker, args=(t,)) for t in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    run = record(job, staging=8 << 10)
    rows = run.rows()
    assert rows.height == 1600 and rows["seq"].to_list() == list(range(1600))
    shared = rows.filter(rows["name"] == "shared")
    assert sorted(shared["occurrence"].to_list()) == list(range(800))
    for thread in range(8):
        for i in (0, 50, 99):
            back = run.load(0, "own", thread=thread, i=i)
            assert torch.equal(back, torch.full((50,), thread * 1000 + i))


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_does_not_touch_its_parent_s_recording(record, capfd):
    def child():
        for _ in range(5):
            tap("from_child", torch.zeros(1000))
            step()

    def job(rank):
        tap("before", torch.ones(2))
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(30)
        assert process.exitcode == 0
        tap("after", torch.ones(2) * 2)

    run = record(job)
    assert run.rows()["name"].to_list() == ["before", "after"]
    assert run.rows()["step"].to_list() == [0, 0]
    assert run.load(0, "after")[0] == 2
    err = capfd.readouterr().err
    assert err.count("was forked from a process that already taps") == 1


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_data_loader_s_workers_do_not_either(record):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            tap("in_worker", torch.zeros(3), i=i)
            return torch.tensor(i)

    def job(rank):
        loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
        for batch in loader:
            tap("batch", batch)

    run = record(job)
    assert run.rows()["name"].to_list() == ["batch"] * 4
    assert [run.load(0, "batch", occurrence=i).item() for i in range(4)] == [0, 1, 2, 3]


def test_a_restart_adds_an_attempt_and_the_recording_says_which_is_which(run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-run")
    for attempt in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with Recorder(run):
            tap("x", torch.full((3,), float(attempt)))
    back = Recording.open(run)
    assert back.manifest()["attempt"].to_list() == [0, 1, 2]
    assert [c["attempt"] for c in back.claims()] == [0, 1, 2]
    assert [back.load(0, "x", attempt=a)[0].item() for a in range(3)] == [0, 1, 2]
    assert back.load(0, "x")[0] == 2  # the latest, unless told otherwise
    again = "of this job .* recorded as rank 0 already; give this process a GRAFT_RANK"
    with pytest.raises(RecordingExists, match=again), Recorder(run):
        pass  # the same attempt again is another process


def test_a_close_beside_a_tap_that_notes_its_mesh_is_not_undone(run, monkeypatch):
    """As on SIGTERM, which closes from a thread, where the disk is slow."""
    real = disk.replace
    closing = []

    def slow(path, data, *args, **kwargs):
        if path.name.startswith("attempt-") and b"meshes" in bytes(data) and not closing:
            closing.append(threading.Thread(target=recorder.close))
            closing[0].start()
            time.sleep(0.3)
        return real(path, data, *args, **kwargs)

    monkeypatch.setattr(disk, "replace", slow)
    declare_mesh(tp=(0, 1))
    recorder = Recorder(run)
    with recorder:
        tap("x", torch.ones(4), dims="a[tp]")
        closing[0].join()
    declare_mesh()
    back = Recording.open(run)
    assert [c["state"] for c in back.claims()] == ["complete"]
    assert back.load(0, "x").sum() == 4


def test_a_second_recorder_of_one_process_is_told_so(run, capsys):
    said = "another session of this very process; close"
    with Recorder(run):
        tap("x", torch.ones(3))
        with pytest.raises(RecordingExists, match=said), Recorder(run):
            pass
        with Recorder(run, overwrite=True) as second:
            tap("x", torch.ones(3), i=1)
        assert said in second.reason and said in capsys.readouterr().err
    assert Recording.open(run).rows().height == 2


@pytest.mark.processes
def test_what_a_live_job_records_is_not_replaced(run, tmp_path):
    """Two `graft record --overwrite` on one folder: the second is refused, the first is whole."""
    go = tmp_path / "go"
    job = (
        "import sys, time, pathlib, torch; from recorder import tap; tap('x', torch.ones(3))\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)\n"
        "tap('y', torch.ones(3))"
    )
    first: list[outcome.Outcome] = []
    words = [sys.executable, "-c", job]
    settings = RecordSettings(overwrite=True)
    thread = threading.Thread(target=lambda: first.append(outcome.recorded(run, settings, words)))
    thread.start()
    while not run.exists() or not claims.is_live(run):
        time.sleep(0.01)
    tapping = "import torch; from recorder import tap; tap('z', torch.ones(3))"
    second = outcome.recorded(run, settings, [sys.executable, "-c", tapping])
    go.touch()
    thread.join()
    assert second.status == 3 and "by pid" in second.problems[0]
    assert "wait until it ends" in second.problems[0]
    assert first[0].status == 0
    assert Recording.open(run).rows()["name"].to_list() == ["x", "y"]


@pytest.mark.processes
def test_whose_records_were_replaced_is_told_so(run, tmp_path):
    """The first job's rank has closed while its wrapper still runs; another job overwrites."""
    go = tmp_path / "go"
    job = (
        "import time, pathlib, torch; from recorder import Recorder, tap\n"
        f"with Recorder({str(run)!r}, overwrite=True): tap('x', torch.ones(3))\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)\n"
    )
    first: list[outcome.Outcome] = []
    words = [sys.executable, "-c", job]
    settings = RecordSettings(overwrite=True)
    thread = threading.Thread(target=lambda: first.append(outcome.recorded(run, settings, words)))
    thread.start()
    while not run.exists() or not claims.claimed_ranks(run) or claims.is_live(run):
        time.sleep(0.01)
    tapping = "import torch; from recorder import tap; tap('z', torch.ones(3))"
    second = outcome.recorded(run, settings, [sys.executable, "-c", tapping])
    go.touch()
    thread.join()
    assert second.status == 0 and Recording.open(run).rows()["name"].to_list() == ["z"]
    assert first[0].status == 3 and "another job replaced its records" in first[0].problems[0]


@pytest.mark.processes
@pytest.mark.slow
def test_a_child_of_a_tapping_parent_is_told_whose_rank_it_has(run):
    """A server that taps a prompt, and then spawns the engine, which has the same rank."""
    engine = "import torch; from recorder import tap; tap('hidden', torch.ones(4))"
    serve = (
        "import subprocess, sys, torch; from recorder import tap; tap('prompt', torch.ones(3)); "
        f"sys.exit(subprocess.run([sys.executable, '-c', {engine!r}]).returncode)"
    )
    for overwrite in (False, True):
        command = [sys.executable, "-c", serve]
        done = outcome.recorded(run, RecordSettings(overwrite=overwrite), command)
        assert done.status == 3
        (problem,) = done.problems
        assert "of this job" in problem and "records as rank 0 already" in problem
        assert "give this process a GRAFT_RANK" in problem and "--overwrite" not in problem


def test_a_restart_of_another_job_is_refused(record, run, monkeypatch):
    record(one)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(RecordingExists, match="by another job"), Recorder(run):
        pass


def test_a_full_disk_ends_the_recording_not_the_job(run, capsys, monkeypatch):
    real = os.pwritev
    full = threading.Event()

    def pwritev(*args):
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(shard_module.os, "pwritev", pwritev)
    recorder = Recorder(run)
    with recorder:
        tap("x", torch.ones(3), i=0)
        while Recording.open(run).rows().height < 1:  # written: this much must survive
            pass
        full.set()
        for i in range(1, 5):
            assert tap("x", torch.full((3,), float(i)), i=i) is not None
    assert recorder.state == "failed" and "No space left on device" in recorder.reason
    back = Recording.open(run)
    assert back.claims()[0]["state"] == "failed"
    assert torch.equal(back.load(0, "x", i=0), torch.ones(3))
    assert "recording ended early, the job goes on: writing failed" in capsys.readouterr().err


def test_a_rank_that_proves_different_is_said_not_guessed_over(run, capsys, monkeypatch):
    from recorder import ranks

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    recorder = Recorder(run)
    with recorder:
        tap("x", torch.ones(1))
        group = ranks.Rank(3, 4, "torch.distributed")
        monkeypatch.setattr(ranks, "from_group", lambda: group)
        tap("y", torch.ones(1))
    assert recorder.state == "failed"
    assert "worked as rank 0 of 4" in capsys.readouterr().err
    assert Recording.open(run).rows()["name"].to_list() == ["x"]


def test_a_group_that_comes_up_before_the_first_tap_gives_the_rank(run, monkeypatch):
    from recorder import ranks

    with Recorder(run):
        group = ranks.Rank(1, 4, "torch.distributed")
        monkeypatch.setattr(ranks, "from_group", lambda: group)
        tap("x", torch.ones(1))
    assert Recording.open(run).ranks == [1] and Recording.open(run).world_size == 4


def test_overwriting_replaces_what_this_very_job_left(run, monkeypatch):
    monkeypatch.setenv("GRAFT_JOB", "one")
    for fill in (1, 2):
        with Recorder(run, overwrite=True):
            one(fill)
    assert Recording.open(run).load(0, "x")[0] == 2


def test_the_latest_attempt_counts_even_where_it_recorded_nothing(run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-run")
    for rank in range(4):
        with Recorder(run, rank=rank, world_size=4):
            one(rank)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # back with two ranks, one of them idle
    with Recorder(run, rank=0, world_size=2):
        one(10)
    with Recorder(run, rank=1, world_size=2):
        pass
    back = Recording.open(run)
    assert back.world_size == 2
    assert back.latest().select("rank", "attempt").rows() == [(0, 1)]
    assert back.rows().height == 5


def test_a_reader_that_looks_while_it_closes_sees_a_whole_recording(tmp_path):
    failures, done = [], threading.Event()

    def read():
        while not done.is_set():
            for path in tmp_path.glob("*/recording.json"):
                try:
                    Recording.open(path.parent).rows()
                except Exception as err:
                    failures.append(err)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for k in range(15):
            with Recorder(tmp_path / str(k)):
                for i in range(30):
                    tap("x", torch.full((3,), float(i)), i=i)
    finally:
        done.set()
        reader.join(30)
    assert failures == []


def test_equal_payloads_do_not_count_twice_against_max_bytes(record):
    t = torch.ones(1 << 18)

    def job(rank):
        for i in range(4):
            tap("x", t, i=i)

    run = record(job, max_bytes=(1 << 20) + 100, staging=1 << 20)  # in pieces
    assert run.rows().height == 4 and run.claims()[0]["state"] == "complete"


def test_overwriting_never_takes_what_a_live_process_writes_nor_its_own_job_s(run, monkeypatch):
    monkeypatch.setenv("GRAFT_JOB", "one")
    monkeypatch.setenv("GRAFT_RECORD", str(run))
    monkeypatch.setenv("GRAFT_RECORD_OVERWRITE", "1")
    with Recorder(run):
        one(1)
        (helper,) = from_environment(os.environ)  # a second process of the job, as rank 0 again
        activate(helper)
        one(2)
        helper.close()
        assert helper.state == "refused"
    assert Recording.open(run).rows().height == 2
    (later,) = from_environment(os.environ)
    activate(later)
    one(3)
    later.close()
    assert later.state == "refused" and Recording.open(run).rows().height == 2


def test_an_uncounted_restart_by_the_same_agent_is_the_next_attempt(run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-run")  # the number of nodes has changed
    for fill in (0, 1):
        with Recorder(run):
            one(fill)
        monkeypatch.setattr(claim, "is_alive", lambda c: False)
    back = Recording.open(run)
    assert back.manifest()["attempt"].to_list() == [0, 1]
    assert back.load(0, "x", attempt=0)[0] == 0 and back.load(0, "x")[0] == 1


def test_attempts_of_a_restarted_job_are_never_put_together(run, monkeypatch, tmp_path):
    """Rank 1 dies before its first tap of attempt 1: what it holds is of attempt 0."""

    def attempt(folder, number, ranks):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-run")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        for rank in ranks:
            declare_mesh(tp=(rank, 2))
            with Recorder(folder, rank=rank, world_size=2):
                tap("x", torch.full((2,), 10.0 * number + rank), dims="h[tp]")
        declare_mesh()

    attempt(run, 0, (0, 1))
    attempt(run, 1, (0,))
    back = Recording.open(run)
    assert back.latest().select("rank", "attempt").rows() == [(0, 1)]
    with pytest.raises(LayoutError, match="recorded none|not all of its blocks were recorded"):
        back.load_logical("x")
    assert back.load_logical("x", attempt=0).tolist() == [0, 0, 1, 1]
    assert back.load(1, "x", attempt=0).tolist() == [1, 1]
    with pytest.raises(NoSuchRecord):
        back.load(1, "x")
    ((rank, state, _, reason),) = back.incomplete()
    assert (rank, state) == (1, "missing") and reason == (
        "had no tap since the job restarted: its records are of attempt 0, those of others of 1"
    )
    target = torch.zeros(4)
    with Replayer(run) as replay:
        tap("x", target, dims="h")
    assert replay.log()["outcome"].to_list() == ["error"] and not target.any()
    attempt(tmp_path / "whole", 0, (0, 1))
    assert diff(run, tmp_path / "whole").status == 1
    attempt(run, 1, (1,))  # it came late, and is there now
    assert Recording.open(run).load_logical("x").tolist() == [10, 10, 11, 11]
    for path in run.glob("rank-*/attempt-*.json"):  # as an earlier version wrote them
        facts = json.loads(path.read_text())
        del facts["restarts"]
        path.write_text(json.dumps(facts))
    assert Recording.open(run).load_logical("x").tolist() == [10, 10, 11, 11]
