"""Random rows, recorded and replayed on up to 8 ranks: each is what plain dictionaries say.

A failure names the seed of its case; `test_a_seed` plays a single one.
"""

from __future__ import annotations

import pytest
from rowed.cases import Mesh, Play, make
from rowed.expecting import check, expected

from recorder import Recorder
from replayer import Replayer

MESHES = [
    *[(Mesh(), Mesh())] * 3,
    (Mesh(1, 2), Mesh()),
    (Mesh(), Mesh(1, 4)),
    (Mesh(2, 2), Mesh(2, 1)),
    (Mesh(2, 1), Mesh(1, 2)),
    (Mesh(1, 4), Mesh(1, 2)),
    (Mesh(1, 2), Mesh(2, 4)),
    (Mesh(4, 2), Mesh(1, 4)),
    (Mesh(8, 1), Mesh(2, 1)),
]
MATCHES = [None, "name,case", "name,case,step", "name,case,occurrence", "name,case,step,occurrence"]
REPLICAS = ["error", "error", "first", "last", "mean"]


def played(run, seed, meshes, cases=40, match_on=None, replicas="error", steps=3, **options):
    """Record and replay random cases, and hold each of them against what is expected."""
    made = [make(f"{seed}-{i}", i, meshes, steps, **options) for i in range(cases)]
    play = Play(made, meshes, steps, seed)
    for rank in range(meshes[0].world_size):
        with Recorder(run, rank=rank, world_size=meshes[0].world_size):
            play.baseline(rank)
    return replayed(run, play, meshes[1].world_size, match_on, replicas)


def replayed(run, play, world_size, match_on=None, replicas="error", **about):
    outcomes = []
    options = {"match_on": match_on, "replicas": replicas, "metrics": False}
    for rank in range(world_size):
        with Replayer(run, rank=rank, world_size=world_size, **options) as session:
            fired = play.target(rank)
        log = session.log().iter_rows(named=True)
        for (case, one), row in zip(fired, log, strict=True):
            what = expected(case, one, match_on=match_on, replicas=replicas, **about)
            check(case, one, row, what)
            outcomes.append(what.outcome)
    return outcomes


@pytest.mark.parametrize("seed", range(len(MESHES)))
def test_every_row_is_that_of_its_id(run, seed):
    outcomes = played(run, seed, MESHES[seed])
    assert outcomes.count("grafted") > len(outcomes) // 3
