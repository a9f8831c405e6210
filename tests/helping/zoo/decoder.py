"""A small decoder with taps, cut over tensor-parallel ranks, and the faults it can be given.

Grouped heads, RoPE, a sliding window on odd layers, mixtures of experts on every third one, a KV
cache. Weights are drawn whole from a seed and then cut. A fault is a name and a layer; `Decoder`
asks `self.has(name, layer)` where it could go wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from recorder import declare_mesh, step
from recorder import tap as real_tap

SPARSE = ("attn_out", "mlp_out", "hidden", "logits")


@dataclass(frozen=True)
class Options:
    """How one side computes; none of it but `layers`, `width` and seeds changes what.

    Attributes:
        kernel: of attention: `eager`, `sdpa` or `split`, which sums in parts.
        taps: `dense`, or `sparse` for those at the ends of blocks.
        stream: `sum`, or `delta` where the residual is added up later.
        decode: steps of one token after the prompt, with a cache; in the target of such a pair,
            `cached` says whether it has one.
        reduced: dtype that all products are rounded to, as in a run of fewer bits.
    """

    layers: int = 3
    width: int = 64
    tokens: int = 24
    dtype: str = "float32"
    tp: int = 1
    kernel: str = "eager"
    taps: str = "dense"
    stream: str = "sum"
    decode: int = 0
    cached: bool = True
    in_place: bool = False
    padding: int = 0
    massive: bool = False
    experts: bool = True
    reduced: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where."""

    name: str
    layer: int = 0
    at: int = 0


@dataclass
class Decoder:
    """One rank's part of the model."""

    options: Options
    rank: int = 0
    faults: tuple[Fault, ...] = ()
    heads: int = 8
    groups: int = 4
    experts: int = 8
    _weights: list[dict[str, Tensor]] = field(init=False)

    def __post_init__(self):
        o = self.options
        random = torch.Generator().manual_seed(1000 + o.seed)
        w, d = o.width, o.width // self.heads
        dtype = getattr(torch, o.dtype)

        def draw(*shape, scale=None):
            values = torch.randn(*shape, generator=random) * (scale or shape[-2] ** -0.5)
            return values.to(dtype)

        self.embedding = draw(97, w, scale=1.0)
        if o.massive:
            self.embedding[:, 5] *= 60
        self._weights = []
        for _layer in range(o.layers):
            one = {
                "q": draw(w, w), "k": draw(w, self.groups * d), "v": draw(w, self.groups * d),
                "o": draw(w, w), "bias": draw(w, scale=0.3),
                "norm": 1 + 0.1 * draw(w, scale=1.0), "mlp_norm": 1 + 0.1 * draw(w, scale=1.0),
                "gate": draw(w, 2 * w), "up": draw(w, 2 * w), "down": draw(2 * w, w),
                "router": draw(w, self.experts),
                "e_gate": draw(self.experts, w, w), "e_up": draw(self.experts, w, w),
                "e_down": draw(self.experts, w, w),
            }  # fmt: skip
            self._weights.append(one)
        self.final = 1 + 0.1 * draw(w, scale=1.0)
        self.head = draw(w, 97)
        for layer, one in enumerate(self._weights):
            self._plant(layer, one)
            for name, dim in (("q", 1), ("k", 1), ("v", 1), ("o", 0), ("gate", 1), ("up", 1),
                              ("down", 0), ("e_gate", 2), ("e_up", 2), ("e_down", 1)):  # fmt: skip
                one[name] = one[name].chunk(o.tp, dim)[self.rank].contiguous()
            if self.has("shard", layer) and self.rank == 1:
                one["down"] = one["down"].flip(0).contiguous()

    def has(self, name, layer):
        """Return the fault of a name in a layer, None where there is none."""
        return next((f for f in self.faults if (f.name, f.layer) == (name, layer)), None)

    def _plant(self, layer, one):
        d = self.options.width // self.heads
        if fault := self.has("heads", layer):
            a, b = fault.at % 8, (fault.at + 3) % 8
            order = list(range(self.heads))
            order[a], order[b] = order[b], order[a]
            one["q"] = one["q"].unflatten(1, (self.heads, d))[:, order].flatten(1)
        if self.has("gate_up", layer):
            one["gate"], one["up"] = one["up"], one["gate"]
        if fault := self.has("bit", layer):
            flat = one["up"].reshape(-1)
            flat[fault.at] = flat[fault.at] * 2.0**20 if flat[fault.at] else 1e4
        if fault := self.has("fp8", layer):
            block = one["down"][:32].float()
            one["down"][:32] = (block * (1.7 + fault.at % 3)).to(one["down"].dtype)
        if self.has("experts", layer):
            for name in ("e_gate", "e_up", "e_down"):
                one[name] = one[name][[1, 0, *range(2, self.experts)]]
        if fault := self.has("expert_scale", layer):
            one["e_down"][fault.at % self.experts] *= 1.25

    def tap(self, name, value, **about):
        """Tap what the options ask for."""
        if self.options.taps == "sparse" and name not in SPARSE:
            return value
        return real_tap(name, value, **about)

    def product(self, x, w):
        """Multiply, in the order of summands and in the bits that the options say."""
        o = self.options
        if o.reduced:
            low = getattr(torch, o.reduced)
            x, w = x.to(low).to(x.dtype), w.to(low).to(w.dtype)
        if o.kernel == "split":
            parts = zip(x.chunk(4, -1), w.chunk(4, -2), strict=True)
            return sum(a @ b for a, b in parts)
        return x @ w

    def reduced(self, x):
        """Add up over ranks."""
        if self.options.tp > 1:
            x = x.contiguous()
            dist.all_reduce(x)
        return x

    def norm(self, x, weight, layer, name="norm"):
        """RMSNorm, in float32."""
        eps = 1e-5
        if name == "norm" and self.has("eps", layer):
            eps = 1e-5 * 1e3 * 10
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def rope(self, x, positions):
        """Rotate x of [b, s, h, d] by positions of [b, s]."""
        half = x.shape[-1] // 2
        rates = 100.0 ** -(torch.arange(half) / half)
        angles = (positions[..., None].float() * rates)[:, :, None]
        a, b = x.float().chunk(2, -1)
        return torch.cat(
            [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1
        ).to(x.dtype)

    def attention(self, x, layer, positions, cache):
        """Attention of x of [b, s, w]."""
        w, o = self._weights[layer], self.options
        d = o.width // self.heads
        x = self.tap("attn_norm", self.norm(x, w["norm"], layer), dims="b s w", layer=layer)
        if self.has("low_norm", layer):
            x = x.to(torch.bfloat16).to(x.dtype)
        q, k, v = (self.product(x, w[n]).unflatten(-1, (-1, d)) for n in "qkv")
        if self.has("low", layer):
            q = q.to(torch.bfloat16).to(q.dtype)
        q = self.tap("attn_q", q, dims="b s h[tp] d", layer=layer)
        k = self.tap("attn_k", k, dims="b s h[tp] d", layer=layer)
        v = self.tap("attn_v", v, dims="b s h[tp] d", layer=layer)
        turned = positions
        if self.has("rope", layer):
            turned = positions + (positions > 7)
        q = self.tap("q_rope", self.rope(q, turned), dims="b s h[tp] d", layer=layer)
        k = self.tap("k_rope", self.rope(k, positions), dims="b s h[tp] d", layer=layer)
        keys = positions
        if cache is not None:
            if cache.get(layer) is not None:
                old_k, old_v, old = cache[layer]
                if self.has("cache", layer):
                    old_k = torch.cat([old_k[:, :1], old_k[:, :-1]], 1)
                k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
                keys = torch.cat([old, positions], 1)
            cache[layer] = k, v, keys
        context = self.attend(q, k, v, positions, keys, layer)
        context = self.tap("attn_context", context.flatten(2), dims="b s w[tp]", layer=layer)
        out = self.product(context, w["o"])
        if not self.has("no_reduce", layer):
            if self.has("bias_twice", layer):
                out = out + w["bias"]
            out = self.reduced(out)
        if not self.has("bias_twice", layer):
            out = out + w["bias"]
        return self.tap("attn_out", out, dims="b s w", layer=layer)

    def attend(self, q, k, v, positions, keys, layer):
        """Return [b, s, h, d] from q of [b, s, h, d], k and v of [b, t, g, d]."""
        repeat = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(repeat, 2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        at, of = positions[:, None, :, None], keys[:, None, None, :]
        peek = 1 if self.has("peek", layer) else 0
        allowed = (of <= at + peek) & (of >= 0)
        if layer % 2:
            allowed &= of > at - 8 - (1 if self.has("window", layer) else 0)
        scale = q.shape[-1] ** -0.5
        if self.has("scale", layer):
            scale *= 1.5
        if self.options.kernel == "sdpa":
            found = scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
            return found.nan_to_num().transpose(1, 2)
        scores = (q.float() @ k.float().mT * scale).masked_fill(~allowed, -1e30)
        probs = (scores.softmax(-1) * allowed.any(-1, keepdim=True)).to(v.dtype)
        if self.has("dropout", layer):
            random = torch.Generator().manual_seed(7)
            kept = torch.rand(probs.shape, generator=random) > 0.1
            probs = probs * kept / 0.9
        return (probs @ v).transpose(1, 2)

    def mlp(self, x, layer):
        """The block after attention."""
        w = self._weights[layer]
        x = self.tap(
            "mlp_norm", self.norm(x, w["mlp_norm"], layer, "mlp"), dims="b s w", layer=layer
        )
        if self.options.experts and layer % 3 == 1:
            out = self.mixture(x, layer)
        else:
            gate, up = self.product(x, w["gate"]), self.product(x, w["up"])
            gate = self.tap("gate", gate, dims="b s f[tp]", layer=layer)
            up = self.tap("up", up, dims="b s f[tp]", layer=layer)
            act = self.tap("mlp_act", silu(gate) * up, dims="b s f[tp]", layer=layer)
            if self.has("mlp_dropout", layer):
                random = torch.Generator().manual_seed(9 + self.rank)
                act = act * (torch.rand(act.shape, generator=random) > 0.1) / 0.9
            out = self.product(act, w["down"])
        if not self.has("mlp_no_reduce", layer):
            out = self.reduced(out)
        return self.tap("mlp_out", out, dims="b s w", layer=layer)

    def mixture(self, x, layer):
        """Two of eight experts for each token."""
        w = self._weights[layer]
        scores = self.tap("router", self.product(x, w["router"]), dims="b s e", layer=layer)
        probs = scores.float().softmax(-1)
        chosen = self.tap("topk", probs.topk(2, -1).indices, dims="b s k", layer=layer)
        weights = probs.gather(-1, chosen)
        if not self.has("renorm", layer):
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        capacity = 9 if self.has("capacity", layer) else 10**6
        for expert in range(self.experts):
            took = (chosen == expert).any(-1)
            share = (weights * (chosen == expert)).sum(-1)
            took &= took.flatten().cumsum(0).view_as(took) <= capacity
            act = silu(self.product(x, w["e_gate"][expert])) * self.product(x, w["e_up"][expert])
            out = out + self.product(act, w["e_down"][expert]) * (share * took)[..., None]
        return out

    def forward(self, tokens, positions, cache):
        """Tokens [b, s] to logits."""
        o = self.options
        x = self.tap("embed", self.embedding[tokens], dims="b s w")
        delta = None
        for layer in range(o.layers):
            if delta is not None:
                x = x + delta
            out = self.attention(x, layer, positions, cache)
            kept = out
            x = x + kept
            if o.in_place:
                out.mul_(3.0)
            delta = self.mlp(x, layer)
            whole = x + delta
            if o.stream == "delta":
                # Declared as the sum at the tap, although the block keeps both.
                whole = self.tap("hidden", whole, dims="b s w", layer=layer)
                x, delta = whole - delta, delta
                x, delta = whole, None
            else:
                x, delta = self.tap("hidden", whole, dims="b s w", layer=layer), None
        x = self.norm(x, self.final, -1, "final")
        return self.tap("logits", self.product(x, self.head), dims="b s v")

    def run(self):
        """A prompt of two sequences, then the steps of decoding."""
        o = self.options
        declare_mesh(tp=(self.rank, o.tp))
        random = torch.Generator().manual_seed(2000 + o.seed)
        total = o.tokens + o.decode
        tokens = torch.randint(97, (2, total), generator=random)
        positions = torch.arange(total).expand(2, total).clone()
        if o.padding:
            positions[1] -= o.padding
        cache = {} if o.decode else None
        with torch.no_grad():
            self.forward(tokens[:, : o.tokens], positions[:, : o.tokens], cache)
            step()
            for i in range(o.tokens, total):
                if o.cached:
                    self.forward(tokens[:, i : i + 1], positions[:, i : i + 1], cache)
                step()
