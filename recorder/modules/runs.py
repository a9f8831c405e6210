"""One call of a model whose rows are followed, and which of them a tap is in.

Runs lie in one another as calls do. None is taken away as a call ends: it says that it is over, and
what is around it holds again, so that a hook that never fires does no harm.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..systems import missed
from ..taps.around import from_here_on
from ..taps.rows import Ids
from .hooks import innermost

_current: ContextVar[Run | None] = ContextVar("graft_run", default=None)


class Run:
    """One call of a model.

    Attributes:
        module: the model.
        ids: the ids that hold in it.
        of: what the call is given that tells it from others: its tokens, its mask, its cache.
        shape: that of its tokens, () where they are not known.
        kept: what returns the ids of what the model's head gets, None where that is all.
        ended: is given the model's output.
        after: of a server, the ids of the tokens of which logits are made once it has ended.
        holders: how many hooks have seen it begin, and not end.
        stays: whether its ids hold until the next call, and not only while it runs.
        by_hand: whether the job calls the forward itself, so that no hook sees its end.
    """

    def __init__(
        self,
        module: Any,
        ids: tuple[Ids, ...],
        of: tuple[Any, ...] = (),
        *,
        stays: bool = False,
        by_hand: bool = False,
    ) -> None:
        self.module = weakref.ref(module)
        self.ids = ids
        self.of = tuple(map(id, of))
        self.shape: tuple[int, ...] = ()
        self.kept: Callable[[], Any] | None = None
        self.ended: Callable[[Any], None] | None = None
        self.after: tuple[Ids, ...] = ()
        self.stays, self.by_hand = stays, by_hand
        self.holders = 1
        self._outer: Run | None = None

    @property
    def is_running(self) -> bool:
        """Whether the call has not ended."""
        if self.by_hand and self.holders and not self._is_on_stack():
            self.holders = 0
        return self.holders > 0

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
        ended, self.ended, self.kept, self.of = self.ended, None, None, ()
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


def _rows() -> tuple[Ids, ...]:
    """Return the ids that hold where a tap fires."""
    run = _current.get()
    while run is not None:
        if run.stays or run.is_running:
            return run.ids
        run = run.outer
    return ()
