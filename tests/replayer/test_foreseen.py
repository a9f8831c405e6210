"""What is said of a replay's options before the job runs."""

from __future__ import annotations

import pytest
import torch

from recorder import Recorder, Recording, tap
from recorder.errors import UsageError
from replayer.foreseen import foreseen
from replayer.settings import ReplaySettings


@pytest.fixture
def lines(run):
    """Return what is foreseen of a replay of taps q and norm2 in four layers, with options."""
    with Recorder(run):
        for layer in range(4):
            tap("q", torch.ones(2), layer=layer)
            tap("norm2", torch.ones(2), layer=layer, phase="prefill")

    def lines(**options):
        settings = ReplaySettings.named(options)
        return foreseen(Recording.open(run), settings)

    return lines


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"filter": 'name == "q" and layer < 2'},
        {"filter": "rank == 3"},
        {"filter": "phase is None"},
        {"match_on": "name,layer", "filter": 'kind_of == "decode"'},
        {"match_on": "name,layer=block"},
        {"match_on": "order"},
        {"transform": "replayer.foreseen.foreseen"},
        {"transform": "torch.cat"},
    ],
)
def test_what_may_well_be_right_is_left_alone(lines, options):
    assert lines(**options) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"filter": "layer == 9"}, "none has layer == 9: layer is 0 to 3"),
        ({"filter": 'phase == "decode"'}, "none has phase == 'decode': phase is 'prefill'"),
        ({"filter": "step == 1"}, "none has step == 1: step is 0"),
        ({"filter": "layr == 1"}, "no tap carried the tag 'layr', closest: layer"),
        ({"filter": "name == q"}, 'which is a tap; its name is text: name == "q"'),
        ({"filter": "norm2"}, 'which is a tap; its name is text: name == "norm2"'),
        ({"filter": 'name == "norm3"'}, "no tap is named 'norm3', closest: norm2"),
        (
            {"filter": 'name == "q" or layr == 1'},
            "reads 'layr', which no record carries, closest: layer",
        ),
        ({"filter": "layr == 1", "match_on": "name,layer"}, "closest: layer"),
        ({"transform": "no.such.fn"}, "there is no module no.such"),
        ({"transform": "replayer.foreseen.forseen"}, "foreseen.py defines no 'forseen'"),
    ],
)
def test_what_will_go_wrong_is_said(lines, options, said):
    (line,) = lines(**options)
    assert said in line


def test_a_tag_that_no_record_carries_cannot_be_matched_on(lines):
    with pytest.raises(UsageError, match="--match-on names 'lyer', which no tap carries"):
        lines(match_on="name,lyer")


@pytest.mark.processes
def test_it_is_said_before_the_job_runs_and_nothing_is_imported(lines, run, shell):
    lines()
    shell.write("mine.py", "print('imported')\ndef fn(g): return g.target")
    job = shell.write("job.py", "import sys; print('job', file=sys.stderr)")
    options = ["--filter", "layer == 9", "--transform", "mine.fn"]
    done = shell(shell.graft, "replay", run, *options, "--", shell.python, job)
    assert done.returncode == 3 and "imported" not in done.stdout
    assert done.stderr.index("before COMMAND runs: of what was recorded") < done.stderr.index("job")
    wrong = shell(shell.graft, "replay", run, "--match-on", "lyer", "--", shell.python, job)
    assert wrong.returncode == 2 and "job" not in wrong.stderr


def test_a_package_that_is_sought_is_not_imported(lines, tmp_path, monkeypatch):
    package = tmp_path / "badpkg"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('ran')")
    (package / "tr.py").write_text("def f(g): return g.target")
    monkeypatch.chdir(tmp_path)
    assert lines(transform="badpkg.tr.f") == []
    (line,) = lines(transform="badpkg.tr.other")
    assert "tr.py defines no 'other'" in line
    (line,) = lines(transform="badpkg.nothing.f")
    assert "there is no module badpkg.nothing" in line
