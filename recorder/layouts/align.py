"""Which dims of two layouts belong together, and how each side counts their indices.

1. `align` pairs dims by the names they share into groups: one dim with one, a fused dim with those
   it is made of, flattened tokens with batch and sequence. A dim of size 1 may be absent.
2. A `Group` counts its indices once for both sides. `Group.out_of` and `Group.into` say which of
   them a sender's and the receiver's block hold, in the order in which they lie there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import LayoutError
from . import runs as r
from .blocks import Lengths
from .dims import TOKENS, Dim, Dims
from .runs import Runs

BATCH, SEQUENCE = "b", "s"
_MOST_RUNS = 1 << 20
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


class Group(Protocol):
    """A pair's indices as both sides hold them."""

    pair: Pair

    def out_of(self, runs: Sequence[Runs]) -> Runs:
        """Return which indices a sender's block holds, from the runs along each of its dims."""

    def into(self) -> Runs:
        """Return which indices the receiver's block holds."""


@dataclass
class Same:
    """One dim on each side; its indices count from 0, without padding."""

    pair: Pair
    segments: list[tuple[int, int, int]]
    receiver: Runs

    def out_of(self, runs: Sequence[Runs]) -> Runs:
        """See `Group`."""
        return r.located(runs[0], self.segments)

    def into(self) -> Runs:
        """See `Group`."""
        return self.receiver


def segments(total: int, size: int, lengths: Lengths | None) -> list[tuple[int, int, int]]:
    """Return which of `total` indices are among the `size` that are no padding."""
    if lengths is not None:
        return lengths.segments(total)
    found = [(0, min(size, total), 0), (size, total - size, r.PADDING)]
    return [segment for segment in found if segment[1] > 0] or [(0, 0, 0)]


@dataclass
class Fused:
    """Dims that one side has fused, or both otherwise; an index counts in the senders' order.

    Attributes:
        names: all names, in that order.
        sizes: the size of the whole along each name; None where the two orders are the same, and
            nobody needs to know.
        ours: the senders' dims, each with its size.
        theirs: the receiver's, likewise.
        receiver: the runs along each of these.
    """

    pair: Pair
    names: tuple[str, ...]
    sizes: Mapping[str, int] | None
    ours: list[tuple[Dim, int]]
    theirs: list[tuple[Dim, int]]
    receiver: list[Runs]

    def out_of(self, runs: Sequence[Runs]) -> Runs:
        """See `Group`."""
        return _in_order([size for _, size in self.ours], runs)

    def into(self) -> Runs:
        """See `Group`."""
        if self.sizes is None:
            return _in_order([size for _, size in self.theirs], self.receiver)
        return _reordered(self.names, self.sizes, [dim for dim, _ in self.theirs], self.receiver)


def _in_order(sizes: Sequence[int], runs: Sequence[Runs]) -> Runs:
    """Return the indices, counted in the order of the dims, of a block of several dims."""
    found: Runs = [(0, 1)]
    inner = 1
    for size, outer in zip(reversed(sizes), reversed(runs), strict=True):
        if found == [(0, inner)]:
            found = [(start * inner, n * inner) for start, n in outer]
        else:
            _check_count(len(found) * r.length(outer))
            found = r.merged(
                (at * inner + start, n)
                for first, count in outer
                for at in range(first, first + count)
                for start, n in found
            )
        inner *= size
    return r.merged(found)


def _reordered(
    names: Sequence[str], sizes: Mapping[str, int], dims: Sequence[Dim], runs: Sequence[Runs]
) -> Runs:
    """Return the indices, counted in the order of `names`, of a block whose dims are otherwise."""
    strides, stride = {}, 1
    for name in reversed(names):
        strides[name] = stride
        stride *= sizes[name]
    _check_count(math.prod(map(r.length, runs)))
    each: list[list[int]] = []
    for dim, held in zip(dims, runs, strict=True):
        counts = [sizes[name] for name in dim.names]
        each.append(
            [
                sum(
                    at * strides[name]
                    for at, name in zip(_digits(i, counts), dim.names, strict=True)
                )
                for start, n in held
                for i in range(start, start + n)
            ]
        )
    return r.merged((sum(place), 1) for place in itertools.product(*each))


def _digits(i: int, counts: Sequence[int]) -> Iterable[int]:
    digits = []
    for count in reversed(counts):
        i, digit = divmod(i, count)
        digits.append(digit)
    return reversed(digits)


def _check_count(runs: int) -> None:
    if runs > _MOST_RUNS:
        raise LayoutError(
            f"what is fused on one side is cut into {runs} pieces on the other, too many to copy "
            "one by one; name a transform with --transform"
        )


@dataclass
class Flattened:
    """Tokens on one side, batch and sequence on the other; an index counts real tokens.

    Attributes:
        flat: whether it is the senders who have tokens.
        segments: which of the flat side's indices are which tokens.
        order: the other side's names, outermost first.
        starts: for each sequence the number of its first token.
        real: for each sequence how many it has.
        size: how many each has with its padding.
        receiver: the runs along each of the receiver's dims.
    """

    pair: Pair
    flat: bool
    segments: list[tuple[int, int, int]]
    order: tuple[str, ...]
    starts: Sequence[int]
    real: Sequence[int]
    size: int
    receiver: list[Runs]

    def out_of(self, runs: Sequence[Runs]) -> Runs:
        """See `Group`."""
        return r.located(runs[0], self.segments) if self.flat else r.merged(self._rows(runs))

    def into(self) -> Runs:
        """See `Group`."""
        if self.flat:
            return r.merged(self._rows(self.receiver))
        return r.located(self.receiver[0], self.segments)

    def _rows(self, runs: Sequence[Runs]) -> Iterator[tuple[int, int]]:
        if len(self.order) == 1:  # fused, batch outermost
            both = [
                segment for i in range(len(self.real)) for segment in self._row(i, i * self.size)
            ]
            yield from r.located(runs[0], both or [(0, 0, 0)])
            return
        batch, sequence = (runs[self.order.index(name)] for name in (BATCH, SEQUENCE))
        rows = [i for first, n in batch for i in range(first, first + n)]
        if self.order[0] == BATCH:
            for i in rows:
                yield from r.located(sequence, self._row(i, 0))
            return
        _check_count(len(rows) * r.length(sequence))
        for first, n in sequence:
            for at in range(first, first + n):
                for i in rows:
                    yield (self.starts[i] + at if at < self.real[i] else r.PADDING), 1

    def _row(self, i: int, at: int) -> list[tuple[int, int, int]]:
        real = self.real[i]
        found = [(at, real, self.starts[i]), (at + real, self.size - real, r.PADDING)]
        return [segment for segment in found if segment[1] > 0]
