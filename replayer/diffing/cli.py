"""`graft diff`: parse, one call, print."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from recorder.errors import UsageError
from recorder.filters import Filter
from recorder.options import FilterType, SizeType, expected_errors, note
from recorder.sizes import format_size
from recorder.tables import bar, terminal_width

_MEMORY = 2 << 30


@click.command(short_help="Hold two recordings against each other: what differs, and where first.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--filter", type=FilterType(), help="Only these records, in A's names and steps.")
@click.option(
    "--match-on",
    metavar="TAGS",
    help="Tags that count for a match, as name,layer; or order, to pair by position; the whole "
    "key without.",
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
    help="What A calls A is what B calls B, with places in braces: "
    "'h.{layer}.attn=layers.{layer}.self_attn'. A place on one side only is a tag on the other.",
)
@click.option(
    "--manifest",
    is_flag=True,
    help="Read no tensor: digests say which differ, statistics what they prove.",
)
@click.option("--rtol", type=float, help="Relative tolerance; torch's for the dtypes without.")
@click.option("--atol", type=float, help="Absolute tolerance; torch's for the dtypes without.")
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
    default=3.0,
    show_default=True,
    help="How many times the noise is still noise.",
)
@click.option(
    "--by",
    metavar="DIM",
    help="Also compare index by index of a dim, by its name in the dims or its number.",
)
@click.option(
    "--ignore-missing",
    is_flag=True,
    help="Keys on one side only are told, and do not count as a difference.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="Rows of the table on the terminal.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone: an object a line.")
@click.option("--parquet", metavar="FILE", help="Also write the whole table to FILE.")
@click.option("--html", metavar="FILE", help="Also write a page to FILE that opens in a browser.")
@click.option(
    "--check/--no-check",
    default=True,
    help="Hold each tensor that is read against its digest.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads; one a core without.")
@click.option(
    "--memory",
    type=SizeType(),
    help=f"Bytes of tensors in memory at once; {format_size(_MEMORY)} without.",
)
@expected_errors
def diff(
    a: str,
    b: str,
    filter: Filter | None,
    match_on: str | None,
    step_offset: int,
    rename: tuple[str, ...],
    manifest: bool,
    rtol: float | None,
    atol: float | None,
    threshold: tuple[str, ...],
    floor: tuple[str, ...],
    floor_factor: float,
    by: str | None,
    ignore_missing: bool,
    limit: int,
    as_json: bool,
    parquet: str | None,
    html: str | None,
    check: bool,
    workers: int | None,
    memory: int | None,
) -> None:
    """Compare the recordings A (trusted) and B: which tensors differ, where first, how much.

    Layouts are put together on both sides where declared, else it is rank by rank. Ends with 0
    where all is equal or within tolerance; with 1 where not, where a key is on one side only, or
    where nothing matched; with 2 where a recording cannot be read. Under torchrun the ranks share
    the work, on any number of machines.

    \b
    Example:
      graft diff runs/base runs/target --filter 'layer < 4' --html diff.html
    """
    outputs = [Path(name) for name in (parquet, html) if name is not None]
    for path in outputs:
        _check_output(path)
    from . import report
    from .diff import diff as compare
    from .work import distributed

    found = compare(
        a, b, filter=filter, match_on=match_on, step_offset=step_offset, rename=rename,
        manifest=manifest, rtol=rtol, atol=atol, threshold=threshold, floor=floor,
        floor_factor=floor_factor, by=by, ignore_missing=ignore_missing, check=check,
        workers=workers, memory=memory or _MEMORY, bar=bar,
    )  # fmt: skip
    if distributed()[0] != 0:
        return  # rank 0 has all of it, and says so
    from recorder.report import incomplete_lines

    for name, run in ((a, found.a), (b, found.b)):
        for line in incomplete_lines(run):
            note(f"{name}: {line}")
    for line in found.notes:
        note(line)
    try:
        if parquet is not None:
            report.write_parquet(found, Path(parquet))
        if html is not None:
            from .pagedata import write_page

            write_page(found, Path(html))
    except OSError as err:
        raise UsageError(f"{err.filename or parquet or html} cannot be written: {err}") from None
    if as_json:
        for line in report.objects(found):
            click.echo(line)
    else:
        report.print_diff(found, terminal_width(), limit)
    if found.why_nothing:
        note(found.why_nothing)
    sys.exit(found.status)


def _check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before the work."""
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder, so {path.name} cannot be written there; make it")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written; choose a folder you may write to")
