"""Rough handling of the job's side: memory that is gone, interrupts, forks, modes, no stderr."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch
from torch.overrides import TorchFunctionMode

from recorder import Recorder, Recording, tap
from recorder import session as session_module
from recorder.errors import UsageError
from recorder.format import disk
from recorder.verify import Checker
from recorder.writing import store as store_module


def freed():
    tensor = torch.ones(100)
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk():
    tensor = torch.ones(100)
    tensor.untyped_storage().resize_(40)
    return tensor


def transposed():
    tensor = torch.ones(10, 10).t()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("make", [freed, shrunk, transposed, lambda: torch._efficientzerotensor(9)])
def test_a_tensor_without_memory_is_refused(run, capsys, make):
    with Recorder(run):
        tap("x", make())
        tap("y", torch.ones(3))
    assert "its memory was freed" in capsys.readouterr().err
    assert Recording.open(run).rows()["name"].to_list() == ["y"]


@pytest.mark.thorough
@pytest.mark.parametrize("elements", [256, 1 << 18])
def test_a_deadline_that_comes_during_a_tap_reaches_the_job(run, elements):
    """A signal's handler raises at any moment; not once is that lost, nor a lock left taken."""

    class Late(Exception):
        pass

    def late(*_):
        came.append(1)
        raise Late

    came = []
    rng = random.Random(elements)
    # Of the processor's time: pytest-timeout has the timer of real time.
    old = signal.signal(signal.SIGPROF, late)
    # What is raised while a finalizer runs, Python drops; none of other tests' is to run here.
    gc.collect()
    gc.disable()
    try:
        with Recorder(run, level="digests"):
            value = torch.zeros(elements)
            tap("x", value)
            for i in range(200):
                came.clear()
                with pytest.raises(Late):
                    signal.setitimer(signal.ITIMER_PROF, rng.uniform(0.001, 0.004))
                    while not came:
                        tap("x", value, i=i)
            for i in range(50):
                tap("y", torch.full((1 << 16,), float(i)), i=i)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        gc.enable()
    rows = Recording.open(run).rows()
    assert rows.filter(rows["name"] == "y").height == 50


def test_an_interrupted_close_is_made_good_by_the_next(run, monkeypatch):
    real = session_module.Writer.close
    calls = []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(session_module.Writer, "close", interrupted)
    recorder = Recorder(run)
    with pytest.raises(KeyboardInterrupt), recorder:
        tap("x", torch.zeros(3))
    recorder.close()
    assert recorder.state == "complete" and len(calls) == 2
    assert Recording.open(run).claims()[0]["state"] == "complete"


@pytest.mark.parametrize("presses", [1, 2])
def test_an_interrupt_while_it_is_closed_leaves_what_was_written_and_says_how_it_ended(
    run, monkeypatch, capsys, presses
):
    gate, closing = threading.Event(), threading.Event()
    real, close = store_module.Store.add, session_module.Writer.close

    def slow(self, payload, data, **where):
        real(self, payload, data, **where)
        self.write_out()
        if payload.row["seq"] >= 3:
            closing.wait(10)
            gate.wait(0.05)  # a slow disk

    def closes(self):
        closing.set()
        close(self)

    monkeypatch.setattr(store_module.Store, "add", slow)
    monkeypatch.setattr(session_module.Writer, "close", closes)
    monkeypatch.setattr("recorder.writing.writer._BATCH_BYTES", 1)
    monkeypatch.setattr("recorder.writing.writer._GRACE_SECONDS", 0.3 if presses == 1 else 60.0)

    def press():
        closing.wait(10)
        for _ in range(presses):
            gate.wait(0.2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=press)
    recorder = Recorder(run)
    with pytest.raises(KeyboardInterrupt), recorder:
        for i in range(60):
            tap("x", torch.full((3,), float(i)), i=i)
        thread.start()
    thread.join()
    assert recorder.state == "stopped"
    back = Recording.open(run)
    (claim,) = back.claims()
    assert claim["state"] == "stopped" and claim["rows"] == back.rows().height
    assert claim["reason"].startswith("an interrupt came while it was being closed, and what still")
    assert 3 <= back.rows().height < 60 and back.load(0, "x", i=2)[0] == 2
    assert not list(run.rglob("*.journal")) and not list(run.rglob("*.partial"))
    assert "recording stopped: an interrupt came while" in capsys.readouterr().err
    assert all(not rank.problems for rank in Checker(run).ranks())


def test_an_interrupt_while_little_waits_loses_nothing(run, monkeypatch):
    close = session_module.Writer.close
    presses = []

    def closes(self):
        if not presses:
            presses.append(1)
            signal.raise_signal(signal.SIGINT)
        close(self)

    monkeypatch.setattr(session_module.Writer, "close", closes)
    with pytest.raises(KeyboardInterrupt), Recorder(run) as recorder:
        for i in range(60):
            tap("x", torch.full((3,), float(i)), i=i)
    assert recorder.state == "complete" and Recording.open(run).rows().height == 60


def test_an_interrupt_at_exit_closes_what_the_environment_opened(shell):
    shell.write(
        "job.py",
        """
        import os, signal, threading, time
        import torch
        from recorder import tap
        from recorder.writing import writer

        real = writer.Writer.close
        presses = [signal.SIGINT]
        def close(self):
            if presses:
                signal.raise_signal(presses.pop())
            real(self)
        writer.Writer.close = close
        for i in range(20):
            tap("x", torch.ones(3), i=i)
        """,
    )
    env = {"GRAFT_RECORD": "run"}
    shell(shell.python, "job.py", env=env)
    back = Recording.open(shell.folder / "run")
    assert back.rows().height == 20 and back.claims()[0]["state"] == "complete"


def test_a_child_forked_right_after_the_first_tap_can_import_what_we_import(shell):
    job = shell.write(
        "job.py",
        """
        import os, torch
        from recorder import tap
        tap("x", torch.ones(3))
        pid = os.fork()
        if pid == 0:
            import polars
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """,
    )
    env = {**shell.env, "GRAFT_RECORD": "run"}
    done = subprocess.run(
        [*shell.python, job], cwd=shell.folder, env=env, capture_output=True, timeout=60
    )
    assert done.stdout == b"7\n"


def test_a_mode_that_taps_whatever_torch_does(run):
    class TapAll(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                tap("seen", out)
            return out

    with Recorder(run), TapAll():
        tap("mine", torch.ones(4, 4).t())
        torch.full((600_000,), 2.0)
    names = Recording.open(run).rows()["name"].to_list()
    assert "mine" in names and names.count("seen") >= 3


def test_a_tap_in_the_middle_of_a_tap_is_refused_not_a_deadlock(run, capsys, monkeypatch):
    put = session_module.Writer._put

    def nested(self, *args, **kwargs):
        if args[1].row["name"] == "outer":
            tap("inner", torch.ones(3))
        return put(self, *args, **kwargs)

    monkeypatch.setattr(session_module.Writer, "_put", nested)
    with Recorder(run):
        tap("outer", torch.full((5,), 4.0))
    assert "in the middle of another tap" in capsys.readouterr().err
    back = Recording.open(run)
    assert torch.equal(back.load(rank=0, name="outer"), torch.full((5,), 4.0))


def test_no_stderr_at_all(shell):
    job = shell.write("job.py", "from recorder import tap\ntap('bad', object())\nprint('went on')")
    done = subprocess.run(
        ["sh", "-c", f"{shell.python[0]} {job} 2>&-"],
        cwd=shell.folder,
        env={**shell.env, "GRAFT_RECORD": "run"},
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, b"went on\n")


@pytest.mark.slow
def test_staging_memory_that_is_not_to_be_had(shell, run):
    with pytest.raises(UsageError, match="staging"):
        Recorder(run, staging="99999999999999999999GB")
    job = shell.write("job.py", "import torch\nfrom recorder import tap\ntap('x', torch.ones(3))")
    done = shell(shell.graft, "record", "-o", run, "--staging", "100TB", "--", shell.python, job)
    assert done.returncode == 3
    assert "100.0 TB of staging memory" in done.stderr and "--staging" in done.stderr
    assert "made no tap" not in done.stderr
    assert json.loads((run / "recording.json").read_text())["ended"][0]["state"] == "failed"


@pytest.mark.slow
def test_drops_are_counted_even_if_the_job_is_killed(shell, run):
    job = shell.write(
        "job.py",
        """
        import os, signal, time, torch
        from recorder import tap
        for i in range(300):
            tap("x", torch.full((1 << 18,), float(i)), i=i)
        time.sleep(2.5)
        tap("y", torch.zeros(3))
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    options = ["--staging", "4MiB", "--when-full", "drop"]
    done = shell(shell.graft, "record", "-o", run, *options, "--", shell.python, job)
    rows = Recording.open(run).rows()
    dropped = 300 - rows.filter(rows["name"] == "x").height
    assert dropped > 0 and f"{dropped} taps dropped" in done.stderr
    assert f"{dropped} taps dropped" in shell(shell.graft, "ls", run).stdout


def test_an_alarm_between_the_taps_of_a_job_is_none_of_ours(run):
    seen = []
    old = signal.signal(signal.SIGALRM, lambda *_: seen.append(time.monotonic()))
    try:
        with Recorder(run):
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            for i in range(300):
                tap("x", torch.full((5_000,), float(i)), i=i)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert Recording.open(run).rows().height == 300


@pytest.fixture
def slow_disk(monkeypatch):
    """Each write takes a while."""
    real = disk.write_at

    def slowly(*args):
        time.sleep(0.04)
        return real(*args)

    monkeypatch.setattr(disk, "write_at", slowly)


@pytest.mark.thorough
def test_a_handler_that_closes_in_the_middle_of_a_tap(run, slow_disk):
    class Out(Exception):
        pass

    recorder = Recorder(run, staging="8MiB")

    def close(*_):
        recorder.close()
        raise Out

    old = signal.signal(signal.SIGUSR1, close)
    try:
        with pytest.raises(Out), recorder:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            for i in itertools.count():
                tap("x", torch.full((300_000,), float(i)), i=i)
    finally:
        signal.signal(signal.SIGUSR1, old)
    recorder.close()
    rows = Recording.open(run).rows()
    assert recorder.state == "complete" and rows.height > 2


@pytest.mark.thorough
@pytest.mark.parametrize("when_full", ["hold", "drop"])
def test_a_tap_that_was_interrupted_before_it_woke_the_writer_does_so_later(
    run, monkeypatch, when_full
):
    class Late(Exception):
        pass

    def late(self):
        raise Late

    recorder = Recorder(run, when_full=when_full, level="digests")  # no statistics wake it up
    with recorder:
        tap("w", torch.ones(4))
        while recorder._writer.rows_written < 1 or not recorder._writer._asleep:
            time.sleep(0.01)
        with monkeypatch.context() as patch:
            patch.setattr(type(recorder._writer), "_nudge", late)
            with pytest.raises(Late):
                tap("x", torch.ones(4))
        time.sleep(0.7)
        for i in range(3):
            tap("y", torch.ones(4), i=i)
            time.sleep(0.1)
    names = Recording.open(run).rows()["name"].to_list()
    assert names[:2] == ["w", "x"] and names.count("y") >= 2


def test_a_handler_that_taps_in_the_middle_of_a_tap_never_hangs(run, capsys):
    count = itertools.count()
    old = signal.signal(signal.SIGPROF, lambda *_: tap("in_handler", torch.ones(4), n=next(count)))
    try:
        with Recorder(run):
            signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
            for i in range(3_000):
                tap("x", torch.ones(4), i=i)
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    rows = Recording.open(run).rows()
    assert rows.filter(rows["name"] == "x").height == 3_000
    assert rows["seq"].is_unique().all()


@pytest.mark.parametrize("where", ["command_line", "claim_rank", "Writer", "stored_bytes"])
def test_a_handler_that_taps_while_the_first_tap_begins_the_recording_loses_nothing(
    run, monkeypatch, capsys, where
):
    real, done = getattr(session_module, where), []

    def interrupted(*args, **options):
        if not done:
            done.append(where)
            signal.raise_signal(signal.SIGALRM)
        return real(*args, **options)

    monkeypatch.setattr(session_module, where, interrupted)
    old = signal.signal(signal.SIGALRM, lambda *_: tap("of_handler", torch.zeros(3)))
    try:
        with Recorder(run, max_bytes="1GB") as recorder:
            for i in range(5):
                tap("x", torch.ones(3), i=i)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert done and recorder.state == "complete"
    rows = Recording.open(run).rows()
    assert rows.filter(rows["name"] == "x").height == 5
    assert not [p for report in Checker(run).ranks() for p in report.problems]


@pytest.mark.parametrize("mark", ["_claiming", "_starting"])
def test_a_handler_that_taps_just_before_the_first_tap_s_mark_loses_nothing(run, monkeypatch, mark):
    """Between the look whether anybody has begun and the mark that somebody does."""
    done = []

    def set_mark(self, value):
        if value and not done:
            done.append(mark)
            signal.raise_signal(signal.SIGALRM)
        vars(self)[mark] = value

    class Marked(Recorder):
        pass

    setattr(Marked, mark, property(lambda self: vars(self)[mark], set_mark))
    old = signal.signal(signal.SIGALRM, lambda *_: tap("of_handler", torch.zeros(3)))
    try:
        with Marked(run) as recorder:
            for i in range(5):
                tap("x", torch.ones(3), i=i)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert done and recorder.state == "complete"
    names = Recording.open(run).rows()["name"].to_list()
    assert sorted(names) == ["of_handler", *["x"] * 5]


@pytest.mark.processes
@pytest.mark.parametrize("how", ["", "raise KeyboardInterrupt", "sys.exit(3)"])
def test_what_nobody_closes_is_closed_as_the_process_ends(shell, how):
    """In a notebook, or with an ExitStack: else a thread in C++ ends the process with an abort."""
    job = shell.write(
        "job.py",
        f"""
        import sys, torch
        from recorder import Recorder, tap
        recorder = Recorder("run").__enter__()
        for i in range(20):
            tap("x", torch.randn(100_000), i=i)
        {how}
        """,
    )
    statuses = {"": 0, "sys.exit(3)": 3}
    for _ in range(3):
        done = shell(shell.python, job)
        assert done.returncode == statuses.get(how, done.returncode), done.stderr
        assert done.returncode not in (134, -signal.SIGABRT) and "terminate" not in done.stderr
        back = Recording.open(shell.folder / "run")
        assert back.claims()[0]["state"] == "complete" and back.rows().height == 20
        shutil.rmtree(shell.folder / "run")


@pytest.mark.processes
def test_what_a_forked_child_opens_and_does_not_close_is_closed_too(shell):
    job = shell.write(
        "job.py",
        """
        import multiprocessing, torch
        from recorder import Recorder, tap

        def child():
            Recorder("child").__enter__()
            tap("x", torch.ones(3))

        with Recorder("parent"):
            pass
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 0
        """,
    )
    done = shell(shell.python, job)
    assert done.returncode == 0, done.stderr
    claim = Recording.open(shell.folder / "child").claims()[0]
    assert claim["state"] == "complete" and claim["rows"] == 1


@pytest.mark.slow
def test_sigterm_during_close_loses_nothing(shell):
    job = shell.write(
        "job.py",
        """
        import os, signal, threading, time, torch
        import recorder.format.disk as disk
        from recorder import Recorder, tap
        real = disk.write_at
        disk.write_at = lambda *a: (time.sleep(0.03), real(*a))[1]
        with Recorder("run"):
            for i in range(20):
                tap("x", torch.full((500_000,), float(i)), i=i)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        """,
    )
    done = shell(shell.python, job)
    assert done.returncode in (-signal.SIGTERM, 0), done.stderr
    back = Recording.open(shell.folder / "run")
    assert [claim["state"] for claim in back.claims()] == ["complete"] and back.rows().height == 20


def test_a_tap_that_races_the_end_starts_no_writer(run, monkeypatch):
    real = Recorder._ensure_writer
    inside, go = threading.Event(), threading.Event()

    def late(self):
        inside.set()
        go.wait(10)
        return real(self)

    monkeypatch.setattr(Recorder, "_ensure_writer", late)
    with Recorder(run):
        thread = threading.Thread(target=tap, args=("x", torch.ones(4)))
        thread.start()
        inside.wait(10)
    go.set()
    thread.join()
    assert Recording.open(run).rows().height == 0
