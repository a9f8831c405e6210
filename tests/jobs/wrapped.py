"""A model that nobody taps, trained for two steps under FSDP2 with checkpointing, or DDP."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def main(how):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Model()
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
        for i, layer in enumerate(model.layers):
            model.layers[i] = fully_shard(checkpoint_wrapper(layer), mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how == "ddp":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for i in range(2):
        torch.manual_seed(10 * i + dist.get_rank())
        loss = model(torch.randn(4, 8)).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.6f}")
    dist.barrier()  # a rank that leaves first may keep the other from leaving
    dist.destroy_process_group()


main(sys.argv[1])
