"""Name the faulty segments of a target: one replay with everything grafted, and what it shows."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorder.commands.outcome import UNTRUSTED
from recorder.errors import RecordingError, UsageError
from recorder.recording import Recording

from ..log import FOLDER, read_log
from ..session import Replayer
from ..settings import ReplaySettings
from ..trial import Replayed, replayed
from .judging import Sharpened
from .located import Located, located
from .segments import Place, cuts_of

if TYPE_CHECKING:
    import polars as pl

CHECK = "check.json"
"""What says, in the folder of a check, of which recording it was."""
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
    target: Sequence[str] | Callable[[], Any],
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
        target: a command's words; or a function, which is called in this process, of one rank.
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
    if repeat < 1:
        raise UsageError(f"repeat is {repeat}; it is how often to replay, 1 or more")
    if not (math.isfinite(truth_factor) and truth_factor > 0):
        raise UsageError(f"--truth-factor is {truth_factor:g}; it is how many times, above 0")
    recording = Recording.open(run)
    if out is not None and Path(out).resolve() == recording.path.resolve():
        raise UsageError("OUT is RUN itself; choose another folder for what the replay leaves")
    settings = settings_of(options)
    sharpened, was_checked = sharpened_by(recording, floor, truth, truth_factor, settings)
    logs: list[pl.DataFrame] = []
    problems: list[str] = []
    notes: list[str] = []
    status = 0
    for number in range(repeat):
        folder = (
            None if out is None else Path(out) if number == 0 else Path(out, f"repeat-{number}")
        )
        done = trial_of(recording, target, folder, settings, aside=aside)
        status = status or done.command_status
        notes += done.notes if number == 0 else []
        logs.append(done.log)
        problems += [one for one in done.failures if one not in problems]
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
    known = {one.name for one in ReplaySettings.options()}
    unknown = sorted({*options} - known)
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 2) or sorted(known)
        raise UsageError(f"{unknown[0]!r} is no option of a replay; there is {', '.join(close)}")
    return ReplaySettings.given({"metrics": False, **options, "own_error": True})


def trial_of(
    recording: Recording,
    target: Sequence[str] | Callable[[], Any],
    out: Path | None,
    settings: ReplaySettings,
    *,
    aside: bool = False,
) -> Replayed:
    """Replay onto a command, or onto a function that is called in this process.

    Args:
        recording: the baseline's.
        target: the command's words, or the function.
        out: the folder for the log; None to leave none.
        settings: how to replay.
        aside: whether what a command prints goes to stderr.

    Raises:
        RecordingError: the folder is taken, or cannot be written.
        UsageError: the command cannot be started.
    """
    if not callable(target):
        return replayed(recording, out, settings, target, aside=aside)
    given = {**vars(replace(settings, strict=False)), "out": out}
    session = Replayer(recording.path, **given)
    with session:
        target()
    summary = session.summary()
    notes = (f"replay: {summary.line()}",)
    failures = (session.reason,) if session.reason else ()
    return Replayed(0, tuple(session.problems()), notes, session.log(), summary, None, failures)


def _noisy(logs: Sequence[pl.DataFrame]) -> set[tuple[int, Place]]:
    """Return whose own values differ between repeats."""
    if len(logs) < 2:
        return set()
    seen: dict[tuple[int, Place], set[str]] = {}
    for log in logs:
        for one in cuts_of(log).cuts:
            seen.setdefault((one.rank, one.place), set()).add(one.row["digest"])
    return {place for place, digests in seen.items() if len(digests) > 1}


def sharpened_by(
    recording: Recording,
    floors: Sequence[str | os.PathLike[str]],
    truth: str | os.PathLike[str] | None,
    truth_factor: float,
    settings: ReplaySettings,
) -> tuple[Sharpened, bool]:
    """Return what floors and a truth say of clean segments, and whether a floor is a check's.

    Raises:
        RecordingError: one of them is neither a recording nor what a check left.
    """
    floor: dict[tuple[str, str, str], float] = {}
    was_checked = False
    for one in floors:
        if (Path(one) / FOLDER).is_dir():
            log = read_log(one)
            cuts = [cut for cut in cuts_of(log).cuts if cut.error is not None]
            if _checked_by(Path(one)) != recording.meta.get("id"):
                raise RecordingError(
                    f"{one} holds a replay, but no check of {recording.path}, so what differs "
                    "there may be the fault itself; make the floor with graft check"
                )
            was_checked = True
            errors = [(cut.place[:3], cut.error) for cut in cuts]
        else:
            errors = [(key[:3], error) for key, error in _differences(recording, one, settings)]
        for key, noise in errors:
            floor[key] = max(floor.get(key, 0.0), noise or 0.0)
    known: dict[tuple[str, str, str, int], float] = {}
    if truth is not None:
        for at, error in _differences(recording, truth, settings):
            known[at] = max(known.get(at, 0.0), error)
    return Sharpened(floor, known, truth_factor), was_checked


def _checked_by(folder: Path) -> object:
    """Return the id of the recording that was checked in a folder, "" where none was."""
    try:
        return json.loads((folder / CHECK).read_text())["recording"]
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _differences(
    recording: Recording, other: str | os.PathLike[str], settings: ReplaySettings
) -> list[tuple[tuple[str, str, str, int], float]]:
    """Return how far another recording is from the baseline: name, tags, kind, step -> error."""
    from ..diffing.diff import diff

    table = diff(recording.path, other, match_on=settings.match_on).pairs
    kept = table.filter(table["error"].is_not_null())
    return [
        ((row["name"], row["tags"], row["kind"], row["step"]), float(row["error"]))
        for row in kept.iter_rows(named=True)
    ]
