"""DTensors on real ranks: any placements to any others, with torch's `redistribute` to judge."""

from __future__ import annotations

import pytest
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


@pytest.mark.slow
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
    dims = dict(back.rows().filter(back.rows()["rank"] == 1).select("name", "dims").rows())
    assert dims["sharded"] == "DTensor [2, 6] tp:1/2=Shard(dim=1)"
    assert torch.equal(back.load_logical("sharded"), whole)
    done = shell(shell.graft, "replay", run, "--strict", "--", job, "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{whole.flatten().tolist()} [2.0, 2.0] 3.0"


SHARED = """
    import itertools, torch, torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard
    from pathlib import Path
    from recorder import Recorder, declare_mesh, tap
    from replayer import Replayer

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = torch.arange(7 * 12 * 4.0).view(7, 12, 4) + 0.25
    ONE = [[Replicate()], [Shard(0)], [Shard(1)], [Shard(2)], [Partial()]]
    KINDS = [Replicate(), Shard(0), Shard(1), Partial()]
    TWO = [list(both) for both in itertools.product(KINDS, repeat=2)]
    TWO += [[_StridedShard(1, split_factor=2), Shard(1)]]

    WEIGHTS = {1: [1.0], 2: [0.25, 0.75], 3: [0.25, 0.5, 0.25]}  # no rounding in sums of these

    def placed(mesh, placements):
        "The whole, so placed, by torch alone."
        plain = [Replicate() if isinstance(p, Partial) else p for p in placements]
        found = distribute_tensor(whole, mesh, plain)
        weight = 1.0
        for k, n, placement in zip(mesh.get_coordinate(), mesh.shape, placements):
            weight *= WEIGHTS[n][k] if isinstance(placement, Partial) else 1.0
        return DTensor.from_local(
            found.to_local() * weight, mesh, placements,
            run_check=False, shape=whole.shape, stride=whole.stride(),
        )
"""

SENDER = """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with Recorder("run"):
        for i, placements in enumerate(TWO):
            tap("x", placed(mesh, placements), case=i)
    dist.destroy_process_group()
"""

RECEIVER = """
    cases = 0
    for shape, names, kinds in (((3,), ("tp",), ONE), ((1, 3), ("fsdp", "tp"), TWO[:5])):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for placements in kinds:
            expected = placed(mesh, placements)
            with Replayer("run", on_error="raise"):
                for case in range(len(TWO)):
                    target = DTensor.from_local(
                        torch.full_like(expected.to_local(), -1.0), mesh, placements,
                        run_check=False, shape=whole.shape, stride=whole.stride(),
                    )
                    tap("x", target, case=case)
                    got = target.full_tensor()
                    about = (rank, TWO[case], placements)
                    assert torch.equal(got, whole), about
                    if not any(isinstance(p, Partial) for p in placements):
                        assert torch.equal(target.to_local(), expected.to_local()), about
                    cases += 1
    # The names of the dims, and a plain tensor on this side.
    declare_mesh(tp=(rank, world))
    target = torch.zeros(7, 12 // world, 4)
    with Replayer("run", on_error="raise"):
        tap("x", target, dims="a b[tp] c", case=1)  # by position: a DTensor's dims have no names
    assert torch.equal(target, whole.chunk(world, 1)[rank])
    (Path("done") / str(rank)).write_text(str(cases))
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_every_placement_to_every_other_as_torch_redistributes(shell):
    """2 x 2 ranks to 3 and to 1 x 3: every placement of the first to ten of the others."""
    shell.write("sender.py", SHARED + SENDER)
    shell.write("receiver.py", SHARED + RECEIVER)
    (shell.folder / "done").mkdir()
    for job, ranks in (("sender.py", 4), ("receiver.py", 3)):
        done = shell(shell.torchrun(ranks), job)
        assert done.returncode == 0, done.stderr
    cases = [int(path.read_text()) for path in (shell.folder / "done").iterdir()]
    assert cases == [10 * 17] * 3


PARTS = """
    import sys, torch, torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from recorder import declare_mesh, tap
    fill = float(sys.argv[1])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    declare_mesh(mesh)
    whole = torch.arange(4 * 2 * 16.0).view(4, 2, 16) * fill
    batch = whole.chunk(2)[mesh.get_coordinate()[0]]
    dims = "b[fsdp] s (g*{q: (r*d) | k: d | v: d})[tp] # r=2 d=2"
    for name, placement in (("sharded", Shard(2)), ("replicated", Replicate())):
        x = distribute_tensor(batch, mesh["tp"], [placement]).requires_grad_()
        h = tap("qkv", x * 1.0, dims=dims, grad=True, form=name)
        (h * 3).sum().backward()
        sys.stdout.write(f"{name} {h.full_tensor().sum().item()}\\n")
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_parts_of_a_dtensor_whose_batch_is_cut_outside_its_mesh(shell, run):
    """The form of torchtitan's fused projection: tp by the DTensor, fsdp by the data."""
    shell.write("job.py", PARTS)
    job = [*shell.torchrun(4), "job.py"]
    done = shell(shell.graft, "record", "-o", run, "--", job, "1")
    assert done.returncode == 0, done.stderr
    back = Recording.open(run)
    grouped = torch.arange(4 * 2 * 16.0).view(4, 2, 2, 8)
    for form in ("sharded", "replicated"):
        assert torch.equal(back.load_logical("q", form=form), grouped[..., :4])
        assert torch.equal(back.load_logical("v", form=form), grouped[..., 6:])
        assert (back.load_logical("k", kind="grad", form=form) == 3).all()
    done = shell(shell.graft, "replay", run, "--strict", "--", job, "0")
    assert done.returncode == 0, done.stderr
    sums = {float(half.sum()) for half in grouped.chunk(2)}
    wanted = {f"{form} {one}" for form in ("sharded", "replicated") for one in sums}
    assert set(done.stdout.splitlines()) == wanted, "as grafted onto zeros"
