"""Recordings as tables and as JSON, for people and for scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypedDict

from ..diagnostics import printable
from ..errors import LayoutError
from ..filters import Filter
from ..format.rows import decoded, matching, parse_tags, rows_of, seen_in, taps_of
from ..format.schema import ManifestRow
from ..layouts.parse import layout_of
from ..mesh import FrozenMesh
from ..recording import Recording
from ..sizes import count, format_size
from ..tags import TagValue, label
from .tables import console_of, natural_width, number, shape_text, short, span, table_of

if TYPE_CHECKING:
    import polars as pl

    from ..verify import Checker, RankReport


_LINES = 16
_MOST_VALUES, _MOST_SHAPES = 1000, 100
_TEXTS = ("tap", "ranks", "steps", "dtype and shape", "rank", "step", "occ", "layout")
_LONGEST = 120  # characters of a name
_NARROW = 72  # columns of a terminal in which names still fit beside statistics


def lack_of_statistics(recording: Recording, rows: pl.DataFrame) -> str:
    """Say how many of some rows lack statistics that `verify` fills in; "" where none does."""
    bare = rows.filter(rows["nan_count"].is_null() & rows["dtype"].is_not_null())
    if bare.is_empty():
        return ""
    from ..filling import NOT_GATHERED, lacking  # these take torch, which takes seconds

    lack = lacking(recording.meta, recording.claims(), rows_of(bare))
    if not lack:
        return ""
    return f"{count(lack, 'record')} of these {NOT_GATHERED.format(run=recording.path)}"


def selected(
    recording: Recording, filter: Filter | None, rank: int | None = None
) -> tuple[pl.DataFrame, str | None]:
    """Return the rows that a filter and a rank select, and why there are none."""
    rows = recording.rows()
    kept = rows if filter is None else rows.filter(matching(rows, filter))
    if rank is not None:
        kept = kept.filter(kept["rank"] == rank)
    if kept.height:
        return kept, None
    if not rows.height:
        return kept, "the recording is empty: no tap was selected when it was made"
    if rank is not None and rank not in recording.ranks:
        have = ", ".join(map(str, recording.ranks))
        return kept, f"rank {rank} recorded nothing; the recording has rank {have}"
    if filter is None:
        return kept, f"rank {rank} recorded nothing"
    names, values = seen_in(rows)
    return kept, filter.why_nothing(values, names, values)


class Tap(TypedDict):
    """All records of one name and kind.

    `tags` has each tag's distinct values, at most 1000; `shapes` are at most 100.
    """

    name: str
    kind: str
    tags: dict[str, list[TagValue]]
    ranks: list[int]
    steps: list[int]
    records: int
    dtypes: list[str]
    shapes: list[list[int] | None]
    nbytes: int


def taps(rows: pl.DataFrame) -> list[Tap]:
    """Return the taps of manifest rows, in order of first execution."""
    import polars as pl

    by = ["name", "kind"]
    sums = rows.group_by(by, maintain_order=True).agg(
        ranks=pl.col("rank").unique().sort(),
        steps=pl.col("step").unique().sort(),
        records=pl.len(),
        nbytes=pl.col("nbytes").sum(),
    )
    made: dict[tuple[str, str], Tap] = {}
    for name, kind, ranks, steps, many, nbytes in sums.iter_rows():
        made[name, kind] = {
            "name": name, "kind": kind, "tags": {}, "ranks": ranks, "steps": steps,
            "records": many, "dtypes": [], "shapes": [], "nbytes": nbytes or 0,
        }  # fmt: skip
    tags: dict[tuple[str, str], dict[str, dict[str, TagValue]]] = {key: {} for key in made}
    for name, kind, text in _distinct(rows, [*by, "tags"]):
        for tag, value in parse_tags(text).items():
            values = tags[name, kind].setdefault(tag, {})
            if len(values) < _MOST_VALUES:
                values[json.dumps(value)] = value
    tensors = rows.filter(pl.col("dtype").is_not_null())
    for name, kind, dtype in _distinct(tensors, [*by, "dtype"]):
        made[name, kind]["dtypes"].append(dtype)
    for name, kind, shape in _distinct(tensors, [*by, "shape"]):
        if len(made[name, kind]["shapes"]) < _MOST_SHAPES:
            made[name, kind]["shapes"].append(shape)
    for key, one in made.items():
        one["tags"] = {tag: list(values.values()) for tag, values in tags[key].items()}
    return [*made.values()]


def _distinct(rows: pl.DataFrame, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield what some columns hold, each thing once, in order."""
    return rows.select(columns).unique(maintain_order=True).iter_rows()


def records(recording: Recording, rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Return each row as an object, JSON columns decoded: `tags`, `extras`, `value`.

    Where its rank's place in a mesh is known, it has that as `mesh`: axis -> coordinate and size.
    """
    found = []
    for row in rows_of(rows):
        made: dict[str, Any] = {**row}
        mesh = recording.mesh_of(row)
        if mesh is not None:
            made["mesh"] = {axis: list(place) for axis, place in mesh}
        for column in ("tags", "extras", "value"):
            if made[column] is not None:
                made[column] = decoded(made[column])
        found.append({k: _jsonable(v) for k, v in made.items()})
    return found


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def incomplete_lines(recording: Recording) -> list[str]:
    """Return a line for each group of ranks whose records end early for the same reason."""
    groups: dict[tuple[int, str], list[int]] = {}
    for one in recording.incomplete():
        groups.setdefault((one.step, one.reason), []).append(one.rank)
    lines = [
        f"incomplete from step {step} on: rank {span(ranks)} {reason}"
        for (step, reason), ranks in groups.items()
    ]
    more = len(lines) - _LINES
    return lines if more <= 0 else [*lines[:_LINES], f"... and {count(more, 'more such line')}"]


def print_taps(recording: Recording, rows: pl.DataFrame, found: list[Tap], width: int) -> None:
    """Print a recording's head line and one line per tap."""
    console = console_of(width)
    claims = recording.claims()
    open_ranks = sorted(c["rank"] for c in claims if c.get("state") in ("running", "killed"))
    state = f", not closed on rank {span(open_ranks)}" if open_ranks else ""
    missing = sorted(set(range(recording.world_size)) - set(recording.ranks))
    absent = f", nothing from rank {span(missing)}" if missing else ""
    attempts = max((c["attempt"] for c in claims), default=0)
    again = f", restarted {count(attempts, 'time')}" if attempts else ""
    drops = [c["dropped"] for c in claims if isinstance(c.get("dropped"), int)]
    dropped = f", {count(sum(drops), 'tap')} dropped" if sum(drops) > 0 else ""
    command = " ".join(map(str, recording.meta.get("command") or []))
    tapped = taps_of(rows)
    ids = _and_ids(rows.height - tapped.height)
    nbytes = int(tapped["nbytes"].sum() or 0)
    console.print(
        printable(
            f"{recording.path}: {count(recording.world_size, 'rank')}, "
            f"{count(tapped.height, 'record')}{ids}, {format_size(nbytes)} tapped"
            f"{state}{absent}{again}{dropped}"
        ),
        soft_wrap=True,
    )
    console.print(printable(f"command: {command}"), soft_wrap=True)
    for line in incomplete_lines(recording):
        console.print(printable(line), soft_wrap=True)
    if not found:
        return
    columns = ["tap", "ranks", "steps", "records", "dtype and shape", "bytes"]
    if width < _NARROW:
        columns.remove("dtype and shape")
    table = table_of(*columns, left=_TEXTS)
    for tap in found:
        kind = "" if tap["kind"] == "tensor" else f" ({tap['kind']})"
        tags = "".join(f" {tag}={span(values)}" for tag, values in sorted(tap["tags"].items()))
        shapes = [shape_text(shape) for shape in tap["shapes"][:2]]
        more = ["..."] if len(tap["shapes"]) > 2 else []
        cells = {
            "tap": short(tap["name"], _LONGEST) + tags + kind,
            "ranks": span(tap["ranks"]),
            "steps": span(tap["steps"]),
            "records": str(tap["records"]),
            "dtype and shape": " ".join([*tap["dtypes"], *shapes, *more]),
            "bytes": format_size(tap["nbytes"]),
        }
        table.add_row(*(printable(cells[column]) for column in columns))
    console.print(table)


def _and_ids(number: int) -> str:
    """Return how many records hold the ids of rows, to stand behind the number of the others."""
    return f" and {number} of ids of rows" if number else ""


def print_records(recording: Recording, rows: pl.DataFrame, width: int) -> None:
    """Print one line per record; columns that would say nothing are left out."""
    if not rows.height:
        return
    console = console_of(width)
    cells = [_cells(row, recording.mesh_of(row)) for row in rows_of(rows)]
    dull = {"occ": "0", "rank": cells[0]["rank"], "bad": "", "layout": ""}
    columns = [
        column
        for column in cells[0]
        if column not in dull or any(cell[column] != dull[column] for cell in cells)
    ]
    if width < _NARROW:
        columns = [c for c in columns if c not in ("min", "max", "mean", "std")]
    for least in ("std", "mean", "max", "min", "layout"):
        if least in columns and "layout" in columns and natural_width(columns, cells) > width:
            columns.remove(least)
    table = table_of(*columns, left=_TEXTS)
    for cell in cells:
        table.add_row(*(printable(cell[column]) for column in columns))
    if "rank" not in columns:
        console.print(f"rank {cells[0]['rank']}")
    console.print(table)
    if "bad" in columns:
        console.print("bad: elements that are NaN or infinite; the statistics are over the others")


def _cells(row: ManifestRow, mesh: FrozenMesh | None) -> dict[str, str]:
    kind = "" if row["kind"] == "tensor" else f" ({row['kind']})"
    bad = (row["nan_count"] or 0) + (row["inf_count"] or 0)
    if row["value"] is not None:
        what = short(row["value"])
    else:
        what = f"{row['dtype'] or ''} {shape_text(row['shape'])}"
    return {
        "rank": str(row["rank"]),
        "step": str(row["step"]),
        "tap": label(row["name"], row["tags"]) + kind,
        "occ": str(row["occurrence"]),
        "dtype and shape": what,
        "layout": _layout(row["dims"], row["kind"], mesh) if row["dims"] else "",
        "min": number(row["min"]),
        "max": number(row["max"]),
        "mean": number(row["mean"]),
        "std": number(row["std"]),
        "bad": str(bad) if bad else "",
    }


def _layout(text: str, kind: str, mesh: FrozenMesh | None) -> str:
    """Return a layout with the rank's place on each axis that cuts: `b s[cp 0/2] h[tp 1/4]`."""
    try:
        dims = layout_of(text, kind)
    except LayoutError:
        return text
    places: dict[str, tuple[int | None, int]] = {**dict(mesh or ()), **(dims.mesh or {})}

    def place(axis: str) -> str:
        at, size = places.get(axis, (None, 0))
        return axis if at is None else f"{axis} {at}/{size}"

    words = []
    for dim in dims.dims:
        cuts = [
            place(cut.axis)
            + (f" /{cut.share}" if cut.share > 1 else "")
            + (" zigzag" if cut.zigzag else "")
            + (" repeat" if cut.repeat else "")
            for cut in dim.cuts
        ]
        words.append(dim.label + (f"[{', '.join(cuts)}]" if cuts else ""))
    partial = [f"{place(axis)} {how}" for axis, how in dims.partial]
    return " ".join(words) + (f" (partial: {', '.join(partial)})" if partial else "")


def print_rank_check(one: RankReport) -> None:
    """Print what was found of one rank: a line for each problem, then one for all."""
    console = console_of(200)
    for problem in one.problems:
        console.print(printable(str(problem)), soft_wrap=True)
    verdict = "whole"
    if one.problems:
        verdict = f"{count(one.damaged, 'record')} damaged, {count(len(one.problems), 'problem')}"
    console.print(
        f"rank {one.rank}: {count(one.records, 'record')}{_and_ids(one.ids)}, "
        f"{format_size(one.nbytes)} checked, "
        f"{verdict}",
        soft_wrap=True,
    )


def print_check(
    checker: Checker, found: list[RankReport], out: str | None, written: int | None
) -> None:
    """Print what a check of all ranks came to."""
    console = console_of(200)
    records, damaged = sum(r.records for r in found), sum(r.damaged for r in found)
    ids = _and_ids(sum(r.ids for r in found))
    nbytes = sum(r.nbytes for r in found)
    problems = sum(len(r.problems) for r in found)
    verdict = (
        f"{count(damaged, 'record')} damaged, {count(problems, 'problem')}" if problems else "whole"
    )
    console.print(
        printable(
            f"{checker.path}: {count(len(found), 'rank')}, {count(records, 'record')}{ids}, "
            f"{format_size(nbytes)} checked: {verdict}"
        ),
        soft_wrap=True,
    )
    for line in _filled_lines(found):
        console.print(printable(line), soft_wrap=True)
    if out is not None:
        console.print(printable(f"{out}: {count(written or 0, 'record')} written"), soft_wrap=True)


def _filled_lines(found: list[RankReport]) -> list[str]:
    """Return what became of statistics that were missing, one line each."""
    filled, unfilled = (sum(getattr(r, name) for r in found) for name in ("filled", "unfilled"))
    lines = []
    if filled:
        lines.append(f"statistics of {count(filled, 'record')} filled in")
    if unfilled:
        why = next(r.why for r in found if r.why)
        lines.append(f"statistics of {count(unfilled, 'record')} are not filled in: {why}")
    return lines


def check_as_dict(
    checker: Checker, found: list[RankReport], out: str | None, written: int | None
) -> dict[str, Any]:
    """Return a check as an object for JSON."""
    return {
        "run": str(checker.path),
        "whole": not any(one.problems for one in found),
        "ranks": [
            {
                "rank": one.rank,
                "records": one.records,
                "ids": one.ids,
                "damaged": one.damaged,
                "nbytes": one.nbytes,
                "filled": one.filled,
                "problems": [asdict(problem) for problem in one.problems],
            }
            for one in found
        ],
        "repaired": None if out is None else {"run": out, "records": written},
    }
