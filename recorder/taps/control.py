"""Switches a running job by a file in its folder: what `graft ctl` writes, and how a job sees it.

1. `watch` reads a folder's `control.json`; from then on one thread a process looks every `_SECONDS`
   whether there is another, and every `_LOOKS` times reads it in any case: what a network's file
   system says of a file may be old.
2. `Order.parse` says what is asked for, always all of it: a later file stands for those before.
3. What is new goes to the callback that `watch` was given; `order_of` says what holds.

A file that cannot be made sense of is said once, and what held before goes on. Where there is none,
nothing was asked for.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..diagnostics import say
from ..errors import FilterError
from ..filters import Filter
from ..job import Job

log = logging.getLogger(__name__)

FILE = "control.json"
VERSION = 1
_SECONDS = 0.03
_LOOKS = 30
_MOST_BYTES = 64 << 10
_MOST_STEPS = 1_000
"""That are ended at one look; a command takes longer than a look, so there is never half of it."""
_MOST = 1 << 53


@dataclass(frozen=True)
class Order:
    """What is asked for of the sessions of a folder.

    Attributes:
        sequence: counts the orders; 0 where there was none.
        is_on: whether they listen.
        filter: what holds instead of their own; None where that does.
        steps: how many were ended by `graft ctl` so far.
        job: the job whose recording was there when it was given, "" where there was none.
        launcher: likewise.
    """

    sequence: int = 0
    is_on: bool = True
    filter: Filter | None = None
    steps: int = 0
    job: str = ""
    launcher: str = ""

    @classmethod
    def parse(cls, data: bytes) -> Order:
        """Return what a file asks for.

        Raises:
            ValueError: it is malformed; the text is one fact.
        """
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError("it does not hold JSON") from None
        if not isinstance(found, dict):
            raise ValueError("it does not hold a JSON object")
        if found.get("version") != VERSION:
            raise ValueError(f"its version is {found.get('version')!r:.100}, expected {VERSION}")
        for name in ("sequence", "steps"):
            if type(found.get(name)) is not int or not 0 <= found[name] < _MOST:
                raise ValueError(f"{name} is {found.get(name)!r:.100}, expected a number from 0 up")
        if type(found.get("is_on")) is not bool:
            raise ValueError(f"is_on is {found.get('is_on')!r:.100}, expected true or false")
        text = found.get("filter")
        try:
            wanted = Filter.parse(text) if isinstance(text, str) else None
        except FilterError as err:
            raise ValueError(f"its filter cannot be used: {err.reason}") from None
        if text is not None and wanted is None:
            raise ValueError(f"its filter is {text!r:.100}, expected a text or null")
        job, launcher = (found.get(name) for name in ("job", "launcher"))
        return cls(
            found["sequence"],
            found["is_on"],
            wanted,
            found["steps"],
            job if isinstance(job, str) else "",
            launcher if isinstance(launcher, str) else "",
        )

    def as_bytes(self) -> bytes:
        """Return it as the file holds it."""
        data = {**vars(self), "version": VERSION, "filter": self.filter and self.filter.text}
        return (json.dumps(data, indent=2) + "\n").encode()


def read(folder: Path) -> Order:
    """Return what is asked for in a folder.

    Raises:
        ValueError: the file is malformed, or cannot be read; the text is one fact.
    """
    data = _bytes(folder / FILE)
    return Order() if data is None else Order.parse(data)


def _state(path: Path) -> tuple[int, ...]:
    """Return what tells a file from the one that was there before it, mostly."""
    try:
        found = os.lstat(path)
    except OSError as err:
        return (err.errno or 0,)
    return found.st_ino, found.st_mtime_ns, found.st_size


def _bytes(path: Path) -> bytes | None:
    """Return what a file holds, None where there is none.

    Raises:
        ValueError: it cannot be read, or is no such file.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        raise ValueError(f"it cannot be read ({err.strerror})") from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError("it is not a regular file")
        data = os.read(file, _MOST_BYTES + 1)
    except OSError as err:
        raise ValueError(f"it cannot be read ({err.strerror})") from None
    finally:
        os.close(file)
    if len(data) > _MOST_BYTES:
        raise ValueError("it is larger than any such file can be")
    return data


Changed = Callable[[Path, Order, Order], None]
"""Called, from the thread, with a folder, what held in it, and what holds now."""


class _Watched:
    """One folder: what holds, and what was last seen in it."""

    def __init__(self, folder: Path, changed: Changed) -> None:
        self.order = Order()
        self._folder = folder
        self._changed = changed
        self._seen: bytes | str | None = None
        self._state: tuple[int, ...] = ()
        self._looks = 0
        self._looking = threading.Lock()

    def renew(self) -> None:
        """Forget whoever looks: after a fork, nobody does."""
        self._looking = threading.Lock()

    def look(self, unless: Job | None = None, *, quietly: bool = False) -> None:
        """Take what is new.

        Args:
            unless: a job whose recording replaces what is there: what was asked of another is past.
            quietly: do not call anybody.
        """
        if self._looking.acquire(blocking=False):  # else a thread that is about to end does
            try:
                self._look(unless, quietly)
            finally:
                self._looking.release()

    def _look(self, unless: Job | None, quietly: bool) -> None:
        state, self._looks = _state(self._folder / FILE), self._looks + 1
        if state == self._state and self._looks % _LOOKS:
            return
        seen: bytes | str | None
        self._state = state
        try:
            seen = _bytes(self._folder / FILE)
        except ValueError as err:
            seen = str(err)
        if seen == self._seen:
            return
        self._seen, before = seen, self.order
        try:
            if isinstance(seen, str):
                raise ValueError(seen)
            order = Order() if seen is None else Order.parse(seen)
            if order.steps - before.steps > _MOST_STEPS and not quietly:
                raise ValueError(f"it asks for {order.steps - before.steps} steps at once")
        except ValueError as err:
            say(f"{self._folder / FILE} is ignored: {err}; write it with: graft ctl RUN on")
            return
        if unless is not None and order.job and not unless.is_same(vars(order)):
            return
        self.order = order
        if not quietly:
            self._changed(self._folder, before, order)


_watched: dict[Path, _Watched] = {}
_end = threading.Event()
_thread: threading.Thread | None = None


def watch(folder: Path, changed: Changed, unless: Job | None = None) -> None:
    """Add a folder to look at; what is there already holds at once, and nobody is called.

    As `keep`, for one thread at a time: whoever calls holds a lock.

    Args:
        folder: an absolute path; need not exist.
        changed: see `Changed`.
        unless: see `_Watched.look`.
    """
    if folder not in _watched:
        found = _Watched(folder, changed)
        found.look(unless, quietly=True)
        _watched[folder] = found


def keep(folders: Collection[Path]) -> None:
    """Look at these folders from now on, and at no others."""
    for folder in [one for one in _watched if one not in folders]:
        del _watched[folder]
    if _watched:
        _start()
    else:
        _end.set()


def order_of(folder: Path) -> Order:
    """Return what holds in a folder as far as it was seen."""
    found = _watched.get(folder)
    return Order() if found is None else found.order


def _start() -> None:
    global _thread, _end
    if _thread is not None and _thread.is_alive() and not _end.is_set():
        return
    _end = threading.Event()
    _thread = threading.Thread(target=_run, args=(_end,), name="graft-control", daemon=True)
    with suppress(RuntimeError):  # no more threads: then nobody can switch this process
        _thread.start()


def _run(end: threading.Event) -> None:
    # Signals are the main thread's, which may wait for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while not end.wait(_SECONDS):
        for one in list(_watched.values()):
            try:
                one.look()
            except Exception:
                log.debug("at a look for orders", exc_info=True)


def _before_fork() -> None:
    # So that a job which has no other threads may fork as before.
    thread = _thread
    if thread is not None and thread is not threading.current_thread() and thread.is_alive():
        _end.set()
        thread.join(1.0)


def _after_fork() -> None:
    keep(list(_watched))


def _after_fork_in_child() -> None:
    global _thread
    _thread = None  # it begins with the next `keep`
    for one in _watched.values():
        one.renew()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)
