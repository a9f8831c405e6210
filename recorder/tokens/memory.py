"""Memory for the sums of many requests: one tensor, cut into blocks that are used again.

The sums of a request's prefixes lie in one block: first that of the empty prefix, which is its
salt's seed, then one for each token. Three numbers say where: where the block begins, where the
last sum is, and where the block ends.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

_SMALLEST = 64  # sums


class Memory:
    """Slots, numbered from 0, each with a block of sums that grows.

    Attributes:
        sums: of all blocks, int64; another tensor once there had to be more.
        base: where the block of each slot begins in it, [slots]; this and the next two likewise.
        at: where its last sum is.
        end: where its block ends.
    """

    def __init__(self) -> None:
        self.sums = _room_for(1024)
        self.base, self.at, self.end = (_room_for(64) for _ in range(3))
        self._used = 0
        self._blocks: dict[int, list[int]] = {}  # by size: where those begin that are free
        self._slots = 0
        self._free: list[int] = []

    def open(self, seeds: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Return slots that each hold a seed, with room for so many sums at least."""
        slots, blocks = [], []
        for size in sizes:
            if self._free:
                slots.append(self._free.pop())
            else:
                slots.append(self._slots)
                self._slots += 1
            blocks.append(self._take(size))
        if self._slots > len(self.base):
            tables = (_grown(one, self._slots) for one in (self.base, self.at, self.end))
            self.base, self.at, self.end = tables
        index, begins = listed(slots), listed([begin for begin, _ in blocks])
        self.base[index] = begins
        self.at[index] = begins
        self.end[index] = listed([sum(block) for block in blocks])
        self.sums[begins] = listed(seeds)
        return slots

    def grow(self, slots: torch.Tensor, sizes: torch.Tensor) -> None:
        """Give slots room for so many sums at least, more than they have; all [slots]."""
        held = torch.stack([one[slots] for one in (self.base, self.at, self.end)], 1)
        begins, ats, ends = [], [], []
        for (base, at, end), least in zip(held.tolist(), sizes.tolist(), strict=True):
            begin, size = self._take(least)
            used = at + 1 - base
            self.sums[begin : begin + used] = self.sums[base : at + 1]
            self._give(base, end - base)
            begins.append(begin)
            ats.append(begin + used - 1)
            ends.append(begin + size)
        self.base[slots], self.at[slots], self.end[slots] = map(listed, (begins, ats, ends))

    def close(self, slot: int) -> None:
        """Take a slot back, and its block."""
        base, end = int(self.base[slot]), int(self.end[slot])
        self._give(base, end - base)
        self._free.append(slot)

    def last(self, slot: int) -> tuple[int, int]:
        """Return a slot's last sum, as int64, and how many there are besides the seed."""
        base, at = int(self.base[slot]), int(self.at[slot])
        return int(self.sums[at]), at - base

    def _take(self, least: int) -> tuple[int, int]:
        """Return where a block begins, and its size: a power of two."""
        size = max(_SMALLEST, 1 << (least - 1).bit_length())
        free = self._blocks.get(size)
        if free:
            return free.pop(), size
        begin, self._used = self._used, self._used + size
        if self._used > len(self.sums):
            self.sums = _grown(self.sums, self._used)
        return begin, size

    def _give(self, begin: int, size: int) -> None:
        self._blocks.setdefault(size, []).append(begin)


def listed(values: Sequence[int]) -> torch.Tensor:
    """Return integers as int64 on the CPU, in a tenth of the time that `torch.tensor` takes."""
    if not values:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    buffer = bytearray(8 * len(values))
    struct.pack_into(f"{len(values)}q", buffer, 0, *values)
    return torch.frombuffer(buffer, dtype=torch.int64)


def _room_for(size: int) -> torch.Tensor:
    """Return zeros that may be written whatever mode the job is in later."""
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=torch.int64, device="cpu")


def _grown(old: torch.Tensor, least: int) -> torch.Tensor:
    """Return a tensor that begins as another, twice its size, or larger if that is too small."""
    found = _room_for(max(least, 2 * len(old)))
    found[: len(old)] = old
    return found
