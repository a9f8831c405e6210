"""One call of a model whose rows are followed, and which of them a tap is in.

Runs lie in one another as calls do. None is taken away as a call ends: it says that it is over, and
what is around it holds again, so that a hook that never fires does no harm. One whose end nobody
saw, as where a forward was interrupted, is given up as something outside of its model is called.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

from ..systems import missed
from ..taps.around import from_here_on
from ..taps.rows import Ids
from .hooks import innermost


class Follower(Protocol):
    """Who follows rows.

    Attributes:
        is_ended: whether it does no more.
    """

    is_ended: bool


_current: ContextVar[Run | None] = ContextVar("graft_run", default=None)


class Run:
    """One call of a model.

    Attributes:
        module: the model.
        ids: the ids that hold in it.
        shape: that of its tokens, () where they are not known.
        kept: what returns the ids of what the model's head gets, None where that is all.
        ended: is given the model's output.
        after: of a server, the ids of the tokens of which logits are made once it has ended.
        holders: how many hooks have seen it begin, and not end.
        readers: those whose hooks have seen it begin.
        follower: who follows rows, which may end before the call does.
        stays: whether its ids hold until the next call, and not only while it runs.
        by_hand: whether the job calls the forward itself, so that no hook sees its end.

    Args:
        module: see above, as all that follow.
        ids: see above.
        given: what tells the call from others: its tokens, its mask, its cache. Held weakly.
        follower: see above.
        stays: see above.
        by_hand: see above.
    """

    def __init__(
        self,
        module: Any,
        ids: tuple[Ids, ...],
        given: tuple[Any, ...],
        follower: Follower,
        *,
        stays: bool = False,
        by_hand: bool = False,
    ) -> None:
        self.module = weakref.ref(module)
        self.ids = ids
        self._given = tuple(map(_held, given))
        self.follower = follower
        self.shape: tuple[int, ...] = ()
        self.kept: Callable[[], Any] | None = None
        self.ended: Callable[[Any], None] | None = None
        self.after: tuple[Ids, ...] = ()
        self.stays, self.by_hand = stays, by_hand
        self.holders = 1
        self.readers: list[object] = []
        self._outer: Run | None = None

    @property
    def is_running(self) -> bool:
        """Whether the call has not ended."""
        if self.by_hand and self.holders and not self._is_on_stack():
            self.holders = 0
        return self.holders > 0 and not self.follower.is_ended

    def is_given(self, given: tuple[Any, ...], reader: object = None) -> bool:
        """Whether it is a call that is given the very same.

        Args:
            given: what that is given.
            reader: whose hook asks; one that has seen the run begin asks of another call.
        """
        if reader is not None and any(one is reader for one in self.readers):
            return False
        return len(given) == len(self._given) and all(
            held() is one for held, one in zip(self._given, given, strict=True)
        )

    @property
    def outer(self) -> Run | None:
        """The run that this one is in, if that has not ended."""
        while self._outer is not None and not self._outer.is_running:
            self._outer = self._outer._outer
        return self._outer

    def begin(self) -> None:
        """Let it be what runs in this thread from now on."""
        self._outer = current()
        _current.set(self)
        from_here_on(_rows)
        missed.is_running(True)

    def end(self, output: Any) -> None:
        """Hear from a hook that the call has ended."""
        self.holders -= 1
        if self.holders > 0:
            return
        if not self.stays:
            self.ids = ()
        ended, self.ended, self.kept, self._given = self.ended, None, None, ()
        missed.is_running(self.outer is not None)
        if ended is not None and output is not None:
            ended(output)

    def _is_on_stack(self) -> bool:
        module = self.module()
        if module is None:
            return False
        return innermost({id(module): (self.module, None)}, sys._getframe(1)) is not None


def current() -> Run | None:
    """Return the innermost run of this thread that has not ended."""
    run = _current.get()
    if run is None or run.is_running:
        return run
    return run.outer


def latest() -> Run | None:
    """Return the run that began last in this thread, over or not."""
    return _current.get()


def around(is_in: Callable[[Any], bool]) -> Run | None:
    """Return the run that a call is in, having given up those whose end nobody saw.

    Args:
        is_in: whether what is called is inside of a model.
    """
    run = current()
    while run is not None and not is_in(run.module()):
        run.holders = 0
        run = run.outer
    return run


def _rows() -> tuple[Ids, ...]:
    """Return the ids that hold where a tap fires."""
    run = _current.get()
    if run is not None and run.stays and not run.follower.is_ended:
        return run.ids
    run = current()
    return () if run is None else run.ids


def _held(one: Any) -> Callable[[], Any]:
    """Return what returns something for as long as it is there."""
    try:
        return weakref.ref(one)
    except TypeError:  # a number, or nothing
        return lambda: one
