"""The demo's transform: tensors recorded on any number of ranks, re-cut for the target's ranks."""

import torch

from replayer import GraftInput

# Where tensor parallelism cuts each tap; a tap not named here is the same on every rank.
SHARDED_DIM = {"attn_q": 2, "mlp_hidden": 2}


def recut(g: GraftInput) -> torch.Tensor:
    """Join what the sender's ranks recorded and return the part that belongs to this rank."""
    # Should a sender's shard be missing, the part comes out too small and is refused.
    shards = [shard for shard in g.received_list if shard is not None]
    dim = SHARDED_DIM.get(g.tags["name"])
    if dim is None:
        return shards[0]
    whole = torch.cat(shards, dim=dim)
    return whole.chunk(g.world_size, dim=dim)[g.rank]
