"""How one side of a pair computes, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEADS, KEY_HEADS, EXPERTS, CHOSEN, VOCAB = 8, 4, 8, 2, 128
EPSILON, WINDOW, BLOCK = 1e-5, 6, 16


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes:
        kind: what is wrong, a name that `decoder` or `decoder_weights` knows.
        layer: where; None outside of layers.
        what: the weight or the tap that is meant.
        at: which head, expert, token, factor or seed; as the kind has it.
    """

    kind: str
    layer: int | None = None
    what: str = ""
    at: tuple[float | str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How one side computes; all but the sizes, the seeds and the faults is no fault.

    Attributes:
        layers: how many.
        width: of the residual stream; heads are an eighth of it.
        tokens: of each prompt.
        batch: prompts at a time.
        steps: how many batches.
        decode: tokens after each prompt, one a step, with a KV cache.
        dtype: `float32` or `bfloat16`.
        tp: ranks that weights are cut over.
        sequence_parallel: the residual stream is cut over the tokens too.
        expert_parallel: experts are spread over the ranks whole.
        attention: `eager`, `sdpa` or `split`, which merges blocks of keys.
        moe: layers with experts: `some`, `all` or `none`.
        left_padding: every other prompt begins with padding.
        massive: a channel of all tokens and one of the first are massive.
        in_place: the residual is added into the tapped tensor.
        residual: `sum`, or `pair` of delta and residual, added in the next norm.
        fused: norm, rotation, activation and experts round once, not after each operation.
        quantised: weights are rounded to fp8 with a scale for each block.
        scale: of the residual stream.
        taps: `dense` or `sparse`.
        weight_seed: what the weights are drawn from.
        token_seed: what the tokens are drawn from.
        faults: what is wrong.
    """

    layers: int = 4
    width: int = 64
    tokens: int = 24
    batch: int = 2
    steps: int = 1
    decode: int = 0
    dtype: str = "float32"
    tp: int = 1
    sequence_parallel: bool = False
    expert_parallel: bool = False
    attention: str = "eager"
    moe: str = "some"
    left_padding: bool = False
    massive: bool = False
    in_place: bool = False
    residual: str = "sum"
    fused: bool = False
    quantised: bool = False
    scale: float = 1.0
    taps: str = "dense"
    weight_seed: int = 0
    token_seed: int = 0
    faults: tuple[Fault, ...] = ()

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.width // HEADS

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return getattr(torch, self.dtype)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.moe == "all" or (self.moe == "some" and layer % 4 in (1, 2))

    def has_window(self, layer: int) -> bool:
        """Whether a layer attends to the last tokens only."""
        return layer % 2 == 1
