"""A small transformer with taps, in any dtype and sharding: what rounding makes of a clean pair."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention, silu


@dataclass
class Options:
    """How one side computes: nothing of it changes what is computed.

    Attributes:
        tp: into how many summands products are split.
        kernel: of attention: `eager` takes the softmax in float32, `low` in the dtype itself,
            `wide` all of attention in float32, `fused` is torch's.
        norm: `wide` normalises in float32, `low` multiplies in the dtype.
    """

    tp: int = 1
    kernel: str = "eager"
    norm: str = "wide"


@dataclass
class Transformer:
    """Weights of some layers, from a seed.

    Attributes:
        layers: how many.
        seed: of the weights.
        is_massive: whether a channel of the first token, and one of all, become massive.
        scale: of what goes in.
        width: of the residual stream.
        heads: of attention.
        tokens: of the sequence.
    """

    layers: int
    seed: int = 0
    is_massive: bool = False
    scale: float = 1.0
    width: int = 128
    heads: int = 8
    tokens: int = 48
    _weights: list[dict] = field(init=False)

    def __post_init__(self):
        random = torch.Generator().manual_seed(self.seed)

        def weight(*shape):
            return torch.randn(*shape, generator=random) / shape[0] ** 0.5

        h = self.width
        self._weights = [
            {
                "qkv": weight(h, 3 * h), "o": weight(h, h), "up": weight(h, 4 * h),
                "gate": weight(h, 4 * h), "down": weight(4 * h, h),
                "gain": 1 + 0.2 * torch.randn(h, generator=random),
            }
            for _ in range(self.layers)
        ]  # fmt: skip
        self._head = weight(h, 512)
        self._x = torch.randn(self.tokens, h, generator=random) * self.scale

    def run(self, tap, dtype, options=None, grad=False):
        """Run once, and backwards where `grad` says so; `tap(name, value, layer=i)` sees it."""
        how = options or Options()
        heads, size = self.heads, self.width // self.heads
        x = self._x.to(dtype)
        if grad:
            x.requires_grad_(True)
        hidden = torch.triu(torch.ones(self.tokens, self.tokens, dtype=torch.bool), 1)
        for i, weights in enumerate(self._weights):
            w = {name: value.to(dtype) for name, value in weights.items()}
            h = tap("norm", _norm(x, weights["gain"], how), layer=i)
            q, k, v = _columns(h, w["qkv"], how).view(self.tokens, 3, heads, size).unbind(1)
            # as sharp as trained attention
            q, k, v = (t.transpose(0, 1) for t in (tap("q", 3 * q, layer=i), k, v))
            if how.kernel == "fused":
                o = scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                o = self._attention(q, k, v, hidden, tap, how, i)
            o = tap("heads", o.transpose(0, 1).reshape(self.tokens, self.width), layer=i)
            x = x + tap("attn_out", _rows(o, w["o"], how), layer=i)
            h = _norm(x, weights["gain"], how)
            act = silu(_columns(h, w["gate"], how)) * _columns(h, w["up"], how)
            out = _rows(tap("act", act, layer=i), w["down"], how)
            if self.is_massive and i == min(2, self.layers - 1):
                massive = torch.zeros_like(out)
                massive[0, 7], massive[:, 11] = 2000.0 * self.scale, 60.0 * self.scale
                out = out + massive
            x = tap("resid", x + tap("mlp_out", out, layer=i), layer=i)
        logits = tap("logits", _norm(x, torch.ones(self.width), how) @ self._head.to(dtype))
        if grad:
            right = logits.float()[torch.arange(self.tokens), torch.arange(self.tokens)]
            # Without it, gradients of float16 vanish.
            loss = 1024 * (logits.float().logsumexp(-1) - right).mean()
            loss.backward()

    def _attention(self, q, k, v, hidden, tap, how, i):
        dtype = q.dtype
        if how.kernel == "wide":
            q, k, v = (t.float() for t in (q, k, v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
        scores = tap("scores", scores.to(dtype), layer=i).to(scores.dtype)
        wide = scores if how.kernel == "low" else scores.float()
        p = torch.softmax(wide, -1)
        p = tap("probs", p.to(dtype), layer=i).to(v.dtype)
        return (p @ v).to(dtype)


def _norm(x, gain, how):
    wide = x.float()
    root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-30)
    if how.norm == "low":
        return x * root.to(x.dtype) * gain.to(x.dtype)
    return (wide * root * gain).to(x.dtype)


def _columns(x, weight, how):
    return torch.cat([x @ part for part in weight.chunk(how.tp, 1)], 1)


def _rows(x, weight, how):
    parts = [a @ b for a, b in zip(x.chunk(how.tp, 1), weight.chunk(how.tp, 0), strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
