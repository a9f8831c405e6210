"""The search for a fault: bisection and delta debugging, over an oracle; nothing here runs a job.

A trial grafts some of n taps, numbered in the order of execution, and its verdict is what is seen
further on: good, bad, or nothing (`SKIP`). Grafting the first k of them cuts off whatever happened
before tap k.

1. `boundary` halves: with how few of the first taps grafted is the run good? The last of them ends
   the faulty segment. Both ends are confirmed first.
2. `smallest_set` is delta debugging (Zeller and Hildebrandt 2002, "Simplifying and Isolating
   Failure-Inducing Input", the algorithm ddmin): a set of taps whose graft repairs the run, from
   which no single one can be left out.
3. `Voted` asks an oracle several times where its verdicts are noisy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum


class Verdict(Enum):
    """What came of a trial."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


Oracle = Callable[[Sequence[int]], Verdict]
"""The verdict of a trial with these taps grafted, ascending."""


@dataclass(frozen=True)
class Boundary:
    """Where a run turns good.

    Attributes:
        bad: with so many of the first taps grafted it is bad.
        good: with so many it is good; the fault lies after tap `bad` - 1 and before tap `good` - 1
            is overwritten. It is `bad` + 1 unless trials in between had no verdict.
        skipped: numbers in between without a verdict.
        trouble: why there is no boundary, "" where there is one.
    """

    bad: int
    good: int
    skipped: tuple[int, ...] = ()
    trouble: str = ""


NOT_BAD = "the run is good with nothing grafted"
NOT_GOOD = "the run is bad with everything grafted"
NO_VERDICT = "the run has no verdict with {what} grafted"


def boundary(n: int, oracle: Oracle) -> Boundary:
    """Return with how few of the first of `n` taps grafted the run is good.

    It takes at most ceil(log2 n) + 2 trials, and one more for each that has no verdict.

    Args:
        n: how many taps there are, at least 1.
        oracle: the verdict of a trial.
    """

    def at(k: int) -> Verdict:
        return oracle(range(k))

    for k, wanted, wrong, what in (
        (0, Verdict.BAD, NOT_BAD, "nothing"),
        (n, Verdict.GOOD, NOT_GOOD, "everything"),
    ):
        found = at(k)
        if found is not wanted:
            return Boundary(
                0, n, (), NO_VERDICT.format(what=what) if found is Verdict.SKIP else wrong
            )
    bad, good = 0, n
    skipped: set[int] = set()
    while True:
        open_ones = [k for k in range(bad + 1, good) if k not in skipped]
        if not open_ones:
            return Boundary(bad, good, tuple(sorted(k for k in skipped if bad < k < good)))
        middle = (bad + good) / 2
        k = min(open_ones, key=lambda one: (abs(one - middle), one))
        found = at(k)
        if found is Verdict.SKIP:
            skipped.add(k)
        elif found is Verdict.GOOD:
            good = k
        else:
            bad = k


def steps_of(n: int) -> int:
    """Return how many trials `boundary` takes at most, if all have a verdict."""
    return math.ceil(math.log2(n)) + 2 if n > 1 else 2


def smallest_set(taps: Sequence[int], oracle: Oracle) -> list[int]:
    """Return taps whose graft makes the run good, none of which can be left out.

    A trial without a verdict counts as bad: what it left out is kept.

    Args:
        taps: whose graft makes it good, ascending.
        oracle: the verdict of a trial.
    """
    kept, parts = list(taps), 2
    while len(kept) > 1:
        blocks = list(_blocks(kept, min(parts, len(kept))))
        found = next((block for block in blocks if _is_good(oracle, block)), None)
        if found is not None:
            kept, parts = found, 2
            continue
        rest = None
        if len(blocks) > 2:  # of two, each is what the other leaves
            rests = ([tap for tap in kept if tap not in {*block}] for block in blocks)
            rest = next((one for one in rests if _is_good(oracle, one)), None)
        if rest is not None:
            kept, parts = rest, max(len(blocks) - 1, 2)
        elif len(blocks) == len(kept):
            break
        else:
            parts = 2 * len(blocks)
    return kept


def _is_good(oracle: Oracle, taps: Sequence[int]) -> bool:
    return oracle(taps) is Verdict.GOOD


def _blocks(items: Sequence[int], parts: int) -> Iterator[list[int]]:
    start = 0
    for i in range(parts):
        end = start + (len(items) - start) // (parts - i)
        yield list(items[start:end])
        start = end


@dataclass
class Voted:
    """An oracle that asks another several times, and remembers.

    Attributes:
        oracle: asked about one trial.
        times: how often at most; it ends once a majority is certain.
        votes: of each set of taps, the verdicts.
    """

    oracle: Oracle
    times: int = 1
    votes: dict[tuple[int, ...], list[Verdict]] = field(default_factory=dict)

    def __call__(self, taps: Sequence[int]) -> Verdict:
        """Return the verdict of most trials of these taps; none where good and bad are as many."""
        votes = self.votes.setdefault(tuple(taps), [])
        while len(votes) < self.times and not self._is_certain(votes):
            votes.append(self.oracle(taps))
        good, bad = votes.count(Verdict.GOOD), votes.count(Verdict.BAD)
        if good == bad:
            return Verdict.SKIP
        return Verdict.GOOD if good > bad else Verdict.BAD

    def _is_certain(self, votes: Sequence[Verdict]) -> bool:
        left = self.times - len(votes)
        return abs(votes.count(Verdict.GOOD) - votes.count(Verdict.BAD)) > left

    @property
    def noisy(self) -> list[tuple[int, ...]]:
        """The sets of taps whose trials did not all say the same."""
        return [taps for taps, votes in self.votes.items() if len({*votes} - {Verdict.SKIP}) > 1]


def contradiction(votes: Voted) -> tuple[int, int] | None:
    """Return two numbers of first taps of which the smaller is good and the larger bad, if any.

    Then the run does not turn good once: its faults hide each other, or its verdicts are noise.
    """
    known = {
        len(taps): votes(taps) for taps in list(votes.votes) if list(taps) == list(range(len(taps)))
    }
    good = [k for k, verdict in known.items() if verdict is Verdict.GOOD]
    bad = [k for k, verdict in known.items() if verdict is Verdict.BAD]
    if good and bad and min(good) < max(bad):
        return min(good), max(bad)
    return None
