"""One trial: a target run under a replay, and what that came to; prints nothing.

1. `replayed` runs a command (`_of_command`) or a function of this process (`_of_function`).
2. A command's folder is prepared (`prepare`), its settings go into its environment, and what its
   ranks reported is read.
3. `_concluded` holds the log against the records that could have been used.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from recorder.commands import launch
from recorder.commands.outcome import (
    UNTRUSTED,
    Outcome,
    conclude,
    of_tables,
    order_in,
    rank_of_wrapper,
    reports_of,
    with_table,
)
from recorder.commands.outcome import prepare as prepare_recording
from recorder.commands.processes import Processes
from recorder.errors import DamagedRecording, RecordingError, RecordingExists, UsageError
from recorder.format import disk
from recorder.format.schema import rank_folder
from recorder.format.tables import to_frame
from recorder.job import Job
from recorder.mailbox import failures_of, why_nothing
from recorder.progress import read_progress
from recorder.settings import RecordSettings
from recorder.taps import control

from .log import COLUMNS, FOLDER, leave_columns, read_log, seal_leftovers
from .session import Replayer
from .settings import ReplaySettings
from .summary import Summary, summarize

if TYPE_CHECKING:
    import polars as pl

    from recorder.mailbox import Report
    from recorder.recording import Recording


@dataclass(frozen=True)
class Replayed:
    """What a target came to that ran under a replay.

    Attributes:
        command_status: its own exit status; 128 + N where signal N ended it; 0 of a function.
        problems: why the replay is not to be trusted, a line each; empty where it is.
        notes: what else to say of it, a line each.
        log: a row for each tap that was looked at, of all ranks.
        summary: the log, counted.
        recording: what was recorded beside it came to; None where nothing was to be.
        failures: those of the problems that are no single graft's: of a rank, or of its log.
        world_size: how many ranks it had, as far as they said.
    """

    command_status: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    log: pl.DataFrame
    summary: Summary
    recording: Outcome | None = None
    failures: tuple[str, ...] = ()
    world_size: int = 1

    @property
    def status(self) -> int:
        """The exit status of the whole: COMMAND's own where that is not 0, else 0 or 3."""
        beside = self.recording.status if self.recording else 0
        return self.command_status or (UNTRUSTED if self.problems else beside)


Target = Union[Sequence[str], Callable[[], Any]]
"""The words of a command; or a function, which is called in this process, of one rank."""


def replayed(
    recording: Recording,
    out: str | os.PathLike[str] | None,
    settings: ReplaySettings,
    target: Target,
    *,
    aside: bool = False,
) -> Replayed:
    """Run a target, its taps overwritten from a recording.

    Args:
        recording: the baseline's.
        out: the folder for the log, and for what `settings.record` keeps; None to leave nothing.
        settings: how to replay.
        target: what to run.
        aside: whether what a command prints goes to stderr.

    Raises:
        RecordingError: the folder is taken, or cannot be written.
        UsageError: the settings do not fit together, or the command cannot be started.
    """
    if settings.record is not None and out is None:
        raise UsageError("--record needs a folder to record into; give -o OUT too")
    folder = None if out is None else Path(os.path.abspath(out))
    if folder is not None and folder.resolve() == recording.path.resolve():
        raise UsageError("OUT is RUN itself; choose another folder for what the replay leaves")
    if callable(target):
        return _of_function(recording, folder, settings, target)
    if isinstance(target, str):
        raise UsageError(f"the command {target!r} is one text; give its words: {target.split()}")
    launch.check(target)
    settings = with_table(settings)
    return _of_command(recording, folder, settings, target, aside)


def _of_function(
    recording: Recording, out: Path | None, settings: ReplaySettings, target: Callable[[], Any]
) -> Replayed:
    # What is strict about it is said, as a command's is, and not raised.
    session = Replayer(recording.path, **{**vars(replace(settings, strict=False)), "out": out})
    with session:
        target()
    summary = session.summary()
    failures = (session.reason,) if session.reason else ()
    notes = (f"replay: {summary.line()}", *summary.notes)
    return Replayed(
        0, tuple(session.problems(settings.strict)), notes, session.log(), summary, None, failures
    )


def _of_command(
    recording: Recording,
    out: Path | None,
    settings: ReplaySettings,
    command: Sequence[str],
    aside: bool,
) -> Replayed:
    with launch.reports_folder() as reports, tempfile.TemporaryDirectory(prefix="graft-") as spare:
        folder = out or Path(spare)
        if out:
            prepare(folder, settings.overwrite, records=settings.record is not None)
        variables = {
            settings.PREFIX: str(recording.path.resolve()),
            f"{settings.PREFIX}_OUT": str(folder),
            **settings.variables(),
        }
        env = launch.environment(variables, command, reports)
        processes = Processes()
        look = processes.look if settings.wants_modules else None
        status = launch.run(command, env, aside, look)
        beside = None
        if settings.record is not None and out is not None:
            found = reports_of(RecordSettings.PREFIX, reports)
            progress = read_progress(reports)
            problems, notes = conclude(out, env["GRAFT_JOB"], settings.record, found, progress)
            beside = Outcome(status, tuple(problems), tuple(notes))
        done = _concluded(
            folder, recording, settings, reports_of(settings.PREFIX, reports), status, beside
        )
        said = of_tables(settings, reports, processes)
        return replace(done, notes=(*done.notes, *said))


def prepare(folder: Path, overwrite: bool, records: bool) -> None:
    """Refuse, or with `overwrite` clear, a folder that holds a replay, as far as can be known.

    Raises:
        RecordingExists: it holds a replay, or a recording where one is to be made.
        RecordingError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise RecordingError(f"{folder} is a file; name a folder for the replay's log")
    rank = rank_of_wrapper()
    pattern = f"{rank_folder(rank.rank)}-*" if rank else "rank-*"
    logs = [p for p in (folder / FOLDER).glob(pattern) if p.suffix in (".parquet", ".journal")]
    if overwrite:
        disk.remove(folder / control.FILE)
        for path in logs:
            disk.remove(path)
    elif logs and "GRAFT_JOB" not in os.environ and not (rank and Job.from_environment().attempt):
        raise RecordingExists(folder, "holds the log of a replay already")
    if records:
        prepare_recording(folder, overwrite)
    try:
        disk.make_folder(folder / FOLDER)
    except OSError as err:
        raise RecordingError(
            f"{folder} cannot be made: {err.strerror or err}; choose a folder you may write to"
        ) from err


def _concluded(
    folder: Path,
    recording: Recording,
    settings: ReplaySettings,
    reports: Sequence[Report],
    status: int,
    beside: Outcome | None,
) -> Replayed:
    wrong = failures_of(reports)
    try:
        seal_leftovers(folder)
        leave_columns(folder)
        log = read_log(folder)
    except (DamagedRecording, OSError) as err:  # what it came to is not known then
        problems, empty = (*sorted(wrong), str(err)), to_frame([], COLUMNS)
        nothing = Summary({}, "", "", 0, 0, ())
        return Replayed(status, problems, (), empty, nothing, beside, problems)
    receivers = max((r.get("world_size", 1) for r in reports), default=1)
    last = log["rank"].max()
    if isinstance(last, int):
        receivers = max(receivers, last + 1)
    records = recording.latest()
    summary = summarize(log, records, settings, receivers)
    notes = [f"replay: {summary.line()}", *summary.notes]
    order = order_in(folder)
    if not log.height and not order.is_on:
        notes.append(f"it is off; switch it on with: graft ctl {folder} on")
    elif not log.height and (why := why_nothing(order.filter or settings.filter, reports)):
        notes.append(why)
    refused = sum(r.get("refused", 0) for r in reports)
    problems = (*sorted(wrong), *summary.problems(settings.strict, refused, status))
    failures = tuple(sorted(wrong))
    return Replayed(status, problems, tuple(notes), log, summary, beside, failures, receivers)
