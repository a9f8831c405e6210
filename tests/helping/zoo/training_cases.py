"""Pairs of training runs: faults planted in the target, and clean ones."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from .decoder_cases import Place
from .training import Fault, Options

# fault -> what ranks share, the tap where it shows, its kind and first step, words for it
FAULTS = {
    "backward": ("both", "norm", "grad", 0, {"scaled"}),
    "unreduced": ("dp", "grad_down", "tensor", 0, {"partial sum", "unknown"}),
    "averaged": ("dp", "grad_down", "tensor", 0, {"scaled"}),
    "twice": ("dp", "grad_down", "tensor", 0, {"scaled"}),
    "own_norm": ("tp", "norm_of_grads", "tensor", 0, {"scaled", "unknown"}),
    "skipped": ("dp", "weight_up", "tensor", 1, {"one rank", "stale"}),
    "labels": ("both", "logits", "grad", 0, {"unknown", "permuted", "stale"}),
    "count": ("both", "logits", "grad", 0, {"scaled"}),
    "stale": ("both", "act", "tensor", 1, {"unknown"}),
    "decay": ("both", "weight_down", "tensor", 1, {"scaled"}),
    "rate": ("both", "weight_down", "tensor", 1, {"unknown"}),
}
WHOLE = ("own_norm", "labels", "count")


@dataclass(frozen=True)
class Case:
    """A pair, and the taps whose segments are wrong; see `decoder_cases.Case`."""

    name: str
    base: Options
    target: Options
    faults: tuple[Fault, ...] = ()
    expected: tuple[Place, ...] = ()
    classes: frozenset[str] = frozenset()


def cases(seed=0):
    """Return all pairs of a seed."""
    draw, found = random.Random(seed), []
    for dtype in ("float32", "bfloat16"):
        for name, (axis, at, kind, step, words) in FAULTS.items():
            for one in ("dp", "tp") if axis == "both" else (axis,):
                base = Options(
                    axis=one, dtype=dtype, seed=seed,
                    optimiser=draw.choice(("sgd", "momentum")),
                )  # fmt: skip
                layer = draw.randrange(base.layers)
                told = {} if name in WHOLE else {"layer": layer}
                found.append(
                    Case(
                        f"{name}-{one}-{dtype}", base, replace(base, ranks=2),
                        (Fault(name, layer),), ((at, told, kind, step),), frozenset(words),
                    )
                )  # fmt: skip
        for axis in ("dp", "tp"):
            base = Options(axis=axis, dtype=dtype, seed=seed + 1)
            changes = {
                "ranks": {"ranks": 2}, "order": {"order": 8}, "both": {"ranks": 2, "order": 4},
            }  # fmt: skip
            for name, change in changes.items():
                for optimiser in ("sgd", "momentum"):
                    one = replace(base, optimiser=optimiser)
                    title = f"clean-{name}-{axis}-{optimiser}-{dtype}"
                    found.append(Case(title, one, replace(one, **change)))
            deep = replace(base, layers=10, clip=100.0)
            found.append(Case(f"clean-deep-{axis}-{dtype}", deep, replace(deep, ranks=2)))
    return found
