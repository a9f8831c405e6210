"""The table of a diff: what the manifests say of each pair, its measures, its outcome.

1. `base_of` joins the pairs with both sides' columns; `todo_of` is what tensors are to decide.
2. `assembled` adds what was measured, and what `bounds` proves of what could not be, and judges.
"""

from __future__ import annotations

import json
import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
import torch
import xxhash

from recorder.format.rows import parse_tags, row_at
from recorder.format.schema import STATISTICS

from ..measuring.measures import measure
from ..pairing.marked import in_order
from ..pairing.pairs import (
    EQUAL,
    LAYOUT,
    OF_SEVERAL,
    RANK,
    ROWS,
    SHAPE,
    TODO,
    UNALIGNED,
    UNDIVIDED,
    VALUE,
    Pairs,
)
from ..rules import History, Rules, odd_place
from . import bounds
from .columns import COLUMNS, DiffRow, figures_of, row_of, rows_of
from .grafts import grafted
from .indices import dims_called
from .small import small_of, task_of
from .within import rows_of_keys, said_within, tasks_within
from .work import Task

_UNALIGNED = (
    "the ranks' shapes differ, as do the numbers of ranks, and no layout says how it is cut; "
    "declare the dims at the taps of both sides, as in tap(..., dims='b s h[tp]')"
)
_UNKNOWN = (
    "the layouts differ, and only the tensors can tell; compare them without --manifest-only, of "
    "recordings made with --level tensors"
)
_SAID_BEFORE = pl.when(pl.col("message") != "").then("message")
_ROWS_UNKNOWN = (
    "rows that are matched one by one can be compared by their tensors alone; compare them without "
    "--manifest-only, of recordings made with --level tensors"
)
_OF_BOTH = ("rank", "step", "name", "tags", "occurrence", "kind", "dtype", "shape", "value")
_REPLACED = ("rank", "ranks_a", "ranks_b", "shape_a", "shape_b")
"""Columns in which what was measured has the last word."""
_SAME: DiffRow = {
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
        pl.col("how") == RANK, pl.col("a").is_not_null(), pl.col("b").is_not_null(),
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
    table = table.with_columns(grafted(pairs.b, table, pairs.step_offset))
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


class Todo(NamedTuple):
    """What is to be measured.

    Attributes:
        tasks: pairs that are measured one by one.
        small: pairs that are measured many at a time, of `small_of`.
        unread: how many cannot be: recorded without their elements.
    """

    tasks: list[Task]
    small: pl.DataFrame
    unread: int

    def left_of(self, pairs: Pairs, numbers: Sequence[int]) -> list[Task]:
        """Return small pairs that are to be measured one by one after all."""
        rows = self.small.filter(
            pl.col("pair").is_in(pl.Series(numbers, dtype=pl.UInt32).implode())
        )
        return [task_of(pairs, *row) for row in rows.select("pair", "a", "b").iter_rows()]

    def task(self, pairs: Pairs, number: int) -> Task | None:
        """Return the task that a pair is, None where it was not read."""
        found = [task for task in self.tasks if task.pair == number]
        return next(iter([*found[-1:], *self.left_of(pairs, [number])]), None)


def todo_of(pairs: Pairs, table: pl.DataFrame, by: str | None) -> Todo:
    """Return the pairs to measure.

    A pair whose ranks all hold the same as the other side's may have replicas that are apart on
    both, so it is a task, too, where the ranks' digests are not all one. So is a recomputed forward
    that is not the first's, within one side.

    Args:
        pairs: what belongs together.
        table: of `base_of`.
        by: the dim whose indices get rows of their own, for which pairs are measured one by one.
    """
    # Of rows, digests do not say how many there are, nor whether those computed twice are the same.
    by_rows = (pl.col("state") == EQUAL) & (pl.col("how") == ROWS)
    todo = table.filter((pl.col("state") == TODO) | by_rows)
    found = tasks_within(pairs, table)
    unread = 0
    small = small_of(pairs, todo if by is None else todo.clear())
    todo = todo.join(small.select("pair"), on="pair", how="anti", maintain_order="left")
    layouts = todo.filter(pl.col("how").is_in(OF_SEVERAL))["key"].unique()
    of_key = [rows_of_keys(side.frame, layouts) for side in (pairs.a, pairs.b)]
    columns = ("pair", "how", "key", "a", "b", "state")
    for number, how, key, a, b, state in todo.select(columns).iter_rows():
        if how == ROWS:
            rows = [in_order(known[key]) for known in of_key]
        elif how == LAYOUT:
            rows = [known[key] for known in of_key]
        else:
            rows = [[row_at(pairs.a.frame, a)], [row_at(pairs.b.frame, b)]]
        if any(row["shard"] is None for side in rows for row in side):
            unread += state == TODO
        else:
            found.append(Task(number, how, tuple(rows[0]), tuple(rows[1]), state == EQUAL))
    return Todo(found, small, unread)


def values_of(table: pl.DataFrame) -> list[DiffRow]:
    """Return the measures of recorded numbers, strings and lists."""
    rows: list[DiffRow] = []
    known = table.filter(pl.col("state") == VALUE).select("pair", "value_a", "value_b")
    for number, one, other in known.iter_rows():
        figures = row_of(_SAME, {"bitwise": True}) if one == other else _of_values(one, other)
        rows.append(row_of({"pair": number}, figures))
    return rows


def _of_values(one: str | None, other: str | None) -> DiffRow:
    """Compare two values: whole numbers exactly, other numbers as float64, all else as it is."""
    different: DiffRow = {"bitwise": False, "numel": 1, "changed": 1, "mismatched": 1}
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
        return {"bitwise": False, "numel": len(x), "changed": wrong, "mismatched": wrong}
    numbers = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (x, y))
    tolerance = 0.0 if kinds == {int} else None
    found = figures_of(measure(*numbers, rtol=tolerance, atol=tolerance))
    nowhere = dict.fromkeys(("max_abs_at", "max_rel_at", "max_beyond_at", "odd_at"))
    return row_of(found, {"bitwise": False}, nowhere)


def bounded(pairs: Pairs, table: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """Return `outcome`, `at_least` and `rank` of pairs that were not read, as statistics have it.

    Of layouts they say something where all ranks hold the same, undivided; and digests, where the
    ranks of both sides stand alike. Where there may be padding, or summands, nothing is known.

    Args:
        pairs: what belongs together.
        table: those pairs, of `base_of`.
        rules: how pairs are judged.
    """
    columns = ["rank", "dtype", "shape", "dims", "extras", "digest", *STATISTICS]
    left, right = (
        side.frame.with_row_index(which).select(which, "key", *columns)
        for which, side in (("a", pairs.a), ("b", pairs.b))
    )
    by_rank = (
        table.filter(pl.col("how") == RANK)
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
    pairs: Pairs,
    table: pl.DataFrame,
    measured: Sequence[DiffRow],
    small: pl.DataFrame,
    rules: Rules,
) -> pl.DataFrame:
    """Return the table of a diff, `COLUMNS`, in execution order.

    Args:
        pairs: what belongs together.
        table: of `base_of`.
        measured: rows as of `Crew.measure` and `values_of`.
        small: rows of `small.table_of`.
        rules: how to judge them.
    """
    done = _judged(table, [row for row in measured if not row.get("about")], small, rules)
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
        .then(
            pl.when(pl.col("how") == ROWS).then(pl.lit(_ROWS_UNKNOWN)).otherwise(pl.lit(_UNKNOWN))
        ),
        bitwise=pl.when(is_equal)
        .then(True)
        .when((state == SHAPE) | ((state == TODO) & (pl.col("outcome") != "error")))
        .then(False),
        rank=pl.coalesce("rank", "rank_least"),
        numel=pl.when(is_equal).then(bounds.numel_of(rest["shape_a"])),
        **{name: pl.when(is_equal).then(pl.lit(value)) for name, value in _SAME.items()},
    )
    found = done.join(table, on="pair", how="left", suffix="_0").with_columns(
        pl.coalesce(c, f"{c}_0").alias(c) for c in _REPLACED
    )
    made = pl.concat(_with_columns(_ranked(part)) for part in (rest, found))
    apart = said_within(table, [row for row in measured if row.get("about")], rules)
    made = made.join(apart, on="pair", how="left", maintain_order="left")
    is_first = pl.col("pair").is_first_distinct()  # of a pair's choices among replicas
    is_apart = pl.col("by").is_null() & pl.col("said").is_not_null() & is_first
    made = made.with_columns(
        apart=pl.when(is_apart).then("what"),
        message=pl.when(is_apart)
        .then(pl.concat_str(_SAID_BEFORE, "said", separator="; ", ignore_nulls=True))
        .otherwise("message"),
    )
    cut = _pairs_of_blocks(pairs, table)
    return _with_firsts(made.drop("what", "said").sort("pair", maintain_order=True), cut)


def _pairs_of_blocks(pairs: Pairs, table: pl.DataFrame) -> pl.Series:
    """Return the pairs of which a side declares that its ranks hold blocks."""
    is_cut = pl.col("dims").str.contains("[", literal=True).fill_null(False)
    frames = (side.frame.filter(is_cut).select("key") for side in (pairs.a, pairs.b))
    keys = pl.concat(frames).unique()
    return table.filter(pl.col("how") == LAYOUT).join(keys, on="key", how="semi")["pair"]


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


def _judged(
    table: pl.DataFrame, measured: Sequence[DiffRow], small: pl.DataFrame, rules: Rules
) -> pl.DataFrame:
    """Return measured rows as a table, each with its outcome, judged in the order of execution."""
    measured = sorted(measured, key=lambda row: row["pair"])
    if not rules.judges_many:
        measured = sorted([*measured, *rows_of(small)], key=lambda row: row["pair"])
        small = small.clear()
    numbers = pl.Series([row["pair"] for row in measured], dtype=pl.UInt32)
    facts = table.select("name", "tags", "kind", "step", "rank")
    about = facts[numbers]
    small = small.hstack(facts[small["pair"]])
    small = small.with_columns(rules.outcomes(small), growth=pl.lit(None, pl.Float64))
    parsed: dict[str, Mapping[str, Any]] = {}
    rows: list[DiffRow] = []
    history = History(_usual_size(measured, about, small))
    told = _Told(small, rules, history)
    whole: DiffRow = {}
    for row, known in zip(measured, about.iter_rows(named=True), strict=True):
        tags = parsed.get(known["tags"])
        if tags is None:
            tags = parsed[known["tags"]] = parse_tags(known["tags"])
        row = row_of(known, row)
        if row.get("by") is not None:
            found = row_of(rules.outcome(row, tags))
            if _is_where(row, whole):
                found["outcome"] = "differs"
            rows.append(row_of(row, found))
            continue
        told.before(row["pair"])
        whole = row_of(row, _outcome_after(row, tags, rules, history))
        if row.get("parts"):
            whole["ranks_differ"] = _ranks_that_differ(whole, tags, rules)
        rows.append(whole)
    own = {*table.columns} - {*_REPLACED}
    schema = {**{c: t for c, t in COLUMNS.items() if c not in own}, "pair": pl.UInt32}
    made: list[Mapping[str, Any]] = [*rows]
    columns = {name: [row.get(name) for row in made] for name in schema}
    columns["shape_b"] = columns["shape_a"]
    one_by_one = pl.DataFrame(columns, schema=schema, strict=False)
    at_once = told.all().drop("rank")
    missing = {name: pl.lit(None, dtype) for name, dtype in schema.items()}
    there = {name: pl.col(name).cast(schema[name]) for name in at_once.columns if name in schema}
    return pl.concat([one_by_one, at_once.select(**{**missing, **there})])


class _Told:
    """Small pairs that are judged in the order of execution, among those that stand alone.

    What is before a pair matters to one that is beyond tolerance by itself: it may be rounding that
    accumulated, as long as nothing before it was beyond.

    Args:
        small: their rows, with `outcome` as each has it by itself.
        rules: how to judge them.
        history: of all pairs so far.
    """

    def __init__(self, small: pl.DataFrame, rules: Rules, history: History) -> None:
        self._small, self._rules, self._history = small, rules, history
        self._numbers: list[int] = small["pair"].to_list()
        self._outcomes: list[str] = small["outcome"].to_list()
        differs = (small["outcome"] == "differs").arg_true()
        self._last = int(differs[-1]) + 1 if len(differs) else 0
        self._kinds: list[str] = small["kind"].to_list()
        columns = ("kind", "name", "error", "error_extreme", "error_row", "error_element")
        self._errors = small.select(columns).iter_rows(named=True)
        self._at = 0
        self._growth: dict[int, float | None] = {}

    def before(self, number: int) -> None:
        """Judge what comes before a pair, which may be rounding that accumulated."""
        self._judge(bisect_left(self._numbers, number, self._at))

    def all(self) -> pl.DataFrame:
        """Judge the rest; return all rows, with `outcome` and `growth`."""
        self._judge(self._last)
        growth = self._growth
        if not growth:
            return self._small
        at = pl.Series([*growth], dtype=pl.UInt32)
        outcomes = self._small["outcome"].scatter(at, ["close"] * len(at))
        sizes = self._small["growth"].scatter(at, [*growth.values()])
        return self._small.with_columns(outcomes, sizes)

    def _judge(self, until: int) -> None:
        rules, history = self._rules, self._history
        for at in range(self._at, until):
            errors = next(self._errors)
            if self._outcomes[at] == "close":
                if history.is_whole:
                    history.add(errors, True, rules.is_by_rounding)
            elif history.is_whole or self._kinds[at] == "grad":
                row = row_of(self._small.row(at, named=True))
                found = _outcome_after(row, parse_tags(row["tags"]), rules, history)
                if found["outcome"] == "close":
                    self._growth[at] = found.get("growth")
        self._at = max(self._at, until)


def _usual_size(measured: Sequence[DiffRow], about: pl.DataFrame, small: pl.DataFrame) -> float:
    """Return the median root mean square of the baseline's gradients, 0 where there is none."""
    sizes = [
        (row.get("l2_a") or 0.0) / math.sqrt(row["numel"])
        for row, kind in zip(measured, about["kind"], strict=True)
        if kind == "grad" and row.get("by") is None and row.get("l2_a") and row.get("numel")
    ]
    gradients = small.filter((pl.col("kind") == "grad") & (pl.col("l2_a") > 0))
    sizes += [l2 / math.sqrt(n) for l2, n in gradients.select("l2_a", "numel").iter_rows()]
    return statistics.median(sizes) if sizes else 0.0


def _outcome_after(
    row: DiffRow, tags: Mapping[str, Any], rules: Rules, history: History
) -> DiffRow:
    """Return a pair's outcome as the pairs before it have it, and take it in among them."""
    found = row_of(rules.outcome(row, tags))
    if found["outcome"] not in ("close", "differs"):
        return found
    if found["outcome"] == "differs" and rules.goes_by_rounding(row) and history.is_nothing(row):
        return row_of(found, {"outcome": "close"})
    if found["outcome"] == "differs" and rules.is_within(
        row_of(row, found), tags, history.known(row)
    ):
        found |= {"outcome": "close", "growth": history.growth(row)}
    judged = row_of(row, found)
    history.add(judged, found["outcome"] == "close", rules.goes_by_rounding(judged))
    return found


def _is_where(row: DiffRow, whole: DiffRow) -> bool:
    """Whether an index is in the place by which the whole pair is known to be no rounding."""
    place = odd_place(whole) if whole.get("outcome") == "differs" else None
    dim = dims_called(row["by"] or "", row["dim_names"] or ())
    if place is None or dim is None or row["bitwise"]:
        return False
    return place[dim] in (-1, row["index"])


def _ranks_that_differ(row: DiffRow, tags: Mapping[str, Any], rules: Rules) -> list[int]:
    """Return the target's ranks whose part is not equal, and, where the whole is beyond, beyond."""
    parts = [(ranks, row_of(row, part, {"bitwise": False})) for ranks, part in row["parts"]]

    changed = {rank for ranks, part in parts if not part["is_same"] for rank in ranks}
    beyond = {
        rank
        for ranks, part in parts
        if not part["is_same"] and rules.outcome(part, tags)["outcome"] == "differs"
        for rank in ranks
    }
    return sorted(beyond if row["outcome"] == "differs" and beyond else changed)


def _with_firsts(table: pl.DataFrame, blocks: pl.Series) -> pl.DataFrame:
    """Mark in `first` the first pair that is not equal, and the first beyond tolerance.

    What was grafted is marked apart: its record is what came before the graft. And blocks whose
    wholes have unequal shapes are declared wrongly, on one side at least, and diverge nowhere.

    Args:
        table: all pairs.
        blocks: those of which a side declares that its ranks hold blocks.
    """
    whole = pl.col("by").is_null() & ~pl.col("grafted")
    differs = pl.col("outcome") == "differs"
    is_block = pl.col("pair").is_in(blocks.implode())
    beyond = whole & (differs | ((pl.col("outcome") == "shape") & ~is_block))
    changed = beyond | (whole & pl.col("outcome").is_in(["unmeasured", "close"]))
    before = pl.col("by").is_null() & pl.col("grafted") & differs
    kinds = (changed, beyond, before)
    places = [table.select(which.arg_max()).item() for which in kinds]
    there = [bool(table.select(which.any()).item()) for which in kinds]
    row = pl.int_range(pl.len())
    bitwise, tolerance, graft = (
        (row == at) if exists else pl.lit(False) for at, exists in zip(places, there, strict=True)
    )
    return table.with_columns(
        first=pl.when(bitwise & tolerance)
        .then(pl.lit("both"))
        .when(bitwise)
        .then(pl.lit("bitwise"))
        .when(tolerance)
        .then(pl.lit("tolerance"))
        .when(graft)
        .then(pl.lit("grafted"))
    )
