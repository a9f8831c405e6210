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
        What the module gives in place of its output, None for that itself.
    """
    if is_exporting():
        return None
    if number and _begun(number):
        pinged(torch.zeros(0), number)
    if not sessions.listening:
        return None
    given = None
    for binding in bindings:
        try:
            value = call.value(binding.row.path.place)
        except Absent as err:
            if binding.is_named_by_path:
                for name, tensor in binding.each(call):
                    _traced(binding, name, tensor, "")
            else:
                _keep_misfit(binding.number, err.reason, err.is_quiet)
            continue
        new = _traced(binding, binding.names[0], value, "".join(binding.dims[:1]))
        if new is not value and value is call.output:
            given = call.output = new
    return given


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


def _one(binding: Binding, call: Call, turn: int) -> None:
    at = turn if len(binding.names) > 1 else 0
    if at >= len(binding.names):
        return  # it is called more often than the row has names
    try:
        value = call.value(binding.row.path.place)
    except Absent as err:
        if binding.is_named_by_path:
            for name, tensor in binding.each(call):
                _traced(binding, name, tensor, "")
        else:
            _keep_misfit(binding.number, err.reason, err.is_quiet)
        return
    dims = binding.dims[at] if len(binding.dims) > 1 else "".join(binding.dims[:1])
    new = _traced(binding, binding.names[at], value, dims)
    if new is not value and value is call.output:
        call.output = new


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
