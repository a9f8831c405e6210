"""Ask a filter about the rows of a manifest, once for each distinct thing it can see."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import FilterError
from .filters import Filter
from .format.index import parse_tags

if TYPE_CHECKING:
    import polars as pl


def matching(
    frame: pl.DataFrame,
    filter: Filter,
    env: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
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
    for row in unique.iter_rows(named=True):
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
