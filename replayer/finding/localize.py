"""Name the faulty segments of a target: one replay with everything grafted, and what it shows."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorder.commands.outcome import UNTRUSTED
from recorder.errors import UsageError
from recorder.recording import Recording
from recorder.sizes import count

from ..settings import ReplaySettings
from ..summary import Summary
from ..trial import Target, replayed
from .floors import sharpened_by
from .located import Located, located
from .segments import Place, cuts_of

if TYPE_CHECKING:
    import polars as pl

FAULT = 1
"""Exit status where a fault is named."""


@dataclass(frozen=True)
class Localized:
    """What a target's segments came to.

    Attributes:
        found: its segments, ranked.
        run: the baseline.
        out: the folder with the replay's log; None where none was kept.
        command: what was replayed, where it was a command.
        command_status: its exit status.
        problems: why the result is not to be trusted, a line each.
        notes: what else to say, a line each.
        was_checked: whether a replay of the baseline onto itself was given as a floor.
    """

    found: Located
    run: Recording
    out: Path | None
    command: tuple[str, ...]
    command_status: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    was_checked: bool

    @property
    def status(self) -> int:
        """COMMAND's own where that is not 0; 1 where a fault is named, 3 where not trusted."""
        if self.command_status:
            return self.command_status
        if self.problems:
            return UNTRUSTED
        return FAULT if self.found.faults else 0

    @property
    def segments(self) -> pl.DataFrame:
        """The segments as a table, the worst first."""
        return self.found.frame()


def localize(
    run: str | os.PathLike[str],
    target: Target,
    *,
    out: str | os.PathLike[str] | None = None,
    floor: Sequence[str | os.PathLike[str]] = (),
    truth: str | os.PathLike[str] | None = None,
    truth_factor: float = 2.0,
    repeat: int = 1,
    aside: bool = False,
    **options: Any,
) -> Localized:
    """Replay a target with all its taps grafted, and say which of its segments are faulty.

    Args:
        run: the baseline's recording.
        target: the words of a command, or a function of this process.
        out: a folder for the replay's log.
        floor: what `graft check` left of replays of the baseline onto itself, or second recordings
            of it: what differs there is no fault. It only raises limits.
        truth: a recording of the same model in higher precision: a segment may be off by
            `truth_factor` times what the baseline is off from it.
        truth_factor: see there.
        repeat: how often to replay; what differs between repeats is noise.
        aside: whether what the command prints goes to stderr.
        **options: as of `graft replay`, by their names there.

    Raises:
        RecordingError: a recording cannot be read, or `out` holds a replay already.
        UsageError: an option cannot be used, or the command cannot be started.
    """
    at_least_once(repeat)
    if not (math.isfinite(truth_factor) and truth_factor > 0):
        raise UsageError(f"--truth-factor is {truth_factor:g}; it is how many times, above 0")
    if callable(run):
        raise UsageError("the recording is a function; it comes first, and then what is to be run")
    if isinstance(floor, (str, os.PathLike)):
        floor = [floor]
    recording = Recording.open(run)
    settings = settings_of(options)
    sharpened, was_checked = sharpened_by(recording, floor, truth, truth_factor, settings)
    logs: list[pl.DataFrame] = []
    problems: list[str] = []
    notes: list[str] = []
    status = 0
    summary: Summary | None = None
    for number in range(repeat):
        folder = (
            None if out is None else Path(out) if number == 0 else Path(out, f"repeat-{number}")
        )
        done = replayed(recording, folder, settings, target, aside=aside)
        status = status or done.command_status
        notes += done.notes if number == 0 else []
        logs.append(done.log)
        wrong = [*done.failures, *(done.problems if settings.strict else ())]
        problems += [one for one in wrong if one not in problems]
        summary = done.summary if number == 0 else summary
    if status:
        notes.append(f"COMMAND ended with {status}; what it tapped until then is judged")
    found = located(logs[0], sharpened, _noisy(logs))
    if not found.segments and not problems:
        problems.append("nothing was grafted, so nothing is known of any segment")
    if found.trouble:
        problems.append(found.trouble)
    unjudged = [one for one in found.not_judged if not one.is_miss]
    if unjudged and not found.faults:
        problems.append(
            f"{unjudged[0].place.label} was not judged: {unjudged[0].why}"
            + (f" (and {len(unjudged) - 1} more)" if len(unjudged) > 1 else "")
        )
    missing = summary.outcomes.get("missing", 0) if summary is not None else 0
    is_known = bool(problems or found.faults or unjudged)
    if summary is not None and missing and summary.unused and not is_known:
        problems.append(
            f"{count(missing, 'tap')} had no record, the first: {summary.first_missing}; and "
            f"{count(summary.unused, 'record')} {'was' if summary.unused == 1 else 'were'} never "
            f"used, such as {', '.join(summary.unused_names[:3])}: what they end is not judged"
        )
    if settings.filter is not None:
        notes.append(
            "--filter left taps out, which cut nothing: behind them a segment also has what it "
            "inherits along paths that are not grafted"
        )
    return Localized(
        found,
        recording,
        None if out is None else Path(out),
        () if callable(target) else tuple(target),
        status,
        tuple(problems),
        tuple(notes),
        was_checked,
    )


def settings_of(options: Mapping[str, Any]) -> ReplaySettings:
    """Return the settings of a replay that measures own errors, and other figures if asked for.

    Raises:
        UsageError: an option is unknown, or cannot be used.
    """
    return ReplaySettings.named({"metrics": False, **options, "own_error": True})


def at_least_once(repeat: int) -> None:
    """Refuse a number of repeats that is none.

    Raises:
        UsageError: it is.
    """
    if repeat < 1:
        raise UsageError(f"repeat is {repeat}; it is how often to replay, 1 or more")


def _noisy(logs: Sequence[pl.DataFrame]) -> set[tuple[int, Place]]:
    """Return whose own values differ between repeats."""
    if len(logs) < 2:
        return set()
    seen: dict[tuple[int, Place], set[str]] = {}
    for log in logs:
        for one in cuts_of(log).cuts:
            seen.setdefault((one.rank, one.place), set()).add(one.row["digest"])
    return {place for place, digests in seen.items() if len(digests) > 1}
