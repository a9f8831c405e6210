"""The decoder's cases: what is planted, and at which taps it should be named."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .decoder import SPARSE
from .decoder_clean import CLEAN
from .decoder_options import EXPERTS, HEADS, KEY_HEADS, Fault, Options

Place = tuple[str, dict[str, Any], str, int]
QKV = ("attn_norm", "attn_q", "attn_k", "attn_v")
ATTENTION = (*QKV, "q_rope", "k_rope", "attn_context", "attn_out")
MLP = ("mlp_norm", "router_logits", "topk", "gate", "up", "mlp_act", "mlp_out")
ORDER = ("embed", *ATTENTION, *MLP, "hidden", "logits")
"""The taps as they come in a layer, between the first and the last."""


@dataclass(frozen=True)
class Case:
    """A pair of runs.

    Attributes:
        name: also that of its folder.
        base: how the baseline computes.
        target: how the target does, with its faults.
        fault: what is planted, in words; None in a clean pair.
        expected: the taps whose segments are wrong: name, tags, kind and the first step it shows.
        classes: words that describe the error rightly.
    """

    name: str
    base: Options
    target: Options
    fault: str | None
    expected: tuple[Place, ...]
    classes: frozenset[str]


@dataclass(frozen=True)
class Planting:
    """A fault that can be planted into any baseline that has a layer for it.

    Attributes:
        kind: of the `Fault`, as `what` is.
        taps: whose segments it spoils.
        classes: words for the error at the first of them, split at commas.
        where: which layers can have it; `every ...` plants it in all of them.
        at: draws what the fault needs to know.
        step: the first that shows it.
        sparse: words for the error at the tap that stands for `taps` where taps are sparse.
        target: how the target differs beside.
        bases: names in `BASES`.
    """

    kind: str
    what: str
    taps: str
    classes: str
    where: str = "any"
    at: Callable[[random.Random, Options], tuple] = lambda r, o: ()
    step: int = 0
    sparse: str = "unknown,noise"
    target: tuple[tuple[str, Any], ...] = ()
    bases: str = "f32 bf16"


def two_of(count: int) -> Callable[[random.Random, Options], tuple]:
    """Draw two different numbers below `count`."""
    return lambda r, o: tuple(r.sample(range(count), 2))


def one_of(*choices: Any) -> Callable[[random.Random, Options], tuple]:
    """Draw one of the choices."""
    return lambda r, o: (r.choice(choices),)


def some_token(r: random.Random, o: Options) -> tuple:
    """Draw a prompt and a token that is not its first."""
    return r.randrange(o.batch), r.randrange(1, o.tokens)


any_seed = one_of(*range(1000))
any_expert = one_of(*range(EXPERTS))
EP = (("expert_parallel", True),)
SP = (("sequence_parallel", True),)

f32 = Options(layers=4, width=64, tokens=24)
bf16 = Options(layers=3, width=128, tokens=16, dtype="bfloat16", weight_seed=1)
BASES = {
    "f32": f32,
    "bf16": bf16,
    "f32-sparse": replace(f32, layers=6, taps="sparse", weight_seed=2),
    "bf16-sparse": replace(bf16, layers=5, width=64, taps="sparse", weight_seed=3),
    "f32-small": replace(f32, scale=0.02),
    "bf16-small": replace(bf16, scale=0.02),
    "sparse-small": replace(f32, scale=0.02, taps="sparse", tokens=32),
    "f32-fp8": replace(f32, quantised=True, weight_seed=4),
    "bf16-fp8": replace(bf16, quantised=True, weight_seed=5),
    "f32-decode": replace(f32, tokens=12, decode=3, weight_seed=6),
    "bf16-decode": replace(bf16, tokens=12, decode=3, weight_seed=7),
    "sparse-decode": replace(f32, tokens=12, decode=3, taps="sparse", weight_seed=8),
    "f32-padded": replace(f32, left_padding=True),
    "bf16-padded": replace(bf16, left_padding=True),
    "f32-steps": replace(f32, steps=2, weight_seed=9),
    "bf16-steps": replace(bf16, steps=2, weight_seed=10),
    "f32-experts": replace(f32, moe="all", tokens=40, weight_seed=11),
    "bf16-experts": replace(bf16, moe="all", tokens=32, weight_seed=12),
    "f32-massive": replace(f32, massive=True, weight_seed=13),
    "bf16-massive": replace(bf16, massive=True, weight_seed=14),
    "f32-wide": replace(f32, width=192, layers=3, tokens=16, weight_seed=15),
    "f32-to-bf16": replace(f32, width=128, layers=3, weight_seed=18),
    "server": replace(bf16, layers=4, weight_seed=19),
    "server-sparse": replace(bf16, layers=5, moe="none", taps="sparse", weight_seed=20),
    "server-decode": replace(bf16, tokens=12, decode=3, weight_seed=21),
    "f32-deep": replace(f32, layers=12, tokens=16, taps="sparse", weight_seed=16),
    "bf16-deep": replace(bf16, layers=12, width=64, tokens=16, weight_seed=17),
}

SERVER = {"residual": "pair", "fused": True, "attention": "sdpa"}
TARGETS: dict[str, dict[str, Any]] = {
    "f32-to-bf16": {"dtype": "bfloat16"},
    "server": SERVER,
    "server-sparse": SERVER,
    "server-decode": SERVER | {"attention": "split"},
}
"""What is other in the targets of some baselines, by no fault."""

BOTH = "f32 bf16 f32-sparse bf16-sparse"
EXPERT_BASES = "f32-experts bf16-experts"
STEPS = "f32-steps bf16-steps"
DECODES = "f32-decode bf16-decode server-decode"
OTHER = "f32-to-bf16 server"

PLANTINGS = {
    "wrong softmax scale": Planting(
        "softmax_scale",
        "",
        "attn_context",
        "unknown",
        at=one_of(0.5, 0.7, 1.5, 2.8),
        bases=f"{BOTH} {OTHER} server-sparse",
    ),
    "wrong softmax scale under sdpa": Planting(
        "softmax_scale",
        "",
        "attn_context",
        "unknown",
        at=one_of(0.35, 2.0),
        target=(("attention", "sdpa"),),
        bases="f32-massive bf16-massive bf16-deep",
    ),
    "bias on every rank": Planting(
        "bias_each_rank", "", "attn_out", "shifted", bases=f"{BOTH} {OTHER} server-sparse"
    ),
    "bias on every rank, tokens cut": Planting(
        "bias_each_rank", "", "attn_out", "shifted", target=SP
    ),
    "query heads swapped": Planting(
        "swap_heads",
        "q",
        "attn_q",
        "permuted",
        at=two_of(HEADS),
        bases=f"{BOTH} {OTHER} server-sparse",
    ),
    "value heads swapped": Planting(
        "swap_heads", "v", "attn_v", "permuted", at=two_of(KEY_HEADS), bases=f"f32 bf16 {OTHER}"
    ),
    "o-projection's heads swapped": Planting(
        "swap_heads", "o", "attn_out", "unknown", at=two_of(HEADS)
    ),
    "attention norm's epsilon": Planting(
        "epsilon",
        "attn_norm",
        "attn_norm",
        "scaled",
        at=one_of(1000),
        bases="f32-small bf16-small sparse-small",
    ),
    "MLP norm's epsilon": Planting(
        "epsilon", "mlp_norm", "mlp_norm", "scaled", at=one_of(1000), bases="f32-small bf16-small"
    ),
    "final norm's epsilon": Planting(
        "epsilon",
        "norm",
        "logits",
        "scaled",
        "none",
        at=one_of(1000),
        bases="f32-small bf16-small sparse-small",
        sparse="scaled",
    ),
    "epsilon of every attention norm": Planting(
        "epsilon",
        "attn_norm",
        "attn_norm",
        "scaled",
        "every any",
        at=one_of(1000),
        bases="f32-small bf16-small",
    ),
    "positions off by one": Planting(
        "rope_shift",
        "qk",
        "q_rope k_rope",
        "unknown",
        at=lambda r, o: (1, 0),
        bases=f"f32 bf16 {OTHER}",
    ),
    "query positions off by one": Planting(
        "rope_shift",
        "q",
        "q_rope",
        "unknown",
        at=lambda r, o: (r.choice([-1, 1]), 1),
        bases=f"{BOTH} {OTHER} server-sparse",
    ),
    "positions off from some token on": Planting(
        "rope_shift",
        "qk",
        "q_rope k_rope",
        "last tokens",
        at=lambda r, o: (1, r.randrange(o.tokens // 3, 2 * o.tokens // 3)),
        bases=f"{BOTH} {OTHER} server-sparse",
    ),
    "another base of the rotation": Planting(
        "rope_base", "k", "k_rope", "unknown", at=one_of(5e5, 500.0)
    ),
    "positions stay behind in decode": Planting(
        "rope_stale", "qk", "q_rope k_rope", "unknown", step=1, bases=DECODES
    ),
    "queries rounded to bf16": Planting(
        "rounded",
        "attn_q",
        "attn_q",
        "low precision",
        at=one_of("bfloat16"),
        bases="f32 f32-sparse f32-massive",
        sparse="low precision,noise,unknown",
    ),
    "MLP's inside rounded to bf16": Planting(
        "rounded",
        "mlp_act",
        "mlp_act",
        "low precision",
        at=one_of("bfloat16"),
        bases="f32 f32-wide",
    ),
    "MLP's output rounded to bf16": Planting(
        "rounded",
        "mlp_out",
        "mlp_out",
        "low precision",
        at=one_of("bfloat16"),
        bases="f32-sparse f32-deep",
        sparse="low precision",
    ),
    "router rounded to bf16": Planting(
        "rounded",
        "router_logits",
        "router_logits",
        "low precision",
        "experts",
        at=one_of("bfloat16"),
        bases="f32 f32-experts",
    ),
    "context rounded to fp8": Planting(
        "rounded",
        "attn_context",
        "attn_context",
        "low precision",
        at=one_of("float8_e4m3fn"),
        bases="bf16 bf16-massive",
    ),
    "attention output rounded to fp8": Planting(
        "rounded",
        "attn_out",
        "attn_out",
        "low precision",
        at=one_of("float8_e5m2"),
        bases="bf16-sparse bf16-deep",
        sparse="low precision",
    ),
    "probabilities of lower precision": Planting(
        "low_probs", "", "attn_context", "low precision,noise,unknown"
    ),
    "down-projection of lower precision": Planting(
        "low_matmul",
        "",
        "mlp_out",
        "low precision,noise,unknown",
        bases=BOTH,
        sparse="low precision,noise,unknown",
    ),
    "attention without all-reduce": Planting(
        "missing_reduce",
        "attn_out",
        "attn_out",
        "partial sum",
        bases=f"{BOTH} {OTHER} server-sparse",
        sparse="partial sum",
    ),
    "MLP without all-reduce": Planting(
        "missing_reduce", "mlp_out", "mlp_out", "partial sum", bases=f"f32 bf16 {OTHER}"
    ),
    "experts without all-reduce": Planting(
        "missing_reduce",
        "mlp_out",
        "mlp_out",
        "partial sum",
        "experts",
        target=EP,
        bases=EXPERT_BASES,
    ),
    "experts swapped": Planting(
        "swap_experts", "", "gate up mlp_out", "one expert,unknown", "experts", two_of(EXPERTS)
    ),
    "experts' down-projections swapped": Planting(
        "swap_experts",
        "down",
        "mlp_out",
        "unknown",
        "experts",
        two_of(EXPERTS),
        bases=f"{BOTH} {OTHER}",
    ),
    "expert map swapped": Planting(
        "expert_map",
        "",
        "gate up mlp_out",
        "one expert,unknown",
        "experts",
        two_of(EXPERTS),
        target=EP,
        bases=EXPERT_BASES,
    ),
    "chosen experts swapped": Planting(
        "swap_chosen", "topk", "topk", "permuted,one expert,unknown", "experts", two_of(EXPERTS)
    ),
    "one expert of the next's weight": Planting(
        "spoil_expert", "gate", "gate", "one expert", "experts", any_expert, bases=EXPERT_BASES
    ),
    "one expert's up wrong, experts spread": Planting(
        "spoil_expert",
        "up",
        "up",
        "one expert",
        "experts",
        any_expert,
        target=EP,
        bases=EXPERT_BASES,
    ),
    "capacity drops at the dispatch": Planting(
        "capacity", "dispatch", "gate up", "zeros,one expert", "experts", bases=EXPERT_BASES
    ),
    "capacity drops at the combination": Planting(
        "capacity",
        "combine",
        "mlp_out",
        "unknown,partial sum,one token",
        "experts",
        bases=f"{EXPERT_BASES} f32-sparse",
        sparse="unknown,partial sum,one token",
    ),
    "gate and up swapped": Planting(
        "swap_gate_and_up", "", "gate up", "stale,permuted,unknown", bases=f"f32 bf16 {OTHER}"
    ),
    "gate and up swapped in experts": Planting(
        "swap_gate_and_up",
        "",
        "gate up",
        "stale,permuted,unknown",
        "experts",
        bases=f"{EXPERT_BASES} bf16-sparse",
    ),
    "activation of the other half": Planting(
        "act_swapped", "", "mlp_act", "unknown", bases=f"f32 bf16 {OTHER}"
    ),
    "shares not renormalised": Planting(
        "not_renormalised",
        "",
        "mlp_out",
        "scaled",
        "experts",
        bases=f"{BOTH} {OTHER}",
        sparse="scaled",
    ),
    "shares not renormalised anywhere": Planting(
        "not_renormalised",
        "",
        "mlp_out",
        "scaled",
        "every experts",
        bases="f32 bf16-sparse",
        sparse="scaled",
    ),
    "a neighbour's scale in q": Planting(
        "borrow_scale",
        "q",
        "attn_q",
        "one head,one rank,unknown",
        at=any_seed,
        bases="f32-fp8 bf16-fp8",
    ),
    "a neighbour's scale in o": Planting(
        "borrow_scale", "o", "attn_out", "unknown", at=any_seed, bases="f32-fp8 bf16-fp8"
    ),
    "a neighbour's scale in down": Planting(
        "borrow_scale", "down", "mlp_out", "unknown", "plain", any_seed, bases="f32-fp8 bf16-fp8"
    ),
    "dropout in the MLP": Planting("dropout", "mlp_act", "mlp_act", "zeros,noise"),
    "dropout of probabilities": Planting("dropout_probs", "", "attn_context", "noise,unknown"),
    "dropout at the output": Planting(
        "dropout",
        "attn_out",
        "attn_out",
        "zeros,noise",
        bases="f32-sparse bf16-sparse",
        sparse="zeros,noise",
    ),
    "a bit of v flipped": Planting(
        "flip_bit",
        "v",
        "attn_v",
        "one head,one rank,unknown",
        at=any_seed,
        bases=f"{BOTH} {OTHER} server-sparse",
    ),
    "a bit of down flipped": Planting("flip_bit", "down", "mlp_out", "unknown", "plain", any_seed),
    "a bit of the gate flipped": Planting(
        "flip_bit", "gate", "gate", "one rank,unknown", "plain", any_seed
    ),
    "cache slot one late": Planting(
        "cache_slot",
        "",
        "attn_context",
        "unknown",
        at=one_of(1),
        step=1,
        bases=f"{DECODES} sparse-decode",
    ),
    "cache slot one early": Planting(
        "cache_slot", "", "attn_context", "unknown", at=one_of(-1), step=1, bases=DECODES
    ),
    "stale key in the cache": Planting(
        "cache_stale", "", "attn_context", "unknown", step=1, bases=DECODES
    ),
    "mask peeks ahead": Planting(
        "peek", "", "attn_context", "unknown", "open", bases=f"{BOTH} {OTHER} server-sparse"
    ),
    "padding is seen": Planting(
        "padding_seen", "", "attn_context", "unknown", "open", bases="f32-padded bf16-padded"
    ),
    "window one too long": Planting(
        "window",
        "",
        "attn_context",
        "unknown",
        "window",
        one_of(1),
        bases=f"{BOTH} {OTHER} server-sparse",
    ),
    "window one too short": Planting("window", "", "attn_context", "unknown", "window", one_of(-1)),
    "every window one too long": Planting(
        "window",
        "",
        "attn_context",
        "unknown",
        "every window",
        one_of(1),
        bases="f32 bf16 f32-sparse",
    ),
    "key heads tiled": Planting(
        "tiled_heads", "", "attn_context", "unknown,permuted", bases=f"f32 bf16 {OTHER}"
    ),
    "a shard of q twice": Planting(
        "wrong_shard", "q", "attn_q", "one rank,permuted", bases=f"f32 bf16 {OTHER} f32-wide"
    ),
    "a shard of up twice": Planting("wrong_shard", "up", "up", "one rank,permuted"),
    "a shard of o twice": Planting(
        "wrong_shard",
        "o",
        "attn_out",
        "unknown,partial sum",
        bases=f"{BOTH} {OTHER} server-sparse",
        sparse="unknown,partial sum",
    ),
    "a shard of the unembedding twice": Planting(
        "wrong_shard",
        "unembedding",
        "logits",
        "one rank,permuted",
        "none",
        bases="f32 bf16-sparse",
        sparse="one rank,permuted",
    ),
    "o transposed": Planting("transpose", "o", "attn_out", "unknown,noise"),
    "a value head of zeros": Planting(
        "zero_head", "v", "attn_v", "one head,zeros", at=one_of(*range(KEY_HEADS))
    ),
    "a query head of zeros": Planting(
        "zero_head",
        "q",
        "attn_q",
        "one head,zeros",
        at=one_of(*range(HEADS)),
        bases=f"f32 bf16 {OTHER}",
    ),
    "keys scaled": Planting(
        "scaled",
        "attn_k",
        "attn_k",
        "scaled",
        at=one_of(0.25, 1.1, -1.0),
        bases=f"f32 bf16 {OTHER}",
    ),
    "embedding scaled": Planting("scaled", "embed", "embed", "scaled", "none", one_of(0.125, 8.0)),
    "logits scaled": Planting(
        "scaled",
        "logits",
        "logits",
        "scaled",
        "none",
        one_of(0.9, 1.2),
        bases="f32-sparse bf16-sparse",
        sparse="scaled",
    ),
    "norm shifted": Planting(
        "shifted",
        "mlp_norm",
        "mlp_norm",
        "shifted",
        at=one_of(0.1, -0.5),
        bases=f"f32 bf16 {OTHER}",
    ),
    "context scaled on one rank": Planting(
        "scaled_on_rank", "attn_context", "attn_context", "one rank,scaled", at=one_of(0.5, 1.25)
    ),
    "last tokens zero": Planting(
        "zero_last",
        "attn_out",
        "attn_out",
        "last tokens,zeros",
        at=one_of(2, 3, 4),
        bases=f"{BOTH} {OTHER} server-sparse",
        sparse="last tokens,zeros",
    ),
    "a token's row of its neighbour": Planting(
        "token",
        "mlp_out",
        "mlp_out",
        "one token",
        at=some_token,
        bases=f"{BOTH} {OTHER} server-sparse",
        sparse="one token",
    ),
    "a token's row of its neighbour in the embedding": Planting(
        "token", "embed", "embed", "one token", "none", some_token
    ),
    "output of the layer before": Planting(
        "stale_layer",
        "attn_out",
        "attn_out",
        "stale",
        "second",
        bases=f"{BOTH} {OTHER} server-sparse",
        sparse="stale",
    ),
    "embedding of the step before": Planting(
        "stale_step", "embed", "embed", "stale", "none", step=1, bases=STEPS
    ),
    "values of the step before": Planting(
        "stale_step", "attn_v", "attn_v", "stale", step=1, bases=STEPS
    ),
}

SEVERAL = {
    "two layers' scales": ("f32 bf16", "wrong softmax scale @0", "wrong softmax scale @1"),
    "a swap and a bit": ("f32 bf16", "query heads swapped @0", "a bit of down flipped @1"),
    "queries, then their rotation": (
        "f32 bf16",
        "query heads swapped @0",
        "query positions off by one @0",
    ),
    "rotation, then scale": (
        "f32 bf16",
        "query positions off by one @0",
        "wrong softmax scale @0",
    ),
    "inside and output of the MLP": (
        "f32 bf16",
        "dropout in the MLP @0",
        "MLP without all-reduce @0",
    ),
    "scale, then bias": (
        "f32 bf16 bf16-deep",
        "wrong softmax scale @0",
        "bias on every rank @0",
    ),
    "attention and MLP of a layer": (
        BOTH,
        "bias on every rank @0",
        "down-projection of lower precision @0",
    ),
    "two layers' outputs": (
        "f32-sparse bf16-sparse",
        "attention without all-reduce @0",
        "last tokens zero @1",
    ),
    "embedding and logits": ("f32 bf16", "embedding scaled", "a shard of the unembedding twice"),
    "large before small": ("f32", "output of the layer before @0", "queries rounded to bf16 @1"),
    "experts and window": (
        "f32 bf16 f32-sparse",
        "shares not renormalised @0",
        "window one too long @1",
    ),
    "three in one layer": (
        "f32 bf16",
        "a value head of zeros @0",
        "mask peeks ahead @0",
        "norm shifted @0",
    ),
    "three layers": (
        "f32 bf16-deep",
        "a bit of v flipped @0",
        "keys scaled @1",
        "o transposed @2",
    ),
    "three outputs": (
        "f32-sparse f32-deep",
        "bias on every rank @0",
        "a token's row of its neighbour @1",
        "wrong softmax scale @2",
    ),
    "embedding, step and cache": (
        "f32-decode bf16-decode",
        "keys scaled @0",
        "cache slot one late @1",
    ),
    "rounding behind dropout": ("f32", "queries rounded to bf16 @0", "dropout of probabilities @0"),
}
"""Cases of more than one fault: the bases, then the plantings, each with the layer it is in."""


def layers_for(where: str, options: Options) -> list[int]:
    """Return the layers that `Planting.where` allows."""
    allows: dict[str, Callable[[int], bool]] = {
        "any": lambda i: True,
        "second": lambda i: i > 0,
        "experts": options.has_experts,
        "plain": lambda i: not options.has_experts(i),
        "window": options.has_window,
        "open": lambda i: not options.has_window(i),
        "none": lambda i: False,
    }
    return [i for i in range(options.layers) if allows[where.removeprefix("every ")](i)]


def planted(
    planting: Planting, base: Options, layer: int | None, r: random.Random
) -> tuple[Fault, list[Place], set[str]]:
    """Return a fault in a layer, the places where it should be named, and the words for it."""
    taps, classes = planting.taps.split(), planting.classes
    if base.taps == "sparse" and taps[0] not in SPARSE:
        taps = ["attn_out" if taps[0] in ATTENTION else "mlp_out"]
        classes = planting.sparse
    elif base.taps == "sparse":
        taps = [tap for tap in taps if tap in SPARSE]
    tags = {} if layer is None else {"layer": layer}
    places: list[Place] = [(tap, tags, "tensor", planting.step) for tap in taps]
    fault = Fault(planting.kind, layer, planting.what, planting.at(r, base))
    return fault, places, set(classes.split(","))


def position(place: Place) -> tuple[int, int, int]:
    """Return where a place comes in the order of execution."""
    name, tags, _, step = place
    layer = tags.get("layer", -1 if name == "embed" else 1 << 30)
    return step, layer, ORDER.index(name)


def case_of(
    name: str,
    title: str,
    key: str,
    seed: int,
    chosen: list[tuple[Planting, int | None]],
    r: random.Random,
) -> Case:
    """Put a case together from plantings and their layers."""
    base = seeded(BASES[key], seed)
    found = [planted(planting, base, layer, r) for planting, layer in chosen]
    extra = {key: value for planting, _ in chosen for key, value in planting.target}
    changed = TARGETS.get(key, {}) | extra
    target = replace(base, tp=2, faults=tuple(fault for fault, _, _ in found), **changed)
    places = sorted((p for _, places, _ in found for p in places), key=position)
    unique = tuple(p for k, p in enumerate(places) if p not in places[:k])
    words = frozenset(word for _, _, words in found for word in words)
    return Case(name, base, target, title, unique, words)


def seeded(options: Options, seed: int) -> Options:
    """Draw other weights and tokens from another seed."""
    return replace(
        options,
        weight_seed=options.weight_seed + 1000 * seed,
        token_seed=options.token_seed + 1000 * seed,
    )


def cases(seed: int = 0) -> tuple[Case, ...]:
    """Return all cases of a seed, from which all that is drawn comes."""
    return (*_single(seed), *_several(seed), *_clean(seed))


def _single(seed: int) -> Iterator[Case]:
    for title, planting in PLANTINGS.items():
        for key in planting.bases.split():
            base, name = seeded(BASES[key], seed), slug(f"{title} {key}")
            r = random.Random(f"{seed} {name}")
            layers: list[int | None] = [*layers_for(planting.where, base)]
            if planting.where == "none":
                layers = [None]
            elif not planting.where.startswith("every"):
                layers = [r.choice(layers)]
            yield case_of(name, title, key, seed, [(planting, layer) for layer in layers], r)


def _several(seed: int) -> Iterator[Case]:
    for title, (bases, *parts) in SEVERAL.items():
        for key in bases.split():
            base, name = seeded(BASES[key], seed), slug(f"{title} {key}")
            r = random.Random(f"{seed} {name}")
            wanted = [(PLANTINGS[p.split(" @")[0]], p.partition(" @")[2]) for p in parts]
            slots = sorted({slot for _, slot in wanted if slot})
            while True:
                layers = dict(zip(slots, r.sample(range(base.layers), len(slots)), strict=True))
                if all(not s or layers[s] in layers_for(p.where, base) for p, s in wanted):
                    break
            chosen = [(p, layers.get(slot)) for p, slot in wanted]
            words = " and ".join(p.split(" @")[0] for p in parts)
            yield case_of(name, words, key, seed, chosen, r)


def _clean(seed: int) -> Iterator[Case]:
    for name, (base, target) in CLEAN.items():
        base = seeded(base, seed)
        changed = {"tp": 2} | target
        yield Case(slug(f"clean {name}"), base, replace(base, **changed), None, (), frozenset())


def slug(text: str) -> str:
    """Return a name for a folder."""
    kept = "".join(c for c in text.lower() if c.isalnum() or c in " -")
    return "-".join(kept.replace("-", " ").split())


CASES = cases()
