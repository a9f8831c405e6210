"""Bring rows of records together, reading no more than these rows where that is less.

1. `Gathered.rows` tells the records of which rows are read from those that are read whole: in which
   much is needed, or whose rows are no runs of bytes.
2. Of the former, runs of rows are read file by file, wherever in it they lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

import torch

from recorder.bits import as_bits, bytes_of, owns_memory
from recorder.errors import LayoutError
from recorder.format.payload import parse_dtype
from recorder.layouts.rowed import moved

from .held import Record, Source, rest_of
from .records import Records

_READ_WHOLE = 1 << 16
"""A record of fewer bytes is read, and checked, in one go; so is one of which half is needed."""
_CHECKED = 1 << 20
"""One of more bytes, little of which is needed, is not."""
_KEPT_FROM, _MOST_KEPT = 1 << 20, 64 << 20
_kept: list[torch.Tensor] = []
"""Memory to read into: one piece, or one for each thread that reads at the same time."""


class Gathered:
    """Reads rows, and notes the records of which only a part was read, without its digest.

    Args:
        source: what records are read from.
        records: the records.
        check: whether to hold what is read whole against its digest.
    """

    def __init__(self, source: Source, records: Records, *, check: bool) -> None:
        self._source, self._every, self._check = source, records.every, check
        self._where = records.where
        self.in_part: set[int] = set()

    def rows(self, record: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Return rows along the first group of records that have but one: [rows, other dims].

        Args:
            record: of each row its record's number; all of them of one part.
            row: its number there.

        Raises:
            LayoutError: the records are of several dtypes.
            DamagedRecording: they cannot be read.
        """
        where, row = self._where, row.to(torch.int64)
        numbers, at, counts = record.unique(return_inverse=True, return_counts=True)
        first = self._every[int(numbers[0])]
        odd = (where.dtype[numbers] != where.dtype[numbers[0]]).nonzero().flatten()
        if len(odd):
            raise _several_dtypes(first, self._every[int(numbers[odd[0]])])
        dtype = parse_dtype(first.row["dtype"], "the manifest")
        rest = rest_of(first)
        made = unfilled((len(record), *rest), dtype)
        each = math.prod(rest) * made.itemsize
        nbytes, in_front = where.nbytes[numbers], where.in_front[numbers]
        is_most = 2 * each * counts >= nbytes
        is_whole = (nbytes <= _READ_WHOLE) | is_most | ~in_front
        if bool(is_whole.any()):
            self._read_whole(made, numbers, is_whole, at, row, (nbytes > _CHECKED) & ~is_most)
        if not bool(is_whole.all()) and each:
            if self._check:
                self.in_part.update(numbers[~is_whole].tolist())
            where.find(numbers[~is_whole].tolist(), self._source)
            places = (~is_whole[at]).nonzero().flatten()
            self._read_rows(made, places, record[places].to(torch.int64), row[places], each)
        return made

    def whole(self, record: Record) -> torch.Tensor:
        """Return a record with its groups of rows in front, each as one dim."""
        tensor = self._source.read(record.row, check=self._check)
        return moved(tensor, [group.at for group in record.groups])

    def _read_whole(
        self,
        made: torch.Tensor,
        numbers: torch.Tensor,
        is_whole: torch.Tensor,
        at: torch.Tensor,
        row: torch.Tensor,
        is_unchecked: torch.Tensor,
    ) -> None:
        """Put the rows of records that are read whole where they belong."""
        order = at.argsort(stable=True)
        ends = torch.searchsorted(at[order], torch.arange(len(numbers) + 1, device="cpu")).tolist()
        for i in is_whole.nonzero().flatten().tolist():
            number, places = int(numbers[i]), order[ends[i] : ends[i + 1]]
            check = self._check and not bool(is_unchecked[i])
            if self._check and not check:
                self.in_part.add(number)
            one = self._every[number]
            tensor = moved(self._source.read(one.row, check=check), [one.groups[0].at])
            as_bits(made).index_copy_(0, places, as_bits(tensor).index_select(0, row[places]))

    def _read_rows(
        self,
        made: torch.Tensor,
        places: torch.Tensor,
        record: torch.Tensor,
        row: torch.Tensor,
        each: int,
    ) -> None:
        """Read rows where they lie, in runs that stand side by side there and in what is made."""
        where = self._where
        file, offset = where.file[record], where.offset[record] + row * each
        order = offset.argsort()
        order = order[file[order].argsort(stable=True)]
        file, offset, places = file[order], offset[order], places[order]
        is_next = (
            (file[1:] == file[:-1])
            & (offset[1:] == offset[:-1] + each)
            & (places[1:] == places[:-1] + 1)
        )
        first = torch.cat([order.new_zeros(1), (~is_next).nonzero().flatten() + 1])
        sizes = first.diff(append=first.new_tensor([len(places)])) * each
        begin = places[first] * each
        runs = zip(offset[first].tolist(), begin.tolist(), (begin + sizes).tolist(), strict=True)
        into = bytes_of(made)
        files, counts = file[first].unique_consecutive(return_counts=True)
        for number, count in zip(files.tolist(), counts.tolist(), strict=True):
            self._source.read_runs(where.paths[number], into, islice(runs, count))


def unfilled(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor to read into; a large one has the memory of the last, if that is free again.

    The system hands out fresh memory page by page, which takes longer than to fill it.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if not _KEPT_FROM <= nbytes <= _MOST_KEPT:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    memory = None
    with suppress(IndexError):
        memory = _kept.pop()
    if memory is None or memory.nbytes < nbytes or not owns_memory(memory):
        with torch.inference_mode(False):  # which may be over when this is read into again
            memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    made = memory[:nbytes].view(dtype).view(tuple(shape))
    _kept.append(memory)  # only now: another thread sees that it is taken
    return made


def _several_dtypes(one: Record, other: Record) -> LayoutError:
    return LayoutError(
        f"rank {other.row['rank']} recorded {other.row['dtype']} at step {other.row['step']} and "
        f"rank {one.row['rank']} {one.row['dtype']} at step {one.row['step']}"
    )
