"""Hear of a tensor's gradient, once for each tap of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

Callback = Callable[[torch.Tensor], "torch.Tensor | None"]


class GradientTaps:
    """Registers one-shot gradient hooks.

    A parameter outlives its graph, so a hook whose backward never came would fire for a later
    one's gradient under the wrong key: at most one is pending per parameter and name.
    """

    def __init__(self) -> None:
        self._pending: Any = WeakIdKeyDictionary()

    def watch(self, tensor: torch.Tensor, name: str, callback: Callback) -> None:
        """Call `callback` with the tensor's next gradient; what it returns replaces it.

        A tensor that needs no gradient gets none, and nothing is called.
        """
        if not tensor.requires_grad:
            return
        handle: Any = None

        def once(grad: torch.Tensor) -> torch.Tensor | None:
            handle.remove()
            return callback(grad)

        handle = tensor.register_hook(once)
        if tensor.is_leaf:
            pending = self._pending.setdefault(tensor, {})
            if name in pending:
                pending[name].remove()
            pending[name] = handle
