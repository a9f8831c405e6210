"""A stand-in for Megatron-Core's GPTModel with its TransformerEngine spec: names, calls, outputs.

The norms are inside the linear layers behind them, and what is called a norm hands on its input.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, VOCAB = 16, 24, 4, 2, 8, 40


class IdentityOp(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


IdentityOp.__module__ = "megatron.core.transformer.identity_op"


class TELinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.T, None


class TELayerNormColumnParallelLinear(TELinear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(rms_norm(x, x.shape[-1:]))


class TEDotProductAttention(nn.Module):
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # from s b heads d
        k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = (HEADS + 2 * GROUPS) * HEAD_DIM
        self.linear_qkv = TELayerNormColumnParallelLinear(HIDDEN, width)
        self.q_layernorm, self.k_layernorm = IdentityOp(), IdentityOp()
        self.core_attention = TEDotProductAttention()
        self.linear_proj = TELinear(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Any:
        mixed, _ = self.linear_qkv(hidden_states)
        groups = mixed.unflatten(-1, (GROUPS, -1))
        own = HEADS // GROUPS * HEAD_DIM
        query, key, value = groups.split([own, HEAD_DIM, HEAD_DIM], -1)
        query = self.q_layernorm(query.reshape(*query.shape[:2], HEADS, HEAD_DIM))
        return self.linear_proj(
            self.core_attention(query, self.k_layernorm(key), value, attention_mask)
        )


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1 = TELayerNormColumnParallelLinear(HIDDEN, 2 * FFN)
        self.linear_fc2 = TELinear(FFN, HIDDEN)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        gate, up = self.linear_fc1(hidden_states)[0].chunk(2, -1)
        return self.linear_fc2(silu(gate) * up)


class TransformerLayer(nn.Module):
    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number  # in all stages, from 1
        self.input_layernorm, self.self_attention = IdentityOp(), SelfAttention()
        self.pre_mlp_layernorm, self.mlp = IdentityOp(), MLP()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attention(normed, attention_mask)[0]
        hidden_states = hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))[0]
        return hidden_states, None


class LanguageModelEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, HIDDEN)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids).transpose(0, 1).contiguous()


class TransformerBlock(nn.Module):
    def __init__(self, first: int, layers: int, is_last: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(first + i + 1) for i in range(layers))
        if is_last:
            self.final_layernorm = nn.RMSNorm(HIDDEN)
        self.is_last = is_last

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, attention_mask=attention_mask)
        return self.final_layernorm(hidden_states) if self.is_last else hidden_states


class GPTModel(nn.Module):
    """One stage of a pipeline; of the only one, the whole model."""

    def __init__(self, stage: int = 0, stages: int = 1, layers: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            num_layers=stages * layers, num_attention_heads=HEADS, num_query_groups=GROUPS,
            kv_channels=HEAD_DIM, sequence_parallel=False,
        )  # fmt: skip
        is_last = stage == stages - 1
        if stage == 0:
            self.embedding = LanguageModelEmbedding()
        self.decoder = TransformerBlock(stage * layers, layers, is_last)
        if is_last:
            self.output_layer = TELinear(HIDDEN, VOCAB)

    def forward(self, tokens: Tensor, received: Tensor | None = None) -> Tensor:
        if received is None:
            received = self.embedding(input_ids=tokens, position_ids=None)
        hidden_states = self.decoder(hidden_states=received, attention_mask=None)
        if not self.decoder.is_last:
            return hidden_states
        return self.output_layer(hidden_states)[0].transpose(0, 1)


GPTModel.__module__ = "megatron.core.models.gpt.gpt_model"
