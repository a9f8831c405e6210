"""What one rank recorded, cut for the tensor-parallel ranks of minilm_target.py."""

from torch import Tensor

from replayer import GraftInput

# Split along the last dimension, [b, s, heads x d] or [b, s, columns]; all else is replicated.
SPLIT = {"attn_q", "attn_context", "mlp_act"}


def recut(g: GraftInput) -> Tensor:
    """Give each receiver its share of a tensor that the one sender holds whole."""
    (whole,) = g.received_list
    if g.tags["name"] in SPLIT:
        return whole.chunk(g.world_size, dim=-1)[g.rank]
    return whole
