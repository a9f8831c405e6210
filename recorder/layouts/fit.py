"""Compare the sizes of a pair of dims: what counts their indices, or why nothing can.

`group_of` makes the `Group` that a pair needs; where the sizes contradict each other, the message
names the dim and both sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import LayoutError
from . import runs as r
from .agreeing import Rows
from .align import MEND, Pair
from .blocks import Sizes
from .dims import BATCH, SEQUENCE, TOKENS, Dims
from .groups import Fused, Group, Same, Sized
from .lengths import Lengths
from .misfits import if_shared, no_block, too_few, uneven
from .receiver import Found, Receiver
from .tokens import (
    blocks_missing,
    check_all_there,
    flattened,
    indices_of,
    left_open,
    padded_apart,
    whole_of,
)

EXPERTS = "ep"
"""The axis over which ranks hold experts, whose tokens are as many as data have it."""


def group_of(
    pair: Pair,
    sender_dims: Dims,
    sizes: Sequence[Sizes],
    receiver: Receiver,
    lengths: Lengths | None,
    rows: Rows | None,
) -> Group:
    """Return how both sides count the indices of a pair of dims.

    Args:
        pair: the dims, by position.
        sender_dims: the senders' layout.
        sizes: the sizes of their blocks along each of its dims.
        receiver: the receiver's block.
        lengths: of the sequences in flattened tokens, as the senders say.
        rows: of the sequences in a batch that both sides have.

    Raises:
        LayoutError: the sizes contradict each other, or do not say enough.
    """
    receiver_dims = receiver.dims
    for name in sorted(sender_dims.sizes.keys() & receiver_dims.sizes.keys()):
        if sender_dims.sizes[name] != receiver_dims.sizes[name]:
            raise LayoutError(
                f"dim {name} is declared to have {sender_dims.sizes[name]} without padding by "
                f"$senders and {receiver_dims.sizes[name]} by $receiver",
                MEND,
            )
    sender_names = [sender_dims.dims[i].names for i in pair.senders]
    receiver_names = [receiver_dims.dims[j].names for j in pair.receivers]
    if len(sender_names) == len(receiver_names) == 1 and sender_names == receiver_names:
        return _same(pair, sender_dims, sizes[pair.senders[0]], receiver, rows)
    names = {name for dim in (*sender_names, *receiver_names) for name in dim}
    if [(TOKENS,)] in (sender_names, receiver_names) and names != {TOKENS}:
        return flattened(pair, sender_dims, sizes, receiver, lengths)
    return _fused(pair, sender_dims, sizes, receiver, rows)


def _same(
    pair: Pair, sender_dims: Dims, senders: Sizes, receiver: Receiver, rows: Rows | None
) -> Same:
    (j,) = pair.receivers
    size, found = along(sender_dims, senders, receiver, j, rows)
    have, total = senders.total, found.total
    notes = [found.note]
    receiver_lengths = None
    if senders.lengths is not None and receiver.lengths is not None:
        receiver_lengths = receiver.lengths.fitted(total)
    for lengths, n, whose in (
        (senders.lengths, have, "$senders'"), (receiver_lengths, total, "$receiver's")
    ):  # fmt: skip
        notes.append(lengths.granted(n, whose) if lengths is not None else "")
    notes.append(_granted(receiver, j, total))
    return Same(
        pair,
        _segments(have, size, senders.lengths),
        r.located(found.runs, _segments(total, size, receiver_lengths)),
        "; ".join(dict.fromkeys(filter(None, notes))),
    )


def _granted(receiver: Receiver, j: int, total: int) -> str:
    """Return that the room of one sequence without a batch is not known, if so.

    Raises:
        LayoutError: where its tokens stand hangs on it.
    """
    lengths, dim = receiver.lengths, receiver.dims.dims[j]
    if lengths is None or not lengths.is_line or len(lengths.real) > 1 or lengths.declared:
        return ""
    is_even = total == receiver.even(j) and receiver.is_even(j)
    is_ruled = any(cut.rule for cut in receiver.cuts(j))
    if receiver.whole(j) is not None or lengths.width == total or (is_even and not is_ruled):
        return ""
    if lengths.side == "left" and not is_even:
        raise left_open(receiver, j)
    return f"{dim.label} was taken to have {total} in all"


def along(
    sender_dims: Dims, senders: Sizes, receiver: Receiver, j: int, rows: Rows | None
) -> tuple[int, Found]:
    """Return the size of a dim that both sides have, and what the receiver's block has of it.

    Args:
        sender_dims: the senders' layout.
        senders: the sizes of their blocks along the dim.
        receiver: the receiver's block.
        j: its dim.
        rows: of the sequences in a batch that both sides have.

    Returns:
        The size without padding, and the receiver's whole.

    Raises:
        LayoutError: the sizes contradict each other, or do not say enough.
    """
    dim, have, receiver_dims = receiver.dims.dims[j], senders.total, receiver.dims
    name = dim.names[0] if len(dim.names) == 1 else ""
    declared = {**receiver_dims.sizes, **sender_dims.sizes}.get(name)
    _check_certain(senders, j, declared, receiver)
    if senders.lengths is not None:
        declared = sum(senders.lengths.real)
    padded = declared is not None or name in receiver_dims.padded
    if declared is not None:
        size = declared
    elif name in sender_dims.padded:
        size = _without_padding(name, have, j, receiver)
    else:
        size = have
    if have < size:
        raise too_few(dim, have, size, "declared" if declared is not None else "of $receiver")
    alike = _cut_alike(senders, receiver, j) if size == have else None
    if alike is not None:
        note = f"dim {dim} has blocks of unequal sizes: taken rank by rank"
        return size, Found(have, alike, note)
    others = other_sizes(receiver, j, size, rows) if declared is None else ()
    is_left = rows is not None and rows.is_left and bool(others)
    # Where a sender at a place cut alike has nothing, none share a block.
    may_share = not (senders.has_empty and senders.cuts_as(receiver.cuts(j), receiver.places))
    found = receiver.indices(j, size, padded, others, is_left=is_left, may_share=may_share)
    if found is None:
        raise no_block(j, senders, size, receiver)
    if size == have and _hangs_on_data(senders, receiver, j):
        raise uneven(j, senders, receiver)
    if _may_hang_on_data(senders, receiver, j) and not found.note:
        found = found._replace(note=f"dim {dim} was taken to be cut by a rule, and not by data")
    return size, found


def _may_hang_on_data(senders: Sizes, receiver: Receiver, j: int) -> bool:
    """Whether blocks may be as large as data have it, and just happen to have a rule's sizes."""
    cuts = receiver.cuts(j)
    is_even = receiver.even(j) == senders.total and receiver.is_even(j)
    if not _is_of_data(receiver, j):
        return False
    if is_even and receiver.dims.dims[j].names != (TOKENS,):
        return False
    if receiver.whole(j) is not None or any(cut.rule or cut.zigzag for cut in cuts):
        return False
    alike = senders.cuts_as(cuts, receiver.places)
    return not (alike and senders.at(senders.key(receiver.places)) == receiver.shape[j])


def _hangs_on_data(senders: Sizes, receiver: Receiver, j: int) -> bool:
    """Whether no rule cuts the senders' blocks, so that none can be taken to cut the receiver's."""
    cuts = receiver.cuts(j)
    is_said = receiver.whole(j) is not None or any(cut.rule or cut.zigzag for cut in cuts)
    named = not {*receiver.dims.dims[j].names}.isdisjoint(receiver.sized)
    return bool(cuts) and not is_said and not named and not senders.is_regular


def _cut_alike(senders: Sizes, receiver: Receiver, j: int) -> r.Runs | None:
    """Return what the sender at the receiver's place has, where only that can tell.

    Blocks whose sizes hang on data begin where no rule tells; between two jobs that are cut alike,
    one of the same size at the same place is the same.
    """
    cuts = receiver.cuts(j)
    if not cuts or receiver.whole(j) is not None or not senders.cuts_as(cuts, receiver.places):
        return None
    key = senders.key(receiver.places)
    if senders.at(key) != receiver.shape[j] or senders.is_open or senders.ends_open:
        return None
    may_be_ruled = senders.is_regular and not (senders.is_uneven and _is_of_data(receiver, j))
    return None if may_be_ruled else senders.runs(key)


def _is_of_data(receiver: Receiver, j: int) -> bool:
    """Whether an axis cuts a dim whose ranks have what data, or experts, give them."""
    of_data = receiver.dims.data | {EXPERTS}
    return any(cut.axis in of_data for cut in receiver.cuts(j))


def other_sizes(receiver: Receiver, j: int, size: int, rows: Rows | None) -> tuple[int, ...]:
    """Return which other sizes the receiver's sequences may have with their padding.

    Where the senders pad, nobody says that the receiver pads as much.
    """
    names = receiver.dims.dims[j].names
    if rows is None or SEQUENCE not in names or not {*names} <= {BATCH, SEQUENCE}:
        return ()
    if receiver.even(j) == size and receiver.is_even(j):
        return ()  # as large as the senders', in blocks of one size
    least = max(rows.real, default=0) * (len(rows.real) if BATCH in names else 1)
    return tuple(n for n in (least, receiver.even(j)) if least <= n != size)


def _check_certain(senders: Sizes, j: int, declared: int | None, receiver: Receiver) -> None:
    """Refuse sizes that hang on a block nobody recorded, unless the other side bears them out."""
    borne_out = [declared]
    if receiver.dims.padded.isdisjoint(receiver.dims.dims[j].names):
        borne_out.append(receiver.whole(j))
        if not senders.is_open and len(receiver.cuts(j)) == 1:
            # The sum may be too large by less than a block; the receiver's is the same then.
            borne_out.append(receiver.even(j))
    if not (senders.is_open or senders.ends_open) or senders.total in borne_out:
        return
    if declared is not None and not senders.is_open and declared <= senders.recorded:
        return  # what is missing at the end is padding alone
    raise blocks_missing(senders, f"$receiver's block of {receiver.shape[j]}")


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
    return r.behind(total, size)


def _fused(
    pair: Pair,
    sender_dims: Dims,
    sizes: Sequence[Sizes],
    receiver: Receiver,
    rows: Rows | None,
) -> Fused:
    explicit = {**receiver.dims.sizes, **sender_dims.sizes}
    senders = [_sender_sized(sender_dims, i, sizes[i].total, explicit) for i in pair.senders]
    have = math.prod(one.real for one in senders)
    in_order = [name for one in senders for name in one.dim.names]
    places = {name: i for i, name in enumerate(in_order)}
    order = sorted(
        pair.receivers,
        key=lambda j: min(places.get(name, -1) for name in receiver.dims.dims[j].names),
    )
    pair = Pair(pair.senders, tuple(order))
    known = explicit | {one.dim.names[0]: one.real for one in senders if len(one.dim.names) == 1}
    if rows is not None and rows.real:
        known = {BATCH: len(rows.real)} | known
    reals = {j: _real(receiver, j, known, explicit) for j in order}
    unknown = [j for j, real in reals.items() if real is None]
    rest = math.prod(real for real in reals.values() if real is not None)
    if len(unknown) == 1 and rest and have % rest == 0:
        reals[unknown[0]] = have // rest  # it has what the others leave
    elif unknown:
        whole_of(receiver, unknown[0])
    receivers = []
    for j in order:
        real, whole = reals[j] or 0, receiver.whole(j)
        receivers.append(Sized(receiver.dims.dims[j], real if whole is None else whole, real))
    if math.prod(one.real for one in receivers) != have:
        odd = [one.dim.names[0] for one in (*senders, *receivers) if one.real != one.total]
        if odd:
            raise padded_apart(min(odd))
        raise LayoutError(
            f"dims {_labels(senders)}: $senders have {have} in all, $receiver's "
            f"{_labels(receivers)} {' x '.join(str(one.real) for one in receivers)}",
            if_shared([sizes[i] for i in pair.senders], math.prod(n.real for n in receivers)),
        )
    if any(receiver.whole(j) is None for j in order):
        for i, one in zip(pair.senders, senders, strict=True):
            is_declared = all(name in explicit for name in one.dim.names)
            if not is_declared or one.real != one.total:
                check_all_there(sizes[i])
    names, receiver_order = _names(senders), _names(receivers)
    all_known: dict[str, int] | None = _sizes_of_names(known, senders, receivers)
    if names == receiver_order:
        all_known = None
    else:
        _check_all_known(all_known or {}, senders, receivers)
        names = (*names, *(name for name in receiver_order if name not in names))
    runs, notes = [], []
    for place, j in enumerate(order):
        one = receivers[place]
        for i in pair.senders:
            if _hangs_on_data(sizes[i], receiver, j):
                raise uneven(j, sizes[i], receiver)
        others = other_sizes(receiver, j, one.real, rows)
        may_pad = _may_pad(receiver, j, explicit)
        is_left = rows is not None and rows.is_left and bool(others)
        found = indices_of(receiver, j, one.real, may_pad, others, is_left=is_left)
        receivers[place] = replace(one, total=found.total)
        runs.append(found.runs)
        notes += [found.note] * bool(found.note)
    return Fused(pair, names, all_known, senders, receivers, runs, "; ".join(notes))


def _sender_sized(dims: Dims, i: int, total: int, explicit: Mapping[str, int]) -> Sized:
    """Return a senders' dim with its size, and that without padding where it was declared."""
    dim = dims.dims[i]
    if not all(name in explicit for name in dim.names):
        if not dims.padded.isdisjoint(dim.names):
            raise padded_apart(min(dims.padded.intersection(dim.names)))
        return Sized(dim, total, total)
    real = math.prod(explicit[name] for name in dim.names)
    if real > total and len(dim.names) == 1:
        raise too_few(dim, total, real, "declared")
    if real < total and len(dim.names) > 1:
        raise padded_apart(min(dim.names))
    return Sized(dim, total, real if len(dim.names) == 1 else total)


def _may_pad(receiver: Receiver, j: int, explicit: Mapping[str, int]) -> bool:
    """Whether padding may stand behind the end of the receiver's dim."""
    names = receiver.dims.dims[j].names
    return len(names) == 1 and (names[0] in explicit or names[0] in receiver.dims.padded)


def _real(
    receiver: Receiver, j: int, known: Mapping[str, int], explicit: Mapping[str, int]
) -> int | None:
    """Return the size of the receiver's whole along a dim without padding, where it is known."""
    names, whole = receiver.dims.dims[j].names, receiver.whole(j)
    real = math.prod(known[name] for name in names) if all(n in known for n in names) else None
    if _may_pad(receiver, j, explicit):
        return real if whole is None or real is None else min(whole, real)
    if whole is not None and real is not None and real < whole and len(names) > 1:
        padded = sorted({*names} & {*explicit})
        if padded:
            raise padded_apart(padded[0])
    return real if whole is None else whole


def _names(dims: Sequence[Sized]) -> tuple[str, ...]:
    return tuple(name for one in dims for name in one.dim.names)


def _labels(dims: Sequence[Sized]) -> str:
    return " ".join(one.dim.label for one in dims)


def _sizes_of_names(
    declared: Mapping[str, int], senders: Sequence[Sized], receivers: Sequence[Sized]
) -> dict[str, int]:
    """Return the size of each name as far as it is known, all of it held together."""
    known = dict(declared)
    both = sorted([*senders, *receivers], key=lambda one: len(one.dim.names))
    for one in [*both, *both]:  # what the second time around is new, the first made known
        dim, size = one.dim, one.real
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
