"""Batch and sequence on both sides: each token goes to its own place, wherever padding stands.

Where nobody gives lengths, or nothing is padded, batches are copied as they stand, dim by dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import LayoutError
from .agreeing import Rows, check_sides
from .align import MEND, Pair
from .blocks import Sizes
from .dims import BATCH, SEQUENCE, Dims
from .fit import along, other_sizes
from .groups import Grid, Tokens
from .lengths import PADDED_BEHIND, mask_apart
from .receiver import Found, Receiver
from .tokens import check_all_there, indices_of, masked_row, row_of, too_long

PADDED_ALIKE = (
    "padding was taken to stand on the same side in both; say where at the taps, as "
    "extras={'padding': 'right'}"
)


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
    if not rows.real:
        return None, ""
    dims = receiver.dims
    if any({BATCH, SEQUENCE} & one.padded or BATCH in one.sizes for one in (sender_dims, dims)):
        check_sides(rows.senders, rows.receiver)  # padding of the dims, too
        return None, ""
    ours = _batch_first(sender_dims, [i for pair in pairs for i in pair.senders])
    theirs = _batch_first(dims, [j for pair in pairs for j in pair.receivers])
    size = _length(sender_dims, ours, [sizes[i].total for i in ours], rows)
    notes: list[str] = []
    found = [_found(j, pairs, sender_dims, sizes, receiver, rows, size, notes) for j in theirs]
    other = _length(dims, theirs, [one.total for one in found], rows)
    room = _room(size, sender_dims, dims, rows.senders.side, "$senders'")
    other_room = _room(other, dims, sender_dims, rows.receiver.side, "$receiver's")
    sides = rows.senders.side, rows.receiver.side
    is_padded = [any(n < one for n in rows.real) for one in (room, other_room)]
    if not any(is_padded):
        return None, ""
    if all(is_padded):
        if sides == ("", "") and (size, room) == (other, other_room):
            return None, PADDED_ALIKE
        if "" in sides:
            check_sides(rows.senders, rows.receiver)
    for told, side, n, padded, whose in (
        (rows.senders, sides[0], room, is_padded[0], "$senders'"),
        (rows.receiver, sides[1], other_room, is_padded[1], "$receiver's"),
    ):
        if padded and not side:
            notes.append(PADDED_BEHIND)
        width = told.lengths.width if told.lengths is not None else 0
        if padded and side == "left" and width not in (0, n):
            raise mask_apart(width, n, whose)
    for i in ours:
        is_batch = sender_dims.dims[i].names == (BATCH,) and sizes[i].total == len(rows.real)
        if len(pairs) == 1 and len(ours) != len(theirs) and not is_batch:
            check_all_there(sizes[i])
    group = Tokens(
        Pair(tuple(ours), tuple(theirs)),
        Grid(len(ours) == 1, rows.real, size, room, sides[0] == "left"),
        Grid(len(theirs) == 1, rows.real, other, other_room, sides[1] == "left"),
        [one.runs for one in found],
        "; ".join(dict.fromkeys(filter(None, notes))),
    )
    return group, ""


def _batch_first(dims: Dims, positions: Sequence[int]) -> list[int]:
    return sorted(positions, key=lambda i: dims.dims[i].names != (BATCH,))


def _length(dims: Dims, positions: Sequence[int], totals: Sequence[int], rows: Rows) -> int:
    """Return how long a side's sequences are with their padding.

    Raises:
        LayoutError: they are too short for their tokens, or not as many.
    """
    count, total = len(rows.real), totals[-1]
    if len(positions) > 1:
        batch, size = totals
    else:
        batch = count if BATCH in dims.dims[positions[0]].names else 1
        size, rest = divmod(total, batch)
        if rest:
            raise LayoutError(f"{total} of (b*s) do not make {batch} sequences of one length", MEND)
    if batch != count or max(rows.real) > size:
        raise too_long(rows.real, batch, size)
    return size


def _room(size: int, dims: Dims, others: Dims, side: str, whose: str) -> int:
    """Return how long a side's sequences are with padding of their own: less than their dim's size
    where that is padded to a multiple.

    Raises:
        LayoutError: only the other side says so, and where tokens stand hangs on it.
    """
    own, other = dims.sizes.get(SEQUENCE), others.sizes.get(SEQUENCE)
    if own is None and other is not None and other < size and side == "left":
        raise LayoutError(
            f"dim s has {size}, and the other side declares {other} without padding; {whose} "
            "padding stands on the left, and nobody says whether of all or of these",
            f"declare it at both taps, as in '# s={other}'",
        )
    return min(size, size if own is None else own)


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

    Adds to `notes` what was taken for granted.
    """
    names, whole = receiver.dims.dims[j].names, receiver.whole(j)
    (pair,) = [pair for pair in pairs if j in pair.receivers]
    if SEQUENCE in names and whole is not None:
        return indices_of(receiver, j, whole)
    masked = masked_row(receiver, j, rows.receiver.lengths)
    if masked is not None:
        return masked
    if len(pair.senders) == len(pair.receivers) == 1:
        _, found = along(sender_dims, sizes[pair.senders[0]], receiver, j, rows)
    elif names == (BATCH,):
        found = indices_of(receiver, j, len(rows.real))
    else:
        wanted = size * (len(rows.real) if BATCH in names else 1)
        others = other_sizes(receiver, j, wanted, rows)
        is_left = rows.is_left and bool(others)
        known = receiver.indices(j, wanted, False, others, is_left=is_left)
        found = known or row_of(receiver, j, None, notes)
    if SEQUENCE in names and not {*names} <= receiver.sized:
        notes.append(f"{'*'.join(names)} was taken to have {found.total} in all, as $senders have")
    notes += [found.note] * bool(found.note)
    return found
