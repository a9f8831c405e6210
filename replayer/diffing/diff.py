"""`graft diff`: which tensors of two recordings differ, where it starts, and whether it matters.

1. `pairing.pair` matches the manifests and decides what digests can decide.
2. `work` measures the rest, or `bounds` says what statistics prove where elements are not read.
3. `rules` judge each pair; `Diff` has the table, the first divergences and the verdict.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Union

import polars as pl

from recorder.errors import GraftError, UsageError
from recorder.filters import Filter
from recorder.format.recording import Recording
from recorder.format.rows import parse_tags, tag_columns
from recorder.sizes import count
from recorder.tags import label

from ..match import MatchOn
from . import table as table_of
from .pairing import Pairs, pair
from .rename import Rename
from .rules import Rules, Threshold, floors_of
from .table import COLUMNS, OUTCOMES
from .work import MEMORY, Crew, Options, Task, distributed, gathered, group, share

GOOD = ("equal", "close")
_MISSING = ("only_a", "only_b")
_IS_COMPARED = pl.col("by").is_null() & ~pl.col("outcome").is_in(_MISSING)
Run = Union[str, os.PathLike[str], Recording]
Bar = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Diff:
    """Two recordings held against each other.

    Attributes:
        a: the baseline.
        b: the target.
        table: a row a pair of tensors, in the baseline's execution order, `COLUMNS`; behind it a
            row for each index of the dim that `by` named.
        rules: how pairs were judged.
        notes: what to know of how they were matched and compared.
        floors: the folders that gave the noise floor.
        is_missing_fine: whether a key on one side alone is no difference.
        why_nothing: why no pair has a record on both sides, "" where one has.
        is_damaged: whether a tensor could not be read.
        crew: what reads the tensors of `tasks` again.
        tasks: the pairs whose tensors were read.
    """

    a: Recording
    b: Recording
    table: pl.DataFrame = field(repr=False)
    rules: Rules
    notes: tuple[str, ...] = ()
    floors: tuple[str, ...] = ()
    is_missing_fine: bool = False
    why_nothing: str = ""
    is_damaged: bool = False
    crew: Crew | None = field(default=None, repr=False)
    tasks: Sequence[Task] = field(default=(), repr=False)

    @property
    def pairs(self) -> pl.DataFrame:
        """The table's rows of whole tensors."""
        return self.table.filter(pl.col("by").is_null())

    def counts(self) -> dict[str, int]:
        """Return how many pairs came to each outcome, from the worst outcome on."""
        found = dict(self.pairs.group_by("outcome").len().iter_rows())
        return {name: found.get(name, 0) for name in OUTCOMES}

    def worst(self) -> pl.DataFrame:
        """Return the pairs that are not equal: the first divergences, then from the worst on."""
        severity = {name: i for i, name in enumerate(OUTCOMES)}
        odd = pl.sum_horizontal("nan_a", "nan_b", "inf_a", "inf_b").fill_null(0) > 0
        size = pl.coalesce("times_floor", "rel_diff", "at_least").fill_null(0.0)
        return self.pairs.filter(pl.col("outcome") != "equal").sort(
            pl.col("first").is_null(),
            pl.col("outcome").replace_strict(severity, return_dtype=pl.Int32),
            ~odd,
            -size,
            "pair",
            maintain_order=True,
        )

    def with_tags(self) -> pl.DataFrame:
        """Return the table with one more column per tag, beside the name.

        A tag with the name of one of its columns gets `tag.` before it.
        """
        tags = tag_columns(self.table)
        order = [*COLUMNS]
        at = order.index("name") + 1
        return self.table.hstack(tags).select(*order[:at], *tags.columns, *order[at:])

    @property
    def compared(self) -> int:
        """How many pairs have a record on both sides."""
        return self.table.filter(_IS_COMPARED).height

    def first(self, how: str) -> dict[str, Any] | None:
        """Return the row of the first divergence, None where there is none.

        Args:
            how: `bitwise` for the first that is not equal bit for bit, `tolerance` for the first
                beyond tolerance.

        Raises:
            UsageError: it is neither.
        """
        if how not in ("bitwise", "tolerance"):
            raise UsageError(f"there is no first divergence {how!r}; ask for bitwise or tolerance")
        rows = self.pairs.filter(pl.col("first").is_in([how, "both"]))
        return rows.row(0, named=True) if rows.height else None

    @property
    def status(self) -> int:
        """0 where all pairs are within tolerance, 1 where not or where nothing matched.

        It is 2 where a tensor could not be read.
        """
        if self.is_damaged:
            return 2
        bad = [name for name in OUTCOMES if name not in GOOD]
        if self.is_missing_fine:
            bad = [name for name in bad if name not in _MISSING]
        wrong = self.pairs.filter(pl.col("outcome").is_in(bad)).height
        return 0 if self.compared and not wrong else 1


def diff(
    a: Run,
    b: Run,
    *,
    filter: str | Filter | None = None,
    match_on: str | None = None,
    step_offset: int = 0,
    rename: str | Sequence[str] = (),
    manifest: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
    threshold: str | Sequence[str] = (),
    floor: Run | Sequence[Run] = (),
    floor_factor: float = 3.0,
    by: str | None = None,
    ignore_missing: bool = False,
    check: bool = True,
    workers: int | None = None,
    memory: int = MEMORY,
    bar: Bar | None = None,
) -> Diff:
    """Compare two recordings.

    Args:
        a: the baseline, a recording or its folder.
        b: the target.
        filter: which records take part, in the baseline's names and steps.
        match_on: tags that count for a match, or `order`; by default the whole key.
        step_offset: the target's step s belongs to the baseline's s + step_offset.
        rename: `A=B`: what the baseline calls A, the target calls B; places in braces.
        manifest: read no tensor: digests and statistics alone.
        rtol: relative tolerance; by default torch's for the pair of dtypes.
        atol: absolute tolerance, likewise.
        threshold: `[PATTERN:] EXPR` over measures and tags that holds of what is within tolerance.
        floor: further runs of the baseline, whose differences from it are noise.
        floor_factor: how many times the noise is still noise.
        by: a dim, by name or number, whose indices get rows of their own where a pair differs.
        ignore_missing: keys on one side alone are no difference.
        check: hold what is read against its digest.
        workers: threads; by default one a core.
        memory: bytes of tensors in memory at once.
        bar: (total, what) -> a context that yields what to call with bytes that are done.

    Returns:
        The table and the verdict. Under torchrun, that of rank 0 is of all, the others' has no row.

    Raises:
        RecordingError: a recording cannot be read.
        UsageError: an option cannot be used.
    """
    ours, theirs = _opened(a), _opened(b)
    noise = [_opened(one) for one in _listed(floor)]
    chosen = Filter.coerce(filter)
    options = Options(rtol, atol, by, check, workers, memory)
    _check_numbers(rtol, atol, floor_factor)
    rules = Rules(rtol, atol, tuple(map(Threshold.parse, _listed(threshold))), None, floor_factor)
    bar = bar or (lambda total, what: nullcontext(lambda nbytes: None))
    on, renames = MatchOn.parse(match_on), [Rename.parse(text) for text in _listed(rename)]
    rank, world_size = distributed()
    with group(world_size):
        compared = functools.partial(
            _compared, options=options, manifest=manifest, bar=bar, rank=rank, world_size=world_size
        )
        if noise:
            runs = [
                compared(pair(ours, one, filter=chosen, match_on=on), Rules(rtol, atol))
                for one in noise
            ]
            rules = replace(rules, floors=floors_of([run.table for run in runs]))
        pairs = pair(
            ours, theirs, filter=chosen, match_on=on, step_offset=step_offset, renames=renames
        )
        found = compared(pairs, rules)
    notes = [*pairs.notes, *found.notes]
    nothing = ""
    if rank == 0:
        notes += _about_by(found.table, by)
        if not found.table.filter(_IS_COMPARED).height:
            nothing = _why_nothing(pairs, chosen)
    return Diff(
        ours, theirs, found.table, rules, tuple(notes), tuple(str(one.path) for one in noise),
        ignore_missing, nothing, found.is_damaged, Crew(pairs, options), found.tasks,
    )  # fmt: skip


def _listed(given: Any) -> list[Any]:
    """Return several things as a list, one thing as a list of it."""
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _opened(run: Run) -> Recording:
    return run if isinstance(run, Recording) else Recording.open(run)


def _check_numbers(rtol: float | None, atol: float | None, factor: float) -> None:
    for name, value in (("rtol", rtol), ("atol", atol), ("floor-factor", factor)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UsageError(f"--{name} is {value}; give a finite number from 0 on")


class _Compared(NamedTuple):
    """What comparing some pairs came to: the table, the pairs whose tensors were read, notes."""

    table: pl.DataFrame
    tasks: Sequence[Task] = ()
    notes: tuple[str, ...] = ()
    is_damaged: bool = False


def _compared(
    pairs: Pairs,
    rules: Rules,
    *,
    options: Options,
    manifest: bool,
    bar: Bar,
    rank: int,
    world_size: int,
) -> _Compared:
    base = table_of.base(pairs)
    tasks, unread = ([], 0) if manifest else table_of.tasks(pairs, base)
    rows: list[dict[str, Any]] = []
    problem: GraftError | None = None
    mine = share(tasks, rank, world_size)
    if mine:
        with bar(sum(task.nbytes for task in mine), "comparing") as progress:
            try:
                for found in Crew(pairs, replace(options, progress=progress)).measure(mine):
                    rows += found
            except GraftError as err:
                problem = err
    seen = table_of.fingerprint(pairs) if world_size > 1 else ""
    everything = gathered(rows, problem, seen, rank, world_size)
    if everything is None:
        return _Compared(pl.DataFrame(schema=COLUMNS))
    everything += table_of.values(base)
    notes = [
        f"{count(unread, 'pair')} recorded without elements (--level): their statistics and "
        "digests alone were compared"
    ]
    return _Compared(
        table_of.assembled(pairs, base, everything, rules),
        tasks,
        tuple(notes if unread else ()),
        any(row.get("failed") == "damaged" for row in everything),
    )


def _about_by(table: pl.DataFrame, by: str | None) -> list[str]:
    """Say why a dim got no rows, where it got none and something differs."""
    whole = table.filter(pl.col("by").is_null() & pl.col("bitwise").eq(False))
    if by is None or whole.height == 0 or table["by"].is_not_null().any():
        return []
    known = sorted({name for labels in whole["labels"].drop_nulls() for name in labels})
    return [f"--by {by}: no tensor that differs has such a dim; dims: {', '.join(known) or 'none'}"]


def _why_nothing(pairs: Pairs, filter: Filter | None) -> str:
    """Say why no pair has a record on both sides."""
    for side, seen in zip((pairs.a, pairs.b), pairs.seen, strict=True):
        if not seen:
            return f"nothing matched: {side.recording.path} is empty, no tap was recorded in it"
    frames = pairs.a.frame, pairs.b.frame
    if filter is not None and not all(frame.height for frame in frames):
        rows = [side.recording.latest() for side in (pairs.a, pairs.b)]
        tags = {t for frame in rows for text in frame["tags"].unique() for t in parse_tags(text)}
        names = {name for frame in rows for name in frame["name"].unique()}
        which = " and ".join(s for s, frame in zip("AB", frames, strict=True) if not frame.height)
        return f"nothing matched: in {which}, {filter.why_nothing(tags, names)}"
    ours, theirs = (sorted(frame["name"].unique()) for frame in frames)
    facts = [f"A has taps {_some(ours)}", f"B has {_some(theirs)}"]
    if set(ours) & set(theirs):
        a, b = (sorted(frame["step"].unique()) for frame in frames)
        facts = [f"A has steps {_span(a)}, B has {_span(b)}"] if not set(a) & set(b) else []
        name = next(name for name in ours if name in theirs)
        one, other = (
            label(*frame.filter(pl.col("name") == name).select("name", "tags").row(0))
            for frame in frames
        )
        facts.append(f"{one!r} in A, {other!r} in B")
    return (
        f"nothing matched: {'; '.join(facts)}; see --rename, --match-on and --step-offset, and "
        "graft ls"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _span(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])
