"""A server that nobody edits: switched while it answers, on a disk that does not come back."""

from __future__ import annotations

import subprocess

import pytest
from click.testing import CliRunner

from recorder import Recording
from replayer.cli import main

pytestmark = pytest.mark.processes

SERVER = """
    import sys
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(8, 1 << 17), torch.nn.Identity())
    for line in sys.stdin:  # a request a line
        with torch.inference_mode():
            model(torch.full((2, 8), float(line)))
        print("answered", flush=True)
"""
# Let no write of payloads return before the file `go` is there.
SLOW = """
    import os, time

    def slow():
        from recorder.format import disk
        real = disk.write_at
        def write_at(*args):
            while not os.path.exists("go"):
                time.sleep(0.01)
            return real(*args)
        disk.write_at = write_at

    import threading, sys
    def wait():
        while "torch" not in sys.modules or "recorder.writing.writer" not in sys.modules:
            time.sleep(0.001)
        slow()
    if os.environ.get("GRAFT_RECORD"):
        threading.Thread(target=wait, daemon=True).start()
"""


def answered(job, requests):
    for n in requests:
        job.stdin.write(f"{n}\n")
        job.stdin.flush()
        assert job.stdout.readline() == "answered\n"


def test_a_server_answers_while_its_disk_hangs_and_is_switched(shell):
    """Forty requests of 1 MiB each, into 8 MiB of staging memory, with nothing ever written."""
    shell.write("sitecustomize.py", SLOW)
    words = [
        *shell.graft, "record", "-o", "run", "--modules", "0", "--staging", "8MiB",
        "--max-hold", "50ms", "--", *shell.python, shell.write("server.py", SERVER),
    ]  # fmt: skip
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    run = shell.folder / "run"
    with subprocess.Popen(words, cwd=shell.folder, env=shell.env, text=True, **pipes) as job:
        answered(job, range(20))
        assert "off; taken by rank 0" in CliRunner().invoke(main, ["ctl", str(run), "off"]).output
        answered(job, range(20, 30))
        assert "on; taken by rank 0" in CliRunner().invoke(main, ["ctl", str(run), "on"]).output
        answered(job, range(30, 40))
        (shell.folder / "go").touch()
        _, err = job.communicate()
    assert job.returncode == 3, err
    assert "dropped: writing held the job for longer than --max-hold 50ms" in err
    whole = Recording.open(run)
    first = whole.load(0, "0", occurrence=0)
    assert first.shape == (2, 1 << 17)
    kept = whole.manifest()["occurrence"].to_list()
    assert 0 < len(kept) < 30 and whole.claims()[0]["dropped"] == 30 - len(kept)
