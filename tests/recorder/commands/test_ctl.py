"""`graft ctl`, as processes."""

from __future__ import annotations

import subprocess

import pytest
from click.testing import CliRunner

from recorder import Recording
from replayer.cli import main

JOB = """
    import sys, torch
    from recorder import tap, step
    for line in sys.stdin:
        tap("x", torch.ones(2), n=int(line))
        print("tapped", flush=True)
    """


def ctl(*words):
    return CliRunner().invoke(main, ["ctl", *map(str, words)])


def tapped(job, n):
    job.stdin.write(f"{n}\n")
    job.stdin.flush()
    assert job.stdout.readline() == "tapped\n"


@pytest.fixture
def server(shell, run):
    """Start `graft record` of a job that makes a tap for each line, and end it in the end."""
    words = [*shell.graft, "record", "-o", run, "--", *shell.python, shell.write("job.py", JOB)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(words, cwd=shell.folder, env=shell.env, text=True, **pipes) as job:
        yield job


def test_a_server_is_switched_between_requests(server, run):
    tapped(server, 0)
    assert ctl(run, "off").output == f"{run}: off; taken by rank 0\n"
    tapped(server, 1)
    assert ctl(run, "step").output == f"{run}: off, 1 step ended; taken by rank 0\n"
    assert ctl(run, "on").exit_code == 0
    tapped(server, 2)
    done = ctl(run, "filter", "n > 3")
    assert done.output == f"{run}: on, filter 'n > 3', 1 step ended; taken by rank 0\n"
    tapped(server, 3)
    tapped(server, 4)
    assert "taken by rank 0" in ctl(run, "filter").output
    tapped(server, 5)
    _, err = server.communicate()
    assert server.returncode == 0 and "4 records from 1 rank" in err
    rows = Recording.open(run).manifest().select("n", "step", "occurrence").rows()
    assert rows == [(0, 0, 0), (2, 1, 0), (4, 1, 0), (5, 1, 0)]
    assert ctl(run, "off").output == (
        f"{run}: off, 1 step ended; no rank listens there now; the next that does starts with it\n"
    )


def test_nothing_recorded_since_it_was_off_is_no_fault(shell, run):
    run.mkdir()
    assert "the next that does starts with it" in ctl(run, "off").output
    job = shell.write("job.py", JOB)
    words = (shell.graft, "record", "-o", run, "--", shell.python, job)
    done = shell(*words, input="1\n2\n")
    assert done.returncode == 0
    said = f"nothing was recorded: it is off; switch it on with: graft ctl {run} on"
    assert done.stderr == f"[graft] {said}\n"
    assert not (run / "recording.json").exists()
    examined = shell(shell.graft, "record", "-o", run, "--", shell.graft, "doctor")
    assert f", once it is on: graft ctl {run} on" in examined.stdout
    assert ctl(run, "on").exit_code == 0
    assert shell(*words, input="1\n").returncode == 0
    assert ctl(run, "off").exit_code == 0
    again = shell(
        shell.graft, "record", "-o", run, "--overwrite", "--", shell.python, job, input="1\n"
    )
    assert again.returncode == 0 and "1 record from 1 rank" in again.stderr
    assert not (run / "control.json").exists()


def test_a_rank_that_is_stopped_is_named(server, run, monkeypatch):
    tapped(server, 0)
    monkeypatch.setattr("recorder.taps.control.FILE", "elsewhere.json")  # so that it sees nothing
    done = ctl(run, "off")
    pid = Recording.open(run).claims()[0]["pid"]
    assert done.exit_code == 3
    assert f"{run}: off; taken by no rank yet\n" in done.output
    assert f"not taken within 1 s: rank 0 (pid {pid} on " in done.output
    server.communicate()


def test_what_cannot_be_done_is_refused_before_anything_is_written(run, tmp_path):
    done = ctl(run, "on")
    assert done.exit_code == 2 and f"{run} is not a recording" in done.output
    run.mkdir()
    done = ctl(run, "filter", "layer < open(3)")
    assert done.exit_code == 2 and "  layer < open(3)\n          ^^^^\n" in done.output
    assert ctl(run, "on", "x").exit_code == 2
    assert ctl(run, "pause").exit_code == 2
    assert list(run.iterdir()) == []
