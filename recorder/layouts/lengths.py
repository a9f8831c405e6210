"""How long the sequences of a tap are, and where their padding stands, as its extras say.

1. `_said` reads the extras, and refuses what contradicts itself.
2. `lengths_in` and `padding_side` are what of it concerns a layout.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import LayoutError
from . import runs as r
from .dims import BATCH, SEQUENCE, TOKENS, Dims

_REAL = ("seq_lens", "cu_seqlens", "cu_seqlens_q")
PADDED_BEHIND = (
    "padding was taken to stand behind each sequence; if it stands before, say so at the tap with "
    "extras={'padding': 'left'}"
)
_SIDE = ("padding", "padding_side")
_MASK = "attention_mask"
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
        has_room: whether the extras say the room.
        width: of the rows of their mask, 0 where there is none.
        is_masked: whether the mask alone gave them.
        declared: the size of a line of one sequence without what stands behind its own padding; 0
            where that is not declared.
    """

    real: tuple[int, ...]
    room: tuple[int, ...]
    side: str = ""
    is_borrowed: bool = False
    is_line: bool = False
    has_room: bool = False
    width: int = 0
    is_masked: bool = False
    declared: int = 0

    def lent(self, side: str) -> Lengths:
        """Return these lengths for the other side, which gives none, and may say where it pads."""
        return Lengths(self.real, self.room, side, is_borrowed=True)

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

    def granted(self, total: int, whose: str) -> str:
        """Return what is taken for granted of a side that has so many tokens, "" where nothing is.

        Args:
            total: how many it has in all.
            whose: the side, as messages call it.

        Raises:
            LayoutError: it cannot be told which of them are padding.
        """
        if self.is_line and len(self.real) == 1:
            room = min(total, self.declared or total)
            if self.side == "left" and self.width not in (0, room):
                raise mask_apart(self.width, room, whose)
            return PADDED_BEHIND if self.real[0] < room and not self.side else ""
        spare = total - sum(self.room)
        if spare <= 0 or self.has_room:
            return ""
        advice = (
            "give the room of each as extras={'padded_seq_lens': [...]} if each has padding of its "
            "own, or leave the side out if all of it stands behind the last"
        )
        if self.is_masked:
            raise LayoutError(
                f"{whose} attention mask has {sum(self.real)} tokens, and there are {total}, of "
                f"which it does not say where the other {spare} stand",
                "give the room of each sequence as extras={'padded_seq_lens': [...]}, or seq_lens "
                "too if all of it stands behind the last",
            )
        if self.side == "left":
            raise LayoutError(
                f"{whose} padding stands on the left, and of {total} tokens nobody says how much "
                f"of the {spare} of padding each sequence has",
                advice,
            )
        if len(self.real) == 1:
            return ""
        return (
            f"padding, {spare} of {total} tokens, was taken to stand behind the last sequence; if "
            "each has padding of its own, say so at the tap with "
            "extras={'padded_seq_lens': [...]}"
        )

    def segments(self, total: int) -> list[tuple[int, int, int]]:
        """Return where tokens stand among all that are real, for `runs.located`."""
        found, at, number = [], 0, 0
        for real, room in zip(self.real, self.room, strict=True):
            own = min(room, self.declared or room)
            before = max(0, own - real) if self.side == "left" else 0
            found += [
                (at, before, r.PADDING),
                (at + before, real, number),
                (at + before + real, room - before - real, r.PADDING),
            ]
            at, number = at + room, number + real
        found.append((at, total - at, r.PADDING))
        return [segment for segment in found if segment[1] > 0]


class _Said(NamedTuple):
    """What extras say, whatever the layout.

    Attributes:
        real: how many tokens each sequence has; None where nothing says it.
        room: how many it takes with padding of its own; None likewise.
        side: where padding stands, as said in words.
        mask_side: where it stands in the rows of the mask, "" where none has padding.
        width: of the rows of the mask, 0 without one.
        is_masked: whether the mask alone gives the lengths.
    """

    real: tuple[int, ...] | None
    room: tuple[int, ...] | None
    side: str
    mask_side: str
    width: int
    is_masked: bool


def lengths_in(extras: str | None, dims: Dims) -> Lengths | None:
    """Return the sequence lengths in a tap's extras, a JSON object; None where there are none.

    They are `seq_lens`, or cumulated from 0 `cu_seqlens` or `cu_seqlens_q`, or a row of 0 and 1 for
    each sequence, `attention_mask`; and where sequences are padded each by itself,
    `padded_seq_lens`, `cu_seqlens_padded` or `cu_seqlens_q_padded`.

    Args:
        extras: the JSON.
        dims: the tap's layout; of one that has nothing to do with sequences the extras are not
            read.

    Raises:
        LayoutError: they are there, and are no lengths, or contradict each other.
    """
    if not extras or not counts_sequences(dims):
        return None
    said = _said(extras)
    if said.real is None:
        return None
    # Rows of a mask are those of a batch: how packed tokens are padded it does not say.
    has_rows = SEQUENCE in dims.names and TOKENS not in dims.names
    return Lengths(
        said.real,
        said.room or said.real,
        said.side or (said.mask_side if has_rows or dims.is_line else ""),
        has_room=said.room is not None,
        width=said.width,
        is_masked=said.is_masked,
    )


def padding_side(extras: str | None) -> str:
    """Return where a tap's extras say that padding stands, `left` or `right`, else "".

    Raises:
        LayoutError: they say something else, or two things.
    """
    if not extras:
        return ""
    said = _said(extras)
    return said.side or said.mask_side


def counts_tokens(dims: Dims) -> bool:
    """Whether a layout has to do with tokens, so that padding may stand among them."""
    return TOKENS in dims.names or SEQUENCE in dims.names


def counts_sequences(dims: Dims) -> bool:
    """Whether a layout has to do with sequences, so that a tap's extras are read."""
    return counts_tokens(dims) or BATCH in dims.names


def mask_apart(width: int, room: int, whose: str) -> LayoutError:
    """Return the refusal of a mask whose rows are not as long as the sequences with padding."""
    return LayoutError(
        f"{whose} attention mask has rows of {width}, and its sequences {room} with their "
        "padding, which stands on the left",
        "give the mask of this tensor",
    )


@functools.lru_cache(maxsize=32)
def _said(extras: str) -> _Said:
    found = _loaded(extras)
    given = {name: lengths for name in _REAL if (lengths := _read(found, name)) is not None}
    mask = _mask_in(found)
    if mask is not None:
        given[_MASK] = mask[0]
    if len({*given.values()}) > 1:
        told = " and ".join(f"{list(real)!s:.120} by {name}" for name, real in given.items())
        raise LayoutError(
            f"the extras give the sequences the lengths {told}", "give those of this tensor alone"
        )
    real = next(iter(given.values()), None)
    room = next((n for name in _ROOM if (n := _read(found, name)) is not None), None)
    if real is not None and room is not None:
        _check_room(real, room)
    side = _side_in(found)
    _, mask_side, width = mask or ((), "", 0)
    if side and mask_side and side != mask_side:
        raise LayoutError(
            f"the extras say that padding stands on the {side}, and their attention mask has it on "
            f"the {mask_side}",
            "give the mask of this tensor",
        )
    return _Said(real, room, side, mask_side, width, [*given] == [_MASK])


def _check_room(real: tuple[int, ...], room: tuple[int, ...]) -> None:
    if len(room) != len(real) or any(a > b for a, b in zip(real, room, strict=True)):
        raise LayoutError(
            f"the extras give {len(real)} sequences of {sum(real)} tokens, and room with padding "
            f"for {len(room)} of {sum(room)}",
            "give as many of each, none longer than its room",
        )


def _side_in(found: Mapping[str, Any]) -> str:
    sides = {name: found[name] for name in _SIDE if isinstance(found.get(name), str)}
    for name, side in sides.items():
        if side not in ("left", "right"):
            raise LayoutError(f"extras[{name!r}] is {side!r:.80}, expected 'left' or 'right'")
    if len({*sides.values()}) > 1:
        raise LayoutError("the extras say that padding stands on the left, and on the right")
    return next(iter(sides.values()), "")


def _mask_in(found: Mapping[str, Any]) -> tuple[tuple[int, ...], str, int] | None:
    """Return the lengths, the side and the width that a mask's rows have; None without a mask."""
    value = found.get(_MASK)
    if not isinstance(value, list):
        return None
    rows = value if all(isinstance(row, list) for row in value) else [value]
    if any(one not in (0, 1) for row in rows for one in row) or len({*map(len, rows)}) > 1:
        raise LayoutError(
            f"extras[{_MASK!r}] is {value!r:.80}, expected rows of one length, of 0 and 1, one for "
            "each sequence"
        )
    lengths: list[int] = []
    sides: dict[str, int] = {}
    for i, row in enumerate(rows):
        n = sum(map(int, row))
        lengths.append(n)
        if n in (0, len(row)):
            continue
        first = row.index(1)
        if not all(row[first : first + n]):
            raise LayoutError(
                f"extras[{_MASK!r}] has a hole in row {i}, {list(map(int, row))!s:.80}",
                "give one whose rows have their tokens one behind the other, or lengths, as "
                "extras={'seq_lens': [...]}",
            )
        if 0 < first < len(row) - n:
            raise LayoutError(
                f"extras[{_MASK!r}] has padding on both sides of the tokens in row {i}",
                "cut it to one side",
            )
        sides.setdefault("left" if first else "right", i)
    if len(sides) > 1:
        raise LayoutError(
            f"extras[{_MASK!r}] has padding on the left in row {sides['left']} and on the right in "
            f"row {sides['right']}",
            "pad all rows on one side",
        )
    return tuple(lengths), next(iter(sides), ""), len(rows[0]) if rows else 0


def _loaded(extras: str) -> dict[str, Any]:
    try:
        found = json.loads(extras)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise LayoutError(f"the extras are {extras!r:.80}, expected a JSON object")
    return found


def _read(extras: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    value = extras.get(name)
    if value is None:
        return None
    is_cumulated = not name.endswith("seq_lens")
    sizes = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
    if sizes and not is_cumulated:
        return tuple(value)
    if sizes and value and value[0] == 0 and value == sorted(value):
        return tuple(b - a for a, b in itertools.pairwise(value))
    how = "a list of ends, the first of them 0" if is_cumulated else "a list of lengths"
    raise LayoutError(f"extras[{name!r}] is {value!r:.80}, expected {how}")
