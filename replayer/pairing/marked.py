"""Which records are compared row by row, since both sides say which row is which."""

from __future__ import annotations

import polars as pl

from recorder.errors import UsageError
from recorder.format.schema import ManifestRow

from ..match import MatchOn

_KINDS = ("tensor", "grad")


def marked(
    left: pl.DataFrame, right: pl.DataFrame, match_on: MatchOn
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return both sides' rows with `by_rows`, and one key for all that are of one name and tags.

    Of recomputed forwards the first alone is taken.

    Args:
        left: rows with kind, group, firing, rows, match_step and match_occurrence.
        right: the other side's.
        match_on: what counts of a key.

    Raises:
        UsageError: they are matched by order.
    """
    by = ["kind", "group"]
    by += ["step"] * match_on.rows_use_step + ["occurrence"] * match_on.rows_use_occurrence
    has = pl.col("rows").is_not_null() & pl.col("kind").is_in(_KINDS)
    one, other = (frame.filter(has).select(by).unique() for frame in (left, right))
    both = one.join(other, on=by).with_columns(by_rows=pl.lit(True))
    if not both.height:
        nothing = pl.lit(False).alias("by_rows")
        return left.with_columns(nothing), right.with_columns(nothing)
    if match_on.order:
        raise UsageError(
            "both sides say which row is which, and --match-on order pairs taps by their place, "
            "whatever rows they have; match on tags, as in --match-on name,layer"
        )
    above = pl.concat([left["group"], right["group"]]).max()
    assert isinstance(above, int)
    made = []
    for frame in (left, right):
        frame = frame.join(both, on=by, how="left", maintain_order="left").with_columns(
            by_rows=(pl.col("by_rows") & has).fill_null(False)
        )
        is_first = (pl.col("firing") == 0).any().over(by) & pl.col("by_rows")
        frame = frame.filter(~(is_first & (pl.col("firing") > 0)))
        step = pl.col("match_step") if match_on.rows_use_step else pl.lit(0, pl.Int64)
        times = pl.col("occurrence") if match_on.rows_use_occurrence else pl.lit(0, pl.Int32)
        rows = pl.col("by_rows")
        made.append(
            frame.with_columns(
                group=pl.col("group") + pl.when(rows).then(above + 1).otherwise(0),
                firing=pl.when(rows).then(0).otherwise("firing"),
                match_step=pl.when(rows).then(step).otherwise("match_step"),
                match_occurrence=pl.when(rows).then(times).otherwise("match_occurrence"),
            )
        )
    return made[0], made[1]


def in_order(rows: list[ManifestRow]) -> list[ManifestRow]:
    """Return the records of one name and tags in the order in which their rows count."""
    return sorted(rows, key=lambda row: (row["step"], row["occurrence"], row["rank"], row["seq"]))
