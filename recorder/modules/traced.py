"""Taps of modules as the compiler traces them: see `recorder.taps.tracing`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..taps import sessions
from ..taps.effects import traced_program
from ..taps.operators import pinged
from ..taps.sources import sources
from ..taps.tracing import is_exporting, is_traceable, traced
from .bindings import Binding
from .members import Absent, Call


class Patched(Protocol):
    """A function that is replaced: see `functions.Patch`."""

    path: str
    known: dict[str, Binding]
    original: Callable[..., Any]


def traced_call(bindings: Sequence[Binding], call: Call, number: str) -> Any:
    """Put the taps of a module's call in the graph.

    Args:
        bindings: the rows at the module.
        call: the call.
        number: that of the hook, where it does something before; "" where not.

    Returns:
        What a hook gives: another output, or before the call other arguments by position and by
        name; None to leave them.
    """
    if is_exporting():
        return None
    if number and _begun(number):
        pinged(torch.zeros(0), number)
    if not sessions.listening:
        return None
    changed = [_one(binding, call) for binding in bindings]
    if not any(changed):
        return None
    is_after = bindings[0].row.path.place.side == "output"
    return call.output if is_after else (call.args, call.kwargs)


def ended(number: str) -> None:
    """Note that a run of a module has ended, as it is traced."""
    _ended(number)


def traced_function(patch: Patched, args: Any, kwargs: Any) -> Any:
    """Call a function that is traced, and put the taps of its input and output in the graph."""
    call = Call(patch.original, args, kwargs, None)
    found = [one.partition(":") for one in _running(patch.path).split()]
    for number, _, turn in found:
        if patch.known[number].row.path.place.side == "input":
            _one(patch.known[number], call, int(turn))
    call.output = patch.original(*args, **kwargs)
    for number, _, turn in found:
        if patch.known[number].row.path.place.side != "input":
            _one(patch.known[number], call, int(turn))
    return call.output


def _one(binding: Binding, call: Call, turn: int = 0) -> bool:
    """Put a row's taps in the graph; return whether the call has other tensors in it since."""
    at = turn if len(binding.names) > 1 else 0
    if at >= len(binding.names):
        return False  # it is called more often than the row has names
    place = binding.row.path.place
    try:
        found = [(binding.names[at], call.value(place))]
        dims = binding.dims[at] if len(binding.dims) > 1 else "".join(binding.dims[:1])
    except Absent as err:
        if not binding.is_named_by_path:
            _keep_misfit(binding.number, err.reason, err.is_quiet)
            return False
        found, dims = binding.each(call), ""
    changed = False
    for name, value in found:
        new = _traced(binding, name, value, dims)
        if new is value:
            continue
        changed = True
        if place.side == "output":
            call.output = _with(call.output, value, new)
        else:
            call.args, call.kwargs = _with(call.args, value, new), _with(call.kwargs, value, new)
    return changed


def _with(held: Any, value: Any, new: Any) -> Any:
    """Return what holds a tensor with another in its place, whose gradient is heard."""
    if held is value:
        return new
    if type(held) is tuple:
        return tuple(_with(one, value, new) for one in held)
    if type(held) is list:
        return [_with(one, value, new) for one in held]
    if type(held) is dict:
        return {key: _with(one, value, new) for key, one in held.items()}
    return held  # in which the gradient is not heard, which is said


_runs: weakref.WeakKeyDictionary[Any, list[_Run]] = weakref.WeakKeyDictionary()


class _Run:
    """A run of a module, as it is traced: how often each function was called in it."""

    def __init__(self, number: str) -> None:
        self.number = number
        self.module = sources[number].module()
        self.turns: dict[str, int] = {}


def _of_program() -> list[_Run]:
    program = traced_program()
    return [] if program is None else _runs.setdefault(program, [])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _begun(number: str) -> bool:
    """Note that a run of a module begins, as it is traced; return whether its hook pings."""
    hook = sources[number]
    if hook.turns:
        _of_program().append(_Run(number))
    return hook.ping is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _ended(number: str) -> None:
    runs, module = _of_program(), sources[number].module()
    while runs and runs.pop().module is not module:
        pass  # one that raised


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _running(path: str) -> str:
    """Return the bindings of a function in the innermost run that has any, each with its turn."""
    for run in reversed(_of_program()):
        bindings = sources[path].bound(run.module)
        if bindings:
            turn = run.turns[path] = run.turns.get(path, -1) + 1
            return " ".join(f"{one.number}:{turn}" for one in bindings)
    return ""


def _traced(binding: Binding, name: str, value: Any, dims: str) -> Any:
    if not is_traceable(value):
        binding.fire_value(name, value, dims)
        return value
    place = binding.row.path.place
    wants = binding.row.grad or place.is_gradient
    return traced(
        name, value, dims or None, binding.row.extras, wants, {}, None, binding.number,
        binding.site, not place.is_gradient,
    )  # fmt: skip


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _keep_misfit(number: str, reason: str, is_quiet: bool) -> None:
    sources[number].keep_misfit(Absent(reason, is_quiet))
