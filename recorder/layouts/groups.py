"""How both sides of a pair of dims count its indices: once, in numbers of their own.

`Group.out_of` and `Group.into` say which of them a sender's and the receiver's block hold, in the
order in which they lie there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import LayoutError
from . import runs as r
from .align import Pair
from .dims import Dim
from .runs import Runs


@dataclass(frozen=True)
class Sized:
    """A dim of the whole.

    Attributes:
        dim: the dim.
        total: its size.
        real: its size without the padding behind its end.
    """

    dim: Dim
    total: int
    real: int

    def located(self, runs: Runs) -> Runs:
        """Return a block's indices along it, padding told apart."""
        if self.real == self.total:
            return runs
        return r.located(runs, [(0, self.real, 0), (self.real, self.total - self.real, r.PADDING)])


_MOST_RUNS = 1 << 20


class Group(Protocol):
    """A pair's indices as both sides hold them, and a note on what was taken for granted."""

    pair: Pair
    note: str

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
    note: str = ""

    def out_of(self, runs: Sequence[Runs]) -> Runs:
        """See `Group`."""
        return r.located(runs[0], self.segments)

    def into(self) -> Runs:
        """See `Group`."""
        return self.receiver


@dataclass
class Fused:
    """Dims that one side has fused, or both otherwise; an index counts in the senders' order.

    Attributes:
        names: all names, in that order.
        sizes: the size of the whole along each name; None where the two orders are the same, and
            nobody needs to know.
        senders: the senders' dims.
        receivers: the receiver's.
        receiver: the runs along each of these.
    """

    pair: Pair
    names: tuple[str, ...]
    sizes: Mapping[str, int] | None
    senders: list[Sized]
    receivers: list[Sized]
    receiver: list[Runs]
    note: str = ""

    def out_of(self, runs: Sequence[Runs]) -> Runs:
        """See `Group`."""
        return _in_order(self.senders, runs)

    def into(self) -> Runs:
        """See `Group`."""
        if self.sizes is None:
            return _in_order(self.receivers, self.receiver)
        return _reordered(self.names, self.sizes, self.receivers, self.receiver)


def _in_order(dims: Sequence[Sized], runs: Sequence[Runs]) -> Runs:
    """Return the indices, counted in the order of the dims, of a block of several dims."""
    found: Runs = [(0, 1)]
    inner = 1
    for one, held in zip(reversed(dims), reversed(runs), strict=True):
        outer = one.located(held)
        if found == [(0, inner)]:
            found = [(r.PADDING if at == r.PADDING else at * inner, n * inner) for at, n in outer]
        else:
            _check_count(len(found) * r.length(outer))
            found = r.merged(list(_within(outer, found, inner)))
        inner *= one.real
    return r.merged(found)


def _within(outer: Runs, found: Runs, inner: int) -> Iterator[tuple[int, int]]:
    """Yield what is found within each index of a dim outside it, of so many in all."""
    for first, count in outer:
        if first == r.PADDING:
            yield r.PADDING, count * r.length(found)
            continue
        for at in range(first, first + count):
            for start, n in found:
                yield r.PADDING if start == r.PADDING else at * inner + start, n


def _reordered(
    names: Sequence[str], sizes: Mapping[str, int], dims: Sequence[Sized], runs: Sequence[Runs]
) -> Runs:
    """Return the indices, counted in the order of `names`, of a block whose dims are otherwise."""
    strides, stride = {}, 1
    for name in reversed(names):
        strides[name] = stride
        stride *= sizes[name]
    _check_count(math.prod(map(r.length, runs)))
    each: list[list[int | None]] = []
    for one, held in zip(dims, runs, strict=True):
        counts = [sizes[name] for name in one.dim.names]
        places: list[int | None] = []
        for start, n in one.located(held):
            if start == r.PADDING:
                places += [None] * n
                continue
            for i in range(start, start + n):
                at = zip(_digits(i, counts), one.dim.names, strict=True)
                places.append(sum(k * strides[name] for k, name in at))
        each.append(places)
    return r.merged((_sum(place), 1) for place in itertools.product(*each))


def _sum(place: Sequence[int | None]) -> int:
    total = 0
    for part in place:
        if part is None:
            return r.PADDING
        total += part
    return total


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
            "one by one"
        )


class Counted(Protocol):
    """How one side counts tokens, in one dim or in two."""

    def tokens(self, runs: Sequence[Runs]) -> Runs:
        """Return which tokens a block holds, from the runs along each of its dims."""


@dataclass(frozen=True)
class Line:
    """Flattened tokens: `segments` say which of their indices are which tokens."""

    segments: Sequence[tuple[int, int, int]]

    def tokens(self, runs: Sequence[Runs]) -> Runs:
        """See `Counted`."""
        return r.located(runs[0], self.segments)


@dataclass(frozen=True)
class Grid:
    """Batch and sequence, in this order.

    Attributes:
        is_fused: whether they are one dim.
        real: for each sequence how many tokens it has.
        size: how many each has along the dim.
        room: how many with its padding; behind that there is padding of the dim.
        is_left: whether the padding of a sequence stands before its tokens.
    """

    is_fused: bool
    real: Sequence[int]
    size: int
    room: int
    is_left: bool = False

    def tokens(self, runs: Sequence[Runs]) -> Runs:
        """See `Counted`."""
        return r.merged(self._tokens(runs))

    def _tokens(self, runs: Sequence[Runs]) -> Iterator[tuple[int, int]]:
        starts = [0, *itertools.accumulate(self.real)]
        if self.is_fused:
            rows = (self._row(i, i * self.size, starts) for i in range(len(self.real)))
            yield from r.located(runs[0], [segment for row in rows for segment in row])
            return
        batch, sequence = runs
        for first, n in batch:
            for i in range(first, first + n):
                yield from r.located(sequence, self._row(i, 0, starts))

    def _row(self, i: int, at: int, starts: Sequence[int]) -> list[tuple[int, int, int]]:
        real = self.real[i]
        before = self.room - real if self.is_left else 0
        behind = self.size - before - real
        found = [
            (at, before, r.PADDING),
            (at + before, real, starts[i]),
            (at + before + real, behind, r.PADDING),
        ]
        return [segment for segment in found if segment[1] > 0]


@dataclass
class Tokens:
    """Tokens as each side counts them; an index counts those that are real.

    Attributes:
        senders: how the senders do.
        receiver: how the receiver does.
        held: the runs along each of the receiver's dims.
    """

    pair: Pair
    senders: Counted
    receiver: Counted
    held: Sequence[Runs]
    note: str = ""

    def out_of(self, runs: Sequence[Runs]) -> Runs:
        """See `Group`."""
        return self.senders.tokens(runs)

    def into(self) -> Runs:
        """See `Group`."""
        return self.receiver.tokens(self.held)
