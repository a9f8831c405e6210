"""What a cache of a batch holds: for each row and column, the prefix that ends there.

A `Past` is as long as the cache that it is of, and never changes. Those that follow one another
share memory, so that a step costs its own columns alone.
"""

from __future__ import annotations

import torch

_SMALLEST = 64  # columns
SUMS, NUMBERS, REAL = range(3)


class _Memory:
    """Sums, numbers, and 1 where no padding is, [3, rows, columns]; from `used` on all is free."""

    def __init__(self, rows: int, columns: int) -> None:
        with torch.inference_mode(False):
            size = max(_SMALLEST, columns)
            self.held = torch.zeros(3, rows, size, dtype=torch.int64, device="cpu")
        self.used = 0


class Past:
    """The prefixes of a batch.

    Attributes:
        length: how many columns it has, padding too.
    """

    def __init__(
        self, memory: _Memory, length: int, ends: tuple[list[int], list[int]] | None = None
    ) -> None:
        self._memory, self.length, self._ends = memory, length, ends

    @classmethod
    def of(cls, columns: torch.Tensor, ends: tuple[list[int], list[int]] | None = None) -> Past:
        """Return the past that has these columns alone; see `then`."""
        _, rows, count = columns.shape
        return cls(_Memory(rows, 2 * count), 0).then(columns, ends)

    @property
    def rows(self) -> int:
        """How many sequences it has."""
        return self._memory.held.shape[1]

    @property
    def held(self) -> torch.Tensor:
        """What it holds, [3, rows, length].

        The sum of each prefix; how many tokens that has, -1 where it was never seen; and 1 where
        the column is no padding, 0 where it is.
        """
        return self._memory.held[:, :, : self.length]

    @property
    def ends(self) -> tuple[list[int], list[int]]:
        """The last column's sums and numbers."""
        if self._ends is None:
            sums, numbers, _ = self._memory.held[:, :, self.length - 1].tolist()
            self._ends = sums, numbers
        return self._ends

    def then(self, columns: torch.Tensor, ends: tuple[list[int], list[int]] | None = None) -> Past:
        """Return what it is with more columns.

        Args:
            columns: as `held` is, [3, rows, columns].
            ends: their last sums and numbers, where these are known.
        """
        end = self.length + columns.shape[2]
        memory = self._memory
        if memory.used != self.length or end > memory.held.shape[2]:  # others went on from here
            memory = _Memory(self.rows, 2 * end)
            memory.held[:, :, : self.length] = self.held
        memory.held[:, :, self.length : end] = columns
        memory.used = end
        return Past(memory, end, ends)

    def cut(self, length: int) -> Past:
        """Return its first columns."""
        return self if length == self.length else Past(self._memory, length)

    def chosen(self, rows: torch.Tensor) -> Past:
        """Return it with these of its rows, in this order."""
        return Past.of(self.held[:, rows])
