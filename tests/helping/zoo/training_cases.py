"""Training jobs with planted faults, and clean ones: what `graft localize` should say of each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

LAYERS, STEPS = 2, 3

Tap = tuple[str, dict, str, int]
"""A tap's name, its tags, `tensor` or `grad`, and the first step at which it is off."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a target.

    Attributes:
        kind: one of those that `_FAULTS` makes.
        at: the weight or the activation; None where it is at no single one.
        layer: its layer, where it has one.
        factor: of a backward that is off.
    """

    kind: str
    at: str | None = None
    layer: int | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Options:
    """How one side trains.

    Attributes:
        mode: `one` rank, or two of `dp` or `tp`.
        dtype: of activations; weights and their gradients are float32.
        optimiser: `adam` or `sgd`, which has momentum.
        is_clipped: whether gradients are clipped by their global norm.
        order: of sums: `plain`, `split` into two halves, or torch's `fused` attention.
        faults: what is wrong.
    """

    mode: str = "one"
    dtype: str = "float32"
    optimiser: str = "adam"
    is_clipped: bool = True
    order: str = "plain"
    faults: tuple[Fault, ...] = ()

    @property
    def name(self) -> str:
        """Say how it trains, in a word that can name a folder."""
        clipped = "clipped" if self.is_clipped else "unclipped"
        order = [] if self.order == "plain" else [self.order]
        return "-".join([self.mode, self.dtype, self.optimiser, clipped, *order])


@dataclass(frozen=True)
class Case:
    """A baseline, a target, and what is wrong with it.

    Attributes:
        name: unlike any other's; it does not depend on the seed.
        base: how the baseline trains.
        target: how the target trains.
        fault: what is wrong, in words; None where nothing is.
        expected: the taps that should be named, one for each fault, the earliest at which it shows.
        classes: the words that describe a fault rightly.
        also: other taps at which these faults show by themselves.
    """

    name: str
    base: Options
    target: Options
    fault: str | None = None
    expected: tuple[Tap, ...] = ()
    classes: frozenset[str] = frozenset()
    also: tuple[Tap, ...] = ()


Shows = tuple[Fault, list[Tap], set[str]]
"""A fault, the taps at which it shows by itself, the earliest first, and the words for it."""

_OUT = {"q": "q", "k": "k", "v": "v", "o": "attn_out", "up": "up", "down": "mlp_out"}
_IN = {"q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "heads", "up": "mlp_in", "down": "act"}
_UNTIED = ("norm1", "q", "k", "v", "qnorm", "knorm", "o", "norm2", "up", "down")


def _tags(layer: int | None) -> dict:
    return {} if layer is None else {"layer": layer}


def _backward(draw: random.Random, how: Options, layer: int) -> Shows:
    at = draw.choice(("q", "k", "v")) if how.mode == "dp" else "up"
    fault = Fault("backward", at, layer, draw.choice((0.5, 1.25, 2.0)))
    return fault, [(at, _tags(layer), "grad", 0)], {"scaled"}


def _not_summed(draw: random.Random, how: Options, layer: int) -> Shows:
    at = draw.choice(("attn_in", "mlp_in"))
    return (
        Fault("gradient not summed", at, layer),
        [(at, _tags(layer), "grad", 0)],
        {"partial sum"},
    )


def _reduced(kind: str, *words: str):
    def made(draw: random.Random, how: Options, layer: int) -> Shows:
        at = draw.choice(_UNTIED if how.mode == "dp" else ("qnorm", "knorm"))
        return Fault(kind, at, layer), [(f"grad_{at}", _tags(layer), "tensor", 0)], set(words)

    return made


def _not_reduced(draw: random.Random, how: Options, layer: int) -> Shows:
    names = _UNTIED if how.mode == "dp" else ("qnorm", "knorm")
    taps = [(f"grad_{name}", _tags(layer), "tensor", 0) for name in names]
    return Fault("not reduced", None, layer), taps, {"partial sum"}


def _norm(draw: random.Random, how: Options, layer: int) -> Shows:
    return Fault("clipped by own norm"), [("grad_norm", {}, "tensor", 0)], {"scaled"}


def _other_norm(draw: random.Random, how: Options, layer: int) -> Shows:
    names = [("embed", None), *((n, i) for i in range(LAYERS) for n in _UNTIED)]
    taps = [
        ("grad_clipped", {"weight": name, **_tags(i)}, "tensor", 0)
        for name, i in [*names, ("final", None), ("head", None)]
    ]
    return Fault("clipped by another norm"), taps, {"scaled"}


def _updated(kind: str, *words: str):
    def made(draw: random.Random, how: Options, layer: int) -> Shows:
        at = draw.choice(tuple(_OUT))
        return Fault(kind, at, layer), [(f"w_{at}", _tags(layer), "tensor", 1)], set(words)

    return made


def _stale(draw: random.Random, how: Options, layer: int) -> Shows:
    at = draw.choice(tuple(_OUT))
    if how.dtype != "float32":
        return Fault("stale", at, layer), [(f"cast_{at}", _tags(layer), "tensor", 1)], {"stale"}
    taps = [(_OUT[at], _tags(layer), "tensor", 1), (_IN[at], _tags(layer), "grad", 1)]
    if at in ("q", "k"):  # the backward of its norm has what the stale weight made
        taps += [(f"grad_{name}", _tags(layer), "tensor", 1) for name in (at, f"{at}norm")]
    return Fault("stale", at, layer), taps, {"unknown", "noise", "stale"}


def _labels(draw: random.Random, how: Options, layer: int) -> Shows:
    return Fault("labels"), [("labels", {}, "tensor", 0)], {"permuted"}


def _labels_in_loss(draw: random.Random, how: Options, layer: int) -> Shows:
    taps = [("token_loss", {}, "tensor", 0), ("logits", {}, "grad", 0)]
    return Fault("labels in loss"), taps, {"unknown", "noise"}


def _count(kind: str):
    def made(draw: random.Random, how: Options, layer: int) -> Shows:
        taps = [("loss", {}, "tensor", 0), ("token_loss", {}, "grad", 0)]
        return Fault(kind), taps, {"scaled"}

    return made


_FAULTS = {
    "backward": _backward,
    "gradient not summed": _not_summed,
    "not reduced": _not_reduced,
    "wrong group": _reduced("wrong group", "partial sum"),
    "reduced twice": _reduced("reduced twice", "scaled"),
    "averaged": _reduced("averaged", "scaled"),
    "clipped by own norm": _norm,
    "clipped by another norm": _other_norm,
    "skipped": _updated("skipped", "one rank", "stale"),
    "decay": _updated("decay", "scaled"),
    "rate": _updated("rate", "unknown", "noise"),
    "stale": _stale,
    "labels": _labels,
    "labels in loss": _labels_in_loss,
    "count of one rank": _count("count of one rank"),
    "count with padding": _count("count with padding"),
}

_ONLY = {"gradient not summed": "tp", "count of one rank": "dp"}
"""Faults that there are in one mode alone; it has them in two layers."""

_PAIRS = (
    ("backward", "decay"),
    ("wrong group", "rate"),
    ("count with padding", "stale"),
    ("reduced twice", "skipped"),
)


def cases(seed: int = 0) -> tuple[Case, ...]:
    """Return all cases; where their faults lie is drawn from the seed."""
    return (*_clean(), *_faulty(seed))


def _clean() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        for changes in (
            {"mode": "dp"},
            {"mode": "tp"},
            {"mode": "dp", "optimiser": "sgd"},
            {"mode": "tp", "optimiser": "sgd", "is_clipped": False},
            {"mode": "dp", "is_clipped": False, "order": "fused"},
            {"mode": "tp", "order": "split"},
            {"mode": "dp", "optimiser": "sgd", "order": "split"},
        ):
            target = Options(**{"dtype": dtype, **changes})
            base = replace(target, mode="one", order="plain")
            yield Case(f"clean-{target.name}", base, target)


def _faulty(seed: int) -> Iterator[Case]:
    for kinds in (*((kind,) for kind in _FAULTS), *_PAIRS):
        layers = random.Random(f"{seed} {kinds}").sample(range(LAYERS), LAYERS)
        for dtype in ("float32", "bfloat16"):
            for place, mode in enumerate(("dp", "tp")):
                optimiser = ("adam", "sgd")[place]
                base = Options(dtype=dtype, optimiser=optimiser)
                target = replace(base, mode=_ONLY.get(kinds[0], mode))
                name = "-".join([*kinds, target.mode, dtype, str(place)]).replace(" ", "_")
                draw = random.Random(f"{seed} {name}")
                shown = [
                    _FAULTS[kind](draw, target, layers[(place + i) % LAYERS])
                    for i, kind in enumerate(kinds)
                ]
                yield Case(
                    name,
                    base,
                    replace(target, faults=tuple(fault for fault, _, _ in shown)),
                    " and ".join(kinds),
                    tuple(taps[0] for _, taps, _ in shown),
                    frozenset(word for _, _, words in shown for word in words),
                    tuple(tap for _, taps, _ in shown for tap in taps[1:]),
                )


CASES = cases()
