"""Snapshots that leave a device behind the job's back.

1. The job's stream copies the tensor aside on the device: all that it is held for.
2. A stream of our own waits for that, and copies it on into pinned memory, while the job goes on.
3. Whoever needs the bytes waits for the event at the end of that copy; the device is not
   synchronised.

`Cuda` is what this needs of torch, a call each; tests put a fake in its place.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ..diagnostics import say


class Backend(Protocol):
    """The calls that start a copy and tell when it has ended."""

    out_of_memory: type[BaseException]

    def handles(self, device: torch.device) -> bool:
        """Whether this is for tensors on such a device."""

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

    def copy(self, into: torch.Tensor, tensor: torch.Tensor) -> None:
        """Copy to the host on the current stream; the host goes on."""

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Reuse a tensor's memory only after what is enqueued on a stream now."""


class Cuda:
    """`Backend` by torch.cuda."""

    out_of_memory: type[BaseException] = torch.OutOfMemoryError

    def handles(self, device: torch.device) -> bool:
        """See `Backend`."""
        return device.type == "cuda"

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
        return tensor.clone(memory_format=torch.contiguous_format)

    def copy(self, into: torch.Tensor, tensor: torch.Tensor) -> None:
        """See `Backend`."""
        into.copy_(tensor, non_blocking=True)

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """See `Backend`."""
        tensor.record_stream(stream)


class _Arrival:
    """A copy under way; its end is waited for once."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        event = self._event
        if event is not None:
            event.synchronize()
            self._event = None


class DeviceCopies:
    """Starts copies from devices into a ring of the host's memory.

    Memory on the device: no more than the ring's, since every copy has its room there first. Where
    the device has none to spare, the job's stream is held for the copy to the host instead.
    """

    def __init__(self, backend: Backend | None = None) -> None:
        self._backend: Backend = backend or Cuda()
        self._streams: dict[torch.device, Any] = {}
        self._pinned: bool | None = None
        self._lock = threading.Lock()

    def start(self, bits: torch.Tensor, into: torch.Tensor, arena: torch.Tensor) -> _Arrival | None:
        """Start copying `bits` into a part of the arena; return what to wait for, if anything.

        Args:
            bits: a tensor of any strides, on any device.
            into: the host's memory for it: its shape and dtype, contiguous.
            arena: the memory `into` is a part of; pinned on the first call.
        """
        if not self._backend.handles(bits.device):
            into.copy_(bits)
            return None
        if self._pinned is None:
            self._pin(arena)
        backend = self._backend
        current, own = backend.current_stream(bits.device), self._stream(bits.device)
        try:
            aside: torch.Tensor | None = backend.clone(bits)
        except backend.out_of_memory:
            aside = None
        backend.wait(own, backend.record(current))
        with backend.on(own):
            backend.copy(into, bits if aside is None else aside)
        done = backend.record(own)
        if aside is None:
            backend.wait(current, done)
        else:
            backend.keep(aside, own)
        return _Arrival(done)

    def close(self, arena: torch.Tensor) -> None:
        """Give the arena back as it was; no copy may be under way."""
        if self._pinned:
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
                say("the staging memory cannot be pinned, so that taps wait for their copies")
