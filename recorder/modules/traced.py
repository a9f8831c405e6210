"""Taps of modules as the compiler traces them: see `recorder.taps.tracing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..taps import sessions
from ..taps.operators import pinged
from ..taps.tracing import is_exporting, is_traceable, traced
from .bindings import Binding
from .members import Absent, Call


def traced_call(bindings: Sequence[Binding], call: Call, number: str) -> Any:
    """Put the taps of a module's call in the graph.

    Args:
        bindings: the rows at the module.
        call: the call.
        number: that of a hook that does something before, "" where none does.

    Returns:
        What the module gives in place of its output, None for that itself.
    """
    if is_exporting():
        return None
    if number:
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
                _keep_misfit(binding, str(err), err.is_quiet)
            continue
        new = _traced(binding, binding.names[0], value, "".join(binding.dims[:1]))
        if new is not value and value is call.output:
            given = call.output = new
    return given


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
def _keep_misfit(binding: Binding, reason: str, is_quiet: bool) -> None:
    binding.keep_misfit(Absent(reason, is_quiet))
