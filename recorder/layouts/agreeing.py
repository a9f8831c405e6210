"""What both sides say of the sequences in their tensors, held against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..errors import LayoutError
from .blocks import Block, Sizes
from .cutting import SEQUENCES_OVER
from .dims import BATCH, SEQUENCE, TOKENS, Dim, Dims
from .lengths import Lengths, counts_tokens, lengths_in, padding_side

_ANY = Dims("b s", (Dim((BATCH,)), Dim((SEQUENCE,))))


class Told(NamedTuple):
    """What a side says of its sequences.

    Attributes:
        lengths: how long they are; None where it does not say.
        side: where padding stands, `left` or `right`; "" where it does not say.
    """

    lengths: Lengths | None = None
    side: str = ""


class Rows(NamedTuple):
    """What is known of the sequences in a batch, or of one without, that both sides have.

    Attributes:
        real: how many tokens each has; empty where nobody says it of these.
        senders: what the senders say.
        receiver: what the receiver says.
    """

    real: tuple[int, ...]
    senders: Told
    receiver: Told

    @property
    def is_left(self) -> bool:
        """Whether the receiver's padding stands on the left."""
        return self.receiver.side == "left"


def told_in(extras: str, dims: Dims) -> Told:
    """Return what a tap says of its sequences.

    Raises:
        LayoutError: it contradicts itself.
    """
    side = padding_side(extras) if counts_tokens(dims) else ""
    return Told(lengths_in(extras, dims), side)


def told_by(senders: Sequence[Block], dims: Dims) -> Told:
    """Return what the senders say of their sequences.

    An empty block may say that it has none. Where no dim has tokens, ranks may give the lengths of
    their own rows, which then say nothing of the whole.

    Raises:
        LayoutError: they contradict each other, or themselves.
    """
    texts = {(block.extras, 0 in block.shape): block.rank for block in senders}
    given: dict[Lengths, int] = {}
    sides: dict[str, int] = {}
    for (text, is_empty), rank in texts.items():
        told = told_in(text, dims)
        if told.lengths is not None and not (is_empty and not told.lengths.real):
            given.setdefault(told.lengths, rank)
        if told.side:
            sides.setdefault(told.side, rank)
    if len({(one.real, one.room) for one in given}) > 1:
        if not counts_tokens(dims):
            return Told()
        (_, one), (_, other), *_ = given.items()
        raise LayoutError(
            f"${{rank}}s {one} and {other} give different sequence lengths in their extras",
            "give those of the whole on every rank",
        )
    if len(sides) > 1:
        raise LayoutError(
            f"padding stands on the left on $rank {sides['left']} and on the right on $rank "
            f"{sides['right']}",
            "pad alike on every rank",
        )
    side = next((one.side for one in given if one.side), "")
    lengths = next(iter(given), None)
    return Told(lengths and lengths._replace(side=side), next(iter(sides), ""))


def check_taps(one: tuple[str, Dims | None], other: tuple[str, Dims | None]) -> None:
    """Refuse two taps that contradict each other on their sequences, whatever layouts they declare.

    Args:
        one: the sender's extras and layout. A layout that is not declared is taken to be the
            other's; where neither is, extras that cannot be read say nothing.
        other: the receiver's.

    Raises:
        LayoutError: they do, or contradict themselves.
    """
    dims = one[1] or other[1]
    told = []
    for extras, own in (one, other):
        try:
            told.append(told_in(extras, own or dims or _ANY))
        except LayoutError:
            if dims is not None:
                raise
            return
    check_same(*told)
    check_sides(*told)


def check_same(senders: Told, receiver: Told) -> None:
    """Refuse sequences of which the two sides say other lengths, or another order.

    Raises:
        LayoutError: they do.
    """
    one, other = senders.lengths, receiver.lengths
    if one is not None and other is not None and one.real != other.real:
        raise LayoutError(
            f"$senders' sequences have the lengths {list(one.real)!s:.120}, "
            f"$receiver's {list(other.real)!s:.120}",
            "feed both the same input, in the same order",
        )


def check_sides(senders: Told, receiver: Told) -> None:
    """Refuse padding that stands on the left on one side, and not on the other's, as they say.

    Raises:
        LayoutError: it does.
    """
    sides = senders.side, receiver.side
    if sides[0] != sides[1] and "left" in sides:
        words = [
            f"{whose} padding stands on the {side}" if side else f"nobody says where {whose} stands"
            for whose, side in zip(("$senders'", "$receiver's"), sides, strict=True)
        ]
        raise LayoutError(
            " and ".join(words),
            "pad both alike, or say at both taps where it stands, as extras={'padding': 'left'}",
        )


def unbatched(
    senders: Told, sender_dims: Dims, receiver: Told, receiver_dims: Dims
) -> tuple[Dims, Dims]:
    """Return both layouts: sequences in a line are tokens where the other side has a batch."""
    lengths, dims = senders.lengths or receiver.lengths, (sender_dims, receiver_dims)
    is_line = [SEQUENCE in one.names and BATCH not in one.names for one in dims]
    if lengths is None or len(lengths.real) < 2 or is_line[0] == is_line[1]:
        return dims
    has_batch = {BATCH, SEQUENCE} <= {*dims[is_line[0]].names}
    return (dims[0].in_tokens(), dims[1].in_tokens()) if has_batch else dims


def lengths_of(
    senders: Told, sender_dims: Dims, receiver: Told, receiver_dims: Dims
) -> tuple[Lengths | None, Lengths | None]:
    """Return the lengths of sequences in flattened tokens; a side that gives none borrows them."""
    if TOKENS not in {*sender_dims.names, *receiver_dims.names}:
        return None, None
    one, other = senders.lengths, receiver.lengths
    return (
        _in_line(one or (other and other.lent(senders.side)), sender_dims),
        _in_line(other or (one and one.lent(receiver.side)), receiver_dims),
    )


def _in_line(lengths: Lengths | None, dims: Dims) -> Lengths | None:
    """Return lengths as they are for a side that calls its tokens `s`."""
    if lengths is None or not dims.is_line:
        return lengths
    (line,) = [dim for dim in dims.dims if TOKENS in dim.names]
    if len(lengths.real) > 1 and line.cuts and line.cuts[0].axis == SEQUENCES_OVER:
        raise LayoutError(
            f"dim s is cut over {SEQUENCES_OVER}, and the extras give {len(lengths.real)} "
            f"sequences, of which nobody says whether each is cut by itself",
            "call the dim t if each is",
        )
    if len(lengths.real) == 1:
        # However much padding there is, is its own, but for what stands behind a declared size.
        declared = dims.sizes.get(TOKENS, 0)
        lengths = lengths._replace(room=lengths.real, has_room=False, declared=declared)
    return lengths._replace(is_line=True)


def rows_of(
    senders: Told,
    sender_dims: Dims,
    sizes: Sequence[Sizes],
    receiver: Told,
    receiver_dims: Dims,
) -> Rows | None:
    """Return what is known of the sequences that both sides have in a batch, or without one.

    Their lengths are left out where they cannot be those of these rows: they may be all that a
    decode step attends to.

    Raises:
        LayoutError: padding stands on other sides, and nobody says how much there is.
    """
    both = sender_dims.names, receiver_dims.names
    if not all(SEQUENCE in names for names in both) or any(TOKENS in names for names in both):
        return None
    lengths = senders.lengths or receiver.lengths
    totals = _row_totals(sender_dims, sizes)
    is_full = False
    if lengths is not None and all(map(_has_rows, (sender_dims, receiver_dims))):
        if _fits(lengths.real, sender_dims, totals):
            return Rows(lengths.real, senders, receiver)
        is_full = sum(lengths.real) == math.prod(totals.values())  # a line of several
    if not is_full:
        check_sides(senders, receiver)
    return Rows((), senders, receiver) if "left" in (senders.side, receiver.side) else None


def _has_rows(dims: Dims) -> bool:
    """Whether batch and sequence stand for themselves, or are fused with each other alone."""
    of_rows = [dim.names for dim in dims.dims if {BATCH, SEQUENCE} & {*dim.names}]
    return sorted(name for names in of_rows for name in names) in ([BATCH, SEQUENCE], [SEQUENCE])


def _row_totals(dims: Dims, sizes: Sequence[Sizes]) -> dict[tuple[str, ...], int]:
    return {
        dim.names: size.total
        for dim, size in zip(dims.dims, sizes, strict=True)
        if {BATCH, SEQUENCE} & {*dim.names}
    }


def _fits(real: Sequence[int], dims: Dims, totals: Mapping[tuple[str, ...], int]) -> bool:
    """Whether lengths can be those of a side's rows, and not of other tokens."""
    batch = totals.get((BATCH,), 1 if BATCH not in dims.names else len(real))
    longest, rest = divmod(math.prod(totals.values()), max(1, len(real)))
    return 0 < len(real) == batch and not rest and max(real) <= longest
