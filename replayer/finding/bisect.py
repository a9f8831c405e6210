"""Find the faulty segment by trials, each a replay that grafts some of the taps.

For what one pass cannot settle: few taps, state that goes round them, a fault that needs an
inherited error to show. `search` chooses the trials, and `trials` makes them.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorder.commands.outcome import UNTRUSTED
from recorder.errors import UsageError
from recorder.filters import Filter
from recorder.format.tables import to_frame
from recorder.recording import Recording

from ..foreseen import check_watched
from ..only import Tap
from ..trial import Target
from .localize import at_least_once, settings_of
from .search import Boundary, Voted, boundary, contradiction, smallest_set, steps_of
from .trials import Say, Trial, Trials

if TYPE_CHECKING:
    import polars as pl

COLUMNS = {
    "trial": "Int64",
    "taps": "List(Int64)",
    "verdict": "String",
    "why": "String",
    "status": "Int64",
    "is_old": "Boolean",
}


@dataclass(frozen=True)
class Bisected:
    """What a search came to.

    Attributes:
        taps: all of them, in the order of execution.
        boundary: with how few of the first of them grafted the run is good; None of a dry run.
        smallest: taps whose graft makes the run good, none of which can be left out; None where
            that was not asked for, and the verdicts do not contradict each other.
        contradicts: two numbers of first taps, of which the smaller is good and the larger bad;
            None where there are none.
        noisy: numbers of taps whose trials did not all say the same.
        trials: in the order in which they were made.
        out: the folder with the trials.
        most: how many trials the boundary takes at most.
    """

    taps: tuple[Tap, ...]
    boundary: Boundary | None
    smallest: tuple[int, ...] | None
    contradicts: tuple[int, int] | None
    noisy: tuple[int, ...]
    trials: tuple[Trial, ...]
    out: Path | None
    most: int

    @property
    def status(self) -> int:
        """0 where the boundary was found, 3 where there is none or verdicts contradict.

        COMMAND's own where it failed in every trial.
        """
        if self.boundary is None:
            return 0
        if self.trials and all(one.is_failed for one in self.trials):
            return self.trials[0].status
        return UNTRUSTED if self.boundary.trouble or self.contradicts else 0

    @property
    def found(self) -> Tap | None:
        """The tap that ends the faulty segment, None where the search named none."""
        if self.boundary is None or self.boundary.trouble:
            return None
        return self.taps[self.boundary.good - 1]

    def frame(self) -> pl.DataFrame:
        """Return the trials as a table."""
        rows = [
            {**vars(one), "trial": one.number, "verdict": one.verdict.value, "taps": [*one.taps]}
            for one in self.trials
        ]
        return to_frame(rows, COLUMNS)


def bisect(
    run: str | os.PathLike[str],
    target: Target,
    *,
    out: str | os.PathLike[str] | None = None,
    watch: str | Filter | None = None,
    tol: float | None = None,
    check: str | None = None,
    minimal_set: bool = False,
    repeat: int = 1,
    dry_run: bool = False,
    say: Say | None = None,
    **options: Any,
) -> Bisected:
    """Find with how few of the first taps grafted a target is good.

    Args:
        run: the baseline's recording.
        target: the words of a command, or a function of this process.
        out: a folder for the trials; a search that it holds is gone on with.
        watch: which taps are to be as the baseline's, as a filter.
        tol: how far they may be off, relative to their size; by default as far as a diff takes for
            rounding.
        check: a shell command that judges a trial, whose folder is `GRAFT_TRIAL`: status 0 is good,
            125 no verdict, anything else bad. Instead of `watch`.
        minimal_set: also find a smallest set of taps whose graft makes the run good.
        repeat: how often a trial is made at most; its verdict is what most say.
        dry_run: only name the taps, by one trial, and say what the search would cost.
        say: hears of each trial.
        **options: as of `graft replay`, by their names there.

    Raises:
        Interrupted: the command was, by SIGINT or SIGTERM.
        RecordingError: the recording cannot be read, or `out` holds another search.
        UsageError: an option cannot be used, or the command cannot be started.
    """
    if (watch is None) == (check is None):
        raise UsageError("give either --watch EXPR or --check SCRIPT, which a verdict comes from")
    if tol is not None and (watch is None or not tol >= 0):
        raise UsageError(f"--tol {tol:g} is how far a watched tap may be off, 0 or more")
    if check is not None and not isinstance(check, str):
        raise UsageError(f"check is a {type(check).__name__}; give a shell command, as text")
    at_least_once(repeat)
    watched = Filter.parse(watch) if isinstance(watch, str) else watch
    recording = Recording.open(run)
    if watched is not None:
        check_watched(recording, watched)
    # It speaks of the baseline's names: with others, all is recorded, and chosen afterwards.
    record = Filter.parse("True") if watched is not None and options.get("rename") else watched
    settings = settings_of({**options, "only": None, "record": record, "own_error": False})
    with nullcontext(str(out)) if out is not None else tempfile.TemporaryDirectory() as folder:
        trials = Trials(
            recording, target, Path(folder), watched, tol, check, settings, say or _nothing,
            out is not None,
        )  # fmt: skip
        trials.begin()
        n = len(trials.taps)
        if dry_run:
            place = None if out is None else Path(out)
            return Bisected(tuple(trials.taps), None, None, None, (), (), place, steps_of(n))
        oracle = Voted(trials.judge, repeat)
        trials.most = steps_of(n)
        found = boundary(n, oracle)
        against = contradiction(oracle)
        smallest = None
        if (minimal_set or against) and found.trouble == "":
            trials.most = None
            smallest = tuple(smallest_set(range(n), oracle))
        noisy = tuple(len(taps) for taps in oracle.noisy)
        made = tuple(trials.made)
    return Bisected(
        tuple(trials.taps), found, smallest, against, noisy, made,
        None if out is None else Path(out), steps_of(n),
    )  # fmt: skip


def _nothing(line: str) -> None:
    """Say nothing."""
