"""Which rank this process is, and of how many.

In this order: `GRAFT_RANK` and `GRAFT_WORLD_SIZE`; torch.distributed's default group where it is
initialised; the launcher's `RANK` and `WORLD_SIZE`; else 0 of 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from .errors import UsageError

MAX_WORLD_SIZE = 100_000  # this only stops nonsense


@dataclass(frozen=True)
class Rank:
    """A rank, its world size, and where they were found."""

    rank: int
    world_size: int
    source: str

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} ({self.source})"

    @cached_property
    def is_final(self) -> bool:
        """Whether no process group that comes up later can say otherwise."""
        return self.source not in ("RANK and WORLD_SIZE", "default")


class RankWatch:
    """A session's rank, and whether a process group that comes up later contradicts it.

    Args:
        rank: given together with `world_size`, or neither: then as `current_rank` finds it.
        world_size: the number of ranks.

    Raises:
        UsageError: only one of the two is given, or the rank lies outside its world.
    """

    def __init__(self, rank: int | None = None, world_size: int | None = None) -> None:
        if (rank is None) != (world_size is None):
            raise UsageError("rank and world_size go together; give both or neither")
        if rank is not None and world_size is not None:
            self._set(checked(rank, world_size, "rank and world_size"))
        else:
            self._set(current_rank())

    def _set(self, rank: Rank) -> None:
        self.current = rank
        self.is_unsettled = not rank.is_final

    def contradiction(self, committed: bool) -> str | None:
        """Look again; a rank that nothing was done under yet is corrected.

        Args:
            committed: whether something was done under the rank.

        Returns:
            What is wrong where the rank proved different too late, else None.
        """
        if self.current.is_final:
            return None
        group = from_group()
        if group is None:
            return None
        current = self.current
        if (group.rank, group.world_size) == (current.rank, current.world_size) or not committed:
            self._set(group)
            return None
        return (
            f"this process worked as {current} before torch.distributed came up as {group}; "
            "set GRAFT_RANK and GRAFT_WORLD_SIZE, or initialise the group before the first tap"
        )


def current_rank(environ: Mapping[str, str] = os.environ) -> Rank:
    """Return this process's rank.

    Raises:
        UsageError: a variable is no number, out of range, or one of a pair is missing.
    """
    explicit = from_variables(environ, "GRAFT_RANK", "GRAFT_WORLD_SIZE")
    if explicit is not None:
        return explicit
    group = from_group()
    if group is not None:
        return group
    return from_variables(environ, "RANK", "WORLD_SIZE") or Rank(0, 1, "default")


def is_group_up() -> bool:
    """Whether torch.distributed has a default group."""
    dist = sys.modules.get("torch.distributed")  # not imported: then no group can be up
    return dist is not None and _can_have_groups(dist) and dist.is_initialized()


@cache
def _can_have_groups(dist: Any) -> bool:
    return bool(dist.is_available())


def from_group() -> Rank | None:
    """Return the rank in torch.distributed's default group, or None where there is none."""
    if not is_group_up():
        return None
    dist = sys.modules["torch.distributed"]
    return Rank(dist.get_rank(), dist.get_world_size(), "torch.distributed")


def from_variables(environ: Mapping[str, str], rank: str, world: str) -> Rank | None:
    """Return the rank that a pair of variables gives, or None where neither is set."""
    texts = {name: environ.get(name) for name in (rank, world)}
    missing = [name for name, text in texts.items() if not text]
    if len(missing) == 2:
        return None
    if missing:
        (present,) = set(texts) - set(missing)
        if texts[present] == ("1" if present == world else "0"):
            return None  # half a pair that says no more than the default
        raise UsageError(f"{present} is set but {missing[0]} is not; set both or neither")
    numbers = {}
    for name, text in texts.items():
        if text is None or not text.strip().isascii() or not text.strip().isdigit():
            raise UsageError(f"{name}={text!r} is not a number from 0 up; set it to one")
        numbers[name] = int(text)
    return checked(numbers[rank], numbers[world], f"{rank} and {world}")


def checked(rank: int, world_size: int, source: str) -> Rank:
    """Return the rank, or raise `UsageError` where it does not lie in its world."""
    if not 0 < world_size <= MAX_WORLD_SIZE or not 0 <= rank < world_size:
        raise UsageError(
            f"{source} give rank {rank} of a world of {world_size}; "
            "a rank counts from 0 to world size - 1"
        )
    return Rank(rank, world_size, source)
