"""A receiver's block: which indices of the whole it has, as far as its layout and its size tell.

Of receivers one block is known. `Receiver.indices` finds how a whole of some size is cut to have
it; where there are several ways, with other indices, it asks which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import LayoutError
from . import runs as r
from .cutting import Places, cut_up, cuts_of, declared, divides, is_by_sequence, rules_of, shared
from .dims import TOKENS, Cut, Dims
from .lengths import Lengths
from .runs import Runs


class Found(NamedTuple):
    """What a block has of a whole: how large that is, which indices, and what was guessed."""

    total: int
    runs: Runs
    note: str = ""


class _Reading(NamedTuple):
    """One way to understand how a receiver's dim is cut.

    Attributes:
        total: the size of the whole.
        runs: what the block has of it.
        rules: how each axis cuts what it does not divide.
        is_padded: whether the whole is padded so that all its blocks are of one size.
        share: how many neighbours hold the same block.
    """

    total: int
    runs: Runs
    rules: tuple[str, ...]
    is_padded: bool = False
    share: int = 1

    @property
    def how(self) -> str:
        """How the whole is cut, in words."""
        if self.share > 1:
            return f"where {self.share} ranks share each block"
        known: dict[tuple[str, ...], str] = {
            ("chunk",): "as torch.chunk cuts",
            ("split",): "as torch.tensor_split",
        }
        return known.get(tuple(dict.fromkeys(self.rules)), f"as {' then '.join(self.rules)} cut")


@dataclass(frozen=True)
class Receiver:
    """A receiver's block, placed.

    Attributes:
        dims: its layout.
        shape: its sizes.
        places: where it stands.
        lengths: of the sequences in its flattened tokens.
        sized: the names whose sizes without padding are declared, on either side.
    """

    dims: Dims
    shape: tuple[int, ...]
    places: Places
    lengths: Lengths | None
    sized: frozenset[str] = frozenset()

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of the axes that it stands on."""
        return {axis: n for axis, (_, n) in self.places.items()}

    def cuts(self, j: int) -> list[Cut]:
        """Return the axes that cut its dim `j`."""
        return cuts_of(self.dims.dims[j], self.axes)

    def whole(self, j: int) -> int | None:
        """Return the size of the whole along dim `j` where this block alone tells, else None."""
        known = self.dims.known(j, self.axes)
        return self.shape[j] if known is None and not self.cuts(j) else known

    def even(self, j: int) -> int:
        """Return the size of a whole whose blocks along dim `j` are all as large as this one."""
        return self.shape[j] * math.prod(self.places[cut.axis][1] for cut in self.cuts(j))

    def is_even(self, j: int) -> bool:
        """Whether its block along dim `j` can be one of several that are all as large."""
        return divides(self.cuts(j), {a: n for a, (_, n) in self.places.items()}, self.even(j))

    def is_last(self, j: int) -> bool:
        """Whether its block is the last along dim `j`, and so may be what an uneven cut leaves."""
        cuts = self.cuts(j)
        return all(self.places[cut.axis][0] == self.places[cut.axis][1] - 1 for cut in cuts)

    def indices(
        self,
        j: int,
        size: int,
        padded: bool = False,
        others: Sequence[int] = (),
        *,
        is_left: bool = False,
        may_share: bool = True,
    ) -> Found | None:
        """Return the size of the whole along dim `j`, and which of its indices the block has.

        A size that was declared is that without padding to a multiple: where no rule says that the
        dim is cut unevenly, it is taken to be padded, and said where it need not be.

        Args:
            j: the dim.
            size: what the whole is to have, its padding left out.
            padded: whether it may have padding behind that.
            others: what the whole may have instead: the block must have the same indices then, or
                where these count from the end (`is_left`), there must be no such block.
            is_left: whether padding stands before what is real.
            may_share: whether neighbours may hold the same block, though nobody declares it.

        Returns:
            None where no whole of that size has such a block.

        Raises:
            LayoutError: it depends on how the dim is cut, which was not declared.
        """
        lengths = self._lengths_of(j)
        if lengths is not None and not lengths.is_borrowed:
            size = max(size, sum(lengths.room))
        if lengths is not None:
            size = max(size, lengths.declared)
        readings = self._readings(j, size, padded)
        if lengths is not None and sum(lengths.room) > size:  # padded as the other side's, or not
            readings += self._readings(j, sum(lengths.room), padded)
        if not readings:
            return None
        if self.whole(j) is None:
            for other in others:
                readings += self._cuttings(j, other)
        distinct: dict[tuple[tuple[int, int], ...], _Reading] = {}
        is_certain = not may_share or (padded and self._is_padded(j))
        shared = None if is_certain else self.shared(j, size)
        for one in [*readings, *([shared] if shared else [])]:
            held = tuple(r.located(one.runs, self._segments(j, one.total, size)))
            if is_left:
                held = (*held, (one.total, 0))
            distinct.setdefault(held, one)
        first, note = readings[0], ""
        is_declared = self._is_padded(j) or not self.sized.isdisjoint(self.dims.dims[j].names)
        if first.is_padded and first.total > size and not is_declared:
            note = f"dim {self.dims.dims[j]}: taken to be padded to {first.total}"
        if len(distinct) > 1:
            ways = list(distinct.values())
            if is_left or not (first.is_padded and self._is_sized(j)):
                raise self._open(j, size, ways)
            others_said = " or ".join(self._options(j, size, ways[1:]))
            note = (
                f"dim {self.dims.dims[j]}: taken to be padded to {first.total}; if it is not, "
                f"write {others_said}"
            )
        return Found(first.total, first.runs, note)

    def _readings(self, j: int, size: int, padded: bool) -> list[_Reading]:
        """Return how the whole can be cut to have this block, if all that is declared is so."""
        whole, even, cuts = self.whole(j), self.even(j), self.cuts(j)
        if whole is not None:
            fits = whole == size or (padded and whole > size)
            return self._cuttings(j, whole) if fits else []
        plain = self._cuttings(j, size)
        if not padded or even <= size:
            return plain
        evenly = [one._replace(is_padded=True) for one in self._cuttings(j, even, evenly=True)]
        if evenly and self._is_padded(j):
            return evenly
        is_declared = not self.sized.isdisjoint(self.dims.dims[j].names)
        is_tokens = self.dims.dims[j].names == (TOKENS,)
        if plain and any(cut.rule for cut in cuts) and (is_declared or not is_tokens):
            return plain  # what is padded to a multiple needs no rule
        return [*evenly, *plain]

    def _is_sized(self, j: int) -> bool:
        """Whether either side declares the size of dim `j`, and no rule how it is cut."""
        names = self.dims.dims[j].names
        is_declared = len(names) == 1 and names[0] in self.sized
        return is_declared and not any(cut.rule for cut in self.cuts(j))

    def _is_padded(self, j: int) -> bool:
        """Whether dim `j` was said to be padded, more than by its size without padding."""
        return not self.dims.padded.isdisjoint(self.dims.dims[j].names)

    def _segments(self, j: int, total: int, size: int) -> list[tuple[int, int, int]]:
        """Return which of the indices along dim `j` are real."""
        lengths = self._lengths_of(j)
        if lengths is not None:
            fitted = lengths.fitted(total)
            if sum(fitted.room) <= total:
                return fitted.segments(total)
        return r.behind(total, size)

    def shared(self, j: int, size: int) -> _Reading | None:
        """Return what the block holds if neighbours share it, which nobody declared.

        Servers do so with key heads that are fewer than the ranks: then a dim that is said to be
        cut has fewer blocks than ranks.
        """
        cuts, block = self.cuts(j), self.shape[j]
        ranks = math.prod(self.places[cut.axis][1] for cut in cuts)
        if (
            self.whole(j) is not None
            or self.dims.dims[j].names == (TOKENS,)
            or any(cut.zigzag or cut.rule or cut.share > 1 for cut in cuts)
            or not block
            or not size
            or size % block
            or size // block >= ranks
            or ranks % (size // block)
        ):
            return None
        share, at = ranks // (size // block), 0
        last = self.places[cuts[-1].axis][1]
        if last % share:
            return None
        for cut in cuts:
            k, n = self.places[cut.axis]
            at = at * n + k
        return _Reading(size, [(at // share * block, block)], (), share=share)

    def _open(self, j: int, size: int, readings: Sequence[_Reading]) -> LayoutError:
        """Say between which readings of its layout only a declaration can decide."""
        dim = self.dims.dims[j]
        starts = [one.runs[0][0] if one.runs else 0 for one in readings]
        told = len(set(starts)) == len(starts)
        words = []
        for start, one in zip(starts, readings, strict=True):
            how = one.how if one.total == size else f"where it has {one.total} in all"
            words.append(f"at {start}, {how}" if told else how)
        return LayoutError(
            f"dim {dim}: of {size}, a block of {self.shape[j]} can "
            f"{'begin' if told else 'be cut'} {', or '.join(dict.fromkeys(words))}",
            f"declare which at $receiver's tap: {' or '.join(self._options(j, size, readings))}",
        )

    def _options(self, j: int, size: int, readings: Sequence[_Reading]) -> list[str]:
        """Return how each reading can be declared."""
        dim, cuts = self.dims.dims[j], self.cuts(j)
        as_it_is = f" # {dim.label}={size}" if dim.names == (TOKENS,) else ""
        options = [
            f"'# {dim.label}:padded'"
            if one.is_padded
            else f"'# {dim.label}={one.total}'"
            if one.total != size
            else shared(dim, cuts, one.share, size, self.shape[j])
            if one.share > 1
            else declared(dim, cuts, one.rules) + as_it_is
            for one in readings
        ]
        return list(dict.fromkeys(options))

    def _lengths_of(self, j: int) -> Lengths | None:
        """Return the lengths of the sequences in dim `j`, if it is one of flattened tokens."""
        return self.lengths if self.dims.dims[j].names == (TOKENS,) else None

    def _lengths_over(self, j: int) -> Lengths | None:
        """Return the lengths of the sequences that dim `j` is cut by, each by itself."""
        cuts = self.cuts(j)
        if cuts and cuts[0].axis in (self.dims.mesh or {}):
            return None  # a placement cuts the line of them
        lengths = self._lengths_of(j)
        return lengths if is_by_sequence(cuts, 0, lengths) else None

    def _cuttings(self, j: int, total: int, *, evenly: bool = False) -> list[_Reading]:
        """Return the ways to cut a whole of some size that give this block, no two alike."""
        cuts = self.cuts(j)
        axes = self.axes
        key = tuple(self.places[cut.axis][0] for cut in cuts)
        lengths = self._lengths_over(j)
        if lengths is not None:
            lengths = lengths.fitted(total)
            if sum(lengths.room) > total:
                return []
        if evenly and lengths is None and not divides(cuts, axes, total):
            return []
        found: list[_Reading] = []
        for rules in rules_of(cuts, lambda i, cut: True):
            got = cut_up(cuts, key, axes, total, rules, lengths)
            if r.length(got) == self.shape[j] and all(got != one.runs for one in found):
                found.append(_Reading(total, got, rules))
        return found
