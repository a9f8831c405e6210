"""Records of one side that should be the same and are not, although both sides agree.

1. `tasks_within` finds replicas and recomputed forwards whose digests are not what they should be.
2. The crew measures them; `said_within` says which are beyond tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import polars as pl

from recorder.format.rows import parse_tags, row_at, rows_of
from recorder.format.schema import ManifestRow

from ..pairing.pairs import EQUAL, LAYOUT, RANK, ROWS, Pairs
from ..rules import Rules
from .columns import DiffRow, row_of
from .work import REPLICAS, ROWS_APART, Task

RECOMPUTED = "recompute"
_SAID = {
    REPLICAS: "replicas differ within A: rank {one} from rank {other}, {size}; if they hold other "
    "data, name the axis that tells them apart in the dims",
    RECOMPUTED: "the recomputed forward differs from the first within {side}: on rank {one}, "
    "{size}; look for what it reads that changed in between, as random numbers and buffers do",
}

_FAILED = {
    REPLICAS: "replicas within A cannot be compared: {why}",
    RECOMPUTED: "the recomputed forward cannot be compared with the first within {side}: {why}",
}


def tasks_within(pairs: Pairs, table: pl.DataFrame) -> list[Task]:
    """Return what is to be measured of each side by itself.

    Args:
        pairs: what belongs together.
        table: the pairs, numbered.
    """
    return [*_of_replicas(pairs, table), *_of_seconds(pairs, table)]


def _of_replicas(pairs: Pairs, table: pl.DataFrame) -> list[Task]:
    digests = pairs.a.frame.group_by("key").agg(
        several=(pl.col("digest").n_unique() > 1) & pl.col("dims").is_not_null().all(),
        stored=pl.col("shard").is_not_null().all(),
    )
    wanted = table.filter((pl.col("state") == EQUAL) & (pl.col("how") == LAYOUT))
    wanted = wanted.join(digests.filter(pl.col("several") & pl.col("stored")), on="key")
    of_key = [rows_of_keys(side.frame, wanted["key"]) for side in (pairs.a, pairs.b)]
    return [
        Task(number, REPLICAS, tuple(of_key[0][key]), tuple(of_key[1][key]))
        for number, key in wanted.select("pair", "key").iter_rows()
    ]


def _of_seconds(pairs: Pairs, table: pl.DataFrame) -> list[Task]:
    found = []
    for name, column, side in (("A", "a", pairs.a), ("B", "b", pairs.b)):
        rows = side.frame.with_row_index(column).filter(pl.col("shard").is_not_null())
        rows = rows.select(column, "key", "rank", "digest", "firing")
        seconds = rows.filter(pl.col("firing") == 1)
        firsts = rows.filter(pl.col("firing") == 0).with_columns(key=pl.col("key") + 1)
        apart = seconds.join(firsts, on=["key", "rank"], suffix="_first")
        apart = apart.filter(pl.col("digest") != pl.col("digest_first"))
        if not apart.height:
            continue
        by_rank = table.filter(pl.col("how") == RANK).select("pair", column)
        whole = table.filter(pl.col("how") == LAYOUT).select("key", whole="pair")
        apart = apart.join(by_rank, on=column, how="left").join(whole, on="key", how="left")
        numbers = apart.select(
            pl.coalesce("whole", "pair").alias("pair"), f"{column}_first", column
        )
        for number, first, second in numbers.drop_nulls().iter_rows():
            one, other = row_at(side.frame, first), row_at(side.frame, second)
            found.append(Task(number, name, (one,), (other,)))
    return found


def said_within(table: pl.DataFrame, rows: Sequence[DiffRow], rules: Rules) -> pl.DataFrame:
    """Return the pairs of which one side's own records differ beyond tolerance, and say so."""
    numbers = pl.Series([row["pair"] for row in rows], dtype=pl.UInt32)
    about = table.select("name", "tags", "kind", "step")[numbers]
    found: dict[int, tuple[str, str]] = {}
    for row, known in zip(rows, about.iter_rows(named=True), strict=True):
        judged = rules.outcome(row_of(known, row), parse_tags(known["tags"]))
        if judged["outcome"] in ("equal", "close"):
            continue
        what = REPLICAS if row["about"] == REPLICAS else RECOMPUTED
        if row["about"] in (ROWS, ROWS_APART):
            what = ROWS if row["about"] == ROWS else REPLICAS
            text = row["message"] or ""
        elif row.get("failed") is not None:
            text = _FAILED[what].format(side=row["about"], why=row["message"])
        else:
            one, other = (
                ",".join(map(str, ranks or ())) for ranks in (row["ranks_a"], row["ranks_b"])
            )
            size = f"max_abs {row.get('max_abs') or math.nan:.3g}"
            text = _SAID[what].format(side=row["about"], one=one, other=other, size=size)
        found.setdefault(row["pair"], (what, text))
    columns = {
        "pair": list(found),
        "what": [what for what, _ in found.values()],
        "said": [text for _, text in found.values()],
    }
    return pl.DataFrame(columns, schema={"pair": pl.Int64, "what": pl.String, "said": pl.String})


def rows_of_keys(frame: pl.DataFrame, keys: pl.Series) -> dict[int, list[ManifestRow]]:
    """Return all ranks' rows of some keys, by key."""
    found: dict[int, list[ManifestRow]] = {}
    wanted = frame.filter(pl.col("key").is_in(keys.implode())).sort("rank")
    for key, row in zip(wanted["key"].to_list(), rows_of(wanted), strict=True):
        found.setdefault(key, []).append(row)
    return found
