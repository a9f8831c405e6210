"""What localize costs beyond a plain replay: a forward with all its taps, and memory."""

from __future__ import annotations

from pathlib import Path

import torch
from harness import Result, at_most, child, folder, interleaved, seconds

from recorder import Recorder, tap
from replayer import Replayer

_DTYPES = (torch.float32, torch.bfloat16)


class Layers:
    """A stack of gated layers, of which each product is tapped; `parts` are summed one by one."""

    def __init__(self, width: int, layers: int, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(0)
        self.weights = [
            [
                (torch.randn(a, b, generator=random) / a**0.5).to(dtype)
                for a, b in ((width, width), (width, 4 * width), (4 * width, width))
            ]
            for _ in range(layers)
        ]
        self.x = torch.randn(512, width, generator=random).to(dtype)

    @torch.no_grad()
    def run(self, parts: int) -> None:
        """Run once, with six taps a layer."""

        def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return sum(
                (x @ w for x, w in zip(a.chunk(parts, 1), b.chunk(parts, 0), strict=True)),
                start=torch.zeros(()).to(a.dtype),
            )

        x = self.x.clone()
        for i, (mix, up, down) in enumerate(self.weights):
            y = tap("norm", torch.nn.functional.layer_norm(x, x.shape[-1:]), dims="t w", layer=i)
            x = tap("mixed", x + tap("mix", product(y, mix), dims="t w", layer=i), layer=i)
            act = tap("act", torch.nn.functional.silu(product(x, up)), dims="t f", layer=i)
            x = tap("hidden", x + tap("down", product(act, down), dims="t w", layer=i), layer=i)


def localizing(base: Path, quick: bool) -> list[Result]:
    """A forward of 512 tokens in which all is off by rounding, replayed plainly and with it."""
    width, layers = (256, 2) if quick else (1024, 4)
    found = []
    for dtype in _DTYPES:
        model = Layers(width, layers, dtype)
        with folder(base) as out:
            with Recorder(out / "run"):
                model.run(1)

            def replayed(own: bool, run: Path = out / "run", model: Layers = model) -> float:
                with Replayer(run, own_error=own, metrics=not own):
                    return seconds(lambda: model.run(4))

            taken = interleaved(
                {"localize": lambda: replayed(True), "replay": lambda: replayed(False)},
                1 if quick else 7,
            )
        name = str(dtype).removeprefix("torch.")
        found.append(
            at_most(
                f"localize, a forward in {name}", taken["localize"] * 1e3, "plain replay",
                taken["replay"] * 1e3, "ms", 1.5,
            )
        )  # fmt: skip
    return found


def localizing_memory(base: Path, quick: bool) -> list[Result]:
    """Peak memory of a replay of tensors of 64 MiB that are all off, beyond a plain one."""
    tensors = 4 if quick else 16
    with folder(base) as out:
        value = torch.randn(16 << 20, generator=torch.Generator().manual_seed(0)).view(4096, -1)
        with Recorder(out / "run"):
            for i in range(tensors):
                tap("x", value, i=i)
        plain, own = (
            float(child("replay_job.py", out / "run", tensors, how)) for how in ("plain", "own")
        )
    return [
        Result(
            f"localize, {tensors} tensors of 64 MiB, peak memory", own, "plain replay", plain,
            "MiB", f"+{own - plain:.0f} MiB", "at most +64 MiB", own - plain <= 64,
        )
    ]  # fmt: skip
