"""When a difference is one: tolerances, thresholds by name, and the noise floor.

Elements beyond torch's tolerances are no fault in themselves: where large numbers cancel, one in a
thousand is off by more than its own size allows, and of 16-bit floats many are. They are taken for
rounding where none is off by more than `Slack.each` times the baseline's root mean square, all of
them together by no more than `Slack.together` times its norm, and they are no more than
`Slack.share` of the elements. Tolerances that the user gives are taken at their word.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from recorder.errors import FilterError, UsageError
from recorder.filters import Filter

if TYPE_CHECKING:
    import polars as pl

MEASURES = (
    "numel", "changed", "mismatched", "max_beyond", "max_abs", "max_rel", "mean_abs", "bias",
    "rel_diff", "cosine", "p50", "p99", "p999", "max_ulp", "l2_a", "l2_b", "nan_a", "nan_b",
    "inf_a", "inf_b", "times_floor",
)  # fmt: skip
"""What a threshold can speak of, beside the tags."""
_COARSE = 1e-3  # torch's rtol of float16; bfloat16's is larger, that of all others smaller
FloorKey = tuple[Any, ...]
Floors = Mapping[FloorKey, tuple[float, float]]
_NOT_FINITE = ("nan_a", "nan_b", "inf_a", "inf_b")
_PATTERN = re.compile(r"\s*([^\s:\"'()<>=!,]+)\s*:(.*)", re.DOTALL)


class Slack(NamedTuple):
    """How much is taken for rounding; see the module."""

    each: float
    together: float
    share: float


def slack(rtol: float) -> Slack:
    """Return how much is taken for rounding of dtypes with a relative tolerance."""
    if rtol >= _COARSE:  # 16 bits
        return Slack(2 * math.sqrt(rtol), 2 * rtol, 1.0)
    return Slack(250 * rtol, 10 * rtol, 0.01)


@dataclass(frozen=True)
class Threshold:
    """What is within tolerance, for taps whose name fits a pattern.

    Attributes:
        text: as typed.
        pattern: for the name, as a shell has it; `*` for all.
        holds: the expression that is true of what is within.
    """

    text: str
    pattern: str
    holds: Filter

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Read `[PATTERN:] EXPR`.

        Raises:
            UsageError: the expression cannot be read, or speaks of no measure.
        """
        found = _PATTERN.fullmatch(text)
        pattern, expression = found.groups() if found else ("*", text)
        try:
            holds = Filter.parse(expression)
        except FilterError as err:
            raise err.of("threshold") from None
        if not _is_boolean(ast.parse(holds.text, mode="eval").body):
            raise UsageError(
                f"--threshold {text!r} is neither true nor false; compare, as in rel_diff < 1e-4"
            )
        if not holds.names & set(MEASURES):
            raise UsageError(
                f"--threshold {text!r} speaks of no measure; write what is within tolerance, as in "
                f"'attn_*: rel_diff < 1e-4 and mismatched == 0'; measures: {', '.join(MEASURES)}"
            )
        return cls(text, pattern, holds)

    @property
    def measures(self) -> frozenset[str]:
        """The measures it speaks of."""
        return self.holds.names & set(MEASURES)

    def check(self, names: Collection[str], tags: Collection[str]) -> str:
        """Compare it with what was tapped; return what to say of it.

        Raises:
            UsageError: a name in it is not a tag, and is nearly that of a measure.
        """
        unknown = self.holds.names - {*MEASURES, *tags, "name", "step", "rank", "kind"}
        for name in sorted(unknown):
            close = difflib.get_close_matches(name, MEASURES, 3)
            if close:
                raise UsageError(
                    f"--threshold {self.text!r} speaks of {name!r}, neither a measure nor a tag, "
                    f"closest: {', '.join(close)}"
                )
            return f"--threshold {self.text!r}: no tap carries the tag {name!r}"
        if not any(map(self.fits, names)):
            return f"--threshold {self.text!r} fits no tap; taps: {', '.join(sorted(names)[:6])}"
        return ""

    def fits(self, name: str) -> bool:
        """Whether it is for taps of a name."""
        return fnmatch.fnmatchcase(name, self.pattern)


def _is_boolean(node: ast.expr) -> bool:
    """Whether an expression is true or false by itself, and not a number taken for that."""
    if isinstance(node, ast.BoolOp):
        return all(map(_is_boolean, node.values))
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not) and _is_boolean(node.operand)
    if isinstance(node, ast.IfExp):
        return _is_boolean(node.body) and _is_boolean(node.orelse)
    if isinstance(node, ast.Call):
        return not (isinstance(node.func, ast.Name) and node.func.id == "len")
    return isinstance(node, ast.Compare) or (
        isinstance(node, ast.Constant) and isinstance(node.value, bool)
    )


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

    def is_within(self, row: Mapping[str, Any], tags: Mapping[str, Any]) -> bool:
        """Whether a difference is within tolerance.

        An element that is NaN or infinite on one side alone never is, unless a threshold speaks of
        just such elements.

        Args:
            row: the measures of a pair, with `name` and `times_floor`.
            tags: its tags.

        Raises:
            UsageError: a threshold compares what cannot be compared.
        """
        odd = any(row.get(name) for name in _NOT_FINITE)
        threshold = self.threshold_for(row["name"])
        if row.get("by") and threshold and any(row.get(m) is None for m in threshold.measures):
            threshold = None  # of an index not all measures are taken
        if threshold is None:
            times = row.get("times_floor")
            noise = times is not None and times <= self.factor
            return row["mismatched"] == 0 or (not odd and (noise or self._is_rounding(row)))
        if any(row.get(name) for name in _NOT_FINITE if name not in threshold.holds.names):
            return False
        if any(row.get(name) is None for name in threshold.measures):
            return False  # not defined for this pair, so nothing holds of it
        known = {**tags, **{name: row.get(name) for name in MEASURES}}
        known |= {name: row.get(name) for name in ("name", "step", "rank", "kind")}
        try:
            return threshold.holds(known)
        except FilterError as err:
            raise err.of("threshold") from None

    def _is_rounding(self, row: Mapping[str, Any]) -> bool:
        """Whether the elements beyond tolerance are so few and so little off; see the module."""
        given = self.rtol is not None or self.atol is not None
        if given or None in (row.get("rel_diff"), row.get("l2_a"), row.get("max_beyond")):
            return False
        few, numel = slack(row["rtol"]), row["numel"]
        return bool(
            row["mismatched"] <= few.share * numel
            and row["max_beyond"] <= few.each * row["l2_a"] / math.sqrt(numel)
            and 2 * row["rel_diff"] <= few.together**2  # it is by both norms' squares
        )

    def against_floor(self, row: Mapping[str, Any], tags: str) -> dict[str, float | None]:
        """Return the noise of a row's tags, and how many times that its difference is.

        A difference's size is max_abs and the root of rel_diff, which goes by the square; of the
        two, it is the one that is more times the noise's. A row by index has that index's noise.
        """
        if self.floors is None:
            return {}
        floor = self.floors.get((row["name"], tags, row["kind"], row.get("index")))
        if floor is None or (row.get("rel_diff") is None and row.get("max_abs") is None):
            return {"floor_rel_diff": None, "floor_max_abs": None, "times_floor": None}
        times = max(
            math.sqrt(_times(row.get("rel_diff"), floor[0])), _times(row.get("max_abs"), floor[1])
        )
        return {"floor_rel_diff": floor[0], "floor_max_abs": floor[1], "times_floor": times}

    def words(self) -> list[str]:
        """Say how pairs are judged, a line each."""
        tolerances = [
            f"{name} {value:g}" if value is not None else f"{name} of the pair of dtypes"
            for name, value in (("rtol", self.rtol), ("atol", self.atol))
        ]
        usual = f"within tolerance: no element beyond {' and '.join(tolerances)}"
        if self.rtol is None and self.atol is None:
            usual += ", but for rounding: few, and little off for the tensor's size"
        if self.floors is not None:
            usual += f", or at most {self.factor:g} times the noise floor"
        return [usual, *(f"within tolerance: {one.text}" for one in self.thresholds)]


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
