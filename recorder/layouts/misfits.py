"""The messages of sizes that contradict each other, each with what may be the reason."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import LayoutError
from . import cutting
from .align import MEND
from .blocks import Sizes
from .dims import Dim
from .receiver import Receiver

_ALIKE = "record on as many ranks, cut alike, and feed both the same input"


def too_few(dim: Dim, have: int, size: int, whose: str) -> LayoutError:
    """Return the refusal of senders that have fewer than there are."""
    return LayoutError(
        f"dim {dim.label}: $senders have {have} in all, fewer than the {size} {whose}", MEND
    )


def no_block(j: int, senders: Sizes, size: int, receiver: Receiver) -> LayoutError:
    """Say that no whole of the senders' size has such a block, and what may be the reason."""
    have, dim, cuts = senders.total, receiver.dims.dims[j], receiver.cuts(j)
    cut = "".join(f", one of {receiver.places[c.axis][1]} over {c.axis}" for c in dim.cuts)
    more = f" ({size} without padding)" if size != have else ""
    fact = (
        f"dim {dim.label}: $senders have {have} in all{more}, and $receiver's block has "
        f"{receiver.shape[j]}{cut}"
    )
    name = dim.label if len(dim.names) == 1 else "DIM"
    padded = f"if one is padded, declare the size without that, as in '# {name}=SIZE'"
    real, shared = receiver.even(j), receiver.shared(j, size)
    if shared is not None:
        written = cutting.shared(dim, cuts, shared.share, size, receiver.shape[j])
        advice = [f"if {shared.share} ranks hold the same, write {written} at $receiver's tap"]
    elif senders.shared(real):
        return LayoutError(fact, if_shared([senders], real))
    elif not cuts and size > receiver.shape[j] > 0 and size % receiver.shape[j] == 0:
        part = f"if {size // receiver.shape[j]} ranks hold a part each, write {dim.label}[tp]"
        advice = [f"{part} at $receiver's tap", padded]
    elif not senders.cuts and real > have > 0 and real % have == 0:
        part = f"if {real // have} ranks hold a part each, write {dim.label}[tp]"
        advice = [f"{part} where they are recorded", padded]
    elif _is_uneven(receiver, j, size):
        return uneven(j, senders, receiver)
    else:
        advice = [padded]
    if _is_uneven(receiver, j, size):
        advice.append(f"if its blocks are of unequal sizes, as data have it, {_ALIKE}")
    return LayoutError(fact, f"{'; '.join(advice)}; else {MEND}")


def _is_uneven(receiver: Receiver, j: int, size: int) -> bool:
    return bool(receiver.cuts(j)) and receiver.whole(j) is None and receiver.even(j) != size


def uneven(j: int, senders: Sizes, receiver: Receiver) -> LayoutError:
    """Say that a block cannot be placed, since others are of sizes that nobody knows here."""
    dim, cuts = receiver.dims.dims[j], receiver.cuts(j)
    over = "".join(f", one of {receiver.places[c.axis][1]} over {c.axis}" for c in dim.cuts)
    there = ""
    if senders.cuts_as(cuts, receiver.places):
        size = senders.at(senders.key(receiver.places))
        there = f", where the $sender at its place has {size}" if size is not None else ""
    name = dim.label if len(dim.names) == 1 else "DIM"
    by_rule = cutting.declared(dim, cuts, ["chunk"] * len(cuts))
    return LayoutError(
        f"dim {dim.label}: $senders have {senders.total} in all, and $receiver's block has "
        f"{receiver.shape[j]}{over}{there}: its blocks are of unequal sizes",
        f"if they are as large as data have it, such as the tokens of each expert, {_ALIKE}; if a "
        f"rule cuts them, declare it at $receiver's tap, as in {by_rule}; if one side is padded, "
        f"declare the size without that, as in '# {name}=SIZE'",
    )


def if_shared(senders: Sequence[Sizes], real: int) -> str:
    """Return what to do where the senders have more than there is: blocks may be shared."""
    (first, *others) = senders
    copies = 0 if others else first.shared(real)
    if not copies:
        return MEND
    return (
        f"if {copies} ranks of $senders hold the same, write "
        f"{cutting.shared(first.dim, first.cuts, copies, real, first.block)} where they are "
        f"recorded, else {MEND}"
    )
