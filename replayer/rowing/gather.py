"""Bring rows of records together, reading no more than these rows where that is less."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recorder.bits import as_bits, bytes_of
from recorder.errors import DamagedRecording, LayoutError
from recorder.format.payload import parse_dtype
from recorder.layouts.rowed import moved

from .records import Record, Source

_READ_WHOLE = 1 << 16
"""A record of fewer bytes is read, and checked, in one go; so is one of which half is needed."""


class Gathered:
    """Reads rows, and counts the records of which only a part was read, without its digest.

    Args:
        source: what records are read from.
        check: whether to hold what is read whole against its digest.
    """

    def __init__(self, source: Source, *, check: bool) -> None:
        self._source, self._check = source, check
        self.in_part: set[tuple[int, int, int]] = set()

    def rows(
        self, records: Sequence[Record], record: torch.Tensor, row: torch.Tensor
    ) -> torch.Tensor:
        """Return rows along the first group of records that have but one: [rows, other dims].

        Args:
            records: what `record` numbers; all of them of one part.
            record: of each row its record's number.
            row: its number there.

        Raises:
            LayoutError: the records are of several dtypes.
            DamagedRecording: they cannot be read.
        """
        first = records[int(record[0])] if len(record) else None
        if first is None:
            raise ValueError("no rows")
        dtype = parse_dtype(first.row["dtype"], "the manifest")
        rest = rest_of(first)
        made = torch.empty((len(record), *rest), dtype=dtype, device="cpu")
        order = torch.argsort(record, stable=True)
        numbers, counts = record[order].unique_consecutive(return_counts=True)
        at = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            places = order[at : at + count]
            self._fill(made, places, records[number], row[places])
            at += count
        return made

    def whole(self, record: Record) -> torch.Tensor:
        """Return a record with its groups of rows in front, each as one dim."""
        tensor = self._source.read(record.row, check=self._check)
        return moved(tensor, [group.at for group in record.groups])

    def _fill(
        self, made: torch.Tensor, places: torch.Tensor, record: Record, row: torch.Tensor
    ) -> None:
        """Put rows of one record where they belong."""
        about, group = record.row, record.groups[0]
        shape = about["shape"] or []
        if about["dtype"] != str(made.dtype).removeprefix("torch."):
            raise LayoutError(
                f"rank {about['rank']} recorded {about['dtype']} at step {about['step']} and "
                f"others {str(made.dtype).removeprefix('torch.')}"
            )
        each = math.prod(made.shape[1:]) * made.itemsize
        if math.prod(shape) * made.itemsize != about["nbytes"] or rest_of(record) != [
            *made.shape[1:]
        ]:
            raise DamagedRecording("the manifest", f"a record of {about['name']} has {shape}")
        size = about["nbytes"]
        is_whole = size <= _READ_WHOLE or 2 * each * len(row) >= size
        is_in_front = group.at == tuple(range(len(group.at)))
        if is_whole or not is_in_front:
            check = self._check and (is_whole or size <= 1 << 20)
            if not check:
                self._note(record)
            tensor = moved(self._source.read(about, check=check), [group.at])
            as_bits(made).index_copy_(
                0, places, as_bits(tensor).index_select(0, row.to(torch.int64))
            )
            return
        self._note(record)
        self._source.read_runs(about, list(_runs(made, places, row, each)))

    def _note(self, record: Record) -> None:
        if self._check:
            row = record.row
            self.in_part.add((row["rank"], row["attempt"], row["seq"]))


def rest_of(record: Record) -> list[int]:
    """Return the sizes of a record's dims that have no rows."""
    front = {i for group in record.groups for i in group.at}
    return [n for i, n in enumerate(record.row["shape"] or []) if i not in front]


def _runs(
    made: torch.Tensor, places: torch.Tensor, row: torch.Tensor, each: int
) -> list[tuple[int, memoryview]]:
    """Return runs of rows that stand side by side in a record and in what is made of them."""
    view = bytes_of(made)
    if not each or not len(row):
        return []
    row, order = row.to(torch.int64).sort()
    places = places[order]
    breaks = ((row[1:] != row[:-1] + 1) | (places[1:] != places[:-1] + 1)).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], len(row)]
    from_, into = row[starts].tolist(), places[starts].tolist()
    return [
        (one * each, view[other * each : (other + end - start) * each])
        for one, other, start, end in zip(from_, into, starts, ends, strict=True)
    ]
