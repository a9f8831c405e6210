"""`graft check`: parse, one call, print."""

from __future__ import annotations

import sys
from typing import Any

import click

from recorder.commands.clicking import (
    COMMAND,
    WrappingCommand,
    count_option,
    expected_errors,
    note,
    options_of,
)

from ..settings import ReplaySettings


@click.command(
    cls=WrappingCommand, short_help="Replay the baseline onto itself: does a bit change?"
)
@click.argument("run", metavar="RUN")
@click.option(
    "-o",
    "--out",
    metavar="OUT",
    help="Folder for the log and for what the job computed by itself: a floor for graft localize.",
)
@count_option("--repeat", 1, "Replay N times.")
@options_of(ReplaySettings, without=("own_error", "metrics", "record", "only", "strict"))
@COMMAND
@expected_errors
def check(run: str, out: str | None, repeat: int, command: tuple[str, ...], **options: Any) -> None:
    """Run COMMAND, which made the recording RUN, with every tap grafted from RUN itself.

    Every downstream bit must be as recorded. Ends with 0 where it is; with 1 where not, and says
    whether the job differs from itself or the grafts change it; with 3 where that cannot be told.

    \b
    Example:
      graft check runs/base -o runs/check -- torchrun --nproc-per-node 4 train.py
    """
    from ..finding.check import check as find
    from ..foreseen import tell
    from ..showing import trials as report

    tell(run, options, note)
    done = find(run, command, out=out, repeat=repeat, **options)
    for line in done.notes:
        note(line)
    for problem in done.problems:
        note(f"not to be trusted: {problem}")
    for line in report.check_lines(done):
        click.echo(line)
    sys.exit(done.status)
