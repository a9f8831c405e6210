"""How long the sequences in flattened tokens are, as a tap's extras say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import LayoutError
from . import runs as r
from .dims import TOKENS, Dims

_REAL = ("seq_lens", "cu_seqlens", "cu_seqlens_q")
PADDED_BEHIND = (
    "padding was taken to stand behind each sequence; if it stands before, say so at the tap with "
    "extras={'padding': 'left'}"
)
_SIDE = ("padding", "padding_side")
_ROOM = ("padded_seq_lens", "cu_seqlens_padded", "cu_seqlens_q_padded")


class Lengths(NamedTuple):
    """Of the sequences.

    Attributes:
        real: how many tokens each has.
        room: how many it takes with padding of its own.
        side: where that padding stands, `left` or `right`; "" where nobody says.
        is_borrowed: whether the other side gave them, whose room need not be this side's.
        is_line: whether this side has no packed tokens, but sequences without a batch; if it is
            one sequence, all of its padding is its own.
    """

    real: tuple[int, ...]
    room: tuple[int, ...]
    side: str = ""
    is_borrowed: bool = False
    is_line: bool = False

    def lent(self) -> Lengths:
        """Return these lengths for the other side, which gives none."""
        return self._replace(is_borrowed=True, is_line=False, side="")

    def fitted(self, total: int) -> Lengths:
        """Return these lengths for a side that has so many tokens in all.

        Raises:
            LayoutError: it cannot be told whether its sequences are padded as the other side's.
        """
        if self.is_line and len(self.real) == 1:
            return self._replace(room=(max(total, *self.real),))
        if not self.is_borrowed or self.real == self.room or total == sum(self.room):
            return self
        if total != sum(self.real):
            raise LayoutError(
                f"one side says that each sequence is padded, {sum(self.real)} tokens to "
                f"{sum(self.room)}, and the other has {total} and says nothing",
                "give the extras of both taps their lengths",
            )
        return self._replace(room=self.real)

    def guesses_side(self, total: int) -> bool:
        """Whether a sequence without a batch has padding of which nobody says where it stands."""
        return self.is_line and len(self.real) == 1 and self.real[0] < total and not self.side

    def segments(self, total: int) -> list[tuple[int, int, int]]:
        """Return where tokens stand among all that are real, for `runs.located`."""
        found, at, number = [], 0, 0
        for real, room in zip(self.real, self.room, strict=True):
            pad = room - real
            if self.side == "left":
                found += [(at, pad, r.PADDING), (at + pad, real, number)]
            else:
                found += [(at, real, number), (at + real, pad, r.PADDING)]
            at, number = at + room, number + real
        found.append((at, total - at, r.PADDING))
        return [segment for segment in found if segment[1] > 0]


def lengths_in(extras: str | None, dims: Dims) -> Lengths | None:
    """Return the sequence lengths in a tap's extras, a JSON object; None where there are none.

    They are `seq_lens`, or cumulated from 0 `cu_seqlens` or `cu_seqlens_q`; and where sequences are
    padded each by itself, `padded_seq_lens`, `cu_seqlens_padded` or `cu_seqlens_q_padded`.

    Args:
        extras: the JSON.
        dims: the tap's layout; of one that has nothing to do with tokens the extras are not read.

    Raises:
        LayoutError: they are there, and are no lengths.
    """
    if not extras or not counts_tokens(dims):
        return None
    found = _loaded(extras)
    real = _read(found, _REAL)
    if real is None:
        return None
    room = _read(found, _ROOM) or real
    if len(room) != len(real) or any(a > b for a, b in zip(real, room, strict=True)):
        raise LayoutError(
            f"the extras give {len(real)} sequences of {sum(real)} tokens, and room with padding "
            f"for {len(room)} of {sum(room)}",
            "give as many of each, none longer than its room",
        )
    return Lengths(real, room, padding_side(extras))


def padding_side(extras: str | None) -> str:
    """Return where a tap's extras say that padding stands, `left` or `right`, else "".

    Raises:
        LayoutError: they say something else.
    """
    if not extras:
        return ""
    found = _loaded(extras)
    for name in _SIDE:
        side = found.get(name)
        if isinstance(side, str):
            if side not in ("left", "right"):
                raise LayoutError(f"extras[{name!r}] is {side!r:.80}, expected 'left' or 'right'")
            return side
    return ""


def counts_tokens(dims: Dims) -> bool:
    """Whether a layout has to do with tokens, so that a tap's extras are read."""
    return TOKENS in dims.names or "s" in dims.names


def _loaded(extras: str) -> dict[str, Any]:
    try:
        found = json.loads(extras)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise LayoutError(f"the extras are {extras!r:.80}, expected a JSON object")
    return found


def _read(extras: Mapping[str, Any], names: tuple[str, ...]) -> tuple[int, ...] | None:
    for name in names:
        value = extras.get(name)
        if value is None:
            continue
        sizes = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
        if sizes and name == names[0]:
            return tuple(value)
        if sizes and value and value[0] == 0 and value == sorted(value):
            return tuple(b - a for a, b in itertools.pairwise(value))
        how = "a list of lengths" if name == names[0] else "a list of ends, the first of them 0"
        raise LayoutError(f"extras[{name!r}] is {value!r:.80}, expected {how}")
    return None
