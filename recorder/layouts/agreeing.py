"""What both sides say of the sequences in their tensors, held against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import LayoutError
from .align import BATCH, SEQUENCE
from .blocks import Block, Sizes
from .cutting import SEQUENCES_OVER
from .dims import TOKENS, Dims
from .lengths import Lengths, lengths_in, padding_side


def lengths_of(
    senders: Sequence[Block], sender_dims: Dims, receiver: Block, receiver_dims: Dims
) -> tuple[Lengths | None, Lengths | None]:
    """Return the sequences' lengths on either side; one that says nothing borrows the other's."""
    if TOKENS not in {*sender_dims.names, *receiver_dims.names}:
        return None, None
    sender_lengths, receiver_lengths = (
        given_by(senders, sender_dims),
        lengths_in(receiver.extras, receiver_dims),
    )
    if sender_lengths is not None and receiver_lengths is not None:
        _check_alike(sender_lengths, receiver_lengths)
    both = (
        sender_lengths or (receiver_lengths and receiver_lengths.lent()),
        receiver_lengths or (sender_lengths and sender_lengths.lent()),
    )
    return _in_line(both[0], sender_dims), _in_line(both[1], receiver_dims)


def _check_alike(senders: Lengths, receiver: Lengths) -> None:
    """Refuse sequences of which the two sides say other lengths."""
    if senders.real != receiver.real:
        raise LayoutError(
            f"$senders' sequences have the lengths {list(senders.real)!s:.120}, "
            f"$receiver's {list(receiver.real)!s:.120}",
            "feed both the same input, in the same order",
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
        lengths = lengths._replace(room=lengths.real)  # however much padding there is, is its own
    return lengths._replace(is_line=True)


def lengths_in_batch(
    senders: Sequence[Block], sender_dims: Dims, sizes: Sequence[Sizes], receiver: Block
) -> Lengths | None:
    """Return the lengths of the sequences in a batch that both sides have, where they are given.

    Of sequences whose lengths are not known, but the side that they are padded on, the side alone.

    Raises:
        LayoutError: the two sides contradict each other.
    """
    rows = [
        (dim.names, size.total)
        for dim, size in zip(sender_dims.dims, sizes, strict=True)
        if {BATCH, SEQUENCE} & {*dim.names}
    ]
    names = [name for names, _ in rows for name in names]
    if SEQUENCE not in receiver.dims.names or sorted(names) not in (
        [SEQUENCE], [BATCH, SEQUENCE],
    ):  # fmt: skip
        return None
    total = math.prod(size for _, size in rows)
    batch = next((size for names, size in rows if names == (BATCH,)), None)
    given = [given_by(senders, sender_dims), lengths_in(receiver.extras, receiver.dims)]
    of_senders, of_receiver = (
        _of_rows(one, total, batch if BATCH in names else 1) for one in given
    )
    if of_senders is not None and of_receiver is not None:
        _check_alike(of_senders, of_receiver)
    known = of_senders or of_receiver
    is_full = known is not None and sum(known.real) == total
    sides = [padding_side(block.extras) for block in (senders[0], receiver)]
    if sides[0] != sides[1] and "left" in sides and not is_full:
        words = [
            f"{whose} padding stands on the {side}" if side else f"nobody says where {whose} stands"
            for whose, side in zip(("$senders'", "$receiver's"), sides, strict=True)
        ]
        raise LayoutError(
            " and ".join(words),
            "pad both alike, or say at both taps that they are, as extras={'padding': 'left'}",
        )
    side = "left" if "left" in sides else ""
    return Lengths((), (), side) if known is None and side else known and known._replace(side=side)


def _of_rows(lengths: Lengths | None, total: int, batch: int | None) -> Lengths | None:
    """Return lengths if they can be those of a batch; None where they are of other tokens.

    Those may be all that a decode step attends to.
    """
    if lengths is None or not lengths.real or batch not in (None, len(lengths.real)):
        return None
    longest, rest = divmod(total, len(lengths.real))
    return lengths if not rest and max(lengths.real) <= longest else None


def given_by(senders: Sequence[Block], dims: Dims) -> Lengths | None:
    """Return the sequences' lengths as the senders say."""
    texts = {block.extras: block.rank for block in senders}
    given = {lengths_in(text, dims): rank for text, rank in texts.items()}
    given.pop(None, None)
    if len(given) > 1:
        (_, one), (_, other), *_ = given.items()
        raise LayoutError(
            f"${{rank}}s {one} and {other} give different sequence lengths in their extras",
            "give those of the whole on every rank",
        )
    return next(iter(given), None)
