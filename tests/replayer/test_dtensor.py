"""DTensors on two real ranks: the local part goes in and comes back, placements in `dims`."""

from __future__ import annotations

import torch

from recorder import Recording

JOB = """
    import sys, torch, torch.distributed as dist
    from torch.distributed._functional_collectives import all_reduce
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from recorder import tap
    fill = float(sys.argv[1])
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    whole = torch.arange(12.0).view(2, 6) * fill
    d = distribute_tensor(whole, mesh, [Shard(1)]).requires_grad_()
    r = distribute_tensor(whole, mesh, [Replicate()])
    tap("sharded", d * 1.0, grad=True)
    h = tap("h", d * 1.0, grad=True)
    tap("replicated", r)
    reduced = tap("reduced", all_reduce(torch.ones(2) * fill, "sum", dist.group.WORLD))
    (h * 3).sum().backward()
    full, grad = h.full_tensor().detach(), d.grad.full_tensor()
    if dist.get_rank() == 0:
        print(full.flatten().tolist(), reduced.tolist(), grad[0, 0].item())
    dist.destroy_process_group()
"""


def test_a_dtensor_s_local_part_is_recorded_and_grafted(shell, run):
    shell.write("job.py", JOB)
    job = [*shell.torchrun(2), "job.py"]
    done = shell(shell.graft, "record", "-o", run, "--", job, "1")
    assert done.returncode == 0, done.stderr
    back = Recording.open(run)
    whole = torch.arange(12.0).view(2, 6)
    assert torch.equal(back.load(1, "sharded"), whole[:, 3:])
    assert torch.equal(back.load(1, "replicated"), whole)
    assert torch.equal(back.load(0, "reduced"), torch.full((2,), 2.0))
    assert (back.load(0, "h", kind="grad") == 3).all()
    dims = dict(back.rows().filter(back.rows()["rank"] == 0).select("name", "dims").rows())
    assert dims["sharded"] == "DTensor [2, 6] tp:2=Shard(dim=1)"
    done = shell(shell.graft, "replay", run, "--strict", "--", job, "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{whole.flatten().tolist()} [2.0, 2.0] 3.0"
