"""Three recordings side by side: the baseline, the target, and the target after a graft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from recorder.commands.tables import console_of, natural_width, short, table_of
from recorder.diagnostics import printable
from recorder.sizes import count
from recorder.tags import label

from ..diffing.columns import OUTCOMES
from ..diffing.diff import GOOD, Diff
from .lines import cell_of, lines_of_grafts, title

_KEY = ("name", "tags", "kind", "step", "occurrence")
_NAMED = 16  # characters of a folder's name


def status_of(before: Diff, after: Diff) -> int:
    """Return the status of what came after the graft; 2 where one cannot be read."""
    return 2 if before.status == 2 else after.status


def print_beside(before: Diff, after: Diff, width: int, limit: int) -> None:
    """Print what came of both, and a table of the taps from the first divergence on.

    Args:
        before: the baseline against the target.
        after: the baseline against the target with a graft.
        width: of the terminal.
        limit: rows of the table.
    """
    console = console_of(width)
    for one in lines_beside(before, after):
        console.print(printable(one), soft_wrap=True)
    table = beside(before, after)
    if not table.height:
        return
    names = _names(before, after)
    cells = [_cells(row, names) for row in table.head(limit).iter_rows(named=True)]
    columns = [c for c in cells[0] if c != "" and any(cell[c] for cell in cells)]
    if natural_width([*columns, ""], cells) > width and "step" in columns:
        same = len({cell["step"] for cell in cells}) == 1
        columns = [c for c in columns if not (same and c == "step")]
    console.print()
    shown = table_of(*columns, "", left=("tap", *names, ""), folded=("tap",))
    for cell in cells:
        shown.add_row(*(printable(cell[column]) for column in (*columns, "")))
    console.print(shown)
    if table.height > limit:
        console.print(f"... and {count(table.height - limit, 'more tap')}; see --limit")


def lines_beside(before: Diff, after: Diff) -> list[str]:
    """Return what both came to, a line each."""
    found = []
    for name, one in zip(_names(before, after), (before, after), strict=True):
        first = one.first("tolerance")
        counts = one.counts()
        unread = sum(counts[o] for o in ("error", "shape", "unmeasured"))
        told = "nothing beyond tolerance"
        if unread:
            told += f" in what could be compared, {count(unread, 'pair')} could not"
        if not one.compared:
            told = "nothing was compared"
        if first is not None:
            told = f"first divergence beyond tolerance {title(first)}"
        elif one.first("grafted") is not None:
            told += " but at what was grafted"
        missing = counts["only_a"] + counts["only_b"]
        alone = f", {missing} on one side only" if missing else ""
        found.append(
            f"{name}: {count(one.compared, 'pair')}, {counts['differs']} beyond tolerance{alone}; "
            f"{told}"
        )
    return [*found, *lines_of_grafts(after)]


def beside(before: Diff, after: Diff) -> pl.DataFrame:
    """Return the taps in the order of execution, from the first that is beyond tolerance on.

    Columns: the key, `outcome` and `rel_diff` of the worst rank, each with `_after` for the second,
    and `grafted`.
    """
    one, other = (_by_tap(diff.pairs) for diff in (before, after))
    # `maintain_order` of a full join keeps the left side's order alone.
    both = one.join(other, on=_KEY, how="full", coalesce=True, nulls_equal=True, suffix="_after")
    both = both.sort(pl.coalesce("at", "at_after"), maintain_order=True)
    is_beyond = pl.any_horizontal(
        *(~pl.col(name).is_in([*GOOD]).fill_null(True) for name in ("outcome", "outcome_after"))
    )
    begins = both.select(is_beyond.arg_max()).item() if both.select(is_beyond.any()).item() else 0
    return both.slice(begins)


def _by_tap(pairs: pl.DataFrame) -> pl.DataFrame:
    rank = pl.col("outcome").replace_strict(
        {name: i for i, name in enumerate(OUTCOMES)}, return_dtype=pl.Int32
    )
    worst = (
        pairs.with_row_index("at")
        .with_columns(severity=rank)
        .sort("severity", -pl.col("rel_diff").fill_null(0.0), maintain_order=True)
    )
    return worst.group_by(_KEY, maintain_order=True).agg(
        pl.col("at").min(), pl.col("outcome", "rel_diff").first(), pl.col("grafted").any()
    )


def _names(before: Diff, after: Diff) -> tuple[str, str]:
    """Return the folders' names, or letters where they are the same."""
    first, second = (short(Path(one.b.path).name, _NAMED) for one in (before, after))
    return (first, second) if first != second and "" not in (first, second) else ("B", "C")


def _cells(row: Mapping[str, Any], names: tuple[str, str]) -> dict[str, str]:
    kind = "" if row["kind"] == "tensor" else f" ({row['kind']})"
    return {
        "tap": label(row["name"], row["tags"]) + kind,
        "step": str(row["step"]),
        "occ": str(row["occurrence"]) if row["occurrence"] else "",
        names[0]: _outcome(row["outcome"], row["rel_diff"]),
        names[1]: _outcome(row["outcome_after"], row["rel_diff_after"]),
        "": "<- grafted" if row["grafted_after"] else "",
    }


def _outcome(outcome: str | None, rel_diff: float | None) -> str:
    if outcome is None:
        return "-"
    return f"{outcome} {cell_of(rel_diff)}".rstrip() if outcome not in ("equal",) else outcome
