"""A command under `graft record` or `graft replay` as a function: repeated, silent, typed."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from recorder import Recorder, Recording, step, tap
from recorder.commands.outcome import recorded
from recorder.errors import DamagedRecording, RecordingExists, UsageError
from recorder.settings import RecordSettings
from replayer import trial as trial_module
from replayer.settings import ReplaySettings
from replayer.trial import replayed

JOB = """
import sys, torch
from recorder import tap
x = torch.full((4,), float(sys.argv[1]))
tap("x", x)
y = x * 2
tap("y", y)
sys.exit(int(sys.argv[2]) if x[0] != 1 else 0)
"""
pytestmark = pytest.mark.processes


@pytest.fixture
def command(tmp_path):
    (tmp_path / "job.py").write_text(JOB)

    def command(value: float, status: int = 0) -> list[str]:
        return [sys.executable, str(tmp_path / "job.py"), str(value), str(status)]

    return command


@pytest.mark.slow
def test_a_trial_can_be_repeated_and_prints_nothing(command, run, tmp_path, capfd):
    outcome = recorded(run, RecordSettings(), command(1))
    assert (outcome.command_status, outcome.problems, outcome.status) == (0, (), 0)
    assert any("2 records from 1 rank" in note for note in outcome.notes)
    baseline = Recording.open(run)
    for filter, grafted in (('name == "y"', 1), ("True", 2), ('name == "nothing"', 0)):
        trial = replayed(baseline, None, ReplaySettings.given({"filter": filter}), command(5))
        assert trial.summary.outcomes.get("grafted", 0) == grafted
        assert trial.status == (0 if grafted else 3) and bool(trial.problems) == (not grafted)
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.py", "run"]


@pytest.mark.slow
def test_a_trial_tells_the_command_s_status_from_its_own(command, run):
    recorded(run, RecordSettings(), command(1))
    trial = replayed(
        Recording.open(run), None, ReplaySettings.given({"filter": "name == 'y'"}), command(5, 7)
    )
    assert (trial.command_status, trial.status, trial.problems) == (7, 7, ())
    outcome = recorded(run.with_name("other"), RecordSettings(), command(2, 9))
    assert (outcome.command_status, outcome.status, outcome.problems) == (9, 9, ())


@pytest.mark.parametrize("words", [[], [""]])
def test_no_command_is_refused_before_anything_is_made(run, tmp_path, record, words):
    with pytest.raises(UsageError, match="no command to run"):
        recorded(run, RecordSettings(), words)
    assert not run.exists()
    baseline = record(lambda rank: tap("x", torch.ones(2)))
    with pytest.raises(UsageError, match="no command to run"):
        replayed(baseline, tmp_path / "out", ReplaySettings(), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_log_that_cannot_be_read_is_the_one_reason(command, run, monkeypatch):
    recorded(run, RecordSettings(), command(1))

    def damaged(folder):
        raise DamagedRecording("rank-00000.parquet", "it is cut short")

    monkeypatch.setattr(trial_module, "read_log", damaged)
    trial = replayed(Recording.open(run), None, ReplaySettings(), command(5))
    assert trial.status == 3 and trial.notes == () and len(trial.problems) == 1
    assert "cut short" in trial.problems[0] and trial.log.is_empty()


def test_what_the_target_computed_is_recorded_beside(command, run, tmp_path):
    recorded(run, RecordSettings(), command(1))
    out = tmp_path / "out"
    settings = ReplaySettings.given({"record": True})
    trial = replayed(Recording.open(run), out, settings, command(5))
    assert trial.recording is not None and trial.recording.problems == ()
    assert Recording.open(out).load(rank=0, name="x").tolist() == [5.0] * 4
    with pytest.raises(RecordingExists):
        replayed(Recording.open(run), out, settings, command(5))
    with pytest.raises(UsageError, match="give -o OUT"):
        replayed(Recording.open(run), None, settings, command(5))


def test_trials_run_beside_the_main_thread(command, run):
    """Only the main thread may take signals; a trial beside it goes without."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(recorded(run, RecordSettings(), command(1)))
    )
    thread.start()
    thread.join()
    assert found and found[0].status == 0


@pytest.mark.parametrize("are_counted", [True, False])
def test_a_step_that_one_side_forgot_is_said(run, tmp_path, are_counted):
    def iterate(is_counted):
        for _ in range(3):
            kept = [tap("x", torch.ones(2), layer=layer) for layer in range(2)]
            if is_counted:
                step()
        return kept

    with Recorder(run):
        iterate(are_counted)
    trial = replayed(Recording.open(run), None, ReplaySettings(), lambda: iterate(not are_counted))
    one, other = ("the target", "the recording")[:: 1 if are_counted else -1]
    assert trial.notes[-1] == (
        f"{one} has step 0 alone, {other} steps 0 to 2: call step() at the end of an iteration, "
        "or give --match-on name,layer"
    )


def test_iterations_whose_end_nobody_told_are_said(run, tmp_path):
    job = tmp_path / "job.py"
    job.write_text(
        "import sys, torch\nfrom recorder import tap, step\nfor _ in range(3):\n"
        "    for i in range(2): tap('x', torch.ones(2), layer=i)\n    if sys.argv[1:]: step()\n"
    )
    forgotten = recorded(run, RecordSettings(), [sys.executable, str(job)])
    assert "every tap came 3 times in step 0, and nothing called step()" in forgotten.notes[-1]
    told = recorded(tmp_path / "told", RecordSettings(), [sys.executable, str(job), "counted"])
    assert not any("step()" in note for note in told.notes)


def test_a_value_that_differs_is_named(run):
    def job(value):
        tap("lr", value)
        return tap("x", torch.ones(2))

    with Recorder(run):
        job(1.0)
    trial = replayed(Recording.open(run), None, ReplaySettings(), lambda: job(2.0))
    assert trial.notes[-1] == (
        "1 value differs from what was recorded, the first: lr step=0 on rank 0: recorded 1.0, "
        "here 2.0"
    )
    assert len(replayed(Recording.open(run), None, ReplaySettings(), lambda: job(1.0)).notes) == 1
