"""Searches by trials, in this process: what they find, what they cost, how they go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import layered
import pytest
import torch
from layered import LAYERS, job

from recorder import Recorder, tap
from recorder.errors import RecordingExists, UsageError
from replayer import bisect
from replayer.finding.search import Verdict
from replayer.showing.trials import bisect_lines

WATCH = 'name == "out"'


def counted(run):
    """Return a target, and a list that is as long as it was called often."""
    calls = []

    def target():
        calls.append(0)
        return run()

    return target, calls


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", ["up", "down"])
def test_a_single_fault_is_found_in_few_trials(base, name, layer):
    target, calls = counted(job({(name, layer): lambda x: x + 1}))
    found = bisect(base(), target, watch=WATCH)
    assert (found.found.name, found.found.tags) == (name, f'{{"layer":{layer}}}')
    assert found.status == 0 and len(found.taps) == 12
    assert len(calls) == len(found.trials) <= 6 == found.most


def test_a_fault_of_what_is_watched_is_found_too(base):
    found = bisect(base(), job({("down", 4): lambda x: 2 * x}), watch='name == "down"')
    assert found.found.label == "down layer=4"


def test_tol_says_how_far_off_is_bad(base):
    target = job({("up", 1): lambda x: 1.01 * x})
    run = base()
    assert bisect(run, target, watch=WATCH, tol=1e-4).found.label == "up layer=1"
    good = bisect(run, target, watch=WATCH, tol=0.9)
    assert good.status == 3 and "the run is good with nothing grafted" in bisect_lines(good)[0]
    assert "lower --tol" in bisect_lines(good)[0]


def test_two_faults_have_a_smallest_set(base):
    wrong = {("up", 1): lambda x: x + 1, ("down", 3): lambda x: x + 1}
    found = bisect(base(), job(wrong), watch=WATCH, minimal_set=True)
    assert found.found.label == "down layer=3"
    # Any tap behind the last fault cuts both off.
    assert len(found.smallest) == 1 and found.smallest[0] >= found.boundary.good - 1
    assert any(line.startswith("smallest set of taps") for line in bisect_lines(found))


def test_faults_on_two_paths_need_a_tap_on_each(run):
    def target(wrong):
        a, b = torch.ones(4, 8), torch.ones(4, 8)
        a = tap("a", a * (2 if wrong else 1))
        b = tap("b", b * (3 if wrong else 1))
        tap("noise", torch.ones(3))
        tap("sum", a + b)

    with Recorder(run):
        target(False)
    found = bisect(
        run, lambda: target(True), watch='name == "sum"', filter='name != "sum"', minimal_set=True
    )
    # What is watched is not grafted here, so only what comes before it is.
    assert [found.taps[i].name for i in found.smallest] == ["a", "b"]


def test_a_search_that_was_interrupted_goes_on(base, tmp_path):
    run, out, calls = base(), tmp_path / "search", []
    wrong = job({("down", 2): lambda x: x + 1})

    def stopped():
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return wrong()

    with pytest.raises(KeyboardInterrupt):
        bisect(run, stopped, watch=WATCH, out=out)
    assert len((out / "trials.jsonl").read_text().splitlines()) == 5  # and two before
    with (out / "trials.jsonl").open("a") as file:
        file.write('{"trial": 9, "ta')  # torn
    said = []
    found = bisect(run, stopped, watch=WATCH, out=out, say=said.append)
    assert found.found.label == "down layer=2" and "going on after 3 trials" in said[0]
    assert sum(one.is_old for one in found.trials) == 3
    assert len(calls) == 4 + len(found.trials) - 3
    again = bisect(run, stopped, watch=WATCH, out=out)
    assert all(one.is_old for one in again.trials) and again.found == found.found
    with pytest.raises(RecordingExists, match="holds another search"):
        bisect(run, stopped, watch='name == "up"', out=out)
    with pytest.raises(RecordingExists, match="holds other files"):
        bisect(run, stopped, watch=WATCH, out=run)


def test_a_search_that_was_interrupted_in_its_first_trial_begins_anew(base, tmp_path):
    run, calls = base(), []

    def stopped():
        calls.append(0)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return job({("down", 2): lambda x: x + 1})()

    with pytest.raises(KeyboardInterrupt):
        bisect(run, stopped, watch=WATCH, out=tmp_path / "search")
    found = bisect(run, stopped, watch=WATCH, out=tmp_path / "search")
    assert found.found.label == "down layer=2" and not any(one.is_old for one in found.trials)


def test_each_trial_is_a_line_with_its_verdict(base, tmp_path):
    found = bisect(base(), job({("up", 2): lambda x: -x}), watch=WATCH, out=tmp_path / "search")
    text = (tmp_path / "search" / "trials.jsonl").read_text()
    asked, named, *lines = map(json.loads, text.splitlines())
    assert asked["asked"]["watch"] == WATCH and len(named["named"]) == 12
    assert [one["trial"] for one in lines] == list(range(1, len(lines) + 1))
    assert {one["verdict"] for one in lines} == {"good", "bad"}
    assert all(one["why"] for one in lines)
    assert found.frame().height == len(lines)
    for one in lines:
        assert (tmp_path / "search" / f"trial-{one['trial']}").is_dir()


def test_a_script_judges(base, tmp_path):
    script = "ls $GRAFT_TRIAL/grafts/*.parquet >/dev/null && test -e $GRAFT_TRIAL/../good"
    run = base()
    found = bisect(run, job(), check=script, out=tmp_path / "search")
    assert found.status == 3 and "bad with everything grafted" in bisect_lines(found)[0]
    skipped = bisect(run, job(), check="exit 125")
    assert skipped.status == 3 and "no verdict" in bisect_lines(skipped)[0]
    assert {one.verdict for one in skipped.trials} == {Verdict.SKIP}


@pytest.mark.parametrize("script", ["./judge.sh", "/"])
def test_a_script_that_cannot_be_run_is_no_verdict(base, tmp_path, script):
    run, out = base(), tmp_path / "search"
    wrong = job({("down", 2): lambda x: x + 1})
    with pytest.raises(UsageError, match=f"--check '{script}' cannot be run: .* ended with 12[67]"):
        bisect(run, wrong, check=script, out=out)
    found = bisect(run, wrong, check="true", out=out)  # nothing came of the first
    assert found.trials[0].number == 1 and found.status == 3
    with pytest.raises(RecordingExists):
        bisect(run, wrong, check="false", out=out)


def test_noisy_verdicts_are_put_to_the_vote(base):
    calls = []

    def flaky(x):
        calls.append(0)
        return x + (0 if len(calls) % 3 == 0 else 1)

    found = bisect(base(), job({("down", 1): flaky}), watch=WATCH, repeat=5)
    assert found.found.label == "down layer=1" and found.noisy


def test_verdicts_that_contradict_are_said_and_handed_on(run, tmp_path):
    """A script that calls a run with few taps grafted good, although nothing and more are bad."""

    def target():
        kept = [tap("t", torch.full((2,), float(i)), i=i) for i in range(16)]
        assert len(kept) == 16

    with Recorder(run):
        target()
    (tmp_path / "judge.py").write_text(
        "import json, os, sys; path = os.environ['GRAFT_TRIAL'] + '/taps.json'\n"
        "n = len(json.load(open(path))) if os.path.exists(path) else 16\n"
        "sys.exit(0 if n in (16, 4, 5, 6) else 1)"
    )
    script = f"{sys.executable} {tmp_path / 'judge.py'}"
    found = bisect(run, target, check=script)
    assert found.found.label == "t i=15" and not found.contradicts
    both = bisect(run, target, check=script, minimal_set=True)
    assert len(both.smallest) in (4, 5, 6)
    if both.contradicts:
        assert both.status == 3
        assert any("contradict each other" in line for line in bisect_lines(both))


def test_a_dry_run_says_what_it_costs(base):
    target, calls = counted(job())
    found = bisect(base(), target, watch=WATCH, dry_run=True)
    assert len(calls) == 1 and found.status == 0
    assert bisect_lines(found)[0] == "12 taps: x to out"
    assert "at most 6 trials" in bisect_lines(found)[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give either --watch EXPR or --check SCRIPT"),
        ({"watch": WATCH, "check": "true"}, "give either --watch EXPR or --check SCRIPT"),
        ({"watch": WATCH, "tol": -1.0}, "0 or more"),
        ({"check": "true", "tol": 1.0}, "how far a watched tap may be off"),
        ({"watch": WATCH, "repeat": 0}, "repeat is 0"),
        ({"watch": WATCH, "to": 1}, "'to' is no option"),
    ],
)
def test_what_cannot_be_asked_is_refused(base, options, said):
    with pytest.raises(UsageError, match=said):
        bisect(base(), job(), **options)


def test_what_was_not_recorded_is_not_watched(base):
    calls = []
    with pytest.raises(UsageError, match="--watch: of what was recorded, .* layer is 0 to 4"):
        bisect(base(), lambda: calls.append(0), watch="layer == 7")
    assert not calls


def test_nothing_watched_is_no_verdict(base):
    found = bisect(base(), lambda: [tap("x", torch.zeros(2, 12, 32))], watch='name == "out"')
    assert found.status == 3 and "no watched tap was met" in found.trials[0].why


@pytest.mark.parametrize("match_on", ["name,layer,step", "name,layer", "order"])
def test_taps_that_are_not_grafted_are_counted_all_the_same(base, match_on):
    wrong = job({("up", 3): lambda x: x + 1}, steps=2)
    found = bisect(base(steps=2), wrong, watch=WATCH, match_on=match_on)
    assert found.found.label == "up layer=3"


def test_a_command_that_fails_in_every_trial_ends_with_its_status(base, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        f"import sys\nsys.path.append({str(Path(layered.__file__).parent)!r})\nimport layered\n"
        "layered.job()()\nsys.exit(7)\n"
    )
    assert bisect(base(), [sys.executable, str(script)], watch=WATCH).status == 7


def test_a_search_that_was_finished_says_that_nothing_was_run(base, tmp_path):
    run = base()
    for _ in range(2):
        found = bisect(run, job({("up", 2): lambda x: -x}), watch=WATCH, out=tmp_path / "search")
    assert "nothing was run now: name a new -o OUT" in bisect_lines(found)[-1]
    with pytest.raises(UsageError, match="check is a function; give a shell command"):
        bisect(run, job(), check=lambda: True)
