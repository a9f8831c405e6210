"""A tiny Llama of transformers, made from a config, that runs prompts in one way or another."""

import argparse

import torch
import transformers

PROMPTS = [[5, 6, 7], [3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14], [8], [40, 41, 42, 43]]
NEW = 5


def made(seed=0):
    """Make the model."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def padded(rows, side):
    """Return sequences as a batch and its mask."""
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if side == "left" else slice(len(row))
        tokens[i, at], mask[i, at] = torch.tensor(row), 1
    return tokens, mask


def generate(model, prompts=PROMPTS, **options):
    """Generate with a cache, from prompts padded on the left; return whole sequences."""
    tokens, mask = padded(prompts, "left")
    how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    found = model.generate(tokens, attention_mask=mask, **how)
    return [p + row[tokens.shape[1] :].tolist() for p, row in zip(prompts, found, strict=True)]


def batched(model, prompts=PROMPTS, **config):
    """Generate by continuous batching; return whole sequences."""
    sizes = {"page_size": 4, "num_blocks": 24, "max_batch_tokens": 12, **config}
    done = model.generate_batch(
        inputs=prompts,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**sizes),
        progress_bar=False,
    )
    return [one.prompt_ids + one.generated_tokens for one in done.values()]


def full(model, rows):
    """Run whole sequences in one forward, padded on the right."""
    tokens, mask = padded(rows, "right")
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=mask)
    return rows


def main():
    """Run as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=["generate", "batched", "full"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.how == "full":
        rows = generate(made(), use_cache=False)  # another model, which is to be tapped too
        full(made(args.seed), rows)
    else:
        found = (generate if args.how == "generate" else batched)(made(args.seed))
        print(found)


if __name__ == "__main__":
    main()
