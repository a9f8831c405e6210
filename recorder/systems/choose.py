"""Which system a model is of, and what reads its calls.

1. `models_in` finds the models below a root whose calls can be read: by their class as a
   rule, else by what their forward takes.
2. `reader` is what reads them; `head_of` and `logits_in` find the modules that have
   the rows of some tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..settings import SYSTEMS as NAMES
from . import batches, caches, missed, paged, servers, sglang, vllm
from .calls import Arguments, Begun, Say, parameters_of

AUTO, *SYSTEMS = NAMES
_TAKES = {
    "transformers": {"input_ids"},
    "vllm": {"input_ids", "positions"},
    "sglang": {"input_ids", "positions", "forward_batch"},
}
Reader = Callable[[torch.nn.Module, Arguments, Say], Begun]


def system_of(module: torch.nn.Module) -> str:
    """Return the system that a model is of, "" where none is recognised."""
    for kind in type(module).__mro__:
        system = kind.__module__.partition(".")[0]
        if system == "transformers" and kind.__name__ != "PreTrainedModel":
            continue
        if system in SYSTEMS and _TAKES[system] <= set(parameters_of(module)):
            return system
    return ""


def models_in(modules: Mapping[str, Any], system: str) -> list[tuple[Any, str]]:
    """Return the models of a root whose calls can be read, each with its system.

    Args:
        modules: all modules by name, the root first.
        system: one of `SYSTEMS`, or `auto`.
    """
    if system == AUTO:
        return [(one, found) for one in modules.values() if (found := system_of(one))]
    takes = [
        (name, one) for name, one in modules.items() if _TAKES[system] <= set(parameters_of(one))
    ]
    recognised = [one for _, one in takes if system_of(one) == system]
    if recognised:
        return [(one, system) for one in recognised]
    outermost: list[str] = []
    for name, _ in takes:
        if not any(not above or name.startswith(f"{above}.") for above in outermost):
            outermost.append(name)
    return [(modules[name], system) for name in outermost]


def reader(system: str) -> Reader:
    """Return what reads the calls of a system's models."""
    return _READERS[system]


def _transformers(module: torch.nn.Module, given: Arguments, say: Say) -> Begun:
    is_paged = paged.is_paged(given)
    return (paged.begun if is_paged else batches.begun)(module, given, say)


_READERS: dict[str, Reader] = {
    "transformers": _transformers, "vllm": vllm.begun, "sglang": sglang.begun
}  # fmt: skip


def head_of(module: torch.nn.Module) -> Any:
    """Return the module of a model that makes logits of hidden states; None where it has none."""
    ask = getattr(module, "get_output_embeddings", None)
    try:
        found = ask() if callable(ask) else None
    except Exception:  # it has none
        found = None
    return found if isinstance(found, torch.nn.Module) else None


def logits_in(modules: Mapping[str, Any]) -> list[Any]:
    """Return the modules of a server's root that make logits of the last tokens."""
    return [one for name, one in modules.items() if name.rpartition(".")[2] == "logits_processor"]


def leave() -> None:
    """Leave torch and the systems as they were, and forget what their caches hold."""
    caches.leave()
    paged.leave()
    servers.leave()
    missed.leave_graphs()
