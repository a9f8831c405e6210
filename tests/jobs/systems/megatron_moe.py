"""Megatron-Core's GPTModel with experts, as a pipeline of as many stages as ranks, on CPUs.

The last of its four layers has none. It runs one forward, with weights of its own.
"""

import os

import torch
import torch.distributed as dist
import weights as tiny
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron_gpt import on_cpus
from torch.nn.functional import silu

LAYERS, HIDDEN, BATCH, LENGTH, VOCAB = 4, 32, 2, 6, 64


def main() -> None:
    """Run this rank's stage: receive, compute, send."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    on_cpus()
    moe_utils.te_general_gemm = None  # not defined where TransformerEngine is missing
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=ranks)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        qk_layernorm=True,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=24,
        moe_layer_freq=[1, 1, 1, 0],
        moe_token_dispatcher_type="allgather",
        moe_router_load_balancing_type="none",
        normalization="RMSNorm",
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
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=ranks,
    )
    torch.manual_seed(0)
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pre_process=rank == 0,
        post_process=rank == ranks - 1,
    ).eval()
    tokens = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    with torch.no_grad():
        if rank > 0:
            received = torch.empty(LENGTH, BATCH, HIDDEN)
            dist.recv(received, rank - 1)
            model.set_input_tensor(received)
        out = model(tokens, torch.arange(LENGTH).expand_as(tokens), mask)
        if rank < ranks - 1:
            dist.send(out.contiguous(), rank + 1)
    tiny.leave()


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    main()
