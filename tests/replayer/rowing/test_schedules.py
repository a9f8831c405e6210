"""A decoder run in many ways: whatever one computes, a replay grafts onto the same rows of another.

What each row has to be is held against plain dictionaries of what the baseline's taps saw.
"""

from __future__ import annotations

import functools

import pytest
from rowed.oracle import Oracle
from rowed.schedules import SCHEDULES, server

from recorder import Recorder
from replayer import Replayer


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    """Return the recording of a schedule, and an oracle of it; each is made once."""

    @functools.cache
    def baseline(name, seed=0):
        folder = tmp_path_factory.mktemp(name) / "run"
        schedule = SCHEDULES[name] if not seed else server(seed)
        fired, _ = schedule.run(
            lambda rank, world: Recorder(folder, rank=rank, world_size=world), salt=0
        )
        return folder, Oracle(fired)

    return baseline


def replayed(folder, schedule, salt=0, **options):
    """Replay onto a schedule; return what its taps saw, and their rows of the log, in order."""
    options = {"metrics": False, **options}
    fired, sessions = schedule.run(
        lambda rank, world: Replayer(folder, rank=rank, world_size=world, **options), salt
    )
    logs = [row for session in sessions for row in session.log().iter_rows(named=True)]
    assert len(logs) == len(fired)
    return fired, logs, sessions


def checked(oracle, fired, logs):
    """Hold all taps against the oracle, and the log against both."""
    for one, row in zip(fired, logs, strict=True):
        found, missing = oracle.check(one)
        shown = {name: row[name] for name in ("name", "tags", "step", "rank", "outcome", "message")}
        if found or not missing:
            assert row["outcome"] == "grafted", shown
            assert (row["rows_found"], row["rows_missing"]) == (found, missing), shown
        else:
            assert row["outcome"] == "missing", shown
            assert row["message"].startswith("no row in common: none of its "), shown


PAIRS = [(a, b) for a in SCHEDULES for b in SCHEDULES]


@pytest.mark.parametrize(("baseline", "target"), PAIRS, ids=[f"{a} onto {b}" for a, b in PAIRS])
def test_every_row_gets_what_the_baseline_computed_for_its_prefix(baselines, baseline, target):
    folder, oracle = baselines(baseline)
    fired, logs, _ = replayed(folder, SCHEDULES[target])
    checked(oracle, fired, logs)
    assert sum(row["rows_found"] or 0 for row in logs) > 900


@pytest.mark.parametrize("seed", range(1, 4))
def test_servers_that_were_asked_in_another_order_meet(baselines, seed):
    folder, oracle = baselines("server", seed)
    for target in (server(seed + 10), SCHEDULES["packed"]):
        fired, logs, _ = replayed(folder, target)
        checked(oracle, fired, logs)
