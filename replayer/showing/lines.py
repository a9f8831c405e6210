"""A diff for people and for scripts: lines, a table for the terminal, JSON, parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from recorder.commands.tables import console_of, natural_width, span, table_of
from recorder.diagnostics import printable
from recorder.format.rows import decoded, parse_tags
from recorder.sizes import count, format_shape
from recorder.tags import label

from ..diffing.columns import DiffRow, rows_of
from ..diffing.diff import Diff
from ..pairing.pairs import ROWS
from .output import written

if TYPE_CHECKING:
    from rich.console import Console

_WORDS = {
    "equal": "equal bit for bit",
    "close": "within tolerance",
    "differs": "beyond tolerance",
    "unmeasured": "other bytes, elements not read",
    "shape": "of unequal shape",
    "error": "not comparable",
}
_SIDES = {"only_a": "only in A", "only_b": "only in B"}
_DROPPED = ("p99", "cosine", "margin", "mismatched", "max_abs", "times_floor")
"""Columns that a narrow terminal goes without, the first of them first."""
_BY_ROWS = 5
_LONG = 60  # characters of a value
_OUTSTANDING = 4.0  # times the median row's error


def title(row: DiffRow) -> str:
    """Return what a row is about: name, tags, step and rank, and what else tells it apart."""
    kind = "" if row["kind"] == "tensor" else f" ({row['kind']})"
    if row["how"] == ROWS:
        return f"{label(row['name'], row['tags'])}{kind}{token(row)}"
    times = f" occurrence={row['occurrence']}" if row["occurrence"] else ""
    rank = "" if row["rank"] is None else f" rank={row['rank']}"
    return f"{label(row['name'], row['tags'])}{kind} step={row['step']}{times}{rank}"


def token(row: DiffRow) -> str:
    """Say which row is off first in a pair that is compared row by row, "" where none is."""
    known = [] if row["token"] is None else [f"token {row['token']} at position {row['position']}"]
    if not known and row["row"]:
        known = [f"the row with the id {','.join(map(str, row['row']))}"]
    places = [
        f"step={at[0]} rank={at[1]} row {at[2]} in {side}"
        for side, at in (("A", row["at_a"]), ("B", row["at_b"]))
        if at
    ]
    return "".join(f" {what}" for what in known) + (f" ({', '.join(places)})" if places else "")


def figures(row: DiffRow) -> str:
    """Say in a few words how much a pair differs."""
    if row["outcome"] == "shape":
        one, other = (format_shape(row[side]) for side in ("shape_a", "shape_b"))
        shapes = f"shapes {one} in A and {other} in B"
        return row["message"] or shapes
    if row["outcome"] == "error":
        return str(row["message"])
    if row["value_a"] is not None:
        return f"{_short(row['value_a'])} in A, {_short(row['value_b'])} in B"
    if row["mismatched"] is None:
        least = row["at_least"]
        return "the bytes differ" + (f", max_abs at least {least:.3g}" if least else "")
    facts = [f"rel_diff {_text(row['rel_diff'])}", f"max_abs {_text(row['max_abs'])}"]
    if row["max_abs_a"] is not None:
        # Rows that were matched one by one have no index of their own.
        is_known = row["max_abs_at"] is not None and row["how"] != ROWS
        at = f"at {row['max_abs_at']} " if is_known else ""
        facts[1] += f" {at}({row['max_abs_a']:.7g} in A, {row['max_abs_b']:.7g} in B)"
    elements = f"{row['mismatched']} of {count(row['numel'], 'element')}"
    if row["outcome"] == "close":
        if row["mismatched"]:
            facts.append(f"taken for rounding, though {elements} are beyond rtol and atol")
    else:
        facts.append(f"{elements} beyond tolerance")
    if row["outcome"] != "close" and row["max_beyond_at"] not in (None, row["max_abs_at"]):
        facts[-1] += f", the farthest by {_text(row['max_beyond'])}"
        facts[-1] += f" at {row['max_beyond_at']}" if row["how"] != ROWS else ""
    facts += filter(None, [shape_of_error(row)])
    odd = [
        f"{n} {what} alone"
        for n, what in (
            (row["nan_a"], "NaN in A"),
            (row["nan_b"], "NaN in B"),
            (row["inf_a"], "Inf in A"),
            (row["inf_b"], "Inf in B"),
        )
        if n
    ]
    if odd and row["odd_at"] is not None and row["how"] != ROWS:
        odd[-1] += f", the first at {row['odd_at']}"
    facts += odd
    if row["flips"]:
        facts.append(chosen(row))
    if row["rows"] is not None:
        facts.append(rows_compared(row))
    if row["times_floor"] is not None:
        facts.append(f"{_text(row['times_floor'])} times the noise floor")
    if row["ranks_differ"] and len(row["ranks_b"] or ()) > 1:
        which = "rank" if len(row["ranks_differ"]) == 1 else "ranks"
        facts.append(f"on {which} {span(row['ranks_differ'])} of B")
    if row["dtype_a"] != row["dtype_b"]:
        facts.append(f"{row['dtype_a']} in A, {row['dtype_b']} in B")
    if row["message"]:
        facts.append(row["message"])
    return ", ".join(facts)


def chosen(row: DiffRow) -> str:
    """Say how many rows of a router's chose others, and by what margin."""
    text = f"{count(row['flips'] or 0, 'row')} another choice"
    if row["margin"] is None:
        return text
    return (
        f"{text}, {row['ties']} of them near ties, by A's scores apart by "
        f"{_text(row['margin_typical'])} in the median and {_text(row['margin'])} at most"
    )


def rows_compared(row: DiffRow) -> str:
    """Say how many rows both sides have, and how many each has alone."""
    sides = (("A", row["rows_a"]), ("B", row["rows_b"]))
    alone = [f"{n} only in {side}" for side, n in sides if n]
    return f"over {count(row['rows'] or 0, 'row')} in common" + "".join(f", {one}" for one in alone)


def shape_of_error(row: DiffRow) -> str:
    """Say by what a pair is known to be no rounding, "" where its size alone tells."""
    if row["outcome"] != "differs":
        return ""
    if row["fits_at"] is not None:
        factor, offset = row["factor"], row["offset"]
        what = f"B is A {offset:+.4g}" if factor is None else f"B is {_factor(factor)} x A"
        return what + _place(row["fits_at"], row["dim_names"])
    if row["error_row_at"] is None or row["error_row"] is None or len(row["error_row_at"]) < 2:
        return ""
    typical = row["error_typical"] or 0.0
    if row["error_row"] < _OUTSTANDING * typical:
        return ""
    where = _place(row["error_row_at"], row["dim_names"])
    where = where if row["how"] != ROWS else " of the worst row"
    return f"the error{where} is {row['error_row']:.3g} of its size, that of others {typical:.2g}"


def _factor(factor: float) -> str:
    return f"{factor:.4f}" if abs(factor - 1) >= 1e-3 else f"{factor:.9f}".rstrip("0")


def _place(at: Sequence[int], names: Sequence[str] | None) -> str:
    """Say which part of a tensor is meant: `at` is an index, -1 for whole dims."""
    dims = [i for i, index in enumerate(at) if index >= 0]
    called = [str(i) if names is None else names[i] for i in dims]
    if not dims:
        return ""
    if len(dims) == 1:
        return f" at index {at[dims[0]]} of dim {called[0]}"
    return f" at {[at[i] for i in dims]} of dims {', '.join(called)}"


def _short(text: str | None) -> str:
    text = str(text)
    return text if len(text) <= _LONG else text[: _LONG - 3] + "..."


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3g}"


def lines(diff: Diff) -> list[str]:
    """Return what a diff came to, a line each; a first divergence's starts with these words."""
    found = [
        f"{name} {run.path}: {count(run.world_size, 'rank')}, "
        f"{count(run.latest().height, 'record')}"
        for name, run in (("A", diff.a), ("B", diff.b))
    ]
    if not diff.compared and not diff.pairs.height:
        return found
    counts = diff.counts()
    outcomes = [f"{counts[o]} {words}" for o, words in _WORDS.items() if counts[o]]
    sides = [f"{counts[o]} {words}" for o, words in _SIDES.items() if counts[o]]
    found.append(f"{count(diff.compared, 'pair')}: {', '.join([*outcomes, *sides])}")
    return [*found, *findings(diff)]


def findings(diff: Diff) -> list[str]:
    """Return of these lines those behind the sides and the counts."""
    if not diff.compared:
        return []
    found: list[str] = []
    counts = diff.counts()
    found += _over_nothing(diff.over_nothing)
    for how, words in (("bitwise", "bitwise"), ("tolerance", "beyond tolerance")):
        row = diff.first(how)
        if row is None:
            unread = counts["error"] + counts["shape"]
            unread += counts["unmeasured"] if how == "tolerance" else 0
            known = (
                f" in what could be compared; {count(unread, 'pair')} could not" if unread else ""
            )
            found.append(f"no divergence {words}{_but_at_grafts(diff)}{known}")
        else:
            same = how == "tolerance" and row["first"] == "both"
            facts = "the same" if same else figures(row)
            found.append(f"first divergence {words}: {title(row)}: {facts}")
    found += _rows_alone(diff)
    found += lines_of_grafts(diff)
    found += _accumulated(diff)
    for what, words in (
        ("replicas", "replicas apart"),
        ("recompute", "recomputed otherwise"),
        ("rows", "rows on one side alone"),
    ):
        rows = diff.pairs.filter(pl.col("apart") == what)
        if rows.height:
            first = next(rows_of(rows))
            how_many = count(rows.height, "pair")
            found.append(f"{words}: {how_many}, the first {title(first)}: {first['message']}")
    apart = pl.col("dtype_a") != pl.col("dtype_b")
    for words, which in (
        ("only in A", pl.col("outcome") == "only_a"),
        ("only in B", pl.col("outcome") == "only_b"),
        ("of unequal shape", pl.col("outcome") == "shape"),
        ("of unequal dtype", apart),
        ("in another order", pl.col("reordered")),
        ("not comparable", pl.col("outcome") == "error"),
    ):
        rows = diff.pairs.filter(which)
        if rows.height:
            first = next(rows_of(rows))
            found.append(f"{words}: {rows.height}, the first {title(first)}{_why(words, first)}")
    return found


def _but_at_grafts(diff: Diff) -> str:
    return " but at what was grafted" if diff.first("grafted") is not None else ""


def lines_of_grafts(diff: Diff) -> list[str]:
    """Say what came of the taps that B's replay overwrote: before the graft, and after it."""
    rows = diff.pairs.filter(pl.col("grafted"))
    if not rows.height:
        return []
    first = diff.first("grafted")
    if first is None:
        return [f"{count(rows.height, 'grafted pair')}: within tolerance before the graft too"]
    off = rows.filter(pl.col("outcome") == "differs")
    more = f", and {off.height - 1} more" if off.height > 1 else ""
    taps = off.select("name", "tags").n_unique()
    found = [
        f"at a grafted tap, as it was before it was overwritten: {title(first)}{more}: "
        f"{figures(first)}"
    ]
    after = diff.first("tolerance")
    if after is not None and after["pair"] > first["pair"]:
        found.append(
            f"after the graft, still beyond tolerance, first {title(after)}: there is a second "
            "fault, or the first reaches it along another path"
        )
    elif after is None:
        before = diff.pairs.filter(
            (pl.col("pair") < first["pair"])
            & ~pl.col("grafted")
            & pl.col("outcome").is_in(["equal", "close"])
        ).tail(1)
        last = next(rows_of(before), None)
        place = f"between {_tap(last)} and {_tap(first)}" if last else f"before {_tap(first)}"
        others = f", or before another of the {taps} that were grafted" if taps > 1 else ""
        found.append(
            f"nothing beyond tolerance after the graft: what is wrong lies {place}{others}"
        )
    return found


def _tap(row: DiffRow) -> str:
    return label(row["name"], row["tags"])


def _accumulated(diff: Diff) -> list[str]:
    rows = diff.pairs.filter(pl.col("growth").is_not_null()).sort(
        "growth", descending=True, maintain_order=True
    )
    if not rows.height:
        return []
    most = next(rows_of(rows))
    return [
        f"rounding accumulates in {count(rows.height, 'pair')} without a jump: by at most "
        f"{most['growth']:.3g}x from one to the next, at {title(most)}; to be sure, give --floor a "
        "second run of A, or replay with everything grafted"
    ]


def _rows_alone(diff: Diff) -> list[str]:
    """Say that rows of pairs that are compared row by row are on one side alone."""
    counts = pl.col("rows_a") + pl.col("rows_b")
    rows = diff.pairs.filter(counts > 0).sort(counts, descending=True, maintain_order=True)
    if not rows.height:
        return []
    most = next(rows_of(rows))
    tap = label(most["name"], most["tags"])
    return [
        f"rows on one side alone in {count(rows.height, 'pair')}, not compared, the most at {tap}: "
        f"{rows_compared(most)}"
    ]


def _over_nothing(rows: pl.DataFrame) -> list[str]:
    if not rows.height:
        return []
    empty = int(rows["empty"].sum())
    kinds = ((empty, "no element"), (rows.height - empty, "only NaN or infinities"))
    facts = " and ".join(f"{what} in {n}" for n, what in kinds if n)
    first = title(next(rows_of(rows)))
    return [f"no number was compared in {count(rows.height, 'pair')}: {facts}, the first {first}"]


def _why(words: str, row: DiffRow) -> str:
    if words == "of unequal dtype":
        return f": {row['dtype_a']} in A, {row['dtype_b']} in B"
    return f": {figures(row)}" if row["outcome"] in ("shape", "error") else ""


def print_diff(diff: Diff, width: int, limit: int, by_size: bool = False) -> None:
    """Print the lines, and a table of pairs that are not equal.

    Args:
        diff: what to print.
        width: of the terminal.
        limit: rows of the table.
        by_size: from the worst on; else in the order of execution, from the first divergence on.
    """
    console = console_of(width)
    for line in lines(diff):
        console.print(printable(line), soft_wrap=True)
    worst = diff.worst()
    if not worst.height:
        return
    rows = worst if by_size else diff.from_first()
    console.print()
    cells = [_cells(row) for row in rows_of(rows.head(limit))]
    _print_cells(console, cells, width)
    if worst.height > len(cells):
        more = count(worst.height - len(cells), "more pair")
        how = "--limit" if by_size else "--limit, and --sort size for the worst"
        console.print(f"... and {more}, not equal; see {how}")
    _print_shapes(console, rows.head(limit))
    _print_by(console, diff, worst.head(_BY_ROWS))


def _print_cells(console: Console, cells: list[dict[str, str]], width: int) -> None:
    columns = [c for c in cells[0] if any(cell[c] for cell in cells)]
    for least in _DROPPED:
        if least in columns and natural_width(columns, cells) > width:
            columns.remove(least)
    table = table_of(*columns, left=("", "tap", "outcome"))
    for cell in cells:
        table.add_row(*(printable(cell[column]) for column in columns))
    console.print(table)


def _cells(row: DiffRow) -> dict[str, str]:
    marks = {"bitwise": "first", "tolerance": "first beyond", "both": "first"}
    mark = "grafted" if row["grafted"] else marks.get(row["first"] or "", "")
    kind = "" if row["kind"] == "tensor" else f" ({row['kind']})"
    mismatched, numel = row["mismatched"], row["numel"]
    is_beyond = row["outcome"] != "close"  # else what is off is taken for rounding
    odd = sum(n or 0 for n in (row["nan_a"], row["nan_b"], row["inf_a"], row["inf_b"]))
    return {
        "": mark,
        "tap": label(row["name"], row["tags"]) + kind + ("*" if row["reordered"] else ""),
        "step": "" if row["how"] == ROWS else str(row["step"]),
        "occ": str(row["occurrence"]) if row["occurrence"] else "",
        "rank": "" if row["rank"] is None else str(row["rank"]),
        "outcome": row["outcome"],
        "flips": str(row["flips"]) if row["flips"] else "",
        "margin": cell_of(row["margin"]),
        "rel_diff": cell_of(row["rel_diff"]),
        "max_abs": cell_of(row["max_abs"] if row["max_abs"] is not None else row["at_least"]),
        "mismatched": _share(mismatched / numel) if is_beyond and mismatched and numel else "",
        "cosine": "" if row["cosine"] is None else f"{row['cosine']:.6f}",
        "p99": cell_of(row["p99"]),
        "NaN Inf": str(odd) if odd else "",
        "times_floor": cell_of(row["times_floor"]),
    }


def _print_shapes(console: Console, rows: pl.DataFrame) -> None:
    """Print, of some pairs, by what they are known to be no rounding; not of the first, again."""
    first = pl.col("first").is_in(["both", "tolerance"]).fill_null(False)
    told = [(row, shape_of_error(row)) for row in rows_of(rows.filter(~first))]
    told = [(row, text) for row, text in told if text]
    for row, text in told[:_BY_ROWS]:
        console.print(printable(f"{title(row)}: {text}"), soft_wrap=True)
    if len(told) > _BY_ROWS:
        more = count(len(told) - _BY_ROWS, "more pair")
        console.print(f"... the like of {more}; see factor and error_row of --json")


def _share(part: float) -> str:
    return f"{part:.2%}" if part >= 1e-4 else "<0.01%"


def cell_of(value: float | None) -> str:
    """Return a figure as a table has it."""
    return (
        "" if value is None else f"{value:.2e}" if value and math.isfinite(value) else f"{value:g}"
    )


def _print_by(console: Console, diff: Diff, rows: pl.DataFrame) -> None:
    """Print, for the worst pairs, which indices of the dim of `--by` are the worst."""
    detail = diff.table.filter(pl.col("by").is_not_null())
    if not detail.height:
        return
    for row in rows_of(rows):
        detailed = rows_by(detail, row)
        if not detailed.height:
            continue
        worse = detailed.filter(pl.col("outcome") == "differs")
        words = "beyond tolerance"
        if not worse.height:
            worse, words = detailed.filter(pl.col("changed") > 0), "not equal"
        shown = worse.sort("rel_diff", descending=True, nulls_last=False).head(_BY_ROWS)
        indices = ", ".join(
            f"{_index(one)} (rel_diff {_text(one['rel_diff'])})" for one in rows_of(shown)
        )
        more = ", ..." if worse.height > _BY_ROWS else ""
        console.print(
            printable(
                f"{title(row)}: along {detailed['by'][0]}, "
                f"{worse.height} of {detailed.height} {words}: "
                f"{indices}{more}"
            ),
            soft_wrap=True,
        )


def _index(row: DiffRow) -> str:
    return token(row).strip() if row["at_a"] else str(row["index"])


def rows_by(detail: pl.DataFrame, row: DiffRow) -> pl.DataFrame:
    """Return the rows by index that belong to the row of a whole tensor."""
    keys = ("pair", "ranks_a", "ranks_b")
    known: Mapping[str, Any] = row
    return detail.filter(
        pl.all_horizontal(
            pl.col(key).eq_missing(pl.lit(known[key], dtype=detail.schema[key])) for key in keys
        )
    )


def objects(diff: Diff) -> Iterator[str]:
    """Yield each row of the table as JSON: tags and values decoded, what is not finite as text."""
    for row in diff.table.iter_rows(named=True):
        made = {name: _jsonable(value) for name, value in row.items()}
        for name in ("tags", "tags_b"):
            if row[name] is not None:
                made[name] = parse_tags(row[name])
        for name in ("value_a", "value_b"):
            if row[name] is not None:
                made[name] = decoded(row[name])
        yield json.dumps(made, allow_nan=False)


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_parquet(diff: Diff, path: Path) -> None:
    """Write the table to a file; see `output.written`."""

    def write(spare: Path) -> None:
        try:
            diff.table.write_parquet(spare)
        except pl.exceptions.PolarsError as err:  # what it makes of the system's errors
            raise OSError(None, str(err), str(path)) from None

    written(path, write)
