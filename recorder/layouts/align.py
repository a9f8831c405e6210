"""Which dims of two layouts belong together: those that share names.

That is one dim with one, a fused dim with those it is made of, flattened tokens with batch and
sequence. A dim of size 1 may be absent on either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LayoutError
from .dims import BATCH, SEQUENCE, TOKENS, Dims

MEND = "mend the dims at one of the taps"


@dataclass(frozen=True)
class Pair:
    """Dims of both sides, by position, that count the same indices."""

    senders: tuple[int, ...]
    receivers: tuple[int, ...]


def align(
    sender_dims: Dims, sizes: Sequence[int], receiver_dims: Dims, wholes: Sequence[int]
) -> list[Pair]:
    """Pair the senders' dims with the receiver's, in the receiver's order.

    Args:
        sender_dims: the senders' layout.
        sizes: the size of the whole along each of its dims.
        receiver_dims: the receiver's layout.
        wholes: the least size of the whole along each of its dims.

    Raises:
        LayoutError: a dim of more than one element that only one side has.
    """
    tokens = _flattens(sender_dims, receiver_dims)
    of_name: dict[str, int] = {}
    groups: list[tuple[list[int], list[int]]] = []
    for side, dims in enumerate((sender_dims, receiver_dims)):
        for i, dim in enumerate(dims.dims):
            names = [TOKENS if tokens and name in (BATCH, SEQUENCE) else name for name in dim.names]
            if not names:
                continue
            known = sorted({of_name[name] for name in names if name in of_name})
            into = known[0] if known else len(groups)
            if not known:
                groups.append(([], []))
            for other in known[1:]:
                for kept, joining in zip(groups[into], groups[other], strict=True):
                    kept += joining
                    joining.clear()
            groups[into][side].append(i)
            for name, number in list(of_name.items()):
                if number in known:
                    of_name[name] = into
            of_name.update(dict.fromkeys(names, into))
    found = []
    for senders, receivers in groups:
        if senders and receivers:
            found.append(Pair(tuple(sorted(senders)), tuple(sorted(receivers))))
            continue
        for i in senders:
            if sizes[i] != 1:
                raise _only("the $sender's", sender_dims, i, sizes[i], "$receiver's", receiver_dims)
        for i in receivers:
            if wholes[i] != 1:
                raise _only(
                    "$receiver's", receiver_dims, i, wholes[i], "the $sender's", sender_dims
                )
    return sorted(found, key=lambda pair: pair.receivers[0])


def _flattens(sender_dims: Dims, receiver_dims: Dims) -> bool:
    """Whether one side has tokens where the other has batch and sequence."""
    one, other = set(sender_dims.names), set(receiver_dims.names)
    return any(
        TOKENS in a and TOKENS not in b and {BATCH, SEQUENCE} <= b and not {BATCH, SEQUENCE} & a
        for a, b in ((one, other), (other, one))
    )


def _only(side: str, dims: Dims, i: int, size: int, other: str, others: Dims) -> LayoutError:
    dim = dims.dims[i]
    return LayoutError(
        f"dim {dim.label} is only in {side} dims {dims.text!r:.200}, of size {size}, and {other} "
        f"are {others.text!r:.200}",
        MEND,
    )
