"""The commands that make recordings and look into them: `record`, `ls`, `show`, `verify`."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from . import claim, launch, ranks
from .errors import RecordingError
from .filters import Filter
from .format import disk
from .format.disk import ACCESS
from .format.schema import FSYNC, LEVELS, RECORDING, WHEN_FULL, rank_folder
from .options import (
    COMMAND,
    UNTRUSTED,
    FilterType,
    SizeType,
    WrappingCommand,
    expected_errors,
    note,
    text_of,
)
from .progress import Progress, Watcher, read_progress
from .reports import read_reports
from .sizes import count, format_size
from .tables import bar, terminal_width


@click.command(cls=WrappingCommand, short_help="Run COMMAND and keep every tensor it taps.")
@click.option("-o", "--out", "run", required=True, metavar="RUN", help="Folder to record into.")
@click.option("--filter", type=FilterType(), help="Record only these taps. [GRAFT_RECORD_FILTER]")
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    default="tensors",
    show_default=True,
    help="What to keep of a tensor: its elements, its statistics and digest, or its digest. "
    "[GRAFT_RECORD_LEVEL]",
)
@click.option(
    "--max-bytes",
    type=SizeType(),
    help="Stop recording, not the job, before RUN's tensors take more than this, each rank an "
    "equal share: 20GB, 512MiB. [GRAFT_RECORD_MAX_BYTES]",
)
@click.option(
    "--min-free",
    type=SizeType(),
    help="Stop likewise before the file system of RUN has less than this free. "
    "[GRAFT_RECORD_MIN_FREE]",
)
@click.option(
    "--keep-last",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep only the last N steps and the one under way, as step() counts them. "
    "[GRAFT_RECORD_KEEP_LAST]",
)
@click.option(
    "--fsync",
    type=click.Choice(FSYNC),
    default="off",
    show_default=True,
    help="Wait for the device at the end of each shard or step, to survive a power cut. "
    "[GRAFT_RECORD_FSYNC]",
)
@click.option(
    "--access",
    type=click.Choice(list(ACCESS)),
    default="private",
    show_default=True,
    help="Who may read the files: you, your group, or all. [GRAFT_RECORD_ACCESS]",
)
@click.option(
    "--staging",
    type=SizeType(),
    help="Memory of each rank for snapshots that wait to be written; 256MiB by default. "
    "[GRAFT_RECORD_STAGING]",
)
@click.option(
    "--when-full",
    type=click.Choice(WHEN_FULL),
    default="hold",
    show_default=True,
    help="When all of it waits: hold the job until there is room, or drop the tap and count it. "
    "[GRAFT_RECORD_WHEN_FULL]",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace a recording that is in RUN already. [GRAFT_RECORD_OVERWRITE=1]",
)
@COMMAND
@expected_errors
def record(
    run: str,
    filter: Filter | None,
    level: str,
    max_bytes: int | None,
    min_free: int | None,
    keep_last: int | None,
    fsync: str,
    access: str,
    staging: int | None,
    when_full: str,
    overwrite: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND and keep every tensor it taps, from every rank, in RUN.

    COMMAND keeps its stdin, stdout, signals and exit status. Under no wrapper, GRAFT_RECORD=RUN in
    a rank's environment does the same.

    \b
    Example:
      graft record -o runs/base -- torchrun --nproc-per-node 4 train.py
    """
    folder = Path(os.path.abspath(run))
    prepare(folder, overwrite, access)
    with launch.reports_folder() as reports:
        env = launch.environment(
            {
                "GRAFT_RECORD": str(folder),
                "GRAFT_RECORD_FILTER": text_of(filter),
                "GRAFT_RECORD_LEVEL": level,
                "GRAFT_RECORD_MAX_BYTES": None if max_bytes is None else str(max_bytes),
                "GRAFT_RECORD_MIN_FREE": None if min_free is None else str(min_free),
                "GRAFT_RECORD_KEEP_LAST": None if keep_last is None else str(keep_last),
                "GRAFT_RECORD_FSYNC": fsync,
                "GRAFT_RECORD_ACCESS": access,
                "GRAFT_RECORD_STAGING": None if staging is None else str(staging),
                "GRAFT_RECORD_WHEN_FULL": when_full,
                "GRAFT_RECORD_OVERWRITE": "1" if overwrite else None,
            },
            command,
            reports,
        )
        with Watcher(reports, note):
            status = launch.run(command, env)
        found = [r for r in read_reports(reports) if r.get("session") == "GRAFT_RECORD"]
        trusted = conclude(run, env["GRAFT_JOB"], found, filter, read_progress(reports))
    sys.exit(status if status else 0 if trusted else UNTRUSTED)


def prepare(folder: Path, overwrite: bool, access: str = "private") -> None:
    """Refuse, or with `overwrite` clear, a folder that is taken, as far as a wrapper can know.

    Raises:
        RecordingExists: it holds a recording that this job cannot join.
        RecordingError: it cannot be written.
    """
    rank = ranks.from_variables(os.environ, "GRAFT_RANK", "GRAFT_WORLD_SIZE")
    rank = rank or ranks.from_variables(os.environ, "RANK", "WORLD_SIZE")
    job = claim.Job.from_environment()
    if not overwrite:
        known = (rank.rank, rank.world_size) if rank else (None, None)
        claim.check_free(folder, known[0], known[1], job)
    elif rank is not None:
        claim.replace_rank(folder, rank.rank, job)
    elif (folder / RECORDING).exists() and not claim.is_live(folder):
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
    run: str,
    job: str,
    reports: list[dict[str, Any]],
    filter: Filter | None,
    progress: Mapping[tuple[int, int], Progress],
) -> bool:
    """Say how a recording ended; return whether it is to be trusted."""
    claims = _claims_of(Path(run), job)
    wrong = {
        f"rank {r.get('rank', '?')}: {r.get('reason')}"
        for r in reports
        if r.get("state") in ("refused", "failed")
    }
    wrong |= {f"rank {c['rank']}: {c.get('reason')}" for c in claims if c.get("state") == "failed"}
    for line in sorted(wrong):
        note(f"not to be trusted, {line}")
    for one in claims:
        if one.get("state") == "running":
            last = progress.get((one["rank"], one.get("pid") or 0))
            one["dropped"] = last.dropped if last else 0
            _tell_open(Path(run), one, reports)
    rows = sum(c.get("rows", 0) for c in claims)
    nbytes = sum(c.get("bytes", 0) for c in claims)
    if any(c.get("state") == "running" for c in claims):  # those could not count for themselves
        rows, nbytes = _counted(Path(run), claims)
    if rows or (claims and not wrong):
        ranked = len({c["rank"] for c in claims})
        stopped = sorted({str(c["reason"]) for c in claims if c.get("state") == "stopped"})
        note(
            f"{run}: {count(rows, 'record')} from {count(ranked, 'rank')}, "
            f"{format_size(nbytes)} stored" + "".join(f"; stopped: {s}" for s in stopped)
        )
    dropped = sum(c.get("dropped", 0) for c in claims)
    if dropped:
        note(
            f"{count(dropped, 'tap')} dropped, as --when-full drop asks for: nothing more could be "
            "staged; record less with --filter, or give more room with --staging"
        )
    if not rows and not wrong and not any(c.get("state") in ("running", "stopped") for c in claims):
        _say_why_nothing(reports, filter)
    return not wrong


def _tell_open(folder: Path, one: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    """Say that a rank did not close its recording, and do so for one that is dead."""
    who = f"rank {one['rank']} (pid {one.get('pid')})"
    if one.get("host") != socket.gethostname() or claim.is_alive(one):
        note(f"{who} has not closed its recording yet; what it has tapped can be read meanwhile")
        return
    from .store import seal_leftovers

    # A rank whose disk was full could tell the wrapper, but not write it down.
    told = [r for r in reports if r.get("rank") == one["rank"] and r.get("state") == "failed"]
    if not told:
        note(f"{who} ended without closing its recording; see what it tapped until then with ls")
    killed = "it ended without closing its recording"
    state, reason = ("failed", str(told[0].get("reason"))) if told else ("killed", killed)
    where = folder / rank_folder(one["rank"])
    try:
        access = disk.access_of(where)
        seal_leftovers(where, one["attempt"], access)
        claim.mark_ended(folder, one, state, reason, access)
    except (OSError, RecordingError) as err:
        note(f"its files are left as they are, which readers understand: {err}")


def _counted(folder: Path, claims: list[dict[str, Any]]) -> tuple[int, int]:
    """Return how many records of these claims can be read, and the bytes of their tensors."""
    import polars as pl

    from .format.recording import Recording

    try:
        found = Recording.open(folder).rows()
    except RecordingError as err:
        note(str(err))
        return 0, 0
    mine = pl.DataFrame(
        [(c["rank"], c["attempt"]) for c in claims],
        schema={"rank": pl.Int32, "attempt": pl.Int32},
        orient="row",
    )
    kept = found.join(mine, on=["rank", "attempt"], how="semi")
    stored = kept.drop_nulls("shard").unique(["shard", "tensor"])
    return kept.height, int(stored["nbytes"].sum() or 0)


def _claims_of(folder: Path, job: str) -> list[dict[str, Any]]:
    """Return this wrapper's claims; a torchelastic restart's earlier attempts are among them."""
    found = []
    for rank in claim.claimed_ranks(folder):
        try:
            found += [{**c, "rank": rank} for c in claim.read_claims(folder, rank)]
        except RecordingError as err:
            note(str(err))
    return [c for c in found if c.get("job") == job]


def _access_of_all(run: Path) -> disk.Access:
    """Return the strictest access that a recording's folders were made with."""
    found = [disk.access_of(run)]
    found += [disk.access_of(path) for path in run.glob("rank-*") if path.is_dir()]
    return min(found, key=lambda access: access.folder)


def _say_why_nothing(reports: list[dict[str, Any]], filter: Filter | None) -> None:
    names = {name for r in reports for name in r.get("names_seen", ())}
    if filter is not None and names:
        tags = {tag for r in reports for tag in r.get("tags_seen", ())}
        note(filter.why_nothing(tags, names))
    else:
        note(
            "nothing was recorded: COMMAND made no tap; check that it calls recorder.tap, and run "
            "graft doctor in its place to see what reaches it"
        )


@click.command("ls", short_help="List what a recording holds, a line per tap.")
@click.argument("run", metavar="RUN")
@click.option("--filter", type=FilterType(), help="Only the records it selects.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone: a list of objects.")
@expected_errors
def ls(run: str, filter: Filter | None, as_json: bool) -> None:
    """List what a recording holds: one line per tap name, with its tags, ranks, steps and sizes.

    \b
    Example:
      graft ls runs/base --filter 'layer < 2'
    """
    from . import report
    from .format.recording import Recording

    recording = Recording.open(run)
    rows, why = report.selected(recording, filter)
    taps = report.taps(rows)
    if as_json:
        click.echo(json.dumps(taps, indent=2))
    else:
        report.print_taps(recording, rows, taps, terminal_width())
    if why:
        note(why)


@click.command("show", short_help="Show each record of a recording, with its statistics.")
@click.argument("run", metavar="RUN")
@click.option("--filter", type=FilterType(), help="Only the records it selects.")
@click.option("--rank", type=click.IntRange(min=0), help="Only this rank's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone: a list of objects.")
@expected_errors
def show(run: str, filter: Filter | None, rank: int | None, as_json: bool) -> None:
    """Show each record of a recording: key, dtype, shape and statistics.

    \b
    Example:
      graft show runs/base --rank 0 --filter 'name == "attn_out" and layer == 3'
    """
    from . import report
    from .format.recording import Recording

    recording = Recording.open(run)
    rows, why = report.selected(recording, filter, rank)
    if as_json:
        click.echo(json.dumps(report.records(recording, rows), indent=2))
    else:
        report.print_records(recording, rows, terminal_width())
    if why:
        note(why)


@click.command("verify", short_help="Check every shard and every tensor of a recording.")
@click.argument("run", metavar="RUN")
@click.option(
    "--repair",
    "out",
    metavar="OUT",
    help="Write what is whole to the folder OUT, as a recording of its own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone: an object.")
@expected_errors
def verify(run: str, out: str | None, as_json: bool) -> None:
    """Check a recording: the manifest, the structure of each shard, the digest of each tensor.

    Names every damaged record, rank by rank. Ends with 0 if all is whole, else with 1.

    \b
    Example:
      graft verify runs/base --repair runs/whole
    """
    from . import report
    from .format.recording import Recording
    from .verify import Checker, RankReport, repair

    checker = Checker(run, keep=out is not None)
    found: list[RankReport] = []

    def tell(one: RankReport) -> None:
        one.whole.clear()  # written by now, and there may be many
        found.append(one)
        if not as_json:
            report.print_rank_check(one)

    written = None
    with bar(checker.nbytes, "verifying") as checker.progress:
        if out is None:
            for one in checker.ranks():
                tell(one)
        else:
            where = _access_of_all(Path(run))
            written = repair(checker, Path(out), tell, where)
    whole = not any(one.problems for one in found)
    if as_json:
        click.echo(json.dumps(report.check_as_dict(checker, found, out, written), indent=2))
    else:
        report.print_check(checker, found, out, written)
    if whole:
        for line in report.incomplete_lines(Recording.open(run)):
            note(line)
    elif out is None:
        note(f"keep what is whole with: graft verify {run} --repair OUT")
    sys.exit(0 if whole else 1)
