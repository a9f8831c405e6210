"""The hooks that make modules taps: a row of a table at a module is a `Binding`, and fires there.

1. A module with bindings gets one hook before its forward and one after, as its rows need.
2. Of a module that stands in several places, `Places` says which of them a call comes from.
3. A hook takes each row's value out of the call, and fires the tap as a hand-written one would.
4. What does not fit is said once, and left alone: the job goes on.

A hook acts on its own module alone: a deep copy of a model has hooks that do nothing.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import FrameType
from typing import Any, TypeVar

import torch

from ..bits import never_compiled
from ..taps import sessions
from ..taps.around import is_compiling
from ..taps.firing import outside_dynamo
from ..taps.sources import sources
from .bindings import Binding, guarded, numbers
from .members import Call

log = logging.getLogger(__name__)
_DEEPEST = 80  # frames from a call to the module that it is made for

T = TypeVar("T")


def innermost(
    at: Mapping[int, tuple[weakref.ref[Any], T]], frame: FrameType | None
) -> tuple[T, FrameType] | None:
    """Return what is held of the innermost module on the stack that anything is held of.

    With it the frame that it is at.

    Args:
        at: a module's id -> it, and what is held of it.
        frame: where to begin.
    """
    for _ in range(_DEEPEST):
        if frame is None:
            return None
        code = frame.f_code
        # Of no other frames: to look at a frame's locals lets those of older Pythons keep what
        # they are until it ends.
        if code.co_argcount and code.co_varnames[0] == "self":
            module = frame.f_locals.get("self")
            found = at.get(id(module))
            if found is not None and found[0]() is module:
                return found[1], frame
        frame = frame.f_back
    return None


class Places:
    """Where a module that stands in several places is called: servers share one rope by all layers.

    Each place is told by the modules that hold it there and nowhere else. What no module tells
    apart, such as a layer that stands in a list twice, counts as its first place, called again.

    Args:
        names: the module's qualified names.
        modules: all modules of the root by name.
        base: the name of the model that it is called in, "" for the root.
    """

    def __init__(self, names: Sequence[str], modules: Mapping[str, Any], base: str) -> None:
        self._base = f"{base}." if base else ""
        above = {
            name: {id(modules[one]): modules[one] for one in _above(name) if one in modules}
            for name in names
        }
        self._at: dict[int, tuple[weakref.ref[Any], str]] = {}
        for name, holders in above.items():
            for key, holder in holders.items():
                sharing = [one for one in names if key in above[one]]
                # A call that comes from a module above several places, and from none between, is
                # that of the place right below it.
                first = min(sharing, key=lambda one: len(above[one]))
                self._at[key] = weakref.ref(holder), first if len(sharing) > 1 else name

    def here(self, frame: FrameType | None) -> str | None:
        """Return the place that a call comes from, by its name in the model; None for another's."""
        found = innermost(self._at, frame)
        if found is None or not found[0].startswith(self._base):
            return None
        return found[0][len(self._base) :]


def _above(name: str) -> list[str]:
    """Return the names of the modules that hold one, the innermost first, the root as ""."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


class Turns:
    """How often a function was called in one run of a module, in each thread.

    A run begins with the module's call, or, where its forward is called by hand, in another frame.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def begin(self) -> None:
        """Note that a run begins."""
        self._local.run = None

    def next(self, frame: FrameType, most: int) -> int:
        """Return the number of a call, from 0.

        Args:
            frame: that of the module's forward from which it comes.
            most: how many there are in a run.
        """
        run, turn, place = getattr(self._local, "run", None), 0, frame.f_lasti
        # A frame that begins anew may have the place in memory of the one before. In one run calls
        # come from further and further down, or from one place in a loop.
        if run is not None and run[0] == id(frame):
            is_further = place > run[2] or (place == run[2] and run[1] + 1 < most)
            turn = run[1] + 1 if is_further else 0
        self._local.run = (id(frame), turn, place)
        return turn


class Shared:
    """Which of several models that hold a module runs: a call of it is that model's alone.

    Args:
        model: the model that a hook is for.
        rivals: all models that have taps at the module, the first found first; it grows.
    """

    def __init__(self, model: Any, rivals: list[weakref.ref[Any]]) -> None:
        self._model = weakref.ref(model)
        self._rivals = rivals

    @property
    def has_rivals(self) -> bool:
        """Whether there are several."""
        return len(self._rivals) > 1

    def is_running(self, frame: FrameType | None) -> bool:
        """Whether the innermost of them on the stack is this hook's; of none, the first counts."""
        if not self.has_rivals:
            return True
        alive = [(ref, model) for ref in self._rivals if (model := ref()) is not None]
        found = innermost({id(model): (ref, model) for ref, model in alive}, frame)
        running = found[0] if found is not None else alive[0][1]
        return running is self._model()


class Hook:
    """What torch calls around a module's forward.

    Attributes:
        also: called before the taps, whether or not anything records, as a hook is.
        ping: as `also`, and without what the hook is called with.
        ends: whether it is there to tell that a run of the module has ended.
        number: by which a compiled program knows it.
    """

    __name__ = "graft_tap"  # torch.jit asks a hook for it

    def __init__(
        self,
        module: Any,
        bindings: Sequence[Binding],
        turns: Sequence[Turns],
        places: Places | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.is_detached = False
        self.shared = shared
        self.module = weakref.ref(module)
        self.bindings = bindings
        self.turns = turns
        self.places = places
        self.also: Callable[..., None] | None = None
        self.ping: Callable[[], None] | None = None
        self.ends = False
        self.number = str(next(numbers))  # which, unlike an integer, is constant to it
        sources[self.number] = self

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: Any = None, output: Any = None
    ) -> Any:
        """Fire the taps of a call; return what the module gives in place of its output, or None."""
        if self.is_detached:  # torch may have listed it before
            return None
        if not sessions.listening and self.also is None and self.ping is None:
            return None
        if is_compiling() and self.is_plain:
            from .traced import ended, traced_call  # which takes torch's compiler

            if self.ends:
                return ended(self.number)
            number = "" if self.ping is None and not self.turns else self.number
            return traced_call(self.bindings, Call(module, args, kwargs, output), number)
        if self.ends:
            return None
        _called(self, module, args, kwargs, output)
        return None

    @property
    def is_plain(self) -> bool:
        """Whether its taps need nothing but the call, which is all that a compiled program has."""
        is_shared = self.shared is not None and self.shared.has_rivals
        return not is_shared and self.places is None and self.also is None

    def __reduce__(self) -> Any:
        # A model that is copied or saved takes none of this along, and a hook cannot be left out:
        # it becomes a call that takes anything and does nothing, wherever it is loaded.
        return getattr, (nullcontext(), "__exit__")


def is_traced() -> bool:
    """Whether torch.jit traces what runs: it would see what a tap does, and keep it."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call, unused-ignore]


def is_dead(hook: Any) -> bool:
    """Whether something is what a hook becomes in a copy of its model."""
    return getattr(hook, "__func__", None) is nullcontext.__exit__


def _called(*call: Any) -> None:
    outside_dynamo(_fire_all)(*call)


never_compiled(_called)  # of which the compiler does not ask an object's `__call__`


def _fire_all(
    hook: Hook, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> None:
    """Fire the taps of a call of a hook's own module."""
    if hook.module() is not module:
        return
    if hook.also is not None:
        hook.also(module, args, kwargs, output)
    if hook.ping is not None:
        hook.ping()
    if not sessions.active:
        return
    if is_traced():
        for binding in hook.bindings:
            binding.misfit = binding.misfit or "it ran while torch.jit traced it, which sees all"
        return
    for turns in hook.turns:
        turns.begin()
    if hook.shared is not None and not hook.shared.is_running(sys._getframe(1)):
        return
    call = Call(module, args, kwargs, output)
    here = None if hook.places is None else hook.places.here(sys._getframe(1))
    for binding in hook.bindings:
        if hook.places is None or binding.module == here:
            guarded(binding, call)
