"""Rows of DTensors on real ranks: any placement to any other, the ids whole, local or a DTensor."""

from __future__ import annotations

import pytest

JOB = """
    import itertools, sys, torch, torch.distributed as dist
    from pathlib import Path
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from recorder import Recorder, tap
    from replayer import Replayer

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    whole = torch.arange(7 * 4 * 2.0).view(7, 4, 2) + 0.25
    ids, order = torch.arange(100, 107), torch.tensor([3, 1, 6, 0, 5, 2, 4])
    KINDS = [Replicate(), Shard(0), Shard(1), Shard(2), Partial()]

    def placed(tensor, placement):
        is_sum = isinstance(placement, Partial)
        found = distribute_tensor(tensor, mesh, [Replicate() if is_sum else placement])
        if is_sum:
            return DTensor.from_local(found.to_local() * (0.25, 0.75)[rank], mesh, [placement])
        return found

    def own(ids, placement, is_local):
        if not (isinstance(placement, Shard) and placement.dim == 0):
            return ids
        found = distribute_tensor(ids, mesh, [placement])
        return found.to_local() if is_local else found

    for number, (a, b, is_local) in enumerate(itertools.product(KINDS, KINDS, (True, False))):
        run = Path(sys.argv[1]) / str(number)
        with Recorder(run, rank=rank, world_size=2):
            tap("x", placed(whole, a), dims="t h d", rows={"t": own(ids, a, is_local)})
        dist.barrier()
        wanted, x = placed(whole[order], b).to_local(), placed(torch.zeros(7, 4, 2) - 9, b)
        if isinstance(b, Partial) and not isinstance(a, Partial):
            wanted = whole[order] if rank == 0 else torch.zeros(7, 4, 2)
        with Replayer(run, rank=rank, world_size=2) as session:
            tap("x", x, dims="t h d", rows={"t": own(ids[order], b, is_local)})
        assert torch.equal(x.to_local(), wanted), (a, b, is_local, session.log()["message"][0])
        dist.barrier()
    sys.stdout.write("all\\n")  # in one write, so that two ranks' lines do not mix
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_rows_of_dtensors_meet_whatever_their_placements(shell, tmp_path):
    shell.write("job.py", JOB)
    done = shell(*shell.torchrun(2), "job.py", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["all", "all"]
