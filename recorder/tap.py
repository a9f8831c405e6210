"""The line in the user's code: `tap`, `step`, `context`, and the sessions that listen.

1. `tap` returns at once while no session is active.
2. Otherwise `_fire` opens the sessions that `GRAFT_*` asks for, if that has not happened yet.
3. `_dispatch` merges the context's tags and offers the tap to each session, recorders first, so
   that a recording holds what the job computed before anything is grafted over it.

A session that fails never fails the job, unless it was told to (`--on-error raise`).
"""

from __future__ import annotations

import atexit
import functools
import importlib
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from . import signals
from .call import Call, Session
from .diagnostics import say
from .errors import GraftError, ReplayError, is_from_the_job
from .ranks import is_group_up

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger(__name__)

_ENVIRONMENT = (
    # variable that asks for it, module that provides it; by name, so that recorder never
    # imports replayer
    ("GRAFT_RECORD", "recorder.session"),
    ("GRAFT_REPLAY", "replayer.session"),
)
_around: ContextVar[_Around | None] = ContextVar("graft_context", default=None)
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


_active: tuple[Session, ...] = ()
_ending: tuple[Session, ...] = ()
_opening = False


def tap(
    name: str,
    value: T,
    *,
    dims: str | None = None,
    extras: Mapping[str, Any] | None = None,
    grad: bool = False,
    **tags: Any,
) -> T:
    """Name a tensor, so that it can be recorded and grafted; does nothing when nothing is active.

    Args:
        name: what the tap is called; the same on both systems, or matched by `--match-on`.
        value: a tensor or DTensor of any shape; or a callable returning one, called only if the
            tap is wanted; or a Python scalar, a string or a flat list of these, recorded as a
            value. Anything else is warned about once and left alone.
        dims: the tensor's layout, such as `"b s h[tp] d"`.
        extras: small facts to go with the record, JSON-able; they reach the transform.
        grad: record and graft the gradient of `value` too, when it comes.
        **tags: what tells this firing from others of the name: strings, numbers, booleans, None
            or lists of these.

    Returns:
        `value` itself. A graft overwrites its elements in place.

    Raises:
        ReplayError: only in a replay with `--on-error raise` or `--on-missing raise`.
    """
    if not _active:
        return value
    _fire(name, value, dims, extras, grad, tags)
    return value


def step() -> None:
    """End an iteration; call it on every rank. Steps count from 0."""
    if _active:
        _fire_step()


@dataclass(frozen=True)
class _Around:
    """The tags of one `context`, those around it included; the way back is part of it."""

    tags: dict[str, Any]
    owner: context
    outer: _Around | None


class context:  # noqa: N801  # read as a verb at the call site
    """Add tags to every tap inside: `with context(phase="prefill"): ...`.

    Also a decorator, of coroutine functions and generators too. Contexts nest; the inner value of a
    tag wins, and a tag at the call wins over both. A new thread starts without tags.
    """

    def __init__(self, **tags: Any) -> None:
        self._new = tags

    def __enter__(self) -> context:
        if not _active and _is_compiling():
            return self  # nobody listens, and the compiler cannot follow what comes next
        outer = _around.get()
        tags = {**outer.tags, **self._new} if outer else self._new
        _around.set(_Around(tags, self, outer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not _active and _is_compiling():
            return
        around = _around.get()
        while around is not None and around.owner is not self:
            around = around.outer  # an inner one that was never left, as in a dropped generator
        if around is not None:
            _around.set(around.outer)

    def __call__(self, function: F) -> F:
        """Return `function` with these tags around each of its calls."""
        if inspect.isasyncgenfunction(function):
            raise TypeError("context cannot decorate an async generator; use `with` inside it")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def inner(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

        elif inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def inner(*args: Any, **kwargs: Any) -> Any:
                return self._drive(function(*args, **kwargs))

        else:

            @functools.wraps(function)
            def inner(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return function(*args, **kwargs)

        return inner  # type: ignore[return-value]

    def _drive(self, generator: Any) -> Any:
        """Run a generator with the tags set while its own code runs, and not in between."""
        resume, given = generator.send, None
        while True:
            try:
                with self:
                    item = resume(given)
            except StopIteration as end:
                return end.value
            try:
                resume, given = generator.send, (yield item)
            except GeneratorExit:
                generator.close()
                raise
            except BaseException as err:
                resume, given = generator.throw, err


def _is_compiling() -> bool:
    """Whether the compiler is tracing; a constant in what it traces."""
    if "torch" not in sys.modules:
        return False
    import torch

    return torch.compiler.is_compiling()


def _fire(
    name: str,
    value: Any,
    dims: str | None,
    extras: Mapping[str, Any] | None,
    grad: bool,
    tags: dict[str, Any],
) -> None:
    around = _around.get()
    if around is not None:
        tags = {**around.tags, **tags}
    values = tags.values()
    about = (name, *tags, *values, *map(type, values))
    try:
        for session in _active:
            if about not in session.ignored or (session.is_unsettled and is_group_up()):
                break
        else:
            return
    except Exception as err:
        if is_from_the_job(err) and not _is_a_comparison(err):
            raise
        # else a tag that cannot be hashed or compared
    run = _dispatch
    if "torch._dynamo" in sys.modules:
        # The mark below makes a compiled caller break its graph here; this keeps the compiler
        # from tracing what we do with the tensor.
        run = _outside_dynamo()
    run(name, value, dims, extras, grad, tags, about)


def _fire_step() -> None:
    if _active and _active[0].order < 0:
        _open_waiting()
    for session in _active:
        try:
            session.on_step()
        except Exception as err:  # rule 2
            if is_from_the_job(err):
                raise
            log.debug("at a step", exc_info=True)


def _is_a_comparison(err: Exception) -> bool:
    """Whether an exception comes from a tag's own `__eq__` or `__hash__`."""
    trace = err.__traceback__.tb_next if err.__traceback__ is not None else None
    return trace is not None and trace.tb_frame.f_code.co_name in ("__eq__", "__hash__")


_fire._torchdynamo_disable = True  # type: ignore[attr-defined]
_fire_step._torchdynamo_disable = True  # type: ignore[attr-defined]


_undynamoed: Any = None


def _outside_dynamo() -> Any:
    global _undynamoed
    if _undynamoed is None:
        import torch

        _undynamoed = torch.compiler.disable(_dispatch)
    return _undynamoed


def _dispatch(
    name: str,
    value: Any,
    dims: str | None,
    extras: Mapping[str, Any] | None,
    grad: bool,
    tags: dict[str, Any],
    about: tuple[Any, ...],
) -> None:
    if _active and _active[0].order < 0:
        _open_waiting()
    call = Call(name, value, dims, extras, grad, tags, about)
    try:
        for session in _active:
            try:
                session.on_tap(call)
            except ReplayError:
                raise  # asked for: --on-error raise, --on-missing raise
            except Exception as err:  # rule 2: the job comes first, and the other taps with it
                if is_from_the_job(err):
                    raise
                log.debug("at a tap", exc_info=True)
                session.lost(call, f"{type(err).__name__}: {err}")
    finally:
        call.forget()


def activate(session: Session) -> None:
    """Let a session listen from now on."""
    global _active
    with _guard:
        _active = tuple(sorted((*_active, session), key=lambda s: s.order))
    if session.order >= 0:
        signals.guard(_close_all)


def deactivate(session: Session) -> None:
    """Let a session listen no more; nothing happens where it did not."""
    end(session)
    ended(session)


def end(session: Session) -> None:
    """Let a session listen no more, but be closed by a signal until it has `ended`."""
    global _active, _ending
    with _guard:
        if session in _active and session.order >= 0:
            _ending = (*_ending, session)
        _active = tuple(s for s in _active if s is not session)


def ended(session: Session) -> None:
    """Note that a session has nothing left to do; the last lets go of the signals."""
    global _ending
    with _guard:
        _ending = tuple(s for s in _ending if s is not session)
        last = not _ending and all(s.order < 0 for s in _active)
    if last:
        signals.release()


def _close_all() -> None:
    """Close every session, the one that sees a tap last first."""
    for session in (*reversed(_active), *_ending):
        session.close()


def active_sessions() -> tuple[Session, ...]:
    """The sessions that listen now."""
    return _active


def watch_environment() -> None:
    """Open what `GRAFT_*` asks for at the next tap or step; called once, on import."""
    if any(os.environ.get(variable) for variable, _ in _ENVIRONMENT):
        activate(_Waiting())


def _open_waiting() -> None:
    """Put real sessions in the place of the stand-in.

    It stays until they are there, so that taps of other threads wait for them here.
    """
    global _active, _opening
    with _guard:
        if _opening:
            return  # a tap from what is being opened, such as a transform's module
        _opening = True
        try:
            for session in _active:
                if isinstance(session, _Waiting) and not isinstance(session, _Helper):
                    opened = _opened()
                    kept = (s for s in _active if s is not session)
                    _active = tuple(sorted((*kept, *opened), key=lambda s: s.order))
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
            # Rule 2 again: the job goes on; the wrapper learns of it and ends with 3.
            fact = " ".join(str(err).split())
            if not isinstance(err, GraftError):
                fact = f"{type(err).__name__}: {fact}"
            say(f"{variable} asks for a session that cannot be opened: {fact}")
            from .reports import write_report

            write_report({"session": variable, "state": "refused", "reason": fact})
            continue
        for session in sessions:
            close_at_exit(session)
        found += sessions
    return found


def close_at_exit(session: Session) -> None:
    """Close a session when the process ends, by whichever way runs anything at all."""
    atexit.register(session.close)
    # A multiprocessing child leaves through os._exit after these finalizers, without atexit.
    from multiprocessing import util

    util.Finalize(None, session.close, exitpriority=10)


def _after_fork_in_child() -> None:
    global _active, _ending, _guard, _opening
    _ending = ()
    _guard = threading.RLock()  # the parent's may be held by a thread that is not here
    if _opening or any(not isinstance(s, _Waiting) for s in _active):
        _opening = False
        _active = (_Helper("was forked from a process that already taps"),)


os.register_at_fork(after_in_child=_after_fork_in_child)
watch_environment()
