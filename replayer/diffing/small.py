"""Small pairs of records that differ: read and measured many at a time.

1. `small_of` picks them: of one rank each, of one float dtype and shape, with nothing that asks for
   a closer look; `batches` puts those of one dtype and shape together.
2. `measured` reads and measures a batch; what cannot be read or is out of the ordinary is left.
3. `table_of` makes columns of the diff's table of them; `task_of` makes a pair a task of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import polars as pl
import torch

from recorder.bits import bytes_of, dtype_name
from recorder.format.rows import row_at

from ..measuring.many import AT_ONCE, DTYPES, MOST, measure_many
from ..measuring.measures import tolerances
from ..measuring.profiles import Columns
from ..pairing.pairs import RANK, TODO, Pairs
from .columns import COLUMNS
from .work import Options, Task, side_by_side, workers_of

_WIDTHS = {dtype_name(dtype): dtype.itemsize for dtype in DTYPES}
_FEWEST = 2  # pairs of one dtype and shape that are worth it
_PLACES = ("max_beyond_at", "max_abs_at", "max_rel_at")
_OF_ROW = "error_row_at"
_NUMBERS = (*_PLACES, _OF_ROW)
_SAME = {"odd_at": None, "nan_a": 0, "nan_b": 0, "inf_a": 0, "inf_b": 0, "bitwise": False}
_COLUMNS = (
    "pair", "message", "dim_names", "numel", "bitwise", "changed", "mismatched", "max_beyond",
    "max_beyond_at", "rtol", "atol", "rel_diff", "cosine", "max_abs", "max_abs_at", "max_abs_a",
    "max_abs_b", "max_rel", "max_rel_at", "max_rel_a", "max_rel_b", "mean_abs", "bias", "p50",
    "p99", "p999", "max_ulp", "l2_a", "l2_b", "nan_a", "nan_b", "inf_a", "inf_b", "odd_at", "error",
    "error_extreme", "error_row", "error_row_at", "error_typical", "error_element", "factor",
    "offset", "fits_at",
)  # fmt: skip
_OF_PAYLOAD = ("rank", "shard", "tensor", "digest")


@dataclass(frozen=True)
class Batch:
    """Pairs that are measured at once.

    Attributes:
        rows: of `small_of`, in order.
        dtype: of all of them.
        shape: likewise.
        is_gradient: whether they are gradients.
    """

    rows: pl.DataFrame
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_gradient: bool

    @property
    def nbytes(self) -> int:
        """The bytes of both sides' records."""
        return 2 * self.rows.height * math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Done:
    """A batch that was measured: the pairs' numbers and figures, and the numbers of the others."""

    batch: Batch
    numbers: list[int]
    figures: Columns
    left: list[int]


def small_of(pairs: Pairs, todo: pl.DataFrame) -> pl.DataFrame:
    """Return the pairs that may be measured many at once, a row each.

    It has the pair's number as `pair`, `a` and `b`, the rows in both sides' frames, `dtype`,
    `shape`, `is_gradient`, and of both sides' payloads rank, shard, tensor and digest.

    Args:
        pairs: what belongs together.
        todo: pairs of `table.base_of` that their tensors are to decide.
    """
    found = todo.filter((pl.col("how") == RANK) & (pl.col("state") == TODO))
    found = found.select("pair", "a", "b")
    columns = ["kind", "dtype", "shape", "nbytes", "extras", *_OF_PAYLOAD]
    for which, side in (("a", pairs.a), ("b", pairs.b)):
        facts = side.frame.select(pl.col(name).alias(f"{name}_{which}") for name in columns)
        found = found.hstack(facts[found[which]])
    sizes = found["shape_a"].unique().to_frame()
    counts = [
        None if shape is None or min(shape, default=0) < 0 else math.prod(shape)
        for shape in sizes["shape_a"].to_list()
    ]
    small = [n if n is not None and 0 < n <= MOST else None for n in counts]
    sizes = sizes.with_columns(n=pl.Series(small, dtype=pl.Int64))
    found = found.join(sizes, on="shape_a", how="left", nulls_equal=True, maintain_order="left")
    nbytes = pl.col("n") * pl.col("dtype_a").replace_strict(
        _WIDTHS, default=None, return_dtype=pl.Int64
    )
    same = [pl.col(f"{name}_a") == pl.col(f"{name}_b") for name in ("dtype", "shape", "nbytes")]
    there = [pl.col(f"{name}_{side}").is_not_null() for name in _OF_PAYLOAD for side in "ab"]
    plain = [pl.col(f"extras_{side}").is_null() for side in "ab"]
    found = found.filter(*same, *there, *plain, nbytes == pl.col("nbytes_a"))
    return found.select(
        "pair",
        "a",
        "b",
        *(f"{name}_{side}" for side in "ab" for name in _OF_PAYLOAD),
        dtype="dtype_a",
        shape="shape_a",
        is_gradient=pl.col("kind_a") == "grad",
    )


def batches(small: pl.DataFrame, options: Options) -> Iterator[Batch]:
    """Yield small pairs in batches of one dtype and shape."""
    memory = options.memory // workers_of(options)
    by = ["dtype", "shape", "is_gradient"]
    for part in small.partition_by(by, maintain_order=True):
        name, shape, is_gradient = part.select(by).row(0)
        numel = math.prod(shape)
        each = max(1, min(AT_ONCE // numel, memory // (2 * numel * _WIDTHS[name])))
        for rows in part.iter_slices(each):
            yield Batch(rows, getattr(torch, name), tuple(shape), is_gradient)


def task_of(pairs: Pairs, number: int, a: int, b: int) -> Task:
    """Return a pair of two records as a task of its own, given their rows in the sides' frames."""
    rows = (row_at(pairs.a.frame, a),), (row_at(pairs.b.frame, b),)
    return Task(number, RANK, *rows)


def measured(pairs: Pairs, given: Sequence[Batch], options: Options) -> Iterator[Done]:
    """Read and measure batches, on several threads; yield each as it is done, in order."""

    def measure(batch: Batch) -> Done:
        try:
            done = _measured(pairs, batch, options)
        except Exception:  # a pair by itself says what it is, and which of them it is
            done = Done(batch, [], {}, batch.rows["pair"].to_list())
        share = len(done.numbers) / max(1, batch.rows.height)
        options.progress(round(batch.nbytes * share))
        return done

    yield from side_by_side(measure, given, options)


def _measured(pairs: Pairs, batch: Batch, options: Options) -> Done:
    rows = batch.rows
    if rows.height < _FEWEST:
        return Done(batch, [], {}, rows["pair"].to_list())
    width = math.prod(batch.shape) * batch.dtype.itemsize
    sides, wrong = [], set()
    for which, side in (("a", pairs.a), ("b", pairs.b)):
        payloads = rows.select(f"{name}_{which}" for name in _OF_PAYLOAD).iter_rows()
        raw = torch.empty(rows.height, width, dtype=torch.uint8, device="cpu")
        into = bytes_of(raw)
        wrong.update(side.recording.read_many(list(payloads), into, width, check=options.check))
        sides.append(raw.view(batch.dtype).view(-1, *batch.shape))
    numbers = rows["pair"].to_list()
    good = [i for i in range(rows.height) if i not in wrong]
    if wrong:
        sides = [side[good] for side in sides]
    figures, kept = measure_many(
        sides[0], sides[1], rtol=options.rtol, atol=options.atol, is_gradient=batch.is_gradient
    )
    done = [numbers[good[i]] for i in kept]
    return Done(batch, done, figures, sorted({*numbers} - {*done}))


def table_of(found: Iterable[Done], small: pl.DataFrame, options: Options) -> pl.DataFrame:
    """Return the figures of small pairs as rows of the diff's table, in order.

    It has `pair` and the columns that are measured.

    Args:
        found: what was measured.
        small: of `small_of`.
        options: how it was.
    """
    groups: dict[tuple[torch.dtype, tuple[int, ...]], tuple[list[int], Columns]] = {}
    for done in found:
        numbers, figures = groups.setdefault((done.batch.dtype, done.batch.shape), ([], {}))
        numbers += done.numbers
        for name, values in done.figures.items():
            figures.setdefault(name, []).extend(values)
    schema = {**COLUMNS, "pair": pl.UInt32()}
    parts = [pl.DataFrame(schema={name: schema[name] for name in _COLUMNS})]
    for (dtype, shape), (numbers, figures) in groups.items():
        if not numbers:
            continue
        usual = tolerances(dtype, dtype)
        about = {
            **_SAME,
            "numel": math.prod(shape),
            "rtol": usual[0] if options.rtol is None else options.rtol,
            "atol": usual[1] if options.atol is None else options.atol,
            "dim_names": list(map(str, range(len(shape)))),
            "message": "",
        }
        types = {name: pl.Int64 if name in _NUMBERS else schema[name] for name in figures}
        part = pl.DataFrame({"pair": numbers, **figures}, schema={"pair": pl.UInt32, **types})
        parts.append(
            part.with_columns(
                *(_unravelled(name, shape) for name in _PLACES),
                _unravelled(_OF_ROW, shape[:-1], [-1] * len(shape[-1:])),
                *(pl.lit(value, schema[name]).alias(name) for name, value in about.items()),
            )
        )
    ranks = small.select("pair", ranks_differ=pl.concat_list("rank_b"))
    table = pl.concat(part.select(_COLUMNS) for part in parts)
    return table.sort("pair").join(ranks, on="pair", how="left", maintain_order="left")


def _unravelled(name: str, shape: Sequence[int], rest: Sequence[int] = ()) -> pl.Expr:
    """Return numbers of elements as lists of indices and what follows, null where they are."""
    at, indices = pl.col(name), [pl.lit(index, pl.Int64) for index in rest]
    for size in reversed(shape):
        indices.insert(0, at % size)
        at = at // size
    place = pl.concat_list(indices) if indices else pl.lit([], pl.List(pl.Int64))
    return pl.when(pl.col(name).is_not_null()).then(place).alias(name)
