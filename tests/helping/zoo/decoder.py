"""A small decoder-only model with taps: grouped queries, RoPE, windows, experts, a KV cache."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from recorder import declare_mesh, step, tap

from . import decoder_weights
from .decoder_options import CHOSEN, EPSILON, EXPERTS, HEADS, KEY_HEADS, VOCAB, WINDOW
from .decoder_options import Fault as Fault
from .decoder_options import Options as Options

SPARSE = ("attn_out", "mlp_out", "hidden", "logits")


class Decoder:
    """One rank's part of the model."""

    def __init__(self, options: Options, rank: int, group: dist.ProcessGroup | None = None):
        declare_mesh(tp=(rank, options.tp))
        self.options, self.rank, self.group = options, rank, group
        self.ends, self.layers = decoder_weights.load(options, rank)
        self.step = 0
        self.cache: list[tuple[Tensor, Tensor]] = []
        self.padding = torch.zeros(options.batch, dtype=torch.long)
        if options.left_padding:
            self.padding[1::2] = options.tokens // 4
        self.before: dict[str, Tensor] = {}
        self.stream = "b s[tp] w" if options.sequence_parallel and options.tp > 1 else "b s w"

    @torch.no_grad()
    def run(self) -> None:
        """Compute all batches, each as a prompt and then token by token."""
        options = self.options
        random = torch.Generator().manual_seed(1000 + options.token_seed)
        for _ in range(options.steps):
            total = options.tokens + options.decode
            tokens = torch.randint(1, VOCAB, (options.batch, total), generator=random)
            tokens[:, 0] = 0
            heads, dtype = KEY_HEADS // options.tp, options.torch_dtype
            self.cache = [
                tuple(
                    torch.zeros(options.batch, total + 1, heads, options.head_dim, dtype=dtype)
                    for _ in "kv"
                )
                for _ in self.layers
            ]
            self.advance(tokens[:, : options.tokens], 0)
            for start in range(options.tokens, total):
                self.advance(tokens[:, start : start + 1], start)

    def advance(self, tokens: Tensor, start: int) -> None:
        """Compute one step."""
        self.forward(tokens, start)
        step()
        self.step += 1

    def forward(self, tokens: Tensor, start: int) -> Tensor:
        """Tokens `[b, s]`, the first of them at `start`, to logits."""
        x = self.tap("embed", self.scattered(self.ends["embedding"][tokens]), self.stream)
        delta = None
        for i, layer in enumerate(self.layers):
            x, normed = self.add_and_norm(x, delta, layer["attn_norm"], "attn_norm", i)
            delta = self.attend(self.gathered(normed), layer, i, start)
            x, normed = self.add_and_norm(x, delta, layer["mlp_norm"], "mlp_norm", i)
            delta = self.mlp(self.gathered(normed), layer, i)
            if self.options.residual == "pair":
                tap("hidden", x + delta, dims=self.stream, layer=i)  # which nobody keeps
            else:
                x, delta = self.tap("hidden", self.added(x, delta), self.stream, i), None
        _, normed = self.add_and_norm(x, delta, self.ends["norm"], "norm", None)
        return self.tap("logits", self.gathered(normed) @ self.ends["unembedding"], "b s v[tp]")

    def attend(self, x: Tensor, layer: decoder_weights.Weights, i: int, start: int) -> Tensor:
        """Attention over the cache and `x`."""
        query, key, value = (
            self.tap(f"attn_{name}", self.by_head(x @ layer[name]), f"b s {heads}[tp] d", i)
            for name, heads in (("q", "h"), ("k", "kv"), ("v", "kv"))
        )
        at = start + torch.arange(x.shape[1])
        query = self.tap("q_rope", self.rotated(query, at, i, "q"), "b s h[tp] d", i)
        key = self.tap("k_rope", self.rotated(key, at, i, "k"), "b s kv[tp] d", i)
        key, value = self.cached(key, value, i, start)
        context = self.context(query, key, value, self.visible(at, i), i)
        context = self.tap("attn_context", context, "b s h[tp] d", i)
        out = context.flatten(start_dim=2) @ layer["o"]
        if self.fault("bias_each_rank", i):
            out = out + layer["bias"]
            layer = layer | {"bias": torch.zeros_like(layer["bias"])}
        out = self.scattered(self.reduced(out, "attn_out", i)) + layer["bias"]
        return self.tap("attn_out", out, self.stream, i)

    def mlp(self, x: Tensor, layer: decoder_weights.Weights, i: int) -> Tensor:
        """SwiGLU, or a mixture of such experts."""
        has_experts = self.options.has_experts(i)
        share = used = None
        spread = self.options.expert_parallel
        dims = ("b s e[tp] f" if spread else "b s e f[tp]") if has_experts else "b s f[tp]"
        if has_experts:
            share, used = self.route(x, layer, i)
        gate, up = (
            self.tap(name, self.into_experts(x, layer[name], used), dims, i)
            for name in ("gate", "up")
        )
        if self.fault("act_swapped", i):
            gate, up = up, gate
        if self.options.fused:
            inner = (F.silu(gate.float()) * up.float()).to(gate.dtype)
        else:
            inner = F.silu(gate) * up
        inner = self.tap("mlp_act", inner, dims, i)
        down = layer["down"]
        if self.fault("low_matmul", i):
            low = torch.bfloat16 if inner.dtype == torch.float32 else torch.float8_e4m3fn
            inner, down = inner.to(low).to(inner.dtype), down.to(low).to(down.dtype)
        if share is None:
            out = inner @ down
        elif self.options.fused:
            out = torch.einsum("bsef,efw,bse->bsw", inner.float(), down.float(), share)
            out = out.to(inner.dtype)
        else:
            out = torch.zeros_like(x)
            for e, weight in enumerate(down):
                out += inner[:, :, e] @ weight * share[:, :, e, None].to(x.dtype)
        return self.tap("mlp_out", self.scattered(self.reduced(out, "mlp_out", i)), self.stream, i)

    def route(self, x: Tensor, layer: decoder_weights.Weights, i: int) -> tuple[Tensor, Tensor]:
        """Return each expert's share of each token, and which tokens it gets, of this rank."""
        logits = self.tap("router_logits", x.float() @ layer["router"].float(), "b s e", i)
        chosen = self.tap("topk", logits.topk(CHOSEN).indices, "b s k", i)
        weights = logits.softmax(dim=-1).gather(-1, chosen)
        if not self.fault("not_renormalised", i):
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if fault := self.fault("expert_map", i):
            first, second = fault.at
            chosen = torch.where(
                chosen == first, second, torch.where(chosen == second, first, chosen)
            )
        share = torch.zeros_like(logits).scatter(-1, chosen, weights)
        used = torch.zeros_like(logits).scatter(-1, chosen, 1.0)
        if fault := self.fault("capacity", i):
            capacity = math.ceil(used.sum().item() / EXPERTS)
            kept = used * (used.flatten(0, 1).cumsum(dim=0).view_as(used) <= capacity)
            share, used = (share, kept) if fault.what == "dispatch" else (share * kept, used)
        if self.options.expert_parallel:
            share, used = (t.chunk(self.options.tp, dim=-1)[self.rank] for t in (share, used))
        return share, used

    def into_experts(self, x: Tensor, weight: Tensor, used: Tensor | None) -> Tensor:
        """Multiply into the MLP; an expert has zeros where a token is not its own."""
        if used is None:
            return x @ weight
        return torch.einsum("bsw,ewf->bsef", x, weight) * used.to(x.dtype)[..., None]

    def context(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, i: int) -> Tensor:
        """Return what each head attends to, `[b, s, h, d]`."""
        scale = 1 / math.sqrt(self.options.head_dim)
        if fault := self.fault("softmax_scale", i):
            scale *= fault.at[0]
        groups = HEADS // KEY_HEADS
        if self.fault("tiled_heads", i):
            key, value = key.repeat(1, 1, groups, 1), value.repeat(1, 1, groups, 1)
        else:
            key, value = (t.repeat_interleave(groups, dim=2) for t in (key, value))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        mask, kind = mask[:, None], self.options.attention
        if kind == "sdpa":
            out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        elif kind == "split":
            out = attention_by_blocks(query, key, value, mask, scale)
        else:
            scores = (query @ key.mT * scale).masked_fill(~mask, -math.inf)
            weights = scores.float().softmax(dim=-1)
            if self.fault("low_probs", i):
                low = torch.bfloat16 if query.dtype == torch.float32 else torch.float8_e4m3fn
                weights = weights.to(low).float()
            if self.fault("dropout_probs", i):
                weights = self.dropped(weights, True)
            out = weights.to(value.dtype) @ value
        return out.transpose(1, 2)

    def visible(self, at: Tensor, i: int) -> Tensor:
        """Return which keys each query at `at` sees, `[b, s, keys]`."""
        peek = 1 if self.fault("peek", i) else 0
        keys = torch.arange(int(at[-1]) + 1)
        queries = at[:, None]
        mask = keys <= queries + peek
        if self.options.has_window(i):
            fault = self.fault("window", i)
            mask &= keys > queries - WINDOW - (fault.at[0] if fault else 0)
        padding = 0 * self.padding if self.fault("padding_seen", i) else self.padding
        return (mask & (keys >= padding[:, None, None])) | (keys == queries)

    def cached(self, key: Tensor, value: Tensor, i: int, start: int) -> tuple[Tensor, Tensor]:
        """Put keys and values into the cache and return all up to here."""
        end = start + key.shape[1]
        fault = self.fault("cache_slot", i)
        shift = int(fault.at[0]) if fault and start else 0
        for cache, new in zip(self.cache[i], (key, value), strict=True):
            cache[:, start + shift : end + shift] = new
        if (fault := self.fault("cache_stale", i)) and start:
            self.cache[i][0][:, start] = self.cache[i][0][:, start - 1]
        keys, values = self.cache[i]
        return keys[:, :end], values[:, :end]

    def rotated(self, x: Tensor, at: Tensor, i: int, which: str) -> Tensor:
        """Rotate queries or keys by their positions."""
        positions = at - self.padding[:, None]
        fault = self.fault("rope_shift", i)
        if fault and which in fault.what:
            offset, since = fault.at
            positions = positions + offset * (at >= since)
        if (fault := self.fault("rope_stale", i)) and which in fault.what:
            positions = positions.clamp(max=self.options.tokens - 1)
        base = 10000.0
        if (fault := self.fault("rope_base", i)) and which in fault.what:
            base = fault.at[0]
        half = x.shape[-1] // 2
        angles = positions.clamp(min=0)[..., None] / base ** (torch.arange(half) / half)
        cosine, sine = angles.cos()[:, :, None], angles.sin()[:, :, None]
        precise = x.float() if self.options.fused else x
        first, second = precise.chunk(2, dim=-1)
        cosine, sine = cosine.to(precise.dtype), sine.to(precise.dtype)
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return torch.cat(turned, dim=-1).to(x.dtype)

    def add_and_norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, name: str, i: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return the residual with the delta in it, and its norm."""
        total = x if delta is None else self.added(x, delta)
        exact = total.float()
        if delta is not None and self.options.residual == "pair":
            exact = x.float() + delta.float()
        fault = self.fault("epsilon", i, name)
        epsilon = EPSILON * (fault.at[0] if fault else 1)
        normed = exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + epsilon)
        fused = self.options.fused
        normed = (normed * weight).to(x.dtype) if fused else normed.to(x.dtype) * weight
        return total, normed if i is None else self.tap(name, normed, self.stream, i)

    def added(self, x: Tensor, delta: Tensor) -> Tensor:
        """Add to the residual stream."""
        return delta.add_(x) if self.options.in_place else x + delta

    def by_head(self, x: Tensor) -> Tensor:
        """Split the last dim into heads."""
        return x.unflatten(-1, (-1, self.options.head_dim))

    def reduced(self, x: Tensor, name: str, i: int) -> Tensor:
        """Sum over the ranks."""
        if self.options.tp == 1 or self.fault("missing_reduce", i, name):
            return x
        total = x.float()
        dist.all_reduce(total, group=self.group)
        return total.to(x.dtype)

    def scattered(self, x: Tensor) -> Tensor:
        """Keep this rank's tokens, where the stream is cut."""
        return x.chunk(self.options.tp, dim=1)[self.rank].clone() if "[" in self.stream else x

    def gathered(self, x: Tensor) -> Tensor:
        """Put the tokens of all ranks together, where the stream is cut."""
        if "[" not in self.stream:
            return x
        parts = [torch.empty_like(x, dtype=torch.float32) for _ in range(self.options.tp)]
        dist.all_gather(parts, x.float().contiguous(), group=self.group)
        return torch.cat(parts, dim=1).to(x.dtype)

    def fault(self, kind: str, layer: int | None, what: str | None = None) -> Fault | None:
        """Return the fault of a kind that is planted here."""
        for fault in self.options.faults:
            if (fault.kind, fault.layer) == (kind, layer) and what in (None, fault.what):
                return fault
        return None

    def tap(self, name: str, x: Tensor, dims: str, layer: int | None = None) -> Tensor:
        """Tap a tensor, spoiled by the faults that are planted at it."""
        for fault in self.options.faults:
            if (fault.what, fault.layer) == (name, layer):
                x = self.spoiled(x, fault, "[tp]" in dims)
        if self.options.taps == "dense" or name in SPARSE:
            x = tap(name, x, dims=dims, **({} if layer is None else {"layer": layer}))
        if any(fault.kind.startswith("stale") for fault in self.options.faults):
            self.before[name] = x
        return x

    def spoiled(self, x: Tensor, fault: Fault, is_cut: bool) -> Tensor:
        """Return a tensor as a fault of values makes it."""
        kind, at = fault.kind, fault.at
        if kind == "rounded":
            return x.to(getattr(torch, at[0])).to(x.dtype)
        if kind == "scaled":
            return x * at[0]
        if kind == "shifted":
            return x + at[0]
        if kind == "scaled_on_rank":
            return x * at[0] if self.rank == self.options.tp - 1 else x
        if kind == "dropout":
            return self.dropped(x, is_cut)
        if kind == "zero_last":
            return torch.cat([x[:, : -at[0]], torch.zeros_like(x[:, -at[0] :])], dim=1)
        if kind == "token":
            x = x.clone()
            x[at[0], at[1]] = x[at[0], at[1] - 1]
            return x
        if kind == "stale_layer" or (kind == "stale_step" and self.step):
            return self.before[fault.what].clone()
        if kind == "swap_chosen":
            first, second = at
            return torch.where(x == first, second, torch.where(x == second, first, x))
        return x

    def dropped(self, x: Tensor, is_cut: bool) -> Tensor:
        """Apply dropout, on each rank alike where each has the whole."""
        seed = 7 + self.step * 10 + (self.rank if is_cut else 0)
        random = torch.Generator().manual_seed(seed + self.options.token_seed * 100)
        kept = torch.rand(x.shape, generator=random) >= 0.1
        return x * kept.to(x.dtype) / 0.9


def attention_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, block: int = 5
) -> Tensor:
    """Attention that takes keys block by block and merges what each block gives."""
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    tops, sums, outs = [], [], []
    for begin in range(0, key.shape[2], block):
        part = slice(begin, begin + block)
        scores = (query @ key[:, :, part].mT * scale).masked_fill(~mask[..., part], -1e30)
        top = scores.amax(dim=-1, keepdim=True)
        weights = (scores - top).exp()
        tops.append(top)
        sums.append(weights.sum(dim=-1, keepdim=True))
        outs.append(weights @ value[:, :, part])
    top = torch.stack(tops)
    factors = (top - top.amax(dim=0)).exp()
    total = (torch.stack(outs) * factors).sum(dim=0) / (torch.stack(sums) * factors).sum(dim=0)
    return total.to(dtype)
