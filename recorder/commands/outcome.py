"""Run a command under `graft record`, and say what its recording came to; prints nothing.

1. `recorded` prepares the folder (`prepare`), runs the command with the settings in its
   environment, and reads what its ranks reported.
2. `conclude` holds that against the ranks' claims, and closes what dead ranks left open.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

from .. import ranks
from ..errors import RecordingError
from ..filters import Filter
from ..format import disk
from ..format.claims import ClaimData, claimed_ranks, claims_of, is_alive, is_live
from ..format.disk import ACCESS
from ..format.rows import taps_of
from ..format.schema import RECORDING, rank_folder
from ..job import Job
from ..mailbox import (
    DOCTOR,
    LOADED,
    ModelReport,
    Report,
    RowReport,
    failures_of,
    read_reports,
    why_nothing,
)
from ..modules import table
from ..modules.told import lines
from ..progress import Progress, Watcher, read_progress
from ..ranks import Rank
from ..settings import RecordSettings, TapSettings
from ..sizes import count, format_size
from ..taps import control
from ..taps.control import Order
from ..writing import claim
from . import launch
from .processes import Processes, never_loaded

T = TypeVar("T", bound=TapSettings)

UNTRUSTED = 3
"""Exit status of a command that ended well while its result is not to be trusted."""
_NO_MODULE = "nothing was recorded: no module was tapped, and COMMAND made no tap of its own"
_NO_TAP = (
    "nothing was recorded: COMMAND made no tap; check that it calls recorder.tap, and run "
    "graft doctor in its place to see what reaches it"
)


@dataclass(frozen=True)
class Outcome:
    """What a command came to that ran under `graft record`.

    Attributes:
        command_status: its own exit status; 128 + N where signal N ended it.
        problems: why the recording is not to be trusted, a line each; empty where it is.
        notes: what else to say of it, a line each.
    """

    command_status: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        """The exit status of the whole: COMMAND's own where that is not 0, else 0 or 3."""
        return self.command_status or (UNTRUSTED if self.problems else 0)


def recorded(
    run: str | os.PathLike[str],
    settings: RecordSettings,
    command: Sequence[str],
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Run a command and record what it taps.

    Args:
        run: the recording's folder.
        settings: how to record.
        command: its words.
        progress: called with a line now and then, where stderr is a terminal.

    Raises:
        RecordingError: the folder is taken, or cannot be written.
        UsageError: the command cannot be started.
    """
    launch.check(command)
    settings = with_table(settings)
    folder = Path(os.path.abspath(run))
    prepare(folder, settings.overwrite, settings.access)
    with launch.reports_folder() as reports:
        variables = {settings.PREFIX: str(folder), **settings.variables()}
        env = launch.environment(variables, command, reports)
        with Watcher(reports, progress) if progress else nullcontext():
            processes = Processes()
            look = processes.look if settings.wants_modules else None
            status = launch.run(command, env, look=look)
        problems, notes = conclude(
            Path(run), env["GRAFT_JOB"], settings.filter, reports_of(settings.PREFIX, reports),
            read_progress(reports), status, _NO_MODULE if settings.wants_modules else _NO_TAP,
        )  # fmt: skip
        notes += of_tables(settings, reports, processes)
    return Outcome(status, tuple(problems), tuple(notes))


def with_table(settings: T) -> T:
    """Return settings whose tap table is named as any process can read it.

    Raises:
        UsageError: it cannot be read.
    """
    if not settings.taps:
        return settings
    table.load(settings.taps)
    return replace(settings, taps=table.absolute(settings.taps))


def of_tables(
    settings: TapSettings, folder: Path, processes: Processes, always: bool = False
) -> list[str]:
    """Return what is to be said of modules as taps: what fits nothing, and who was not reached.

    Args:
        settings: what was to be tapped.
        folder: that of the reports.
        processes: those of the command.
        always: whether modules count also where none is to be tapped.
    """
    if not settings.wants_modules and not always:
        return []
    reports = read_reports(folder)
    notes = lines(_last_of_each(reports), settings)
    loaded = {one["pid"] for one in reports if one.get("session") == LOADED}
    strangers = processes.without(loaded)
    if strangers:
        notes.append(never_loaded(strangers))
    elif not loaded:
        notes.append(
            f"{processes.seen} of the command never loaded tensorgraft: none imported torch where "
            "it is installed"
        )
    return notes


def _last_of_each(reports: Sequence[Report]) -> list[ModelReport]:
    """Return what tables found in each process; of one that was killed nobody knows what ran."""
    last = {one["pid"]: one["taps"] for one in reports if one.get("is_last")}
    for one in reports:
        if "taps" in one and one["pid"] not in last:
            rows = [cast(RowReport, {**row, "fired": row["found"]}) for row in one["taps"]["rows"]]
            last[-len(last) - 1] = {**one["taps"], "rows": rows}
    return list(last.values())


def reports_of(session: str, folder: Path) -> list[Report]:
    """Return what the ranks' sessions of one kind reported, and that `graft doctor` looked."""
    return [
        report
        for report in read_reports(folder)
        if report.get("session") == session or report.get("state") == DOCTOR
    ]


def rank_of_wrapper() -> Rank | None:
    """Return the rank that a wrapper of a single rank is for; None where it may be for several.

    Raises:
        UsageError: a variable is no number, out of range, or one of a pair is missing.
    """
    rank = ranks.from_variables(os.environ, "GRAFT_RANK", "GRAFT_WORLD_SIZE")
    return rank or ranks.from_variables(os.environ, "RANK", "WORLD_SIZE")


def prepare(folder: Path, overwrite: bool, access: str = "private") -> None:
    """Refuse, or with `overwrite` clear, a folder that is taken, as far as a wrapper can know.

    Raises:
        RecordingExists: it holds a recording that this job cannot join.
        RecordingError: it cannot be written.
    """
    rank, job = rank_of_wrapper(), Job.from_environment()
    if not overwrite:
        known = (rank.rank, rank.world_size) if rank else (None, None)
        claim.check_free(folder, known[0], known[1], job)
    elif rank is not None:
        claim.replace_rank(folder, rank.rank, job)
    elif (folder / RECORDING).exists() and not is_live(folder):
        claim.replace_recording(folder)
    try:
        disk.make_folder(folder, ACCESS[access])
    except OSError as err:
        raise RecordingError(
            f"{folder} cannot be made: {err.strerror or err}; choose a folder you may write to"
        ) from err
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RecordingError(f"{folder} cannot be written; choose a folder you may write to")


def conclude(
    run: Path,
    job: str,
    filter: Filter | None,
    reports: Sequence[Report],
    progress: Mapping[tuple[int, int], Progress],
    status: int = 0,
    hint: str = _NO_TAP,
) -> tuple[list[str], list[str]]:
    """Return why a recording is not to be trusted, and what else to say of it.

    Args:
        run: its folder.
        job: the id of the job that made it.
        filter: what was to be recorded.
        reports: what its ranks reported.
        progress: how far they were, by rank and process id.
        status: COMMAND's own.
        hint: what to say where no tap was made.
    """
    claims, notes = _claims_by(run, job)
    wrong = failures_of(reports)
    wrong |= {f"rank {c['rank']}: {c.get('reason')}" for c in claims if c.get("state") == "failed"}
    is_open = [one for one in claims if one.get("state") == "running"]
    for one in is_open:
        last = progress.get((one["rank"], one.get("pid") or 0))
        one["dropped"] = last.dropped if last else 0
        notes += _settled(run, one, reports)
    wrong |= _replaced(run, claims, reports)
    rows = sum(c.get("rows", 0) for c in claims)
    nbytes = sum(c.get("bytes", 0) for c in claims)
    if is_open or any(c.get("has_ids") for c in claims):  # which count all, or not themselves
        counted, counted_bytes, unread = _counted(run, claims)
        notes += unread
        rows = counted if is_open or not unread else rows
        nbytes = counted_bytes if is_open else nbytes
    if rows or (claims and not wrong):
        ranked = len({c["rank"] for c in claims})
        stopped = sorted({str(c["reason"]) for c in claims if c.get("state") == "stopped"})
        notes.append(
            f"{run}: {count(rows, 'record')} from {count(ranked, 'rank')}, "
            f"{format_size(nbytes)} stored" + "".join(f"; stopped: {s}" for s in stopped)
        )
    dropped = sum(c.get("dropped", 0) for c in claims)
    limit = max(
        (c.get("max_hold") or 0.0 for c in claims if c.get("max_hold") is not None), default=None
    )
    if dropped and limit is not None:
        wrong.add(claim.held_too_long(dropped, limit))
    elif dropped:
        notes.append(
            f"{count(dropped, 'tap')} dropped, as --when-full drop asks for: nothing more could be "
            "staged; record less with --filter, or give more room with --staging"
        )
    if (repeats := max((one.get("repeats", 0) for one in reports), default=0)) > 1:
        notes.append(
            f"every tap came {repeats} times in step 0, and nothing called step(): if these are "
            "iterations, call it at the end of each, on every rank"
        )
    if not rows and not wrong and not any(c.get("state") in ("running", "stopped") for c in claims):
        notes += _why_nothing(run, filter, reports, status, hint)
    return sorted(wrong), notes


def order_in(run: Path) -> Order:
    """Return what `graft ctl` asked for last; nothing where that cannot be read."""
    try:
        return control.read(run)
    except ValueError:
        return Order()


def _why_nothing(
    run: Path, filter: Filter | None, reports: Sequence[Report], status: int, hint: str
) -> list[str]:
    """Say why nothing was recorded, where that is to be said."""
    order = order_in(run)
    if not order.is_on:
        return [f"nothing was recorded: it is off; switch it on with: graft ctl {run} on"]
    if filtered := why_nothing(order.filter or filter, reports):
        return [filtered]
    if refused := sum(one.get("refused", 0) for one in reports):
        return [f"nothing was recorded: {count(refused, 'tap')} could not be, see above"]
    if status:
        return [f"nothing was recorded: COMMAND ended with {status} before it made a tap"]
    if any(one.get("state") == DOCTOR for one in reports):
        return []
    return [hint]


def _replaced(run: Path, claims: Sequence[ClaimData], reports: Sequence[Report]) -> set[str]:
    """Return a line for each rank that recorded here and whose records another job replaced."""
    kept = {c["rank"] for c in claims}
    return {
        f"rank {one['rank']} recorded here, and another job replaced its records meanwhile, or "
        f"they were removed: {run} is not what COMMAND tapped; give each job a folder of its own"
        for one in reports
        if one.get("state") in ("complete", "stopped")
        and one.get("selected")
        and one.get("rank") not in kept
    }


def _settled(folder: Path, one: ClaimData, reports: Sequence[Report]) -> list[str]:
    """Say that a rank did not close its recording, and do so for one that is dead."""
    who = f"rank {one['rank']} (pid {one.get('pid')})"
    if one.get("host") != socket.gethostname() or is_alive(one):
        return [f"{who} has not closed its recording yet; what it has tapped can be read meanwhile"]
    from ..writing.leftovers import seal_leftovers

    notes = []
    # A rank whose disk was full could tell the wrapper, but not write it down.
    told = [r for r in reports if r.get("rank") == one["rank"] and r.get("state") == "failed"]
    if not told:
        notes.append(
            f"{who} ended without closing its recording; see what it tapped until then with ls"
        )
    killed = "it ended without closing its recording"
    state, reason = ("failed", str(told[0].get("reason"))) if told else ("killed", killed)
    where = folder / rank_folder(one["rank"])
    try:
        access = disk.access_of(where)
        seal_leftovers(where, one["attempt"], access)
        claim.mark_ended(folder, one, state, reason, access)
    except (OSError, RecordingError) as err:
        notes.append(f"its files are left as they are, which readers understand: {err}")
    return notes


def _counted(folder: Path, claims: Sequence[ClaimData]) -> tuple[int, int, list[str]]:
    """Return how many taps of some claims can be read, the bytes of all tensors, and notes."""
    import polars as pl

    from ..recording import Recording

    try:
        found = Recording.open(folder).rows()
    except RecordingError as err:
        return 0, 0, [str(err)]
    wanted = pl.DataFrame(
        [(c["rank"], c["attempt"]) for c in claims],
        schema={"rank": pl.Int32, "attempt": pl.Int32},
        orient="row",
    )
    kept = found.join(wanted, on=["rank", "attempt"], how="semi")
    stored = kept.drop_nulls("shard").unique(["shard", "tensor"])
    return taps_of(kept).height, int(stored["nbytes"].sum() or 0), []


def _claims_by(folder: Path, job: str) -> tuple[list[ClaimData], list[str]]:
    """Return the claims of one wrapper's job, and which ranks' cannot be read.

    A torchelastic restart's earlier attempts are among them.
    """
    found: list[ClaimData] = []
    notes = []
    for rank in claimed_ranks(folder):
        try:
            for one in claims_of(folder, rank):
                one["rank"] = rank
                found.append(one)
        except RecordingError as err:
            notes.append(str(err))
    return [c for c in found if c.get("job") == job], notes
