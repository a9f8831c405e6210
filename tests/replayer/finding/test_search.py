"""Searches over made-up oracles: with one fault and several, without verdicts, and noisy ones."""

from __future__ import annotations

import itertools
import random

import pytest

from replayer.finding.search import (
    NOT_BAD,
    NOT_GOOD,
    Boundary,
    Verdict,
    Voted,
    boundary,
    contradiction,
    smallest_set,
    steps_of,
)

GOOD, BAD, SKIP = Verdict.GOOD, Verdict.BAD, Verdict.SKIP


class Asked:
    """An oracle that counts, and refuses to be asked the same twice."""

    def __init__(self, verdict):
        self.verdict, self.asked = verdict, []

    def __call__(self, taps):
        assert list(taps) not in self.asked
        self.asked.append(list(taps))
        found = self.verdict(set(taps))
        return found if isinstance(found, Verdict) else GOOD if found else BAD


@pytest.mark.parametrize("n", [*range(1, 40), 1000])
def test_a_single_fault_is_found_in_as_many_trials_as_halving_takes(n):
    for fault in range(n) if n < 40 else (0, 1, 499, 500, 998, 999):
        asked = Asked(lambda taps, fault=fault: fault in taps)
        assert boundary(n, asked) == Boundary(fault, fault + 1)
        assert len(asked.asked) <= steps_of(n)


def test_both_ends_are_confirmed_first():
    asked = Asked(lambda taps: True)
    assert boundary(8, asked).trouble == NOT_BAD and asked.asked == [[]]
    asked = Asked(lambda taps: False)
    assert boundary(8, asked).trouble == NOT_GOOD and len(asked.asked) == 2
    asked = Asked(lambda taps: SKIP if len(taps) == 8 else False)
    assert boundary(8, asked).trouble == "the run has no verdict with everything grafted"


@pytest.mark.parametrize("seed", range(60))
def test_what_has_no_verdict_is_gone_round(seed):
    rng = random.Random(seed)
    n = rng.randint(2, 60)
    fault, skipped = rng.randrange(n), {k for k in range(1, n) if rng.random() < 0.4}
    asked = Asked(lambda taps: SKIP if len(taps) in skipped else fault in taps)
    found = boundary(n, asked)
    assert found.bad <= fault < found.good and not found.trouble
    assert [*range(found.bad + 1, found.good)] == [*found.skipped]
    assert {*found.skipped} <= skipped
    assert len(asked.asked) <= steps_of(n) + len(skipped)


@pytest.mark.parametrize("seed", range(40))
def test_a_smallest_set_repairs_the_run_and_nothing_of_it_can_be_left_out(seed):
    rng = random.Random(seed)
    n = rng.randint(1, 40)
    wanted = {*rng.sample(range(n), rng.randint(1, min(n, 5)))}
    found = smallest_set(range(n), lambda taps: GOOD if wanted <= {*taps} else BAD)
    assert found == sorted(wanted)


@pytest.mark.parametrize("seed", range(40))
def test_a_smallest_set_of_what_is_not_monotone_is_one_all_the_same(seed):
    rng = random.Random(seed)
    n = 12
    either = [{*rng.sample(range(n), 3)} for _ in range(3)]
    harmful = rng.randrange(n)

    def verdict(taps):
        taps = {*taps}
        if harmful in taps and len(taps) < n:
            return BAD
        return GOOD if any(one <= taps for one in either) else BAD

    found = smallest_set(range(n), verdict)
    assert verdict(found) is GOOD
    for tap in found if len(found) < n else ():
        assert verdict([one for one in found if one != tap]) is BAD


def test_trials_without_a_verdict_leave_nothing_out():
    assert smallest_set(range(6), lambda taps: GOOD if len(taps) == 6 else SKIP) == [*range(6)]


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_verdict_is_put_to_the_vote(seed):
    rng = random.Random(seed)

    def noisy(taps):
        right = 17 in taps
        return GOOD if right == (rng.random() > 0.15) else BAD

    voted = Voted(noisy, times=15)
    assert boundary(32, voted) == Boundary(17, 18)
    assert voted.noisy
    assert all(len(votes) <= 15 for votes in voted.votes.values())


def test_a_vote_ends_once_it_is_certain_and_a_tie_is_no_verdict():
    calls = itertools.count()
    assert Voted(lambda taps: (next(calls), GOOD)[1], times=5)([0]) is GOOD and next(calls) == 3
    turn = itertools.cycle([GOOD, BAD])
    assert Voted(lambda taps: next(turn), times=2)([0]) is SKIP
    assert Voted(lambda taps: SKIP, times=3)([0]) is SKIP


def test_verdicts_that_contradict_each_other_are_found():
    voted = Voted(lambda taps: GOOD if len(taps) in (2, 4) else BAD)
    for k in (0, 1, 4):
        voted(range(k))
    assert contradiction(voted) is None
    voted([7])  # not the first of them
    assert contradiction(voted) is None
    voted(range(3))
    assert contradiction(voted) is None
    voted(range(2))
    assert contradiction(voted) == (2, 3)
