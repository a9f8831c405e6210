"""What a check and a search by trials came to, in lines for people."""

from __future__ import annotations

from recorder.commands.tables import span
from recorder.diagnostics import printable
from recorder.sizes import count

from ..finding.bisect import Bisected
from ..finding.check import Checked
from ..finding.search import NOT_BAD, NOT_GOOD

_NAMED = 3  # taps, where there is room for no more


def check_lines(done: Checked) -> list[str]:
    """Return what a check came to, a line each."""
    if done.command_status or (done.problems and not done.changed):
        return []
    what = count(done.taps, "tap")
    if not done.changed:
        times = "" if done.repeats == 1 else f" in {done.repeats} replays"
        found = [
            f"unchanged: {what} of the baseline replayed onto itself{times}, every bit as recorded"
        ]
        if done.out is not None:
            found.append(f"next: graft localize {done.run} --floor {done.out} -- TARGET")
        return [printable(line) for line in found]
    first = done.changed[0]
    ranks = f" on rank {span(list(first.ranks))}"
    far = "" if first.error is None else f", off by {first.error:.1e} of their size"
    times = "" if done.repeats == 1 else f", in {first.repeats} of {done.repeats} replays"
    elements = f": {count(first.elements, 'element')}{far}" if first.elements else ": another value"
    found = [
        f"changed: {len(done.changed)} of {what}, first {first.place.label} "
        f"step={first.place.step}{ranks}{elements}{times}",
    ]
    if done.why:
        found.append(done.why)
    return [printable(line) for line in found]


def bisect_lines(done: Bisected) -> list[str]:
    """Return what a search came to, a line each."""
    n = len(done.taps)
    if done.boundary is None:
        return [
            printable(f"{count(n, 'tap')}: {done.taps[0].label} to {done.taps[-1].label}"),
            f"the search takes at most {count(done.most, 'trial')}, the one just made among them; "
            "each is a run of COMMAND, times --repeat where verdicts are noisy",
        ]
    found = []
    if done.boundary.trouble:
        found.append(f"no boundary: {done.boundary.trouble}{_way_out(done)}")
    else:
        end = done.taps[done.boundary.good - 1].label
        if done.boundary.bad == 0:
            begin = "before it, from the beginning"
        else:
            begin = f"behind {done.taps[done.boundary.bad - 1].label}"
        found.append(
            f"the fault lies before {end} and {begin}: grafted up to there the run is good"
        )
        if done.boundary.skipped:
            skipped = ", ".join(done.taps[k - 1].label for k in done.boundary.skipped[:_NAMED])
            found.append(f"no verdict in between, up to {skipped}")
    if done.contradicts:
        good, bad = done.contradicts
        found.append(
            f"verdicts contradict each other: good with the first {good} taps grafted, bad with "
            f"the first {bad}; either faults hide each other, or verdicts are noise (--repeat)"
        )
    if done.smallest is not None:
        named = ", ".join(done.taps[i].label for i in done.smallest)
        found.append(f"smallest set of taps whose graft makes the run good: {named}")
    if done.noisy:
        found.append(f"{count(len(done.noisy), 'trial')} did not say the same each time")
    old = sum(one.is_old for one in done.trials)
    made = count(len(done.trials), "trial") + (f", {old} of them made before" if old else "")
    if old == len(done.trials) > 0:
        made += "; nothing was run now: name a new -o OUT to search a target that has changed"
    where = f"; see {done.out}" if done.out is not None else ""
    found.append(f"{made}{where}")
    return [printable(line) for line in found]


def _way_out(done: Bisected) -> str:
    trouble = done.boundary.trouble if done.boundary is not None else ""
    if trouble == NOT_BAD:
        return "; there is no fault to be seen there: watch another tap, or lower --tol"
    if trouble == NOT_GOOD:
        return (
            "; the fault lies behind the last tap, or in state that goes round the taps: tap more"
        )
    return "; look at that trial's output, or judge it by another --watch or --check"
