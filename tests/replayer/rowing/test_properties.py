"""Random rows, recorded and replayed on up to 8 ranks: each is what plain dictionaries say.

A failure names the case by its number and seed, as in `make("7-22", 22, ...)` for 22 of seed 7.
"""

from __future__ import annotations

import random

import pytest
import torch
from rowed.cases import DTYPES, Mesh, Play, make
from rowed.expecting import check, expected, received
from rowed.oracle import same

from recorder import Recorder, Recording, tap
from replayer import Replayer

MESHES = [
    (Mesh(), Mesh()),
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
REPLICAS = ["error", "first", "last", "mean"]


def played(
    run, seed, meshes, cases=20, steps=3, match_on=None, replicas="error", metrics=False, **fixed
):
    """Record and replay random cases, and hold each of them against what is expected."""
    play = Play([make(f"{seed}-{i}", i, meshes, steps, **fixed) for i in range(cases)], meshes,
                steps, seed)  # fmt: skip
    recorded(run, play)
    return replayed(run, play, match_on=match_on, replicas=replicas, metrics=metrics)


def recorded(run, play, attempt=0, **options):
    world = play.meshes[0].world_size
    for rank in range(world):
        with Recorder(run, rank=rank, world_size=world, **options):
            play.baseline(rank, attempt)


def replayed(run, play, kept=lambda one: True, metrics=False, **options):
    """Replay cases; return their outcomes."""
    world, outcomes = play.meshes[1].world_size, []
    for rank in range(world):
        with Replayer(run, rank=rank, world_size=world, metrics=metrics, **options) as session:
            fired = play.target(rank)
        log = session.log().iter_rows(named=True)
        for (case, one), row in zip(fired, log, strict=True):
            what = expected(case, one, kept=kept, **options)
            check(case, one, row, what)
            outcomes.append(what.outcome)
    return outcomes


@pytest.mark.parametrize("seed", range(len(MESHES)))
def test_every_row_is_that_of_its_id_however_ranks_share_it(run, seed):
    outcomes = played(run, seed, MESHES[seed])
    assert outcomes.count("grafted") > len(outcomes) // 3


@pytest.mark.parametrize("match_on", MATCHES)
def test_step_and_occurrence_count_where_they_are_named(run, match_on):
    for seed in range(2):
        played(run / str(seed), f"{match_on} {seed}", MESHES[4 * seed], match_on=match_on)


@pytest.mark.parametrize("replicas", REPLICAS)
def test_of_rows_that_differ_the_one_that_was_asked_for_is_taken(run, replicas):
    for seed in range(2):
        options = {"replicas": replicas, "noise": "beyond"}
        outcomes = played(run / str(seed), f"{replicas} {seed}", MESHES[3 * seed], **options)
        assert ("error" in outcomes) == (replicas in ("error", "mean"))  # integers have no mean


@pytest.mark.parametrize("dtype", dict.fromkeys(DTYPES), ids=str)
def test_rows_of_every_dtype_are_copied_bit_by_bit(run, dtype):
    played(run, f"{dtype}", (Mesh(1, 2), Mesh(1, 2)), dtype=dtype, to=dtype, metrics=True)


def test_rows_that_are_off_by_rounding_are_the_same(run):
    outcomes = played(run, "rounding", (Mesh(2, 2), Mesh()), cases=60, noise="rounding")
    assert "error" not in outcomes


@pytest.mark.parametrize("meshes", MESHES[:3])
def test_a_transform_gets_the_rows_of_each_part_as_they_stand_in_the_target(run, meshes):
    fixed = {"groups": 1, "noise": "none"}
    cases = [make(f"transform {i}", i, meshes, 2, **fixed) for i in range(60)]
    play, got = Play(cases, meshes, 2, 0), []
    recorded(run, play)

    def transform(g):
        got.append([None if one is None else one.clone() for one in g.received_list])
        return g.target

    for rank in range(meshes[1].world_size):
        with Replayer(run, rank=rank, world_size=meshes[1].world_size, transform=transform) as one:
            fired = play.target(rank)
        for (case, target), row in zip(fired, one.log().iter_rows(named=True), strict=True):
            if row["outcome"] != "missing":
                assert row["outcome"] == "grafted", row["message"]
                there = dict(enumerate(got.pop(0)))
                parts = received(case, target)
                assert {k for k, part in there.items() if part is not None} == {*parts}
                for k, part in parts.items():
                    assert same(there[k], part), f"rank {k} of case {case.number}"
    assert not got


@pytest.mark.parametrize("seed", range(3))
def test_the_latest_attempt_comes_first_and_earlier_ones_have_the_rest(run, monkeypatch, seed):
    meshes = MESHES[seed]
    cases = [make(f"attempts {seed}-{i}", i, meshes, 3, noise="none") for i in range(25)]
    play = Play(cases, meshes, 3, seed)
    monkeypatch.setenv("GRAFT_JOB", "one")
    for attempt in range(2):
        for case in cases:  # each attempt leaves out other firings, and has other values
            case.fired, before = [], case.fired
            case.values.clear()
            case.seed = f"{case.seed} {attempt}"
            case.before = before
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        recorded(run, play, attempt)
        for case in cases:
            if attempt == 0:
                case.plans[0].pop()
            case.fired = [*case.before, *case.fired]
    replayed(run, play, replicas="first")


@pytest.mark.parametrize("keep_last", [1, 2])
def test_of_a_ring_the_rows_of_the_last_steps_are_there(run, keep_last):
    meshes, steps = MESHES[1], 5
    play = Play([make(f"ring-{i}", i, meshes, steps) for i in range(25)], meshes, steps, keep_last)
    recorded(run, play, keep_last=keep_last)
    rows = Recording.open(run).rows()
    there = {*rows.filter(rows["kind"] == "tensor").select("rank", "step").iter_rows()}
    assert 0 < len(there) < meshes[0].world_size * steps
    replayed(run, play, kept=lambda one: (one.rank, one.step) in there)


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_rows_meet_in_any_order(run, seed):
    """Records are large enough here that only the rows that are needed are read of them."""
    n, width = (10_000, 16) if seed else (5_000, 32)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 1 << 62, (n,), generator=g)
    values = torch.randn(n, width, generator=g)
    parts = torch.randperm(n, generator=g).split([n // 2, n // 4, n - n // 2 - n // 4])
    with Recorder(run):
        for part in parts:
            tap("x", values[part], dims="t h", rows={"t": ids[part]})
            tap("y", values[part].T, dims="h t", rows={"t": ids[part]})
    wanted = torch.randint(0, n, (n // 8,), generator=g)
    others = torch.randint(0, 1 << 62, (5,), generator=g)
    asked = torch.cat([ids[wanted], others, torch.full((3,), -1)])
    order = torch.randperm(len(asked), generator=g)
    x = torch.full((len(asked), width), 5.0)
    y = torch.full((width, len(asked)), 5.0)
    with Replayer(run) as session:
        tap("x", x, dims="t h", rows={"t": asked[order]})
        tap("y", y, dims="h t", rows={"t": asked[order]})
    expected = torch.cat([values[wanted], torch.full((8, width), 5.0)])[order]
    assert torch.equal(x, expected) and torch.equal(y, expected.T)
    log = session.log()
    assert "3 records read in part, without their digests" in log["message"][0]
    assert log["rows_found"].to_list() == [len(wanted)] * 2
    assert log["rows_missing"].to_list() == [5] * 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_every_row_is_that_of_its_id_in_thousands_of_cases(run, seed):
    r = random.Random(seed)
    options = {"match_on": r.choice(MATCHES), "replicas": r.choice(["error", *REPLICAS])}
    played(run, f"long {seed}", r.choice(MESHES), cases=40, metrics=r.random() < 0.3, **options)
