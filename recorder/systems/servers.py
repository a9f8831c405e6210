"""What calls of vLLM's and sglang's models have in common: tokens of requests in one row."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import missed
from .calls import Begun, NoRows, Say
from .slots import Slots, Step, told

DIMS, LAST = "t", "n"
"""All tokens of a step; the last of each request, of which the logits are computed."""

_of: dict[tuple[int, str], tuple[weakref.ref[torch.nn.Module], Slots]] = {}


@dataclass(frozen=True)
class Served:
    """A step of a server.

    Attributes:
        step: its tokens.
        size: how many rows there are; those behind the tokens fill a captured batch up.
        requests: how many requests, those that fill it up included.
        cache: which of the model's caches the places are of.
    """

    step: Step
    size: int
    requests: int
    cache: str = ""


def begun(module: torch.nn.Module, read: Callable[[], Served], say: Say) -> Begun:
    """Return what is known of the rows of a step.

    Args:
        module: the model.
        read: reads off its call what the server says of it.
        say: told what is amiss.

    Raises:
        NoRows: none of them is known.
    """
    try:
        return _begun(module, read(), say)
    except NoRows:
        missed.note()  # it writes to the cache all the same
        raise


def _begun(module: torch.nn.Module, served: Served, say: Say) -> Begun:
    step = served.step
    with torch.inference_mode(False):
        ids, positions, absent = slots_of(module, served.cache).stepped(step)
    if absent:
        say(
            "some requests have no ids, since what their cache begins with was not seen here; "
            "start recording with the server, and turn CUDA graphs off"
        )
    last = step.counts.cumsum(0) - 1

    def rows() -> torch.Tensor:
        return told(ids, positions, step.tokens, served.size)

    def ends() -> torch.Tensor:
        return told(ids[last], positions[last], step.tokens[last], served.requests)

    return Begun({DIMS: rows, LAST: ends}, None, (served.size,))


def slots_of(module: torch.nn.Module, cache: str) -> Slots:
    """Return the places of one of a model's caches."""
    key = id(module), cache
    found = _of.get(key)
    if found is None or found[0]() is not module:
        for old in [old for old, (ref, _) in _of.items() if ref() is None]:
            del _of[old]
        found = _of[key] = weakref.ref(module), Slots()
    return found[1]


def leave() -> None:
    """Forget all."""
    _of.clear()
    _unfit.clear()


_unfit: dict[int, tuple[weakref.ref[torch.nn.Module], str]] = {}


def check(module: torch.nn.Module, *, has_adapters_told: bool = True) -> None:
    """Refuse a model whose rows depend on more than the tokens in front of them.

    Args:
        module: the model.
        has_adapters_told: whether its batches say which request has which adapter.

    Raises:
        NoRows: it is one.
    """
    known = _unfit.get(id(module))
    if known is None or known[0]() is not module:
        why = _why_unfit(module, has_adapters_told)
        known = _unfit[id(module)] = weakref.ref(module), why
    if known[1]:
        raise NoRows(known[1])


def _why_unfit(module: torch.nn.Module, has_adapters_told: bool) -> str:
    for one in module.modules():
        kind = getattr(one, "attn_type", None)
        if "encoder" in str(getattr(kind, "value", kind)).lower():
            return "its tokens see those that come later, or another sequence's"
        if type(one).__name__.endswith("WithLoRA") and not has_adapters_told:
            return "it has LoRA adapters, and which request has which is not said"
    return ""


def rows_at(values: Any, name: str) -> Any:
    """Return something that a batch must have.

    Raises:
        NoRows: it has not.
    """
    found = getattr(values, name, None)
    if found is None:
        raise unknown(values, name)
    return found


def unknown(values: Any, name: str) -> NoRows:
    """Say that a batch lacks something."""
    return NoRows(
        f"its {type(values).__name__} has no {name}; say which row is which by a function, as in "
        "--rows PKG.MOD.FN"
    )
