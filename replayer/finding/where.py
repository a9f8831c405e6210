"""Where a fault sits: the dims and indices of its tensor, in the names that its tap declares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from recorder.errors import LayoutError
from recorder.layouts.parse import layout_of

from ..measuring.look import Place
from .segments import Row

_HEADS, _EXPERTS = ("h", "head", "heads", "kv", "hkv"), ("e", "expert", "experts")
_TOKENS = ("s", "t", "token", "tokens", "seq", "sequence", "k", "q")


def alone(row: Row, off: str) -> tuple[str, str]:
    """Return the class of what is wrong in one place alone, and how to say so; "" where it is none.

    Args:
        row: of the log.
        off: how far off it is, in words.
    """
    places = _places(row)
    for dim, place in sorted(places.items(), key=lambda one: one[1]["count"]):
        called = _name(row, int(dim))
        words = f"{dim_words(row, int(dim))} {listed(place)} of {place['size']} alone: {off}"
        is_last = place["last"] == place["size"] - 1
        if called in _HEADS and place["count"] == 1:
            return "one head", words
        if called in _EXPERTS and place["count"] == 1:
            return "one expert", words
        if called in _TOKENS and place["count"] == 1 and not is_last:
            return "one token", words
        is_run = place["last"] - place["at"][0] + 1 == place["count"]
        if called in _TOKENS and is_last and is_run:
            return "last tokens", words
    return "", ""


def where_alone(row: Row) -> str:
    """Say in which few places it is, "" where it is everywhere."""
    words = [
        f"{dim_words(row, int(dim))} {listed(place)} of {place['size']}"
        for dim, place in sorted(_places(row).items())
    ]
    return f"in {' and '.join(words[:2])} alone" if words else ""


def _places(row: Row) -> Mapping[str, Place]:
    found: Mapping[str, Place] = row["look"].get("places", {})
    return found


def listed(place: Place) -> str:
    """Return indices as `3`, `3 to 7`, `1, 4, 9, ...`."""
    at, total = place["at"], place["count"]
    if total == 1:
        return str(at[0])
    if place["last"] - at[0] + 1 == total:
        return f"{at[0]} to {place['last']}"
    return ", ".join(map(str, at[:4])) + (", ..." if total > 4 else "")


def dim_words(row: Row, dim: int) -> str:
    """Return what a dim is called: its name, or else its number."""
    return f"dim {_name(row, dim) or dim}"


def _name(row: Row, dim: int) -> str:
    try:
        dims = layout_of(row["dims"], row["kind"]).dims if row["dims"] else ()
    except LayoutError:
        return ""
    return dims[dim].label if len(dims) == len(row["shape"]) else ""


def index_words(row: Row, at: Sequence[int]) -> str:
    """Return an index, -1 for whole dims, as `dim h 3 and dim s 0`."""
    return " and ".join(f"{dim_words(row, dim)} {i}" for dim, i in enumerate(at) if i >= 0)


def percent(share: float) -> str:
    """Return a relative error in words."""
    if not math.isfinite(share):
        return "more than all"
    return f"{100 * share:.3g} %" if share >= 1e-3 else f"{share:.1e} of their size"
