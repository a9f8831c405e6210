"""Closes what is open when SIGTERM ends the job, even while its main thread is inside a library.

Python runs a signal's handler between two steps of the main thread, which may never come back from
a collective whose peers are gone. So:

1. `guard` lets the system write the signal's number into a pipe the moment it comes.
2. A thread reads it there, closes all sessions, waits for that no longer than `SECONDS`, and ends
   the process by the same signal.

Only where the signal would have ended the process: a handler of the job's own is left alone. SIGINT
needs nothing, since Python turns it into an exception and leaves by way of `atexit`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

SECONDS = 4.0
_END = signal.SIGTERM

_close_all: Callable[[], None] | None = None
_pipe: tuple[int, int] | None = None
_ending = threading.Lock()


def guard(close_all: Callable[[], None]) -> None:
    """Call `close_all`, from another thread, before SIGTERM ends this process.

    Nothing happens outside the main thread, where Python takes no handlers.
    """
    global _close_all, _pipe
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(_END) != signal.SIG_DFL
    ):
        return
    _close_all = close_all
    if _pipe is None:
        _pipe = os.pipe()
        for end in _pipe:
            os.set_blocking(end, end == _pipe[0])
        threading.Thread(target=_watch, args=_pipe[:1], name="graft-signals", daemon=True).start()
    try:
        signal.signal(_END, _received)
        other = signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
        if other not in (-1, _pipe[1]):
            signal.set_wakeup_fd(other)  # an event loop's; the handler has to do
    except ValueError:
        pass  # not the main interpreter


def release() -> None:
    """Let SIGTERM end this process as before."""
    if threading.current_thread() is threading.main_thread() and _is_ours():
        signal.signal(_END, signal.SIG_DFL)
        _leave_wakeup()


def let_interrupts_through() -> None:
    """Let Ctrl-C interrupt a wait, as it did before polars was imported.

    Polars puts a handler of its own before Python's, after which a system call that was interrupted
    goes on: a job that waits for a lock or a queue would not hear of Ctrl-C before it has it.
    """
    if callable(signal.getsignal(signal.SIGINT)):
        signal.siginterrupt(signal.SIGINT, True)


def _is_ours() -> bool:
    return signal.getsignal(_END) is _received


def _leave_wakeup() -> None:
    other = signal.set_wakeup_fd(-1)
    if _pipe is None or other != _pipe[1]:
        signal.set_wakeup_fd(other)


def _received(number: int, frame: Any) -> None:
    # In the middle of anything, perhaps of a tap that holds a lock: so not here.
    _begin()


def _watch(pipe: int) -> None:
    while number := os.read(pipe, 1):
        if number[0] == _END and _is_ours():
            _begin()


def _begin() -> None:
    if _ending.acquire(blocking=False):
        threading.Thread(target=_finish, name="graft-end", daemon=True).start()


def _finish() -> None:
    if _close_all is not None:
        closing = threading.Thread(target=_close_all, name="graft-close", daemon=True)
        closing.start()
        closing.join(SECONDS)
    # Python lets only the main thread change a handler, and that one may be stuck.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(int(_END), None)
    os.kill(os.getpid(), _END)


def _after_fork_in_child() -> None:
    global _pipe, _ending, _close_all
    if _is_ours():
        signal.signal(_END, signal.SIG_DFL)
        _leave_wakeup()
    _pipe, _close_all, _ending = None, None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
