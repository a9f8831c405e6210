"""Tables and bars for a terminal: how values are written, and how wide they may be."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..progress import is_terminal
from ..sizes import sizes_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console_of(width: int) -> Console:
    """Return a console on stdout of some columns that takes no text for markup."""
    from rich.console import Console

    # Some environments ask rich to style what goes into a pipe; whoever reads that wants the text.
    return Console(
        width=width,
        markup=False,
        highlight=False,
        emoji=False,
        force_terminal=sys.stdout.isatty(),
    )


def table_of(*columns: str, left: Sequence[str] = (), folded: Sequence[str] = ("tap",)) -> Table:
    """Return a table without lines.

    Args:
        *columns: their titles.
        left: those that hold text; the others hold numbers.
        folded: those that may go on in the next line where there is no room.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(
            Text(column),
            justify="left" if column in left else "right",
            overflow="fold",
            no_wrap=column not in folded,
        )
    return table


def shape_text(shape: Sequence[int | None] | None) -> str:
    """Return a shape as `2x16x128`; what is not known as `?`, the middle of a long one cut."""
    sizes, more = sizes_of(shape)
    return "?" if shape is None else "x".join(sizes) + more or "scalar"


def span(values: list[Any]) -> str:
    """Return values in as few characters as say it: `0-3`, `q,k,v`, `0,2,..,14`."""
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if whole and len(values) > 2 and sorted(values) == list(range(min(values), max(values) + 1)):
        return f"{min(values)}-{max(values)}"
    texts = [short(str(v), 60) for v in values]
    return ",".join(texts if len(texts) <= 4 else [*texts[:2], "..", texts[-1]])


def number(value: float | None) -> str:
    """Return a number with three digits, "" for none."""
    return "" if value is None else f"{value:.3g}"


def short(text: str, most: int = 24) -> str:
    """Return a text that fits a column: of a long one both ends, since long names share one."""
    if len(text) <= most:
        return text
    end = (most - 3) // 2
    return f"{text[: most - 3 - end]}...{text[len(text) - end :]}"


def natural_width(columns: Sequence[str], cells: Sequence[dict[str, str]]) -> int:
    """Return how wide a table is that folds nothing."""
    widths = (max(len(column), *(len(cell[column]) for cell in cells)) for column in columns)
    return sum(widths) + len(columns) - 1


@contextmanager
def bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes on stderr where it is a terminal; yields what to call with more."""
    if not is_terminal():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


def terminal_width() -> int:
    """Return the terminal's columns; where there is none, enough not to cut anything."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
