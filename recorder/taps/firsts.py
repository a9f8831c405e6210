"""The ids of rows that a forward had, for its repetition by activation checkpointing."""

from __future__ import annotations

import threading

from ..tags import Key
from .call import Call
from .rows import Ids, as_they_are
from .selection import Selected

_KEPT = 1 << 17


class RowsOfFirsts:
    """Remembers which ids held at the taps of two steps: where a backward repeats them, none do."""

    def __init__(self) -> None:
        self._of: dict[tuple[object, ...], tuple[Ids, ...]] = {}
        self._before: dict[tuple[object, ...], tuple[Ids, ...]] = {}
        self._lock = threading.RLock()  # a signal's handler may tap under it

    def of(self, call: Call, selected: Selected) -> tuple[Ids, ...]:
        """Return the ids of a tap's rows: of a repetition, those of what it repeats."""
        if not (call.rows or self._of or self._before):
            return ()
        if not selected.recompute:
            self.keep(call, selected.key)
            return call.rows
        first = selected.key[:4]
        with self._lock:
            found = self._of.get(first) or self._before.get(first)
        if found or call.own_rows is None:
            return found or call.rows
        return call.own_rows  # what holds around the backward is none of its forward's

    def keep(self, call: Call, key: Key) -> None:
        """Remember the ids of a tap's rows; of one that is not wanted too: its repetition may be.

        Args:
            call: the tap.
            key: its key.
        """
        if not call.rows:
            return
        kept = as_they_are(call.rows)  # the job may use their memory anew
        with self._lock:
            while len(self._of) >= _KEPT:
                self._of.pop(next(iter(self._of)))
            self._of[key[:4]] = kept

    def next_step(self) -> None:
        """Forget the step before; a backward may come after its own has ended."""
        with self._lock:
            self._before, self._of = self._of, {}
