"""Batch and sequence on both sides: each token goes to its own place, wherever padding stands.

1. `_found` is what the receiver's block has of its batch, and `_side` how long sequences are.
2. `batched` counts both sides' tokens, where lengths are known and anything is padded; else batches
   are copied as they stand, dim by dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LayoutError
from .agreeing import Rows, Told, check_sides
from .align import MEND, Pair
from .blocks import Sizes
from .dims import BATCH, SEQUENCE, Dims
from .fit import along, other_sizes
from .groups import Grid, Tokens
from .lengths import PADDED_BEHIND, mask_apart
from .receiver import Found, Receiver
from .tokens import check_all_there, indices_of, left_open, masked_row, row_of, too_long

PADDED_ALIKE = (
    "padding was taken to stand on the same side in both; say where at the taps, as "
    "extras={'padding': 'right'}"
)


@dataclass(frozen=True)
class _Side:
    """The sequences of one side.

    Attributes:
        whose: the side, as messages call it.
        told: what it says of them.
        positions: its dims, batch first.
        size: how long they are along the dim.
        room: how long with padding of their own; what is behind that is padding of the dim.
        is_padded: whether any has padding of its own.
        is_open: whether it matters where that stands.
    """

    whose: str
    told: Told
    positions: tuple[int, ...]
    size: int
    room: int
    is_padded: bool
    is_open: bool

    def grid(self, real: Sequence[int]) -> Grid:
        """Return how its tokens are counted."""
        is_left = self.told.side == "left"
        return Grid(len(self.positions) == 1, real, self.size, self.room, is_left)

    def granted(self) -> str:
        """Return what is taken for granted of its padding, "" where nothing is.

        Raises:
            LayoutError: its mask has rows of another length.
        """
        width = self.told.lengths.width if self.told.lengths is not None else 0
        if self.is_open and self.told.side == "left" and width not in (0, self.room):
            raise mask_apart(width, self.room, self.whose)
        return PADDED_BEHIND if self.is_open and not self.told.side else ""


def batched(
    pairs: Sequence[Pair],
    sender_dims: Dims,
    sizes: Sequence[Sizes],
    receiver: Receiver,
    rows: Rows,
) -> tuple[Tokens | None, str]:
    """Return how both sides count the tokens of a batch, and what was taken for granted.

    Args:
        pairs: the dims of batch and sequence, by position.
        sender_dims: the senders' layout.
        sizes: the sizes of their blocks along each of its dims.
        receiver: the receiver's block.
        rows: what is known of the sequences.

    Returns:
        None where batch and sequence are to be copied as they stand.

    Raises:
        LayoutError: the sizes, or the padding, contradict each other, or do not say enough.
    """
    dims = receiver.dims
    if not rows.real:
        return None, ""
    if any({BATCH, SEQUENCE} & one.padded or BATCH in one.sizes for one in (sender_dims, dims)):
        check_sides(rows.senders, rows.receiver)  # there is padding of the dims, too
        return None, ""
    senders = _batch_first(sender_dims, [i for pair in pairs for i in pair.senders])
    receivers = _batch_first(dims, [j for pair in pairs for j in pair.receivers])
    size = _length(sender_dims, senders, [sizes[i].total for i in senders], rows.real)
    notes: list[str] = []
    found = [_found(j, pairs, sender_dims, sizes, receiver, rows, size, notes) for j in receivers]
    other = _length(dims, receivers, [one.total for one in found], rows.real)
    given = _side("$senders'", rows.senders, sender_dims, dims, senders, size, rows.real)
    taken = _side("$receiver's", rows.receiver, dims, sender_dims, receivers, other, rows.real)
    if not (given.is_padded or taken.is_padded):
        return None, "; ".join(notes)
    if given.is_open and taken.is_open:
        is_silent = not (given.told.side or taken.told.side)
        if is_silent and (given.size, given.room) == (taken.size, taken.room):
            return None, "; ".join([*notes, PADDED_ALIKE])
        if not (given.told.side and taken.told.side):
            check_sides(given.told, taken.told)
    for i in senders:
        if sizes[i].total not in _borne_out(i, sender_dims, given, taken, rows):
            check_all_there(sizes[i])
    notes += [given.granted(), taken.granted(), *(one.note for one in found)]
    return Tokens(
        Pair(given.positions, taken.positions),
        given.grid(rows.real),
        taken.grid(rows.real),
        [one.runs for one in found],
        "; ".join(dict.fromkeys(filter(None, notes))),
    ), ""


def _batch_first(dims: Dims, positions: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(positions, key=lambda i: dims.dims[i].names != (BATCH,)))


def _length(
    dims: Dims, positions: Sequence[int], totals: Sequence[int], real: Sequence[int]
) -> int:
    """Return how long a side's sequences are along its dim.

    Raises:
        LayoutError: they are too short for their tokens, or not as many.
    """
    if len(positions) > 1:
        batch, size = totals
    else:
        batch = len(real) if BATCH in dims.dims[positions[0]].names else 1
        size, rest = divmod(totals[0], batch)
        if rest:
            raise LayoutError(
                f"{totals[0]} of (b*s) do not make {batch} sequences of one length", MEND
            )
    if batch != len(real) or max(real) > size:
        raise too_long(real, batch, size)
    return size


def _side(
    whose: str,
    told: Told,
    dims: Dims,
    others: Dims,
    positions: tuple[int, ...],
    size: int,
    real: Sequence[int],
) -> _Side:
    """Return a side's sequences, which may have room for less than their dim.

    Raises:
        LayoutError: only the other side says so, and where tokens stand hangs on it.
    """
    own, other = dims.sizes.get(SEQUENCE), others.sizes.get(SEQUENCE)
    room = min(size, size if own is None else own)
    if max(real) > room:
        raise too_long(real, len(real), room)
    is_open = any(0 < n < room for n in real)
    if own is None and other is not None and other < size and told.side == "left" and is_open:
        raise LayoutError(
            f"dim s has {size}, and the other side declares {other} without padding; {whose} "
            "padding stands on the left, and nobody says of which",
            f"declare it at both taps, as in '# s={other}'",
        )
    return _Side(whose, told, positions, size, room, any(n < room for n in real), is_open)


def _borne_out(i: int, sender_dims: Dims, given: _Side, taken: _Side, rows: Rows) -> set[int]:
    """Return which sizes of a sender's dim are certain, though not all blocks were recorded."""
    names = sender_dims.dims[i].names
    count = len(rows.real) if BATCH in names else 1
    if SEQUENCE not in names:
        return {count}
    width = given.told.lengths.width if given.told.lengths is not None else 0
    return {count * n for n in (sender_dims.sizes.get(SEQUENCE, 0), width, taken.size)}


def _found(
    j: int,
    pairs: Sequence[Pair],
    sender_dims: Dims,
    sizes: Sequence[Sizes],
    receiver: Receiver,
    rows: Rows,
    size: int,
    notes: list[str],
) -> Found:
    """Return the receiver's whole along a dim of a batch, and what its block has of it.

    Adds to `notes` where that was taken to be as long as the senders'.

    Raises:
        LayoutError: it cannot be told.
    """
    names, whole = receiver.dims.dims[j].names, receiver.whole(j)
    (pair,) = [pair for pair in pairs if j in pair.receivers]
    if SEQUENCE in names and whole is not None:
        return indices_of(receiver, j, whole)
    if names == (SEQUENCE,) and SEQUENCE in receiver.dims.sizes:
        return row_of(receiver, j, None, notes)  # which need not be as long as the senders'
    masked = masked_row(receiver, j, rows.receiver.lengths)
    if masked is not None:
        return masked
    if len(pair.senders) == len(pair.receivers) == 1:
        _, found = along(sender_dims, sizes[pair.senders[0]], receiver, j, rows)
    elif names == (BATCH,):
        return indices_of(receiver, j, len(rows.real))
    else:
        wanted = size * (len(rows.real) if BATCH in names else 1)
        others = other_sizes(receiver, j, wanted, rows)
        is_left = rows.is_left and bool(others)
        known = receiver.indices(j, wanted, False, others, is_left=is_left)
        found = known or row_of(receiver, j, None, notes)
    is_even = found.total == receiver.even(j) and receiver.is_even(j)
    if SEQUENCE in names and (not is_even or any(cut.rule for cut in receiver.cuts(j))):
        if rows.is_left and not is_even:
            raise left_open(receiver, j)
        label = receiver.dims.dims[j].label
        notes.append(f"{label} was taken to have {found.total} in all, as the senders have")
    return found
