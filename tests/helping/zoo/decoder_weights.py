"""The decoder's weights: drawn whole from a seed, spoiled by faults, then cut over the ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .decoder_options import BLOCK, EXPERTS, HEADS, KEY_HEADS, VOCAB, Fault, Options

Weights = dict[str, Tensor]
BY_COLUMN, BY_ROW = ("q", "k", "v", "gate", "up", "unembedding"), ("o", "down")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


def load(options: Options, rank: int) -> tuple[Weights, list[Weights]]:
    """Return one rank's weights outside of layers, and those of each layer."""
    ends, layers = drawn(options)
    for fault in options.faults:
        if fault.kind in SPOILERS and fault.layer is not None:
            SPOILERS[fault.kind](layers[fault.layer], fault)
    return cut(ends, options, rank, None), [
        cut(layer, options, rank, i) for i, layer in enumerate(layers)
    ]


def drawn(options: Options) -> tuple[Weights, list[Weights]]:
    """Draw the whole weights, in float32."""
    random = torch.Generator().manual_seed(options.weight_seed)
    width, scale = options.width, options.scale

    def draw(*shape: int) -> Tensor:
        whole = torch.randn(*shape, generator=random) / math.sqrt(shape[-2])
        if options.quantised:
            blocks = torch.rand(*shape[:-2], *(n // BLOCK for n in shape[-2:]), generator=random)
            whole *= spread(4 ** (blocks - 0.5))
        return whole

    def draw_norm() -> Tensor:
        return 1 + 0.2 * torch.randn(width, generator=random)

    ends = {"embedding": scale * torch.randn(VOCAB, width, generator=random)}
    if options.massive:
        ends["embedding"][:, 5] += 100
        ends["embedding"][0, 9] = 1000
    layers = []
    for i in range(options.layers):
        experts = (EXPERTS,) if options.has_experts(i) else ()
        middle = width if experts else 2 * width
        layer = {
            "attn_norm": draw_norm(),
            "q": draw(width, width) * 1.5,
            "k": draw(width, KEY_HEADS * options.head_dim) * 1.5,
            "v": draw(width, KEY_HEADS * options.head_dim),
            "o": draw(width, width) * scale,
            "bias": torch.randn(width, generator=random) * 0.3 * scale,
            "mlp_norm": draw_norm(),
            "gate": draw(*experts, width, middle),
            "up": draw(*experts, width, middle),
            "down": draw(*experts, middle, width) * scale * 2,
        }
        if experts:
            layer["router"] = torch.randn(width, EXPERTS, generator=random) / math.sqrt(width)
        if options.quantised:
            for name in PROJECTIONS:
                layer[name] = quantised(layer[name])
        layers.append(layer)
    ends |= {
        "norm": draw_norm(),
        "unembedding": torch.randn(width, VOCAB, generator=random) / math.sqrt(width),
    }
    return ends, layers


def spread(blocks: Tensor) -> Tensor:
    """Return a matrix that repeats each element over a block."""
    return blocks.repeat_interleave(BLOCK, dim=-2).repeat_interleave(BLOCK, dim=-1)


def scales(weight: Tensor) -> Tensor:
    """Return the scale of each block of a weight."""
    blocks = weight.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    return blocks.abs().amax(dim=(-3, -1)) / torch.finfo(torch.float8_e4m3fn).max


def quantised(weight: Tensor) -> Tensor:
    """Round a weight to fp8, block by block."""
    by_block = spread(scales(weight))
    return (weight / by_block).to(torch.float8_e4m3fn).float() * by_block


def cut(weights: Weights, options: Options, rank: int, layer: int | None) -> Weights:
    """Return one rank's part of some weights, in the dtype of the options."""
    is_whole = layer is not None and options.expert_parallel and options.has_experts(layer)
    parts = {}
    for name, whole in weights.items():
        dim = dict.fromkeys(BY_COLUMN, -1) | dict.fromkeys(BY_ROW, -2)
        along = 0 if is_whole and name in ("gate", "up", "down") else dim.get(name)
        wrong = Fault("wrong_shard", layer, name)
        taken = 0 if rank == 1 and wrong in options.faults else rank
        part = whole if along is None else whole.chunk(options.tp, dim=along)[taken]
        parts[name] = part.to(options.torch_dtype).contiguous()
    return parts


def swap_heads(layer: Weights, fault: Fault) -> None:
    """Swap two heads of a projection."""
    _swap(layer, fault.what, *fault.at, heads=KEY_HEADS if fault.what in ("k", "v") else HEADS)


def _swap(layer: Weights, name: str, first: int, second: int, heads: int) -> None:
    order = list(range(heads))
    order[first], order[second] = second, first
    whole, dim = layer[name], -2 if name in BY_ROW else -1
    pieces = whole.chunk(heads, dim=dim)
    layer[name] = torch.cat([pieces[k] for k in order], dim=dim)


def zero_head(layer: Weights, fault: Fault) -> None:
    """Leave one head of a projection at zero."""
    heads = KEY_HEADS if fault.what in ("k", "v") else HEADS
    layer[fault.what].chunk(heads, dim=-1)[int(fault.at[0])].zero_()


def swap_experts(layer: Weights, fault: Fault) -> None:
    """Swap two experts, in all of their weights or in one."""
    order = list(range(EXPERTS))
    first, second = map(int, fault.at)
    order[first], order[second] = second, first
    for name in [fault.what] if fault.what else ("gate", "up", "down"):
        layer[name] = layer[name][order]


def spoil_expert(layer: Weights, fault: Fault) -> None:
    """Give one expert of a weight the values of the next."""
    expert = int(fault.at[0])
    layer[fault.what][expert] = layer[fault.what][(expert + 1) % EXPERTS]


def swap_gate_and_up(layer: Weights, fault: Fault) -> None:
    """Load the gate as up and up as the gate."""
    layer["gate"], layer["up"] = layer["up"], layer["gate"]


def transpose(layer: Weights, fault: Fault) -> None:
    """Load a square weight transposed."""
    layer[fault.what] = layer[fault.what].mT.contiguous()


def borrow_scale(layer: Weights, fault: Fault) -> None:
    """Multiply one block by the scale of its neighbour, where the two differ by much."""
    weight = layer[fault.what]
    by_block = scales(weight)
    ratio = by_block.roll(-1, dims=-1) / by_block
    candidates = (ratio.log().abs() > math.log(1.5)).nonzero()
    at = tuple(candidates[int(fault.at[0]) % len(candidates)].tolist())
    factors = torch.ones_like(ratio)
    factors[at] = ratio[at]
    layer[fault.what] = weight * spread(factors)


def flip_bit(layer: Weights, fault: Fault) -> None:
    """Flip a high exponent bit of one weight, which makes a small one 256 times as large."""
    weight = layer[fault.what]
    size = weight.abs()
    candidates = ((size > 2**-7.8) & (size < 2**-7.1)).nonzero()
    at = tuple(candidates[int(fault.at[0]) % len(candidates)].tolist())
    weight.view(torch.int32)[at] ^= 1 << 26


SPOILERS = {
    "swap_heads": swap_heads,
    "zero_head": zero_head,
    "swap_experts": swap_experts,
    "spoil_expert": spoil_expert,
    "swap_gate_and_up": swap_gate_and_up,
    "transpose": transpose,
    "borrow_scale": borrow_scale,
    "flip_bit": flip_bit,
}
