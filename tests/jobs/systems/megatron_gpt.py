"""Megatron-Core's GPTModel as a Llama, tensor-parallel on CPUs (torchrun), with its local spec.

Megatron-Core expects a GPU in a few places; what is needed to do without one is `on_cpus`.
"""

import copy
import os
from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist
import weights as tiny
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor
from torch.nn.functional import gelu, silu


def on_cpus() -> None:
    """Let Megatron-Core allocate on the CPU, fork no CUDA generator, and take torch's norm."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    refusing = WrappedTorchNorm.__new__

    def accepting(cls, config, *args, **options):
        """Make the norm; it knows nothing of sequence parallelism, but is right on each part."""
        with mock.patch.object(config, "sequence_parallel", False):
            return refusing(cls, config, *args, **options)

    WrappedTorchNorm.__new__ = accepting


def plant(fault: str, model: GPTModel) -> None:
    """Plant a fault into the model."""
    layer = model.decoder.layers[tiny.FAULTY_LAYER]
    if fault == "rope":
        right = layer.self_attention.forward
        wrong = RotaryEmbedding(tiny.HEAD_DIM, 1.0, rotary_base=tiny.WRONG_ROPE_BASE)

        def forward(*args, rotary_pos_emb=None, **others):
            return right(*args, rotary_pos_emb=wrong(len(rotary_pos_emb)), **others)

        layer.self_attention.forward = forward
    elif fault == "scale":
        layer.self_attention.core_attention.softmax_scale *= tiny.WRONG_SCALE
    elif fault == "act":
        layer.mlp.config = copy.copy(layer.mlp.config)  # all layers share one
        layer.mlp.config.activation_func = gelu
    elif fault == "eps":
        layer.pre_mlp_layernorm.eps = tiny.WRONG_EPS


def run(model: GPTModel, tokens: Tensor) -> Tensor:
    """Return whole logits [b, s, v] on every rank."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1]).triu(1).bool()
    return gather_from_tensor_model_parallel_region(model(tokens, positions, mask))


def main() -> None:
    """Load this rank's part, train if asked to, then run one forward."""
    args = tiny.options(__doc__, ("--sequence-parallel", "cut the sequence between the layers"))
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    on_cpus()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    config = TransformerConfig(
        num_layers=tiny.LAYERS,
        hidden_size=tiny.HIDDEN,
        ffn_hidden_size=tiny.FFN,
        num_attention_heads=tiny.HEADS,
        num_query_groups=tiny.KV_HEADS,
        kv_channels=tiny.HEAD_DIM,
        normalization="RMSNorm",
        layernorm_epsilon=tiny.EPS,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        use_cpu_initialization=True,
        params_dtype=args.dtype,
        pipeline_dtype=args.dtype,
        tensor_model_parallel_size=ranks,
        sequence_parallel=args.sequence_parallel,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=tiny.PADDED_VOCAB,
        max_sequence_length=tiny.MAX_LENGTH,
        position_embedding_type="rope",
        rotary_base=tiny.ROPE_BASE,
        share_embeddings_and_output_weights=False,
    )
    model.to(args.dtype).eval()
    weights = tiny.for_megatron(tiny.load(args.weights, args.dtype), rank, ranks)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or not all(name.endswith("_extra_state") for name in missing):
        raise ValueError(f"missing {missing}, unexpected {unexpected}")
    if args.fault:
        plant(args.fault, model)

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(args.train):
        loss = tiny.loss_of(run(model, tiny.TOKENS), tiny.TOKENS)
        if rank == 0:
            print(f"loss {loss.item():.12f}")
        loss.backward()
        if args.sequence_parallel:  # a norm has seen this rank's part of the sequence alone
            for name, parameter in model.named_parameters():
                if "layernorm" in name:
                    dist.all_reduce(parameter.grad)
        sgd.step()
        sgd.zero_grad()

    with torch.no_grad():
        tiny.finish(run(model, tiny.TOKENS), args.logits)
    tiny.leave()


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # asked for with sequence parallelism
    main()
