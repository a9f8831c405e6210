"""The sessions that listen to taps: which are active, and how `GRAFT_*` opens them.

1. `watch_environment` puts a stand-in among them on import, where a variable asks for a session.
2. The first tap or step calls `open_waiting`, which puts the real ones in its place.
3. `end` and `ended` take one out in two steps, so that a signal still closes what is being closed.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..diagnostics import say
from ..errors import GraftError
from . import signals
from .call import Call, Session

_ENVIRONMENT = (
    # variable that asks for it, module that provides it; by name, so that recorder never
    # imports replayer
    ("GRAFT_RECORD", "recorder.session"),
    ("GRAFT_REPLAY", "replayer.session"),
)
_guard = threading.RLock()


class _Waiting:
    """Stands in for the sessions that `GRAFT_*` asks for until the first tap or step."""

    order = -1
    ignored: set[Any] = set()  # noqa: RUF012  # nobody adds to it
    is_unsettled = False

    def on_tap(self, call: Call) -> None: ...
    def on_step(self) -> None: ...
    def lost(self, call: Call, reason: str) -> None: ...
    def close(self) -> None: ...


class _Helper(_Waiting):
    """Stands in for the sessions in a process that is no rank, whose taps nobody may record."""

    def __init__(self, what: str) -> None:
        self._what = what

    def on_tap(self, call: Call) -> None:
        deactivate(self)
        say(
            f"pid {os.getpid()} {self._what}; its taps are ignored (first: {call.shown}); start it "
            "with the spawn method and a GRAFT_RANK of its own to record it"
        )


active: tuple[Session, ...] = ()
"""Those that listen now, in the order in which they see a tap; replaced as a whole."""
_ending: tuple[Session, ...] = ()
_opening = False
_is_asked = False


def activate(session: Session) -> None:
    """Let a session listen from now on."""
    global active
    with _guard:
        active = tuple(sorted((*active, session), key=lambda s: s.order))
    if session.order >= 0:
        signals.guard(_close_all)


def deactivate(session: Session) -> None:
    """Let a session listen no more; nothing happens where it did not."""
    end(session)
    ended(session)


def end(session: Session) -> None:
    """Let a session listen no more, but be closed by a signal until it has `ended`."""
    global active, _ending
    with _guard:
        if session in active and session.order >= 0:
            _ending = (*_ending, session)
        active = tuple(s for s in active if s is not session)


def ended(session: Session) -> None:
    """Note that a session has nothing left to do; the last lets go of the signals."""
    global _ending
    with _guard:
        _ending = tuple(s for s in _ending if s is not session)
        last = not _ending and all(s.order < 0 for s in active)
    if last:
        signals.release()


def _close_all() -> None:
    """Close every session, the one that sees a tap last first."""
    for session in (*reversed(active), *_ending):
        session.close()


def watch_environment() -> None:
    """Open what `GRAFT_*` asks for at the next tap or step, once; called on import.

    And again where the environment may have been given to a process that ran already.
    """
    global _is_asked
    if not _is_asked and any(os.environ.get(variable) for variable, _ in _ENVIRONMENT):
        _is_asked = True
        activate(_Waiting())


def open_waiting() -> None:
    """Put real sessions in the place of the stand-in.

    It stays until they are there, so that taps of other threads wait for them here.
    """
    global active, _opening
    with _guard:
        if _opening:
            return  # a tap from what is being opened, such as a transform's module
        _opening = True
        try:
            for session in active:
                if isinstance(session, _Waiting) and not isinstance(session, _Helper):
                    opened = _opened()
                    kept = (s for s in active if s is not session)
                    active = tuple(sorted((*kept, *opened), key=lambda s: s.order))
                    if opened:
                        signals.guard(_close_all)
        finally:
            _opening = False


def _opened() -> list[Session]:
    """Return the sessions that `GRAFT_*` asks for."""
    data = sys.modules.get("torch.utils.data")
    if data is not None and data.get_worker_info() is not None:
        return [_Helper("is a data loader's worker")]
    found: list[Session] = []
    for variable, module in _ENVIRONMENT:
        if not os.environ.get(variable):
            continue
        try:
            sessions = importlib.import_module(module).from_environment(os.environ)
        except Exception as err:
            # The job goes on; the wrapper learns of it and ends with 3.
            fact = " ".join(str(err).split())
            if not isinstance(err, GraftError):
                fact = f"{type(err).__name__}: {fact}"
            say(f"{variable} asks for a session that cannot be opened: {fact}")
            from ..mailbox import write_report

            write_report({"session": variable, "state": "refused", "reason": fact})
            continue
        for session in sessions:
            close_at_exit(session)
        found += sessions
    return found


def close_at_exit(session: Session) -> None:
    """Close a session when the process ends, by whichever way runs anything at all."""
    at_exit(_close_last, session)


def at_exit(function: Callable[..., None], *args: Any) -> None:
    """Call a function when the process ends, by whichever way runs anything at all; perhaps twice.

    What was registered last is called first.
    """
    atexit.register(function, *args)
    # A multiprocessing child leaves through os._exit after these finalizers, without atexit.
    from multiprocessing import util

    util.Finalize(None, function, args, exitpriority=10)


def _close_last(session: Session) -> None:
    with suppress(KeyboardInterrupt):  # which has ended what it could; the session has said so
        session.close()


def _after_fork_in_child() -> None:
    global active, _ending, _guard, _opening
    _ending = ()
    _guard = threading.RLock()  # the parent's may be held by a thread that is not here
    if _opening or any(not isinstance(s, _Waiting) for s in active):
        _opening = False
        active = (_Helper("was forked from a process that already taps"),)


os.register_at_fork(after_in_child=_after_fork_in_child)
watch_environment()
