"""Gathers statistics in a thread of its own: beside the writing, not in front of it.

Nothing waits for it for long: parts are lent to it (`Staging.lend`), and taken back where they are
kept too long and their room is needed.

1. `Summaries.add` queues staged parts of payloads.
2. The thread takes what has queued up. Small payloads of one dtype and size that lie side by side
   are done at once: a call for each would cost more than its elements.
3. `Summaries.take` hands over what is finished; `wait` returns when everything is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from ..bits import has_statistics
from .staging import Part, Staging
from .statistics import AT_ONCE, Statistics, of_many, workspace
from .store import Payload

_TOGETHER = 1_024


class Summaries:
    """Statistics of staged payloads, in the order they were staged.

    Args:
        staging: where the parts lie; each is given back here once.
        on_idle: called, from the thread, when there is something to `take` and nothing to do.
    """

    def __init__(self, staging: Staging, on_idle: Callable[[], None]) -> None:
        self._staging = staging
        self._on_idle = on_idle
        self._queue: deque[Part] = deque()
        self._found: deque[tuple[Payload, dict[str, float | int | None]]] = deque()
        self._wake = threading.Condition(threading.Lock())
        self._busy = False
        self._closing = False
        self._useless = False
        self._done = 0
        self._working: list[Part] = []
        self.left_out = 0
        self._wide: torch.Tensor | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="graft-statistics", daemon=True)
        self._thread.start()

    def add(self, parts: list[Part]) -> None:
        """Queue parts; those that were taken back meanwhile leave the queue."""
        self._staging.lend(parts)
        with self._wake:
            while self._queue and self._queue[0].is_taken_back:
                self.leave_out(self._queue.popleft().payload)
            self._queue.extend(parts)
            self._wake.notify_all()

    @property
    def has_found(self) -> bool:
        """Whether there is something to take, and nothing more to come soon."""
        return bool(self._found) and not (self._busy or self._queue)

    def take(self) -> list[tuple[Payload, dict[str, float | int | None]]]:
        """Return what is finished and was not taken before, of payloads whose rows are safe."""
        taken = []
        while self._found and self._found[0][0].is_safe:  # they became so in the same order
            taken.append(self._found.popleft())
        return taken

    def wait(self, patience: float) -> bool:
        """Wait until nothing is queued or being worked on.

        Returns:
            Whether it came to that; False once nothing has moved for so many seconds.
        """
        with self._wake:
            while self._queue or self._busy:
                before = self._done
                if not self._wake.wait(patience) and self._done == before:
                    for part in (*self._working, *self._queue):
                        self.leave_out(part.payload)
                    return False
        return True

    def give_up(self) -> None:
        """Only give back from now on: nobody wants statistics any more."""
        self._useless = True

    def close(self, patience: float) -> None:
        """End the thread once everything is done, or leave it to itself after so many seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(patience)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._busy = False
                self._wake.notify_all()
                idle = not self._queue
            if idle and self._found:
                self._on_idle()
            with self._wake:
                while not (self._queue or self._closing):
                    self._wake.wait()
                if not self._queue:
                    return
                parts = [self._queue.popleft()]
                while self._queue and len(parts) < _TOGETHER and _alike(parts, self._queue[0]):
                    parts.append(self._queue.popleft())
                self._busy, self._working = True, parts
            if self._useless:
                for part in parts:
                    self.leave_out(part.payload)
            else:
                try:
                    self._summarise(parts)
                except Exception as err:  # a bug of ours: the recording ends, the job does not
                    self.error, self._useless = err, True
            self._done += 1
            self._staging.give_back(parts)

    def _summarise(self, parts: list[Part]) -> None:
        if all(part.payload.is_left_out for part in parts):
            return
        for part in parts:
            part.wait()
        if self._wide is None:
            self._wide = workspace()
        if len(parts) > 1:
            for part, found in zip(parts, self._of_many(parts), strict=True):
                # Asked for behind the work: what was made of changed bytes is not to be told.
                if part.is_taken_back:
                    self.leave_out(part.payload)
                else:
                    self._found.append((part.payload, found))
            return
        (part,) = parts
        payload = part.payload
        if not has_statistics(payload.dtype) or payload.is_left_out:
            return
        if payload.statistics is None:
            payload.statistics = Statistics(payload.dtype, self._wide)
        if not part.is_taken_back:
            payload.statistics.add(self._staging.tensor(part.offset, part.nbytes))
        if part.is_taken_back:
            self.leave_out(payload)
        elif part.last:
            self._found.append((payload, payload.statistics.result()))
            payload.statistics = None

    def leave_out(self, payload: Payload) -> None:
        """Give up the statistics of a payload."""
        if payload.dtype is not None and has_statistics(payload.dtype) and not payload.is_left_out:
            payload.is_left_out, payload.statistics = True, None
            self.left_out += 1

    def _of_many(self, parts: list[Part]) -> list[dict[str, float | int | None]]:
        assert self._wide is not None  # `_summarise` made it
        first, second, last = parts[0], parts[1], parts[-1]
        raw = self._staging.tensor(first.offset, last.offset + last.nbytes - first.offset)
        rows = raw.as_strided(
            (len(parts), first.nbytes), (second.offset - first.offset, 1), raw.storage_offset()
        )
        return of_many(rows, parts[0].payload.dtype, self._wide)


def _alike(parts: list[Part], part: Part) -> bool:
    """Whether a part can be done together with others: equal, side by side, in one go."""
    first, before = parts[0], parts[-1]
    dtype, nbytes = first.payload.dtype, first.nbytes
    distance = part.offset - before.offset
    return (
        part.nbytes == nbytes
        and part.payload.dtype == dtype
        and distance == before.size
        and 0 < nbytes * (len(parts) + 1) <= AT_ONCE * dtype.itemsize
        and first.is_whole
        and part.is_whole
        and not dtype.is_complex
        and has_statistics(dtype)
    )
