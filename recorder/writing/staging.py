"""The memory that snapshots wait in until they are written: allocated once, touched once, reused.

1. `Staging.put` finds room in a ring of bytes and copies a payload into it, or a part of one.
2. What comes from a device is only copied aside there; `Staging.bring` has it come.
3. Whoever needs the bytes reads `Staging.view` or `Staging.tensor`, once `Part.wait` has returned.
4. When its last user has released a part, its room is free again, in the order of the puts.
5. Who reads a part beside its users (`Staging.lend`) has it until the room is needed: it is taken
   back then, and what was made of it since is of no use.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..bits import plainly
from .device import Copy, DeviceCopies

_ALIGNMENT = 64
_SMALL = 64 << 10  # faster copied than the interpreter is given away and taken back
_WARM_FROM = 1 << 20
_WARM_STEP = 8 << 20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; `mmap` has no name for it yet
_LOOKED_AGAIN = 0.02  # seconds: that a part is needed no more, but lent, is not told
_PARTS = 4_096  # rows take memory too, however small their payloads


class Part:
    """A staged payload, or a part of one: bytes in the ring.

    Attributes:
        offset: where they lie.
        nbytes: how many.
        size: the room they take.
        users: how many still need them.
        is_lent: whether somebody reads them beside those.
        is_taken_back: whether they may have changed under whoever they were lent to.
        arrival: the copy that brings them, or None where they are there already.
        payload: what they are of, as whoever put them in says.
        first: whether they begin it.
        last: whether they end it.
    """

    # One object for all of it: each that lives on is one more for the garbage collector to visit.
    __slots__ = (
        "arrival",
        "first",
        "is_lent",
        "is_taken_back",
        "last",
        "nbytes",
        "offset",
        "payload",
        "size",
        "users",
    )

    def __init__(self, offset: int, nbytes: int, size: int, users: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.size = size
        self.users = users
        self.arrival: Copy | None = None
        self.payload: Any = None
        self.first = self.last = True
        self.is_lent = self.is_taken_back = False

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its payload."""
        return self.first and self.last

    def wait(self) -> None:
        """Return when the bytes are there."""
        if self.arrival is not None:
            self.arrival.wait()


class Staging:
    """A ring of bytes. One thread at a time may put, any may release.

    Whoever puts gives the part its payload before the next put: one without was interrupted.

    While nothing waits, the ring starts over at its warm beginning.

    Args:
        budget: its size in bytes.
        copies: brings tensors from devices; see `device`.
        on_short: called when there is no room, before it is waited for or given up on.
        patience: seconds in which something that is lent has to be given back; else what is lent is
            taken back as its room is needed.
    """

    def __init__(
        self,
        budget: int,
        copies: DeviceCopies | None = None,
        on_short: Callable[[], None] | None = None,
        patience: float = 0.0,
    ) -> None:
        self._patience = patience
        self._given_back = 0.0
        self._lent = 0
        self.budget = max(4 * _ALIGNMENT, budget)
        self.backlog = 0
        self.held_seconds = 0.0
        self._copies = copies or DeviceCopies()
        self._on_short = on_short
        # Held as a lock, never through the condition: that one enters and leaves in Python, where a
        # signal handler's exception can come while the lock is taken and nobody is to release it.
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting: deque[Part] = deque()
        self._last: Part | None = None
        self._head = 0
        self._closed = False
        self._bytes, self._arena, self._address = _allocate(self.budget)
        self._is_warm = False

    @property
    def largest(self) -> int:
        """The most bytes that one `put` takes of the CPU's memory."""
        return self.budget // 4

    def largest_on(self, device: torch.device) -> int:
        """Return the most bytes that one `put` takes of a tensor."""
        # Each part costs calls on a device; on the CPU, one is written while the next is copied.
        return self.budget // 2 if self._copies.handles(device) else self.largest

    def put_bytes(
        self, address: int, nbytes: int, users: int, *, hold: bool, within: float = math.inf
    ) -> Part | None:
        """Copy bytes of the CPU's memory in; as `put`."""
        part = self._reserve(nbytes, users, hold, within)
        if part is not None and nbytes:
            move = _move_holding if nbytes <= _SMALL else ctypes.memmove
            move(self._address + part.offset, address, nbytes)
        return part

    def put(
        self, bits: torch.Tensor, users: int, *, hold: bool, within: float = math.inf
    ) -> Part | None:
        """Copy a tensor in, its elements in their logical order.

        Args:
            bits: a tensor of any strides, on any device.
            users: how many will release the part.
            hold: wait while there is no room.
            within: for no more than so many seconds.

        Returns:
            The part; None once the ring is closed, or where it is full and not to be waited for.

        Raises:
            CaptureError: its device has no memory left for what this takes.
        """
        nbytes = bits.numel() * bits.element_size()
        part = self._reserve(nbytes, users, hold, within)
        if part is None or nbytes == 0:
            return part
        if self._copies.handles(bits.device):
            part.arrival = self._copies.start(bits, lambda: self._place(part), self._arena)
        else:
            self._place(part).view(bits.dtype).view(bits.shape).copy_(bits)
        return part

    def bring(self, parts: Sequence[Part], following: deque[Part] | None = None) -> None:
        """Have parts come that were only copied aside on their devices.

        Args:
            parts: some that were put and have their payload.
            following: more of them, to come meanwhile; looked at only where some of `parts` came.
        """
        if not any(part.arrival is not None for part in parts):
            return
        copies = [
            (part.arrival, self._place(part))
            for part in (*parts, *(following.copy() if following else ()))
            if part.arrival is not None and part.arrival.done is None
        ]
        self._copies.bring(copies, self._arena)

    def _place(self, part: Part) -> torch.Tensor:
        """Return a part's memory as a tensor of uint8."""
        return self._arena[part.offset : part.offset + part.nbytes]

    def view(self, part: Part) -> memoryview:
        """Return staged bytes without copying them."""
        return self._bytes[part.offset : part.offset + part.nbytes]

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return a part of the ring as a tensor of uint8, without copying it."""
        return self._arena[offset : offset + nbytes]

    def release(self, parts: Iterable[Part]) -> None:
        """Let one user go of each of some parts."""
        with self._lock:
            for part in parts:
                part.users -= 1
            self._free_released()

    def lend(self, parts: Sequence[Part]) -> None:
        """Let somebody read some parts until they are given back, or the room is needed."""
        with self._lock:
            if not self._lent:
                self._given_back = time.monotonic()
            for part in parts:
                part.is_lent = True
            self._lent += len(parts)

    def give_back(self, parts: Iterable[Part]) -> None:
        """Note that what was lent is not read any more."""
        with self._lock:
            self._given_back = time.monotonic()
            for part in parts:
                self._lent -= part.is_lent
                part.is_lent = False
            self._free_released()

    def _room_of_lent(self, size: int) -> int | None:
        """Take back what is lent and needed by nobody else, until there is room; return where."""
        if time.monotonic() - self._given_back < self._patience:
            return None
        while self._waiting and self._waiting[0].is_lent and self._waiting[0].users <= 0:
            part = self._waiting[0]
            part.is_lent, part.is_taken_back = False, True
            self._lent -= 1
            self._free_released()
            offset = self._find(size)
            if offset is not None:
                return offset
        return None

    def _free_released(self) -> None:
        freed = False
        while self._waiting and self._waiting[0].users <= 0 and not self._waiting[0].is_lent:
            self.backlog -= self._waiting.popleft().size
            freed = True
        if freed:
            self._room.notify_all()

    def warm_up(self, largest: int) -> None:
        """Touch the whole ring, once, behind the job's back: a fresh page costs more than a copy.

        Args:
            largest: bytes of the largest payload so far; small ones are not worth it.
        """
        if self._is_warm or largest < _WARM_FROM:
            return
        self._is_warm = True
        populate = getattr(ctypes.CDLL(None), "madvise", None)
        if populate is None or sys.platform != "linux":
            return
        start = -(-self._address // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (self._address + self.budget) // mmap.PAGESIZE * mmap.PAGESIZE
        for at in range(start, end, _WARM_STEP):  # in steps: others may want to map memory
            size = min(_WARM_STEP, end - at)
            if self._closed or populate(
                ctypes.c_void_p(at), ctypes.c_size_t(size), _POPULATE_WRITE
            ):
                return

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._lock:
            self._closed = True
            self._room.notify_all()

    def free(self) -> None:
        """Let go of the memory, once every copy into it has ended; none may follow."""
        self.close()
        with self._lock:
            for part in self._waiting:
                part.wait()
            self._waiting.clear()
        self._copies.close(self._arena)
        self._bytes, self._arena = memoryview(b""), self._arena[:0].clone()

    def _reserve(self, nbytes: int, users: int, hold: bool, within: float) -> Part | None:
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT or _ALIGNMENT
        with self._lock:
            if self._last is not None and self._last.payload is None:
                # An interrupt came before anybody took it on; nobody will release it.
                self._copies.settle()
                self._last.users = 0
                self._free_released()
                self.backlog = sum(part.size for part in self._waiting)
            offset = self._find(size)
            if offset is None:
                offset = self._room_of_lent(size)
            if offset is None and self._on_short is not None:
                self._on_short()
            if offset is None and hold and within > 0 and not self._closed:
                started = time.perf_counter()
                while offset is None and not self._closed:
                    left = within - (time.perf_counter() - started)
                    if left <= 0:
                        break
                    self._room.wait(min(_LOOKED_AGAIN, left))
                    offset = self._find(size)
                    if offset is None:
                        offset = self._room_of_lent(size)
                self.held_seconds += time.perf_counter() - started
            if self._closed or offset is None:
                return None
            part = Part(offset, nbytes, size, users)
            self._last = part
            self._waiting.append(part)
            self.backlog += size
            self._head = offset + size
            return part

    def _find(self, size: int) -> int | None:
        if not self._waiting:
            return 0 if size <= self.budget else None
        if len(self._waiting) >= _PARTS:
            return None
        tail = self._waiting[0].offset
        if self._head > tail:
            if self._head + size <= self.budget:
                return self._head
            return 0 if size < tail else None
        return self._head if self._head + size < tail else None


def _allocate(budget: int) -> tuple[memoryview, torch.Tensor, int]:
    """Return fresh memory as bytes, as a tensor of uint8, and its address."""
    memory = mmap.mmap(-1, budget, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)  # fewer faults, where the system has huge pages
        except OSError:
            pass
    with plainly():
        arena = torch.frombuffer(memory, dtype=torch.uint8)
    return memoryview(memory), arena, arena.data_ptr()


def _holding_memmove() -> Any:
    """Return a memmove that keeps the interpreter: for few bytes, to give it away costs more."""
    move = ctypes.PyDLL(None).memmove
    move.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    move.restype = None
    return move


_move_holding = _holding_memmove()
