"""How axes cut a dim: one after another, the outermost first.

What an axis does not divide is cut by a rule, as `torch.chunk` does or as `torch.tensor_split`;
`rules_of` has all the rules that a layout leaves open, and `cut_up` cuts by one choice of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from . import runs as r
from .dims import Cut, Dim
from .lengths import Lengths
from .runs import Runs

SEQUENCES_OVER = "cp"
"""The axis that cuts each sequence of flattened tokens, and not the line of them."""
Places = Mapping[str, tuple[int, int]]
"""Axis -> a rank's coordinate and the axis's size."""
_Part = Callable[[tuple[int, ...], int, int], tuple[int, int]]


def cuts_of(dim: Dim, sizes: Mapping[str, int]) -> list[Cut]:
    """Return the axes that do cut a dim: those of more than one rank."""
    return [cut for cut in dim.cuts if sizes[cut.axis] > 1]


def declared(dim: Dim, cuts: Sequence[Cut], rules: Sequence[str], share: int = 1) -> str:
    """Return a dim as written with rules for its cuts, or with ranks that share a block."""
    words = [cut.declared(rule) for cut, rule in zip(cuts, rules, strict=True)] if rules else []
    if share > 1:
        words = [*map(str, cuts[:-1]), str(replace(cuts[-1], share=share))]
    return f"{dim.label}[{','.join(words)}]"


def shared(dim: Dim, cuts: Sequence[Cut], share: int, size: int, block: int) -> str:
    """Return a dim as written where ranks share each block, of some size, of the whole's."""
    if len(cuts) == 1 and len(dim.names) == 1 == block:
        return f"{dim.label}[{cuts[0].axis}:repeat]"
    if len(cuts) == 1 and len(dim.names) > 1:
        return f"{dim.label}[{cuts[0].axis}:repeat] # {dim.names[0]}={size // block}"
    return declared(dim, cuts, (), share)


def rules_of(cuts: Sequence[Cut], matters: Callable[[int, Cut], bool]) -> Iterator[tuple[str, ...]]:
    """Yield the rules by which axes can cut what they do not divide, as far as it is open."""
    free = [
        (cut.rule,) if cut.rule else tuple(r.RULES) if matters(i, cut) else ("chunk",)
        for i, cut in enumerate(cuts)
    ]
    yield from itertools.product(*free)


def divides(cuts: Sequence[Cut], axes: Mapping[str, int], total: int) -> bool:
    """Whether axes cut a whole of some size evenly."""
    for cut in cuts:
        n = axes[cut.axis]
        if total % (2 * n if cut.zigzag else n):
            return False
        total //= n
    return True


def is_by_sequence(cuts: Sequence[Cut], i: int, lengths: Lengths | None) -> bool:
    """Whether the i-th axis cuts sequences of some lengths each by itself."""
    return i == 0 and lengths is not None and bool(cuts) and cuts[0].axis == SEQUENCES_OVER


def cut_up(
    cuts: Sequence[Cut],
    key: tuple[int, ...],
    axes: Mapping[str, int],
    total: int,
    rules: Sequence[str],
    lengths: Lengths | None,
    part: _Part | None = None,
) -> Runs:
    """Cut the indices 0 to `total` by one axis after another.

    Args:
        cuts: the axes of more than one rank, the outermost first.
        key: the coordinate on each.
        axes: axis -> size.
        total: how many indices there are.
        rules: for each axis how it cuts what it does not divide.
        lengths: of the sequences, which an axis `cp` cuts each by itself.
        part: (coordinates so far, coordinate, size of what is cut) -> start and length, for an axis
            in natural order, where that is known.
    """
    found: Runs = [(0, total)]
    for i, (cut, k) in enumerate(zip(cuts, key, strict=True)):
        n = axes[cut.axis]
        if lengths is not None and is_by_sequence(cuts, i, lengths):
            pieces = _of_sequences(total, lengths.room, n, k, cut.zigzag, rules[i])
        elif cut.zigzag:
            pieces = r.zigzag(r.length(found), n, k, rules[i])
        elif part is not None:
            pieces = [part(key[:i], k, r.length(found))]
        else:
            pieces = [r.RULES[rules[i]](r.length(found), n, k)]
        found = r.merged(run for piece in pieces for run in r.sliced(found, *piece))
    return r.merged(found)


def _of_sequences(
    total: int, rooms: Sequence[int], parts: int, k: int, zigzag: bool, rule: str
) -> list[tuple[int, int]]:
    """Return the positions of rank `k`'s part of each sequence, and of what lies behind them."""
    found, at = [], 0
    for room in rooms:
        pieces = r.zigzag(room, parts, k, rule) if zigzag else [r.RULES[rule](room, parts, k)]
        found += [(at + start, n) for start, n in pieces]
        at += room
    start, n = r.RULES[rule](max(0, total - at), parts, k)
    return [*found, (at + start, n)]
