"""Programs that are instrumented for sglang's dumper: what they dump is tapped.

1. `follow` hears that the first session comes: `_AfterImport` waits for the dumper's module, and
   `_put` replaces two methods of its class, there already or once it is imported.
2. `_tapped` takes what is dumped: it builds the tags as the dumper does, asks its filter, and
   offers a tap; a gradient that is there already is offered with it.
3. Then the dumper's own method is called, which returns at once unless the user has enabled it.
   What it does first where it is enabled, a collective for the experiment's name, is never begun
   here: ranks that dump nothing would not come to it.

The module is known by the end of its name and by its class, since programs outside of sglang import
the file by itself. Its own way of seeing activation checkpointing knows Megatron alone, and is not
asked; that of all taps is.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

from ..diagnostics import Warnings, pass_over
from ..errors import is_from_the_job
from . import sessions
from .around import is_compiling
from .call import Call
from .dumped import REPEATED, STATUS, dims_of, tags_of
from .firing import offer, outside_dynamo
from .tap import step as end_step

_MODULE = "dumper"
_CLASS = "_Dumper"
_METHODS = ("_dump_inner", "step")
_BEGUN = "_initializing"
"""What Python has in a module's spec while that is imported."""
_DYNAMO = "torch._dynamo"
_HOME = "sglang.srt.debug_utils.dumper"

Given = Mapping[str, Any]
"""What a method of the dumper is called with, by name; or the tags of what is dumped."""

_put_in: dict[type, dict[str, tuple[Callable[..., Any], Callable[..., Any]]]] = {}
_warnings = Warnings()


class _AfterImport(importlib.abc.MetaPathFinder):
    """Looks at each module of the dumper's name as soon as it is there."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if not _is_called_so(name):
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                break
        else:
            return None
        execute = getattr(spec.loader, "exec_module", None)
        if execute is None:
            return spec

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if sessions.has_any:
                _put(module)

        with suppress(AttributeError):  # a loader that is what it is
            spec.loader.exec_module = exec_module
        return spec


class _Begun(importlib.machinery.ModuleSpec):
    """Of a module whose import is under way: looks at it as soon as that has ended.

    It is where `import torch` in the dumper's own file begins the first session.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == _BEGUN and not value:
            self.__class__ = importlib.machinery.ModuleSpec  # type: ignore[assignment]
            if sessions.has_any:
                _put(sys.modules.get(self.name))


_finder = _AfterImport()


def follow(is_any: bool) -> None:
    """Have what is dumped tapped, or no more; for `sessions.follow`.

    Args:
        is_any: whether any session is there.
    """
    if is_any:
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        for name, module in list(sys.modules.items()):
            spec = getattr(module, "__spec__", None) if _is_called_so(name) else None
            if type(spec) is importlib.machinery.ModuleSpec and getattr(spec, _BEGUN, False):
                spec.__class__ = _Begun
            elif _is_called_so(name) and _put(module):
                _compile_anew()
        return
    with suppress(ValueError):
        sys.meta_path.remove(_finder)
    if _DYNAMO in sys.modules:
        return  # the compiler sees no method come and go; what is put there asks who listens
    for cls, methods in _put_in.items():
        for name, (original, replacement) in methods.items():
            if vars(cls).get(name) is replacement:  # and nobody else has replaced it since
                setattr(cls, name, original)
    _put_in.clear()


def _is_called_so(name: str) -> bool:
    return name.rpartition(".")[2] == _MODULE


def _compile_anew() -> None:
    """Let what was compiled before the methods were replaced be compiled again: it calls the old.

    From then on the methods stay, and what is compiled asks them whether anybody listens.
    """
    if _DYNAMO in sys.modules:
        import torch

        torch.compiler.reset()


def _put(module: Any) -> bool:
    """Replace the methods of a module's dumper, if it is one; return whether that was done."""
    cls = getattr(module, "__dict__", {}).get(_CLASS)
    if not isinstance(cls, type) or cls in _put_in:
        return False
    found = {name: vars(cls).get(name) for name in _METHODS}
    if not all(map(callable, found.values())) or not hasattr(cls, "dump"):
        if getattr(module, "__name__", "") == _HOME:
            _say(
                f"{_HOME} is of a version that is not known: what it dumps is not tapped; "
                "versions from 0.5.10 on are"
            )
        return False
    pass_over(str(getattr(module, "__file__", "")))
    inner, step = (found[name] for name in _METHODS)
    made = {"_dump_inner": _dumping(inner), "step": _stepping(step)}
    _put_in[cls] = {name: (found[name], made[name]) for name in _METHODS}  # type: ignore[misc]
    for name, method in made.items():
        setattr(cls, name, method)
    return True


def _say(message: str) -> None:
    _warnings.once((message,), message, "")


def _dumping(original: Any) -> Callable[..., Any]:
    facts = original.__globals__

    @functools.wraps(original)
    def _dump_inner(self: Any, *args: Any, **given: Any) -> Any:
        if not sessions.listening or args:
            return original(self, *args, **given)
        return original(self, **_tapped(self, given, facts))

    return _dump_inner


def _stepping(original: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: Any, *args: Any, **given: Any) -> Any:
        end_step()
        return original(self, *args, **given)

    return step


def _tapped(dumper: Any, given: Given, facts: Mapping[str, Any]) -> Given:
    """Offer what is dumped as a tap; return what the dumper's own method is to be called with.

    Args:
        dumper: the dumper.
        given: what that method was called with, by name.
        facts: what its module holds.
    """
    forward, current, future = (
        bool(given.get(f"enable_{one}")) for one in ("value", "curr_grad", "future_grad")
    )
    if not (forward or current or future):
        return given
    name = given["name"]
    around = dumper._state.global_ctx
    tags, renamed = tags_of({**around, **given["extra_kwargs"]})
    if not _is_wanted(dumper, name, tags, facts):
        return given
    for tag in renamed:
        _say(f"the tag {tag!r} of what is dumped has a meaning of its own; it is tapped as {tag}_")
    value, dims = given["value"], dims_of(given.get("value_meta_only_fields"))
    extras = given.get("grafter_extras")
    if is_compiling():
        if not current and given.get("step") is None:
            from .tracing import traced  # which takes torch's compiler

            made = traced(name, value, dims, extras, future, tags, forward=forward)
            return {**given, "value": made}
    elif callable(value):
        value = _once(value)
        given = {**given, "value": value}
    elif not outside_dynamo(_is_tappable)(name, value):
        return given
    gradient = None
    if current:
        gradient, given = outside_dynamo(_current)(given, name)
    outside_dynamo(_offered)(
        name, value, dims, extras, future, tags, forward, given.get("step"), gradient
    )
    return given


def _is_wanted(dumper: Any, name: str, tags: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether the dumper's own filter takes a dump."""
    wants = dumper._config.filter
    if wants is None:
        return True
    return outside_dynamo(_passes)(wants, {**tags, "name": name}, facts)


def _passes(wants: str, tags: Given, facts: Mapping[str, Any]) -> bool:
    try:
        if STATUS in wants:
            tags = {**tags, STATUS: _status(facts)}
        return bool(facts["_evaluate_filter"](wants, tags))
    except Exception as err:  # the job goes on, as where the dumper is not enabled
        _say(
            f"the dumper's filter {wants!r:.200} cannot be asked: {type(err).__name__}: {err}; "
            "what it fails for is not tapped; correct DUMPER_FILTER"
        )
        return False


def _status(facts: Mapping[str, Any]) -> str:
    """Return what the dumper's filter sees of activation checkpointing."""
    from .checkpoints import look

    place = look()
    if place is not None and place.again:
        return REPEATED
    return str(facts["_detect_recompute_status"]().value)


def _is_tappable(name: str, value: Any) -> bool:
    """Whether something can be tapped at all: a dumper takes whatever can be pickled."""
    from .values import classify

    found = classify(value)
    if found in ("tensor", "value"):
        return True
    _say(
        f"what is dumped as {name!r:.100} is not tapped: {found}; tensors, numbers, strings and "
        "flat lists of these are"
    )
    return False


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    """Return a callable that asks another once, for a tap and for the dumper after it."""
    made: list[Any] = []

    def value() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return value


def _current(given: Given, name: str) -> tuple[Any, Given]:
    """Return the gradient that a dump has already, None where it has none, and what it is given.

    What the user's `get_grad` returns is what the dumper gets of it too: it is called once.
    """
    import torch

    value, get = given["value"], given.get("get_grad")
    if not isinstance(value, torch.Tensor):
        return None, given
    try:
        found = value.grad if get is None else get(value)
    except Exception as err:
        if get is None and is_from_the_job(err):
            raise
        _say(f"the gradient of {name} is not tapped: get_grad raised {type(err).__name__}: {err}")
        return None, given
    return found, given if get is None else {**given, "get_grad": lambda _: found}


def _offered(
    name: str,
    value: Any,
    dims: str | None,
    extras: Any,
    future: bool,
    tags: Mapping[str, Any],
    forward: bool,
    step: int | None,
    gradient: Any,
) -> None:
    """Offer a tap, and the gradient that is there already, which is replaced in place."""
    if gradient is None:
        if forward or future:
            offer(name, value, dims, extras, future, tags, "", forward, None, step=step)
        return
    import torch

    from .gradients import Heard

    heard = Heard()
    offer(name, value, dims, extras, True, tags, "", forward, None, heard, step=step)
    new = heard.replaced(gradient)
    if new is gradient:
        return
    try:
        with torch.no_grad():
            gradient.copy_(new)
    except RuntimeError as err:
        for session in sessions.active:
            if session.grafts:
                session.lost(Call(name, None, tags=tags), f"its gradient: {err}")
