"""The table of a diff: what the manifests say of each pair, its measures, its outcome.

1. `base_of` joins the pairs with both sides' columns; `tasks_of` is what tensors are to decide.
2. `assembled` adds what was measured, and what `bounds` proves of what could not be, and judges.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
import xxhash

from recorder.format.rows import parse_tags

from . import bounds
from .measures import measure
from .pairing import EQUAL, LAYOUT, SHAPE, TODO, UNALIGNED, UNDIVIDED, VALUE, Pairs
from .rules import Rules
from .tensors import Row
from .work import Task

OUTCOMES = ("differs", "shape", "error", "unmeasured", "only_a", "only_b", "close", "equal")
"""From the worst on: `equal` is bit for bit, `close` within tolerance, `unmeasured` other bytes
whose elements were not read."""

COLUMNS: dict[str, Any] = {
    "pair": pl.Int64, "name": pl.String, "tags": pl.String, "kind": pl.String, "step": pl.Int64,
    "occurrence": pl.Int32, "rank": pl.Int32, "outcome": pl.String, "first": pl.String,
    "by": pl.String, "index": pl.Int64, "reordered": pl.Boolean, "how": pl.String,
    "name_b": pl.String, "tags_b": pl.String, "step_b": pl.Int64, "occurrence_b": pl.Int32,
    "dtype_a": pl.String, "dtype_b": pl.String, "shape_a": pl.List(pl.Int64),
    "shape_b": pl.List(pl.Int64), "dim_names": pl.List(pl.String), "ranks_a": pl.List(pl.Int32),
    "ranks_b": pl.List(pl.Int32), "ranks_differ": pl.List(pl.Int32), "numel": pl.Int64,
    "bitwise": pl.Boolean, "changed": pl.Int64, "mismatched": pl.Int64,
    "max_beyond": pl.Float64, "max_beyond_at": pl.List(pl.Int64), "rtol": pl.Float64,
    "atol": pl.Float64, "rel_diff": pl.Float64, "cosine": pl.Float64, "max_abs": pl.Float64,
    "max_abs_at": pl.List(pl.Int64), "max_abs_a": pl.Float64, "max_abs_b": pl.Float64,
    "max_rel": pl.Float64, "max_rel_at": pl.List(pl.Int64), "max_rel_a": pl.Float64,
    "max_rel_b": pl.Float64, "mean_abs": pl.Float64, "bias": pl.Float64, "p50": pl.Float64,
    "p99": pl.Float64, "p999": pl.Float64, "max_ulp": pl.Int64,
    "l2_a": pl.Float64, "l2_b": pl.Float64, "nan_a": pl.Int64,
    "nan_b": pl.Int64, "inf_a": pl.Int64, "inf_b": pl.Int64,
    "odd_at": pl.List(pl.Int64), "at_least": pl.Float64,
    "floor_rel_diff": pl.Float64, "floor_max_abs": pl.Float64, "times_floor": pl.Float64,
    "value_a": pl.String, "value_b": pl.String, "message": pl.String,
}  # fmt: skip
"""The columns of a diff's table, in order."""


_UNALIGNED = (
    "the ranks' shapes differ, as do the numbers of ranks, and no layout says how it is cut; "
    "declare the dims at the taps of both sides, as in tap(..., dims='b s h[tp]')"
)
_UNKNOWN = (
    "the layouts differ, and only the tensors can tell; compare them without --manifest-only, of "
    "recordings made with --level tensors"
)
_OF_BOTH = ("rank", "step", "name", "tags", "occurrence", "kind", "dtype", "shape", "value")
_REPLACED = ("rank", "ranks_a", "ranks_b", "shape_a", "shape_b")
"""Columns in which what was measured has the last word."""
_SAME: dict[str, Any] = {
    "changed": 0, "mismatched": 0, "rel_diff": 0.0, "max_abs": 0.0, "mean_abs": 0.0, "cosine": 1.0,
}  # fmt: skip


def base_of(pairs: Pairs) -> pl.DataFrame:
    """Return the pairs, numbered, with what both manifests say of them."""
    table = pairs.table.with_row_index("pair")
    for which, side in (("a", pairs.a), ("b", pairs.b)):
        columns = [pl.col(c).alias(f"{c}_{which}") for c in _OF_BOTH]
        own = [pl.col(f"{c}_0").alias(f"{c}_own_{which}") for c in ("name", "tags")]
        frame = side.frame.with_row_index(which).select(which, *columns, *own)
        table = table.join(frame, on=which, how="left", maintain_order="left")
    by_rank, has_a, has_b = (
        pl.col("how") != LAYOUT, pl.col("a").is_not_null(), pl.col("b").is_not_null(),
    )  # fmt: skip
    own_b = {
        "name": pl.col("name_own_b"),
        "tags": pl.col("tags_own_b"),
        "step": pl.col("step_b") - pairs.step_offset,
        "occurrence": pl.col("occurrence_b"),
    }
    shared = ("name", "tags", "kind", "step", "occurrence")
    table = table.with_columns(
        *(pl.coalesce(f"{c}_a", f"{c}_b").alias(c) for c in shared),
        rank=pl.when(by_rank).then(pl.coalesce("rank_b", "rank_a")),
        ranks_a=pl.when(by_rank & has_a).then(pl.concat_list("rank_a")),
        ranks_b=pl.when(by_rank & has_b).then(pl.concat_list("rank_b")),
    )
    return table.with_columns(
        pl.when(has_b & value.ne_missing(pl.col(c))).then(value).alias(f"{c}_b")
        for c, value in own_b.items()
    )


def fingerprint(pairs: Pairs) -> str:
    """Return what tells two recordings, and how they were matched, from others."""
    found = xxhash.xxh3_128()
    for side in (pairs.a, pairs.b):
        for name in ("digest", "value", "dims"):
            found.update("\n".join(side.frame[name].fill_null("").to_list()).encode())
    for name in ("key", "a", "b"):
        found.update(str(pairs.table[name].to_list()).encode())
    return found.hexdigest()


def tasks_of(pairs: Pairs, table: pl.DataFrame) -> tuple[list[Task], int]:
    """Return the pairs to measure, and how many cannot be: recorded without their elements."""
    todo = table.filter(pl.col("state") == TODO)
    found = []
    unread = 0
    layouts = todo.filter(pl.col("how") == LAYOUT)["key"].unique()
    of_key = [_rows_of_keys(side.frame, layouts) for side in (pairs.a, pairs.b)]
    for number, how, key, a, b in todo.select("pair", "how", "key", "a", "b").iter_rows():
        if how == LAYOUT:
            rows = [known[key] for known in of_key]
        else:
            rows = [[pairs.a.frame.row(a, named=True)], [pairs.b.frame.row(b, named=True)]]
        if any(row["shard"] is None for side in rows for row in side):
            unread += 1
        else:
            found.append(Task(number, how, tuple(rows[0]), tuple(rows[1])))
    return found, unread


def _rows_of_keys(frame: pl.DataFrame, keys: pl.Series) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    wanted = frame.filter(pl.col("key").is_in(keys.implode())).sort("rank")
    for row in wanted.iter_rows(named=True):
        found.setdefault(row["key"], []).append(row)
    return found


def values_of(table: pl.DataFrame) -> list[Row]:
    """Return the measures of recorded numbers, strings and lists."""
    rows: list[Row] = []
    known = table.filter(pl.col("state") == VALUE).select("pair", "value_a", "value_b")
    for number, one, other in known.iter_rows():
        figures = {**_SAME, "bitwise": True} if one == other else _of_values(one, other)
        rows.append({"pair": number, **figures})
    return rows


def _of_values(one: str | None, other: str | None) -> Row:
    """Compare two values: whole numbers exactly, other numbers as float64, all else as it is."""
    different: Row = {"bitwise": False, "numel": 1, "changed": 1, "mismatched": 1}
    try:
        x, y = (json.loads(text) for text in (one or "", other or ""))
    except (ValueError, RecursionError):  # a null, or no JSON
        return different
    if isinstance(x, list) != isinstance(y, list):
        return {"failed": "shape", "message": "a list on one side, one value on the other"}
    x, y = (v if isinstance(v, list) else [v] for v in (x, y))
    if len(x) != len(y):
        return {"failed": "shape", "message": f"a list of {len(x)} in A and of {len(y)} in B"}
    kinds = {type(v) for v in (*x, *y)}
    if not kinds <= {int, float} or any(type(v) is int and abs(v) > 1 << 53 for v in (*x, *y)):
        wrong = sum(
            p != q or isinstance(p, bool) != isinstance(q, bool) for p, q in zip(x, y, strict=True)
        )
        return {**different, "numel": len(x), "changed": wrong, "mismatched": wrong}
    numbers = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (x, y))
    tolerance = 0.0 if kinds == {int} else None
    found = vars(measure(*numbers, rtol=tolerance, atol=tolerance))
    nowhere = dict.fromkeys(("max_abs_at", "max_rel_at", "max_beyond_at", "odd_at"))
    return {**found, "bitwise": False, **nowhere}


def bounded(pairs: Pairs, table: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """Return `outcome`, `at_least` and `rank` of pairs that were not read, as statistics have it.

    Of layouts they say something where all ranks hold the same, undivided; and digests, where the
    ranks of both sides stand alike. Where there may be padding, or summands, nothing is known.

    Args:
        pairs: what belongs together.
        table: those pairs, of `base_of`.
        rules: how pairs are judged.
    """
    columns = ["rank", "dtype", "shape", "dims", "extras", "digest", *bounds.STATISTICS]
    left, right = (
        side.frame.with_row_index(which).select(which, "key", *columns)
        for which, side in (("a", pairs.a), ("b", pairs.b))
    )
    by_rank = (
        table.filter(pl.col("how") != LAYOUT)
        .select("pair", "a", "b")
        .join(left, on="a")
        .join(right.drop("key"), on="b", suffix="_b")
        .with_columns(pl.lit("").alias("dims"))
    )
    blocks = (
        table.filter(pl.col("how") == LAYOUT)
        .select("pair", "key")
        .join(left, on="key")
        .join(right, on=["key", "rank"], suffix="_b")
        .filter(
            pl.col("rank").is_in(pairs.alike)
            & (pl.col("dims") == pl.col("dims_b"))
            & pl.col("extras").is_null()
            & pl.col("extras_b").is_null()
            & ~pl.col("dims").str.contains("partial|Partial|#")
        )
    )
    wanted = ["pair", *columns, *(f"{c}_b" for c in columns[1:])]
    both = pl.concat([by_rank.select(wanted), blocks.select(wanted)])
    both = both.filter(
        pl.col("shape").eq_missing(pl.col("shape_b")) & (pl.col("digest") != pl.col("digest_b"))
    )
    proven = bounds.proven(both, rules.rtol, rules.atol)
    undivided = both["dims"].str.contains(UNDIVIDED) | (both["dims"] == "")
    found = (
        both.select("pair", "rank")
        .hstack(proven)
        .with_columns(
            at_least=pl.when(undivided).then("at_least"), beyond=pl.col("beyond") & undivided
        )
    )
    each = found.group_by("pair").agg(
        pl.col("at_least").max(), pl.col("beyond").any(), pl.col("rank").min(), known=pl.lit(True)
    )
    # No statistics say whether a threshold of the user's holds.
    ruled = [name for name in table["name"].unique() if rules.threshold_for(name)]
    beyond = pl.col("beyond").fill_null(False) & ~pl.col("name").is_in(ruled)
    return (
        table.select("pair", "name")
        .join(each, on="pair", how="left")
        .select(
            "pair",
            "at_least",
            "rank",
            outcome=pl.when(beyond)
            .then(pl.lit("differs"))
            .when("known")
            .then(pl.lit("unmeasured"))
            .otherwise(pl.lit("error")),
        )
    )


def assembled(
    pairs: Pairs, table: pl.DataFrame, measured: Sequence[Row], rules: Rules
) -> pl.DataFrame:
    """Return the table of a diff, `COLUMNS`, in execution order.

    Args:
        pairs: what belongs together.
        table: of `base_of`.
        measured: rows as of `Crew.measure` and `values_of`.
        rules: how to judge them.
    """
    done = _judged(table, measured, rules)
    rest = table.join(done.select("pair"), on="pair", how="anti")
    unread = bounded(pairs, rest.filter(pl.col("state") == TODO), rules)
    rest = rest.join(unread, on="pair", how="left", maintain_order="left", suffix="_least")
    state = pl.col("state")
    is_equal = state == EQUAL
    rest = rest.with_columns(
        outcome=pl.when(state == UNALIGNED)
        .then(pl.lit("error"))
        .when(state == TODO)
        .then("outcome")
        .otherwise(state),
        message=pl.when(state == UNALIGNED)
        .then(pl.lit(_UNALIGNED))
        .when((state == TODO) & (pl.col("outcome") == "error"))
        .then(pl.lit(_UNKNOWN)),
        bitwise=pl.when(is_equal)
        .then(True)
        .when((state == SHAPE) | ((state == TODO) & (pl.col("outcome") != "error")))
        .then(False),
        rank=pl.coalesce("rank", "rank_least"),
        numel=pl.when(is_equal).then(bounds.numel_of(rest["shape_a"])),
        **{name: pl.when(is_equal).then(value) for name, value in _SAME.items()},
    )
    found = done.join(table, on="pair", how="left", suffix="_0").with_columns(
        pl.coalesce(c, f"{c}_0").alias(c) for c in _REPLACED
    )
    made = pl.concat(_with_columns(_ranked(part)) for part in (rest, found))
    return _with_firsts(made.sort("pair", maintain_order=True))


def _ranked(part: pl.DataFrame) -> pl.DataFrame:
    """Give tensors of all ranks that are not equal one rank that stands for them."""
    first = pl.coalesce("rank", pl.col("ranks_b").list.first(), "rank_b", "rank_a")
    whole = pl.col("by").is_null() if "by" in part.columns else pl.lit(True)
    return part.with_columns(
        rank=pl.when(whole & (pl.col("outcome") != "equal")).then(first).otherwise("rank")
    )


def _with_columns(part: pl.DataFrame) -> pl.DataFrame:
    """Return exactly the table's columns, null those that are not there."""
    return part.select(
        (pl.col(name) if name in part.columns else pl.lit(None)).cast(dtype).alias(name)
        for name, dtype in COLUMNS.items()
    )


def _judged(table: pl.DataFrame, measured: Sequence[Row], rules: Rules) -> pl.DataFrame:
    """Return measured rows as a table, each with its outcome."""
    numbers = pl.Series([row["pair"] for row in measured], dtype=pl.UInt32)
    about = table.select("name", "tags", "kind", "step", "rank")[numbers]
    parsed: dict[str, dict[str, Any]] = {}
    rows = []
    for row, known in zip(measured, about.iter_rows(named=True), strict=True):
        tags = parsed.get(known["tags"])
        if tags is None:
            tags = parsed[known["tags"]] = parse_tags(known["tags"])
        row = {**known, **row}
        judged = {**row, **_outcome(row, tags, rules)}
        if row.get("parts"):
            judged["ranks_differ"] = _ranks_that_differ(judged, tags, rules)
        rows.append(judged)
    own = {*table.columns} - {*_REPLACED}
    schema = {**{c: t for c, t in COLUMNS.items() if c not in own}, "pair": pl.UInt32}
    columns = {name: [row.get(name) for row in rows] for name in schema}
    columns["shape_b"] = columns["shape_a"]
    return pl.DataFrame(columns, schema=schema, strict=False)


def _outcome(row: Row, tags: dict[str, Any], rules: Rules) -> Row:
    failed = row.get("failed")
    if failed is not None:
        return {"outcome": "shape" if failed == "shape" else "error"}
    floor = rules.against_floor(row, row["tags"])
    if row.get("bitwise"):
        return {"outcome": "equal", **floor}
    within = rules.is_within({**row, **floor}, tags)
    return {"outcome": "close" if within else "differs", **floor}


def _ranks_that_differ(row: Row, tags: dict[str, Any], rules: Rules) -> list[int]:
    """Return the target's ranks whose part is not equal, and, where the whole is beyond, beyond."""
    parts = [(ranks, {**row, **figures, "bitwise": False}) for ranks, figures in row["parts"]]

    changed = {rank for ranks, part in parts if not part["is_same"] for rank in ranks}
    beyond = {
        rank
        for ranks, part in parts
        if not part["is_same"] and _outcome(part, tags, rules)["outcome"] == "differs"
        for rank in ranks
    }
    return sorted(beyond if row["outcome"] == "differs" and beyond else changed)


def _with_firsts(table: pl.DataFrame) -> pl.DataFrame:
    """Mark in `first` the first pair that is not equal, and the first beyond tolerance."""
    whole = pl.col("by").is_null()
    beyond = whole & pl.col("outcome").is_in(["differs", "shape"])
    changed = whole & pl.col("outcome").is_in(["differs", "shape", "unmeasured", "close"])
    places = [table.select(which.arg_max()).item() for which in (changed, beyond)]
    there = [bool(table.select(which.any()).item()) for which in (changed, beyond)]
    row = pl.int_range(pl.len())
    bitwise, tolerance = (
        (row == at) if exists else pl.lit(False) for at, exists in zip(places, there, strict=True)
    )
    return table.with_columns(
        first=pl.when(bitwise & tolerance)
        .then(pl.lit("both"))
        .when(bitwise)
        .then(pl.lit("bitwise"))
        .when(tolerance)
        .then(pl.lit("tolerance"))
    )
