"""litgpt's GPT as a Llama: one rank, one forward of fixed tokens."""

import torch
import weights as tiny
from litgpt import model as litgpt
from litgpt.config import Config
from torch import Tensor, nn
from torch.nn.functional import gelu


def rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    """Normalize in the precision of `x`; the class's own forward goes through float32."""
    return self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps))


def plant(fault: str, model: litgpt.GPT) -> None:
    """Plant a fault into the model."""
    block = model.transformer.h[tiny.FAULTY_LAYER]
    if fault == "rope":
        right = block.attn.forward
        cos, sin = litgpt.build_rope_cache(
            tiny.MAX_LENGTH, tiny.HEAD_DIM, base=int(tiny.WRONG_ROPE_BASE)
        )

        def forward(x, cos_, sin_, *others):
            at = slice(0, cos_.shape[-2])
            return right(x, cos[None, at].to(cos_), sin[None, at].to(sin_), *others)

        block.attn.forward = forward
    elif fault == "scale":
        block.attn.mscale *= tiny.WRONG_SCALE**0.5
    elif fault == "act":
        mlp = block.mlp
        mlp.forward = lambda x: mlp.proj(gelu(mlp.fc_1(x)) * mlp.fc_2(x))
    elif fault == "eps":
        block.norm_2.eps = tiny.WRONG_EPS


def main() -> None:
    """Load, train if asked to, then run one forward."""
    args = tiny.options(__doc__)
    if args.dtype == torch.float64:
        litgpt.RMSNorm.forward = rms_norm
    config = Config(
        block_size=tiny.MAX_LENGTH,
        vocab_size=tiny.VOCAB,
        padded_vocab_size=tiny.PADDED_VOCAB,
        n_layer=tiny.LAYERS,
        n_head=tiny.HEADS,
        n_query_groups=tiny.KV_HEADS,
        head_size=tiny.HEAD_DIM,
        n_embd=tiny.HIDDEN,
        intermediate_size=tiny.FFN,
        norm_class_name="RMSNorm",
        norm_eps=tiny.EPS,
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        rope_base=int(tiny.ROPE_BASE),
        parallel_residual=False,
        bias=False,
    )
    model = litgpt.GPT(config).to(args.dtype).eval()
    model.load_state_dict(tiny.for_litgpt(tiny.load(args.weights, args.dtype)))
    if args.fault:
        plant(args.fault, model)

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(args.train):
        loss = tiny.loss_of(model(tiny.TOKENS), tiny.TOKENS)
        print(f"loss {loss.item():.12f}")
        loss.backward()
        sgd.step()
        sgd.zero_grad()

    with torch.no_grad():
        tiny.finish(model(tiny.TOKENS), args.logits)


if __name__ == "__main__":
    main()
