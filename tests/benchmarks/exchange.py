"""Grafting from disk against the live exchange it replaces: 4 senders, 2 receivers.

The exchange: every rank of a gloo group of 6 takes part in `all_gather_object`, each sender with
its tensor; the two receivers then concatenate, take their half and copy it over their target.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

SENDERS, RECEIVERS = 4, 2


def concatenate(g):
    """The transform of both sides."""
    return torch.cat(g.received_list).chunk(RECEIVERS)[g.rank]


def exchange_rank(rank: int, store: str, nbytes: int, repeats: int, out: str) -> None:
    """One rank of the live exchange; the receivers note their median seconds."""
    import torch.distributed as dist

    world = SENDERS + RECEIVERS
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mine = torch.randn(nbytes // 4) if rank < SENDERS else None
    target = torch.randn(nbytes // 4 * SENDERS // RECEIVERS)
    taken = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        gathered: list[torch.Tensor | None] = [None] * world
        dist.all_gather_object(gathered, mine)
        if rank >= SENDERS:
            whole = torch.cat([t for t in gathered if t is not None])
            target.copy_(whole.chunk(RECEIVERS)[rank - SENDERS])
            del whole
        del gathered
        taken.append(time.perf_counter() - start)
    if rank >= SENDERS:
        (Path(out) / f"{rank}.json").write_text(json.dumps(statistics.median(taken[1:])))
    dist.destroy_process_group()


def graft_rank(rank: int, run: str, nbytes: int, repeats: int, out: str) -> None:
    """One receiver of a replay, with a graft a step; notes its median seconds."""
    from recorder import step, tap
    from replayer import Replayer

    target = torch.randn(nbytes // 4 * SENDERS // RECEIVERS)
    taken = []
    with Replayer(run, transform=concatenate, rank=rank, world_size=RECEIVERS) as replay:
        for i in range(repeats + 1):
            start = time.perf_counter()
            tap("x", target, i=i)
            taken.append(time.perf_counter() - start)
            step()  # else it is told each time that it undoes the graft before
    assert replay.log()["outcome"].to_list() == ["grafted"] * (repeats + 1)
    (Path(out) / f"{rank}.json").write_text(json.dumps(statistics.median(taken[1:])))


def transform_rank(rank: int, nothing: str, nbytes: int, repeats: int, out: str) -> None:
    """What no receiver can do without: the transform and the copy, of tensors in memory."""
    received = [torch.randn(nbytes // 4) for _ in range(SENDERS)]
    target = torch.randn(nbytes // 4 * SENDERS // RECEIVERS)
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        target.copy_(torch.cat(received).chunk(RECEIVERS)[rank])
        taken.append(time.perf_counter() - start)
    (Path(out) / f"{rank}.json").write_text(json.dumps(statistics.median(taken[1:])))


def make(run: str, nbytes: int, repeats: int) -> None:
    """Record what the receivers are to be given."""
    from recorder import Recorder, step, tap

    for rank in range(SENDERS):
        value = torch.randn(nbytes // 4)
        with Recorder(run, rank=rank, world_size=SENDERS):
            for i in range(repeats + 1):
                value[0] = i
                tap("x", value, i=i)
                step()


def spawn(what: str, ranks: int, *args: object) -> float:
    """Run a rank function in processes of its own; return the slowest receiver's median."""
    import subprocess

    with tempfile.TemporaryDirectory() as out:
        store = Path(out) / "store"
        first, rest = (args[0], args[1:]) if what == "graft" else (store, args)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(
                [sys.executable, __file__, what, str(r), str(first), *map(str, rest), out], env=env
            )
            for r in range(ranks)
        ]
        statuses = [p.wait() for p in running]
        if any(statuses):
            raise RuntimeError(f"{what} failed")
        return max(json.loads(p.read_text()) for p in Path(out).glob("*.json"))


if __name__ == "__main__":
    what, rank, first, nbytes, repeats, out = sys.argv[1:]
    ranks = {"exchange": exchange_rank, "graft": graft_rank, "transform": transform_rank}
    ranks[what](int(rank), first, int(nbytes), int(repeats), out)
