"""Where the payloads of records lie, and what they are: as arrays, found out once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch

from recorder.errors import DamagedRecording
from recorder.format.payload import parse_dtype

from .held import Record, Source


class Where:
    """Of some records, what their payloads are and where.

    Args:
        every: the records.
    """

    def __init__(self, every: Sequence[Record]) -> None:
        self._every = every
        self._found: set[int] = set()
        self._numbers: dict[Path, int] = {}
        self.paths: list[Path] = []
        self.file = torch.zeros(len(every), dtype=torch.int64, device="cpu")
        self.offset = torch.zeros(len(every), dtype=torch.int64, device="cpu")

    @cached_property
    def nbytes(self) -> torch.Tensor:
        """The bytes of each, int64.

        Raises:
            DamagedRecording: the manifest contradicts itself.
        """
        found = []
        for one in self._every:
            row = one.row
            itemsize = parse_dtype(row["dtype"], "the manifest").itemsize
            size = math.prod(row["shape"] or ()) * itemsize
            if size != row["nbytes"]:
                raise DamagedRecording(
                    "the manifest",
                    f"{row['name']} of {size} bytes is said to have {row['nbytes']}",
                )
            found.append(size)
        return torch.tensor(found, dtype=torch.int64, device="cpu")

    @cached_property
    def in_front(self) -> torch.Tensor:
        """Whether a row of each is one run of bytes: its dims of rows are the first. Bool."""
        return torch.tensor(
            [one.groups[0].at == tuple(range(len(one.groups[0].at))) for one in self._every],
            device="cpu",
        )

    @cached_property
    def dtype(self) -> torch.Tensor:
        """A number for the dtype of each, int64."""
        return _coded(one.row["dtype"] for one in self._every)

    @cached_property
    def content(self) -> torch.Tensor:
        """A number for the digest of each and how it is laid out, int64."""
        return _coded((one.row["digest"], one.row["dims"] or "") for one in self._every)

    def find(self, numbers: Sequence[int], source: Source) -> None:
        """Fill `file` and `offset` for some records.

        Raises:
            DamagedRecording: a shard's header does not hold what it should.
        """
        for number in numbers:
            if number in self._found:
                continue
            path, place = source.place_of(self._every[number].row)
            at = self._numbers.get(path)
            if at is None:
                at = self._numbers[path] = len(self.paths)
                self.paths.append(path)
            self.file[number], self.offset[number] = at, place.offset
            self._found.add(number)


def _coded(values: Iterable[Hashable]) -> torch.Tensor:
    """Return numbers, the same for the same values: int64."""
    codes: dict[Hashable, int] = {}
    found = [codes.setdefault(value, len(codes)) for value in values]
    return torch.tensor(found, dtype=torch.int64, device="cpu")
