"""When a difference is one: rounding, thresholds, and the noise floor.

Elements beyond torch's tolerances are no fault in themselves: where large numbers cancel, one in a
thousand is off by more than its own size allows, and of 16-bit floats many are. Nor is a tensor
fine that has none of them: of one whose elements are all below the absolute tolerance, every one
may be another. So it is the errors relative to the tensor itself, its rows and its elements that
count, as `Profile` has them:

- No row may be as far off as it is large (`_AS_LARGE`) where others are not, and no factor or
  offset may explain the error, for rounding has no direction. This holds always. Where the baseline
  is all zeros, which have no size, torch's absolute tolerance decides.
- An error is rounding where it is at most `Allowance.whole`, `row` and `element`.
- Beyond these it is rounding that accumulated where it is at most `_GROWTH` times what the pair
  before, or an earlier one of the same name, had, or `_SLOW_GROWTH` times where that was beyond
  these too; where it is at most `_MOST_GROWN`; and where all before were rounding; see `History`.
- Rows of gradients are what larger numbers left: one may be `_CANCELLED` times as far off as the
  others. A gradient that is zero beside the others, but for rounding, is nothing.

Tolerances that the user gives are taken at their word.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from recorder.errors import FilterError

from .thresholds import MEASURES, Threshold

if TYPE_CHECKING:
    import polars as pl

_COARSE = 1e-3  # torch's rtol of float16; bfloat16's is larger, that of all others smaller
FloorKey = tuple[Any, ...]
Floors = Mapping[FloorKey, tuple[float, float]]
_AS_LARGE = 0.98  # of a row's size
_AS_OTHERS = 5.0  # times the median row's error
_GROWTH = 3.0
_SLOW_GROWTH, _MOST_GROWN = 2.0, 0.4
_GROWTH_OF_ONE = 6.0  # of the worst row and the worst element, which are others each time
_CANCELLED = 100.0  # times the median row's error
_CANCELLED_ROW = 0.9
_FAR = 4.0  # times what rounding of one operation comes to
_ODD_ROW = 10.0  # times the median row's error: a row of its own, and not what accumulated
_NOT_FINITE = ("nan_a", "nan_b", "inf_a", "inf_b")


class Allowance(NamedTuple):
    """Relative errors of one pair: of all of it, of a row, of an element; see the module."""

    whole: float
    row: float
    element: float

    def grown(self, usual: Allowance) -> Allowance:
        """Return what they may have grown to by the next pair.

        Args:
            usual: what rounding of one operation comes to: what is beyond that grows slowly.
        """
        times, one = _GROWTH if self.whole <= usual.whole else _SLOW_GROWTH, _GROWTH_OF_ONE
        whole = min(max(times * self.whole, usual.whole), _MOST_GROWN)
        return Allowance(whole, one * self.row, one * self.element)

    def or_more(self, other: Allowance) -> Allowance:
        """Return the greater of both, one by one."""
        return Allowance(*map(max, self, other))

    def covers(self, other: Allowance) -> bool:
        """Whether another's errors are no greater than these."""
        return all(size <= most for size, most in zip(other, self, strict=True))


def allowance(rtol: float) -> Allowance:
    """Return what rounding of one operation comes to, for dtypes with a relative tolerance.

    Clean pairs of one to a hundred operations were measured for it; see `tests/benchmarks`.
    """
    if rtol >= _COARSE:  # of 16 bits, whose unit of rounding torch takes once, of bfloat16 twice
        eps = rtol if rtol < 10 * _COARSE else rtol / 2
        return Allowance(4 * eps, 32 * eps, 32 * eps)
    return Allowance(5 * rtol, 100 * rtol, 250 * rtol)


def usual_of(rtol: float, typical: float, *, is_gradient: bool) -> Allowance:
    """Return what rounding of one operation comes to for a pair.

    Args:
        rtol: the relative tolerance of its dtypes.
        typical: its rows' median error.
        is_gradient: whether its rows are what is left of larger numbers.
    """
    usual = allowance(rtol)
    left = min(_CANCELLED * typical, _CANCELLED_ROW) if is_gradient else 0.0
    return Allowance(usual.whole, max(usual.row, left), max(usual.element, left))


def is_as_large(row: float, typical: float) -> bool:
    """Whether the worst row is as far off as it is large, while others are not."""
    return row >= _AS_LARGE and row > _AS_OTHERS * typical


@dataclass(frozen=True)
class Rules:
    """How pairs are judged.

    Attributes:
        rtol: relative tolerance; None for torch's for the pair of dtypes.
        atol: absolute tolerance, likewise.
        thresholds: the last one that fits a name decides on it, and tolerances do not.
        floors: name, tags, kind and index -> the greatest rel_diff and max_abs of noise.
        factor: how many times the noise a difference may be.
    """

    rtol: float | None = None
    atol: float | None = None
    thresholds: tuple[Threshold, ...] = ()
    floors: Floors | None = field(default=None, repr=False)
    factor: float = 3.0

    def threshold_for(self, name: str) -> Threshold | None:
        """Return the threshold that decides on taps of a name, None where tolerances do."""
        return next((one for one in reversed(self.thresholds) if one.fits(name)), None)

    def is_within(
        self, row: Mapping[str, Any], tags: Mapping[str, Any], known: Allowance | None = None
    ) -> bool:
        """Whether a difference is within tolerance.

        An element that is NaN or infinite on one side alone never is, unless a threshold speaks of
        just such elements.

        Args:
            row: the measures of a pair, with `name` and `times_floor`.
            tags: its tags.
            known: the errors that rounding came to in the pairs before.

        Raises:
            UsageError: a threshold compares what cannot be compared.
        """
        odd = any(row.get(name) for name in _NOT_FINITE)
        threshold = self.threshold_for(row["name"])
        if row.get("by") and threshold and any(row.get(m) is None for m in threshold.measures):
            threshold = None  # of an index not all measures are taken
        if threshold is None:
            noise = self._is_noise(row)
            return not odd and (noise or self._is_rounding(row, known))
        if any(row.get(name) for name in _NOT_FINITE if name not in threshold.holds.names):
            return False
        is_known = row.get("error") is not None or not row.get("changed") or _is_a_step(row)
        none = {"factor": 1.0, "offset": 0.0} if is_known else {}
        row = {**row, **{name: v for name, v in none.items() if row.get(name) is None}}
        if any(row.get(name) is None for name in threshold.measures):
            return False  # not defined for this pair, so nothing holds of it
        values = {**tags, **{name: row.get(name) for name in MEASURES}}
        values |= {name: row.get(name) for name in ("name", "step", "rank", "kind")}
        try:
            return threshold.holds(values)
        except FilterError as err:
            raise err.of("threshold") from None

    def _is_noise(self, row: Mapping[str, Any]) -> bool:
        times = row.get("times_floor")
        return times is not None and times <= self.factor

    def goes_by_rounding(self, row: Mapping[str, Any]) -> bool:
        """Whether nothing but rounding decides on a pair."""
        given = self.rtol is not None or self.atol is not None or self.threshold_for(row["name"])
        return not given and not self._is_noise(row)

    def _is_rounding(self, row: Mapping[str, Any], known: Allowance | None) -> bool:
        """Whether a difference is what rounding makes; see the module."""
        if self.rtol is not None or self.atol is not None:
            return bool(row["mismatched"] == 0)
        if row.get("by"):
            return self._is_rounding_of_index(row)
        errors = errors_of(row)
        if errors is None:  # exact, or no element more than one step off
            return row["mismatched"] == 0 or _is_a_step(row)
        if not row["l2_a"]:  # zeros have no size that an error could be of
            return bool(row["mismatched"] == 0)
        typical = row["error_typical"]
        if is_as_large(row["error_row"], typical) or row.get("fits_at") is not None:
            return False
        usual = usual_of(row["rtol"], typical, is_gradient=row["kind"] == "grad")
        if known is not None:
            # Where most rows are far off, a single element says nothing any more.
            element = math.inf if typical > _FAR * usual.whole else known.element
            row_most = min(known.row, _ODD_ROW * typical)
            usual = usual.or_more(Allowance(known.whole, row_most, element))
        return usual.covers(errors)

    def _is_rounding_of_index(self, row: Mapping[str, Any]) -> bool:
        """Whether the difference of one index is rounding: it is taken for a row."""
        if row["mismatched"] == 0:
            return True
        if None in (row.get("rel_diff"), row.get("l2_a"), row.get("max_beyond")):
            return False
        usual = allowance(row["rtol"])
        return bool(
            row["max_beyond"] <= usual.element * row["l2_a"] / math.sqrt(row["numel"])
            and 2 * row["rel_diff"] <= usual.row**2  # it is by both norms' squares
        )

    def outcome(
        self, row: Mapping[str, Any], tags: Mapping[str, Any]
    ) -> Mapping[str, str | float | None]:
        """Return the outcome of a pair by itself, and how it stands against the noise floor."""
        failed = row.get("failed")
        if failed is not None:
            return {"outcome": "shape" if failed == "shape" else "error"}
        floor = self.against_floor(row)
        if row.get("bitwise"):
            return {"outcome": "equal", **floor}
        within = self.is_within({**row, **floor}, tags)
        return {"outcome": "close" if within else "differs", **floor}

    @property
    def is_by_rounding(self) -> bool:
        """Whether nothing but rounding decides on pairs, whatever their names."""
        return self.judges_many and self.rtol is None and self.atol is None

    @property
    def judges_many(self) -> bool:
        """Whether `outcomes` can judge: without thresholds and noise floors."""
        return not self.thresholds and self.floors is None

    def outcomes(self, table: pl.DataFrame) -> pl.Series:
        """Return what `outcome` says of pairs that differ and are finite, all at once.

        Args:
            table: the measures of whole tensors, with `kind`, a row a pair.
        """
        import polars as pl

        fine = pl.col("mismatched") == 0
        if self.rtol is None and self.atol is None:
            usual = {rtol: allowance(rtol) for rtol in table["rtol"].unique()}
            each = [
                pl.col("rtol").replace_strict(
                    [*usual], [one[i] for one in usual.values()], return_dtype=pl.Float64
                )
                for i in range(3)
            ]
            typical, row = pl.col("error_typical"), pl.col("error_row")
            left = pl.min_horizontal(_CANCELLED * typical, pl.lit(_CANCELLED_ROW))
            left = pl.when(pl.col("kind") == "grad").then(left).otherwise(0.0)
            as_large = (row >= _AS_LARGE) & (row > _AS_OTHERS * typical)
            covered = (
                (pl.max_horizontal("error", "error_extreme") <= each[0])
                & (row <= pl.max_horizontal(each[1], left))
                & (pl.col("error_element") <= pl.max_horizontal(each[2], left))
            )
            is_a_step = (pl.col("rtol") > 0) & (pl.col("max_ulp") == 1)
            fine = (
                pl.when(pl.col("error").is_null())
                .then(fine | is_a_step.fill_null(False))
                .when(pl.col("l2_a") == 0)
                .then(fine)
                .otherwise(~as_large & pl.col("fits_at").is_null() & covered)
            )
        found = pl.when(fine).then(pl.lit("close")).otherwise(pl.lit("differs"))
        return table.select(found.alias("outcome"))["outcome"]

    def against_floor(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Return the noise of a row's tags, and how many times that its difference is.

        A difference's size is max_abs and the root of rel_diff, which goes by the square; of the
        two, it is the one that is more times the noise's. A row by index has that index's noise.
        """
        if self.floors is None:
            return {}
        floor = self.floors.get((row["name"], row["tags"], row["kind"], row.get("index")))
        if floor is None or (row.get("rel_diff") is None and row.get("max_abs") is None):
            return {"floor_rel_diff": None, "floor_max_abs": None, "times_floor": None}
        times = max(
            math.sqrt(_times(row.get("rel_diff"), floor[0])), _times(row.get("max_abs"), floor[1])
        )
        return {"floor_rel_diff": floor[0], "floor_max_abs": floor[1], "times_floor": times}

    def words(self) -> list[str]:
        """Say how pairs are judged, a line each."""
        tolerances = [
            f"{name} {value:g}" if value is not None else f"the {name} of the two dtypes"
            for name, value in (("rtol", self.rtol), ("atol", self.atol))
        ]
        usual = f"within tolerance: no element is further off than {' and '.join(tolerances)} allow"
        if self.rtol is None and self.atol is None:
            usual = (
                "within tolerance: off by no more than rounding explains, in the two dtypes and as "
                "it adds up from tap to tap"
            )
        if self.floors is not None:
            usual += f", or at most {self.factor:g} times the noise floor"
        return [usual, *(f"within tolerance: {one.text}" for one in self.thresholds)]


def _is_a_step(row: Mapping[str, Any]) -> bool:
    """Whether no element is further off than the next number of a dtype that is rounded."""
    return (row.get("rtol") or 0) > 0 and row.get("max_ulp") == 1


def errors_of(row: Mapping[str, Any]) -> Allowance | None:
    """Return the relative errors of a pair's row, None where they were not taken."""
    if row.get("error") is None:
        return None
    return Allowance(
        max(row["error"], row["error_extreme"]), row["error_row"], row["error_element"]
    )


def odd_place(row: Mapping[str, Any]) -> Sequence[int] | None:
    """Return the place by which a pair is known to be no rounding, None where it is no one's.

    It is an index, -1 for whole dims: where a factor or offset fits, or the worst row.
    """
    if row.get("fits_at") is not None:
        return list(row["fits_at"])
    errors = errors_of(row)
    if errors is None or errors.row <= allowance(row["rtol"]).row:
        return None
    return row.get("error_row_at")


class History:
    """The errors of the pairs so far, in the order of execution, as long as all were rounding.

    Args:
        gradient: the usual root mean square of gradients, 0 where there is none.
    """

    def __init__(self, gradient: float = 0.0) -> None:
        self._gradient = gradient
        self._of_name: dict[tuple[str, str], Allowance] = {}
        self._last: dict[str, Allowance] = {}  # of each kind
        self._most: Allowance | None = None
        self._is_whole = True

    @property
    def is_whole(self) -> bool:
        """Whether all pairs so far were within tolerance; else errors may not have grown."""
        return self._is_whole

    def known(self, row: Mapping[str, Any]) -> Allowance | None:
        """Return the errors that may have grown to a pair's; None after a fault, or at first."""
        before = self._before(row)
        if not self._is_whole or not before:
            return None
        usual = allowance(row.get("rtol") or 0.0)
        return functools.reduce(Allowance.or_more, [one.grown(usual) for one in before])

    def _before(self, row: Mapping[str, Any]) -> list[Allowance]:
        """Return the errors that a pair's may have grown from."""
        if row["kind"] == "grad":  # it is made of what the whole forward left, in another order
            return [self._most] if self._most is not None else []
        last = self._last.get(row["kind"])
        if last is None:
            return []
        return [last, self._of_name.get((row["kind"], row["name"]), last)]

    def is_nothing(self, row: Mapping[str, Any]) -> bool:
        """Whether a gradient is on both sides so small beside others that it is zero, rounded.

        That of a key's bias is: the softmax does not depend on it.
        """
        if row["kind"] != "grad" or row.get("l2_a") is None or row["mismatched"]:
            return False
        size = max(row["l2_a"], row["l2_b"]) / math.sqrt(row["numel"])
        return bool(size <= allowance(row["rtol"]).whole * self._gradient)

    def growth(self, row: Mapping[str, Any]) -> float | None:
        """Return how many times the greatest error that it may have grown from it is."""
        errors, before = errors_of(row), max((one.whole for one in self._before(row)), default=0.0)
        return errors.whole / before if errors and before else None

    def add(self, row: Mapping[str, Any], is_within: bool, is_rounding: bool) -> None:
        """Take in a pair that was judged.

        Args:
            row: the pair's.
            is_within: whether it is within tolerance.
            is_rounding: whether it is so because its error is rounding, and not by a threshold or
                the noise floor.
        """
        errors = errors_of(row)
        self._is_whole &= is_within
        if errors is None or not is_rounding:
            return
        key = row["kind"], row["name"]
        self._last[row["kind"]] = errors
        self._most = errors.or_more(self._most or errors)
        self._of_name[key] = errors.or_more(self._of_name.get(key, errors))


def _times(value: float | None, floor: float) -> float:
    if not value:
        return 0.0
    return value / floor if floor else math.inf


def floors_of(tables: Sequence[pl.DataFrame]) -> Floors:
    """Return the greatest noise of each name, tags, kind and index, over all steps and ranks."""
    found: dict[FloorKey, tuple[float, float]] = {}
    for table in tables:
        columns = table.select("name", "tags", "kind", "index", "rel_diff", "max_abs")
        for *key, rel_diff, max_abs in columns.iter_rows():
            if rel_diff is None and max_abs is None:
                continue
            known = found.get(tuple(key), (0.0, 0.0))
            found[tuple(key)] = max(known[0], rel_diff or 0.0), max(known[1], max_abs or 0.0)
    return found
