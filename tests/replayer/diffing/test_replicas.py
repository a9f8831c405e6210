"""Ranks that should hold the same and do not, although both sides agree."""

from __future__ import annotations

import pytest
import torch

from recorder import step, tap
from replayer.showing.lines import lines


def mesh(rank):
    return {"tp": (rank % 2, 2), "cp": (rank // 2, 2)}


def diffed(held, value, dims, other=None, **options):
    def job(made):
        def run(rank):
            tap("h", made(rank), dims=dims)
            step()

        return run

    worlds, meshes = (4, 4), (mesh, mesh)
    return held(job(value), job(other or value), worlds=worlds, meshes=meshes, **options)


def test_replicas_that_are_apart_alike_on_both_sides_are_found(held):
    found = diffed(held, lambda rank: torch.full((2, 4), float(rank)), "s h")
    row = found.pairs.row(0, named=True)
    assert row["outcome"] == "equal" and row["apart"] == "replicas"
    assert row["message"].startswith("replicas differ within A: rank 0 from rank 1, max_abs 1;")
    assert found.status == 1
    said = [line for line in lines(found) if line.startswith("replicas apart")]
    assert said and said[0].startswith(
        "replicas apart: 1 pair, the first h step=0: replicas differ"
    )


def test_an_axis_that_the_dims_do_not_mention_is_one_of_replicas(held):
    found = diffed(held, lambda rank: torch.full((2, 4), float(rank)), "s h[tp]")
    assert found.status == 1
    assert "rank 0,1 from rank 2,3" in found.pairs["message"][0]


def test_it_is_found_of_pairs_that_are_close_too(held):
    found = diffed(
        held,
        lambda rank: torch.full((2, 4), 1.0 + rank),
        "s h",
        lambda rank: torch.full((2, 4), 1.0 + rank) * (1 + 1e-7),
    )
    assert set(found.pairs["outcome"]) == {"close"}
    assert found.pairs["apart"].to_list() == ["replicas", None, None, None] and found.status == 1


@pytest.mark.parametrize(
    ("value", "dims"),
    [
        (lambda rank: torch.full((2, 4), float(rank % 2)), "s h[tp]"),  # blocks
        (lambda rank: torch.full((2, 4), float(rank)), "s[cp] h[tp]"),
        (lambda rank: torch.full((2, 4), float(rank)), "s h[tp] # dp:=cp"),  # other data
        (lambda rank: torch.full((2, 4), 1.0 + rank * 1e-7), "s h"),  # rounding
        (lambda rank: torch.full((2, 4), float(rank)), "s h[cp:partial,tp:partial]"),  # summands
        (lambda rank: torch.full((2, 4), float(rank)), None),  # nobody says
    ],
)
def test_what_is_no_replica_or_only_rounding_is_no_finding(held, value, dims):
    found = diffed(held, value, dims)
    assert found.status == 0 and found.pairs["apart"].null_count() == found.pairs.height


def checkpointed(value, again, dims=None):
    def run(rank):
        tap("h", value, dims=dims, layer=3)
        tap("h", again, dims=dims, layer=3, recompute=True)
        step()

    return run


@pytest.mark.parametrize("dims", [None, "s h"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_recomputed_forward_that_differs_from_its_first_is_found(held, side, dims):
    value, other = torch.ones(2, 4), torch.full((2, 4), 2.0)
    jobs = [checkpointed(value, other if s == side else value, dims) for s in "AB"]
    found = held(*jobs, worlds=(2, 2))
    apart = found.pairs.filter(apart="recompute")
    assert apart.height == (1 if dims else 2) and found.status == 1
    said = f"the recomputed forward differs from the first within {side}: on rank 0, max_abs 1;"
    assert said in apart["message"][0]
    assert any(line.startswith("recomputed otherwise: ") for line in lines(found))


def test_a_recomputed_forward_that_is_alike_on_both_sides_is_found_though_they_are_equal(held):
    job = checkpointed(torch.ones(2, 4), torch.zeros(2, 4))
    found = held(job, job)
    assert set(found.pairs["outcome"]) == {"equal"} and found.status == 1


def test_a_recomputed_forward_that_rounds_otherwise_is_no_finding(held):
    job = checkpointed(torch.ones(2, 4), torch.ones(2, 4) * (1 + 1e-7))
    found = held(job, job)
    assert found.status == 0 and found.pairs["apart"].null_count() == found.pairs.height


@pytest.mark.parametrize("other", [torch.ones(2, 4), torch.ones(2, 4) * (1 + 1e-7)])
def test_a_recomputed_forward_of_another_shape_is_found(held, other):
    again = torch.ones(1, 4)
    jobs = [checkpointed(torch.ones(2, 4), again), checkpointed(other, again)]
    found = held(*jobs)
    assert not {*found.pairs["outcome"]} & {"error", "shape"} and found.status == 1
    (said,) = found.pairs.filter(apart="recompute")["message"]
    assert "cannot be compared with the first within A: shapes [2, 4] and [1, 4]" in said


def test_what_is_within_a_side_has_the_noise_floor_of_its_tap_too(held, recorded, tmp_path):
    off = torch.ones(2, 4) * (1 + 1e-6)
    job = checkpointed(torch.ones(2, 4), off)
    floor = recorded(tmp_path / "again", checkpointed(off, torch.ones(2, 4)))
    assert held(job, job, floor=floor, threshold="times_floor < 5").status == 0
    assert held(job, job, floor=floor, threshold="times_floor < 0.5").status == 1
