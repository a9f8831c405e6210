"""Random layouts through recordings on disk and replays, every receiver rank of each."""

from __future__ import annotations

import random

import pytest
import torch
from layout_cases import (
    DTYPES,
    places,
    random_mesh,
    random_side,
    random_sizes,
    random_values,
    same_bits,
)

from recorder import Recorder, Recording, declare_mesh, tap
from replayer import Replayer

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]
EXTENT = pytest.mark.parametrize("extent", ["short", pytest.param("long", marks=LONG)])


def one_pair_of_jobs(folder, seed, most_ranks, count):
    """Record `count` tensors over one mesh and replay them onto another; return grafts made."""
    rng = random.Random(seed)
    mesh, other = random_mesh(rng, most_ranks), random_mesh(rng, most_ranks)
    cases = []
    for _ in range(count):
        sizes = random_sizes(rng, rng.randint(1, 4))
        mine = random_side(rng, sizes, mesh, fuse=False)
        its = random_side(rng, sizes, other, fuse=False)
        logical = random_values(rng, list(sizes.values()), rng.choice(DTYPES))
        cases.append((logical, list(sizes), mine, its))
    for rank, at in enumerate(places(mesh)):
        declare_mesh(**at)
        with Recorder(folder / "run", rank=rank, world_size=len(places(mesh))):
            for i, (logical, names, mine, _) in enumerate(cases):
                block = mine.block(logical, names, at)
                tap("x", block, dims=mine.text(declare_rules=False), i=i)
    grafts = 0
    for rank, at in enumerate(places(other)):
        declare_mesh(**at)
        options = {"rank": rank, "world_size": len(places(other)), "metrics": False}
        with Replayer(folder / "run", on_error="raise", **options):
            for i, (logical, names, mine, its) in enumerate(cases):
                expected = its.block(logical, names, at)
                target = torch.zeros_like(expected)
                tap("x", target, dims=its.text(declare_rules=True), i=i)
                texts = mine.text(declare_rules=False), its.text(declare_rules=True)
                about = f"seed {seed}, {i}: {texts} over {mesh} -> {other}, rank {rank}"
                assert same_bits(target, expected), about
                grafts += 1
    declare_mesh()
    back = Recording.open(folder / "run")
    for i, (logical, names, mine, _) in enumerate(cases):
        assert same_bits(back.load_logical("x", i=i), mine.whole(logical, names)), (seed, i)
    return grafts


@pytest.mark.thorough
@EXTENT
def test_random_layouts_from_disk_to_every_receiver(tmp_path, extent):
    first, jobs, most, count = (0, 20, 8, 20) if extent == "short" else (1_000, 60, 64, 40)
    grafts = 0
    for seed in range(first, first + jobs):
        grafts += one_pair_of_jobs(tmp_path / str(seed), seed, most, count)
    print(f"seeds {first} to {first + jobs - 1}: {jobs * count} tensors, {grafts} grafts")
