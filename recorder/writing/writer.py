"""Takes snapshots off the job's hands: staging memory in front, a thread behind.

1. `submit` (any thread of the job) copies a payload into the staging ring, in parts if it is large,
   and queues its row. It wakes nobody while the thread is at work or about to look.
2. The thread lets a burst pass, then takes all that has queued up: each payload goes to the
   `Store`, and beside it to the `Summaries`.
3. What the store has flushed is safe; statistics follow in lines of their own, or, where the shard
   is sealed by then, in its manifest. Nothing waits for them but the end, and that not for good.

The thread calls for the interpreter rarely and for short: a job busy with Python gives it away only
every 5 ms. Failure of any write ends the recording at the last row that is safe; the job never
notices.

Known limit: rows of a job killed before their statistics came have none, nor have those whose room
was needed before.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..bits import as_bits, pieces
from ..capture import Snapshot
from ..errors import CaptureError, LimitReached
from ..format.schema import ManifestRow
from ..progress import SECONDS, Progress
from ..settings import RecordSettings
from ..taps.signals import let_interrupts_through
from .staging import Part, Staging
from .store import Limits, Payload, Store
from .summaries import Summaries

_WORKING_BYTES = 64 << 20  # what is in hand: rows, chunks as float64, a part of the manifest
_GATHER_SECONDS = 0.05  # lets a burst of taps pass before work begins beside it
_BATCH_BYTES = 32 << 20  # what is made safe in one go
_OLDEST_SECONDS = 0.5  # taps wait, or are dropped, while something older than this is not yet safe
_LARGE_BYTES = 1 << 20
_RELEASED_BYTES = 4 << 20
_RELEASED_PARTS = 512
_HELD_SECONDS = 0.1  # held for longer than this in all, the job's owner hears of it
_RATE_SECONDS = 1.0
_GRACE_SECONDS = 2.0
CUT_SHORT = (
    "an interrupt came while it was being closed, and what still waited to be written is left out; "
    "let it be closed to have all of it"
)
_HANDLER_SECONDS = 4.0
_STEP_SECONDS = 60.0  # a step that takes longer is several to `max_hold`
_SPARE_CORES = 3  # the job and the writing have one each
_FIGURES_SECONDS = 5.0  # in which no statistics come: then they are not waited for any more


class Writer:
    """Writes one rank's recording from a thread of its own.

    Args:
        folder: the rank's folder; exists.
        attempt: the number in this attempt's file names.
        limits: what to write, and how.
        statistics: whether to gather them.
        budget: bytes of staging memory, of which a part is for working on what waits.
        when_full: what to do with a tap when there is no room: `hold` the job, or `drop` the tap.
        max_hold: seconds that the job may be held in a step; by default as long as it takes.
        on_stop: called once, from the writer's thread, when recording had to end early, with the
            state (`stopped` or `failed`) and the reason.
        on_full: called once, when the job was held or a tap dropped for want of room.
        on_progress: called now and then, from the writer's thread, while there is work.
    """

    def __init__(
        self,
        folder: Path,
        attempt: int,
        limits: Limits = Limits(),  # noqa: B008  # nobody can change it
        *,
        statistics: bool = True,
        budget: int = RecordSettings.staging,
        when_full: str = "hold",
        max_hold: float | None = None,
        on_stop: Callable[[str, str], None] | None = None,
        on_full: Callable[[Progress], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._on_stop = on_stop or (lambda state, reason: None)
        self._on_full = on_full
        self._on_progress = on_progress
        self._published = time.monotonic()
        self._hold = when_full == "hold"
        self._max_hold = math.inf if max_hold is None else max_hold
        self._held_before = 0.0
        self._refilled = time.monotonic()
        self._written = threading.Event()
        self._wake_lock = threading.RLock()  # see `Staging` why each is held by itself
        self._wake = threading.Condition(self._wake_lock)
        self._staging = Staging(
            budget - min(budget // 4, _WORKING_BYTES),
            on_short=self._hurry,
            # Where statistics are all there is of a payload, room is waited for.
            patience=0.0 if limits.keeps_payloads else _FIGURES_SECONDS,
        )
        self._store = Store(folder, attempt, limits)
        self._summaries = Summaries(self._staging, self._nudge) if statistics else None
        self._submitting = threading.RLock()
        self._queue: deque[Part] = deque()
        self._urgent = self._staging.budget * 3 // 4
        self._asleep = False
        self._gathering = False
        self._is_busy = limits.keeps_payloads and _cores() < _SPARE_CORES
        self._held_at_take = 0.0
        self._closing = False
        self._ended = False
        self._has_given_up = False
        self._last_write: float | None = None
        self._tells_steps = limits.fsync == "step" or limits.keep_last is not None
        self._caught_up_lock = threading.Lock()
        self._caught_up = threading.Condition(self._caught_up_lock)
        self._queued_since = self._taken_since = math.inf
        self._held_late = 0.0
        self._largest = 0
        self._staged = 0
        self._dropped = 0
        self._dropped_bytes = 0
        self._started = time.perf_counter()
        # It takes long; better now, and beside the work, than in the middle of the job.
        self._importing = threading.Thread(target=_import_polars, name="graft-import", daemon=True)
        self._importing.start()
        _imports.add(self._importing)
        self._thread = threading.Thread(target=self._run, name="graft-writer", daemon=True)
        self._thread.start()

    @property
    def rows_written(self) -> int:
        """Rows that are safe."""
        return self._store.rows

    @property
    def bytes_written(self) -> int:
        """Bytes of payload on disk."""
        return self._store.bytes

    @property
    def without_statistics(self) -> int:
        """Payloads whose statistics were given up."""
        return 0 if self._summaries is None else self._summaries.left_out

    def progress(self) -> Progress:
        """Return how far this is."""
        return Progress(
            self._staged,
            self._staging.backlog,
            self._dropped,
            self._dropped_bytes,
            time.perf_counter() - self._started,
            self._held,
        )

    @property
    def _held(self) -> float:
        """Seconds that the job was held."""
        return self._staging.held_seconds + self._held_late

    @property
    def _within(self) -> float:
        """Seconds that it may still be held in this step."""
        if self._max_hold == math.inf:
            return math.inf
        if time.monotonic() - self._refilled >= _STEP_SECONDS:
            self._refill()
        return self._max_hold - (self._held - self._held_before)

    def _refill(self) -> None:
        self._held_before, self._refilled = self._held, time.monotonic()

    def submit(self, row: ManifestRow, snapshot: Snapshot) -> bool:
        """Queue a row and a copy of its payload; the job may change the tensor afterwards.

        Args:
            row: manifest columns, without those that the payload decides.
            snapshot: the payload.

        Returns:
            Whether there was room for it.
        """
        local, bits, _ = snapshot
        if bits is None and local.nbytes <= self._staging.largest:
            return self._submit_few(row, local)
        bits = as_bits(local) if bits is None else bits  # the ring is smaller than any sensible one
        with self._turn():
            nbytes = bits.numel() * bits.element_size()
            if self._closing or not self._is_in_time(nbytes):
                return False
            payload = Payload(row, local.dtype, local.shape, nbytes)
            split = list(pieces(bits, self._staging.largest_on(bits.device)))
            for i, piece in enumerate(split):
                # Once its first part is in, a payload is waited for.
                hold = self._hold or i > 0
                part = self._staging.put(piece, 1, hold=hold, within=self._within)
                if not self._put(part, payload, i == 0, i == len(split) - 1):
                    return False
        return True

    def _submit_few(self, row: ManifestRow, tensor: torch.Tensor) -> bool:
        nbytes = tensor.nbytes
        with self._turn():
            if self._closing or not self._is_in_time(nbytes):
                return False
            payload = Payload(row, tensor.dtype, tensor.shape, nbytes)
            address = tensor.data_ptr()
            part = self._staging.put_bytes(address, nbytes, 1, hold=self._hold, within=self._within)
            return self._put(part, payload)

    def submit_value(self, row: ManifestRow) -> None:
        """Queue a row without a payload."""
        with self._turn():
            if not self._closing and self._is_in_time(0):
                part = self._staging.put_bytes(0, 0, 1, hold=self._hold, within=self._within)
                self._put(part, Payload(row, None, (), 0))

    def end_step(self, completed: int) -> None:
        """Note that a step is complete, behind all that was submitted before."""
        if self._tells_steps:
            with self._turn():
                if not self._closing:
                    part = self._staging.put_bytes(0, 0, 1, hold=self._hold, within=self._within)
                    if part is not None:  # else the next step's end stands for this one's too
                        self._put(part, Payload({}, None, (), 0, completed))
        self._refill()

    def close(self) -> None:
        """Write what is queued, seal the shard and end the threads; twice is fine.

        From a signal's handler in the middle of a tap of this thread, the threads end later.
        """
        if self._submitting._is_owned():  # type: ignore[attr-defined]
            self._closing = True
            self._nudge()
            self._written.wait(_HANDLER_SECONDS)
            return
        with self._submitting:  # whoever is in there has queued all of his payload
            self._closing = True
        self._nudge()
        # A thread that was interrupted in joining counts as ended. In short waits: while polars is
        # being imported an interrupt ends none, see `let_interrupts_through`.
        while not self._written.wait(_GATHER_SECONDS):
            pass
        self._thread.join()
        self._importing.join()

    def cut_short(self) -> None:
        """Let `close` leave out statistics and what is not written soon; called again, at once."""
        self._last_write = time.monotonic() + (_GRACE_SECONDS if self._last_write is None else 0.0)
        if self._summaries is not None:
            self._summaries.give_up()
        self._nudge()

    def _turn(self) -> AbstractContextManager[Any]:
        """Return the lock under which one thread at a time submits.

        Raises:
            CaptureError: this thread has it, so that it is in the middle of another submission.
        """
        if self._submitting._is_owned():  # type: ignore[attr-defined]
            raise CaptureError(
                "it is tapped in the middle of another tap, by a signal's handler or a finalizer"
            )
        return self._submitting

    def _put(
        self, part: Part | None, payload: Payload, first: bool = True, last: bool = True
    ) -> bool:
        """Queue what was staged; return whether anything was."""
        if part is None:
            self._drop(payload.nbytes)
            return False
        if self._queued_since == math.inf:
            self._queued_since = time.monotonic()
        part.payload, part.first, part.last = payload, first, last
        self._queue.append(part)
        self._staged += part.nbytes
        if part.nbytes > self._largest:
            self._largest = part.nbytes
        # Read without the lock: the thread looks at the queue again once it has set these.
        if self._asleep or (self._gathering and self._staging.backlog > self._urgent):
            self._nudge()
        if self._on_full is not None and self._staging.held_seconds > _HELD_SECONDS:
            self._tell_full()
        return True

    def _is_in_time(self, nbytes: int) -> bool:
        """Whether what waits is young enough to add to, after waiting for that where asked to.

        However large the staging memory is: what a killed job loses is a matter of time.
        """
        if time.monotonic() - min(self._queued_since, self._taken_since) < _OLDEST_SECONDS:
            return True
        self._nudge()  # an interrupt may have come between a tap's queueing and this
        if not self._hold:
            self._drop(nbytes)
            return self._ended
        within, started = self._within, time.monotonic()
        is_late = True
        with self._caught_up_lock:
            while not self._ended:
                now = time.monotonic()
                is_late = now >= min(self._queued_since, self._taken_since) + _OLDEST_SECONDS
                left = within - (now - started)
                if not is_late or left <= 0:
                    break
                self._caught_up.wait(min(_GATHER_SECONDS, left))
        self._held_late += time.monotonic() - started
        if self._held_late > _HELD_SECONDS:
            self._tell_full()
        if is_late:
            self._drop(nbytes)
        return self._ended or not is_late

    def _drop(self, nbytes: int) -> None:
        if not self._ended:
            self._dropped += 1
            self._dropped_bytes += nbytes
            self._tell_full()

    def _tell_full(self) -> None:
        if self._on_full is None or time.perf_counter() - self._started < _RATE_SECONDS:
            return  # told before, or there is no rate to speak of yet
        on_full, self._on_full = self._on_full, None
        on_full(self.progress())

    def _hurry(self) -> None:
        """Let the thread begin: there is no more room, and whoever submits is about to wait."""
        if self._gathering:
            self._nudge()

    def _nudge(self) -> None:
        with self._wake_lock:
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._gather():
                while self._queue:
                    if self._last_write is not None and time.monotonic() >= self._last_write:
                        raise LimitReached(CUT_SHORT)
                    self._take()
                self._flush()
                self._staging.warm_up(self._largest)
            self._settle_statistics()
            self._store.close()
            self._store.add_late()
            self._publish()
        except LimitReached as err:
            self._stop("stopped", str(err))
        except OSError as err:
            self._stop("failed", f"writing failed: {err.strerror or err}")
        except BaseException as err:  # a bug of ours: the recording ends, the job does not
            self._stop("failed", f"internal error: {type(err).__name__}: {err}")
        finally:
            self._ended = True
            self._staging.close()
            if self._summaries is not None:
                self._summaries.close(0.0 if self._has_given_up else _FIGURES_SECONDS)
            self._written.set()
            with self._submitting:
                self._queue.clear()
                self._staging.free()

    def _gather(self) -> bool:
        """Sleep until there is work, and until a burst has passed; return False at the end."""
        with self._wake_lock:
            self._asleep = True
            while not (self._queue or self._closing or self._has_statistics):
                self._wake.wait()
            self._asleep = False
            if not self._closing and self._staging.backlog <= self._urgent:
                self._gathering = True
                self._wake.wait(_GATHER_SECONDS)
                self._gathering = False
        # In this order: once it is closing, all that comes is in the queue.
        return not self._closing or bool(self._queue)

    @property
    def _has_statistics(self) -> bool:
        return self._summaries is not None and self._summaries.has_found

    def _take(self) -> None:
        """Store what is queued, or as much of it as can be made safe in one go."""
        self._taken_since, self._queued_since = self._queued_since, math.inf
        batch: list[Part] = []
        size = 0
        while self._queue and size < _BATCH_BYTES:
            batch.append(self._queue.popleft())
            size += batch[-1].nbytes
        if self._queue:
            self._queued_since = min(self._queued_since, self._taken_since)
        self._staging.bring(batch, self._queue)
        if self._summaries is not None:
            self._leave_to_verify(batch)
            self._summaries.add([part for part in batch if part.payload.dtype is not None])
        stored: list[Part] = []
        size = 0
        for part in batch:
            self._store_part(part)
            stored.append(part)
            size += part.nbytes
            if size >= _RELEASED_BYTES or len(stored) >= _RELEASED_PARTS:
                self._store.write_out()
                self._staging.release(stored)
                stored, size = [], 0
        self._store.write_out()
        self._staging.release(stored)
        self._flush()
        with self._caught_up_lock:
            self._taken_since = math.inf
            self._caught_up.notify_all()

    def _leave_to_verify(self, batch: list[Part]) -> None:
        """Leave out the statistics of what is large, where the job was held and no core is free.

        They would cost it as much as the disk does, and be given up when their room is needed.
        """
        held, self._held_at_take = self._held - self._held_at_take, self._held
        if not (held and self._is_busy) or self._summaries is None:
            return
        for part in batch:
            if part.payload.nbytes >= _LARGE_BYTES:
                self._summaries.leave_out(part.payload)

    def _store_part(self, part: Part) -> None:
        payload = part.payload
        if part.first and not self._store.has_room(len(payload.shape)):
            self._seal()
        if payload.dtype is not None:
            part.wait()
            self._store.add(payload, self._staging.view(part), first=part.first, last=part.last)
        elif payload.completed is not None:
            self._store.end_step(payload.completed, self._seal)
        else:
            self._store.add_value(payload.row)

    def _flush(self) -> None:
        self._store.flush()
        if time.monotonic() - self._published >= SECONDS:
            self._publish()
        if self._summaries is None:
            return
        if self._summaries.error is not None:
            raise self._summaries.error
        for payload, found in self._summaries.take():
            self._store.add_statistics(payload.row["seq"], found, payload.index)
            self._store.add_late(before=payload.index)
        self._store.flush()

    def _publish(self) -> None:
        if self._on_progress is not None:
            self._published = time.monotonic()
            self._on_progress(self.progress())

    def _settle_statistics(self) -> None:
        """Wait for the statistics of what was stored, while they come, and store them."""
        self._store.flush()
        if self._summaries is not None and not self._summaries.wait(_FIGURES_SECONDS):
            self._has_given_up = True
            self._summaries.give_up()
        self._flush()

    def _seal(self) -> None:
        self._flush()
        self._store.seal()

    def _stop(self, state: str, reason: str) -> None:
        """End recording early; what is safe stays."""
        try:
            if state == "stopped":
                self._settle_statistics()
                self._store.close()
                self._store.add_late()
        except Exception as err:
            fact = err.strerror if isinstance(err, OSError) else None
            state, reason = "failed", f"writing failed: {fact or err}"
        self._ended = True
        self._staging.close()
        if self._summaries is not None:
            self._summaries.give_up()
        try:
            self._store.salvage()
        finally:
            with self._caught_up_lock:
                self._caught_up.notify_all()
            self._on_stop(state, reason)


def _cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def _import_polars() -> None:
    if "polars" not in sys.modules:
        import polars  # noqa: F401

        let_interrupts_through()


_imports: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def _before_fork() -> None:
    # A child would find the lock of a module that nobody there goes on importing.
    for thread in list(_imports):
        thread.join()


os.register_at_fork(before=_before_fork)
