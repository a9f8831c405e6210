"""A decoder in plain torch: rotary positions, grouped heads, a cache, experts; float32.

It computes whole layers of a batch of `Segment`s. What a rank has of that, and how it is tapped, is
its `View`'s to say (`views`); keys and values go by prefix, so that requests share them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .requests import VOCABULARY

WIDTH, LAYERS, HEADS, KEY_HEADS, HEAD, EXPERTS, TOP, INNER = 32, 2, 4, 2, 8, 4, 2, 16


@dataclass
class Segment:
    """Some tokens of a request, side by side in a batch.

    Attributes:
        tokens: all of the request up to the end of these.
        start: how many of them were computed before.
        at: where its first row stands among those of the batch.
    """

    tokens: list
    start: int
    at: int

    @property
    def positions(self):
        return range(self.start, len(self.tokens))

    @property
    def length(self):
        return len(self.tokens) - self.start


@functools.cache
def weights(seed=0):
    """Return the weights by name."""
    g = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(*shape, generator=g) * shape[-1] ** -0.5

    layers = [
        {
            "q": some(HEADS * HEAD, WIDTH),
            "k": some(KEY_HEADS * HEAD, WIDTH),
            "v": some(KEY_HEADS * HEAD, WIDTH),
            "o": some(WIDTH, HEADS * HEAD),
            "router": some(EXPERTS, WIDTH) * 4,
            "up": some(EXPERTS, INNER, WIDTH),
            "down": some(EXPERTS, WIDTH, INNER),
        }
        for _ in range(LAYERS)
    ]
    return {"embed": torch.randn(VOCABULARY, WIDTH, generator=g), "layers": layers}


def norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def turned(x, positions):
    """Rotate [n, heads, HEAD] by positions."""
    angles = positions[:, None, None] * 100.0 ** -(torch.arange(HEAD // 2) / (HEAD // 2))
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Decoder:
    """The decoder; its cache is that of one run.

    Args:
        capacity: (expert, ids) -> the set of ids whose rows it takes; None for all.
        checkpoint: calls a layer; None to call it plainly.
        trains: whether weights get gradients.
    """

    def __init__(self, capacity=None, checkpoint=None, trains=False):
        self.capacity, self.checkpoint, self.trains = capacity, checkpoint, trains
        self.cache = [{} for _ in range(LAYERS)]
        self.weights = weights()
        if trains:
            self.weights = {
                "embed": self.weights["embed"].clone().requires_grad_(),
                "layers": [
                    {name: one.clone().requires_grad_() for name, one in layer.items()}
                    for layer in self.weights["layers"]
                ],
            }

    def __call__(self, segments, rows, view):
        """Run segments of `rows` rows in all, the others being padding; return the logits."""
        tokens, positions = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
        for one in segments:
            here = slice(one.at, one.at + one.length)
            tokens[here] = torch.tensor(one.tokens[one.start :])
            positions[here] = torch.tensor([float(p) for p in one.positions])
        x = self.weights["embed"][tokens]
        for layer in range(LAYERS):
            run = functools.partial(self.layer, layer, segments, positions, view)
            x = run(x) if self.checkpoint is None else self.checkpoint(run, x)
        return view.logits(norm(x) @ self.weights["embed"].T)

    def layer(self, layer, segments, positions, view, x):
        w, n = self.weights["layers"][layer], len(x)
        y = norm(x)
        q = turned((y @ w["q"].T).view(n, HEADS, HEAD), positions)
        k = turned((y @ w["k"].T).view(n, KEY_HEADS, HEAD), positions)
        v = (y @ w["v"].T).view(n, KEY_HEADS, HEAD)
        q = view.tokens("attn_q", q, "g d", cut=0, layer=layer)
        heads = self.attended(layer, segments, q, k, v)
        whole = view.summed("attn_out", heads, w["o"], layer=layer)
        x = x + whole
        y = norm(x)
        logits = view.tokens("router_logits", y @ w["router"].T, "e", layer=layer)
        weight, chosen = logits.softmax(-1).topk(TOP, -1)
        # A copy: autograd goes back to where topk found them.
        chosen = view.tokens("topk_ids", chosen.clone(), "k", layer=layer)
        weight = view.tokens("topk_weights", weight, "k", layer=layer)
        x = x + self.experts(layer, y, chosen, weight, view)
        return view.tokens("hidden", x, "h", sequence_parallel=True, layer=layer)

    def attended(self, layer, segments, q, k, v):
        """Attend to all that the cache has of each segment's prefixes."""
        cache = self.cache[layer]
        parts, at = [], 0
        for one in segments:
            for i, p in enumerate(one.positions):
                cache[tuple(one.tokens[: p + 1])] = k[one.at + i], v[one.at + i]
        for one in segments:
            pairs = [cache[tuple(one.tokens[: p + 1])] for p in range(len(one.tokens))]
            keys, values = (
                torch.stack(part).repeat_interleave(HEADS // KEY_HEADS, 1)
                for part in zip(*pairs, strict=True)
            )
            own = q[one.at : one.at + one.length]
            scores = torch.einsum("qhd,khd->hqk", own, keys) * HEAD**-0.5
            late = torch.arange(len(pairs))[None] > torch.tensor(one.positions)[:, None]
            scores = scores.masked_fill(late, -torch.inf)
            found = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            parts += [torch.zeros(one.at - at, HEADS * HEAD), found.reshape(one.length, -1)]
            at = one.at + one.length
        return torch.cat([*parts, torch.zeros(len(q) - at, HEADS * HEAD)])

    def experts(self, layer, y, chosen, weight, view):
        """Send each token to its experts, sorted by expert, and add up what they return."""
        w = self.weights["layers"][layer]
        pairs = [
            (expert, row, j)
            for expert in range(EXPERTS)
            for row, j in (chosen == expert).nonzero().tolist()
        ]
        if self.capacity is not None:
            ids = [view.ids[row] for _, row, _ in pairs]
            taken = {
                e: self.capacity(e, [i for i, p in zip(ids, pairs, strict=True) if p[0] == e])
                for e in range(EXPERTS)
            }
            pairs = [p for p, one in zip(pairs, ids, strict=True) if one in taken[p[0]]]
        experts = [expert for expert, _, _ in pairs]
        rows = torch.tensor([row for _, row, _ in pairs], dtype=torch.int64)
        sent = view.sorted("expert_in", y[rows], rows.tolist(), experts, layer=layer)
        parts = []
        for expert in range(EXPERTS):
            mine = sent[[i for i, e in enumerate(experts) if e == expert]]
            inner = torch.nn.functional.silu(mine @ w["up"][expert].T)
            parts.append(inner @ w["down"][expert].T)
        back = view.sorted("expert_out", torch.cat(parts), rows.tolist(), experts, layer=layer)
        share = weight[rows, torch.tensor([j for _, _, j in pairs], dtype=torch.int64)]
        return torch.zeros_like(y).index_add(0, rows, back * share[:, None])
