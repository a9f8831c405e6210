"""Which pairs a replay overwrote in B: its record there is what B computed by itself before."""

from __future__ import annotations

import polars as pl

from ..log import FOLDER, read_log
from ..pairing.pairs import OF_SEVERAL, Side

_KEY = ("rank", "kind", "name_0", "tags_0", "step", "occurrence")


def grafted(side: Side, table: pl.DataFrame, step_offset: int) -> pl.Series:
    """Return for each pair whether a graft overwrote it, on all ranks that recorded it.

    Args:
        side: B; a replay left its log beside the recording where it was one.
        table: pairs, with `b`, `key` and `how`.
        step_offset: B's step s is s + step_offset in its frame.

    Raises:
        DamagedRecording: a file of the log does not hold what it should.
    """
    nothing = pl.repeat(False, table.height, dtype=pl.Boolean, eager=True).alias("grafted")
    if not (side.recording.path / FOLDER).is_dir():
        return nothing
    log = read_log(side.recording.path)
    done = (
        log.filter(pl.col("outcome") == "grafted")
        .rename({"name": "name_0", "tags": "tags_0"})
        .with_columns(pl.col("step") + step_offset)
        .select(*_KEY, grafted=True)
        .unique()
    )
    of_row = side.frame.select(*_KEY, "key").join(done, on=_KEY, how="left", maintain_order="left")
    of_row = of_row.with_columns(pl.col("grafted").fill_null(False))
    of_key = of_row.group_by("key").agg(pl.col("grafted").all().alias("of_key"))
    by_row = of_row.select("grafted").with_row_index("b")
    found = (
        table.select("b", "key", "how")
        .join(by_row, on="b", how="left", maintain_order="left")
        .join(of_key, on="key", how="left", maintain_order="left")
    )
    is_of_several = pl.col("how").is_in(OF_SEVERAL)
    return found.select(
        grafted=pl.when(is_of_several).then("of_key").otherwise("grafted").fill_null(False)
    )["grafted"]
