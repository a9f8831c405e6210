"""`graft localize`: parse, one call, print."""

from __future__ import annotations

import sys
from pathlib import Path
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
from recorder.commands.tables import terminal_width
from recorder.errors import UsageError

from ..settings import ReplaySettings

_MOST = 12


@click.command(cls=WrappingCommand, short_help="Name what is faulty in COMMAND, from one replay.")
@click.argument("run", metavar="RUN")
@click.option("-o", "--out", metavar="OUT", help="Folder for the replay's log.")
@click.option(
    "--floor",
    multiple=True,
    metavar="RUN",
    help="What graft check left, or a second recording of the baseline: what differs there is no "
    "fault. Only raises what is taken for rounding; may be repeated.",
)
@click.option(
    "--truth",
    metavar="RUN",
    help="The same model recorded in higher precision: a segment may be off by --truth-factor "
    "times what the baseline is off from it.",
)
@click.option("--truth-factor", type=float, default=2.0, show_default=True, metavar="M")
@count_option("--repeat", 1, "Replay N times: what differs between repeats is noise.")
@count_option("--limit", _MOST, "Rows of the table.")
@click.option("--all", "everything", is_flag=True, help="Also list what was not judged, and why.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON alone.")
@click.option("--markdown", "is_markdown", is_flag=True, help="Print what an issue needs.")
@click.option("--html", metavar="PAGE", help="Also write a page that opens in a browser.")
@options_of(ReplaySettings, without=("own_error", "metrics"))
@COMMAND
@expected_errors
def localize(
    run: str,
    out: str | None,
    floor: tuple[str, ...],
    truth: str | None,
    truth_factor: float,
    repeat: int,
    limit: int,
    everything: bool,
    is_json: bool,
    is_markdown: bool,
    html: str | None,
    command: tuple[str, ...],
    **options: Any,
) -> None:
    """Run COMMAND with every tap grafted from the recording RUN, and name its faulty segments.

    While all is grafted, what the target itself computes at a tap comes from the baseline's own
    inputs: each tap is off by what its segment adds, and by nothing inherited. Ends with 1 where a
    fault is named, with 0 where all is rounding, with 3 where that is not to be trusted.

    \b
    Example:
      graft localize runs/base -- torchrun --nproc-per-node 2 infer.py
    """
    if is_json and is_markdown:
        raise click.UsageError("--json and --markdown are two forms of the result; choose one")
    from ..showing.output import check_outputs

    check_outputs([Path(html)] if html is not None else [])
    from ..finding.localize import localize as find
    from ..foreseen import tell
    from ..showing import faults as report

    tell(run, options, note)
    done = find(
        run,
        command,
        out=None if out is None else Path(out),
        floor=floor,
        truth=truth,
        truth_factor=truth_factor,
        repeat=repeat,
        aside=is_json or is_markdown,
        **options,
    )
    for line in done.notes:
        note(line)
    if html is not None:
        try:
            report.write_page(done, Path(html))
        except OSError as err:
            raise UsageError(f"{html} cannot be written: {err.strerror or err}") from None
    for problem in done.problems:
        note(f"not to be trusted: {problem}")
    if is_json:
        click.echo(report.as_json(done))
    elif is_markdown:
        click.echo(report.markdown(done, limit))
    else:
        report.print_found(done, terminal_width(), limit, everything)
    sys.exit(done.status)
