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
from .hooks import Binding, guarded, innermost
from .members import Call

_patched: dict[str, _Patch] = {}


class _Patch:
    """One function that is replaced, and for which modules."""

    def __init__(self, holder: Any, name: str, original: Callable[..., Any]) -> None:
        self.holder, self.name, self.original = holder, name, original
        self.at: dict[int, tuple[weakref.ref[Any], list[Binding]]] = {}

        @functools.wraps(original)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            found = outside_dynamo(_running)(self) if sessions.active else None
            if found is None:
                return original(*args, **kwargs)
            call = Call(original, args, kwargs, None)
            for binding in found:
                if binding.row.path.place.side == "input":
                    outside_dynamo(guarded)(binding, call)
            call.output = original(*args, **kwargs)
            for binding in found:
                if binding.row.path.place.side != "input":
                    outside_dynamo(guarded)(binding, call)
            return call.output

        tapped._torchdynamo_disable = True  # type: ignore[attr-defined]
        self.replacement = tapped
        setattr(holder, name, tapped)

    def undo(self) -> None:
        # What was put around it meanwhile stays, and calls the original through this one.
        if vars(self.holder).get(self.name) is self.replacement:
            setattr(self.holder, self.name, self.original)


def _running(patch: _Patch) -> list[Binding] | None:
    """Return the bindings of the innermost module that runs and has any."""
    return innermost(patch.at, sys._getframe(1))


def bind(path: str, module: Any, bindings: list[Binding]) -> str:
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
    patch.at[id(module)] = (weakref.ref(module), bindings)
    return ""


def unbind(path: str, module: Any) -> None:
    """Tap it no more; the function is put back when nobody wants it."""
    path = _whole(path, module)
    patch = _patched.get(path)
    if patch is None:
        return
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
        given = vars(holder).get(name) if hasattr(holder, "__dict__") else None
        if isinstance(given, (staticmethod, classmethod)) or not callable(given):
            if given is None and callable(getattr(holder, name, None)):
                given = getattr(holder, name)  # a method of a class above
            else:
                return f"{'.'.join(parts[:-1])} has no function {name}"
        return holder, name, given
    return f"{parts[0]} is not imported where the model is"
