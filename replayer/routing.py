"""What a replay says of routers' choices: indices that are grafted, and the weights beside them.

Routing replay is a graft of the top-k of a router, from a server's recording into a trainer. What
can go wrong there is seen in the choices themselves: a table that is another layer's or another
token's, rows in which nothing was chosen, indices without the weights that belong to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from recorder.format.rows import parse_tags
from recorder.sizes import count
from recorder.tags import TagValue, label
from recorder.tokens.hashing import previous

from .measuring.choice import by_row, nothing_chosen, other_rows

if TYPE_CHECKING:
    import polars as pl

_MOSTLY, _FEWER, _FEWEST = 0.5, 0.6, 4
"""Of the rows: from when on it is asked which others they are; how many times as many may be off
then; of how many rows."""
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
_FLOATS = ("float64", "float32", "bfloat16", "float16")
_MOST_CHOSEN = 64

Near = Callable[[], Iterator[tuple[str, torch.Tensor]]]
"""Yields the label of another record that a choice could be taken for, and its rows."""


def said_of(
    own: torch.Tensor, new: torch.Tensor, known: torch.Tensor | None, ids: torch.Tensor, near: Near
) -> tuple[str, str]:
    """Return a note on choices that are grafted, and what of it should be said aloud.

    Args:
        own: what the target chose, [rows, ..., numbers].
        new: what replaces it.
        known: position and token of each row, [rows, 2]; None where nobody said.
        ids: the rows' ids, [rows] or [rows, numbers]; empty where they have none.
        near: see `Near`.
    """
    x, y = by_row(new), by_row(own)
    if not x.numel():
        return "", ""
    other = other_rows(x, y)
    flipped, rows = int(other.sum()), len(x)
    notes = [f"{flipped} of {count(rows, 'row')} chose others"] if flipped else []
    aloud = []
    none = nothing_chosen(x)
    if bool(none.any()):
        index = int(x[none][0, 0])
        aloud.append(
            f"{count(int(none.sum()), 'grafted row')} of {rows} have index {index} in all "
            f"{x.shape[1]} places: nothing was chosen there, as where a server returns zeros for a "
            "prompt; leave these rows out of the recording, with the id -1"
        )
    if flipped > _MOSTLY * rows and rows >= _FEWEST:
        most = _FEWER * flipped / rows
        if by := _shifted(own, new, known, ids, most):
            aloud.append(
                f"what the target chose for most tokens was recorded for the token "
                f"{'behind' if by > 0 else 'before'} each: is the table off by one token?"
            )
        for name, candidate in near():
            z = by_row(candidate)
            if z.shape == y.shape and float(other_rows(z, y).double().mean()) < most:
                aloud.append(
                    f"what the target chose was recorded as {name}: is the table off by one?"
                )
                break
    return "; ".join([*notes, *aloud]), "; ".join(aloud)


def _shifted(
    own: torch.Tensor,
    new: torch.Tensor,
    known: torch.Tensor | None,
    ids: torch.Tensor,
    most: float,
) -> int:
    """Return 1 where each row's own choice is what replaces the next token's, -1 the one before."""
    if known is None or ids.dim() != 1 or len(ids) != len(own) or len(known) != len(own):
        return 0
    positions, tokens = known.unbind(1)
    own_before = previous(ids, tokens, positions)
    has = own_before >= 0
    if int(has.sum()) < _FEWEST:
        return 0
    x, y = new.reshape(len(ids), -1), own.reshape(len(ids), -1)
    here, there = has.nonzero().flatten(), own_before[has]
    for by, (one, other) in ((1, (here, there)), (-1, (there, here))):
        if float(other_rows(x[one], y[other]).double().mean()) < most:
            return by
    return 0


def neighbours(tags: dict[str, TagValue]) -> Iterator[dict[str, TagValue]]:
    """Yield tags of which one whole number is one more or one less."""
    for tag, value in tags.items():
        if type(value) is int:
            yield {**tags, tag: value + 1}
            yield {**tags, tag: value - 1}


def without_weights(log: pl.DataFrame, records: pl.DataFrame) -> str:
    """Say that indices were grafted, and not the weights that were recorded beside them.

    Args:
        log: a replay's.
        records: the baseline's manifest rows that could be used.
    """
    import polars as pl

    grafted = set(log.filter(pl.col("outcome") == "grafted")["name"].unique())
    number = pl.col("shape").list.last()
    several = records.filter(
        (pl.col("kind") == "tensor") & (pl.col("shape").list.len() > 1) & (number <= _MOST_CHOSEN)
    )
    on = ["rank", "attempt", "step", "occurrence", "tags", "shape"]
    chosen = several.filter(pl.col("dtype").is_in(_INTEGERS) & pl.col("name").is_in(grafted))
    weights = several.filter(pl.col("dtype").is_in(_FLOATS) & ~pl.col("name").is_in(grafted))
    found = chosen.join(weights, on=on, suffix="_weights").unique("name", maintain_order=True)
    if not found.height:
        return _not_recorded(log, chosen)
    row = found.row(0, named=True)
    tags = parse_tags(row["tags"])
    of = label(row["name"], row["tags"]) if tags else row["name"]
    return (
        f"{of} was grafted, and {row['name_weights']}, recorded beside it with the same shape, was "
        "not: what is chosen is the baseline's, and how it is weighed the target's; graft both, or "
        "tap where the weights follow from the indices"
    )


def _not_recorded(log: pl.DataFrame, chosen: pl.DataFrame) -> str:
    """Say that indices were grafted, and what the target has beside them was not recorded.

    That are floats of the same tags, of as many rows, and as many numbers in each.

    Args:
        log: a replay's.
        chosen: the records of indices of names that were grafted.
    """
    import polars as pl

    on = ["rank", "step", "occurrence", "tags"]
    number = pl.col("shape").list.last()
    numbers = chosen.group_by("name").agg(number=number.first(), same=number.n_unique() == 1)
    every = pl.col("rows_found") + pl.col("rows_missing")
    indices = log.filter((pl.col("outcome") == "grafted") & (pl.col("kind") == "tensor"))
    indices = indices.with_columns(every=every).join(numbers.filter("same"), on="name")
    missing = log.filter(
        (pl.col("outcome") == "missing")
        & pl.col("dtype").is_in(_FLOATS)
        & (pl.col("shape").list.len() > 1)
    )
    missing = missing.with_columns(
        number=number, elements=pl.col("shape").list.eval(pl.element().product()).list.first()
    )
    found = indices.join(missing, on=[*on, "number"], suffix="_weights").filter(
        pl.when(pl.col("every").is_null())
        .then(pl.col("numel") == pl.col("elements"))
        .otherwise(pl.col("every") == pl.col("rows_missing_weights"))
    )
    if not found.height:
        return ""
    row = found.sort("seq", "rank").row(0, named=True)
    return (
        f"{label(row['name'], row['tags'])} was grafted, and {row['name_weights']}, tapped beside "
        "it with as many numbers a row, was not recorded: what is chosen is the baseline's, and "
        "how it is weighed the target's; tap it in the baseline too, if these are its weights"
    )
