"""A job whose every tap is grafted by identity; prints its peak memory in MiB."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch
from memory_job import peak

from recorder import tap
from replayer import Replayer


def main(run: str, tensors: int, how: str = "") -> None:
    """Tap a tensor of 64 MiB again and again; with `how`, other ones each time."""
    value = torch.ones(16 << 20)
    replay = None if run == "-" else Replayer(run, own_error=how == "own", metrics=how != "own")
    if how:
        value = torch.randn(16 << 20, generator=torch.Generator().manual_seed(1)).view(4096, -1)
    with nullcontext() if replay is None else replay:
        for i in range(tensors):
            if how:
                value[:, ::7] += 1
            tap("x", value, i=i)
    if replay is not None:
        assert replay.log()["outcome"].to_list() == ["grafted"] * tensors
    print(peak())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
