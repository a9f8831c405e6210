"""`graft diff`: which tensors of two recordings differ, where it starts, and whether it matters.

1. `pairs.pair` matches the manifests and decides what digests can decide.
2. `work` measures the rest, `spread` over ranks where there are some; or `bounds` says what
   statistics prove where elements are not read.
3. `rules` judge each pair; `Diff` has the table, the first divergences and the verdict.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Union

import polars as pl

from recorder.errors import GraftError, UsageError
from recorder.filters import Filter
from recorder.format.rows import parse_tags, seen_in, tag_columns
from recorder.ranks import Rank
from recorder.recording import Recording
from recorder.sizes import count

from ..match import MatchOn
from ..pairing.pairs import ROWS, Pairs, pair
from ..pairing.tensors import Two
from ..rename import Rename
from ..rules import Rules, floors_of
from ..steps import forgotten_step
from ..thresholds import Threshold
from .columns import COLUMNS, OUTCOMES, DiffRow, rows_of
from .indices import MOST_INDICES
from .nothing import over_nothing, why_nothing
from .small import Done, batches, measured, table_of
from .spread import ALONE, gathered, group, launched, share
from .table import Todo, assembled, base_of, fingerprint, todo_of, values_of
from .work import MEMORY, MISSING_ROWS, Crew, Options

GOOD = ("equal", "close")
_MISSING = ("only_a", "only_b")
_IS_COMPARED = pl.col("by").is_null() & ~pl.col("outcome").is_in(_MISSING)
_FARTHEST = 1 << 40  # steps
Run = Union[str, os.PathLike[str], Recording]
Bar = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Diff:
    """Two recordings compared.

    Attributes:
        a: the baseline.
        b: the target.
        table: a row a pair of tensors, in the baseline's execution order, `COLUMNS`; behind it a
            row for each index of the dim that `by` named.
        rules: how pairs were judged.
        notes: what to know of how they were matched and compared.
        floors: the folders that gave the noise floor.
        is_missing_fine: whether a key on one side alone is no difference.
        is_damaged: whether a tensor could not be read.
        is_incomplete: whether ranks ended early whose records nothing else would miss.
        why_nothing: why no pair has a record on both sides, "" where one has.
        over_nothing: the rows that are equal or close although no number was compared, with
            `empty`: for want of elements, else since all are NaN.
    """

    a: Recording
    b: Recording
    table: pl.DataFrame = field(repr=False)
    rules: Rules
    notes: tuple[str, ...]
    floors: tuple[str, ...]
    is_missing_fine: bool
    is_damaged: bool
    is_incomplete: bool
    why_nothing: str
    over_nothing: pl.DataFrame = field(repr=False)
    _crew: Crew = field(repr=False)
    _todo: Todo | None = field(repr=False)

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
        return worst_first(self.pairs.filter(pl.col("outcome") != "equal"))

    def from_first(self) -> pl.DataFrame:
        """Return the pairs that are not equal in the order of execution, from the first beyond on.

        Of those before it that are within tolerance, only the first that is not equal. Where none
        is beyond tolerance, all of them.
        """
        pairs = self.pairs.filter(pl.col("outcome") != "equal").with_row_index("at")
        begins = pairs.filter(pl.col("first").is_in(["both", "tolerance", "grafted"]))["at"].min()
        if begins is not None:
            is_before = (pl.col("at") < begins) & pl.col("outcome").is_in(GOOD)
            pairs = pairs.filter(~is_before | pl.col("first").is_not_null())
        return pairs.drop("at")

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

    def first(self, how: str) -> DiffRow | None:
        """Return the row of the first divergence, None where there is none.

        Args:
            how: `bitwise` for the first that is not equal bit for bit, `tolerance` for the first
                beyond tolerance, both of what was not grafted; `grafted` for the first beyond
                tolerance among what was.

        Raises:
            UsageError: it is none of these.
        """
        if how not in ("bitwise", "tolerance", "grafted"):
            raise UsageError(
                f"there is no first divergence {how!r}; ask for bitwise, tolerance or grafted"
            )
        both = [how] if how == "grafted" else [how, "both"]
        return next(rows_of(self.pairs.filter(pl.col("first").is_in(both))), None)

    @property
    def status(self) -> int:
        """0 where all pairs are within tolerance, 1 where not or where nothing was compared.

        What B's replay grafted is no difference, where taps behind it are compared: its record is
        what B computed there before.

        Nothing was where no pair matched, or where none of them has a number. Replicas that differ
        beyond tolerance within one side, or a recomputed forward and its first, are a difference,
        too. It is 2 where a tensor could not be read.
        """
        if self.is_damaged:
            return 2
        bad = [name for name in OUTCOMES if name not in GOOD]
        if self.is_missing_fine:
            bad = [name for name in bad if name not in _MISSING]
        # Only what comes behind a graft shows that nothing else is wrong.
        compared = ~pl.col("grafted") & pl.col("outcome").is_in(GOOD)
        last = self.pairs.filter(compared)["pair"].max()
        is_grafted = pl.col("grafted") & (pl.col("outcome") == "differs")
        is_grafted &= pl.lit(False) if last is None else pl.col("pair") < last
        wrong = self.pairs.filter(pl.col("outcome").is_in(bad) & ~is_grafted).height
        wrong += self.is_incomplete and not self.is_missing_fine
        fine = [ROWS] if self.is_missing_fine else []
        wrong += self.pairs.filter(~pl.col("apart").is_in(fine))["apart"].is_not_null().any()
        return 0 if self.compared > self.over_nothing.height and not wrong else 1

    def tensors(self, row: Mapping[str, Any]) -> Two | None:
        """Return both sides' tensors of a pair's row, put together as they were compared.

        None where they were equal by digest, or never read.

        Raises:
            DamagedRecording: they cannot be read any more.
        """
        task = self._todo.task(self._crew.pairs, row["pair"]) if self._todo else None
        ranks = row["ranks_a"], row["ranks_b"]
        for two in self._crew.twos(task) if task else ():
            if isinstance(two, Two) and (list(two.ranks_a), list(two.ranks_b)) == ranks:
                return two
        return None


def diff(
    a: Run,
    b: Run,
    *,
    filter: str | Filter | None = None,
    match_on: str | None = None,
    step_offset: int = 0,
    rename: str | Sequence[str] = (),
    manifest_only: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
    threshold: str | Sequence[str] = (),
    floor: Run | Sequence[Run] = (),
    floor_factor: float | None = None,
    by: str | None = None,
    ignore_missing: bool = False,
    missing_rows: float | None = None,
    check: bool = True,
    workers: int | None = None,
    memory: int | None = None,
    spread: bool = False,
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
        manifest_only: read no tensor: digests and statistics alone.
        rtol: relative tolerance; by default torch's for the pair of dtypes.
        atol: absolute tolerance, likewise.
        threshold: `[PATTERN:] EXPR` over measures and tags that holds of what is within tolerance.
        floor: further runs of the baseline, whose differences from it are noise.
        floor_factor: how many times the noise is still noise; 3 by default.
        by: a dim, by name or number, whose indices get rows of their own where a pair differs.
        ignore_missing: keys and rows on one side alone are no difference.
        missing_rows: the share of a side's rows that may be on that side alone; 1 by default.
        check: hold what is read against its digest.
        workers: threads; by default one a core.
        memory: bytes of tensors in memory at once, by default 2 GiB; a pair of more goes alone.
        spread: share the work with the other ranks of a torchrun; all of them must call this.
        bar: (total, what) -> a context that yields what to call with bytes that are done.

    Returns:
        The table and the verdict. Where ranks share the work, rank 0 has all of it, the others have
        no rows.

    Raises:
        RecordingError: a recording cannot be read.
        UsageError: an option cannot be used.
    """
    run_a, run_b = _opened(a), _opened(b)
    noise = [_opened(one) for one in _listed(floor)]
    _check(rtol, atol, floor_factor, step_offset, workers, memory)
    if missing_rows is not None and not 0 <= missing_rows <= 1:
        raise UsageError(f"--missing-rows is {missing_rows}; give a share from 0 to 1")
    if manifest_only and (noise or by is not None):
        what = "--floor" if noise else "--by"
        raise UsageError(f"{what} needs the tensors; leave --manifest-only out")
    chosen, on = Filter.coerce(filter), MatchOn.parse(match_on)
    renames = [Rename.parse(text) for text in _listed(rename)]
    thresholds = tuple(map(Threshold.parse, _listed(threshold)))
    if not noise and any("times_floor" in one.measures for one in thresholds):
        raise UsageError("--threshold speaks of times_floor, and there is no --floor; give one")
    rules = Rules(rtol, atol, thresholds)
    if floor_factor is not None:
        rules = replace(rules, factor=floor_factor)
    options = Options(
        rtol,
        atol,
        by,
        check,
        workers,
        MEMORY if memory is None else memory,
        MISSING_ROWS if missing_rows is None else missing_rows,
    )
    rank = launched(os.environ) if spread else ALONE
    comparison = _Comparison(options, manifest_only, bar or _no_bar, rank)
    with group(rank):
        floors = [
            comparison.of(pair(run_a, one, filter=chosen, match_on=on), Rules(rtol, atol))
            for one in noise
        ]
        if noise:
            rules = replace(rules, floors=floors_of([one.table for one in floors]))
        pairs = pair(
            run_a, run_b, filter=chosen, match_on=on, step_offset=step_offset, renames=renames
        )
        texts = {text for side in (pairs.a, pairs.b) for text in side.frame["tags"].unique()}
        on.check(texts, of_target=True)
        notes = [*pairs.notes, *pairs.skipped, *_about_thresholds(thresholds, pairs)]
        found = comparison.of(pairs, rules)
    notes += found.notes
    if rank.rank == 0 and on.use_step:
        notes += _about_steps(pairs, found.table)
    if rank.rank == 0:
        notes += [*_about_by(found.table, by), *_about_floor(found, rules)]
    made = Diff(
        run_a,
        run_b,
        found.table,
        rules,
        tuple(notes),
        tuple(str(one.path) for one in noise),
        ignore_missing,
        any(one.is_damaged for one in (found, *floors)),
        # With as many ranks on both sides, each record that is not there is missed by itself.
        run_a.world_size != run_b.world_size
        and bool(pairs.skipped or run_a.incomplete() or run_b.incomplete()),
        "",
        over_nothing(pairs, found.table),
        Crew(pairs, options),
        found.todo,
    )
    if rank.rank == 0 and not made.compared:
        return replace(made, why_nothing=why_nothing(pairs, chosen))
    return made


def worst_first(pairs: pl.DataFrame) -> pl.DataFrame:
    """Sort rows of whole tensors: the first divergences, then from the worst on."""
    severity = {name: i for i, name in enumerate(OUTCOMES)}
    odd = pl.sum_horizontal("nan_a", "nan_b", "inf_a", "inf_b").fill_null(0) > 0
    size = pl.coalesce("times_floor", "rel_diff", "at_least").fill_null(0.0)
    return pairs.sort(
        pl.col("first").is_null(),
        pl.col("outcome").replace_strict(severity, return_dtype=pl.Int32),
        ~odd,
        -size,
        "pair",
        maintain_order=True,
    )


def _no_bar(total: int, what: str) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda nbytes: None)


def _listed(given: Any) -> list[Any]:
    """Return several things as a list, one thing as a list of it."""
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _opened(run: Run) -> Recording:
    return run if isinstance(run, Recording) else Recording.open(run)


def _check(
    rtol: float | None,
    atol: float | None,
    factor: float | None,
    offset: int,
    workers: int | None,
    memory: int | None,
) -> None:
    for name, value in (("rtol", rtol), ("atol", atol), ("floor-factor", factor)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UsageError(f"--{name} is {value}; give a finite number from 0 on")
    for name, least in (("workers", workers), ("memory", memory)):
        if least is not None and least < 1:
            raise UsageError(f"--{name} is {least}; give a number from 1 on")
    if abs(offset) > _FARTHEST:
        raise UsageError(f"--step-offset is {offset}; no job has as many steps")


class _Compared(NamedTuple):
    """What comparing some pairs came to: the table, what was measured, notes."""

    table: pl.DataFrame
    todo: Todo | None = None
    notes: tuple[str, ...] = ()
    is_damaged: bool = False


class _Comparison(NamedTuple):
    """How pairs are compared, whatever they are."""

    options: Options
    manifest_only: bool
    bar: Bar
    rank: Rank

    def of(self, pairs: Pairs, rules: Rules) -> _Compared:
        base = base_of(pairs)
        todo = todo_of(pairs, base if not self.manifest_only else base.clear(), self.options.by)
        rows: list[DiffRow] = []
        done: list[Done] = []
        problem: GraftError | None = None
        own = share(todo.tasks, self.rank)
        many = share([*batches(todo.small, self.options)], self.rank)
        if own or many:
            total = sum(task.nbytes for task in own) + sum(batch.nbytes for batch in many)
            with self.bar(total, "comparing") as progress:
                try:
                    options = replace(self.options, progress=progress)
                    done = [*measured(pairs, many, options)]
                    own += todo.left_of(pairs, [n for one in done for n in one.left])
                    for found in Crew(pairs, options).measure(own):
                        rows += found
                except GraftError as err:
                    problem = err
        small = table_of(done, todo.small, self.options)
        if self.rank.world_size > 1:
            rows += rows_of(small)
            small = small.clear()
        seen = fingerprint(pairs) if self.rank.world_size > 1 else ""
        everything = gathered(rows, problem, seen, self.rank)
        if everything is None:
            return _Compared(pl.DataFrame(schema=COLUMNS))
        everything += values_of(base)
        notes = [
            f"{count(todo.unread, 'pair')} recorded without elements (--level): their statistics "
            "and digests alone were compared"
        ]
        return _Compared(
            assembled(pairs, base, everything, small, rules),
            todo,
            tuple(notes if todo.unread else ()),
            any(row.get("failed") == "damaged" for row in everything),
        )


def _about_thresholds(thresholds: Sequence[Threshold], pairs: Pairs) -> list[str]:
    """Hold thresholds against what was tapped; return what to say of them."""
    if not thresholds:
        return []
    frames = pairs.a.frame, pairs.b.frame
    names = {name for frame in frames for name in frame["name"].unique()}
    tags = {tag for frame in frames for text in frame["tags"].unique() for tag in parse_tags(text)}
    return [said for one in thresholds if names and (said := one.check(names, tags))]


def _about_steps(pairs: Pairs, table: pl.DataFrame) -> list[str]:
    """Say that one side counted no steps, where keys are on one side alone."""
    if not table["outcome"].is_in(_MISSING).any():
        return []
    seen = [seen_in(side.frame) for side in (pairs.a, pairs.b)]
    a, b = (values for _, values in seen)
    common = ({*a} & {*b}) - {"step"}
    steps = a["step"], {step - pairs.step_offset for step in b["step"]}
    repeats = [bool((side.frame["occurrence"] > 0).any()) for side in (pairs.a, pairs.b)]
    told = forgotten_step(steps, (repeats[0], repeats[1]), ("A", "B"), common)
    return [told] if told else []


def _about_by(table: pl.DataFrame, by: str | None) -> list[str]:
    """Say why a dim got no rows, where it got none and something differs."""
    whole = table.filter(
        pl.col("by").is_null() & pl.col("bitwise").eq(False) & pl.col("dim_names").is_not_null()
    )
    if by is None or whole.height == 0 or table["by"].is_not_null().any():
        return []
    known = sorted({name for names in whole["dim_names"] for name in names})
    if by in known or by.lstrip("-").isdecimal():
        return [
            f"--by {by}: no tensor that differs has such a dim, of at most {MOST_INDICES} indices"
        ]
    fused = [name for name in known if by in name.strip("()").split("*")]
    hint = f"; {fused[0]} has it fused: the dims are A's" if fused else ""
    return [f"--by {by}: no tensor that differs has such a dim; dims: {', '.join(known)}{hint}"]


def _about_floor(found: _Compared, rules: Rules) -> list[str]:
    """Say of how many pairs there is no noise to hold them against."""
    if rules.floors is None:
        return []
    off = found.table.filter(
        pl.col("by").is_null() & (pl.col("changed") > 0) & pl.col("floor_max_abs").is_null()
    )
    if not off.height:
        return []
    first = off.row(0, named=True)
    return [
        f"--floor has no noise for {count(off.height, 'pair')}, which tolerances alone judge, such "
        f"as {first['name']} {first['tags']}"
    ]
