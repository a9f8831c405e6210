"""The `graft` command: `replay`, `demo` and `doctor`, and what the recorder and `diffing` add."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from recorder import cli as recorder_cli
from recorder import launch, ranks
from recorder.claim import Job
from recorder.errors import DamagedRecording, RecordingError, RecordingExists, UsageError
from recorder.filters import Filter
from recorder.format.recording import Recording
from recorder.options import (
    COMMAND,
    UNTRUSTED,
    FilterType,
    WrappingCommand,
    expected_errors,
    note,
    text_of,
)
from recorder.progress import read_progress
from recorder.report import incomplete_lines
from recorder.reports import read_reports

from .diffing.cli import diff
from .match import MatchOn


class _Group(click.Group):
    """Lists commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tensorgraft", prog_name="graft")
def main() -> None:
    """Record tensors from a baseline, graft them onto a target, and see what that changes.

    \b
    Exit status: COMMAND's own when that is not 0; else
      0  fine
      1  the comparison differs, or compared nothing
      2  wrong usage, or an unreadable recording
      3  COMMAND ended well, but the recording or replay is not to be trusted
    """


main.add_command(recorder_cli.record)


@main.command(
    cls=WrappingCommand, short_help="Run COMMAND with its taps overwritten from a recording."
)
@click.argument("run", metavar="RUN")
@click.option(
    "-o",
    "--out",
    metavar="OUT",
    help="Folder for the log (and what --record keeps). [GRAFT_REPLAY_OUT]",
)
@click.option("--filter", type=FilterType(), help="Graft only these taps. [GRAFT_REPLAY_FILTER]")
@click.option(
    "--transform",
    metavar="PKG.MOD.FN",
    help="Function of (g) or (received_list, target) that makes the tensor to write; without, what "
    "both sides' dims say, else identity by rank. [GRAFT_REPLAY_TRANSFORM]",
)
@click.option(
    "--record",
    "record_filter",
    type=FilterType(),
    help="Also record in OUT what the target itself computed at these taps, before any "
    "overwriting; 'True' for all. [GRAFT_REPLAY_RECORD]",
)
@click.option(
    "--match-on",
    metavar="TAGS",
    help="Tags that count for a match, as name,layer; or order, to pair by position; the whole "
    "key without. [GRAFT_REPLAY_MATCH_ON]",
)
@click.option(
    "--step-offset",
    type=int,
    default=0,
    metavar="N",
    help="Target step s takes from recorded step s + N. [GRAFT_REPLAY_STEP_OFFSET]",
)
@click.option(
    "--on-error",
    type=click.Choice(("skip", "raise")),
    default="skip",
    show_default=True,
    help="What a failed graft does to the job. [GRAFT_REPLAY_ON_ERROR]",
)
@click.option(
    "--on-missing",
    type=click.Choice(("skip", "raise")),
    default="skip",
    show_default=True,
    help="What a tap without a record does to the job. [GRAFT_REPLAY_ON_MISSING]",
)
@click.option(
    "--strict",
    is_flag=True,
    help="End with 3 if any selected tap was missed or any selected record never used. "
    "[GRAFT_REPLAY_STRICT=1]",
)
@click.option(
    "--metrics/--no-metrics",
    default=True,
    help="Log how the target's own values differ from what replaces them. [GRAFT_REPLAY_METRICS]",
)
@click.option(
    "--check/--no-check",
    default=True,
    help="Hold each recorded tensor against its digest when it is first used. [GRAFT_REPLAY_CHECK]",
)
@click.option(
    "--replicas",
    type=click.Choice(("error", "first", "mean")),
    default="error",
    show_default=True,
    help="Where senders that should hold the same block do not: fail, take the first, or their "
    "mean. [GRAFT_REPLAY_REPLICAS]",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace a replay that is in OUT already. [GRAFT_REPLAY_OVERWRITE=1]",
)
@COMMAND
@expected_errors
def replay(
    run: str,
    out: str | None,
    filter: Filter | None,
    transform: str | None,
    record_filter: Filter | None,
    match_on: str | None,
    step_offset: int,
    on_error: str,
    on_missing: str,
    strict: bool,
    metrics: bool,
    check: bool,
    replicas: str,
    overwrite: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND with its tapped tensors overwritten ("grafted") from the recording RUN.

    Nothing of the baseline runs. COMMAND keeps its stdin, stdout, signals and exit status; a graft
    that fails leaves the tensor as it was, and the replay then ends with 3.

    \b
    Example:
      graft replay runs/base -o runs/r1 --filter 'name == "attn_out"' \\
          --transform mytransforms.recut -- torchrun --nproc-per-node 2 infer.py
    """
    if record_filter is not None and out is None:
        raise UsageError("--record needs a folder to record into; give -o OUT too")
    MatchOn.parse(match_on)
    recording = Recording.open(run)
    records = recording.latest()
    for line in incomplete_lines(recording):
        note(f"{run}: {line}")
    with launch.reports_folder() as reports, tempfile.TemporaryDirectory(prefix="graft-") as spare:
        folder = Path(os.path.abspath(out)) if out else Path(spare)
        if out and folder.resolve() == recording.path.resolve():
            raise UsageError("OUT is RUN itself; choose another folder for what the replay leaves")
        if out:
            prepare(folder, overwrite, records=record_filter is not None)
        env = launch.environment(
            {
                "GRAFT_REPLAY": str(recording.path.resolve()),
                "GRAFT_REPLAY_OUT": str(folder),
                "GRAFT_REPLAY_FILTER": text_of(filter),
                "GRAFT_REPLAY_TRANSFORM": transform,
                "GRAFT_REPLAY_RECORD": text_of(record_filter),
                "GRAFT_REPLAY_MATCH_ON": match_on,
                "GRAFT_REPLAY_STEP_OFFSET": str(step_offset),
                "GRAFT_REPLAY_ON_ERROR": on_error,
                "GRAFT_REPLAY_ON_MISSING": on_missing,
                "GRAFT_REPLAY_STRICT": "1" if strict else None,
                "GRAFT_REPLAY_METRICS": None if metrics else "0",
                "GRAFT_REPLAY_CHECK": None if check else "0",
                "GRAFT_REPLAY_REPLICAS": replicas,
                "GRAFT_REPLAY_OVERWRITE": "1" if overwrite else None,
            },
            command,
            reports,
        )
        status = launch.run(command, env)
        found = read_reports(reports)
        trusted = conclude(folder, records, filter, step_offset, strict, found)
        if record_filter is not None:
            recorded = [r for r in found if r.get("session") == "GRAFT_RECORD"]
            trusted &= recorder_cli.conclude(
                str(out), env["GRAFT_JOB"], recorded, record_filter, read_progress(reports)
            )
    sys.exit(status if status else 0 if trusted else UNTRUSTED)


def prepare(folder: Path, overwrite: bool, records: bool) -> None:
    """Refuse, or with `overwrite` clear, a folder that holds a replay, as far as can be known.

    Raises:
        RecordingExists: it holds a replay, or a recording where one is to be made.
        RecordingError: it cannot be written.
    """
    from recorder.format import disk
    from recorder.format.schema import rank_folder

    from .log import FOLDER

    if folder.exists() and not folder.is_dir():
        raise RecordingError(f"{folder} is a file; name a folder for the replay's log")
    rank = ranks.from_variables(os.environ, "GRAFT_RANK", "GRAFT_WORLD_SIZE")
    rank = rank or ranks.from_variables(os.environ, "RANK", "WORLD_SIZE")
    pattern = f"{rank_folder(rank.rank)}-*" if rank else "rank-*"
    logs = [p for p in (folder / FOLDER).glob(pattern) if p.suffix in (".parquet", ".journal")]
    if overwrite:
        for path in logs:
            disk.remove(path)
    elif logs and "GRAFT_JOB" not in os.environ and not (rank and Job.from_environment().attempt):
        raise RecordingExists(folder, "holds the log of a replay already")
    if records:
        recorder_cli.prepare(folder, overwrite)
    try:
        disk.make_folder(folder / FOLDER)
    except OSError as err:
        raise RecordingError(
            f"{folder} cannot be made: {err.strerror or err}; choose a folder you may write to"
        ) from err


def conclude(
    folder: Path,
    records: Any,
    filter: Filter | None,
    step_offset: int,
    strict: bool,
    reports: list[dict[str, Any]],
) -> bool:
    """Say how a replay ended; return whether it is to be trusted."""
    from .log import read_log, seal_leftovers
    from .summary import summarize

    mine = [r for r in reports if r.get("session") == "GRAFT_REPLAY"]
    wrong = {
        f"rank {r.get('rank', '?')}: {r.get('reason')}"
        for r in mine
        if r.get("state") in ("failed", "refused")
    }
    try:
        seal_leftovers(folder)
        log = read_log(folder)
    except (DamagedRecording, OSError) as err:
        note(f"not to be trusted: {err}")
        return False
    receivers = max((r.get("world_size", 1) for r in mine), default=1)
    last = log["rank"].max()
    if isinstance(last, int):
        receivers = max(receivers, last + 1)
    summary = summarize(log, records, filter, receivers, step_offset)
    note(f"replay: {summary.line()}")
    names = {name for r in mine for name in r.get("names_seen", ())}
    if not log.height and filter is not None and names:
        note(filter.why_nothing({t for r in mine for t in r.get("tags_seen", ())}, names))
    refused = sum(r.get("refused", 0) for r in mine)
    problems = [*sorted(wrong), *summary.problems(strict, refused)]
    for problem in problems:
        note(f"not to be trusted: {problem}")
    return not problems


main.add_command(diff)
main.add_command(recorder_cli.ls)
main.add_command(recorder_cli.show)
main.add_command(recorder_cli.verify)


@main.command(short_help="Find a planted fault in a small model, start to end.")
@click.option(
    "-o",
    "--out",
    metavar="DIR",
    default="graft-demo",
    show_default=True,
    help="New folder for the demo's recordings.",
)
@click.option("--overwrite", is_flag=True, help="Replace the demo that is in DIR already.")
@expected_errors
def demo(out: str, overwrite: bool) -> None:
    """Record a 4-rank baseline, graft it onto a faulty 2-rank target, and show what that changes.

    Takes under a minute on two cores, uses no network, and prints every command it runs.

    \b
    Example:
      graft demo -o demo
    """
    folder = Path(out)
    if folder.exists():
        if not overwrite:
            raise RecordingExists(folder, "exists already")
        if any(folder.iterdir()) and not (folder / "baseline" / "recording.json").exists():
            raise RecordingError(f"{folder} is no demo's folder, so it is left alone; name another")
        shutil.rmtree(folder)
    from .demo.run import run_demo

    sys.exit(run_demo(folder, click.echo))


@main.command(short_help="Say what a tap would do here, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone.")
@expected_errors
def doctor(as_json: bool) -> None:
    """Say what is installed and active here, and whether a tap would record, replay or do nothing.

    Run it in a job's place, under the same launcher, to see what reaches the job:

    \b
    Example:
      graft record -o runs/base -- graft doctor
    """
    from .doctor import examine, print_report

    facts = examine()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        print_report(facts, click.echo)


if __name__ == "__main__":
    main()
