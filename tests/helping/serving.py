"""Stand-ins for the models of vLLM and sglang: their names, calls and habits, and the values of
transformers' Llama, Qwen3 and Qwen3-MoE, from whose weights they are made.

What they share with the real ones: all tokens stand in one row; a layer returns two summands, and a
norm adds them in place; the first layer's norm gives one tensor; queries, keys and values are one
linear layer, into whose output rope writes; all layers share one rope; the head is never called.
One rank of several is made alone: `RowParallelLinear` knows what its peers would add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu


class Group(NamedTuple):
    """A place among tensor-parallel ranks."""

    rank: int = 0
    size: int = 1

    def part(self, weight: Tensor, heads: int, dim: int = 0) -> Tensor:
        """Return this rank's part of a weight, of whole heads; if they are few, a shared one."""
        if heads >= self.size:
            return weight.chunk(self.size, dim)[self.rank]
        return weight.chunk(heads, dim)[self.rank * heads // self.size]


@dataclass
class Batch:
    """Which requests the tokens of a forward are of."""

    lengths: list[int]

    @property
    def positions(self) -> Tensor:
        return torch.cat([torch.arange(n) for n in self.lengths])


CURRENT: list[Batch] = [Batch([])]
"""What a forward's tokens are, as vLLM's forward context knows."""


class ColumnParallelLinear(nn.Module):
    def __init__(self, weights: list[Tensor], bias: list[Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat(weights))
        self.bias = nn.Parameter(torch.cat(bias)) if bias else None

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        return linear(input_, self.weight, self.bias), None


class QKVParallelLinear(ColumnParallelLinear):
    pass


class MergedColumnParallelLinear(ColumnParallelLinear):
    pass


class ReplicatedLinear(ColumnParallelLinear):
    pass


class RowParallelLinear(nn.Module):
    def __init__(self, weight: Tensor, group: Group, reduce_results: bool = True) -> None:
        super().__init__()
        self.whole, self.group, self.reduce_results = weight, group, reduce_results
        self.weight = nn.Parameter(weight.chunk(group.size, 1)[group.rank])
        self.peers: Tensor | float = 0.0

    def listen(self, whole_input: Tensor) -> None:
        """Take what the other ranks add from the input of a single rank's model."""
        parts = zip(
            whole_input.chunk(self.group.size, -1), self.whole.chunk(self.group.size, 1),
            strict=True,
        )  # fmt: skip
        products = [linear(x, w) for x, w in parts]
        self.peers = sum(one for rank, one in enumerate(products) if rank != self.group.rank)

    def all_reduce(self, x: Tensor) -> Tensor:
        return x + self.peers

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        out = linear(input_, self.weight)
        return self.all_reduce(out) if self.reduce_results else out, None


class RMSNorm(nn.Module):
    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.variance_epsilon = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return self._norm(x)
        residual.add_(x)
        x.copy_(self._norm(residual))
        return x, residual

    def _norm(self, x: Tensor) -> Tensor:
        mean = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(mean + self.variance_epsilon)).to(x.dtype)


class RotaryEmbedding(nn.Module):
    def __init__(self, head_size: int, base: float) -> None:
        super().__init__()
        self.head_size = head_size
        self.inv_freq = 1.0 / base ** (torch.arange(0, head_size, 2).float() / head_size)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        angles = (positions.float()[:, None] * self.inv_freq)[:, None]
        for x in (query, key):
            a, b = x.unflatten(-1, (-1, self.head_size)).chunk(2, -1)
            turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
            x.copy_(torch.cat(turned, -1).flatten(1).to(x.dtype))
        return query, key


class Attention(nn.Module):
    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.head_size, self.scale = head_size, head_size**-0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._attend(query, key, value, CURRENT[0].lengths)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        out = []
        rows = [x.unflatten(-1, (-1, self.head_size)).split(lengths) for x in (query, key, value)]
        for q, k, v in zip(*rows, strict=True):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            one = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            out.append(one.transpose(0, 1).flatten(1))
        return torch.cat(out)


class RadixAttention(Attention):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, forward_batch: Batch, save_kv_cache: bool = True
    ) -> Tensor:
        return self._attend(q, k, v, forward_batch.lengths)


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return silu(gate) * up


class VocabParallelEmbedding(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, input_: Tensor) -> Tensor:
        return embedding(input_, self.weight)  # reduced over all ranks


class ParallelLMHead(VocabParallelEmbedding):
    def forward(self, input_: Tensor) -> Tensor:
        raise RuntimeError("LMHead's weights should be used in the sampler.")


class TopKOutput(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor
    router_logits: Tensor


class Experts(nn.Module):
    """All experts of a layer; a rank has a share of each, so its output is a summand."""

    def __init__(self, gate_up: Tensor, down: Tensor, group: Group, config: Any) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)
        self.group, self.config = group, config

    def chosen(self, router_logits: Tensor) -> TopKOutput:
        weights, ids = router_logits.float().softmax(-1).topk(self.config.num_experts_per_tok, -1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return TopKOutput(weights.to(router_logits.dtype), ids, router_logits)

    def work(self, x: Tensor, chosen: TopKOutput) -> Tensor:
        out = torch.zeros_like(x)
        for weights, ids in zip(chosen.topk_weights.T, chosen.topk_ids.T, strict=True):
            gate, up = torch.einsum("th,tfh->tf", x, self.gate_up[ids]).chunk(2, -1)
            out += weights[:, None] * torch.einsum("tf,thf->th", silu(gate) * up, self.down[ids])
        return out / self.group.size


class FusedMoE(Experts):
    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        return self.work(hidden_states, self.chosen(router_logits))


class TopK(nn.Module):
    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self._choose = experts.chosen

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> TopKOutput:
        return self._choose(router_logits)


class EPMoE(Experts):
    def forward(self, hidden_states: Tensor, topk_output: TopKOutput) -> Tensor:
        return self.work(hidden_states, topk_output)


class SparseMoeBlock(nn.Module):
    def __init__(self, of: Maker, name: str) -> None:
        super().__init__()
        kind = EPMoE if of.is_sglang else FusedMoE
        experts = (of[f"{name}.experts.gate_up_proj"], of[f"{name}.experts.down_proj"])
        self.gate = ReplicatedLinear([of[f"{name}.gate.weight"]], [])
        self.experts = kind(*experts, of.group, of.config)
        if of.is_sglang:
            self.topk = TopK(self.experts)
        self.tp_size = of.group.size

    def forward(self, hidden_states: Tensor, forward_batch: Batch | None = None) -> Tensor:
        router_logits, _ = self.gate(hidden_states)
        if hasattr(self, "topk"):
            out = self.experts(hidden_states, self.topk(hidden_states, router_logits))
        else:
            out = self.experts(hidden_states=hidden_states, router_logits=router_logits)
        return out * self.tp_size  # the sum over all ranks


class MLP(nn.Module):
    def __init__(self, of: Maker, name: str) -> None:
        super().__init__()
        halves = [of.part(f"{name}.{one}.weight") for one in ("gate_proj", "up_proj")]
        self.gate_up_proj = MergedColumnParallelLinear(halves, [])
        self.down_proj = RowParallelLinear(of[f"{name}.down_proj.weight"], of.group)
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor, forward_batch: Batch | None = None) -> Tensor:
        gate_up, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act_fn(gate_up))
        return x


class SelfAttention(nn.Module):
    def __init__(self, of: Maker, name: str) -> None:
        super().__init__()
        self.head_dim, self.is_sglang = of.head_dim, of.is_sglang
        qkv = [of.part(f"{name}.{x}_proj.weight", x) for x in "qkv"]
        bias = [of.part(f"{name}.{x}_proj.bias", x) for x in "qkv" if f"{name}.q_proj.bias" in of]
        self.sizes = [len(one) for one in qkv]
        self.qkv_proj = QKVParallelLinear(qkv, bias)
        self.o_proj = RowParallelLinear(of[f"{name}.o_proj.weight"], of.group, not of.is_late)
        self.rotary_emb = of.rope
        self.attn = RadixAttention(of.head_dim) if of.is_sglang else Attention(of.head_dim)
        if f"{name}.q_norm.weight" in of:
            self.q_norm, self.k_norm = of.norm(f"{name}.q_norm"), of.norm(f"{name}.k_norm")

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: Batch | None = None
    ) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, -1)
        if hasattr(self, "q_norm"):
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        q, k = self.rotary_emb(positions, q, k)
        out, _ = self.o_proj(self.attn(q, k, v, *([forward_batch] if self.is_sglang else [])))
        return out

    def _normed(self, norm: RMSNorm, x: Tensor) -> Tensor:
        shape = (-1, self.head_dim) if self.is_sglang else (len(x), -1, self.head_dim)
        return norm(x.reshape(shape)).view(x.shape)


class DecoderLayer(nn.Module):
    def __init__(self, of: Maker, name: str) -> None:
        super().__init__()
        self.self_attn = SelfAttention(of, f"{name}.self_attn")
        kind = SparseMoeBlock if f"{name}.mlp.gate.weight" in of else MLP
        self.mlp = kind(of, f"{name}.mlp")
        self.input_layernorm = of.norm(f"{name}.input_layernorm")
        self.post_attention_layernorm = of.norm(f"{name}.post_attention_layernorm")
        self.is_late = of.is_late

    def forward(self, positions: Tensor, hidden_states: Tensor, *others: Any) -> Any:
        *batch, residual = others  # sglang hands on its batch too
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        more = {"forward_batch": batch[0]} if batch else {}
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states, **more)
        if self.is_late:
            hidden_states = self.self_attn.o_proj.all_reduce(hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states, *batch), residual


class Inner(nn.Module):
    def __init__(self, of: Maker) -> None:
        super().__init__()
        self.config = of.config
        self.embed_tokens = VocabParallelEmbedding(of["model.embed_tokens.weight"])
        self.layers = nn.ModuleList(
            DecoderLayer(of, f"model.layers.{i}") for i in range(of.config.num_hidden_layers)
        )
        self.norm = of.norm("model.norm")

    def forward(self, input_ids: Tensor, positions: Tensor, *batch: Batch) -> Tensor:
        hidden_states, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, *batch, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class CausalLM(nn.Module):
    def __init__(self, of: Maker) -> None:
        super().__init__()
        self.config = of.config
        self.model = Inner(of)
        self.lm_head = ParallelLMHead(of["lm_head.weight"])
        self.logits_processor = (SglangLogits if of.is_sglang else VllmLogits)(of.group)

    def serve(self, rows: list[Tensor]) -> Tensor | None:
        """Run one forward of several requests; return the logits of the last token of each."""
        batch = CURRENT[0] = Batch([len(row) for row in rows])
        with torch.inference_mode():
            return self._serve(torch.cat(rows), batch)


class VllmLogits(nn.Module):
    def __init__(self, group: Group) -> None:
        super().__init__()
        self.is_first = group.rank == 0

    def forward(self, lm_head: nn.Module, hidden_states: Tensor) -> Tensor | None:
        return linear(hidden_states, lm_head.weight) if self.is_first else None  # gathered there


class VllmCausalLM(CausalLM):
    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def _serve(self, tokens: Tensor, batch: Batch) -> Tensor | None:
        hidden_states = self(input_ids=tokens, positions=batch.positions)
        return self.compute_logits(hidden_states[torch.tensor(batch.lengths).cumsum(0) - 1])


@dataclass
class LogitsProcessorOutput:
    next_token_logits: Tensor | None
    hidden_states: Tensor | None = None


class SglangLogits(nn.Module):
    def __init__(self, group: Group) -> None:
        super().__init__()

    def forward(
        self, input_ids: Tensor, hidden_states: Tensor, lm_head: nn.Module, logits_metadata: Batch
    ) -> LogitsProcessorOutput:
        last = torch.tensor(logits_metadata.lengths).cumsum(0) - 1
        return LogitsProcessorOutput(linear(hidden_states[last], lm_head.weight))


class SglangCausalLM(CausalLM):
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: Batch
    ) -> LogitsProcessorOutput:
        hidden_states = self.model(input_ids, positions, forward_batch)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    def _serve(self, tokens: Tensor, batch: Batch) -> Tensor | None:
        return self(tokens, batch.positions, batch).next_token_logits


class Maker(dict[str, Tensor]):
    """Weights of transformers' model, as one rank of a server cuts them."""

    def __init__(self, model: Any, system: str, group: Group) -> None:
        super().__init__(model.state_dict())
        self.config, self.group, self.is_sglang = model.config, group, system == "sglang"
        self.head_dim = model.model.layers[0].self_attn.head_dim
        base = self.config.rope_parameters["rope_theta"]
        self.rope = RotaryEmbedding(self.head_dim, base)  # a server makes one for all layers
        self.is_late = self.is_sglang and self.config.model_type in ("qwen3", "qwen3_moe")
        """Whether the layer adds up what o_proj gives, and not o_proj itself."""

    def part(self, name: str, what: str = "") -> Tensor:
        few = self.config.num_key_value_heads if what in ("k", "v") else self.group.size
        return self.group.part(self[name], few)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self[f"{name}.weight"], self.config.rms_norm_eps)


FILES = {"vllm": "vllm.model_executor.models", "sglang": "sglang.srt.models"}


def served(model: Any, system: str, rows: list[Tensor], rank: int = 0, size: int = 1) -> CausalLM:
    """Make one rank of a server's model from transformers' one.

    Args:
        model: LlamaForCausalLM, Qwen3ForCausalLM or Qwen3MoeForCausalLM of transformers.
        system: vllm or sglang.
        rows: the requests that it is to be run with, for what the other ranks add.
        rank: which rank.
        size: how many there are.
    """
    kind = VllmCausalLM if system == "vllm" else SglangCausalLM
    file = f"{FILES[system]}.{model.config.model_type}"
    kind = type(type(model).__name__, (kind,), {"__module__": file})
    one = kind(Maker(model, system, Group(rank, size))).eval()
    if size > 1:
        whole = served(model, system, rows)
        for name, module in one.named_modules():
            if isinstance(module, RowParallelLinear):
                whole.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, module=module: module.listen(args[0])
                )
        whole.serve(rows)
    return one
