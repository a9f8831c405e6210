"""How a pair of dims counts its indices, once the sizes of both sides are held together.

`group_of` makes the `Group` that a pair needs, and refuses a pair whose sizes contradict each
other; the message names the dim and both sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..errors import LayoutError
from . import runs as r
from .align import MEND, Flattened, Fused, Group, Pair, Same, segments
from .blocks import Lengths, Sizes, even_whole, whole_of
from .dims import TOKENS, Dim, Dims
from .runs import Runs

Sized = tuple[Dim, int]


def group_of(
    pair: Pair,
    ours: Dims,
    sizes: Sequence[Sizes],
    theirs: Dims,
    local: Sequence[int],
    here: Mapping[str, tuple[int, int]],
    wholes: Sequence[int],
    lengths: tuple[Lengths | None, Lengths | None],
) -> Group:
    """Return how both sides count the indices of a pair of dims.

    Args:
        pair: the dims, by position.
        ours: the senders' layout.
        sizes: the sizes of their blocks along each of its dims.
        theirs: the receiver's layout.
        local: the sizes of its block.
        here: where the receiver stands on each axis.
        wholes: the size of the receiver's whole along each dim if all its blocks are equal.
        lengths: of the sequences in flattened tokens, on the senders' side and the receiver's.

    Raises:
        LayoutError: the sizes contradict each other, or do not say enough.
    """
    mine = [ours.dims[i].names for i in pair.senders]
    its = [theirs.dims[i].names for i in pair.receivers]
    if len(mine) == len(its) == 1 and mine == its:
        return _same(pair, ours, sizes, theirs, local, here, lengths)
    ours_all = [name for names in mine for name in names]
    theirs_all = [name for names in its for name in names]
    padded = [n for n in (*ours_all, *theirs_all) if n in ours.padded | theirs.padded]
    if padded:
        raise LayoutError(
            f"dim {padded[0]} is padded on one side and fused or taken apart on the other; {MEND}"
        )
    if [(TOKENS,)] in (mine, its) and ours_all != theirs_all:
        return _flattened(pair, ours, sizes, theirs, local, here, wholes, lengths)
    return _fused(pair, ours, sizes, theirs, local, here, wholes)


def _same(
    pair: Pair,
    ours: Dims,
    sizes: Sequence[Sizes],
    theirs: Dims,
    local: Sequence[int],
    here: Mapping[str, tuple[int, int]],
    lengths: tuple[Lengths | None, Lengths | None],
) -> Same:
    (i,), (j,) = pair.senders, pair.receivers
    dim, have = theirs.dims[j], sizes[i].total
    name = dim.names[0] if len(dim.names) == 1 else ""
    ours_declared, theirs_declared = ours.sizes.get(name), theirs.sizes.get(name)
    if None not in (ours_declared, theirs_declared) and ours_declared != theirs_declared:
        raise LayoutError(
            f"dim {name} is declared to have {ours_declared} without padding by the senders and "
            f"{theirs_declared} by the target; {MEND}"
        )
    mine, its = lengths if name == TOKENS else (None, None)
    if mine is not None and sum(mine.room) > have:
        mine = its = None
    here_axes = {axis: n for axis, (_, n) in here.items()}
    even = even_whole(dim, here_axes, local[j])
    if its is not None and sum(its.room) > even:
        its = Lengths(its.real, its.real)  # the senders' padding, which this side need not have
    declared = ours_declared if ours_declared is not None else theirs_declared
    if declared is None and mine is not None:
        declared = sum(mine.real)
    size, padded = have, False
    if declared is not None:
        size, padded = declared, True
    elif name in ours.padded and name in theirs.padded:
        if have != even:
            raise LayoutError(
                f"dim {name} is padded on both sides, to {have} by the senders and {even} by the "
                f"target; declare its size without padding at either tap, as in '# {name}=SIZE'"
            )
    elif name in ours.padded:
        size = even
    padded = padded or name in theirs.padded
    if have < size:
        raise LayoutError(
            f"dim {dim.label}: the senders have {have} in all, fewer than the {size} "
            f"{'declared' if declared is not None else 'of the target'}; {MEND}"
        )
    found = whole_of(dim, here, local[j], size, padded, its)
    if found is None:
        cut = "".join(f", one of {here_axes[c.axis]} blocks over {c.axis}" for c in dim.cuts)
        more = f" ({size} without padding)" if size != have else ""
        raise LayoutError(
            f"dim {dim.label}: the senders have {have} in all{more}, and the target's block has "
            f"{local[j]}{cut}; declare padding with '# {name or 'DIM'}=SIZE', or {MEND}"
        )
    total, runs = found
    return Same(
        pair,
        segments(have, size, mine),
        r.located(runs, segments(total, size, its)),
    )


def _flattened(
    pair: Pair,
    ours: Dims,
    sizes: Sequence[Sizes],
    theirs: Dims,
    local: Sequence[int],
    here: Mapping[str, tuple[int, int]],
    wholes: Sequence[int],
    lengths: tuple[Lengths | None, Lengths | None],
) -> Flattened:
    flat = len(pair.senders) == 1 and ours.dims[pair.senders[0]].names == (TOKENS,)
    dims, rows = (theirs, pair.receivers) if flat else (ours, pair.senders)
    totals = [wholes[j] if flat else sizes[j].total for j in rows]
    order = tuple("*".join(dims.dims[j].names) for j in rows)
    if set(order) not in ({"b", "s"}, {"b*s"}):
        raise LayoutError(
            f"tokens (t) on one side are {' '.join(order)} on the other, which is neither b and s "
            f"nor (b*s); {MEND}"
        )
    tokens = sizes[pair.senders[0]].total if flat else wholes[pair.receivers[0]]
    mine, its = lengths
    of_tokens = mine if flat else its
    if len(order) == 2:
        batch, size = (totals[order.index(name)] for name in ("b", "s"))
    elif of_tokens is not None and of_tokens.real:
        batch = len(of_tokens.real)
        size = totals[0] // batch
    else:
        batch, size = 1, totals[0]
    if of_tokens is None:
        of_tokens = Lengths((size,) * batch, (size,) * batch)
        if batch * size != tokens:
            raise LayoutError(
                f"the {'senders have' if flat else 'target has'} {tokens} tokens (t), and the "
                f"other side {batch} sequences of {size}; give their lengths in the extras of a "
                "tap, as extras={'seq_lens': [...]}"
            )
    real = of_tokens.real
    if len(real) != batch or any(n > size for n in real) or sum(of_tokens.room) > tokens:
        raise LayoutError(
            f"sequence lengths {list(real)!s:.120} fit neither {tokens} tokens (t) nor {batch} "
            f"sequences of {size}; give those of this input in the extras"
        )
    starts = [sum(real[:i]) for i in range(batch)]
    receiver = _whole_runs(theirs, {j: wholes[j] for j in pair.receivers}, local, here, lengths[1])
    return Flattened(pair, flat, of_tokens.segments(tokens), order, starts, real, size, receiver)


def _whole_runs(
    theirs: Dims,
    totals: Mapping[int, int],
    local: Sequence[int],
    here: Mapping[str, tuple[int, int]],
    lengths: Lengths | None = None,
) -> list[Runs]:
    """Return the receiver's indices along dims whose wholes are known: position -> size."""
    found = []
    for j, total in totals.items():
        got = whole_of(theirs.dims[j], here, local[j], total, False, lengths)
        if got is None:
            raise LayoutError(
                f"dim {theirs.dims[j]}: {total} in all have no block of {local[j]} there; {MEND}"
            )
        found.append(got[1])
    return found


def _fused(
    pair: Pair,
    ours: Dims,
    sizes: Sequence[Sizes],
    theirs: Dims,
    local: Sequence[int],
    here: Mapping[str, tuple[int, int]],
    wholes: Sequence[int],
) -> Fused:
    mine = [(ours.dims[i], sizes[i].total) for i in pair.senders]
    totals = {j: wholes[j] for j in pair.receivers}
    have = math.prod(total for _, total in mine)
    cut = [j for j in pair.receivers if any(here[c.axis][1] > 1 for c in theirs.dims[j].cuts)]
    if math.prod(totals.values()) != have and len(cut) == 1:
        # One that is cut unevenly has what the others leave.
        others = math.prod(n for j, n in totals.items() if j != cut[0])
        if others and have % others == 0:
            totals[cut[0]] = have // others
    its = [(theirs.dims[j], total) for j, total in totals.items()]
    if math.prod(totals.values()) != have:
        raise LayoutError(
            f"dims {_labels(mine)}: the senders have {have} in all, the target's {_labels(its)} "
            f"{math.prod(totals.values())} ({' x '.join(map(str, totals.values()))}); {MEND}"
        )
    names, theirs_in_order = _names(mine), _names(its)
    known: dict[str, int] | None = None
    if names != theirs_in_order:
        known = _sizes_of_names({**theirs.sizes, **ours.sizes}, mine, its)
        names = (*names, *(name for name in theirs_in_order if name not in names))
    receiver = _whole_runs(theirs, totals, local, here)
    return Fused(pair, names, known, mine, its, receiver)


def _names(dims: Sequence[Sized]) -> tuple[str, ...]:
    return tuple(name for dim, _ in dims for name in dim.names)


def _labels(dims: Sequence[Sized]) -> str:
    return " ".join(dim.label for dim, _ in dims)


def _sizes_of_names(
    declared: Mapping[str, int], mine: Sequence[Sized], its: Sequence[Sized]
) -> dict[str, int]:
    """Return the size of each name, for dims that both sides have in another order."""
    both = [*mine, *its]
    known = {**declared, **{dim.names[0]: size for dim, size in both if len(dim.names) == 1}}
    for dim, size in both:
        unknown = [name for name in dim.names if name not in known]
        rest = math.prod(known.get(name, 1) for name in dim.names)
        if len(unknown) == 1 and rest and size % rest == 0:
            known[unknown[0]] = size // rest
    for name in sorted({*_names(mine), *_names(its)}):
        if name not in known:
            raise LayoutError(
                f"{_labels(mine)} and {_labels(its)} are in another order, and the size of {name} "
                f"is not known; declare it at either tap, as in '# {name}=SIZE'"
            )
        if known[name] != 1 and not (name in _names(mine) and name in _names(its)):
            raise LayoutError(
                f"dim {name} of size {known[name]} is only on one side of {_labels(mine)} and "
                f"{_labels(its)}; {MEND}"
            )
    for dim, size in both:
        if math.prod(known[name] for name in dim.names) != size:
            parts = " x ".join(str(known[name]) for name in dim.names)
            raise LayoutError(f"dim {dim.label} has {size}, and its parts {parts}; {MEND}")
    return known
