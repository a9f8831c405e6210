"""Taps of what a function gives while a module runs: rope, the logits of a router.

The function is replaced where its path names it, by one that asks which tapped module runs: it is
the innermost whose frame is on the stack, since a region that checkpointing stops early never tells
that a module has ended. Outside of such modules it is called as it was.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Collection, Mapping
from types import FrameType
from typing import Any

from ..bits import never_compiled
from ..taps import sessions
from ..taps.around import is_compiling
from ..taps.firing import outside_dynamo
from ..taps.sources import sources
from .bindings import Binding, guarded
from .hooks import Places, Shared, Turns, innermost
from .members import Call, parameters_of

_patched: dict[str, Patch] = {}


class Line:
    """The rows that one model has of a function while one module runs.

    Args:
        bindings: what they are at the module.
        turns: counts the function's calls.
        places: where the module stands, if in several places.
        shared: which of several models that hold it runs.
    """

    def __init__(
        self, bindings: list[Binding], turns: Turns, places: Places | None, shared: Shared
    ) -> None:
        self.bindings, self.turns, self.places, self.shared = bindings, turns, places, shared

    def running(self, frame: FrameType, of: FrameType) -> list[tuple[Binding, int]]:
        """Return which of them a call is for, each with its turn.

        Args:
            frame: that from which the function is called.
            of: that of the module's forward.
        """
        if not self.shared.is_running(frame):
            return []
        here = None if self.places is None else self.places.here(frame)
        turn = self.turns.next(of, max(len(one.names) for one in self.bindings))
        return [(one, turn) for one in self.bindings if self.places is None or one.module == here]


class Patch:
    """One function that is replaced, and for which modules.

    Attributes:
        path: by which it is known.
        at: the rows that models have of it, for each module.
        original: the function.
        known: all these rows, by number.
        is_plain: whether they need nothing but the call and which module runs.
    """

    def __init__(self, path: str, holder: Any, name: str, original: Callable[..., Any]) -> None:
        self.path = path
        sources[path] = self
        self.known: dict[str, Binding] = {}
        self.is_plain = True
        self.at: dict[int, tuple[weakref.ref[Any], list[Line]]] = {}
        self.original = original
        parameters_of(original)
        self._holder, self._name = holder, name
        self._given = vars(holder).get(name)  # None where a class above has it

        @functools.wraps(original)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            if not sessions.listening:
                return original(*args, **kwargs)
            if is_compiling() and self.is_plain:
                from .traced import traced_function  # which takes torch's compiler

                return traced_function(self, args, kwargs)
            return _called(self, args, kwargs)

        is_bare = isinstance(self._given, (staticmethod, classmethod))
        self._replacement = type(self._given)(tapped) if is_bare else tapped
        setattr(holder, name, self._replacement)

    def bound(self, module: Any) -> list[Binding]:
        """Return the rows while a module runs."""
        found = self.at.get(id(module))
        if found is None or found[0]() is not module:
            return []
        return [one for line in found[1] for one in line.bindings]

    def undo(self) -> None:
        """Put the function back; what was put around it meanwhile stays, and calls it through."""
        if vars(self._holder).get(self._name) is not self._replacement:
            return
        if self._given is None:
            delattr(self._holder, self._name)
        else:
            setattr(self._holder, self._name, self._given)


def _called(patch: Patch, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function, and fire the taps of its input and output where any are meant."""
    found = outside_dynamo(_running)(patch)
    call = Call(patch.original, args, kwargs, None)
    for binding, turn in found:
        if binding.row.path.place.side == "input":
            outside_dynamo(guarded)(binding, call, turn)
    call.output = patch.original(*args, **kwargs)
    for binding, turn in found:
        if binding.row.path.place.side != "input":
            outside_dynamo(guarded)(binding, call, turn)
    return call.output


never_compiled(_called)


def _running(patch: Patch) -> list[tuple[Binding, int]]:
    """Return the bindings of the innermost module that runs and has any, each with its turn."""
    here = sys._getframe(1)
    found = innermost(patch.at, here)
    if found is None:
        return []
    lines, of = found
    return [one for line in lines for one in line.running(here, of)]


def bind(path: str, module: Any, line: Line) -> str:
    """Tap what a function gives while a module runs.

    Returns why that cannot be done, "" where it is.
    """
    path = _whole(path, module)
    patch = _patched.get(path)
    if patch is None:
        found = _find(path)
        if isinstance(found, str):
            return found
        patch = _patched[path] = Patch(path, *found)
    known = patch.at.get(id(module))
    if known is None or known[0]() is not module:
        known = patch.at[id(module)] = weakref.ref(module), []
    known[1].append(line)
    patch.known.update({one.number: one for one in line.bindings})
    # What only the frames tell, no compiled program knows.
    patch.is_plain = patch.is_plain and line.places is None and not line.shared.has_rivals
    return ""


def unbind(lines: Collection[Line]) -> None:
    """Tap functions for these rows no more; those that nobody wants are put back."""
    for path, patch in list(_patched.items()):
        for key, (ref, kept) in list(patch.at.items()):
            kept[:] = [line for line in kept if all(line is not one for one in lines)]
            if not kept or ref() is None:
                del patch.at[key]
        if not patch.at:
            patch.undo()
            del _patched[path]


def _whole(path: str, module: Any) -> str:
    """Return a function's path; one without a dot stands where the module's class is defined."""
    if "." in path:
        return path
    files = [kind.__module__ for kind in type(module).__mro__]
    holders = [name for name in files if hasattr(sys.modules.get(name), path)]
    return f"{(holders or files)[0]}.{path}"


def _find(path: str) -> tuple[Any, str, Callable[..., Any]] | str:
    """Return where a function stands, its name there and itself; or why it is not found.

    Nothing is imported for it: the model that calls it is there, so its module is.
    """
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        holder: Any = sys.modules.get(".".join(parts[:end]))
        if holder is None:
            continue
        for name in parts[end:-1]:
            holder = getattr(holder, name, None)
            if holder is None:
                return f"{'.'.join(parts[:end])} has no {name}"
        name = parts[-1]
        given = vars(holder).get(name, getattr(holder, name, None))  # or a class's above
        original = getattr(given, "__func__", given) if isinstance(holder, type) else given
        if not callable(original):
            return f"{'.'.join(parts[:-1])} has no function {name}"
        return holder, name, original
    return f"{parts[0]} is not imported where the model is"
