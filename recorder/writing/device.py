"""Snapshots that leave a device behind the job's back.

1. The job's stream copies the tensor aside on the device (`DeviceCopies.start`): all that it is
   held for, and all that the job's thread asks of the device.
2. The thread that writes brings many on at once (`DeviceCopies.bring`): a stream of our own waits
   for them, and copies them into pinned memory.
3. Whoever needs the bytes waits for the event at the end of that copy; the device is not
   synchronised.

`Cuda` is what this needs of torch, a call each; tests put a fake in its place.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby, zip_longest
from typing import Any, Protocol

import torch

from ..diagnostics import say
from ..errors import CaptureError

_ASKED = 1 << 20  # bytes from which it is asked whether the device has room: it takes longer
_ASKED_AGAIN = 1.0  # seconds
_TOGETHER = 4 << 20  # bytes that are waited for at once
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Backend(Protocol):
    """The calls that start a copy and tell when it has ended."""

    out_of_memory: type[BaseException]

    def handles(self, device: torch.device) -> bool:
        """Whether this is for tensors on such a device."""

    def relaxed(self) -> AbstractContextManager[Any]:
        """Do inside what a capture in another thread forbids, and need not: of other streams."""

    def use(self, device: torch.device) -> None:
        """Let this thread work on a device from now on."""

    def has_room(self, device: torch.device, nbytes: int) -> bool:
        """Whether a device is likely to have memory for a copy without taking it from the job."""

    def was_full(self, device: torch.device) -> None:
        """Hear that a device had no room, whatever was foreseen."""

    def pin(self, address: int, nbytes: int) -> bool:
        """Page-lock memory of the host; return whether that worked."""

    def unpin(self, address: int) -> None:
        """Undo `pin`."""

    def new_stream(self, device: torch.device) -> Any:
        """Return a stream of our own on a device."""

    def current_stream(self, device: torch.device) -> Any:
        """Return the stream the job works on."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Enqueue on a stream what is inside."""

    def record(self, stream: Any) -> Any:
        """Return an event after everything enqueued on a stream so far."""

    def wait(self, stream: Any, event: Any) -> None:
        """Let a stream wait for an event; the host goes on."""

    def clone(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor on its device, on the current stream, into contiguous memory."""

    def copy(self, into: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
        """Copy tensors to the host on the current stream; the host goes on."""


class Cuda:
    """`Backend` by torch.cuda."""

    out_of_memory: type[BaseException] = torch.OutOfMemoryError

    def __init__(self) -> None:
        # When it was asked what is free on a device, and how much of that is left.
        self._free: dict[torch.device, tuple[float, int]] = {}

    def handles(self, device: torch.device) -> bool:
        """See `Backend`."""
        return device.type == "cuda"

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """See `Backend`."""
        exchange = _exchange_mode()
        mode = ctypes.c_int(_RELAXED)
        if exchange is not None:
            exchange(ctypes.byref(mode))
        try:
            yield
        finally:
            if exchange is not None:
                exchange(ctypes.byref(mode))

    def use(self, device: torch.device) -> None:
        """See `Backend`."""
        # Not just for as long as needed: to go back to device 0 would make a context there.
        torch.cuda.set_device(device)

    def has_room(self, device: torch.device, nbytes: int) -> bool:
        """See `Backend`."""
        if nbytes < _ASKED:
            return True
        now = time.monotonic()
        asked, free = self._free.get(device, (-_ASKED_AGAIN, 0))
        if now - asked >= _ASKED_AGAIN:
            free = torch.cuda.mem_get_info(device)[0]
            self._free[device] = now, free
        if nbytes <= free:
            self._free[device] = self._free[device][0], free - nbytes
            return True
        # What torch has and nobody uses: else it gives all of that back before it fails.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return nbytes <= idle

    def was_full(self, device: torch.device) -> None:
        """See `Backend`."""
        self._free[device] = time.monotonic(), 0

    def pin(self, address: int, nbytes: int) -> bool:
        """See `Backend`."""
        return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)) == 0

    def unpin(self, address: int) -> None:
        """See `Backend`."""
        torch.cuda.cudart().cudaHostUnregister(address)

    def new_stream(self, device: torch.device) -> Any:
        """See `Backend`."""
        return torch.cuda.Stream(device)

    def current_stream(self, device: torch.device) -> Any:
        """See `Backend`."""
        return torch.cuda.current_stream(device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """See `Backend`."""
        return torch.cuda.stream(stream)

    def record(self, stream: Any) -> Any:
        """See `Backend`."""
        # Blocking: whoever waits sleeps, and leaves the core to the job.
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """See `Backend`."""
        stream.wait_event(event)

    def clone(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Backend`."""
        with torch.no_grad():
            return tensor.clone(memory_format=torch.contiguous_format)

    def copy(self, into: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
        """See `Backend`."""
        torch._foreach_copy_(into, tensors, non_blocking=True)


@functools.cache
def _exchange_mode() -> Callable[[Any], int] | None:
    """Return the driver's call that says how this thread minds the captures of others."""
    try:
        exchange = ctypes.PyDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):  # another maker's device
        return None
    exchange.argtypes = (ctypes.POINTER(ctypes.c_int),)
    return exchange


class Copy:
    """A tensor on its way from a device.

    Attributes:
        aside: it, as it was, on the device; None once it has arrived.
        device: where that is.
        stream: the job's, on which it was made.
        ready: the event from which on it is there.
        done: the event from which on it is in the host's memory; None until it is being brought.
    """

    __slots__ = ("_backend", "aside", "device", "done", "ready", "stream")

    def __init__(self, backend: Backend, stream: Any, aside: torch.Tensor) -> None:
        self._backend = backend
        self.aside: torch.Tensor | None = aside
        self.device = aside.device
        self.stream = stream
        self.ready = backend.record(stream)
        self.done: Any = None

    def wait(self) -> None:
        """Return when it has arrived, or at once if nobody has begun to bring it."""
        if self.done is not None and self.aside is not None:
            with self._backend.relaxed():
                self.done.synchronize()
            self.aside = None


class DeviceCopies:
    """Copies from devices into a ring of the host's memory.

    Memory on the device: no more than the ring's, since every copy has its room there first. Where
    the device has none to spare, the job's stream is held for the copy to the host instead.
    """

    def __init__(self, backend: Backend | None = None) -> None:
        self._backend: Backend = backend or Cuda()
        self._streams: dict[torch.device, Any] = {}
        self._pinned: bool | None = None
        self._lock = threading.Lock()

    def handles(self, device: torch.device) -> bool:
        """Whether this is for tensors on such a device."""
        return self._backend.handles(device)

    def start(
        self, bits: torch.Tensor, into: Callable[[], torch.Tensor], arena: torch.Tensor
    ) -> Copy:
        """Copy `bits` aside on its device, to be brought to the host later.

        Args:
            bits: a tensor of any strides, on a device that this is for.
            into: returns the host's memory for it: its bytes as uint8.
            arena: the memory of which that is a part.

        Raises:
            CaptureError: the device has no memory left for what this takes.
        """
        backend = self._backend
        stream = backend.current_stream(bits.device)
        if backend.has_room(bits.device, bits.numel() * bits.element_size()):
            try:
                return Copy(backend, stream, backend.clone(bits))
            except backend.out_of_memory:
                backend.was_full(bits.device)
        if not bits.is_contiguous():
            raise CaptureError("the device has no memory left for a copy, and it is not contiguous")
        copy = Copy(backend, stream, bits)
        with backend.relaxed():
            self._bring([copy], [into()], arena)
        backend.wait(stream, copy.done)
        return copy

    def bring(self, copies: Sequence[tuple[Copy, torch.Tensor]], arena: torch.Tensor) -> None:
        """Bring to the host what was copied aside; from the thread that writes.

        Args:
            copies: each with the host's memory for it, its bytes as uint8.
            arena: the memory of which these are parts.
        """
        with self._backend.relaxed():
            for device, some in groupby(copies, lambda one: one[0].device):
                self._backend.use(device)
                few: list[Copy] = []
                places: list[torch.Tensor] = []
                size = 0
                for copy, into in some:
                    few.append(copy)
                    places.append(into)
                    size += into.numel()
                    if size >= _TOGETHER:
                        self._bring(few, places, arena)
                        few, places, size = [], [], 0
                if few:
                    self._bring(few, places, arena)

    def _bring(self, copies: list[Copy], into: list[torch.Tensor], arena: torch.Tensor) -> None:
        """Bring copies of one device, so many that they are waited for at once."""
        if self._pinned is None:
            self._pin(arena)
        backend = self._backend
        own = self._stream(copies[0].device)
        for copy, following in zip_longest(copies, copies[1:]):
            if following is None or copy.stream != following.stream:  # the last says it for all
                backend.wait(own, copy.ready)
        with backend.on(own):
            backend.copy(into, [_flat(copy.aside) for copy in copies])
        done = backend.record(own)
        for copy in copies:
            copy.done = done

    def settle(self) -> None:
        """Return when nothing is on its way into the host's memory."""
        with self._backend.relaxed():
            for stream in list(self._streams.values()):
                stream.synchronize()

    def close(self, arena: torch.Tensor) -> None:
        """Give the arena back as it was; no copy may be under way."""
        if self._pinned:
            with self._backend.relaxed():
                self._backend.unpin(arena.data_ptr())
        self._pinned = None

    def _stream(self, device: torch.device) -> Any:
        with self._lock:
            if device not in self._streams:
                self._streams[device] = self._backend.new_stream(device)
            return self._streams[device]

    def _pin(self, arena: torch.Tensor) -> None:
        with self._lock:
            if self._pinned is not None:
                return
            try:
                self._pinned = self._backend.pin(arena.data_ptr(), arena.numel())
            except RuntimeError:
                self._pinned = False
            if not self._pinned:
                say("the staging memory cannot be pinned, so that copies from the device are slow")


def _flat(aside: torch.Tensor | None) -> torch.Tensor:
    assert aside is not None  # nobody has waited for it yet
    return aside.detach().view(-1).view(torch.uint8)
