"""Find the faulty segment by trials, each a replay that grafts some of the taps.

For what one pass cannot settle: few taps, state that goes round them, a fault that needs an
inherited error to show. `search` chooses the trials; here they are run, judged and written down.

1. A trial with everything grafted names the taps, in order of execution.
2. A trial's verdict is what a watched tap differs from the baseline, or a script's exit status.
3. Each trial is a line of `OUT/trials.jsonl`; a search that was interrupted goes on from these.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorder.commands.outcome import UNTRUSTED
from recorder.errors import Interrupted, RecordingError, RecordingExists, UsageError
from recorder.filters import Filter
from recorder.format import disk
from recorder.format.rows import parse_tags
from recorder.format.tables import to_frame
from recorder.recording import Recording
from recorder.sizes import count
from recorder.tags import RECOMPUTE, canonical, is_recompute

from ..diffing.columns import DiffRow, rows_of
from ..diffing.diff import diff
from ..match import MatchOn
from ..only import Tap, write
from ..settings import ReplaySettings
from ..trial import Target, replayed
from .localize import at_least_once, settings_of
from .search import Boundary, Verdict, Voted, boundary, contradiction, smallest_set, steps_of

if TYPE_CHECKING:
    import polars as pl

TRIALS = "trials.jsonl"
SKIPPED = 125
"""The status of a script that cannot tell, as for `git bisect run`."""
COLUMNS = {
    "trial": "Int64",
    "taps": "List(Int64)",
    "verdict": "String",
    "why": "String",
    "status": "Int64",
    "is_old": "Boolean",
}


@dataclass(frozen=True)
class Trial:
    """One replay of a search.

    Attributes:
        number: of the trial, from 1.
        taps: the numbers of the taps that were grafted.
        verdict: what came of it.
        why: what the verdict goes by.
        status: the exit status of the command, or of the script that judged it.
        is_old: whether an earlier search that was interrupted made it.
    """

    number: int
    taps: tuple[int, ...]
    verdict: Verdict
    why: str
    status: int
    is_old: bool = False


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
        """0 where the boundary was found, 3 where there is none or verdicts contradict."""
        if self.boundary is None:
            return 0
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


Say = Callable[[str], None]
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


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
    at_least_once(repeat)
    watched = Filter.parse(watch) if isinstance(watch, str) else watch
    recording = Recording.open(run)
    settings = settings_of({**options, "only": None, "record": watched, "own_error": False})
    with nullcontext(str(out)) if out is not None else tempfile.TemporaryDirectory() as folder:
        trials = _Trials(
            recording, target, Path(folder), watched, tol, check, settings, say or _say_nothing,
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


def _say_nothing(line: str) -> None:
    pass


@dataclass
class _Trials:
    """Makes trials, and remembers those of an earlier search of the same."""

    recording: Recording
    target: Target
    out: Path
    watch: Filter | None
    tol: float | None
    check: str | None
    settings: ReplaySettings
    say: Say
    is_kept: bool
    taps: list[Tap] = field(default_factory=list)
    made: list[Trial] = field(default_factory=list)
    most: int | None = None
    _old: list[Trial] = field(default_factory=list)

    def begin(self) -> None:
        """Read what an earlier search left, or name the taps by a first trial.

        Raises:
            RecordingExists: the folder holds another search.
            RecordingError: no tap was grafted.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / TRIALS
        asked = self._asked()
        if path.exists():
            head, *lines = _whole_lines(path)
            if head.get("asked") != asked:
                raise RecordingExists(
                    self.out, "holds another search", "give its command again, or another -o OUT"
                )
            named = [Tap(*one) for line in lines for one in line.get("named", ())]
            trials = [line for line in lines if "trial" in line] if named else []
            self.taps = named
            self._old = [
                Trial(
                    one["trial"], tuple(one["taps"]), Verdict(one["verdict"]), one["why"],
                    one["status"], is_old=True,
                )
                for one in trials
            ]  # fmt: skip
            _rewrite(path, [head, *lines] if named else [head])
            if named:
                self.say(f"going on after {count(len(trials), 'trial')} in {self.out}")
                return
        elif any(self.out.iterdir()):
            raise RecordingExists(self.out, "holds other files", "name a new folder")
        else:
            _append(path, {"asked": asked})
        self.say("trial 1: graft everything, which names the taps")
        log, status, why = self._replay(self.out / "trial-1", None)
        self.taps = _taps_of(log)
        if not self.taps:
            raise RecordingError(
                f"no tap was grafted{f' ({why})' if why else ''}, so there is nothing to search; "
                "see graft replay"
            )
        _append(path, {"named": [list(tap) for tap in self.taps]})
        self._note(tuple(range(len(self.taps))), self.out / "trial-1", status, why)

    def _asked(self) -> dict[str, object]:
        """Return what makes a search the same."""
        return {
            "recording": self.recording.meta.get("id"),
            "command": "a function" if callable(self.target) else list(self.target),
            "watch": self.watch.text if self.watch else None,
            "tol": self.tol,
            "check": self.check,
            "settings": {k: str(v) for k, v in self.settings.variables().items()},
        }

    def judge(self, taps: Sequence[int]) -> Verdict:
        """Return the verdict of a trial with these taps grafted."""
        chosen = tuple(taps)
        old = next((one for one in self._old if one.taps == chosen), None)
        if old is not None:
            self._old.remove(old)
            self.made.append(old)
            return old.verdict
        first = next((one for one in self.made if not one.is_old and one.taps == chosen), None)
        if first is not None and first.number == 1 and not self._was_used:
            self._was_used = True
            return first.verdict
        number = 1 + max((one.number for one in (*self.made, *self._old)), default=0)
        about = f" of at most {self.most}" if self.most else ""
        names = f", up to {self.taps[chosen[-1]].label}" if chosen else ""
        self.say(f"trial {number}{about}: {len(chosen)} of {len(self.taps)} taps grafted{names}")
        folder = self.out / f"trial-{number}"
        log, status, why = self._replay(folder, [self.taps[i] for i in chosen])
        del log
        return self._note(chosen, folder, status, why, number)

    _was_used: bool = False

    def _note(
        self, chosen: tuple[int, ...], folder: Path, status: int, why: str, number: int = 1
    ) -> Verdict:
        verdict, told, status = self._verdict(chosen, folder, status, why)
        trial = Trial(number, chosen, verdict, told, status)
        self.made.append(trial)
        line = {
            "trial": number, "taps": list(chosen), "verdict": verdict.value, "why": told,
            "status": status, "command": [] if callable(self.target) else list(self.target),
        }  # fmt: skip
        _append(self.out / TRIALS, line)
        self.say(f"trial {number} is {_WORDS[verdict]}: {told}")
        return verdict

    def _replay(self, folder: Path, taps: Sequence[Tap] | None) -> tuple[pl.DataFrame, int, str]:
        """Replay onto the target: return the log, the command's status, and what went wrong."""
        settings = self.settings
        _clear(folder)
        folder.mkdir(parents=True)
        if taps is not None:
            path = folder / "taps.json"
            write(path, taps)
            settings = replace(settings, only=str(path.resolve()))
        done = replayed(self.recording, folder, settings, self.target, aside=True)
        if done.command_status in _INTERRUPTED:
            kept = "; the same command goes on from there" if self.is_kept else ""
            raise Interrupted(f"interrupted in {folder.name}{kept}", done.command_status)
        beside = done.recording.problems if done.recording is not None else ()
        return done.log, done.command_status, "; ".join([*done.failures, *beside])

    def _verdict(
        self, chosen: Sequence[int], folder: Path, status: int, why: str
    ) -> tuple[Verdict, str, int]:
        """Return what came of a trial, what that goes by, and the status that decided."""
        if status:
            return Verdict.SKIP, f"COMMAND ended with {status}", status
        if why:
            return Verdict.SKIP, why, status
        if self.check is not None:
            return self._asked_of_script(self.check, folder)
        grafted = {self.taps[i] for i in chosen}
        try:
            pairs = self._watched(folder)
        except RecordingError as err:
            return Verdict.SKIP, f"what was watched cannot be compared: {err}", status
        if not pairs:
            return Verdict.SKIP, "no watched tap was met; see --watch", status
        left = [row for row in pairs if _tap_of(row) not in grafted]
        if not left:  # what it had computed itself is overwritten
            return Verdict.GOOD, "all that is watched was grafted itself", status
        return *_of_pairs(left, self.tol), status

    def _asked_of_script(self, script: str, folder: Path) -> tuple[Verdict, str, int]:
        done = subprocess.run(
            script, shell=True, check=False, stdout=sys.stderr,
            env={**os.environ, "GRAFT_TRIAL": str(folder.resolve())},
        )  # fmt: skip
        verdict = {0: Verdict.GOOD, SKIPPED: Verdict.SKIP}.get(done.returncode, Verdict.BAD)
        return verdict, f"the script ended with {done.returncode}", done.returncode

    def _watched(self, folder: Path) -> list[DiffRow]:
        """Return how each watched tap compares with the baseline."""
        # By order, only the watched ones of both sides can be counted.
        is_by_order = MatchOn.parse(self.settings.match_on).order
        found = diff(
            self.recording, folder, match_on=self.settings.match_on,
            filter=self.watch if is_by_order else None,
            step_offset=self.settings.step_offset, ignore_missing=True,
        )  # fmt: skip
        compared = ("equal", "close", "differs", "shape", "error")
        return list(rows_of(found.pairs.filter(found.pairs["outcome"].is_in(compared))))


_WORDS = {Verdict.GOOD: "good", Verdict.BAD: "bad", Verdict.SKIP: "without a verdict"}


def _tap_of(row: DiffRow) -> Tap:
    return Tap(row["name"], row["tags"], row["kind"])


def _of_pairs(pairs: Sequence[DiffRow], tol: float | None) -> tuple[Verdict, str]:
    worst: tuple[float, str] = (-1.0, "")
    bad = None
    for row in pairs:
        name = f"{_tap_of(row).label} step={row['step']}"
        if row["outcome"] in ("shape", "error"):
            return Verdict.SKIP, f"{name} cannot be compared: {row['message']}"
        is_odd = any((row["nan_a"], row["nan_b"], row["inf_a"], row["inf_b"]))
        error = row["error"]
        if error is None:  # of what is exact, equal, or one step off
            error = math.sqrt(2 * (row["rel_diff"] or 0.0))
        if error > worst[0]:
            worst = error, name
        is_beyond = row["outcome"] == "differs" if tol is None else error > tol
        if (is_odd or is_beyond) and bad is None:
            odd = ", and not finite in places" if is_odd else ""
            bad = f"{name} is off by {error:.2e} of its size{odd}"
    if bad is not None:
        return Verdict.BAD, bad
    return Verdict.GOOD, f"{worst[1]} is off by {worst[0]:.2e} of its size, the most"


def _taps_of(log: pl.DataFrame) -> list[Tap]:
    """Return the taps that were grafted, in the order in which the first rank met them."""
    found: dict[Tap, None] = {}
    for row in log.sort("step", "seq", "rank").iter_rows(named=True):
        if row["kind"] in ("tensor", "grad") and row["outcome"] == "grafted":
            tags = parse_tags(row["tags"])
            if is_recompute(tags):
                continue
            kept = {tag: value for tag, value in tags.items() if tag != RECOMPUTE}
            found.setdefault(Tap(row["name"], canonical(kept), row["kind"]))
    return list(found)


def _append(path: Path, line: dict[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[Any]:
    """Return the lines of a search, without one that was torn."""
    found: list[Any] = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    if not found or not isinstance(found[0], dict) or "asked" not in found[0]:
        raise RecordingError(f"{path} does not hold what it should; name another -o OUT")
    return found


def _rewrite(path: Path, lines: Sequence[object]) -> None:
    """Write lines anew, without what was torn behind them."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    disk.replace(path, text.encode())


def _clear(folder: Path) -> None:
    """Remove what an interrupted trial left."""
    if folder.exists():
        shutil.rmtree(folder)
