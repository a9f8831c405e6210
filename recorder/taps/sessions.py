"""The sessions that listen to taps: which are active, and how `GRAFT_*` opens them.

1. `watch_environment` puts a stand-in among them on import, where a variable asks for a session.
2. The first tap or step calls `open_waiting`, which puts the real ones in its place.
3. `end` and `ended` take one out in two steps, so that a signal still closes what is being closed.
4. Where `graft ctl` asks for something, `_changed` parks or brings back sessions at once; what else
   is asked for, `_Orders` does at the next tap or step, in the job's own thread.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..diagnostics import say
from ..errors import GraftError, is_from_the_job
from ..filters import Filter
from ..job import Job
from . import control, signals
from .call import Call, Session
from .control import Order

log = logging.getLogger(__name__)

_ENVIRONMENT = (
    # variable that asks for it, module that provides it; by name, so that recorder never
    # imports replayer
    ("GRAFT_RECORD", "recorder.session"),
    ("GRAFT_REPLAY", "replayer.session"),
)
_FOLDERS = {"GRAFT_RECORD": "GRAFT_RECORD", "GRAFT_REPLAY": "GRAFT_REPLAY_OUT"}
_guard = threading.RLock()


class _Waiting:
    """Stands in for the sessions that `GRAFT_*` asks for until the first tap or step."""

    order = -1
    grafts = False
    ignored: set[Any] = set()  # noqa: RUF012  # nobody adds to it
    is_unsettled = False
    folders: tuple[Path | None, ...] = ()
    overwrites: Job | None = None

    def on_tap(self, call: Call) -> None: ...
    def on_step(self) -> None: ...
    def on_switch(self, filter: Filter | None, missed: bool) -> None: ...
    def took(self, sequence: int) -> None: ...
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


class _Orders(_Waiting):
    """Stands before the sessions of a folder, and does what was asked for before the next tap.

    Attributes:
        steps: how many to end.
        is_switch: whether taps were missed, or another filter holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folders = (folder,)
        self.steps = 0
        self.is_switch = False

    def on_tap(self, call: Call) -> None:
        self.on_step()

    def on_step(self) -> None:
        (folder,) = self.folders
        assert folder is not None
        with _guard:
            if self not in (*active, *parked):
                return  # another thread was here first
            _set(
                tuple(s for s in active if s is not self),
                tuple(s for s in parked if s is not self),
            )
            reached = [s for s in every() if folder in s.folders]
        wants = control.order_of(folder).filter
        for session in reached:
            try:
                if self.is_switch:
                    session.on_switch(wants, True)
                for _ in range(self.steps):
                    session.on_step()
            except Exception as err:  # the job comes first
                if is_from_the_job(err):
                    raise
                log.debug("at an order", exc_info=True)


active: tuple[Session, ...] = ()
"""Those that listen now, in the order in which they see a tap; replaced as a whole."""
listening = ""
"""`record` or `graft`, what they do at most, or "": all that a compiled program depends on."""
parked: tuple[Session, ...] = ()
"""Those that `graft ctl` has switched off: they see no tap, but every step."""
has_any = False
"""Whether any listens or is parked."""
_followers: tuple[Callable[[bool], None], ...] = ()
_ending: tuple[Session, ...] = ()
_opening = False
_is_asked = False


def every() -> tuple[Session, ...]:
    """Return the sessions that listen and those that are off, each once."""
    with _guard:
        return tuple(sorted((*active, *parked), key=lambda s: s.order))


def is_parked(session: Session) -> bool:
    """Whether `graft ctl` has switched a session off."""
    return any(s is session for s in parked)


def activate(session: Session) -> None:
    """Let a session listen from now on, or from when `graft ctl` lets it."""
    with _guard:
        _meet(session)
        _arrange((*every(), session))
    if session.order >= 0:
        _see_to_the_end()
        if session in parked:
            (folder,) = session.folders
            say(f"{folder} is off; switch it on with: graft ctl {folder} on")


def _meet(session: Session) -> None:
    """Tell a new session what was asked for before, and look for what else will be."""
    for folder in session.folders:
        if folder is not None:
            control.watch(folder, _changed, session.overwrites)
            order = control.order_of(folder)
            if order.filter is not None:
                session.on_switch(order.filter, False)
            session.took(order.sequence)


def _is_off(session: Session) -> bool:
    return bool(session.folders) and all(
        folder is not None and not control.order_of(folder).is_on for folder in session.folders
    )


def _set(sessions: tuple[Session, ...], off: tuple[Session, ...]) -> None:
    """Let these be the sessions that listen, and those that are off."""
    global active, has_any, listening, parked
    active, parked = sessions, off
    had_any, has_any = has_any, bool(active or parked)
    grafts = any(one.grafts for one in sessions)
    listening = "graft" if grafts else "record" if sessions else ""
    if has_any is not had_any:
        for follower in _followers:
            follower(has_any)


def follow(follower: Callable[[bool], None]) -> None:
    """Have a function called as the first session comes, and as the last has gone.

    Args:
        follower: called with whether there is any; at once if so. It must not raise.
    """
    global _followers
    with _guard:
        _followers = (*_followers, follower)
        if has_any:
            follower(True)


def _arrange(sessions: tuple[Session, ...]) -> None:
    """Let these sessions listen, but for those that are off. Whoever calls has the guard."""
    global parked
    used = {folder for s in sessions if not isinstance(s, _Orders) for folder in s.folders}
    # What was asked of sessions that are gone is asked of nobody.
    kept = [s for s in sessions if not (isinstance(s, _Orders) and used.isdisjoint(s.folders))]
    kept.sort(key=lambda s: s.order)
    off = tuple(s for s in kept if _is_off(s))
    parked = tuple(kept)  # a signal that closes all finds each in one of the two
    _set(tuple(s for s in kept if s not in off), off)
    control.keep({folder for folder in used if folder is not None})


def _changed(folder: Path, before: Order, order: Order) -> None:
    """Do what `graft ctl` asks for in a folder; called from a thread of its own."""
    with _guard:
        now = every()
        steps = max(0, order.steps - before.steps)
        is_switch = order.filter != before.filter or (order.is_on and not before.is_on)
        if steps or is_switch:
            waiting = [s for s in now if isinstance(s, _Orders) and folder in s.folders]
            orders = waiting[0] if waiting else _Orders(folder)
            orders.steps += steps
            orders.is_switch = orders.is_switch or is_switch
            now = now if waiting else (*now, orders)
        _arrange(now)
    for session in every():
        if folder in session.folders:
            session.took(order.sequence)


def deactivate(session: Session) -> None:
    """Let a session listen no more; nothing happens where it did not."""
    end(session)
    ended(session)


def end(session: Session) -> None:
    """Let a session listen no more, but be closed by a signal until it has `ended`."""
    global _ending
    with _guard:
        known = every()
        if session in known and session.order >= 0:
            _ending = (*_ending, session)
        _arrange(tuple(s for s in known if s is not session))


def ended(session: Session) -> None:
    """Note that a session has nothing left to do; the last lets go of the signals."""
    global _ending
    with _guard:
        _ending = tuple(s for s in _ending if s is not session)
        last = not _ending and all(s.order < 0 for s in every())
    if last:
        signals.release()


def _see_to_the_end() -> None:
    """See to it that sessions are closed by whatever ends the process."""
    signals.guard(_close_all)
    _close_left_at_exit()


def _left() -> tuple[Session, ...]:
    """Return every session that is to be closed, the one that sees a tap last first."""
    return (*reversed(parked), *reversed(active), *_ending)


def _close_all() -> None:
    for session in _left():
        session.close()


def watch_environment() -> None:
    """Open what `GRAFT_*` asks for at the next tap or step, once; called on import.

    And again where the environment may have been given to a process that ran already.
    """
    global _is_asked
    asked = [variable for variable, _ in _ENVIRONMENT if os.environ.get(variable)]
    if asked and not _is_asked:
        _is_asked = True
        waiting = _Waiting()
        waiting.grafts = "GRAFT_REPLAY" in asked
        folders = [os.environ.get(_FOLDERS[variable]) for variable in asked]
        with suppress(OSError):  # a working directory that is gone
            waiting.folders = tuple(Path(os.path.abspath(f)) if f else None for f in folders)
        flags = [os.environ.get(f"{variable}_OVERWRITE", "0").lower() for variable in asked]
        if any(flag not in ("", "0", "false", "no", "off") for flag in flags):
            waiting.overwrites = Job.from_environment()
        activate(waiting)


def open_waiting() -> None:
    """Put real sessions in the place of the stand-in.

    It stays until they are there, so that taps of other threads wait for them here.
    """
    global _opening
    with _guard:
        if _opening:
            return  # a tap from what is being opened, such as a transform's module
        _opening = True
        try:
            for session in every():
                if type(session) is _Waiting:
                    opened = _opened()
                    for one in opened:
                        _meet(one)
                    _arrange((*(s for s in every() if s is not session), *opened))
                    if opened:
                        _see_to_the_end()
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


@functools.cache
def _close_left_at_exit() -> None:
    """Once: have what nobody closes closed as the process ends."""
    at_exit(_close_left)


def _close_left() -> None:
    for session in _left():
        _close_last(session)


def _after_fork_in_child() -> None:
    global _ending, _guard, _opening
    _ending = ()
    _guard = threading.RLock()  # the parent's may be held by a thread that is not here
    _close_left_at_exit.cache_clear()  # multiprocessing forgets what is registered
    listening = every()
    if _opening or any(s.order >= 0 for s in listening):
        _opening = False
        listening = (_Helper("was forked from a process that already taps"),)
    _arrange(listening)


os.register_at_fork(after_in_child=_after_fork_in_child)
watch_environment()
