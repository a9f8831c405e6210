"""Whether a model's tokens see those that come later: a prefix then does not say what a row is."""

from __future__ import annotations

import weakref
from typing import Any

import torch

_causal: dict[int, tuple[weakref.ref[torch.nn.Module], bool]] = {}


def is_causal(module: torch.nn.Module) -> bool:
    """Whether a model's tokens see none that come later; False where that is not clear."""
    config = getattr(module, "config", None)
    if getattr(config, "is_causal", None) is False:
        return False
    known = _causal.get(id(module))
    if known is None or known[0]() is not module:
        known = _causal[id(module)] = weakref.ref(module), _is_causal(module, config)
    return known[1]


def _is_causal(module: torch.nn.Module, config: Any) -> bool:
    found = {
        name: bool(one.is_causal)
        for name, one in module.named_modules()
        if isinstance(getattr(one, "is_causal", None), bool)
        and not getattr(one, "is_cross_attention", False)
    }
    texts = [is_one for name, is_one in found.items() if "language_model" in f".{name}."]
    if found:
        return all(texts or found.values())
    name = type(module).__name__
    return bool(getattr(config, "is_decoder", False)) or "CausalLM" in name or "LMHead" in name
