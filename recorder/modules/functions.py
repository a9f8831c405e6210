"""Taps of what a function gives while a module runs: rope, the logits of a router.

The function is replaced where its path names it, by one that asks which tapped module runs: it is
the innermost whose frame is on the stack, since a region that checkpointing stops early never tells
that a module has ended. Outside of such modules it is called as it was.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

from ..taps import sessions
from ..taps.tap import outside_dynamo
from .hooks import Binding, Turns, guarded, innermost
from .members import Call

_patched: dict[str, _Patch] = {}


class _Patch:
    """One function that is replaced, and for which modules."""

    def __init__(self, holder: Any, name: str, original: Callable[..., Any]) -> None:
        self.at: dict[int, tuple[weakref.ref[Any], tuple[list[Binding], Turns]]] = {}
        self._holder, self._name = holder, name
        self._given = vars(holder).get(name)  # None where a class above has it

        @functools.wraps(original)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            found = outside_dynamo(_running)(self) if sessions.active else None
            if found is None:
                return original(*args, **kwargs)
            bindings, turn = found
            call = Call(original, args, kwargs, None)
            for binding in bindings:
                if binding.row.path.place.side == "input":
                    outside_dynamo(guarded)(binding, call, turn)
            call.output = original(*args, **kwargs)
            for binding in bindings:
                if binding.row.path.place.side != "input":
                    outside_dynamo(guarded)(binding, call, turn)
            return call.output

        tapped._torchdynamo_disable = True  # type: ignore[attr-defined]
        is_bare = isinstance(self._given, (staticmethod, classmethod))
        self._replacement = type(self._given)(tapped) if is_bare else tapped
        setattr(holder, name, self._replacement)

    def undo(self) -> None:
        """Put the function back; what was put around it meanwhile stays, and calls it through."""
        if vars(self._holder).get(self._name) is not self._replacement:
            return
        if self._given is None:
            delattr(self._holder, self._name)
        else:
            setattr(self._holder, self._name, self._given)


def _running(patch: _Patch) -> tuple[list[Binding], int] | None:
    """Return the bindings of the innermost module that runs and has any, and the turn there."""
    found = innermost(patch.at, sys._getframe(1))
    if found is None:
        return None
    (bindings, turns), frame = found
    return bindings, turns.next(frame, max(len(one.names) for one in bindings))


def bind(path: str, module: Any, bindings: list[Binding], turns: Turns) -> str:
    """Tap what a function gives while a module runs.

    Returns why that cannot be done, "" where it is.
    """
    path = _whole(path, module)
    patch = _patched.get(path)
    if patch is None:
        found = _find(path)
        if isinstance(found, str):
            return found
        patch = _patched[path] = _Patch(*found)
    patch.at[id(module)] = (weakref.ref(module), (bindings, turns))
    return ""


def unbind(module: Any) -> None:
    """Tap no function for a module any more; those that nobody wants are put back."""
    for path, patch in list(_patched.items()):
        patch.at.pop(id(module), None)
        patch.at = {key: one for key, one in patch.at.items() if one[0]() is not None}
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
