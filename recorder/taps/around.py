"""What holds around a tap: the tags and the ids of rows that blocks add, and those of hooks.

A `Stack` keeps the way back, so that blocks that are left out of order, as those of generators that
are read in turn, take nothing from one another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .rows import Ids, over

V = TypeVar("V")
_HERE = object()


@dataclass(frozen=True)
class _Around:
    """What holds inside a block, what is around it included; the way back is part of it.

    `where` is what `Stack.find_out` said as it was entered.
    """

    value: Any
    added: Any
    owner: Any
    outer: _Around | None
    where: Any = None


class Stack(Generic[V]):
    """What the blocks of one kind add, in each thread.

    Args:
        name: of its variable.
        inside: returns what holds in a block, of what holds around it, None where nothing does, and
            of what it adds.

    Attributes:
        find_out: says where a block is entered, for `below`; None where nobody asks.
        moved: is told what held, and what holds now, in this order; None where nobody asks.
    """

    def __init__(self, name: str, inside: Callable[[V | None, V], V]) -> None:
        self._inside = inside
        self.find_out: Callable[[], Any] | None = None
        self.moved: Callable[[V | None, V | None], None] | None = None
        self._around: ContextVar[_Around | None] = ContextVar(name, default=None)

    @property
    def value(self) -> V | None:
        """What holds here."""
        around = self._around.get()
        return None if around is None else around.value

    def enter(self, added: V, owner: object) -> None:
        """Let more hold from now on, until its owner leaves."""
        outer = self._around.get()
        value = self._inside(None if outer is None else outer.value, added)
        where = None if self.find_out is None else self.find_out()
        self._move(outer, _Around(value, added, owner, outer, where))

    def mark(self) -> object:
        """Return what tells what is entered from now on."""
        return self._around.get()

    def below(self, is_so: Callable[[Any], bool]) -> object:
        """Return a mark: below what was entered last, for as long as it is so where that was."""
        around = self._around.get()
        while around is not None and is_so(around.where):
            around = around.outer
        return around

    def value_at(self, mark: Any) -> V | None:
        """Return what held as a mark was made."""
        return None if mark is None else mark.value

    def since(self, mark: object, *, until: Any = _HERE) -> V | None:
        """Return what alone holds that was entered since a mark; None where nothing was.

        Args:
            mark: what is around it.
            until: a later mark; what was entered after that is left out.
        """
        around, added = self._around.get() if until is _HERE else until, []
        while around is not None and around is not mark:
            added.append(around.added)
            around = around.outer
        value: V | None = None
        for one in reversed(added):
            value = self._inside(value, one)
        return value

    def leave(self, owner: object) -> bool:
        """Let hold no more what an owner entered, nor what was entered since; an owner is itself.

        Returns whether nothing was entered since.
        """
        first = around = self._around.get()
        while around is not None and around.owner is not owner:
            around = around.outer  # an inner one that was never left, as in a dropped generator
        if around is not None:
            self._move(first, around.outer)
        return first is None or first.owner is owner

    def leave_while(self, is_over: Callable[[Any], bool]) -> None:
        """Let hold no more what was entered last by owners of whom that is over."""
        first = around = self._around.get()
        while around is not None and is_over(around.owner):
            around = around.outer
        if around is not first:
            self._move(first, around)

    def owners(self) -> list[Any]:
        """Return who has entered what holds, the innermost first."""
        around, found = self._around.get(), []
        while around is not None:
            found.append(around.owner)
            around = around.outer
        return found

    def leave_one(self) -> None:
        """Let hold no more what was entered last."""
        around = self._around.get()
        if around is not None:
            self._move(around, around.outer)

    def _move(self, before: _Around | None, now: _Around | None) -> None:
        self._around.set(now)
        if self.moved is not None:
            self.moved(self.value_at(before), self.value_at(now))


def _inside_of_tags(outer: Mapping[str, Any] | None, new: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**outer, **new} if outer else new


def _inside_of_rows(outer: tuple[Ids, ...] | None, new: tuple[Ids, ...]) -> tuple[Ids, ...]:
    block = tuple(one.names for one in new)
    return over(outer or (), tuple(Ids(one.names, one.of, block=block) for one in new))


TAGS: Stack[Mapping[str, Any]] = Stack("graft_context", _inside_of_tags)
ROWS: Stack[tuple[Ids, ...]] = Stack("graft_rows", _inside_of_rows)


def tags_around() -> Mapping[str, Any] | None:
    """Return the tags of the contexts around, None where there is none."""
    return TAGS.value


_from_here_on: ContextVar[Callable[[], tuple[Ids, ...]] | None] = ContextVar(
    "graft_rows_from_here_on", default=None
)


def blocks_around() -> tuple[Ids, ...]:
    """Return the ids of the blocks of rows around."""
    return ROWS.value or ()


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


def is_compiling() -> bool:
    """Whether the compiler is tracing; a constant in what it traces."""
    if not _has_torch():
        return False
    import torch

    return torch.compiler.is_compiling()


def _has_torch() -> bool:
    return "torch" in sys.modules


# As `torch.compiler.assume_constant_result` marks it: the compiler would look at every module.
_has_torch._dynamo_marked_constant = True  # type: ignore[attr-defined]
