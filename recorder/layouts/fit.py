"""Compare the sizes of a pair of dims: what counts their indices, or why nothing can.

`group_of` makes the `Group` that a pair needs; where the sizes contradict each other, the message
names the dim and both sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from ..errors import BlocksMissing, LayoutError
from . import runs as r
from .align import BATCH, MEND, SEQUENCE, Pair
from .blocks import Receiver, Sizes
from .dims import TOKENS, Dim, Dims
from .groups import Flattened, Fused, Group, Same, Sized
from .lengths import Lengths

_MOST_SEQUENCES = 1 << 20


def group_of(
    pair: Pair,
    sender_dims: Dims,
    sizes: Sequence[Sizes],
    receiver: Receiver,
    lengths: Lengths | None,
) -> Group:
    """Return how both sides count the indices of a pair of dims.

    Args:
        pair: the dims, by position.
        sender_dims: the senders' layout.
        sizes: the sizes of their blocks along each of its dims.
        receiver: the receiver's block.
        lengths: of the sequences in flattened tokens, as the senders say.

    Raises:
        LayoutError: the sizes contradict each other, or do not say enough.
    """
    receiver_dims = receiver.dims
    sender_names = [sender_dims.dims[i].names for i in pair.senders]
    receiver_names = [receiver_dims.dims[j].names for j in pair.receivers]
    if len(sender_names) == len(receiver_names) == 1 and sender_names == receiver_names:
        return _same(pair, sender_dims, sizes[pair.senders[0]], receiver)
    names = {name for dim in (*sender_names, *receiver_names) for name in dim}
    padded = names & (sender_dims.padded | receiver_dims.padded)
    for i in pair.senders:
        declared = _declared_size(sender_dims.dims[i], {**receiver_dims.sizes, **sender_dims.sizes})
        if declared is not None and declared < sizes[i].total:
            padded |= set(sender_dims.dims[i].names)
    for j in pair.receivers:
        declared = _declared_size(
            receiver_dims.dims[j], {**sender_dims.sizes, **receiver_dims.sizes}
        )
        if declared is not None and declared < (receiver.whole(j) or 0):
            padded |= set(receiver_dims.dims[j].names)
    if padded:
        raise LayoutError(
            f"dim {min(padded)} is padded, and fused or taken apart on one side", MEND
        )
    if [(TOKENS,)] in (sender_names, receiver_names) and names != {TOKENS}:
        return _flattened(pair, sender_dims, sizes, receiver, lengths)
    return _fused(pair, sender_dims, sizes, receiver)


def _declared_size(dim: Dim, declared: Mapping[str, int]) -> int | None:
    """Return the size that a dim was declared to have without padding, if it was."""
    if not all(name in declared for name in dim.names):
        return None
    return math.prod(declared[name] for name in dim.names)


def _same(pair: Pair, sender_dims: Dims, senders: Sizes, receiver: Receiver) -> Same:
    (j,) = pair.receivers
    dim, have, receiver_dims = receiver.dims.dims[j], senders.total, receiver.dims
    name = dim.names[0] if len(dim.names) == 1 else ""
    both = sender_dims.sizes.get(name), receiver_dims.sizes.get(name)
    if None not in both and both[0] != both[1]:
        raise LayoutError(
            f"dim {name} is declared to have {both[0]} without padding by $senders and "
            f"{both[1]} by $receiver",
            MEND,
        )
    declared = both[0] if both[0] is not None else both[1]
    _check_certain(senders, j, declared, receiver)
    if declared is None and senders.lengths is not None:
        declared = sum(senders.lengths.real)
    padded = declared is not None or name in receiver_dims.padded
    if declared is not None:
        size = declared
    elif name in sender_dims.padded:
        size = _without_padding(name, have, j, receiver)
    else:
        size = have
    if have < size:
        raise LayoutError(
            f"dim {dim.label}: $senders have {have} in all, fewer than the {size} "
            f"{'declared' if declared is not None else 'of $receiver'}",
            MEND,
        )
    found = receiver.indices(j, size, padded)
    if found is None:
        cut = "".join(f", one of {receiver.places[c.axis][1]} over {c.axis}" for c in dim.cuts)
        more = f" ({size} without padding)" if size != have else ""
        raise LayoutError(
            f"dim {dim.label}: $senders have {have} in all{more}, and $receiver's block has "
            f"{receiver.shape[j]}{cut}",
            f"declare padding with '# {name or 'DIM'}=SIZE', or {MEND}",
        )
    total, runs = found
    receiver_lengths = None
    if senders.lengths is not None and receiver.lengths is not None:
        receiver_lengths = receiver.lengths.fitted(total)
    return Same(
        pair,
        _segments(have, size, senders.lengths),
        r.located(runs, _segments(total, size, receiver_lengths)),
    )


def _check_certain(senders: Sizes, j: int, declared: int | None, receiver: Receiver) -> None:
    """Refuse sizes that hang on a block nobody recorded, unless the other side bears them out."""
    borne_out = [declared, receiver.whole(j)]
    if not senders.is_open:
        # The sum may be too large by less than a block; the receiver's blocks are the same then.
        borne_out.append(receiver.even(j))
    if not (senders.is_open or senders.ends_open) or senders.total in borne_out:
        return
    raise BlocksMissing(
        f"dim {senders.dim}: not all of its blocks were recorded, so that nobody knows where the "
        f"others begin, and $receiver's block of {receiver.shape[j]} does not tell",
        f"record all ranks, or declare the size in all, as in '# {senders.dim.label}=SIZE'",
    )


def _without_padding(name: str, have: int, j: int, receiver: Receiver) -> int:
    """Return the size of a dim that the senders pad, as far as the receiver's block tells it."""
    if name in receiver.dims.padded:
        if receiver.even(j) == have:
            return have  # padded alike
    elif receiver.whole(j) is not None:
        return receiver.whole(j) or 0
    raise LayoutError(
        f"dim {name} is padded by $senders, to {have}, and $receiver's block does not tell how "
        "much of it is padding",
        f"declare its size without padding at either tap, as in '# {name}=SIZE'",
    )


def _segments(total: int, size: int, lengths: Lengths | None) -> list[tuple[int, int, int]]:
    """Return which of `total` indices are among the `size` that are no padding."""
    if lengths is not None:
        return lengths.segments(total)
    found = [(0, min(size, total), 0), (size, total - size, r.PADDING)]
    return [segment for segment in found if segment[1] > 0]


def _flattened(
    pair: Pair,
    sender_dims: Dims,
    sizes: Sequence[Sizes],
    receiver: Receiver,
    lengths: Lengths | None,
) -> Flattened:
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
    totals = [_whole(receiver, j) if flat else sizes[j].total for j in rows]
    of_tokens = sizes[pair.senders[0]].lengths if flat else lengths
    if len(order) == 2:
        batch, size = (totals[order.index(name)] for name in (BATCH, SEQUENCE))
    else:
        batch = len(of_tokens.real) if of_tokens is not None else 1
        size = totals[0] // max(batch, 1)
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
        raise LayoutError(
            f"the sequences have the lengths {list(real)!s:.120}, and one side has {batch} of "
            f"{size}",
            "give the lengths of this input in the extras",
        )
    if flat:
        segments = of_tokens.segments(sizes[pair.senders[0]].total)
        runs = [
            _indices(receiver, j, total) for j, total in zip(pair.receivers, totals, strict=True)
        ]
    else:
        total, found = _tokens(receiver, pair.receivers[0], sum(real))
        segments = (receiver.lengths or of_tokens).fitted(total).segments(total)
        runs = [found]
    starts = [0, *itertools.accumulate(real)][:batch]
    return Flattened(pair, flat, segments, len(order) == 1, starts, real, size, runs)


def _whole(receiver: Receiver, j: int) -> int:
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


def _tokens(receiver: Receiver, j: int, size: int) -> tuple[int, r.Runs]:
    """Return how many flattened tokens the receiver has in all, and which its block holds."""
    found = receiver.indices(j, size, padded=True)
    if found is None:
        raise LayoutError(
            f"dim {receiver.dims.dims[j]}: $senders have {size} tokens, and $receiver's block "
            f"{receiver.shape[j]}",
            MEND,
        )
    return found


def _indices(receiver: Receiver, j: int, total: int) -> r.Runs:
    """Return the receiver's indices along a dim whose whole is known."""
    found = receiver.indices(j, total)
    if found is None:
        raise LayoutError(
            f"dim {receiver.dims.dims[j]}: {total} in all have no block of {receiver.shape[j]} "
            f"there",
            MEND,
        )
    return found[1]


def _fused(pair: Pair, sender_dims: Dims, sizes: Sequence[Sizes], receiver: Receiver) -> Fused:
    sender_sized = [(sender_dims.dims[i], sizes[i].total) for i in pair.senders]
    have = math.prod(total for _, total in sender_sized)
    in_order = [name for dim, _ in sender_sized for name in dim.names]
    places = {name: i for i, name in enumerate(in_order)}
    receivers = sorted(
        pair.receivers,
        key=lambda j: min(places.get(name, -1) for name in receiver.dims.dims[j].names),
    )
    pair = Pair(pair.senders, tuple(receivers))
    declared = {**receiver.dims.sizes, **sender_dims.sizes}
    declared |= {dim.names[0]: size for dim, size in sender_sized if len(dim.names) == 1}
    totals = {j: _known(receiver, j, declared) for j in pair.receivers}
    unknown = [j for j, total in totals.items() if total is None]
    rest = math.prod(total for total in totals.values() if total is not None)
    if len(unknown) == 1 and rest and have % rest == 0:
        totals[unknown[0]] = have // rest  # it has what the others leave
    elif unknown:
        _whole(receiver, unknown[0])
    receiver_sized = [(receiver.dims.dims[j], total or 0) for j, total in totals.items()]
    if math.prod(total for _, total in receiver_sized) != have:
        raise LayoutError(
            f"dims {_labels(sender_sized)}: $senders have {have} in all, $receiver's "
            f"{_labels(receiver_sized)} {' x '.join(str(total) for _, total in receiver_sized)}",
            MEND,
        )
    names, receiver_order = _names(sender_sized), _names(receiver_sized)
    known: dict[str, int] | None = _sizes_of_names(declared, sender_sized, receiver_sized)
    if names == receiver_order:
        known = None
    else:
        _check_all_known(known or {}, sender_sized, receiver_sized)
        names = (*names, *(name for name in receiver_order if name not in names))
    runs = [_indices(receiver, j, total or 0) for j, total in totals.items()]
    return Fused(pair, names, known, sender_sized, receiver_sized, runs)


def _known(receiver: Receiver, j: int, declared: Mapping[str, int]) -> int | None:
    """Return the size of the receiver's whole along a dim, where it is known."""
    whole = receiver.whole(j)
    if whole is None and all(name in declared for name in receiver.dims.dims[j].names):
        whole = math.prod(declared[name] for name in receiver.dims.dims[j].names)
    return whole


def _names(dims: Sequence[Sized]) -> tuple[str, ...]:
    return tuple(name for dim, _ in dims for name in dim.names)


def _labels(dims: Sequence[Sized]) -> str:
    return " ".join(dim.label for dim, _ in dims)


def _sizes_of_names(
    declared: Mapping[str, int], senders: Sequence[Sized], receivers: Sequence[Sized]
) -> dict[str, int]:
    """Return the size of each name as far as it is known, all of it held together."""
    known = dict(declared)
    both = sorted([*senders, *receivers], key=lambda one: len(one[0].names))
    for dim, size in [*both, *both]:  # what the second time around is new, the first made known
        unknown = [name for name in dim.names if name not in known]
        rest = math.prod(known.get(name, 1) for name in dim.names)
        if len(unknown) == 1 and rest and size % rest == 0:
            known[unknown[0]] = size // rest
        elif len(unknown) == 1 or (not unknown and rest != size):
            parts = " x ".join(str(known.get(name, name)) for name in dim.names)
            raise LayoutError(f"dim {dim.label} has {size}, and its parts {parts}", MEND)
    return known


def _check_all_known(
    known: Mapping[str, int], senders: Sequence[Sized], receivers: Sequence[Sized]
) -> None:
    """Refuse dims in another order whose sizes are not all known."""
    for name in sorted({*_names(senders), *_names(receivers)}):
        if name not in known:
            raise LayoutError(
                f"{_labels(senders)} and {_labels(receivers)} are in another order, and the size "
                f"of {name} is not known",
                f"declare it at either tap, as in '# {name}=SIZE'",
            )
        if known[name] != 1 and not (name in _names(senders) and name in _names(receivers)):
            raise LayoutError(
                f"dim {name} of size {known[name]} is only on one side of {_labels(senders)} and "
                f"{_labels(receivers)}",
                MEND,
            )
