"""Which of the senders had the receiver's data: by their places on axes such as `dp`.

Ranks along such an axis hold other data, unless a tap says that they are replicas. A rank that had
none, such as one of a server that was given no tokens, has an empty block and takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..errors import LayoutError
from ..mesh import PIPELINE
from .blocks import Block
from .cutting import Places
from .dims import BATCH, TOKENS, Dims


def of_same_data(
    senders: Sequence[Block],
    sender_dims: Dims,
    receiver_dims: Dims,
    at: Mapping[int, Places],
    here: Places,
) -> tuple[list[Block], list[str]]:
    """Return the senders that had the receiver's data, and what was taken for granted.

    Raises:
        LayoutError: nobody there recorded it, or nobody says who had it.
    """
    kept, notes = list(senders), []
    cut = {*sender_dims.axes, *receiver_dims.axes}
    for axis in sorted(receiver_dims.data - cut - sender_dims.replicated):
        k, n = here.get(axis, (0, 1))
        places = {at[block.rank].get(axis, (0, 1)) for block in kept}
        if n == 1:
            continue
        if {size for _, size in places} == {n}:
            if axis not in sender_dims.data:
                continue
            same = [block for block in kept if at[block.rank][axis][0] == k]
            if not same and axis != PIPELINE:
                raise LayoutError(
                    f"no $sender at {axis}={k} recorded it, and those elsewhere on {axis} have "
                    f"other data",
                    f"record them, or declare '# {axis}:replicated' if they have not",
                )
            kept = same or kept  # a stage of the pipeline has what no other has
        elif len(places) == 1 and axis != PIPELINE:
            ((there, size),) = places
            told = (
                f"{axis} has size {size} at the senders and {n} at the target, and its ranks hold "
                "other data"
            )
            if there != k and _has_data(sender_dims, receiver_dims):
                raise LayoutError(
                    f"{told}: nobody sent for {axis}={k}",
                    f"declare '# {axis}:replicated' at a tap if they hold the same, or nothing; "
                    f"else run both with one size of {axis}",
                )
            notes.append(f"{told}: what {axis}={there} sent was taken to be this rank's")
    return busy(kept, sender_dims, at), notes


def _has_data(*layouts: Dims) -> bool:
    """Whether a tensor has a dim of batch or of tokens: weights, which have none, are replicas."""
    return any({BATCH, TOKENS} & {*dims.names} for dims in layouts)


def busy(blocks: list[Block], dims: Dims, at: Mapping[int, Places]) -> list[Block]:
    """Leave out ranks that had no data of their own, where others had some."""
    axes = sorted(dims.data - {*dims.axes})
    groups: dict[tuple[int, ...], list[Block]] = {}
    for block in blocks:
        place = tuple(at[block.rank].get(axis, (0, 1))[0] for axis in axes)
        groups.setdefault(place, []).append(block)
    some = [b for group in groups.values() if any(map(_elements, group)) for b in group]
    return some if len(groups) > 1 and some else blocks


def _elements(block: Block) -> int:
    return math.prod(block.shape)
