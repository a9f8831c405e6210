"""What taps without edits cost: a program of which nothing is tapped, and a module's tap."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from harness import Result, at_most, folder, interleaved
from taps import drained
from torch import nn

from recorder import Recorder, tap

_LAYERS = 40


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(32), nn.ReLU()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class _Model(nn.Module):
    """Many calls of modules that do little, so that what a call costs shows."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(_LAYERS))
        self.by_hand = by_hand

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.by_hand:
                x = tap("hidden", x, layer=i)
        return x


def _forwards(model: nn.Module, x: torch.Tensor, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        model(x)
    return (time.perf_counter() - start) / times


@torch.inference_mode()
def unselected(base: Path, quick: bool) -> list[Result]:
    """A model under --modules that fit nothing of it, against the model alone."""
    times = 20 if quick else 60
    plain, watched, x = _Model(), _Model(), torch.randn(2, 32)
    watched.load_state_dict(plain.state_dict())
    with folder(base) as run, Recorder(run, modules=["nothing.of.it", "h.{layer}.x"]) as recorder:
        assert torch.equal(watched(x), plain(x)), "nothing is to change"
        recorder._lazy = True
        found = interleaved(
            {
                "plain": lambda: _forwards(plain, x, times),
                "watched": lambda: _forwards(watched, x, times),
            },
            41,
        )
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())
    ours, peer = found["watched"] * 1e6, found["plain"] * 1e6
    return [at_most("forward, no module tapped", ours, "the model alone", peer, "us", 1.01)]


@torch.inference_mode()
def module_tap(base: Path, quick: bool) -> list[Result]:
    """Forty taps of modules in a forward, against forty hand-written ones: filtered, recorded."""
    times = 10 if quick else 30
    x = torch.randn(2, 32)
    results = []
    for what, options in (
        ("rejected by a filter", {"filter": "layer < 0"}),
        ("recorded, 256 bytes", {"level": "digests"}),
    ):
        plain, by_hand, by_table = _Model(), _Model(by_hand=True), _Model()

        def hand(options=options, by_hand=by_hand) -> float:
            with folder(base) as run, Recorder(run, **options) as recorder:
                recorder._lazy = True
                by_hand(x)
                drained(recorder)
                taken = _forwards(by_hand, x, times)
                recorder._selection.selected = 1  # nothing is to be said about the filter
            return taken

        def table(options=options, by_table=by_table) -> float:
            paths = ["layers.{layer}"]
            with folder(base) as run, Recorder(run, modules=paths, **options) as recorder:
                recorder._lazy = True
                by_table(x)
                drained(recorder)
                taken = _forwards(by_table, x, times)
                recorder._selection.selected = 1
            return taken

        found = interleaved(
            {"plain": lambda m=plain: _forwards(m, x, times), "hand": hand, "table": table}, 9
        )
        ours, peer = (1e6 * (found[k] - found["plain"]) / _LAYERS for k in ("table", "hand"))
        results.append(at_most(f"module tap, {what}", ours, "hand-written tap", peer, "us", None))
    return results
