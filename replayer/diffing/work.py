"""Measure the pairs that only their tensors can decide, on all cores and any number of machines.

1. `Crew.measure` takes its part of the pairs, several at once, within a bound of memory.
2. A pair's tensors are read (`tensors`), measured in segments that the crew's threads share
   (`measures`), and become one or more rows.
3. `gathered` brings the rows of all ranks of a torchrun together on rank 0.

What a pair's rows hold depends on nothing but its tensors: not on threads, ranks or order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from recorder.errors import DamagedRecording, GraftError, LayoutError, UsageError
from recorder.layouts.plan import Plan

from .measures import SEGMENT, Measures, measure
from .pairing import LAYOUT, Pairs
from .rows import measure_rows
from .tensors import Row, ShapesDiffer, Two, by_layout, by_rank

MEMORY = 2 << 30
"""Bytes of tensors at once, by default; a pair that needs more goes alone."""
MOST_BY = 1 << 20
"""Indices of a dim that get rows of their own."""


@dataclass(frozen=True)
class Task:
    """One pair to measure.

    Attributes:
        pair: its number in the pairs' table.
        how: `rank` or `layout`.
        a: the baseline's rows.
        b: the target's.
    """

    pair: int
    how: str
    a: tuple[Row, ...]
    b: tuple[Row, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all its records."""
        return sum(row["nbytes"] or 0 for row in (*self.a, *self.b))


@dataclass
class Options:
    """How to measure.

    Attributes:
        rtol: relative tolerance; None for torch's for the pair of dtypes.
        atol: absolute tolerance, likewise.
        by: the dim whose indices get rows of their own.
        check: hold what is read against its digest.
        workers: threads; None for one a core.
        memory: bytes of tensors at once.
        progress: called with the bytes of each pair that is done.
    """

    rtol: float | None = None
    atol: float | None = None
    by: str | None = None
    check: bool = True
    workers: int | None = None
    memory: int = MEMORY
    progress: Callable[[int], None] = field(default=lambda nbytes: None)


class _Room:
    """Lets callers in as long as their bytes fit; one alone always does."""

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + nbytes <= self._total)
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()


class Crew:
    """Threads that measure pairs.

    Args:
        pairs: what belongs together.
        options: how to measure.
    """

    def __init__(self, pairs: Pairs, options: Options) -> None:
        self._pairs, self._options = pairs, options
        self._of_thread = threading.local()
        self._room = _Room(options.memory)

    def measure(self, tasks: Sequence[Task]) -> Iterator[list[Row]]:
        """Yield the rows of each pair, in order.

        A row has `pair`, `rank`, `ranks_a`, `ranks_b`, `shape_a`, `labels`, `message`, the
        measures, and `parts`, those of each rank's part; or `failed`, why there are none: `shape`,
        `layout` or `damaged`.
        """
        workers = self._options.workers or _cores()
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # the pairs are what is done side by side
        try:
            with (
                ThreadPoolExecutor(workers, initializer=_alone) as pool,
                ThreadPoolExecutor(workers, initializer=_alone) as segments,
            ):
                done = [pool.submit(self._rows, task, segments.map) for task in tasks]
                try:
                    for future in done:
                        yield future.result()
                finally:
                    for future in done:
                        future.cancel()
        finally:
            torch.set_num_threads(before)

    def _rows(self, task: Task, run: Callable[..., Iterator[Any]]) -> list[Row]:
        # Blocks are read, and put together into as much again.
        nbytes = task.nbytes * (2 if task.how == LAYOUT else 1)
        with self._room.of(nbytes):
            found: list[Row] = []
            try:
                for two in self.twos(task):
                    found += self._measured(two, run)
            except (LayoutError, DamagedRecording) as err:
                found.append(_failed(err))
        self._options.progress(task.nbytes)
        return [{"pair": task.pair, **row} for row in found]

    def twos(self, task: Task) -> Iterator[Two | LayoutError]:
        """Yield a pair's tensors; see `tensors`."""
        a, b = self._pairs.a.recording, self._pairs.b.recording
        check = self._options.check
        if task.how != LAYOUT:
            yield by_rank(a, task.a[0], b, task.b[0], check=check)
            return
        plans: tuple[dict[Any, Plan], dict[Any, Plan]]
        plans = self._of_thread.__dict__.setdefault("plans", ({}, {}))
        yield from by_layout(a, task.a, b, task.b, check=check, plans=plans)

    def _measured(self, two: Two | LayoutError, run: Callable[..., Iterator[Any]]) -> list[Row]:
        if isinstance(two, LayoutError):
            return [_failed(two)]
        rtol, atol = self._options.rtol, self._options.atol
        # Threads are for what is large; small pairs are done side by side as they are.
        how = run if two.a.numel() > SEGMENT else map
        found = measure(two.a, two.b, rtol=rtol, atol=atol, run=how)
        at, relative_at = (
            _unravelled(index, two.a.shape) for index in (found.max_abs_at, found.max_rel_at)
        )
        row: Row = {
            **vars(found),
            "max_abs_at": at,
            "max_rel_at": relative_at,
            "rank": two.rank_at(at),
            "ranks_a": list(two.ranks_a),
            "ranks_b": list(two.ranks_b),
            "shape_a": list(two.a.shape),
            "labels": list(two.labels),
            "message": two.note,
            "parts": [] if found.bitwise else list(_parts(two, found)),
        }
        rows = [row]
        if self._options.by is not None and not found.bitwise:
            rows += _by(two, self._options.by, found, row)
        return rows


def _alone() -> None:
    torch.set_num_threads(1)


def _cores() -> int:
    """Return the cores that are this process's own, those of its machine shared with its peers."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    peers = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // int(peers) if peers.isdigit() and peers != "0" else cores)


def _failed(err: Exception) -> Row:
    if isinstance(err, ShapesDiffer):
        return {"failed": "shape", "message": str(err)}
    what = "damaged" if isinstance(err, DamagedRecording) else "layout"
    return {"failed": what, "message": str(err)}


def _unravelled(index: int | None, shape: Sequence[int]) -> list[int] | None:
    if index is None:
        return None
    found = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        found.append(at)
    return found[::-1]


def _parts(two: Two, found: Measures) -> Iterator[tuple[list[int], Row]]:
    """Yield what each of the target's ranks holds: the ranks, and the figures of that part."""
    parts = list(two.parts())
    for ranks, one, other in parts:
        if len(parts) == 1:
            yield ranks, {"changed": found.changed}
            return
        figures = measure_rows(one, other, (), found.rtol, found.atol)
        own = {"numel": one.numel(), "changed": int(not torch.equal(one, other))}
        yield ranks, {**own, **{name: values[0] for name, values in figures.items()}}


def dims_called(name: str, labels: Sequence[str]) -> int | None:
    """Return which dim a name means: its label, or its number, from the end where below 0."""
    if name in labels:
        return list(labels).index(name)
    if name.lstrip("-").isdigit() and -len(labels) <= int(name) < len(labels):
        return int(name) % len(labels)
    return None


def _by(two: Two, name: str, found: Measures, whole: Row) -> list[Row]:
    dim = dims_called(name, two.labels)
    if dim is None or two.a.shape[dim] > MOST_BY:
        return []
    figures = measure_rows(two.a, two.b, (dim,), found.rtol, found.atol)
    size = two.a.shape[dim]
    numel = two.a.numel() // max(1, size)
    rows = []
    for i in range(size if figures else 0):
        row = {key: values[i] for key, values in figures.items()}
        row |= {"by": two.labels[dim] if name in two.labels else name, "index": i, "numel": numel}
        row |= {"rtol": found.rtol, "atol": found.atol, "bitwise": not row["changed"]}
        row |= {key: whole[key] for key in ("ranks_a", "ranks_b", "labels", "shape_a")}
        rows.append(row)
    return rows


def distributed() -> tuple[int, int]:
    """Return this process's rank and the number of them under torchrun, else 0 and 1.

    Raises:
        UsageError: the variables of a launcher are there and do not fit together.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    if not all(name in os.environ for name in names):
        return 0, 1
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        rank, world_size = -1, 0
    if not 0 <= rank < world_size:
        raise UsageError(
            f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} do not fit "
            "together; start with torchrun, or unset them"
        )
    return rank, world_size


@contextmanager
def group(world_size: int) -> Iterator[None]:
    """Join the other processes, where there are any, for as long as this lasts."""
    import torch.distributed as dist

    mine = world_size > 1 and not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if mine:
            dist.destroy_process_group()


def share(tasks: Sequence[Task], rank: int, world_size: int) -> list[Task]:
    """Return one rank's part of the pairs: the largest go one by one to who has least."""
    if world_size == 1:
        return list(tasks)
    loads = [0] * world_size
    mine = []
    for i in sorted(range(len(tasks)), key=lambda i: (-tasks[i].nbytes, i)):
        least = loads.index(min(loads))
        loads[least] += tasks[i].nbytes + (64 << 10)  # of a small pair, most is overhead
        if least == rank:
            mine.append(i)
    return [tasks[i] for i in sorted(mine)]


def gathered(
    rows: list[Row], problem: GraftError | None, fingerprint: str, rank: int, world_size: int
) -> list[Row] | None:
    """Return the rows of all ranks on rank 0, None on the others.

    Args:
        rows: this rank's.
        problem: why it has none.
        fingerprint: of the pairs as this rank sees them.
        rank: this rank.
        world_size: how many there are.

    Raises:
        GraftError: a rank had a problem, or does not see the same recordings.
    """
    if world_size == 1:
        if problem is not None:
            raise problem
        return rows
    import torch.distributed as dist

    everyone: list[Any] | None = [None] * world_size if rank == 0 else None
    said = None if problem is None else str(problem)
    dist.gather_object((rows, said, fingerprint), everyone)
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
