"""The order in which a baseline ran what was paired, and what the target ran in another."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

import polars as pl


def in_order(
    table: pl.DataFrame, left: pl.DataFrame, right: pl.DataFrame, same_world: bool
) -> pl.DataFrame:
    """Sort pairs into the baseline's execution order; what it lacks follows what came before it."""
    a_keys, by_seq = _positions(left)
    b_keys, also_by_seq = _positions(right)
    keys = (
        a_keys.rename({"position": "at"})
        .join(b_keys.rename({"position": "there"}), on="key", how="full", coalesce=True)
        .sort("there", nulls_last=True)
        .with_columns(before=pl.col("at").fill_null(strategy="forward").fill_null(-1))
        .with_columns(at=pl.coalesce("at", "before"), late=pl.col("at").is_null().cast(pl.Int8))
        .sort("at", "late", "there", nulls_last=True)
        .with_row_index("order")
    )
    moved: list[int] = []
    if same_world:
        moved = _moved_on_ranks(left, right)
    elif by_seq and also_by_seq:
        both = keys.filter((pl.col("late") == 0) & pl.col("there").is_not_null())
        moved = _moved(both["key"].to_list(), both["there"].to_list())
    keys = keys.with_columns(reordered=pl.col("key").is_in(moved))
    return (
        table.join(keys.select("key", "order", "reordered"), on="key", how="left")
        .sort("order", "a", "b", nulls_last=True)
        .with_columns(pl.col("order").cast(pl.Int64))
    )


def _positions(frame: pl.DataFrame) -> tuple[pl.DataFrame, bool]:
    """Return the place of each key in execution order, and whether one rank has seen it all.

    Then that rank's order is the order. Else, as with a pipeline's stages, it is that of the clock
    within each step, each rank's own order kept.
    """
    keys = frame["key"].n_unique()
    seen = frame.group_by("rank").agg(pl.col("key").n_unique()).sort("rank")
    whole = seen.filter(pl.col("key") == keys)
    if whole.height:
        frame = frame.filter(pl.col("rank") == whole["rank"][0])
        order = ["seq"]
    else:
        frame = frame.with_columns(
            clock=pl.col("time_ns").fill_null(0).cum_max().over("rank", "step")
        )
        order = ["step", "clock", "rank", "seq"]
    first = frame.sort(order).unique("key", keep="first", maintain_order=True)
    return first.select("key", position=pl.int_range(pl.len(), dtype=pl.Int64)), bool(whole.height)


def _moved_on_ranks(left: pl.DataFrame, right: pl.DataFrame) -> list[int]:
    """Return the keys that any rank ran in another order than the same rank of the other side."""
    # Of what is compared row by row, a rank's first record stands for all.
    left, right = (
        frame.select("rank", "key", "seq").unique(
            ["rank", "key"], keep="first", maintain_order=True
        )
        for frame in (left, right)
    )
    both = left.join(right, on=["rank", "key"], suffix="_b", maintain_order="left")
    later = (pl.col("seq") < pl.col("seq").shift(1)) & (pl.col("rank") == pl.col("rank").shift(1))
    if both.select(later.any()).item():
        both = both.sort("rank", "seq")
    back = (pl.col("seq_b") < pl.col("seq_b").shift(1)) & (
        pl.col("rank") == pl.col("rank").shift(1)
    )
    ranks = both.filter(back)["rank"].unique().to_list()
    found: set[int] = set()
    for rank in ranks:
        rows = both.filter(pl.col("rank") == rank)
        found.update(_moved(rows["key"].to_list(), rows["seq_b"].to_list()))
    return sorted(found)


def _moved(keys: Sequence[int], places: Sequence[int]) -> list[int]:
    """Return the fewest keys that, taken out, leave the places ascending."""
    if all(x < y for x, y in itertools.pairwise(places)):
        return []
    tails: list[int] = []  # place of the last of the best ascending run of each length
    ends: list[int] = []
    before = [-1] * len(places)
    for i, place in enumerate(places):
        at = bisect_right(tails, place)
        before[i] = ends[at - 1] if at else -1
        if at == len(tails):
            tails.append(place)
            ends.append(i)
        else:
            tails[at], ends[at] = place, i
    kept = set()
    i = ends[-1]
    while i >= 0:
        kept.add(i)
        i = before[i]
    return [key for i, key in enumerate(keys) if i not in kept]
