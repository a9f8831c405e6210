"""A running job that is switched by a file in its folder."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time

import pytest
import torch

from recorder import Filter, Recorder, Recording, step, tap
from recorder.commands.ctl import awaited, order
from recorder.errors import NotARecording, RecordingError
from recorder.format import disk
from recorder.job import Job
from recorder.taps import control, sessions
from recorder.taps.control import FILE, Order
from recorder.verify import Checker
from replayer import Replayer


def one(i=0, name="x"):
    tap(name, torch.full((3,), float(i)), i=i)


def until(holds):
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def until_looked(run):
    """Return once what is there has been seen, and whoever saw it has said what is to be said."""
    watched = control._watched[run]
    until(lambda: watched._seen is not None and not watched._looking.locked())


def switch(run, action, expr=None):
    """Ask for something, and return once this process has seen it."""
    run.mkdir(exist_ok=True)
    done = order(run, action, Filter.coerce(expr))
    until(lambda: control.order_of(run) == done)
    if run in control._watched:
        with control._watched[run]._looking:  # held until the sessions have it too
            pass
    return done


def seen(run):
    rows = Recording.open(run).rows()
    tags = [json.loads(text).get("i") for text in rows["tags"]]
    return list(zip(rows["name"], tags, rows["step"], rows["occurrence"], strict=True))


def test_off_parks_and_on_brings_back(run, capsys):
    with Recorder(run) as recorder:
        one(0)
        switch(run, "off")
        assert sessions.active == () and sessions.parked == (recorder,)
        one(1)
        switch(run, "on")
        assert sessions.parked == ()
        one(2)
        one(3)
        step()
        one(4)
    assert sessions.parked == () and control._watched == {}
    assert seen(run) == [("x", 0, 0, 0), ("x", 2, 0, 0), ("x", 3, 0, 0), ("x", 4, 1, 0)]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "graft ctl switched it in the middle of step 0" in err


def test_what_was_parked_before_its_first_tap_is_recorded_from_the_first_that_is_on(run, capsys):
    switch_before = order_in_empty(run, "off")
    with Recorder(run) as recorder:
        assert sessions.active == () and "is off; switch it on with: graft ctl" in (
            capsys.readouterr().err
        )
        one(0)
        step()
        assert not (run / "recording.json").exists()
        switch(run, "on")
        one(1)
    assert switch_before.is_on is False
    assert recorder.state == "complete" and seen(run) == [("x", 1, 1, 0)]


def order_in_empty(run, *words):
    run.mkdir()
    return order(run, *words)


def test_steps_are_counted_while_it_is_off(run):
    with Recorder(run):
        one(0)
        switch(run, "off")
        for _ in range(3):
            step()
        switch(run, "on")
        one(1)
    assert seen(run) == [("x", 0, 0, 0), ("x", 1, 3, 0)]


def test_a_ring_keeps_its_last_steps_while_it_is_off(run):
    with Recorder(run, keep_last=1):
        for i in range(3):
            one(i)
            step()
        one(3)
        switch(run, "off")
        for _ in range(5):
            step()
    assert [i for _, i, _, _ in seen(run)] == [3]


def test_a_parked_session_is_closed_as_any_other(run):
    recorder = Recorder(run)
    with recorder:
        one(0)
        switch(run, "off")
    assert recorder.state == "complete"
    (claim,) = Recording.open(run).claims()
    assert (claim["state"], claim["rows"], claim["control"]) == ("complete", 1, 1)


def test_another_filter_holds_until_the_own_one_is_asked_for_again(run):
    with Recorder(run, filter='name == "a"'):
        for expr in (None, 'name == "b"', "i == 2", "True", None):
            if expr is not None or control.order_of(run).sequence:
                switch(run, "filter", expr)
            for i in range(3):
                one(i, "a")
                one(i, "b")
            step()
    assert [(name, i, s) for name, i, s, _ in seen(run)] == [
        *[("a", i, 0) for i in range(3)],
        *[("b", i, 1) for i in range(3)],
        ("a", 2, 2),
        ("b", 2, 2),
        *[(name, i, 3) for i in range(3) for name in "ab"],
        *[("a", i, 4) for i in range(3)],
    ]


def test_steps_asked_for_in_quick_succession_all_count(run):
    with Recorder(run):
        one(0)
        for _ in range(7):
            order(run, "step")
        switch(run, "step")
        one(1)
        switch(run, "off")
        switch(run, "step")
        switch(run, "on")
        one(2)
    assert [(i, s) for _, i, s, _ in seen(run)] == [(0, 0), (1, 8), (2, 9)]


def test_steps_asked_for_at_once_by_several_all_count(run):
    run.mkdir()
    threads = [
        threading.Thread(target=lambda: [order(run, "step") for _ in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert control.read(run).steps == 40 and control.read(run).sequence == 40


def test_every_session_of_a_folder_is_switched_and_none_of_another(run, tmp_path):
    other = Recorder(tmp_path / "other", rank=0, world_size=1)
    with (
        Recorder(run, rank=0, world_size=2),
        Recorder(run, rank=1, world_size=2),
        other,
    ):
        one(0)
        done = switch(run, "off")
        assert sessions.active == (other,)
        assert awaited(run, done.sequence).ranks == (0, 1)
        one(1)
        switch(run, "on")
        switch(run, "step")
        one(2)
    assert [(i, s) for _, i, s, _ in seen(run)] == [(0, 0), (2, 1)] * 2
    assert [(i, s) for _, i, s, _ in seen(tmp_path / "other")] == [(0, 0), (1, 0), (2, 0)]


def test_what_was_asked_for_before_holds_for_a_session_that_begins_later(run):
    with Recorder(run, rank=0, world_size=2):
        one(0)
        switch(run, "filter", 'name == "b"')
        switch(run, "step")
        one(1, "a")
        with Recorder(run, rank=1, world_size=2):
            one(1, "a")
            one(2, "b")
    rows = Recording.open(run).rows().select("rank", "name", "step").rows()
    assert rows == [(0, "x", 0), (0, "b", 1), (1, "b", 0)]


def test_without_the_file_nothing_is_asked_for(run):
    with Recorder(run, filter='name == "x"'):
        one(0)
        switch(run, "step")
        switch(run, "filter", "False")
        one(1)
        (run / FILE).unlink()
        until(lambda: control.order_of(run) == Order())
        one(2)
        switch(run, "step")
        one(3)
    assert [(i, s) for _, i, s, _ in seen(run)] == [(0, 0), (2, 1), (3, 2)]


GOOD = json.loads(Order(sequence=9, is_on=False).as_bytes())


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"", "it does not hold JSON"),
        (b"\xff\xfe", "it does not hold JSON"),
        (b"[" * 50_000, "it does not hold JSON"),
        (b"[]", "it does not hold a JSON object"),
        (b" " * 70_000, "it is larger than any such file can be"),
        ({**GOOD, "version": 2}, "its version is 2, expected 1"),
        ({**GOOD, "is_on": 0}, "is_on is 0, expected true or false"),
        ({**GOOD, "steps": -1}, "steps is -1, expected a number from 0 up"),
        ({**GOOD, "steps": 10**6}, "it asks for 1000000 steps at once"),
        ({**GOOD, "steps": True}, "steps is True"),
        ({**GOOD, "sequence": "9"}, "sequence is '9'"),
        ({**GOOD, "filter": "naem =="}, "its filter cannot be used: not a Python expression"),
        ({**GOOD, "filter": "__import__('os')"}, "its filter cannot be used"),
        ({**GOOD, "filter": 3}, "its filter is 3, expected a text or null"),
    ],
)
def test_a_file_that_cannot_be_made_sense_of_is_ignored_and_said_once(run, capsys, data, fact):
    with Recorder(run):
        one(0)
        text = data if isinstance(data, bytes) else json.dumps(data).encode()
        disk.replace(run / FILE, text)
        until_looked(run)
        control._watched[run].look()
        one(1)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"{FILE} is ignored: {fact}" in err
        if fact != "it asks for 1000000 steps at once":
            with pytest.raises(RecordingError, match=r"is damaged: .*; remove it, which asks for"):
                order(run, "on")
        (run / FILE).unlink()
        switch(run, "off")
        one(2)
    assert [i for _, i, _, _ in seen(run)] == [0, 1]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(__file__)])
def test_what_is_no_file_is_ignored_too(run, capsys, make):
    with Recorder(run):
        one(0)
        make(run / FILE)
        until_looked(run)
        one(1)
    assert f"{FILE} is ignored: it " in capsys.readouterr().err
    assert len(seen(run)) == 2


def test_overwriting_begins_with_nothing_asked_for(run, monkeypatch):
    monkeypatch.setenv("GRAFT_JOB", "a")
    with Recorder(run):
        one(0)
        switch(run, "off")
    monkeypatch.setenv("GRAFT_JOB", "b")
    with Recorder(run, overwrite=True):
        one(1)
        assert switch(run, "step").is_on
        one(2)
    assert [(i, s) for _, i, s, _ in seen(run)] == [(1, 0), (2, 1)]


def test_a_restart_of_the_job_begins_with_what_was_asked_for(run, monkeypatch):
    monkeypatch.setenv("GRAFT_JOB", "a")
    monkeypatch.setenv("GRAFT_RECORD", str(run))
    monkeypatch.setenv("GRAFT_RECORD_OVERWRITE", "1")
    with Recorder(run):
        one(0)
        order(run, "off")
    sessions.watch_environment()
    (waiting,) = sessions.parked
    assert sessions.active == () and waiting.overwrites.id == "a"
    sessions.deactivate(waiting)


def test_only_a_folder_that_may_be_recorded_into_is_written(tmp_path):
    with pytest.raises(NotARecording, match="is not a recording: it has no recording"):
        order(tmp_path / "none", "on")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NotARecording):
        order(tmp_path, "on")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_two_changes_that_a_file_s_state_does_not_tell_apart_are_seen(run, monkeypatch):
    with Recorder(run):
        one(0)
        switch(run, "off")
        monkeypatch.setattr(control, "_state", lambda path: control._watched[run]._state)
        switch(run, "on")
        assert sessions.parked == ()


@pytest.mark.filterwarnings("error:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.processes
def test_a_fork_before_the_first_tap_is_one_of_a_process_without_threads(run, shell):
    script = shell.write(
        "job.py",
        """
        import os, sys, threading, time, warnings
        warnings.simplefilter("error")
        from recorder.taps import control, sessions
        def wait(is_on):
            end = time.monotonic() + 30
            while bool(sessions.active) != is_on:
                assert time.monotonic() < end
                time.sleep(0.01)
        assert any(t.name == "graft-control" for t in threading.enumerate())
        child = os.fork()
        os.write(1, b"child\\n" if child == 0 else b"parent\\n")
        wait(False)
        if child:
            assert os.waitpid(child, 0)[1] == 0
        os._exit(0)
        """,
    )
    run.mkdir()
    env = {**shell.env, "GRAFT_RECORD": str(run)}
    words = [*shell.python, script]
    job = subprocess.Popen(words, cwd=shell.folder, env=env, stdout=subprocess.PIPE, text=True)
    with job:
        assert {job.stdout.readline(), job.stdout.readline()} == {"child\n", "parent\n"}
        order(run, "off")
        assert job.wait(60) == 0


JOB = """
    import os, sys, threading, time, torch
    from recorder import tap, step
    step()  # here, where a signal's handler can be set
    print("there", flush=True)
    def work(name):
        n = 0
        while not over.is_set():
            tap(name, torch.full((50,), n), n=n)
            n += 1
            time.sleep(0.0005)
    over = threading.Event()
    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    over.set()  # Python ends a thread that is in torch's code by ending the process
    for thread in threads:
        thread.join()
    """


def started(shell, run, **env):
    env = {**shell.env, "GRAFT_RECORD": str(run), **env}
    return subprocess.Popen(
        [*shell.python, shell.write("job.py", JOB)],
        cwd=shell.folder, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL, None])
def test_a_job_of_two_threads_is_switched_at_random_and_then_ended(run, shell, end):
    dice = random.Random(str(end))
    run.mkdir()
    order(run, "off")
    with started(shell, run) as job:
        assert job.stdout.readline() == "there\n"
        assert not (run / "recording.json").exists()
        order(run, "on")
        until(lambda: awaited(run, 2, 0).ranks)
        steps = 0
        for _ in range(40):
            action = dice.choice(["on", "off", "filter", "step", "step"])
            steps += action == "step"
            done = order(run, action, dice.choice([Filter.parse('name == "a"'), None]))
            if dice.random() < 0.5:
                taken = awaited(run, done.sequence, 30)
                assert taken.ranks == (0,) and not taken.late
        order(run, dice.choice(["on", "off"]))
        if end is None:
            job.stdin.close()
        else:
            job.send_signal(end)
        assert job.wait(60) == (0 if end is None else -end)
    back = Recording.open(run)
    (claim,) = back.claims()
    assert claim["state"] == ("running" if end is signal.SIGKILL else "complete")
    assert not any(one.problems for one in Checker(run).ranks())
    rows = back.rows()
    assert rows.height and rows["step"].max() <= steps + 1
    for row in rows.sample(50, seed=0, with_replacement=True).iter_rows(named=True):
        assert (back.read(row) == json.loads(row["tags"])["n"]).all()
    for name in ("a", "b"):  # in the order of the job, none twice
        numbers = [json.loads(text)["n"] for text in rows.filter(rows["name"] == name)["tags"]]
        assert numbers == sorted(set(numbers))


def graft_once(i):
    target = torch.zeros(3)
    tap("x", target, i=i)
    return target[0].item()


def test_a_replay_is_switched_in_its_out_folder(run, tmp_path):
    out = tmp_path / "out"
    with Recorder(run):
        for _ in range(3):
            for i in range(3):
                one(i + 1)
            step()
    with Replayer(run, out=out, record="True") as replay:
        assert graft_once(1) == 1
        assert awaited(out, 0).ranks == (0,)
        done = switch(out, "off")
        assert awaited(out, done.sequence, 30).ranks == (0,)
        assert graft_once(2) == 0
        switch(out, "step")
        switch(out, "on")
        assert graft_once(2) == 2
        switch(out, "filter", "i == 3")
        assert graft_once(1) == 0 and graft_once(3) == 3
    assert replay.state == "closed" and not replay.problems()
    assert [path.suffix for path in (out / "grafts").iterdir()] == [".parquet"]
    assert awaited(out, 0).ranks == ()
    assert replay.log()["step"].to_list() == [0, 1, 1]
    kept = Recording.open(out).rows()  # its own filter is --record's
    assert kept["step"].to_list() == [0, 1, 1, 1]


@pytest.mark.parametrize("action", ["on", "filter"])
def test_a_replay_that_counts_taps_ends_where_some_were_missed(run, tmp_path, action, capsys):
    with Recorder(run):
        for i in range(4):
            one(i + 1)
    with Replayer(run, out=tmp_path / "out", match_on="order") as replay:
        assert graft_once(1) == 1
        switch(tmp_path / "out", "off" if action == "on" else "step")
        graft_once(2)
        switch(tmp_path / "out", action, "i > 1" if action == "filter" else None)
        assert graft_once(3) == 0
    assert "--match-on order counts taps" in replay.problems()[0]
    assert "replaying ended, the job goes on: graft ctl switched it" in capsys.readouterr().err


def test_a_replay_that_counts_taps_may_begin_off(run, tmp_path):
    with Recorder(run):
        one(1)
        one(2)
    out = tmp_path / "out"
    out.mkdir()
    order(out, "off")
    with Replayer(run, out=out, match_on="order") as replay:
        graft_once(7)
        switch(out, "on")
        assert graft_once(1) == 1 and graft_once(2) == 2
    assert not replay.problems()


def test_an_order_of_another_job_s_is_past_for_the_next(run, monkeypatch):
    monkeypatch.setenv("GRAFT_JOB", "a")
    with Recorder(run):
        one(0)
    order(run, "off")
    assert order(run, "step").is_on is False
    about = json.loads((run / "recording.json").read_text())
    disk.replace(run / "recording.json", json.dumps({**about, "job": "b"}).encode())
    assert order(run, "step") == Order(3, True, None, 2, "b", "")
    assert Job("b", "", 0).is_same(vars(control.read(run)))
