"""Spread pairs over the ranks of a torchrun, on any number of machines, and gather their rows.

1. `group` joins the ranks, `share` gives each its part of the pairs.
2. `gathered` brings all rows together on rank 0, and checks that all saw the same recordings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from recorder.bits import bytes_of
from recorder.errors import GraftError, UsageError
from recorder.ranks import Rank, from_variables

from .columns import DiffRow

ALONE = Rank(0, 1, "default")
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched(environment: Mapping[str, str]) -> Rank:
    """Return this process's rank where a launcher such as torchrun started several, else 0 of 1.

    Raises:
        UsageError: its variables are there and do not fit together.
    """
    if not all(name in environment for name in _LAUNCHED):
        return ALONE
    return from_variables(environment, "RANK", "WORLD_SIZE") or ALONE


@contextmanager
def group(rank: Rank) -> Iterator[None]:
    """Join the other ranks, where there are any, for as long as this lasts."""
    import torch.distributed as dist

    joins = rank.world_size > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if joins:
            dist.destroy_process_group()


def joined() -> bool:
    """Whether the other ranks are there."""
    import torch.distributed as dist

    return dist.is_initialized()


class Sized(Protocol):
    """What has a size: a pair to measure, or several at once."""

    @property
    def nbytes(self) -> int:
        """The bytes of all its records."""


S = TypeVar("S", bound=Sized)


def share(tasks: Sequence[S], rank: Rank) -> list[S]:
    """Return one rank's part of the pairs: the largest go one by one to who has least."""
    if rank.world_size == 1:
        return list(tasks)
    loads = [0] * rank.world_size
    chosen = []
    for i in sorted(range(len(tasks)), key=lambda i: (-tasks[i].nbytes, i)):
        least = loads.index(min(loads))
        loads[least] += tasks[i].nbytes + (64 << 10)  # of a small pair, most is overhead
        if least == rank.rank:
            chosen.append(i)
    return [tasks[i] for i in sorted(chosen)]


def gathered(
    rows: list[DiffRow], problem: GraftError | None, fingerprint: str, rank: Rank
) -> list[DiffRow] | None:
    """Return the rows of all ranks on rank 0, None on the others.

    Args:
        rows: this rank's.
        problem: why it has none.
        fingerprint: of the pairs as this rank sees them.
        rank: this rank.

    Raises:
        GraftError: a rank had a problem, or does not see the same recordings.
    """
    if rank.world_size == 1:
        if problem is not None:
            raise problem
        return rows
    said = None if problem is None else str(problem)
    everyone = _to_rank_0([rows, said, fingerprint], rank)
    if everyone is None:
        return None
    for i, (_, said, _) in enumerate(everyone):
        if said is not None:
            raise GraftError(said if i == 0 else f"on rank {i}: {said}")
    if len({seen for _, _, seen in everyone}) > 1:
        raise UsageError(
            "the ranks do not see the same recordings; give each the same folders, and wait until "
            "nothing writes into them"
        )
    return [row for part, _, _ in everyone for row in part]


def _to_rank_0(own: Any, rank: Rank) -> list[Any] | None:
    """Return what each rank has, on rank 0, None on the others.

    It travels as JSON, which keeps every digit; torch's own way to gather objects needs numpy.
    """
    import torch
    import torch.distributed as dist

    data = json.dumps(own).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(rank.world_size)]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    room = max(int(size) for size in sizes)
    sent = torch.zeros(room, dtype=torch.uint8)
    sent[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty_like(sent) for _ in sizes] if rank.rank == 0 else None
    dist.gather(sent, parts)
    if parts is None:
        return None
    texts = (bytes(bytes_of(part)[: int(size)]) for part, size in zip(parts, sizes, strict=True))
    return [json.loads(text) for text in texts]
