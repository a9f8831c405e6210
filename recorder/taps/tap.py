"""The line in the user's code: `tap`, `step`, `context`.

1. `tap` returns at once while no session is active.
2. Otherwise `fire` merges the context's tags, and returns where no session wants to see the tap.
3. `_dispatch` opens the sessions that `GRAFT_*` asks for, if that has not happened yet, and offers
   the tap to each, recorders first, so that a recording holds what the job computed before anything
   is grafted over it. Where the dims name several tensors, each is a tap (`_parts_of`).

A session that fails never fails the job, unless it was told to (`--on-error raise`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from ..diagnostics import call_site, say
from ..errors import LayoutError, ReplayError, is_from_the_job
from ..ranks import is_group_up
from . import sessions
from .call import Call

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger(__name__)

_around: ContextVar[_Around | None] = ContextVar("graft_context", default=None)


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
        dims: the tensor's layout, such as `"b s h[tp] d"`. If it holds several tensors along a dim,
            as in `"b s {q: (h*d) | k: g | v: g}"`, each is a tap of its name, and none of `name`.
        extras: small facts to go with the record, JSON-able; they reach the transform.
        grad: record and graft the gradient of `value` too, when it comes.
        **tags: what tells this firing from others of the name: strings, numbers, booleans, None
            or lists of these.

    Returns:
        `value` itself. A graft overwrites its elements in place.

    Raises:
        ReplayError: only in a replay with `--on-error raise` or `--on-missing raise`.
    """
    if not sessions.active:
        return value
    fire(name, value, dims, extras, grad, tags)
    return value


def step() -> None:
    """End an iteration; call it on every rank. Steps count from 0."""
    if sessions.active or sessions.parked:
        _fire_step()


@dataclass(frozen=True)
class _Around:
    """The tags of one `context`, those around it included; the way back is part of it."""

    tags: Mapping[str, Any]
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
        if not sessions.active and _is_compiling():
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
        if not sessions.active and _is_compiling():
            return
        around = _around.get()
        if around is not None and around.owner is not self:
            _tell_of_order()
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


_told: tuple[Any, ...] = ()


def _tell_of_order() -> None:
    """Say, once while the same sessions listen, that a context was left before one inside it."""
    global _told
    if not sessions.active or _told == sessions.active:
        return
    _told = sessions.active
    say(
        f"a context is left at {call_site()} while one that was entered later is not, as by "
        "generators that are read in turn, so taps in between have each other's tags; give these "
        "at the taps, or make context a decorator of the generators"
    )


def _is_compiling() -> bool:
    """Whether the compiler is tracing; a constant in what it traces."""
    if "torch" not in sys.modules:
        return False
    import torch

    return torch.compiler.is_compiling()


def fire(
    name: str,
    value: Any,
    dims: str | None,
    extras: Mapping[str, Any] | None,
    grad: bool,
    tags: Mapping[str, Any],
    site: str = "",
    forward: bool = True,
) -> None:
    """Fire a tap while a session is active; a hand-written one, or a module's.

    Args:
        name: as all up to `tags`, what `tap` is given.
        value: see `tap`.
        dims: see `tap`.
        extras: see `tap`.
        grad: see `tap`.
        tags: see `tap`.
        site: what to call the place in messages; "" for the caller's.
        forward: whether the value itself is meant, and not its gradient alone.
    """
    around = _around.get()
    if around is not None:
        tags = {**around.tags, **tags}
    values = tags.values()
    about = (name, *tags, *values, *map(type, values))
    try:
        for session in sessions.active:
            if about not in session.ignored or (session.is_unsettled and is_group_up()):
                break
        else:
            if not _has_parts(dims):  # whose names are others
                return
    except Exception as err:
        if is_from_the_job(err) and not _is_a_comparison(err):
            raise
        # else a tag that cannot be hashed or compared
    # The mark below makes a compiled caller break its graph here; this keeps the compiler from
    # tracing what we do with the tensor.
    outside_dynamo(_dispatch)(name, value, dims, extras, grad, tags, about, site, forward)


def _fire_step() -> None:
    if any(session.order < 0 for session in sessions.every()):
        sessions.open_waiting()
    for session in sessions.every():
        try:
            session.on_step()
        except Exception as err:  # the job comes first
            if is_from_the_job(err):
                raise
            log.debug("at a step", exc_info=True)


def _is_a_comparison(err: Exception) -> bool:
    """Whether an exception comes from a tag's own `__eq__` or `__hash__`."""
    trace = err.__traceback__.tb_next if err.__traceback__ is not None else None
    return trace is not None and trace.tb_frame.f_code.co_name in ("__eq__", "__hash__")


# Sessions say more of it to the compiler (`bits.never_compiled`), which takes torch.
fire._torchdynamo_disable = True  # type: ignore[attr-defined]
_fire_step._torchdynamo_disable = True  # type: ignore[attr-defined]


_undynamoed: dict[Any, Any] = {}


def outside_dynamo(function: F) -> F:
    """Return a function that the compiler traces neither itself, nor what it calls."""
    if "torch._dynamo" not in sys.modules:
        return function
    found = _undynamoed.get(function)
    if found is None:
        import torch

        found = _undynamoed[function] = torch.compiler.disable(function)
    return found  # type: ignore[no-any-return]


def _dispatch(
    name: str,
    value: Any,
    dims: str | None,
    extras: Mapping[str, Any] | None,
    grad: bool,
    tags: Mapping[str, Any],
    about: tuple[Any, ...],
    site: str,
    forward: bool,
) -> None:
    if sessions.active and sessions.active[0].order < 0:
        sessions.open_waiting()
    call = Call(name, value, dims, extras, grad, tags, about, site, forward)
    calls = [call]
    try:
        if _has_parts(dims):
            calls = _parts_of(call)
        for one in calls:
            _offer(one)
    finally:
        for one in calls:
            one.forget()
        call.forget()


def _has_parts(dims: Any) -> bool:
    return type(dims) is str and "{" in dims


def _parts_of(call: Call) -> list[Call]:
    """Return the taps that a tap of several tensors stands for; none where that cannot be read."""
    from .parts import calls_of

    try:
        return calls_of(call)
    except LayoutError as err:
        for session in sessions.active:
            session.lost(call, str(err))
        return []


def _offer(call: Call) -> None:
    """Offer a tap to each session."""
    for session in sessions.active:
        try:
            session.on_tap(call)
        except ReplayError:
            raise  # asked for: --on-error raise, --on-missing raise
        except Exception as err:  # the job comes first, and so do the other taps
            if is_from_the_job(err):
                raise
            log.debug("at a tap", exc_info=True)
            session.lost(call, f"{type(err).__name__}: {err}")
