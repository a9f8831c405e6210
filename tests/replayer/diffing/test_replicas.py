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
    assert row["outcome"] == "equal" and row["replicas"] is True
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
    assert found.pairs["replicas"].to_list() == [True, None, None, None] and found.status == 1


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
    assert found.status == 0 and found.pairs["replicas"].null_count() == found.pairs.height
