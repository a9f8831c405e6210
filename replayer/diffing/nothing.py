"""Why nothing matched, and what to try; what is equal over nothing."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from recorder.filters import Filter
from recorder.format.rows import seen_in
from recorder.tags import label

from ..pairing.pairs import Pairs
from .bounds import numel_of

_NO_NUMBER = r"^[\[\], -]*(?:NaN|Infinity)(?:[\[\], -]|NaN|Infinity)*$"  # of a value, as JSON


def why_nothing(pairs: Pairs, filter: Filter | None) -> str:
    """Say why no pair has a record on both sides."""
    for side, seen in zip((pairs.a, pairs.b), pairs.seen, strict=True):
        if not seen:
            return f"nothing matched: {side.recording.path} is empty, no tap was recorded in it"
    frames = pairs.a.frame, pairs.b.frame
    if filter is not None and not all(frame.height for frame in frames):
        sides = [seen_in(side.recording.latest()) for side in (pairs.a, pairs.b)]
        names = sides[0][0] | sides[1][0]
        values = {
            tag: sides[0][1].get(tag, set()) | sides[1][1].get(tag, set())
            for tag in (*sides[0][1], *sides[1][1])
        }
        which = " and ".join(s for s, frame in zip("AB", frames, strict=True) if not frame.height)
        return f"nothing matched: in {which}, {filter.why_nothing(values, names, values)}"
    a_names, b_names = (sorted(frame["name"].unique()) for frame in frames)
    facts = [f"A has taps {_some(a_names)}", f"B has {_some(b_names)}"]
    if set(a_names) & set(b_names):
        a, b = (sorted(frame["step"].unique()) for frame in frames)
        facts = [f"A has steps {_span(a)}, B has {_span(b)}"] if not set(a) & set(b) else []
        name = next(name for name in a_names if name in b_names)
        one, other = (
            label(*frame.filter(pl.col("name") == name).select("name", "tags").row(0))
            for frame in frames
        )
        facts.append(f"{one!r} in A, {other!r} in B")
    return (
        f"nothing matched: {'; '.join(facts)}; see --rename, --match-on and --step-offset, and "
        "graft ls"
    )


def over_nothing(pairs: Pairs, table: pl.DataFrame) -> pl.DataFrame:
    """Return the rows that are equal or close although no number was compared.

    Args:
        pairs: what belongs together.
        table: the diff's.

    Returns:
        The rows that have no element, or only NaN and infinities, with `empty`, whether it is the
        former. Where statistics are not known, a tensor is taken to hold numbers.
    """
    rows = pairs.a.frame
    rows = rows.with_columns(n=numel_of(rows["shape"]))
    not_finite = pl.col("nan_count") + pl.col("inf_count")
    of_tensor = (pl.col("n") == 0) | (not_finite == pl.col("n"))
    is_value = pl.col("kind") == "value"
    keys = rows.group_by("key").agg(
        empty=(~is_value & (pl.col("n") == 0)).fill_null(False).all(),
        nothing=pl.when(is_value)
        .then(pl.col("value").str.contains(_NO_NUMBER))
        .otherwise(of_tensor)
        .fill_null(False)
        .all(),
    )
    numbered = pairs.table.with_row_index("pair").select(pl.col("pair").cast(pl.Int64), "key")
    wanted = numbered.join(keys.filter("nothing"), on="key").select("pair", "empty")
    good = table.filter(pl.col("by").is_null() & pl.col("outcome").is_in(["equal", "close"]))
    return good.join(wanted, on="pair", maintain_order="left")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _span(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])
