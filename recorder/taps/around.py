"""What a `with` block, or a decorated function, adds to the taps inside it.

`Scope` keeps the way back, so that blocks that are left out of order, as those of generators that
are read in turn, take nothing from one another.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from ..diagnostics import call_site, say
from ..errors import UsageError
from ..tags import OF_TAP
from . import sessions
from .rows import Ids, over

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound="Scope")


@dataclass(frozen=True)
class _Around:
    """What holds inside a block, what is around it included; the way back is part of it."""

    value: Any
    owner: Scope | None
    outer: _Around | None


class Scope:
    """A block that adds something to the taps inside it; also a decorator.

    What it adds, and how that goes together with what is around it, is `_inside`'s to say.
    """

    _around: ContextVar[_Around | None]
    _what: str

    def _inside(self, outer: Any) -> Any:
        """Return what holds inside, where `outer` holds around it; None where nothing does."""
        raise NotImplementedError

    def __enter__(self: S) -> S:
        if not sessions.active and _is_compiling():
            return self  # nobody listens, and the compiler cannot follow what comes next
        outer = self._around.get()
        self._around.set(_Around(self._inside(outer and outer.value), self, outer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not sessions.active and _is_compiling():
            return
        around = self._around.get()
        if around is not None and around.owner is not self:
            _tell_of_order(self._what)
        while around is not None and around.owner is not self:
            around = around.outer  # an inner one that was never left, as in a dropped generator
        if around is not None:
            self._around.set(around.outer)

    def __call__(self, function: F) -> F:
        """Return `function` with this around each of its calls."""
        what = type(self).__name__
        if inspect.isasyncgenfunction(function):
            raise TypeError(f"{what} cannot decorate an async generator; use `with` inside it")
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
        """Run a generator with this around its own code, and not around what runs in between."""
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


class context(Scope):  # noqa: N801  # read as a verb at the call site
    """Add tags to every tap inside: `with context(phase="prefill"): ...`.

    Also a decorator, of coroutine functions and generators too. Contexts nest; the inner value of a
    tag wins, and a tag at the call wins over both. A new thread starts without tags.

    Args:
        **tags: the tags.

    Raises:
        UsageError: one has the name of something else that a tap takes, such as `rows`.
    """

    _around = ContextVar("graft_context", default=None)
    _what = "tags"

    def __init__(self, **tags: Any) -> None:
        for tag in tags:
            if tag in OF_TAP:
                advice = "write with rows(t=ids)" if tag == "rows" else "call the tag otherwise"
                raise UsageError(
                    f"context adds tags, and {tag!r} cannot be one, since a tap takes it as "
                    f"something else; {advice}"
                )
        self._new = tags

    def _inside(self, outer: Mapping[str, Any] | None) -> Mapping[str, Any]:
        return {**outer, **self._new} if outer else self._new


class rows(Scope):  # noqa: N801  # read as a verb at the call site
    """Say which row of the tensors tapped inside is which: `with rows(t=ids): ...`.

    Also a decorator, as `context` is. It nests: a dim's innermost ids hold, and those at a tap
    before them. What a tap's dims do not have is not meant for that tap. A new thread starts
    without.

    Args:
        several: the names of dims that have their ids together, such as `"b s"`, and those.
        **dims: the name of a dim, and its ids: an integer tensor or list of one integer a row, or
            of several, one more dim; -1 for padding. A callable that returns them is called only if
            a tap wants to know.

    Raises:
        UsageError: no dims are named, or one twice.
    """

    _around = ContextVar("graft_rows", default=None)
    _what = "rows"

    def __init__(self, several: Mapping[str, Any] | None = None, /, **dims: Any) -> None:
        self._new = Ids.given({**(several or {}), **dims})
        self._block = tuple(one.names for one in self._new)

    def _inside(self, outer: tuple[Ids, ...] | None) -> tuple[Ids, ...]:
        new = (Ids(one.names, one.of, block=self._block) for one in self._new)
        return over(outer or (), tuple(new))


def tags_around() -> Mapping[str, Any] | None:
    """Return the tags of the contexts around, None where there is none."""
    around = context._around.get()
    return None if around is None else around.value


_from_here_on: ContextVar[Callable[[], tuple[Ids, ...]] | None] = ContextVar(
    "graft_rows_from_here_on", default=None
)


def blocks_around() -> tuple[Ids, ...]:
    """Return the ids of the blocks of rows around."""
    around = rows._around.get()
    given: tuple[Ids, ...] = () if around is None else around.value
    return given


def rows_around() -> tuple[Ids, ...]:
    """Return the ids of the rows around; those of a block hold before a hook's."""
    given, hooks = blocks_around(), _from_here_on.get()
    return given if hooks is None else over(hooks(), given)


def from_here_on(new: tuple[Ids, ...] | Callable[[], tuple[Ids, ...]]) -> None:
    """Let ids hold in this thread until others do; for hooks, which have no block.

    Args:
        new: the ids, or what returns them as a tap asks, for as long as they hold.
    """
    _from_here_on.set(new if callable(new) else lambda: new)


_told: tuple[Any, ...] = ()


def _tell_of_order(what: str) -> None:
    """Say, once while the same sessions listen, that a block was left before one inside it."""
    global _told
    if not sessions.active or _told == sessions.active:
        return
    _told = sessions.active
    name = "rows" if what == "rows" else "a context"
    say(
        f"{name} is left at {call_site()} while one that was entered later is not, as by "
        f"generators that are read in turn, so taps in between have each other's {what}; give "
        f"these at the taps, or make {name.split()[-1]} a decorator of the generators"
    )


def _is_compiling() -> bool:
    """Whether the compiler is tracing; a constant in what it traces."""
    if "torch" not in sys.modules:
        return False
    import torch

    return torch.compiler.is_compiling()
