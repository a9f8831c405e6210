"""The trials of a search: each a replay that grafts some of the taps, judged and written down.

A trial's verdict is what a watched tap differs from the baseline, or a script's exit status. Each
is a line of `OUT/trials.jsonl`; a search that was interrupted goes on from these.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorder.errors import Interrupted, RecordingError, RecordingExists, UsageError
from recorder.filters import Filter
from recorder.format import disk
from recorder.format.journal import whole_lines
from recorder.format.rows import parse_tags
from recorder.recording import Recording
from recorder.sizes import count
from recorder.tags import is_recompute

from ..diffing.columns import DiffRow, rows_of
from ..diffing.diff import diff
from ..match import MatchOn
from ..only import Tap, write
from ..settings import ReplaySettings
from ..trial import Target, replayed
from .search import Verdict

if TYPE_CHECKING:
    import polars as pl

TRIALS = "trials.jsonl"
SKIPPED = 125
"""The status of a script that cannot tell, as for `git bisect run`."""
_NOT_RUN = (126, 127)
Say = Callable[[str], None]
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


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

    @property
    def is_failed(self) -> bool:
        """Whether it has no verdict since the command failed."""
        return self.verdict is Verdict.SKIP and self.why == _failed(self.status)

    def as_line(self) -> dict[str, object]:
        """Return it as a line of the file of trials."""
        return {
            "trial": self.number,
            "taps": list(self.taps),
            "verdict": self.verdict.value,
            "why": self.why,
            "status": self.status,
        }


def _trial_of(line: Mapping[str, Any]) -> Trial:
    return Trial(
        line["trial"],
        tuple(line["taps"]),
        Verdict(line["verdict"]),
        line["why"],
        line["status"],
        is_old=True,
    )


@dataclass
class Trials:
    """Makes trials, and remembers those of an earlier search of the same.

    Attributes:
        recording: the baseline's.
        target: what is run.
        out: the folder of the trials.
        watch: which taps are to be as the baseline's; None where a script judges.
        tol: how far they may be off; None for as far as a diff takes for rounding.
        check: the script.
        settings: how to replay.
        say: hears of each trial.
        is_kept: whether the folder is kept, so that the search can be gone on with.
        taps: all of them, in the order of execution; known once it has begun.
        made: the trials, in the order in which they were made or used again.
        most: how many there will be at most, where that is known.
    """

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
    _known: list[Trial] = field(default_factory=list)  # each is used once
    _lines: list[Mapping[str, Any]] = field(default_factory=list)

    def begin(self) -> None:
        """Read what an earlier search left, or name the taps by a first trial.

        Raises:
            RecordingExists: the folder holds another search.
            RecordingError: no tap was grafted.
        UsageError: the script cannot be run.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / TRIALS
        if path.exists():
            if self._go_on(path):
                return
        elif any(self.out.iterdir()):
            raise RecordingExists(self.out, "holds other files", "name a new folder")
        else:
            self._write({"asked": self._asked()})
        self.say("trial 1: graft everything, which names the taps")
        log, status, why = self._replay(self.out / "trial-1", None)
        self.taps = _taps_of(log)
        if not self.taps:
            raise RecordingError(
                f"no tap was grafted{f' ({why})' if why else ''}, so there is nothing to search; "
                "see graft replay"
            )
        self._write({"named": [list(tap) for tap in self.taps]})
        everything = tuple(range(len(self.taps)))
        self._known.append(self._note(1, everything, self.out / "trial-1", status, why))

    def _go_on(self, path: Path) -> bool:
        """Read what an earlier search left; return whether its first trial was whole."""
        head, *lines = list(whole_lines(path)) or [{}]
        if "asked" not in head:
            raise RecordingError(f"{path} does not hold what it should; name another -o OUT")
        if head["asked"] != self._asked() and not any("trial" in line for line in lines):
            head, lines = {"asked": self._asked()}, []  # it came to nothing
        elif head["asked"] != self._asked():
            raise RecordingExists(
                self.out, "holds another search", "give its command again, or another -o OUT"
            )
        self.taps = [Tap(*one) for line in lines for one in line.get("named", ())]
        self._lines = [head, *lines] if self.taps else [head]
        self._known = [_trial_of(line) for line in self._lines if "trial" in line]
        if self.taps:
            self.say(f"going on after {count(len(self._known), 'trial')} in {self.out}")
        return bool(self.taps)

    def _write(self, line: Mapping[str, object]) -> None:
        """Add a line to the file, which is whole at any time."""
        self._lines.append(line)
        text = "".join(json.dumps(one) + "\n" for one in self._lines)
        disk.replace(self.out / TRIALS, text.encode(), durable=True)

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
        known = next((one for one in self._known if one.taps == chosen), None)
        if known is not None:
            self._known.remove(known)
            if known.is_old:
                self.made.append(known)
            return known.verdict
        number = 1 + max((one.number for one in (*self.made, *self._known)), default=0)
        about = f" of at most {self.most}" if self.most else ""
        names = f", up to {self.taps[chosen[-1]].label}" if chosen else ""
        self.say(f"trial {number}{about}: {len(chosen)} of {len(self.taps)} taps grafted{names}")
        folder = self.out / f"trial-{number}"
        _, status, why = self._replay(folder, [self.taps[i] for i in chosen])
        return self._note(number, chosen, folder, status, why).verdict

    def _note(
        self, number: int, chosen: tuple[int, ...], folder: Path, status: int, why: str
    ) -> Trial:
        verdict, told, status = self._verdict(chosen, folder, status, why)
        trial = Trial(number, chosen, verdict, told, status)
        self.made.append(trial)
        command = [] if callable(self.target) else list(self.target)
        self._write({**trial.as_line(), "command": command})
        self.say(f"trial {number} is {_WORDS[verdict]}: {told}")
        return trial

    def _replay(self, folder: Path, taps: Sequence[Tap] | None) -> tuple[pl.DataFrame, int, str]:
        """Replay onto the target: return the log, the command's status, and what went wrong."""
        settings = self.settings
        disk.remove_tree(folder)  # of a trial that was interrupted
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
            return Verdict.SKIP, _failed(status), status
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
        # The first has everything grafted, which a script that works finds good.
        if done.returncode in _NOT_RUN and not self.made:
            raise UsageError(
                f"--check {script!r} cannot be run: the shell ended with {done.returncode}; give a "
                "command that can, such as a script that is executable, by its path"
            )
        verdict = {0: Verdict.GOOD, SKIPPED: Verdict.SKIP}.get(done.returncode, Verdict.BAD)
        return verdict, f"the script ended with {done.returncode}", done.returncode

    def _watched(self, folder: Path) -> list[DiffRow]:
        """Return how each watched tap compares with the baseline."""
        # By order, only the watched ones of both sides can be counted; renamed, all was recorded.
        is_by_order = MatchOn.parse(self.settings.match_on).order
        is_chosen = is_by_order or bool(self.settings.rename)
        found = diff(
            self.recording, folder, match_on=self.settings.match_on,
            filter=self.watch if is_chosen else None,
            step_offset=self.settings.step_offset, rename=[r.text for r in self.settings.rename],
            ignore_missing=True,
        )  # fmt: skip
        compared = ("equal", "close", "differs", "shape", "error")
        return list(rows_of(found.pairs.filter(found.pairs["outcome"].is_in(compared))))


def _failed(status: int) -> str:
    return f"COMMAND ended with {status}"


_WORDS = {Verdict.GOOD: "good", Verdict.BAD: "bad", Verdict.SKIP: "without a verdict"}


def _tap_of(row: DiffRow) -> Tap:
    """Return the target's tap of a pair, as its own log names it."""
    return Tap(row["name_b"] or row["name"], row["tags_b"] or row["tags"], row["kind"])


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
        is_graft = row["kind"] in ("tensor", "grad") and row["outcome"] == "grafted"
        if is_graft and not is_recompute(parse_tags(row["tags"])):
            found.setdefault(Tap(row["name"], row["tags"], row["kind"]))
    return list(found)
