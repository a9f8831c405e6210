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
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Protocol, TypeVar

from . import tags as tagging
from .errors import GraftError, ReplayError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger(__name__)

_ENVIRONMENT = (
    # variable that asks for it, module that provides it; by name, so that recorder never
    # imports replayer
    ("GRAFT_RECORD", "recorder.session"),
    ("GRAFT_REPLAY", "replayer.session"),
)
_tags: ContextVar[dict[str, Any] | None] = ContextVar("graft_tags", default=None)
_guard = threading.RLock()


class Call:
    """One firing of a tap, as the sessions see it.

    Attributes:
        name: the tap's name.
        tags: its other tags, context included, as given.
        dims: the declared layout, or "".
        extras: what the call attached, or None.
        grad: whether the gradient is wanted too.
    """

    __slots__ = ("_given", "_resolved", "dims", "extras", "grad", "name", "tags")

    def __init__(
        self,
        name: str,
        given: Any,
        dims: str | None = None,
        extras: Mapping[str, Any] | None = None,
        grad: bool = False,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.dims = dims or ""
        self.extras = extras
        self.grad = grad
        self.tags: Mapping[str, Any] = tags or {}
        self._given = given
        self._resolved = False

    def value(self) -> Any:
        """Return the tapped value; a callable is called here, once, whoever asks first."""
        if not self._resolved:
            if callable(self._given):  # neither tensors nor the recordable scalars are callable
                self._given = self._given()
            self._resolved = True
        return self._given

    @property
    def site(self) -> str:
        """The call site, `file:line`, for warnings."""
        return call_site()


class Session(Protocol):
    """Something that listens to taps."""

    order: int
    """The smaller sees a tap first: stand-ins -1, recorders 0, replayers 1."""

    def on_tap(self, call: Call) -> None:
        """See a tap fire."""

    def on_step(self) -> None:
        """See an iteration end."""

    def close(self) -> None:
        """Finish; called again at exit."""


class _Waiting:
    """Stands in for the sessions that `GRAFT_*` asks for until the first tap or step."""

    order = -1

    def on_tap(self, call: Call) -> None: ...
    def on_step(self) -> None: ...
    def close(self) -> None: ...


class _Forked(_Waiting):
    """Stands in for the parent's sessions in a forked child, whose taps nobody may record."""

    def on_tap(self, call: Call) -> None:
        deactivate(self)
        say(
            f"pid {os.getpid()} was forked from a process that already taps; its taps are ignored "
            f"(first: {call.name!r}); start it with the spawn method and a GRAFT_RANK of its own "
            "to record it"
        )


_active: tuple[Session, ...] = ()


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


class context:  # noqa: N801  # read as a verb at the call site
    """Add tags to every tap inside: `with context(phase="prefill"): ...`.

    Also a decorator. Contexts nest; the inner value of a tag wins, and a tag at the call wins over
    both. A new thread starts without tags.
    """

    def __init__(self, **tags: Any) -> None:
        self._new = tags
        self._tokens: list[Token[dict[str, Any] | None]] = []

    def __enter__(self) -> context:
        self._tokens.append(_tags.set({**(_tags.get() or {}), **self._new}))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _tags.reset(self._tokens.pop())

    def __call__(self, function: F) -> F:
        """Return `function` with these tags around each of its calls."""

        @functools.wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            with context(**self._new):  # a fresh one a call: the decorated may recurse or thread
                return function(*args, **kwargs)

        return inner  # type: ignore[return-value]


def _fire(
    name: str,
    value: Any,
    dims: str | None,
    extras: Mapping[str, Any] | None,
    grad: bool,
    tags: dict[str, Any],
) -> None:
    run = _dispatch
    if "torch._dynamo" in sys.modules:
        # The mark below makes a compiled caller break its graph here; this keeps the compiler
        # from tracing what we do with the tensor.
        run = _outside_dynamo(_dispatch)
    run(name, value, dims, extras, grad, tags)


def _fire_step() -> None:
    if _active and _active[0].order < 0:
        _open_waiting()
    for session in _active:
        session.on_step()


_fire._torchdynamo_disable = True  # type: ignore[attr-defined]
_fire_step._torchdynamo_disable = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1)
def _outside_dynamo(function: F) -> F:
    import torch

    return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


def _dispatch(
    name: str,
    value: Any,
    dims: str | None,
    extras: Mapping[str, Any] | None,
    grad: bool,
    tags: dict[str, Any],
) -> None:
    if _active and _active[0].order < 0:
        _open_waiting()
    around = _tags.get()
    call = Call(name, value, dims, extras, grad, {**around, **tags} if around else tags)
    for session in _active:
        try:
            session.on_tap(call)
        except ReplayError:
            raise  # asked for: --on-error raise, --on-missing raise
        except Exception as err:  # rule 2: the job comes first
            deactivate(session)
            say(
                f"internal error at tap {name!r} ({call.site}), this session has ended: "
                f"{type(err).__name__}: {err}; please report it"
            )
            log.debug("internal error", exc_info=True)
            fail = getattr(session, "fail", None)
            if fail is not None:
                fail(f"internal error: {type(err).__name__}: {err}")


def activate(session: Session) -> None:
    """Let a session listen from now on."""
    global _active
    with _guard:
        _active = tuple(sorted((*_active, session), key=lambda s: s.order))


def deactivate(session: Session) -> None:
    """Let a session listen no more; nothing happens where it did not."""
    global _active
    with _guard:
        _active = tuple(s for s in _active if s is not session)


def active_sessions() -> tuple[Session, ...]:
    """The sessions that listen now."""
    return _active


def watch_environment() -> None:
    """Open what `GRAFT_*` asks for at the next tap or step; called once, on import."""
    if any(os.environ.get(variable) for variable, _ in _ENVIRONMENT):
        activate(_Waiting())


def _open_waiting() -> None:
    with _guard:
        for session in _active:
            if not isinstance(session, _Waiting):
                continue
            deactivate(session)
            if isinstance(session, _Forked):
                activate(session)  # it speaks at the tap itself
                continue
            for variable, module in _ENVIRONMENT:
                if os.environ.get(variable):
                    _open_from_environment(variable, module)


def _open_from_environment(variable: str, module: str) -> None:
    try:
        session = importlib.import_module(module).from_environment(os.environ)
    except (GraftError, ImportError) as err:
        # Rule 2 again: the job goes on; the wrapper learns of it and ends with 3.
        fact = " ".join(str(err).split())
        say(f"{variable} asks for a session that cannot be opened: {fact}")
        from .reports import write_report

        write_report({"session": variable, "state": "refused", "reason": fact})
        return
    activate(session)
    close_at_exit(session)


def close_at_exit(session: Session) -> None:
    """Close a session when the process ends, by whichever way runs anything at all."""
    atexit.register(session.close)
    # A multiprocessing child leaves through os._exit after these finalizers, without atexit.
    from multiprocessing import util

    util.Finalize(None, session.close, exitpriority=10)


def _after_fork_in_child() -> None:
    global _active, _guard
    _guard = threading.RLock()  # the parent's may be held by a thread that is not here
    if any(not isinstance(s, _Waiting) for s in _active):
        _active = (_Forked(),)


def call_site() -> str:
    """Return `file:line` of the innermost caller outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_globals.get("__package__") in ("recorder", "recorder.format", "replayer")
        or "_dynamo" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def say(message: str, where: str = "") -> None:
    """Write one diagnostic line to stderr: `[graft rank=3 step=7] ...`."""
    prefix = f"[graft {where}]" if where else "[graft]"
    text = " ".join(message.split("\n"))
    try:
        sys.stderr.write(f"{prefix} {printable(text)}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # a closed stderr must not end the job


def printable(text: str) -> str:
    """Return text without control characters, so that recorded names cannot steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def context_tags() -> dict[str, Any]:
    """The tags of the enclosing contexts."""
    return dict(_tags.get() or {})


def clean_tags(call: Call) -> dict[str, tagging.TagValue]:
    """Return a call's tags as plain values; raise `tags.BadTag` where one cannot be."""
    return {name: tagging.clean(name, value) for name, value in call.tags.items()}


os.register_at_fork(after_in_child=_after_fork_in_child)
watch_environment()
