"""Two recordings to hold against each other, made in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder import Recorder, Recording, declare_mesh, tap
from replayer import Diff, diff


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch's own threads, which small tensors have no use for, wait long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def recorded() -> Callable[..., Recording]:
    """Record `job(rank)` on each rank, all in this process; `mesh(rank)` is declared before."""

    def recorded(
        folder: Path,
        job: Callable[[int], Any],
        world_size: int = 1,
        mesh: Callable[[int], dict[str, Any]] | None = None,
        **options: Any,
    ) -> Recording:
        for rank in range(world_size):
            declare_mesh(**(mesh(rank) if mesh else {}))
            with Recorder(folder, rank=rank, world_size=world_size, **options):
                job(rank)
        declare_mesh()
        return Recording.open(folder)

    return recorded


@pytest.fixture
def held(tmp_path: Path, recorded: Callable[..., Recording]) -> Callable[..., Diff]:
    """Record one tensor `x`, or a job, on each side, and diff them."""

    def held(
        a: Any,
        b: Any,
        worlds: tuple[int, int] = (1, 1),
        meshes: tuple[Any, Any] = (None, None),
        level: str = "tensors",
        **options: Any,
    ) -> Diff:
        sides = []
        for i, what in enumerate((a, b)):
            job = what if callable(what) else (lambda rank, t=what: tap("x", t))
            folder = tmp_path / f"{'AB'[i]}{len(list(tmp_path.iterdir()))}"
            sides.append(recorded(folder, job, worlds[i], meshes[i], level=level))
        return diff(*sides, **options)

    return held
