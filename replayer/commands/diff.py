"""`graft diff`: parse, one call, print."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recorder.commands.clicking import FilterType, SizeType, count_option, expected_errors, note
from recorder.commands.tables import bar, terminal_width
from recorder.errors import UsageError
from recorder.filters import Filter
from recorder.format.schema import recordings_in
from recorder.ranks import Rank

if TYPE_CHECKING:
    from ..diffing.diff import Diff

_PATIENCE = 5.0  # seconds; then whoever has a launcher's variables by chance is told


class _OfRecordings(click.Command):
    """A command for recordings; of a folder of them it lists those there are."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and where one recording alone was given, name others."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as err:
            folders = [Path(word) for word in given if Path(word).is_dir()]
            holds = [path for folder in folders for path in recordings_in(folder)]
            if err.param is None or err.param.name != "b" or not holds:
                raise
            some = ", ".join(holds[:8]) + (", ..." if len(holds) > 8 else "")
            raise click.UsageError(f"give two recordings; {folders[0]} holds {some}", ctx) from None


@click.command(
    cls=_OfRecordings, short_help="Compare two recordings: what differs, and where first."
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.argument("c", metavar="[C]", required=False)
@click.option("--filter", type=FilterType(), help="Only these records, in A's names and steps.")
@click.option(
    "--match-on",
    metavar="TAGS",
    help="Tags that count for a match, such as name,layer; or order, to pair by position; by "
    "default the whole key.",
)
@click.option(
    "--step-offset",
    type=int,
    default=0,
    metavar="N",
    help="B's step s belongs to A's step s + N.",
)
@click.option(
    "--rename",
    multiple=True,
    metavar="A=B",
    help="A's name for a tap = B's name, with places in braces: "
    "'h.{layer}.attn=layers.{layer}.self_attn'. A place on one side only is a tag on the other.",
)
@click.option(
    "--manifest-only",
    is_flag=True,
    help="Read no tensor: digests tell which differ, and statistics how far at least.",
)
@click.option(
    "--rtol", type=float, help="Relative tolerance; by default torch's for the two dtypes."
)
@click.option(
    "--atol", type=float, help="Absolute tolerance; by default torch's for the two dtypes."
)
@click.option(
    "--threshold",
    multiple=True,
    metavar="[PATTERN:]EXPR",
    help="What is within tolerance instead, for names that fit the pattern: "
    "'attn_*: rel_diff < 1e-4 and max_abs < 0.1'. The last that fits decides.",
)
@click.option(
    "--floor",
    multiple=True,
    metavar="A2",
    help="A second run of A, whose differences from it are noise; may be repeated.",
)
@click.option(
    "--floor-factor",
    type=float,
    help="How many times the noise is still noise; 3 by default.",
)
@click.option(
    "--by",
    metavar="DIM",
    help="Also compare index by index of a dim, by its name in the dims or its number.",
)
@click.option(
    "--ignore-missing",
    is_flag=True,
    help="Report keys and rows that are on one side only, but do not count them as a difference.",
)
@click.option(
    "--missing-rows",
    type=float,
    metavar="SHARE",
    help="Where rows are matched one by one: the share of a side's rows that may be on that side "
    "only before that is a difference (default: 1).",
)
@count_option("--limit", 20, "Rows of the table on the terminal.")
@click.option(
    "--sort",
    type=click.Choice(["order", "size"]),
    default="order",
    show_default=True,
    help="The table's order: of execution, from the first divergence on; or the first "
    "divergences, then from the worst on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone: one object per line.")
@click.option("--parquet", metavar="FILE", help="Also write the whole table to FILE.")
@click.option("--html", metavar="FILE", help="Also write a page to FILE that opens in a browser.")
@click.option(
    "--check/--no-check",
    default=True,
    help="Compare each tensor that is read with its digest.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Number of threads; by default one per core."
)
@click.option(
    "--memory",
    type=SizeType(),
    help="Bytes of tensors in memory at once, 2GiB by default; a larger pair is read alone.",
)
@expected_errors
def diff(
    a: str,
    b: str,
    c: str | None,
    filter: Filter | None,
    match_on: str | None,
    step_offset: int,
    rename: tuple[str, ...],
    manifest_only: bool,
    rtol: float | None,
    atol: float | None,
    threshold: tuple[str, ...],
    floor: tuple[str, ...],
    floor_factor: float | None,
    by: str | None,
    ignore_missing: bool,
    missing_rows: float | None,
    limit: int,
    sort: str,
    as_json: bool,
    parquet: str | None,
    html: str | None,
    check: bool,
    workers: int | None,
    memory: int | None,
) -> None:
    """Compare the recordings A (trusted) and B: which tensors differ, where first, how much.

    With C, the target after a graft, B and C are compared with A side by side; it then ends with 0
    where nothing is beyond tolerance in C but at what was grafted.

    Tensors are put together where layouts are declared, and compared rank by rank elsewhere. Ends
    with 0 where all is equal or within tolerance; with 1 where not, where a key is on one side
    only, or where nothing matched; with 2 where a recording cannot be read. Under torchrun the
    ranks share the work, on any number of machines.

    \b
    Example:
      graft diff runs/base runs/target --filter 'layer < 4' --html diff.html
    """
    outputs = [Path(name) for name in (parquet, html) if name is not None]
    if floor_factor is not None and not floor:
        raise UsageError("--floor-factor needs a noise floor; give --floor A2 too")
    from ..showing.output import check_outputs

    check_outputs(outputs)
    if c is not None and (outputs or as_json or by is not None or manifest_only):
        raise UsageError(
            "--json, --parquet, --html, --by and --manifest-only compare two recordings; leave "
            "the third out"
        )
    from recorder.commands.listing import incomplete_lines

    from ..diffing.diff import diff as compare
    from ..diffing.spread import group, launched
    from ..showing import lines as report

    rank = launched(os.environ)

    def against_a(run: str) -> Diff:
        return compare(
            a, run, filter=filter, match_on=match_on, step_offset=step_offset, rename=rename,
            manifest_only=manifest_only, rtol=rtol, atol=atol, threshold=threshold, floor=floor,
            floor_factor=floor_factor, by=by,
            ignore_missing=ignore_missing, missing_rows=missing_rows, check=check,
            workers=workers, memory=memory, spread=True, bar=bar,
        )  # fmt: skip

    with _told_of_waiting(rank), group(rank):
        found = against_a(b)
        after = against_a(c) if c is not None else None
    if rank.rank != 0:
        return  # rank 0 has all of it, and says so
    runs = [found.a, found.b] if after is None else [found.a, found.b, after.b]
    for run in runs:
        for line in incomplete_lines(run):
            note(f"{run.path}: {line}")
    for line in dict.fromkeys([*found.notes, *(after.notes if after else ())]):
        note(line)
    if after is not None:
        from ..showing.beside import print_beside, status_of

        print_beside(found, after, terminal_width(), limit)
        for why in {found.why_nothing: None, after.why_nothing: None}:
            if why:
                note(why)
        sys.exit(status_of(found, after))
    try:
        if parquet is not None:
            report.write_parquet(found, Path(parquet))
        if html is not None:
            from ..showing.pagedata import write_page

            write_page(found, Path(html))
        if as_json:
            for line in report.objects(found):
                click.echo(line)
        else:
            report.print_diff(found, terminal_width(), limit, sort == "size")
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # click ends quietly where nobody reads on
    except OSError as err:
        raise UsageError(
            f"{err.filename or 'the output'} cannot be written: {err.strerror or err}; make room, "
            "or choose another place"
        ) from None
    if found.why_nothing:
        note(found.why_nothing)
    sys.exit(found.status)


@contextmanager
def _told_of_waiting(rank: Rank) -> Iterator[None]:
    """Say so when other ranks do not come, which may not exist."""
    from ..diffing.spread import joined

    def tell() -> None:
        if not joined():
            note(
                f"rank {rank.rank} of {rank.world_size}, as RANK and WORLD_SIZE say, waits for the "
                "others; to run alone, unset RANK"
            )

    timer = threading.Timer(_PATIENCE, tell)
    timer.daemon = True
    if rank.world_size > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
