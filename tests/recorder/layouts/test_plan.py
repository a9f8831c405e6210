"""Any layout to any other: bit for bit what slicing the logical tensor gives."""

from __future__ import annotations

import random

import pytest
from layout_cases import (
    DTYPES,
    places,
    random_mesh,
    random_side,
    random_sizes,
    random_values,
    same_bits,
)

from recorder.layouts.assemble import assemble
from recorder.layouts.blocks import Block
from recorder.layouts.parse import parse_dims
from recorder.layouts.plan import plan, whole
from recorder.mesh import frozen

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]
EXTENT = pytest.mark.parametrize("extent", ["short", pytest.param("long", marks=LONG)])


def blocks_of(side, logical, names, mesh, *, declare_rules):
    dims = parse_dims(side.text(declare_rules=declare_rules))
    tensors = [side.block(logical, names, at) for at in places(mesh)]
    blocks = [
        Block(rank, dims, tuple(tensor.shape), frozen(at))
        for rank, (tensor, at) in enumerate(zip(tensors, places(mesh), strict=True))
    ]
    return blocks, tensors


def carried(senders, tensors, world, receiver, receivers, **options):
    return assemble(
        plan(senders, world, receiver, receivers),
        senders,
        receiver,
        lambda rank, share: tensors[rank],
        lambda rank: "same",
        **options,
    )


def one_case(seed):
    rng = random.Random(seed)
    mesh, other = random_mesh(rng, 64), random_mesh(rng, 64)
    sizes = random_sizes(rng, rng.randint(1, 4))
    mine = random_side(rng, sizes, mesh)
    # Fused otherwise: then what is cut unevenly cannot be known from one block.
    its = random_side(rng, sizes, other, uneven=all(len(d or "x") == 1 for d in mine.dims))
    if any(len(d or "x") > 1 for d in its.dims):
        its.cuts = [[c for c in cuts if c[1] not in ("chunk", "split")] for cuts in its.cuts]
    names = list(sizes)
    logical = random_values(rng, list(sizes.values()), rng.choice(DTYPES))
    mine.facts = its.facts = " # " + " ".join(
        f"{n}={s}" for n, s in sizes.items() if fused(n, mine, its)
    )
    senders, tensors = blocks_of(mine, logical, names, mesh, declare_rules=False)
    receivers, expected = blocks_of(its, logical, names, other, declare_rules=True)
    texts = mine.text(declare_rules=False), its.text(declare_rules=True)
    about = f"seed {seed}: {texts[0]!r} over {mesh} -> {texts[1]!r} over {other}, {sizes}"
    for rank in {0, len(receivers) - 1, rng.randrange(len(receivers))}:
        try:
            got = carried(senders, tensors, len(senders), receivers[rank], len(receivers))
        except Exception as err:
            raise AssertionError(f"{about}, rank {rank}: {err!r}") from err
        assert same_bits(got, expected[rank]), f"{about}, rank {rank}"
    all_of_it = carried(senders, tensors, len(senders), whole(senders, len(senders)), 1)
    assert same_bits(all_of_it, mine.whole(logical, names)), about


def fused(name, *sides):
    return any(name in dim and len(dim) > 1 for side in sides for dim in side.dims if dim)


@pytest.mark.thorough
@EXTENT
def test_random_layouts(extent):
    first = 0 if extent == "short" else 100_000
    count = 2_000 if extent == "short" else 30_000
    for seed in range(first, first + count):
        one_case(seed)
    print(f"seeds {first} to {first + count - 1}: {count} cases")
