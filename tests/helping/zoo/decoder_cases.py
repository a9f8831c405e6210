"""Pairs of decoders: faults planted in the target, and clean ones."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from .decoder import Fault, Options


@dataclass(frozen=True)
class Case:
    """A pair, and what is to be named first.

    Attributes:
        expected: for each fault, name, tags, kind and first step of the taps it may be named at.
        classes: words that fit.
    """

    name: str
    base: Options
    target: Options
    faults: tuple[Fault, ...] = ()
    expected: tuple[tuple[str, int | None, str, int], ...] = ()
    classes: frozenset[str] = frozenset()


# fault -> the dense tap and the sparse one where it shows, words for it, which layers have it
FAULTS = {
    "scale": ("attn_context", "attn_out", {"unknown"}, "any"),
    "bias_twice": ("attn_out", "attn_out", {"shifted"}, "any"),
    "heads": ("attn_q", "attn_out", {"permuted", "stale"}, "any"),
    "eps": ("attn_norm", "attn_out", {"scaled"}, "any"),
    "rope": ("q_rope", "attn_out", {"unknown", "last tokens"}, "any"),
    "low": ("attn_q", "attn_out", {"low precision"}, "float32"),
    "no_reduce": ("attn_out", "attn_out", {"partial sum"}, "any"),
    "mlp_no_reduce": ("mlp_out", "mlp_out", {"partial sum"}, "any"),
    "experts": ("mlp_out", "mlp_out", {"unknown"}, "mixture"),
    "expert_scale": ("mlp_out", "mlp_out", {"unknown", "scaled"}, "mixture"),
    "capacity": ("mlp_out", "mlp_out", {"unknown", "zeros", "last tokens", "one token"}, "mixture"),
    "renorm": ("mlp_out", "mlp_out", {"scaled"}, "mixture"),
    "gate_up": ("gate", "mlp_out", {"stale", "permuted", "unknown"}, "plain"),
    "bit": ("up", "mlp_out", {"unknown", "one rank", "scaled", "shifted"}, "plain"),
    "fp8": ("mlp_out", "mlp_out", {"unknown"}, "plain"),
    "dropout": ("attn_context", "attn_out", {"unknown", "noise", "zeros"}, "any"),
    "mlp_dropout": ("mlp_out", "mlp_out", {"unknown", "noise", "zeros"}, "plain"),
    "peek": ("attn_context", "attn_out", {"unknown"}, "any"),
    "window": ("attn_context", "attn_out", {"unknown", "last tokens"}, "odd"),
    "shard": ("mlp_out", "mlp_out", {"unknown"}, "plain"),
    "cache": ("attn_context", "attn_out", {"unknown"}, "any"),
}


def _layers(which, layers):
    fits = {
        "mixture": lambda i: i % 3 == 1,
        "plain": lambda i: i % 3 != 1,
        "odd": lambda i: i % 2 == 1,
    }.get(which, lambda i: True)
    return [i for i in range(layers) if fits(i)]


def _faulty(seed):
    draw = random.Random(seed)
    for name, (dense, sparse, classes, which) in FAULTS.items():
        for dtype in ("float32", "bfloat16"):
            if which in ("float32", "bfloat16") and which != dtype:
                continue
            for number in range(2):
                layers = draw.choice((3, 5, 6))
                layer = draw.choice(_layers(which, layers))
                if name == "rope":
                    layer = max(layer, 0)
                taps = "sparse" if number else "dense"
                base = Options(
                    layers=layers, dtype=dtype, taps=taps, seed=seed + 10 * number,
                    tokens=draw.choice((24, 40)), width=draw.choice((64, 128)),
                    decode=3 if name == "cache" else 0,
                )  # fmt: skip
                fault = Fault(name, layer, draw.randrange(1000))
                at = sparse if number else dense
                step = 1 if name == "cache" else 0
                words = classes
                if dense != sparse and number:  # what follows the fault hides its signature
                    words = classes | {"unknown", "one token", "last tokens", "one rank"}
                yield Case(
                    f"{name}-{dtype}-{taps}", base, replace(base, tp=2), (fault,),
                    ((at, layer, "tensor", step),), frozenset(words),
                )  # fmt: skip


def _several(seed):
    draw = random.Random(seed + 1)
    pairs = [("scale", "no_reduce"), ("eps", "gate_up"), ("heads", "peek"), ("renorm", "scale"),
             ("bias_twice", "mlp_no_reduce"), ("fp8", "rope")]  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        for names in pairs:
            base = Options(layers=5, dtype=dtype, seed=seed + 3)
            faults, expected = [], []
            for name in names:
                dense, _sparse, _classes, which = FAULTS[name]
                layer = draw.choice(_layers(which, 5))
                faults.append(Fault(name, layer, 3))
                expected.append((dense, layer, "tensor", 0))
            yield Case(
                f"both-{'-'.join(names)}-{dtype}", base, replace(base, tp=2), tuple(faults),
                tuple(expected),
            )  # fmt: skip


def _clean(seed):
    for dtype in ("float32", "bfloat16"):
        for taps in ("dense", "sparse"):
            base = Options(dtype=dtype, taps=taps, seed=seed + 5)
            how = {
                "tp": {"tp": 2}, "sdpa": {"kernel": "sdpa"}, "split": {"kernel": "split"},
                "tp-sdpa": {"tp": 2, "kernel": "sdpa"}, "in-place": {"in_place": True},
                "delta": {"stream": "delta", "tp": 2},
            }  # fmt: skip
            for name, change in how.items():
                yield Case(f"clean-{name}-{dtype}-{taps}", base, replace(base, **change))
        base = Options(dtype=dtype, seed=seed + 6)
        shapes = {
            "1": {"layers": 1}, "2": {"layers": 2}, "24": {"layers": 24}, "48": {"layers": 48},
            "192": {"width": 192}, "massive": {"massive": True, "layers": 6},
            "padding": {"padding": 6}, "decode": {"decode": 4}, "no-experts": {"experts": False},
        }  # fmt: skip
        for name, change in shapes.items():
            one = replace(base, **change)
            yield Case(f"clean-{name}-{dtype}", one, replace(one, tp=2))
            if name in ("massive", "padding", "decode", "192"):
                yield Case(f"clean-{name}-sdpa-{dtype}", one, replace(one, kernel="sdpa"))
    wide = Options(seed=seed + 7, layers=4)
    for taps in ("dense", "sparse"):
        one = replace(wide, taps=taps)
        yield Case(f"clean-wide-narrow-{taps}", one, replace(one, dtype="bfloat16", tp=2))
        yield Case(f"clean-narrow-wide-{taps}", replace(one, dtype="bfloat16"), replace(one, tp=2))
        yield Case(f"clean-fewer-bits-{taps}", one, replace(one, reduced="bfloat16"))


def cases(seed=0):
    """Return all pairs of a seed."""
    return [*_faulty(seed), *_several(seed), *_clean(seed)]
