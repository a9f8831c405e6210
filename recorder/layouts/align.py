"""Which dims of two layouts belong together: those that share names.

That is one dim with one, a fused dim with those it is made of, flattened tokens with batch and
sequence. A dim of size 1 may be absent on either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LayoutError
from .dims import TOKENS, Dims

BATCH, SEQUENCE = "b", "s"
MEND = "mend the dims at one of the taps, or name a transform with --transform"


@dataclass(frozen=True)
class Pair:
    """Dims of both sides, by position, that count the same indices."""

    senders: tuple[int, ...]
    receivers: tuple[int, ...]


def align(ours: Dims, sizes: Sequence[int], theirs: Dims, wholes: Sequence[int]) -> list[Pair]:
    """Pair the senders' dims with the receiver's, in the receiver's order.

    Args:
        ours: the senders' layout.
        sizes: the size of the whole along each of its dims.
        theirs: the receiver's layout.
        wholes: the least size of the whole along each of its dims.

    Raises:
        LayoutError: a dim of more than one element that only one side has.
    """
    tokens = _flattens(ours, theirs)
    of_name: dict[str, int] = {}
    groups: list[tuple[list[int], list[int]]] = []
    for side, dims in enumerate((ours, theirs)):
        for i, dim in enumerate(dims.dims):
            names = [TOKENS if tokens and name in (BATCH, SEQUENCE) else name for name in dim.names]
            if not names:
                continue
            known = sorted({of_name[name] for name in names if name in of_name})
            into = known[0] if known else len(groups)
            if not known:
                groups.append(([], []))
            for other in known[1:]:
                for mine, its in zip(groups[into], groups[other], strict=True):
                    mine += its
                    its.clear()
            groups[into][side].append(i)
            for name, number in list(of_name.items()):
                if number in known:
                    of_name[name] = into
            of_name.update(dict.fromkeys(names, into))
    found = []
    for mine, its in groups:
        if mine and its:
            found.append(Pair(tuple(sorted(mine)), tuple(sorted(its))))
            continue
        for i in mine:
            if sizes[i] != 1:
                raise _only("sender", ours, i, sizes[i], "target", theirs)
        for i in its:
            if wholes[i] != 1:
                raise _only("target", theirs, i, wholes[i], "sender", ours)
    return sorted(found, key=lambda pair: pair.receivers[0])


def _flattens(ours: Dims, theirs: Dims) -> bool:
    """Whether one side has tokens where the other has batch and sequence."""
    one, other = set(ours.names), set(theirs.names)
    return any(
        TOKENS in a and TOKENS not in b and {BATCH, SEQUENCE} <= b and not {BATCH, SEQUENCE} & a
        for a, b in ((one, other), (other, one))
    )


def _only(side: str, dims: Dims, i: int, size: int, other: str, others: Dims) -> LayoutError:
    dim = dims.dims[i]
    return LayoutError(
        f"dim {dim.label} is only in the {side}'s dims {dims.text!r:.200}, of size {size}, and the "
        f"{other}'s are {others.text!r:.200}; {MEND}"
    )
