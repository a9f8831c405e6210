"""The line in the user's code: `tap` and `step`.

1. `tap` returns at once while no session is active.
2. Otherwise `fire` merges the tags and rows around (`around`), and returns where no session wants
   to see the tap.
3. `_dispatch` opens the sessions that `GRAFT_*` asks for, if that has not happened yet, and offers
   the tap to each, recorders first, so that a recording holds what the job computed before anything
   is grafted over it. Where the dims name several tensors, each is a tap (`_parts_of`).

A session that fails never fails the job, unless it was told to (`--on-error raise`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import LayoutError, ReplayError, is_from_the_job
from ..ranks import is_group_up
from . import sessions
from .around import blocks_around, rows_around, tags_around
from .call import Call
from .rows import Ids, over

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger(__name__)


def tap(
    name: str,
    value: T,
    *,
    dims: str | None = None,
    extras: Mapping[str, Any] | None = None,
    grad: bool = False,
    rows: Mapping[str, Any] | None = None,
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
        rows: which row is which along some of its dims, as in `{"n": ids[perm]}`; see `rows`, whose
            ids for these dims give way.
        **tags: what tells this firing from others of the name: strings, numbers, booleans, None
            or lists of these.

    Returns:
        `value` itself. A graft overwrites its elements in place.

    Raises:
        ReplayError: only in a replay with `--on-error raise` or `--on-missing raise`.
    """
    if not sessions.active:
        return value
    fire(name, value, dims, extras, grad, tags, rows=rows)
    return value


def step() -> None:
    """End an iteration; call it on every rank. Steps count from 0."""
    if sessions.active or sessions.parked:
        _fire_step()


def fire(
    name: str,
    value: Any,
    dims: str | None,
    extras: Mapping[str, Any] | None,
    grad: bool,
    tags: Mapping[str, Any],
    site: str = "",
    forward: bool = True,
    rows: Mapping[str, Any] | None = None,
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
        rows: see `tap`.
    """
    around = tags_around()
    if around is not None:
        tags = {**around, **tags}
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
    outside_dynamo(_dispatch)(name, value, dims, extras, grad, tags, about, site, forward, rows)


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
    rows: Mapping[str, Any] | None,
) -> None:
    if sessions.active and sessions.active[0].order < 0:
        sessions.open_waiting()
    call = Call(name, value, dims, extras, grad, tags, about, site, forward)
    calls = [call]
    try:
        if not _has_rows(call, rows):
            return
        if _has_parts(dims):
            calls = _parts_of(call)
        for one in calls:
            _offer(one)
    finally:
        for one in calls:
            one.forget()
        call.forget()


def _has_rows(call: Call, given: Mapping[str, Any] | None) -> bool:
    """Give a call the ids that hold for it; return whether those given at the tap can be read."""
    call.inside = blocks_around()
    around = rows_around() if call.dims else ()
    try:
        call.rows = over(around, Ids.given(given, at_tap=True)) if given else around
    except Exception as err:
        if is_from_the_job(err):
            raise
        for session in sessions.active:
            session.lost(call, str(err))
        return False
    return True


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
