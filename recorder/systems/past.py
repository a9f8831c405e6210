"""What a cache of a batch holds: for each row and column, the prefix that ends there.

A `Past` is as long as the cache that it is of, and never changes. Those that follow one another
share memory, so that a step costs its own columns alone.
"""

from __future__ import annotations

import torch

_SMALLEST = 64  # columns


class _Memory:
    """Sums, numbers and what is padding, [rows, columns]; columns from `used` on are free."""

    def __init__(self, rows: int, columns: int) -> None:
        size = max(_SMALLEST, columns)
        with torch.inference_mode(False):
            self.sums = torch.zeros(rows, size, dtype=torch.int64, device="cpu")
            self.numbers = torch.zeros(rows, size, dtype=torch.int64, device="cpu")
            self.real = torch.zeros(rows, size, dtype=torch.bool, device="cpu")
        self.used = 0


class Past:
    """The prefixes of a batch.

    Attributes:
        length: how many columns it has, padding too.
    """

    def __init__(self, memory: _Memory, length: int) -> None:
        self._memory, self.length = memory, length

    @classmethod
    def of(cls, sums: torch.Tensor, numbers: torch.Tensor, real: torch.Tensor) -> Past:
        """Return the past that has these columns alone."""
        rows, columns = sums.shape
        return cls(_Memory(rows, 2 * columns), 0).then(sums, numbers, real)

    @property
    def rows(self) -> int:
        """How many sequences it has."""
        return len(self._memory.sums)

    @property
    def sums(self) -> torch.Tensor:
        """The sum of each prefix, [rows, length]."""
        return self._memory.sums[:, : self.length]

    @property
    def numbers(self) -> torch.Tensor:
        """How many tokens it has, [rows, length]; -1 where that was never seen."""
        return self._memory.numbers[:, : self.length]

    @property
    def real(self) -> torch.Tensor:
        """Which columns are no padding, [rows, length]."""
        return self._memory.real[:, : self.length]

    def then(self, sums: torch.Tensor, numbers: torch.Tensor, real: torch.Tensor) -> Past:
        """Return what it is with more columns, each [rows, columns]."""
        end = self.length + sums.shape[1]
        memory = self._memory
        if memory.used != self.length or end > memory.sums.shape[1]:  # others went on from here
            memory = _Memory(self.rows, 2 * end)
            memory.sums[:, : self.length] = self.sums
            memory.numbers[:, : self.length] = self.numbers
            memory.real[:, : self.length] = self.real
        memory.sums[:, self.length : end] = sums
        memory.numbers[:, self.length : end] = numbers
        memory.real[:, self.length : end] = real
        memory.used = end
        return Past(memory, end)

    def cut(self, length: int) -> Past:
        """Return its first columns."""
        return self if length == self.length else Past(self._memory, length)

    def chosen(self, rows: torch.Tensor) -> Past:
        """Return it with these of its rows, in this order."""
        return Past.of(self.sums[rows], self.numbers[rows], self.real[rows])
