"""What a tap costs in what torch.compile compiles, against the same outside and against none."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Result, folder, interleaved

from recorder import Recorder, step, tap
from replayer import Replayer

_LAYERS = 32


def _program(is_tapped: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def program(x: torch.Tensor) -> torch.Tensor:
        for layer in range(_LAYERS):
            x = torch.tanh(x) * 1.5
            if is_tapped:
                tap("x", x, layer=layer)
        return x

    return program


def compiled(base: Path, quick: bool) -> list[Result]:
    """Taps of 32 KiB behind elementwise layers, which the compiler fuses where nothing taps."""
    return _compiled(base, quick, torch.device("cpu"))


def compiled_on_cuda(base: Path, quick: bool) -> list[Result]:
    """The same on a GPU; nothing where there is none."""
    return _compiled(base, quick, torch.device("cuda")) if torch.cuda.is_available() else []


def _compiled(base: Path, quick: bool, device: torch.device) -> list[Result]:
    calls = 3 if quick else 20
    value = torch.randn(64, 128, device=device)
    where = " on a GPU" if device.type == "cuda" else ""

    def settle() -> None:
        if where:
            torch.cuda.synchronize()

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = torch.compile(_program(False), fullgraph=True)
        inside = torch.compile(_program(True), fullgraph=True)
        inside(plain(value))  # nothing listens
    outside = _program(True)

    def each(function: Callable[[torch.Tensor], torch.Tensor]) -> float:
        settle()
        start = time.perf_counter()
        for _ in range(calls):
            function(value)
        settle()
        return (time.perf_counter() - start) / calls / _LAYERS

    def recording(function: Callable[[torch.Tensor], torch.Tensor]) -> float:
        with folder(base) as run, Recorder(run):
            function(value)
            return each(function)

    def grafting(function: Callable[[torch.Tensor], torch.Tensor]) -> float:
        with folder(base) as run:
            with Recorder(run):
                outside(value)
                step()
                outside(value)
            with Replayer(run, metrics=False):
                function(value)
                step()
                settle()
                start = time.perf_counter()
                function(value)
                settle()
                return (time.perf_counter() - start) / _LAYERS

    found = interleaved(
        {
            "plain": lambda: each(plain),
            "off": lambda: each(inside),
            "eager": lambda: each(_program(False)),
            "recording": lambda: recording(inside),
            "recording outside": lambda: recording(outside),
            "grafting": lambda: grafting(inside),
            "grafting outside": lambda: grafting(outside),
        },
        5 if quick else 9,
    )
    micro = {name: seconds * 1e6 for name, seconds in found.items()}
    rows = [
        ("compiled tap, nothing listens", "off", "no tap", "plain"),
        ("compiled tap, recording", "recording", "no tap", "plain"),
        ("compiled tap, recording", "recording", "uncompiled tap", "recording outside"),
        ("compiled tap, grafting", "grafting", "uncompiled tap", "grafting outside"),
    ]
    return [
        Result(
            name + where, micro[ours], peer, micro[theirs], "us",
            f"{micro[ours] / micro[theirs]:.2f}x", "", None,
        )
        for name, ours, peer, theirs in rows
    ]  # fmt: skip
