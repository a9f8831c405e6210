"""The firing of a tap: to each session that wants to see it.

1. `fire` is what eager code calls; a compiled caller breaks its graph there.
2. `offer` merges the tags and rows around (`around`), and returns where no session wants to see the
   tap.
3. `_dispatch` opens the sessions that `GRAFT_*` asks for, if that has not happened yet, and offers
   the tap to each, recorders first, so that a recording holds what the job computed before anything
   is grafted over it. Where the dims name several tensors, each is a tap (`_parts_of`).

A session that fails never fails the job, unless it was told to (`--on-error raise`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..errors import LayoutError, ReplayError, is_from_the_job
from ..ranks import is_group_up
from . import sessions
from .around import ROWS, TAGS, blocks_around, rows_around, tags_around
from .call import Call, Run
from .rows import Ids, over

if TYPE_CHECKING:
    from .gradients import Heard

F = TypeVar("F", bound=Callable[..., Any])


class Repeat(Protocol):
    """A tap in a forward that a checkpoint repeats: see `repeats`."""

    tags: Mapping[str, Any] | None

    def give(self, call: Call) -> None:
        """Tell a call what is known of it."""


class Repeats(Protocol):
    """Knows what was around the forwards that may be repeated: see `repeats`."""

    def task(self) -> int:
        """Return the backward that runs here, -1 for none."""

    def again(self) -> Repeat | None:
        """Return what a tap repeats here."""

    def see(self, call: Call) -> None:
        """Note where a tap fires."""


log = logging.getLogger(__name__)
has_programs = False
"""Whether a compiled program has ever entered a block, which it may have left behind."""
repeats: Repeats | None = None
"""Knows the tags around the forward that a tap repeats, where there may be any; see `repeats`."""
capturing: Callable[..., bool] | None = None
"""Makes a tap one of a CUDA graph that is being captured, where such are watched; see `graphs`."""


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
    if has_programs:
        TAGS.leave_while(_is_of_program)
        ROWS.leave_while(_is_of_program)
    # The mark below makes a compiled caller break its graph here; this keeps the compiler from
    # tracing what we do with the tensor.
    outside_dynamo(offer)(name, value, dims, extras, grad, tags, site, forward, rows)


def _is_of_program(owner: Any) -> bool:
    """Whether a compiled program entered a block, and raised: none is under way in eager code."""
    return type(owner) is dict


def lose(name: str, site: str, reason: str) -> None:
    """Tell all sessions that a tap could not be handled."""
    call = Call(name, None, site=site)
    for session in sessions.active:
        session.lost(call, reason)


def offer(
    name: str,
    value: Any,
    dims: str | None,
    extras: Mapping[str, Any] | None,
    grad: bool,
    tags: Mapping[str, Any],
    site: str,
    forward: bool,
    rows: Mapping[str, Any] | tuple[Ids, ...] | None,
    heard: Heard | None = None,
    run: Run | None = None,
    step: int | None = None,
) -> None:
    """Offer a tap to all sessions: as `fire`, but for a compiled caller's eyes.

    Args:
        name: as all up to `forward`, what `fire` is given.
        value: see `fire`.
        dims: see `fire`.
        extras: see `fire`.
        grad: see `fire`.
        tags: see `fire`.
        site: see `fire`.
        forward: see `fire`.
        rows: see `tap`; or the ids themselves.
        heard: see `Call`.
        run: see `Call`.
        step: see `Call`.
    """
    around = tags_around()
    again: Repeat | None = None
    if repeats is not None and repeats.task() != -1 and run is None:
        again = repeats.again()
        if again is not None:
            around = again.tags
    own = tags
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
    look = capturing if run is None else None
    if look is not None and look(name, value, dims, extras, grad, own, site, forward, rows):
        return
    call = Call(name, value, dims, extras, grad, tags, about, site, forward)
    call.heard, call.run, call.step = heard, run, step
    if again is not None:
        again.give(call)
    elif repeats is not None and run is None:
        repeats.see(call)
    _dispatch(call, rows)


def fire_step() -> None:
    """End an iteration while any session is there."""
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
fire_step._torchdynamo_disable = True  # type: ignore[attr-defined]


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


def _dispatch(call: Call, rows: Mapping[str, Any] | tuple[Ids, ...] | None) -> None:
    if sessions.active and sessions.active[0].order < 0:
        sessions.open_waiting()
    parts: list[Call] = []
    try:
        if not _has_rows(call, rows):
            return
        if _has_parts(call.dims):
            parts = _parts_of(call)
            for part in parts:
                _offer(part)
        else:
            _offer(call)
    finally:
        for part in parts:
            part.forget()
        call.forget()


def _has_rows(call: Call, given: Mapping[str, Any] | tuple[Ids, ...] | None) -> bool:
    """Give a call the ids that hold for it; return whether those given at the tap can be read."""
    call.inside = blocks_around()
    around = rows_around() if call.dims else ()
    try:
        ids = given if isinstance(given, tuple) else Ids.given(given, at_tap=True) if given else ()
        call.rows = over(around, ids) if ids else around
        if call.own_rows is not None:
            call.inside = call.own_rows
            call.own_rows = over(call.own_rows, ids) if call.dims else ()
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
        if call.run is not None and call.run.is_before != session.grafts:
            continue
        try:
            session.on_tap(call)
        except ReplayError:
            raise  # asked for: --on-error raise, --on-missing raise
        except Exception as err:  # the job comes first, and so do the other taps
            if is_from_the_job(err):
                raise
            log.debug("at a tap", exc_info=True)
            session.lost(call, f"{type(err).__name__}: {err}")
