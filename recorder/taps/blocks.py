"""The blocks in the user's code: `with context(...)` and `with rows(...)`, also as decorators."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from ..diagnostics import call_site, say
from ..errors import UsageError
from ..tags import OF_TAP
from . import sessions
from .around import ROWS, TAGS, Stack, is_compiling
from .rows import Ids

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound="Scope")


class Scope:
    """A block that adds something to the taps inside it; also a decorator."""

    added: Any
    stack: Stack[Any]
    what: str  # for the compiler, which takes no other object of a class

    def anew(self: S) -> S:
        """Return a block like this; the compiler enters none that was made outside of its code."""
        raise NotImplementedError

    def __enter__(self: S) -> S:
        if not is_compiling():
            if self.stack.find_out is None and sessions.has_any:
                _note_blocks()
            self.stack.enter(self.added, self)
        elif sessions.listening:  # else nobody hears, and the compiler need not follow
            from .tracing import entered  # which takes torch's compiler

            entered(self.what, self.added)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not is_compiling():
            if not self.stack.leave(self):
                _tell_of_order(type(self).__name__)
        elif sessions.listening:
            from .tracing import left

            left(self.what)

    def __call__(self, function: F) -> F:
        """Return `function` with this around each of its calls."""
        what = type(self).__name__
        if inspect.isasyncgenfunction(function):
            raise TypeError(f"{what} cannot decorate an async generator; use `with` inside it")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def inner(*args: Any, **kwargs: Any) -> Any:
                with self.anew():
                    return await function(*args, **kwargs)

        elif inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def inner(*args: Any, **kwargs: Any) -> Any:
                return self._drive(function(*args, **kwargs))

        else:

            @functools.wraps(function)
            def inner(*args: Any, **kwargs: Any) -> Any:
                with self.anew():
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

    stack = TAGS
    what = "tags"

    def __init__(self, **tags: Any) -> None:
        for tag in tags:
            if tag in OF_TAP:
                advice = "write with rows(t=ids)" if tag == "rows" else "call the tag otherwise"
                raise UsageError(
                    f"context adds tags, and {tag!r} cannot be one, since a tap takes it as "
                    f"something else; {advice}"
                )
        self.added = tags

    def anew(self) -> context:
        """See `Scope`."""
        return context(**self.added)


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

    stack = ROWS
    what = "rows"

    def __init__(self, several: Mapping[str, Any] | None = None, /, **dims: Any) -> None:
        self.added = Ids.given({**(several or {}), **dims})

    def anew(self) -> rows:
        """See `Scope`."""
        made = rows(x=())
        made.added = self.added
        return made


def _note_blocks() -> None:
    """Have blocks noted from now on, where a session is asked for and no tap has opened it yet."""
    if "torch" in sys.modules:
        from . import repeats  # noqa: F401  # which begins as it is imported


_told: tuple[Any, ...] = ()


def _tell_of_order(name: str) -> None:
    """Say, once while the same sessions listen, that a block was left before one inside it."""
    global _told
    if not sessions.active or _told == sessions.active:
        return
    _told = sessions.active
    what, verb = ("rows", "rows are") if name == "rows" else ("tags", "a context is")
    say(
        f"{verb} left at {call_site()} while one that was entered later is not, as by "
        f"generators that are read in turn, so taps in between have each other's {what}; give "
        f"these at the taps, or make {name} a decorator of the generators"
    )
