"""`graft bisect`: parse, one call, print."""

from __future__ import annotations

import sys
from typing import Any

import click

from recorder.commands.clicking import (
    COMMAND,
    FilterType,
    WrappingCommand,
    count_option,
    expected_errors,
    note,
    options_of,
)
from recorder.errors import Interrupted
from recorder.filters import Filter

from ..settings import ReplaySettings


@click.command(
    cls=WrappingCommand, short_help="Search for a fault by replays that graft some taps."
)
@click.argument("run", metavar="RUN")
@click.option(
    "-o",
    "--out",
    metavar="OUT",
    help="Folder for the trials; a search that was interrupted goes on from it.",
)
@click.option("--watch", type=FilterType(), help="Taps that are to be as the baseline's.")
@click.option(
    "--tol",
    type=float,
    metavar="T",
    help="How far a watched tap may be off, relative to its size; by default as far as a diff "
    "takes for rounding.",
)
@click.option(
    "--check",
    "script",
    metavar="SCRIPT",
    help="Shell command that judges a trial, whose folder is GRAFT_TRIAL: 0 is good, 125 no "
    "verdict, anything else bad.",
)
@click.option(
    "--minimal-set", is_flag=True, help="Also find a smallest set of taps that repairs the run."
)
@count_option("--repeat", 1, "Make each trial up to N times; most votes decide.")
@click.option("--dry-run", is_flag=True, help="Make one trial, and say what the search would cost.")
@options_of(ReplaySettings, without=("own_error", "metrics", "record", "only", "strict", "check"))
@COMMAND
@expected_errors
def bisect(
    run: str,
    out: str | None,
    watch: Filter | None,
    tol: float | None,
    script: str | None,
    minimal_set: bool,
    repeat: int,
    dry_run: bool,
    command: tuple[str, ...],
    **options: Any,
) -> None:
    """Run COMMAND with the first taps grafted from RUN, ever closer to where it turns good.

    For what graft localize cannot settle in one replay: few taps, or state that goes round them.
    Ends with 0 where the boundary is found, and with 3 where verdicts contradict each other.

    \b
    Example:
      graft bisect runs/base -o runs/bisect --watch 'name == "logits"' -- python infer.py
    """
    from ..finding.bisect import bisect as find
    from ..foreseen import tell
    from ..showing import trials as report

    tell(run, options, note)
    try:
        done = find(
            run, command, out=out, watch=watch, tol=tol, check=script, minimal_set=minimal_set,
            repeat=repeat, dry_run=dry_run, say=note, **options,
        )  # fmt: skip
    except Interrupted as err:
        note(str(err))
        sys.exit(err.status)
    for line in report.bisect_lines(done):
        click.echo(line)
    sys.exit(done.status)
