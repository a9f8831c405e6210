"""Manifest rows as tables: their tags as values and columns, and which of them a filter selects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from ..errors import DamagedRecording, FilterError
from ..filters import Filter
from ..tags import TagValue
from .schema import AUXILIARY, ManifestRow

if TYPE_CHECKING:
    import polars as pl


_MOST_COLUMNS = 1_000


def parse_tags(text: str, path: object = "the manifest") -> dict[str, TagValue]:
    """Return the tags in a manifest row's JSON.

    Raises:
        DamagedRecording: it is no JSON object.
    """
    try:
        tags = json.loads(text)
    except (ValueError, RecursionError, TypeError):
        tags = None
    if not isinstance(tags, dict):
        raise DamagedRecording(path, f"a row's tags are {text!r:.80}, expected a JSON object")
    return tags


def rows_of(frame: pl.DataFrame) -> Iterator[ManifestRow]:
    """Yield the rows of a manifest, or of some of its columns."""
    return cast("Iterator[ManifestRow]", frame.iter_rows(named=True))


def taps_of(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the manifest rows that people tapped, without those that hold the ids of rows."""
    is_auxiliary = rows["kind"].is_in(AUXILIARY)
    return rows.filter(~is_auxiliary) if is_auxiliary.any() else rows


def row_at(frame: pl.DataFrame, number: int) -> ManifestRow:
    """Return one row of a manifest, or of some of its columns."""
    return cast(ManifestRow, dict(zip(frame.columns, frame.row(number), strict=True)))


def seen_in(rows: pl.DataFrame) -> tuple[set[str], dict[str, set[Any]]]:
    """Return the names of rows, and the values of each tag and of `step`, lists left out."""
    values: dict[str, set[Any]] = {"step": set(rows["step"].unique())}
    for text in rows["tags"].unique():
        for tag, value in parse_tags(text).items():
            values.setdefault(tag, set()).update(() if isinstance(value, list) else (value,))
    return set(rows["name"].unique()), values


def tag_columns(rows: pl.DataFrame) -> pl.DataFrame:
    """Return a column per tag, a row per row of `rows`, in alphabetical order."""
    import polars as pl

    unique = rows.select("tags").unique(maintain_order=True)
    parsed = [parse_tags(text) for text in unique["tags"].to_list()]
    names = sorted({tag for tags in parsed for tag in tags})
    if len(names) > _MOST_COLUMNS:
        raise DamagedRecording(
            "the manifest", f"it has {len(names)} different tags, expected at most {_MOST_COLUMNS}"
        )
    columns: list[pl.Series] = []
    used = {*rows.columns, "attempt"}
    for tag in names:
        values: list[Any] = [tags.get(tag) for tags in parsed]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 or kinds & {list, dict}:
            values = [None if value is None else json.dumps(value) for value in values]
        name = tag
        while name in used:
            name = f"tag.{name}"
        used.add(name)
        try:
            column = pl.Series(name, values, strict=True)
        except (TypeError, OverflowError, pl.exceptions.PolarsError):
            column = pl.Series(name, [None if v is None else str(v) for v in values])
        columns.append(column)
    if not columns:
        return pl.DataFrame()
    table = unique.hstack(columns)
    joined = rows.select("tags").join(table, on="tags", how="left", maintain_order="left")
    return joined.drop("tags")


def matching(
    frame: pl.DataFrame,
    filter: Filter,
    env: Callable[[ManifestRow], Mapping[str, Any]] | None = None,
    *,
    lenient: bool = False,
) -> pl.Series:
    """Return for each row whether a filter selects it.

    Args:
        frame: manifest rows.
        filter: the filter.
        env: what it sees as `rank` and `step` of a row; by default the row's own.
        lenient: take a row that the filter cannot judge as not selected.

    Raises:
        FilterError: the filter compares what cannot be compared.
    """
    import polars as pl

    by = ["name", "tags", "kind", *(c for c in ("step", "rank") if c in filter.names)]
    unique = frame.select(*by, *(c for c in ("step", "rank") if c not in by)).unique(
        subset=by, maintain_order=True
    )
    verdicts = []
    for row in rows_of(unique):
        own = env(row) if env else {"rank": row["rank"], "step": row["step"]}
        tags = {**parse_tags(row["tags"]), "name": row["name"], "kind": row["kind"], **own}
        try:
            verdicts.append(filter(tags))
        except FilterError:
            if not lenient:
                raise
            verdicts.append(False)
    table = unique.select(by).with_columns(pl.Series("keep", verdicts, pl.Boolean))
    joined = frame.select(by).join(table, on=by, how="left", maintain_order="left")
    return joined["keep"].fill_null(False)


def decoded(text: str) -> Any:
    """Return the value of some JSON; the text itself where JSON proper does not have it."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text  # NaN and infinities stay as text: JSON proper has neither
    return value
