"""A small causal transformer cut over tensor-parallel ranks, tapped after every part.

The weights are drawn whole from one seed and then cut, so that any number of ranks holds the same
logical model: query, key, value and MLP input by output column, the two matrices after them by row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from recorder import declare_mesh, step, tap

LAYERS, HEADS, HEAD_DIM, VOCAB = 4, 8, 16, 256
WIDTH = HEADS * HEAD_DIM
MLP_WIDTH = 4 * WIDTH
BATCH, LENGTH, STEPS = 2, 16, 2
SEED = 20


@dataclass(frozen=True)
class Layer:
    """One rank's part of a layer's weights, each `[in, out]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor


class Model:
    """One rank's part of the model; `unscaled_layer` plants the demo's fault in that layer."""

    def __init__(self, rank: int, world_size: int, unscaled_layer: int | None = None) -> None:
        if HEADS % world_size:
            raise ValueError(f"{HEADS} heads cannot be cut over {world_size} ranks; use 1, 2, 4, 8")
        self.unscaled_layer = unscaled_layer
        generator = torch.Generator().manual_seed(SEED)

        def draw(rows: int, columns: int, cut: int | None = None) -> Tensor:
            whole = torch.randn(rows, columns, generator=generator) / math.sqrt(rows)
            return whole if cut is None else whole.chunk(world_size, dim=cut)[rank].contiguous()

        self.embedding = draw(VOCAB, WIDTH) * math.sqrt(VOCAB)
        self.positions = draw(LENGTH, WIDTH) * math.sqrt(LENGTH)
        self.layers = [
            Layer(
                query=draw(WIDTH, WIDTH, cut=1),
                key=draw(WIDTH, WIDTH, cut=1),
                value=draw(WIDTH, WIDTH, cut=1),
                attn_out=draw(WIDTH, WIDTH, cut=0),
                mlp_in=draw(WIDTH, MLP_WIDTH, cut=1),
                mlp_out=draw(MLP_WIDTH, WIDTH, cut=0),
            )
            for _ in range(LAYERS)
        ]
        self.unembedding = draw(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[batch, length]` to logits `[batch, length, vocabulary]`."""
        x = tap("embed", self.embedding[tokens] + self.positions, dims="b s w")
        for i, layer in enumerate(self.layers):
            x = x + self._attention(normed(x), layer, i)
            x = x + self._mlp(normed(x), layer, i)
            x = tap("hidden", x, dims="b s w", layer=i)
        return tap("logits", normed(x) @ self.unembedding, dims="b s v")

    def _attention(self, x: Tensor, layer: Layer, i: int) -> Tensor:
        query, key, value = (
            (x @ weight).unflatten(-1, (-1, HEAD_DIM))
            for weight in (layer.query, layer.key, layer.value)
        )
        if i != self.unscaled_layer:
            query = query / math.sqrt(HEAD_DIM)
        query = tap("attn_q", query, dims="b s h[tp] d", layer=i)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(diagonal=1)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
        heads = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(start_dim=2)
        return tap("attn_out", all_reduce(heads @ layer.attn_out), dims="b s w", layer=i)

    def _mlp(self, x: Tensor, layer: Layer, i: int) -> Tensor:
        columns = tap("mlp_hidden", F.gelu(x @ layer.mlp_in), dims="b s f[tp]", layer=i)
        return tap("mlp_out", all_reduce(columns @ layer.mlp_out), dims="b s w", layer=i)


def normed(x: Tensor) -> Tensor:
    """Layer norm over the last dimension, without weights."""
    return F.layer_norm(x, x.shape[-1:])


def all_reduce(x: Tensor) -> Tensor:
    """Sum `x` over the ranks in place; a lone process without a group already has the sum."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def batch(index: int) -> Tensor:
    """The fixed tokens `[batch, length]` of one step."""
    generator = torch.Generator().manual_seed(SEED + 1 + index)
    return torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)


def run_job(title: str, unscaled_layer: int | None = None) -> None:
    """Forward `STEPS` batches on the ranks torchrun started; rank 0 prints the predicted tokens."""
    dist.init_process_group("gloo")
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        declare_mesh(tp=(rank, world_size))
        model = Model(rank, world_size, unscaled_layer)
        with torch.no_grad():
            for index in range(STEPS):
                logits = model.forward(batch(index))
                if rank == 0:
                    tokens = logits[:, -1].argmax(dim=-1).tolist()
                    print(f"{title}, {world_size} ranks, step {index}: next tokens {tokens}")
                step()
    finally:
        dist.destroy_process_group()
