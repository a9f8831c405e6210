"""SIGTERM and SIGINT close a recording, whatever the main thread is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
import torch

from recorder import Recorder, Recording, tap
from recorder.taps import signals
from recorder.taps.signals import _received

JOB = """
    import ctypes, os, sys, time, torch
    from recorder import tap, step
    {before}
    for i in range(50):
        tap("x", torch.full((1000,), float(i)), i=i)
    step()
    {after}
    print("ready", flush=True)
    {then}
"""
FOREVER = {
    "in Python": "while True: time.sleep(0.001); tap('y', torch.zeros(10))",
    # As in a collective whose peers are gone: it never comes back, whatever signal comes.
    "in a library": "m, lib = ctypes.create_string_buffer(64), ctypes.CDLL(None)\n"
    "    lib.pthread_mutex_lock(m); lib.pthread_mutex_lock(m)",
}


def ended_by(shell, number, then, *, before="", after=""):
    """Start the job, send it a signal when it is ready; return its status, seconds, stderr."""
    job = shell.write("job.py", JOB.format(then=then, before=before, after=after))
    env = {**shell.env, "GRAFT_RECORD": "run"}
    process = subprocess.Popen(
        [*shell.python, job],
        cwd=shell.folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, time.monotonic() - started, out + err


@pytest.mark.parametrize("where", FOREVER)
def test_sigterm_closes_the_recording_and_ends_the_job(shell, where):
    status, seconds, _ = ended_by(shell, signal.SIGTERM, FOREVER[where])
    assert status == -signal.SIGTERM
    assert seconds < 20  # 5 on a machine that has nothing else to do
    back = Recording.open(shell.folder / "run")
    assert [claim["state"] for claim in back.claims()] == ["complete"]
    assert not list(back.path.rglob("*.journal"))
    for i in range(50):
        assert torch.equal(back.load(rank=0, name="x", i=i), torch.full((1000,), float(i)))


def test_sigint_closes_it_too(shell):
    status, _, err = ended_by(shell, signal.SIGINT, FOREVER["in Python"])
    assert status in (-signal.SIGINT, 1) and "KeyboardInterrupt" in err
    back = Recording.open(shell.folder / "run")
    assert [claim["state"] for claim in back.claims()] == ["complete"]


def test_a_handler_of_the_job_s_own_is_left_alone(shell):
    own = (
        "import signal\n    signal.signal(signal.SIGTERM, lambda *a: (print('mine'), sys.exit(5)))"
    )
    for when in ("before", "after"):  # the first tap
        status, _, out = ended_by(shell, signal.SIGTERM, FOREVER["in Python"], **{when: own})
        assert (status, out.strip()) == (5, "mine")
        back = Recording.open(shell.folder / "run")
        assert [claim["state"] for claim in back.claims()] == ["complete"]
        for path in sorted(back.path.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()


@pytest.mark.processes
def test_a_forked_child_ends_as_it_would_have(run):
    with Recorder(run):
        tap("x", torch.zeros(3))
        assert signal.getsignal(signal.SIGTERM) is _received
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_event_loop_s_pipe_is_left_in_place(run):
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    try:
        with Recorder(run):
            tap("x", torch.zeros(3))
            assert signal.set_wakeup_fd(write) == write
        assert signal.set_wakeup_fd(write) == write
    finally:
        signal.set_wakeup_fd(-1)
        os.close(read)
        os.close(write)
    assert signals._pipe is not None


@pytest.mark.parametrize("what", ["record", pytest.param("replay", marks=pytest.mark.slow)])
def test_ctrl_c_still_interrupts_a_job_that_waits(shell, what):
    """Polars, which we import, would have such a wait go on."""
    shell.write(
        "job.py",
        """
        import queue, signal, sys, threading, time
        import torch
        from recorder import tap

        h = torch.ones(3)
        tap("x", h)
        for _ in range(500):  # it is imported beside the job
            if "polars" in sys.modules and not any(
                t.name == "graft-import" for t in threading.enumerate()
            ):
                break
            time.sleep(0.02)
        if sys.argv[1:] == ["wait"]:
            main = threading.main_thread().ident
            threading.Timer(0.2, signal.pthread_kill, [main, signal.SIGINT]).start()
            try:
                queue.Queue().get(timeout=20)
            except KeyboardInterrupt:
                print("interrupted")
            except queue.Empty:
                print("not heard of")
        """,
    )
    command = [shell.python, "job.py"]
    done = shell(
        shell.graft, "record", "-o", "base", "--", command, "wait" if what == "record" else ""
    )
    if what == "replay":
        done = shell(shell.graft, "replay", "base", "--", command, "wait")
    assert done.stdout == "interrupted\n", done.stderr
