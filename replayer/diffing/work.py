"""Measure the pairs that only their tensors can decide, on all cores.

1. `Crew.measure` takes pairs, several at once, within a bound of memory.
2. A pair's tensors are read (`by_rank`, `by_layout`), measured in segments that the crew's threads
   share (`measures`), and become one or more rows.

What a pair's rows hold depends on nothing but its tensors: not on threads, ranks or order.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from recorder.bits import as_bits
from recorder.errors import DamagedRecording, LayoutError, ShapesDiffer
from recorder.format.schema import ManifestRow
from recorder.layouts.plan import Plan
from recorder.tags import label

from ..log import joined
from ..measuring.choice import is_choice
from ..measuring.elements import unravelled
from ..measuring.measures import SEGMENT, Incomparable, Measures, measure
from ..pairing.blocks import by_layout, replicas_apart
from ..pairing.pairs import LAYOUT, RANK, ROWS, Pairs
from ..pairing.rows import Common, Shared, TwoOfRows
from ..pairing.tensors import Two, by_rank
from .beside import Beside
from .choices import fitting, flips
from .columns import DiffRow, figures_of, row_of
from .indices import rows_of_index
from .tokens import FEWER, MOSTLY, facts_of, first_off, rows_off

T = TypeVar("T")
R = TypeVar("R")

REPLICAS = "replicas"
ROWS_APART = "rows apart"
SIDES = ("A", "B")
MEMORY = 2 << 30
"""Bytes of tensors at once, by default; a pair that needs more goes alone."""
MISSING_ROWS = 1.0
"""The share of a side's rows that may be on that side alone, by default: a server computes logits
of few tokens, and has prefixes from a cache."""


@dataclass(frozen=True)
class Task:
    """One pair to measure.

    Attributes:
        pair: its number in the pairs' table.
        how: `rank`, `layout` or `rows`; `replicas` where the pair is equal, and only whether the
            baseline's ranks agree among themselves is to be seen; `A` or `B` where that side's
            recomputed forward is held against its first.
        a: the baseline's rows; of a recomputed forward, the first's.
        b: the target's rows; of a recomputed forward, its own.
        is_equal: whether digests say that both sides are the same.
    """

    pair: int
    how: str
    a: tuple[ManifestRow, ...]
    b: tuple[ManifestRow, ...]
    is_equal: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes of all its records."""
        return sum(row["nbytes"] or 0 for row in (*self.a, *self.b))


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        rtol: relative tolerance; None for torch's for the pair of dtypes.
        atol: absolute tolerance, likewise.
        by: the dim whose indices get rows of their own.
        check: hold what is read against its digest.
        workers: threads; None for one a core.
        memory: bytes of tensors at once.
        missing_rows: the share of a side's rows that may be on that side alone.
        progress: called with the bytes of each pair that is done.
    """

    rtol: float | None = None
    atol: float | None = None
    by: str | None = None
    check: bool = True
    workers: int | None = None
    memory: int = MEMORY
    missing_rows: float = MISSING_ROWS
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


@contextmanager
def threads(options: Options) -> Iterator[ThreadPoolExecutor]:
    """Give as many threads as there are to be, in which torch has one each, as here meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the pairs are what is done side by side
    try:
        with ThreadPoolExecutor(workers_of(options), initializer=_alone) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def side_by_side(function: Callable[[T], R], items: Iterable[T], options: Options) -> Iterator[R]:
    """Yield what a function returns of each item, in order, done on several threads."""
    with threads(options) as pool:
        done = [pool.submit(function, item) for item in items]
        try:
            for future in done:
                yield future.result()
        finally:
            for future in done:
                future.cancel()


def workers_of(options: Options) -> int:
    """Return how many threads are to measure."""
    return options.workers or _cores()


class Crew:
    """Threads that measure pairs.

    Args:
        pairs: what belongs together.
        options: how to measure.
    """

    def __init__(self, pairs: Pairs, options: Options) -> None:
        self.pairs, self._options = pairs, options
        self._of_thread = threading.local()
        self._room = _Room(options.memory)
        self._beside = Beside(pairs.a.recording)

    def measure(self, tasks: Sequence[Task]) -> Iterator[list[DiffRow]]:
        """Yield the rows of each pair, in order.

        A row has `pair`, `rank`, `ranks_a`, `ranks_b`, `shape_a`, `dim_names`, `message`, the
        measures, and `parts`, those of each rank's part; or `failed`, why there are none: `shape`,
        `layout` or `damaged`. One with `about` is about one side's own records instead.
        """
        # Two pools: a pair that waits for its segments must not hold the thread they need.
        with threads(self._options) as segments:
            yield from side_by_side(
                lambda task: self._rows(task, segments.map), tasks, self._options
            )

    def _rows(self, task: Task, run: Callable[..., Iterator[Any]]) -> list[DiffRow]:
        # Blocks are read, and put together into as much again.
        nbytes = task.nbytes * (2 if task.how in (LAYOUT, REPLICAS) else 1)
        if task.how == ROWS:  # which come in pieces
            nbytes = min(task.nbytes, self._options.memory)
        with self._room.of(nbytes):
            found: list[DiffRow] = []
            about: DiffRow = {}
            try:
                if task.how == ROWS:
                    found += self._of_rows(task, run)
                else:
                    for two in self.twos(task):
                        found += self._measured(task, two, run)
                about["about"] = task.how if task.how in SIDES else REPLICAS
                for two in self._within(task):
                    figures = self._figures(task, two, run)
                    found.append(row_of(self._whole(two, figures(two.a, two.b)), about))
            except Exception as err:  # one pair's failure is that pair's row, whatever it is
                found.append(row_of(_failed(err), about))
        self._options.progress(task.nbytes)
        return [{"pair": task.pair, **row} for row in found]

    def twos(self, task: Task) -> Iterator[Two | LayoutError]:
        """Yield a pair's tensors."""
        a, b = self.pairs.a.recording, self.pairs.b.recording
        check = self._options.check
        if task.how == RANK:
            yield by_rank(a, task.a[0], b, task.b[0], check=check)
        elif task.how == LAYOUT:
            yield from by_layout(a, task.a, b, task.b, check=check, plans=self._plans())
        elif task.how == ROWS:
            yield from self._common(task).twos(self._options.memory)

    def _common(self, task: Task) -> Common:
        """Return the rows that both sides of a pair have."""
        a, b = self.pairs.a.recording, self.pairs.b.recording
        shared: tuple[Shared, Shared] = self._of_thread.__dict__.setdefault("shared", ({}, {}))
        check = self._options.check
        return Common.of(a, task.a, b, task.b, check=check, shared=shared)

    def _of_rows(self, task: Task, run: Callable[..., Iterator[Any]]) -> list[DiffRow]:
        """Return the rows of a pair that is compared row by row, and what is said of each side."""
        common = self._common(task)
        counts: DiffRow = {
            "rows": common.both, "rows_a": common.only_a, "rows_b": common.only_b,
        }  # fmt: skip
        if not common.both:
            return [row_of(_failed(LayoutError(common.why_none)), counts)]
        found: list[DiffRow] = []
        if task.is_equal:
            found.append(row_of(_equal(common), counts))
        for two in () if task.is_equal else common.twos(self._options.memory):
            rows = self._measured(task, two, run)
            if rows[0]["bitwise"] is False:
                said = self._said_of(task, two)
                rows[0] = row_of(rows[0], {"message": joined(rows[0]["message"], said)})
            found += [row_of(row, counts) for row in rows]
        found += [{"about": ROWS_APART, "failed": "rows", "message": said} for said in common.apart]
        alone = common.said_alone(self._options.missing_rows)
        if alone:
            found.append({"about": ROWS, "failed": "rows", "message": alone})
        return found

    def _scores(self, task: Task, two: Two) -> torch.Tensor | None:
        """Return the baseline's scores by which a choice may have been made; None if not known."""
        if task.how not in (RANK, ROWS):
            return None
        first = task.a[0]
        for rows in self._beside.of(first, by_rows=task.how == ROWS):
            if not fitting(rows[0]["shape"], first["shape"]):
                continue
            if isinstance(two, TwoOfRows):
                return two.common.also(rows, two.start, len(two.a))
            return self.pairs.a.recording.read(rows[0], check=self._options.check)
        return None

    def _said_of(self, task: Task, two: TwoOfRows) -> str:
        """Say of rows that differ what other rows of the baseline they are, "" if none."""
        off = rows_off(two.a, two.b)
        most = FEWER * off
        if off < MOSTLY:
            return ""
        if by := two.common.shift(two, most):
            return f"each row of B is A's of the token {'before' if by < 0 else 'behind'} it"
        for tags, rows in self._beside.near(task.a[0]):
            other = two.common.also(rows, two.start, len(two.a))
            if other is not None and other.shape == two.b.shape and rows_off(other, two.b) < most:
                return f"B's rows are those of {label(task.a[0]['name'], tags)} in A"
        return ""

    def _within(self, task: Task) -> Iterator[Two]:
        """Yield tensors of one side that should be the same and are not."""
        a, b = self.pairs.a.recording, self.pairs.b.recording
        check = self._options.check
        if task.how in SIDES:
            side = a if task.how == "A" else b
            yield by_rank(side, task.a[0], side, task.b[0], check=check)
        elif task.how not in (RANK, ROWS):
            plans = self._plans()[0]
            yield from replicas_apart(a, task.a, b, task.b, check=check, plans=plans)

    def _plans(self) -> tuple[dict[Any, Plan], dict[Any, Plan]]:
        """Return a thread's own plans, of both sides."""
        plans: tuple[dict[Any, Plan], dict[Any, Plan]]
        plans = self._of_thread.__dict__.setdefault("plans", ({}, {}))
        return plans

    def _measured(
        self, task: Task, two: Two | LayoutError, run: Callable[..., Iterator[Any]]
    ) -> list[DiffRow]:
        if isinstance(two, LayoutError):
            return [_failed(two)]
        figures = self._figures(task, two, run)
        found = figures(two.a, two.b)
        row = self._whole(two, found)
        if found.bitwise:
            return [row]
        if isinstance(two, TwoOfRows):
            row = row_of(row, first_off(two, found))
        if is_choice(two.a) and is_choice(two.b):
            told = flips(two.a, two.b, self._scores(task, two))
            row = row_of(row, told, {"message": joined(row["message"], told.get("message"))})
        row["parts"] = list(_parts(two, figures))
        if self._options.by is None:
            return [row]
        by = rows_of_index(two, self._options.by, found, row)
        if isinstance(two, TwoOfRows) and by and by[0]["by"] == two.dim_names[0]:
            by = [
                one if one["bitwise"] else row_of(one, facts_of(two, one["index"] or 0))
                for one in by
            ]
        return [row, *by]

    def _figures(
        self, task: Task, two: Two, run: Callable[..., Iterator[Any]]
    ) -> Callable[[torch.Tensor, torch.Tensor], Measures]:
        """Return what measures a pair's tensors, and parts of them."""
        rtol, atol = self._options.rtol, self._options.atol
        # Threads are for what is large; small pairs are done side by side as they are.
        how = run if two.a.numel() > SEGMENT else map
        is_gradient = task.a[0]["kind"] == "grad"
        return functools.partial(measure, rtol=rtol, atol=atol, is_gradient=is_gradient, run=how)

    def _whole(self, two: Two, found: Measures) -> DiffRow:
        """Return the row of a pair as a whole."""
        places = {
            name: unravelled(at, two.a.shape)
            for name in ("max_beyond_at", "odd_at", "max_abs_at", "max_rel_at")
            if (at := getattr(found, name)) is not None
        }
        worst = places.get("odd_at") or places.get("max_beyond_at") or places.get("max_abs_at")
        if worst is None and not found.bitwise:
            worst = _first_other_bits(two)
        about: DiffRow = {
            "rank": two.rank_at(worst),
            "ranks_a": list(two.ranks_a),
            "ranks_b": list(two.ranks_b),
            "shape_a": list(two.a.shape),
            "dim_names": list(two.dim_names),
            "message": two.note,
            "parts": [],
        }
        return row_of(figures_of(found), places, about)


def _equal(common: Common) -> DiffRow:
    """Return the row of a pair whose sides are the same, which need not be read."""
    shape = list(common.shape)
    nothing: DiffRow = {
        "changed": 0, "mismatched": 0, "rel_diff": 0.0, "max_abs": 0.0, "mean_abs": 0.0,
    }  # fmt: skip
    about: DiffRow = {
        "bitwise": True, "cosine": 1.0, "numel": math.prod(shape), "shape_a": shape,
        "dim_names": list(common.dim_names), "message": "", "parts": [], "rank": None,
        "ranks_a": list(common.ranks[0]), "ranks_b": list(common.ranks[1]),
    }  # fmt: skip
    return row_of(nothing, about)


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


def _failed(err: Exception) -> DiffRow:
    if isinstance(err, ShapesDiffer):
        return {"failed": "shape", "message": str(err)}
    what = "damaged" if isinstance(err, DamagedRecording) else "layout"
    is_foreseen = isinstance(err, (LayoutError, DamagedRecording, Incomparable))
    text = str(err) if is_foreseen else f"not compared: {type(err).__name__}: {err}"
    return {"failed": what, "message": " ".join(text.split())}


def _parts(
    two: Two, figures: Callable[[torch.Tensor, torch.Tensor], Measures]
) -> Iterator[tuple[list[int], DiffRow]]:
    """Yield what each of the target's ranks holds: the ranks, and the figures of that part."""
    parts = list(two.parts())
    for ranks, one, other in parts:
        if len(parts) == 1:
            yield ranks, {"is_same": False}
            return
        part = figures(one, other)
        yield ranks, row_of(figures_of(part), {"is_same": part.bitwise})


def _first_other_bits(two: Two) -> list[int] | None:
    """Return where two tensors whose elements are all equal have other bits, as zeros may."""
    start = 0
    flat = (tensor.reshape(-1).split(SEGMENT) for tensor in (two.a, two.b))
    for a, b in zip(*flat, strict=True):
        if a.dtype != b.dtype:
            wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
            a, b = a.to(wide), b.to(wide)
        other = (as_bits(a.contiguous()) != as_bits(b.contiguous())).reshape(len(a), -1).any(-1)
        if bool(other.any()):
            return unravelled(start + int(other.to(torch.uint8).argmax()), two.a.shape)
        start += len(a)
    return None
