"""The columns of a diff's table, and the rows it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypedDict, cast

import polars as pl

from ..measuring.measures import Measures
from ..measuring.profile import as_row

OUTCOMES = ("differs", "shape", "error", "unmeasured", "only_a", "only_b", "close", "equal")
"""From the worst on: `equal` is bit for bit, `close` within tolerance, `unmeasured` other bytes
whose elements were not read."""

COLUMNS: dict[str, pl.DataType | type[pl.DataType]] = {
    "pair": pl.Int64, "name": pl.String, "tags": pl.String, "kind": pl.String, "step": pl.Int64,
    "occurrence": pl.Int32, "rank": pl.Int32, "outcome": pl.String, "first": pl.String,
    "by": pl.String, "index": pl.Int64, "reordered": pl.Boolean, "grafted": pl.Boolean,
    "how": pl.String,
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
    "odd_at": pl.List(pl.Int64), "error": pl.Float64, "error_extreme": pl.Float64,
    "error_row": pl.Float64, "error_row_at": pl.List(pl.Int64), "error_typical": pl.Float64,
    "error_element": pl.Float64, "factor": pl.Float64, "offset": pl.Float64,
    "fits_at": pl.List(pl.Int64), "growth": pl.Float64, "apart": pl.String,
    "rows": pl.Int64, "rows_a": pl.Int64, "rows_b": pl.Int64, "row": pl.List(pl.Int64),
    "flips": pl.Int64, "ties": pl.Int64, "margin": pl.Float64, "margin_typical": pl.Float64,
    "position": pl.Int64, "token": pl.Int64, "at_a": pl.List(pl.Int64), "at_b": pl.List(pl.Int64),
    "at_least": pl.Float64,
    "floor_rel_diff": pl.Float64, "floor_max_abs": pl.Float64, "times_floor": pl.Float64,
    "value_a": pl.String, "value_b": pl.String, "message": pl.String,
}  # fmt: skip
"""The columns of a diff's table, in order."""


class DiffRow(TypedDict, total=False):
    """A row of the table, or what has been found out of one; what is not known is absent or None.

    While it is made it also has `parts`, the figures of each rank's part with the ranks that hold
    it, or `failed`, why there are none: `shape`, `layout` or `damaged`; or `about`, where it is
    about one side's own records: `replicas`, or `A` or `B`, whose recomputed forward it is.
    """

    pair: int
    name: str
    tags: str
    kind: str
    step: int
    occurrence: int
    rank: int | None
    outcome: str
    first: str | None
    by: str | None
    index: int | None
    reordered: bool
    grafted: bool
    how: str
    name_b: str | None
    tags_b: str | None
    step_b: int | None
    occurrence_b: int | None
    dtype_a: str | None
    dtype_b: str | None
    shape_a: list[int] | None
    shape_b: list[int] | None
    dim_names: list[str] | None
    ranks_a: list[int] | None
    ranks_b: list[int] | None
    ranks_differ: list[int] | None
    numel: int
    bitwise: bool | None
    changed: int | None
    mismatched: int | None
    max_beyond: float | None
    max_beyond_at: list[int] | None
    rtol: float
    atol: float
    rel_diff: float | None
    cosine: float | None
    max_abs: float | None
    max_abs_at: list[int] | None
    max_abs_a: float | None
    max_abs_b: float | None
    max_rel: float | None
    max_rel_at: list[int] | None
    max_rel_a: float | None
    max_rel_b: float | None
    mean_abs: float | None
    bias: float | None
    p50: float | None
    p99: float | None
    p999: float | None
    max_ulp: int | None
    l2_a: float | None
    l2_b: float | None
    nan_a: int | None
    nan_b: int | None
    inf_a: int | None
    inf_b: int | None
    odd_at: list[int] | None
    error: float | None
    error_extreme: float | None
    error_row: float | None
    error_row_at: list[int] | None
    error_typical: float | None
    error_element: float | None
    factor: float | None
    offset: float | None
    fits_at: list[int] | None
    growth: float | None
    apart: str | None
    rows: int | None
    rows_a: int | None
    rows_b: int | None
    row: list[int] | None
    flips: int | None
    ties: int | None
    margin: float | None
    margin_typical: float | None
    position: int | None
    token: int | None
    at_a: list[int] | None
    at_b: list[int] | None
    at_least: float | None
    floor_rel_diff: float | None
    floor_max_abs: float | None
    times_floor: float | None
    value_a: str | None
    value_b: str | None
    message: str | None
    parts: list[tuple[list[int], DiffRow]]
    is_same: bool
    about: str
    failed: str


def row_of(*parts: Mapping[str, Any]) -> DiffRow:
    """Return a row that is put together of parts, of which the later have the last word."""
    row: dict[str, Any] = {}
    for part in parts:
        row.update(part)
    return cast(DiffRow, row)


def figures_of(found: Measures) -> DiffRow:
    """Return what was measured of a pair as a part of its row."""
    figures = {name: value for name, value in vars(found).items() if name != "profile"}
    if found.profile is None:
        return row_of(figures)
    return row_of(figures, as_row(found.profile))


def rows_of(table: pl.DataFrame) -> Iterator[DiffRow]:
    """Yield the rows of a diff's table."""
    return cast("Iterator[DiffRow]", table.iter_rows(named=True))
