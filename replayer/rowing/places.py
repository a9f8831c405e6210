"""Where each id was recorded: one sorted array, searched by bisection.

`Keys` makes ids of several numbers one integer each, exactly; `Places` finds the places of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from recorder.errors import BadRows
from recorder.sizes import count
from recorder.tokens.taken import real

UNKNOWN = -1


class Keys:
    """Ids as one integer each: equal for equal ids, `UNKNOWN` for one of which nothing is known.

    Args:
        known: ids, [rows] or [rows, numbers], no padding among them.
    """

    def __init__(self, known: torch.Tensor) -> None:
        self.numbers = 1 if known.dim() == 1 else int(known.shape[1])
        self._levels: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self.numbers == 1:
            return
        codes = torch.zeros(len(known), dtype=torch.int64, device="cpu")
        for column in known.unbind(1):
            values, at = column.unique(return_inverse=True)
            combined = codes * max(len(values), 1) + at
            codes_known, codes = combined.unique(return_inverse=True)
            self._levels.append((values, codes_known))

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the keys of ids, int64 [rows].

        Raises:
            BadRows: an id is of another number of numbers.
        """
        numbers = 1 if ids.dim() == 1 else int(ids.shape[1])
        if not len(ids):
            return torch.empty(0, dtype=torch.int64, device="cpu")
        if numbers != self.numbers:
            raise BadRows(
                f"the baseline's rows are told apart by {count(self.numbers, 'number')} each, and "
                f"the target's by {numbers}",
                "give both the same ids",
            )
        if numbers == 1:
            return ids
        codes = torch.zeros(len(ids), dtype=torch.int64, device="cpu")
        unknown = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
        for column, (values, known) in zip(ids.unbind(1), self._levels, strict=True):
            at, is_there = among(values, column.contiguous())
            codes, is_known = among(known, codes * max(len(values), 1) + at)
            unknown |= ~is_there | ~is_known
        return torch.where(unknown, UNKNOWN, codes)


def among(values: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where sorted values have what is wanted first, and whether they do."""
    if not len(values):
        return torch.zeros_like(wanted), torch.zeros(len(wanted), dtype=torch.bool, device="cpu")
    at = torch.searchsorted(values, wanted).clamp_(max=len(values) - 1)
    return at, values[at] == wanted


class Found(NamedTuple):
    """The places of keys.

    Attributes:
        number: that of the `Places` in `Records.places`.
        first: of each key the first of its places there, whatever where it has none.
        times: how many it has.
    """

    number: int
    first: torch.Tensor
    times: torch.Tensor

    def of(self, which: torch.Tensor | slice) -> Found:
        """Return those of some keys."""
        return Found(self.number, self.first[which], self.times[which])


class Places:
    """Of each key the records that have it, and at which row, in the order they were given.

    Args:
        keys: for each record the keys of its rows, padding left out.
        rows: which rows these are.
        records: the records' numbers.
    """

    def __init__(
        self,
        keys: Sequence[torch.Tensor],
        rows: Sequence[torch.Tensor],
        records: Sequence[int],
    ) -> None:
        counts = torch.tensor([len(one) for one in keys], dtype=torch.int64, device="cpu")
        nothing = torch.empty(0, dtype=torch.int64, device="cpu")
        every = torch.cat([nothing, *keys])
        numbers = torch.tensor(records, dtype=torch.int32, device="cpu")
        self.keys, order = every.sort(stable=True)
        self.record = numbers.repeat_interleave(counts)[order]
        self.row = torch.cat([nothing.to(torch.int32), *(one.to(torch.int32) for one in rows)])
        self.row = self.row[order]

    @classmethod
    def merged(cls, several: Sequence[Places]) -> Places:
        """Return several as one, in the order of the records' numbers."""
        found = cls((), (), ())
        record, row, keys = (
            torch.cat([getattr(one, name) for one in several]) for name in ("record", "row", "keys")
        )
        order = record.argsort(stable=True)
        found.keys, by_key = keys[order].sort(stable=True)
        found.record, found.row = record[order][by_key], row[order][by_key]
        return found

    def find(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `first` and `times` of some keys, as `Found` has them."""
        first, is_there = among(self.keys, keys)
        times = (is_there & (keys != UNKNOWN)).to(torch.int64)
        if not self._are_distinct:
            times *= torch.searchsorted(self.keys, keys, right=True) - first
        return first, times

    @cached_property
    def _are_distinct(self) -> bool:
        return bool((self.keys[1:] != self.keys[:-1]).all())


def real_rows(ids: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the rows that are no padding."""
    return real(ids).nonzero().flatten()
