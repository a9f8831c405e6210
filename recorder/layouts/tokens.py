"""Flattened tokens on one side, batch and sequence on the other: which index is which token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import BlocksMissing, LayoutError
from . import cutting
from . import runs as r
from .align import MEND, Pair
from .blocks import Sizes
from .dims import BATCH, SEQUENCE, TOKENS, Dims
from .groups import Grid, Line, Tokens
from .lengths import PADDED_BEHIND, Lengths, mask_apart
from .receiver import Found, Receiver

_MOST_SEQUENCES = 1 << 20


def flattened(
    pair: Pair,
    sender_dims: Dims,
    sizes: Sequence[Sizes],
    receiver: Receiver,
    lengths: Lengths | None,
) -> Tokens:
    """Return how both sides count tokens, where one has batch and sequence in their place.

    Args:
        pair: the dims, by position.
        sender_dims: the senders' layout.
        sizes: the sizes of their blocks along each of its dims.
        receiver: the receiver's block.
        lengths: of the sequences, as the senders say.

    Raises:
        LayoutError: the sizes contradict each other, or do not say enough.
    """
    flat = len(pair.senders) == 1 and sender_dims.dims[pair.senders[0]].names == (TOKENS,)
    dims, rows = (receiver.dims, pair.receivers) if flat else (sender_dims, pair.senders)
    order = tuple("*".join(dims.dims[j].names) for j in rows)
    if set(order) not in ({BATCH, SEQUENCE}, {f"{BATCH}*{SEQUENCE}"}):
        raise LayoutError(
            f"tokens (t) on one side are {' '.join(order)} on the other, which is neither b and s "
            f"nor (b*s)",
            MEND,
        )
    rows = tuple(sorted(rows, key=lambda j: dims.dims[j].names != (BATCH,)))
    order = tuple("*".join(dims.dims[j].names) for j in rows)  # batch first: rows follow then
    pair = Pair(pair.senders, rows) if flat else Pair(rows, pair.receivers)
    of_tokens = sizes[pair.senders[0]].lengths if flat else lengths
    notes: list[str] = []
    runs: list[r.Runs] = []
    if flat:
        held = [row_of(receiver, j, of_tokens, notes) for j in rows]
        totals, runs = [one.total for one in held], [one.runs for one in held]
        notes += [one.note for one in held if one.note]
    else:
        totals = [sizes[i].total for i in rows]
    for j, total in zip(rows, totals, strict=True):
        _check_no_padding(dims, j, total, of_tokens)
    if len(order) == 2:
        batch, size = (totals[order.index(name)] for name in (BATCH, SEQUENCE))
    else:
        batch = len(of_tokens.real) if of_tokens is not None else 1
        size = totals[0] // max(batch, 1)
    for i in pair.senders:
        known = {*sender_dims.dims[i].names} <= sender_dims.sizes.keys()
        names = sender_dims.dims[i].names
        told = [math.prod(sender_dims.sizes[name] for name in names)] if known else []
        if of_tokens is not None and names == (BATCH,):
            told.append(batch)
        elif of_tokens is not None and names == (TOKENS,) and not sizes[i].is_open:
            told.append(sum(of_tokens.room))  # there may be padding behind them, at the end
        if sizes[i].total not in told:
            check_all_there(sizes[i])
    if batch > _MOST_SEQUENCES:
        raise LayoutError(f"{batch} sequences are more than can be told apart", MEND)
    if batch * size != math.prod(totals):
        raise LayoutError(f"{totals[0]} of (b*s) do not make {batch} sequences of one length", MEND)
    tokens = sizes[pair.senders[0]].total if flat else receiver.whole(pair.receivers[0])
    if of_tokens is None:
        of_tokens = Lengths((size,) * batch, (size,) * batch)
        if tokens is not None and batch * size != tokens:
            raise LayoutError(
                f"one side has {tokens} tokens (t), and the other {batch} sequences of {size}",
                "give their lengths in the extras of a tap, as extras={'seq_lens': [...]}",
            )
    real = of_tokens.real
    if len(real) != batch or any(n > size for n in real):
        raise too_long(real, batch, size)
    if flat:
        total, of_line = sizes[pair.senders[0]].total, of_tokens
    else:
        tokens_held = indices_of(receiver, pair.receivers[0], sum(real), padded=True)
        notes += [tokens_held.note] * bool(tokens_held.note)
        total, runs = tokens_held.total, [tokens_held.runs]
        of_line = (receiver.lengths or of_tokens).fitted(total)
    notes.append(of_line.granted(total, "$senders'" if flat else "$receiver's"))
    line = Line(of_line.segments(total))
    own = receiver.lengths if flat else lengths
    is_left = own is not None and own.side == "left"
    room = dims.sizes.get(SEQUENCE, size) if len(order) == 2 else size
    room = min(room, size)
    if any(n > room for n in real):
        raise too_long(real, batch, room)
    if any(0 < n < room for n in real):
        if own is None or not own.side:
            notes.append(PADDED_BEHIND)
        elif is_left and own.width not in (0, room):
            raise mask_apart(own.width, room, "$receiver's" if flat else "$senders'")
    grid = Grid(len(order) == 1, real, size, room, is_left)
    said = "; ".join(dict.fromkeys(filter(None, notes)))
    return Tokens(pair, line, grid, runs, said) if flat else Tokens(pair, grid, line, runs, said)


def too_long(real: Sequence[int], batch: int, size: int) -> LayoutError:
    """Return the refusal of sequences that a side's rows have no room for."""
    return LayoutError(
        f"the sequences have the lengths {list(real)!s:.120}, and one side has {batch} of {size}",
        "give the lengths of this input in the extras",
    )


def _check_no_padding(dims: Dims, j: int, total: int, lengths: Lengths | None) -> None:
    """Refuse batch or sequence with padding that no lengths tell apart."""
    names = dims.dims[j].names
    if lengths is not None and names != (BATCH,):
        return
    if len(names) == 1 and (names[0] in dims.padded or dims.sizes.get(names[0], total) < total):
        raise padded_apart(names[0])


def row_of(receiver: Receiver, j: int, lengths: Lengths | None, notes: list[str]) -> Found:
    """Return the receiver's whole along a dim of batch or sequence, and what its block has of it.

    Adds to `notes` what was taken for granted.
    """
    dim, whole = receiver.dims.dims[j], receiver.whole(j)
    if whole is not None:
        return indices_of(receiver, j, whole)
    name = dim.names[0] if len(dim.names) == 1 else ""
    if name in receiver.dims.sizes:
        return indices_of(receiver, j, receiver.dims.sizes[name], padded=name == SEQUENCE)
    if lengths is not None and name == BATCH:
        return indices_of(receiver, j, len(lengths.real))
    masked = masked_row(receiver, j, receiver.lengths)
    if masked is not None:
        return masked
    even, longest = receiver.even(j), max(lengths.real, default=0) if lengths is not None else 0
    if not name and lengths is not None:
        batch = len(lengths.real)
        longest = batch * longest if batch and even % batch == 0 else even + 1
    own = receiver.lengths is not None and not receiver.lengths.is_borrowed
    is_known = (
        lengths is not None
        and even >= longest
        and receiver.is_even(j)
        and not any(cut.rule for cut in receiver.cuts(j))  # which only what is uneven needs
    )
    if not is_known or (receiver.is_last(j) and not own):
        return indices_of(receiver, j, whole_of(receiver, j))
    notes.append(f"{dim.label} was taken to have {even} in all, as blocks of one size make it")
    return indices_of(receiver, j, even)


def masked_row(receiver: Receiver, j: int, lengths: Lengths | None) -> Found | None:
    """Return the receiver's whole along a dim with sequences, where its mask tells; else None."""
    names = receiver.dims.dims[j].names
    if lengths is None or not lengths.width or SEQUENCE not in names:
        return None
    return receiver.indices(j, lengths.width * (len(lengths.real) if BATCH in names else 1))


def whole_of(receiver: Receiver, j: int) -> int:
    """Return the size of the receiver's whole along a dim that the senders do not have."""
    dim = receiver.dims.dims[j]
    whole = receiver.whole(j)
    if whole is None and len(dim.names) == 1:
        whole = receiver.dims.sizes.get(dim.names[0])
    if whole is None:
        raise LayoutError(
            f"dim {dim}: $receiver's block has {receiver.shape[j]}, which does not tell how many "
            f"there are in all",
            f"declare it at $receiver's tap, as in '# {dim.label}=SIZE'",
        )
    return whole


def left_open(receiver: Receiver, j: int) -> LayoutError:
    """Return the refusal of padding on the left of a dim whose size is not known."""
    dim = receiver.dims.dims[j]
    return LayoutError(
        f"dim {dim}: $receiver's block has {receiver.shape[j]}, which does not tell how many there "
        "are in all, and its padding stands on the left",
        f"declare it at $receiver's tap, as in '# {dim.label}=SIZE'",
    )


def indices_of(
    receiver: Receiver,
    j: int,
    size: int,
    padded: bool = False,
    others: Sequence[int] = (),
    *,
    is_left: bool = False,
) -> Found:
    """Return the receiver's whole along a dim of known size, and which indices its block has."""
    found = receiver.indices(j, size, padded, others, is_left=is_left)
    if found is None:
        dim, shared = receiver.dims.dims[j], receiver.shared(j, size)
        raise LayoutError(
            f"dim {dim}: {size} in all have no block of {receiver.shape[j]} there",
            MEND
            if shared is None
            else f"if {shared.share} ranks hold the same, write "
            f"{cutting.shared(dim, receiver.cuts(j), shared.share, size, receiver.shape[j])} at "
            f"$receiver's tap, else {MEND}",
        )
    return found


def check_all_there(senders: Sizes) -> None:
    """Refuse a dim whose size hangs on a block that nobody recorded.

    Raises:
        BlocksMissing: it does.
    """
    if senders.is_open or senders.ends_open:
        raise blocks_missing(senders, "what is fused or flattened")


def blocks_missing(senders: Sizes, what: str) -> BlocksMissing:
    """Return the refusal of a dim of whose blocks some were not recorded."""
    return BlocksMissing(
        f"dim {senders.dim}: not all of its blocks were recorded, so that nobody knows where the "
        f"others begin, and {what} does not tell",
        f"record all ranks, or declare the size in all, as in '# {senders.dim.label}=SIZE'",
    )


def padded_apart(name: str) -> LayoutError:
    """Return the refusal of padding that the other side cannot have at the same place."""
    return LayoutError(f"dim {name} is padded, and fused or taken apart on one side", MEND)
