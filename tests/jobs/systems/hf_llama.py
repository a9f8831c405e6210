"""Transformers' Llama, made from a config: one rank, one forward of fixed tokens."""

import torch
import weights as tiny
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama


def rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    """Normalize in the precision of `x`; the class's own forward goes through float32."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def config_of(rope_base: float) -> LlamaConfig:
    """Return the config of the model."""
    return LlamaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=tiny.HIDDEN,
        intermediate_size=tiny.FFN,
        num_hidden_layers=tiny.LAYERS,
        num_attention_heads=tiny.HEADS,
        num_key_value_heads=tiny.KV_HEADS,
        head_dim=tiny.HEAD_DIM,
        max_position_embeddings=tiny.MAX_LENGTH,
        rms_norm_eps=tiny.EPS,
        rope_parameters={"rope_type": "default", "rope_theta": rope_base},
        tie_word_embeddings=False,
    )


def plant(fault: str, model: LlamaForCausalLM) -> None:
    """Plant a fault into the model."""
    layer = model.model.layers[tiny.FAULTY_LAYER]
    if fault == "rope":
        right = layer.self_attn.forward
        wrong = modeling_llama.LlamaRotaryEmbedding(config_of(tiny.WRONG_ROPE_BASE))
        positions = torch.arange(tiny.MAX_LENGTH)[None]

        def forward(hidden_states, position_ids=None, **others):
            at = positions[:, : hidden_states.shape[1]] if position_ids is None else position_ids
            others["position_embeddings"] = wrong(hidden_states, at)
            return right(hidden_states, position_ids=position_ids, **others)

        layer.self_attn.forward = forward
    elif fault == "scale":
        layer.self_attn.scaling *= tiny.WRONG_SCALE
    elif fault == "act":
        layer.mlp.act_fn = nn.GELU()
    elif fault == "eps":
        layer.post_attention_layernorm.variance_epsilon = tiny.WRONG_EPS


def main() -> None:
    """Load, train if asked to, then generate or run one forward."""
    args = tiny.options(
        __doc__,
        ("--generate", "greedily generate with a cache, 6 tokens"),
        ("--no-cache", "with --generate: compute the whole sequence anew for each"),
    )
    if args.dtype == torch.float64:
        modeling_llama.LlamaRMSNorm.forward = rms_norm
    model = LlamaForCausalLM(config_of(tiny.ROPE_BASE)).to(args.dtype).eval()
    model.load_state_dict(tiny.load(args.weights, args.dtype))
    if args.fault:
        plant(args.fault, model)

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(args.train):
        loss = tiny.loss_of(model(tiny.TOKENS, use_cache=False).logits, tiny.TOKENS)
        print(f"loss {loss.item():.12f}")
        loss.backward()
        sgd.step()
        sgd.zero_grad()

    with torch.no_grad():
        if args.generate:
            made = model.generate(
                tiny.TOKENS,
                attention_mask=torch.ones_like(tiny.TOKENS),
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                use_cache=not args.no_cache,
                pad_token_id=0,
            )
            print("tokens", made[:, tiny.TOKENS.shape[1] :].tolist())
        else:
            tiny.finish(model(tiny.TOKENS, use_cache=False).logits, args.logits)


if __name__ == "__main__":
    main()
