"""A small layered job whose segments can be made wrong one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from recorder import step, tap

WIDTH, LAYERS = 32, 5


def job(faults: dict | None = None, steps: int = 1) -> Callable[[], torch.Tensor]:
    """Return a job of five layers.

    Args:
        faults: (tap, layer) -> what becomes of its value x, given x, or x and the step.
        steps: how many.
    """

    def changed(x: torch.Tensor, s: int, name: str, layer: int) -> torch.Tensor:
        wrong = (faults or {}).get((name, layer), lambda x: x)
        return wrong(x, s) if wrong.__code__.co_argcount == 2 else wrong(x)

    def run() -> torch.Tensor:
        random = torch.Generator().manual_seed(0)
        weights = torch.randn(LAYERS, 2, WIDTH, WIDTH, generator=random) / WIDTH**0.5
        for s in range(steps):
            x = tap("x", torch.randn(2, 12, WIDTH, generator=random), dims="b s w")
            for layer, (up, down) in enumerate(weights):
                x = changed(torch.tanh(x @ up), s, "up", layer)
                x = tap("up", x, dims="b s w", layer=layer)
                x = changed(x @ down, s, "down", layer)
                x = tap("down", x, dims="b s w", layer=layer)
            out = tap("out", x.sum(-1), dims="b s")
            step()
        return out

    return run
