"""torchtitan's Llama 3 on CPUs (torchrun): tensor-parallel, or FSDP2 with activation checkpointing.

torchtitan expects a GPU and triton in a few places; what is needed to do without is `on_cpus`.
"""

# ruff: noqa: E402  (torchtitan is imported after what it would import was replaced)

import dataclasses
import importlib.util
import sys
from unittest import mock

import torch
import torch.distributed as dist
import weights as tiny
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import gelu


def on_cpus() -> None:
    """Let torchtitan make its meshes of CPUs, and import it without kernels that need triton."""
    if importlib.util.find_spec("triton") is None:
        kernels = "torchtitan.distributed.minimal_async_ep.kernels"
        sys.modules[kernels] = mock.MagicMock(name=kernels)  # of experts; nobody calls them here
    import torchtitan.config
    import torchtitan.tools.utils

    torchtitan.tools.utils.device_type = "cpu"
    torchtitan.config.TORCH_DTYPE_MAP["float64"] = torch.float64


on_cpus()

from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
from torchtitan.distributed.utils import get_spmd_context, set_spmd_backend
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.llama3 import Llama3Model, parallelize_llama
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.models.llama3.sharding import set_llama3_sharding_config

AC = {"full": FullAC.Config(), "selective": SelectiveAC.Config(), "none": None}


def rope64() -> None:
    """Rotate in float64 by cosines and sines of float32, as the others; the class rounds more."""
    right = ComplexRoPE._precompute_cache

    def cache(self: ComplexRoPE) -> Tensor:
        # The angle is all that the class gives to torch.polar.
        with mock.patch("torch.polar", lambda _ones, angle: angle):
            angle = right(self)
        return torch.complex(angle.cos().double(), angle.sin().double())

    def apply(query: Tensor, key: Tensor, rope_cache: Tensor) -> tuple[Tensor, Tensor]:
        def rotated(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * rope_cache).flatten(3)

        return rotated(query), rotated(key)

    ComplexRoPE._precompute_cache = cache
    ComplexRoPE.apply_rotary_emb = staticmethod(apply)


def config_of() -> Llama3Model.Config:
    """Return the config of the model; its weights are loaded, so nothing says how to draw them."""
    norm = RMSNorm.Config(normalized_shape=tiny.HIDDEN, eps=tiny.EPS)

    def layer() -> Llama3TransformerBlock.Config:
        return Llama3TransformerBlock.Config(
            attention_norm=dataclasses.replace(norm),
            ffn_norm=dataclasses.replace(norm),
            attention=make_gqa_config(
                dim=tiny.HIDDEN,
                n_heads=tiny.HEADS,
                n_kv_heads=tiny.KV_HEADS,
                head_dim=tiny.HEAD_DIM,
                wqkv_param_init={},
                wo_param_init={},
                inner_attention=ScaledDotProductAttention.Config(),
                fuse_qkv=True,
                rope=ComplexRoPE.Config(
                    dim=tiny.HEAD_DIM, max_seq_len=tiny.MAX_LENGTH, theta=tiny.ROPE_BASE
                ),
            ),
            feed_forward=make_ffn_config(
                dim=tiny.HIDDEN, hidden_dim=tiny.FFN, w1_param_init={}, w2w3_param_init={}
            ),
        )

    return Llama3Model.Config(
        dim=tiny.HIDDEN,
        vocab_size=tiny.VOCAB,
        tok_embeddings=Embedding.Config(num_embeddings=tiny.VOCAB, embedding_dim=tiny.HIDDEN),
        norm=dataclasses.replace(norm),
        lm_head=Linear.Config(in_features=tiny.HIDDEN, out_features=tiny.VOCAB),
        layers=[layer() for _ in range(tiny.LAYERS)],
    )


def plant(fault: str, model: Llama3Model) -> None:
    """Plant a fault into the model."""
    layer = model.layers[str(tiny.FAULTY_LAYER)]
    if fault == "rope":
        rope = layer.attention.rope
        rope.cache = ComplexRoPE(dataclasses.replace(rope.config, theta=tiny.WRONG_ROPE_BASE)).cache
    elif fault == "scale":
        layer.attention.scaling *= tiny.WRONG_SCALE
    elif fault == "act":
        mlp = layer.feed_forward
        mlp.forward = lambda x: mlp.w2(gelu(mlp.w1(x)) * mlp.w3(x))
    elif fault == "eps":
        layer.ffn_norm.eps = tiny.WRONG_EPS


def whole(logits: Tensor) -> Tensor:
    """Put a DTensor's parts together."""
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def gathered(part: Tensor, dim: int) -> Tensor:
    """Put all ranks' parts behind one another; they need not be of one size."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return torch.cat(parts, dim)


def main() -> None:
    """Load, cut, train if asked to, then run one forward."""
    args = tiny.options(
        __doc__,
        ("--parallel", "tp", "fsdp", "what the ranks share"),
        ("--no-sequence-parallel", "with tp: keep the sequence whole between the layers"),
        ("--checkpoint", "none", "full", "selective", "what is computed again in the backward"),
        ("--spmd", "partial_dtensor", "spmd_types", "torchtitan's spmd_backend"),
    )
    typed = args.spmd == "spmd_types"
    if typed and (args.parallel == "fsdp" or args.train):
        raise SystemExit("spmd_types only with tp, not to train: FSDP takes it from torch 2.14 on")
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if args.dtype == torch.float64:
        rope64()
    parallelism = ParallelismConfig(
        tensor_parallel_degree=ranks if args.parallel == "tp" else 1,
        data_parallel_shard_degree=ranks if args.parallel == "fsdp" else 1,
        enable_sequence_parallel=not args.no_sequence_parallel,
        spmd_backend=args.spmd,
    )
    set_spmd_backend(args.spmd)
    dims = ParallelDims.from_config(parallelism, ranks)
    dims.build_mesh()
    config = config_of()
    set_llama3_sharding_config(config, enable_sp=parallelism.enable_sequence_parallel)
    model = Llama3Model(config).eval()
    if args.dtype == torch.float64:
        model.double()  # not to(): that would take the imaginary part of rope's cache
    model.load_state_dict(tiny.for_titan(tiny.load(args.weights, args.dtype)))
    if args.fault:
        plant(args.fault, model)
    precision = str(args.dtype).removeprefix("torch.")
    if typed:
        model.parallelize(dims)  # what parallelize_llama does first
    else:
        parallelize_llama(
            model,
            parallel_dims=dims,
            training=TrainingConfig(
                mixed_precision_param=precision, mixed_precision_reduce=precision
            ),
            parallelism=parallelism,
            compile_config=CompileConfig(),
            ac_config=AC[args.checkpoint],
            dump_folder="",
        )
        disable_fsdp_gradient_division(model)
    tokens = tiny.TOKENS.chunk(ranks)[rank] if args.parallel == "fsdp" else tiny.TOKENS

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with get_spmd_context(parallel_dims=dims)():
        for _ in range(args.train):
            loss = tiny.loss_of(whole(model(tokens)), tokens)
            loss.backward()
            sgd.step()
            sgd.zero_grad()
            if args.parallel == "fsdp":
                dist.all_reduce(loss.detach_())
            if rank == 0:
                print(f"loss {loss.item():.12f}")

        with torch.no_grad():
            logits = whole(model(tokens))
            if args.parallel == "fsdp":
                logits = gathered(logits, dim=0)
            elif typed:
                logits = gathered(logits, dim=-1)
            tiny.finish(logits, args.logits)
    tiny.leave()


if __name__ == "__main__":
    main()
