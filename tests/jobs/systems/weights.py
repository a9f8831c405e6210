"""One tiny Llama for all systems here: sizes, tokens, options, and its weights as each wants them.

Weights have the names and shapes that transformers gives them. They come from a file, or from a
seed; a file that is not there yet is written.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

LAYERS, HIDDEN, FFN, VOCAB = 2, 32, 64, 97
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
EPS, ROPE_BASE = 1e-5, 10000.0
PADDED_VOCAB = 112  # where a system pads its vocabulary
MAX_LENGTH = 64
TOKENS = (torch.arange(24).reshape(2, 12) * 37 + 5) % VOCAB

# What `--fault` can plant, always in the last layer. Each differs from the truth by enough to see.
FAULTY_LAYER = LAYERS - 1
WRONG_ROPE_BASE, WRONG_SCALE, WRONG_EPS = 500.0, 1.25, 0.1
FAULTS = {
    "rope": "rotary embedding with another base",
    "scale": "attention scores times 1.25",
    "act": "gelu in place of silu",
    "eps": "another epsilon in the second norm",
}


def options(description: str | None, *also: Sequence[str]) -> argparse.Namespace:
    """Read the options that all systems have, and further switches of this one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--weights", type=Path, help="safetensors file; written if it is missing")
    parser.add_argument("--logits", type=Path, help="safetensors file to write the logits to")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="steps of SGD first")
    parser.add_argument("--fault", choices=FAULTS, help=f"in layer {FAULTY_LAYER}")
    for words in also:
        *choices, text = words[1:]
        if choices:
            parser.add_argument(words[0], choices=choices, default=choices[0], help=text)
        else:
            parser.add_argument(words[0], action="store_true", help=text)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    return args


def _seeded() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(HIDDEN, generator=generator, dtype=torch.float64)

    weights = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN) * HIDDEN**0.5}
    for i in range(LAYERS):
        weights |= {
            f"model.layers.{i}.input_layernorm.weight": norm(),
            f"model.layers.{i}.self_attn.q_proj.weight": draw(HEADS * HEAD_DIM, HIDDEN) * 1.5,
            f"model.layers.{i}.self_attn.k_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN) * 1.5,
            f"model.layers.{i}.self_attn.v_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN),
            f"model.layers.{i}.self_attn.o_proj.weight": draw(HIDDEN, HEADS * HEAD_DIM),
            f"model.layers.{i}.post_attention_layernorm.weight": norm(),
            f"model.layers.{i}.mlp.gate_proj.weight": draw(FFN, HIDDEN),
            f"model.layers.{i}.mlp.up_proj.weight": draw(FFN, HIDDEN),
            f"model.layers.{i}.mlp.down_proj.weight": draw(HIDDEN, FFN),
        }
    return weights | {"model.norm.weight": norm(), "lm_head.weight": draw(VOCAB, HIDDEN)}


def load(path: Path | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights under transformers' names; write `path` from the seed if it is missing."""
    weights = load_file(path) if path and path.exists() else _seeded()
    if path and not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}")  # whole, whichever rank comes first
        save_file(weights, part)
        part.replace(path)
    return {name: weight.to(dtype) for name, weight in weights.items()}


def _padded(weight: Tensor) -> Tensor:
    """Add rows of zeros up to the padded vocabulary."""
    return pad(weight, (0, 0, 0, PADDED_VOCAB - VOCAB))


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fuse q, k, v by groups: the queries of a kv head, then its key, then its value."""
    parts = [part.unflatten(0, (KV_HEADS, -1)) for part in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _interleaved(weight: Tensor) -> Tensor:
    """Reorder rows within each head from rope's two halves to its pairs."""
    return weight.unflatten(0, (-1, 2, HEAD_DIM // 2)).transpose(1, 2).flatten(0, 2)


def for_megatron(hf: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """Return a rank's part for Megatron-Core's GPTModel with the local spec, tensor-parallel."""

    def rows(weight: Tensor) -> Tensor:
        return weight.chunk(ranks, dim=0)[rank].contiguous()

    def columns(weight: Tensor) -> Tensor:
        return weight.chunk(ranks, dim=1)[rank].contiguous()

    weights = {
        "embedding.word_embeddings.weight": rows(_padded(hf["model.embed_tokens.weight"])),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": rows(_padded(hf["lm_head.weight"])),
    }
    for i in range(LAYERS):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = _grouped(*(hf[f"{attention}.{part}_proj.weight"] for part in "qkv"))
        gate, up = hf[f"{mlp}.gate_proj.weight"], hf[f"{mlp}.up_proj.weight"]
        norms = [
            hf[f"model.layers.{i}.{at}_layernorm.weight"] for at in ("input", "post_attention")
        ]
        layer = f"decoder.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": norms[0],
            f"{layer}.self_attention.linear_qkv.weight": rows(qkv),
            f"{layer}.self_attention.linear_proj.weight": columns(hf[f"{attention}.o_proj.weight"]),
            f"{layer}.pre_mlp_layernorm.weight": norms[1],
            f"{layer}.mlp.linear_fc1.weight": torch.cat([rows(gate), rows(up)]),
            f"{layer}.mlp.linear_fc2.weight": columns(hf[f"{mlp}.down_proj.weight"]),
        }
    return weights


def for_titan(hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what torchtitan's Llama3Model loads; its fused projection takes q, k, v and fuses."""
    weights = {
        "tok_embeddings.weight": hf["model.embed_tokens.weight"],
        "norm.weight": hf["model.norm.weight"],
        "lm_head.weight": hf["lm_head.weight"],
    }
    for i in range(LAYERS):
        old, new = f"model.layers.{i}", f"layers.{i}"
        q, k, v, o = (hf[f"{old}.self_attn.{part}_proj.weight"] for part in "qkvo")
        weights |= {
            f"{new}.attention_norm.weight": hf[f"{old}.input_layernorm.weight"],
            f"{new}.attention.qkv_linear.wq.weight": _interleaved(q),
            f"{new}.attention.qkv_linear.wk.weight": _interleaved(k),
            f"{new}.attention.qkv_linear.wv.weight": v,
            f"{new}.attention.wo.weight": o,
            f"{new}.ffn_norm.weight": hf[f"{old}.post_attention_layernorm.weight"],
            f"{new}.feed_forward.w1.weight": hf[f"{old}.mlp.gate_proj.weight"],
            f"{new}.feed_forward.w2.weight": hf[f"{old}.mlp.down_proj.weight"],
            f"{new}.feed_forward.w3.weight": hf[f"{old}.mlp.up_proj.weight"],
        }
    return weights


def for_litgpt(hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return litgpt's state dict: q, k and v behind one another, not by groups."""
    weights = {
        "transformer.wte.weight": _padded(hf["model.embed_tokens.weight"]),
        "transformer.ln_f.weight": hf["model.norm.weight"],
        "lm_head.weight": _padded(hf["lm_head.weight"]),
    }
    for i in range(LAYERS):
        old, new = f"model.layers.{i}", f"transformer.h.{i}"
        qkv = [hf[f"{old}.self_attn.{part}_proj.weight"] for part in "qkv"]
        weights |= {
            f"{new}.norm_1.weight": hf[f"{old}.input_layernorm.weight"],
            f"{new}.attn.qkv.weight": torch.cat(qkv),
            f"{new}.attn.proj.weight": hf[f"{old}.self_attn.o_proj.weight"],
            f"{new}.norm_2.weight": hf[f"{old}.post_attention_layernorm.weight"],
            f"{new}.mlp.fc_1.weight": hf[f"{old}.mlp.gate_proj.weight"],
            f"{new}.mlp.fc_2.weight": hf[f"{old}.mlp.up_proj.weight"],
            f"{new}.mlp.proj.weight": hf[f"{old}.mlp.down_proj.weight"],
        }
    return weights


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the next tokens' summed cross-entropy [], over the places of the whole batch."""
    places = TOKENS[:, 1:].numel()
    logits = logits[:, :-1, :VOCAB]
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / places


def finish(logits: Tensor, path: Path | None) -> None:
    """Say what came out and save it: logits [b, s, v], whole, without the padded vocabulary."""
    logits = logits.detach()[..., :VOCAB].contiguous()
    if os.environ.get("RANK", "0") == "0":
        print(f"logits {tuple(logits.shape)} {logits.dtype}, sum {logits.sum().item():.12f}")
        if path:
            save_file({"logits": logits}, path)


def leave() -> None:
    """Destroy the process groups, once no thread of gloo's can hold tensors of the last exchange.

    An interpreter that ends while one does is aborted (pytorch#179291); a barrier exchanges none.
    """
    dist.barrier()
    dist.destroy_process_group()
