"""The commands that make recordings and look into them: `record`, `ls`, `show`, `verify`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..filters import Filter
from ..format import disk
from ..settings import RecordSettings
from .clicking import COMMAND, FilterType, WrappingCommand, expected_errors, note, options_of
from .outcome import recorded
from .tables import bar, terminal_width


@click.command(cls=WrappingCommand, short_help="Run COMMAND and keep every tensor it taps.")
@click.option("-o", "--out", "run", required=True, metavar="RUN", help="Folder to record into.")
@options_of(RecordSettings)
@COMMAND
@expected_errors
def record(run: str, command: tuple[str, ...], **options: Any) -> None:
    """Run COMMAND and keep every tensor it taps, from every rank, in RUN.

    COMMAND keeps its stdin, stdout, signals and exit status. Without the wrapper, GRAFT_RECORD=RUN
    in a rank's environment does the same.

    \b
    Example:
      graft record -o runs/base -- torchrun --nproc-per-node 4 train.py
    """
    outcome = recorded(run, RecordSettings.named(options), command, note)
    for problem in outcome.problems:
        note(f"not to be trusted: {problem}")
    for line in outcome.notes:
        note(line)
    sys.exit(outcome.status)


def _access_of_all(run: Path) -> disk.Access:
    """Return the strictest access that a recording's folders were made with."""
    found = [disk.access_of(run)]
    found += [disk.access_of(path) for path in run.glob("rank-*") if path.is_dir()]
    return min(found, key=lambda access: access.folder)


@click.command("ls", short_help="List what a recording holds, one line per tap.")
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
    from ..recording import Recording
    from . import listing

    recording = Recording.open(run)
    rows, why = listing.selected(recording, filter)
    taps = listing.taps(rows)
    if as_json:
        click.echo(json.dumps(taps, indent=2))
    else:
        listing.print_taps(recording, rows, taps, terminal_width())
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
    from ..recording import Recording
    from . import listing

    recording = Recording.open(run)
    rows, why = listing.selected(recording, filter, rank)
    if as_json:
        click.echo(json.dumps(listing.records(recording, rows), indent=2))
    else:
        listing.print_records(recording, rows, terminal_width())
    if why:
        note(why)
    if lack := listing.lack_of_statistics(recording, rows):
        note(lack)


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

    Names every damaged record, rank by rank. Ends with 0 if all is whole, else with 1. Fills in the
    statistics of records that have none, where they were not gathered in time.

    \b
    Example:
      graft verify runs/base --repair runs/whole
    """
    from ..recording import Recording
    from ..repair import repair
    from ..verify import Checker, RankReport
    from . import listing

    checker = Checker(run, keep=out is not None)
    found: list[RankReport] = []

    def tell(one: RankReport) -> None:
        one.whole.clear()  # written by now, and there may be many
        found.append(one)
        if not as_json:
            listing.print_rank_check(one)

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
        click.echo(json.dumps(listing.check_as_dict(checker, found, out, written), indent=2))
    else:
        listing.print_check(checker, found, out, written)
    if whole:
        for line in listing.incomplete_lines(Recording.open(run)):
            note(line)
    elif out is None:
        note(f"keep what is whole with: graft verify {run} --repair OUT")
    sys.exit(0 if whole else 1)
