"""Which segments are rounding, and which are not: judged from the error itself, not one threshold.

A segment's error is rounding where it is at most the largest of

- what rounding comes to in the coarser dtype of both sides (`most_rounding`);
- `_SIBLINGS` times the median error of its siblings, the same segment in other layers, as long as
  that is no more than `_MOST_TIMES` the former, for a fault may sit in all of them. Where a tap is
  finer than the run, which may have computed it in fewer bits, it is as many times the
  siblings', up to what rounding comes to in the run's dtype;
- `_FLOOR` times the noise floor, and m times the baseline's error against the truth, where given;

and where no row, element or direction of the error gives it away, as in a diff. If a third of all
kinds of segments are beyond that in most layers, and off by about the same or by no more than
products in TF32 are, the whole run computes in fewer bits: that is said once, and each is held
against three times that.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch

from ..measuring.measures import tolerances, units
from ..measuring.own import most_rounding
from ..only import Tap
from ..rules import is_as_large, usual_of
from .segments import Cut, Place, Row

_SIBLINGS, _FEWEST = 4.0, 3
_SIXTEEN = torch.finfo(torch.float16).eps
_MOST_TIMES = {True: 10.0, False: 3.0}  # by whether the dtype has 32 bits or more
_COHERENT = 0.85  # of the squared error, that one explanation takes
_FLOOR = 3.0
_COARSE_SHARE = 0.25  # of the taps, that make a run one of 16 bits
_FEWER_BITS, _AS_FAR = 0.3, 4.0  # of the kinds of segments; times one another
_MOST_FEWER, _FEWEST_KINDS = 0.1, 3  # relative error; kinds of segments
_TF32 = 4 * 2.0**-11  # relative error: units of TF32, as many as products were seen off by
_TIMES_FEWER = 3.0
_CLEAR = 3.0  # times its limit: such faults come in the order of execution
_FEW = 8  # numbers of a row
_NUMBER = re.compile(r"(?<![^./])\d+(?![^./])")
_TIES = 0.05  # of the rows, that may be another choice where no scores tell why


@dataclass(frozen=True)
class Judged:
    """A segment on one rank, judged.

    Attributes:
        cut: which.
        limit: the greatest relative error that is taken for rounding.
        siblings: the median error of its siblings, None where there are too few.
        score: how many times beyond what is taken for rounding it is; a fault where more than 1.
        reasons: what makes it a fault: `error`, `row`, `element`, `direction`, `odd`, `choice`.
        why_not: why it is not judged, "" where it is.
    """

    cut: Cut
    limit: float
    siblings: float | None
    score: float
    reasons: tuple[str, ...] = ()
    why_not: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether it is more than rounding."""
        return bool(self.reasons)

    @property
    def is_clear(self) -> bool:
        """Whether it is so far beyond that its place in the order counts, and not its size."""
        return self.score >= _CLEAR


@dataclass(frozen=True)
class Sharpened:
    """What else is known of how far clean segments are off; it may only raise a limit.

    Attributes:
        floor: by what counts of a tap, the greatest error of replays of the baseline onto itself.
        truth: by that and the baseline's step, the baseline's own error against the truth.
        times: how many times that a segment may be off.
        counts: returns what counts of a target's tap.
        step_offset: added to the target's step to get the baseline's.
    """

    floor: Mapping[Hashable, float] = field(default_factory=dict)
    truth: Mapping[tuple[Hashable, int], float] = field(default_factory=dict)
    times: float = 2.0
    counts: Callable[[Tap], Hashable] = lambda tap: tap
    step_offset: int = 0

    def least(self, place: Place) -> float:
        """Return the limit that it gives a segment, 0 where it knows none."""
        if not self.floor and not self.truth:
            return 0.0
        counted = self.counts(place.tap)
        floor = self.floor.get(counted, 0.0)
        truth = self.truth.get((counted, place.step + self.step_offset), 0.0)
        return max(_FLOOR * floor, self.times * truth)


@dataclass(frozen=True)
class Judgement:
    """Of all segments.

    Attributes:
        judged: in the order of what they were judged from.
        fewer_bits: the usual error where the whole run computes in fewer bits, else None.
        units: name of the coarsest dtype of the run.
    """

    judged: tuple[Judged, ...]
    fewer_bits: float | None
    units: str


def judge(cuts: Sequence[Cut], sharpened: Sharpened | None = None) -> Judgement:
    """Judge segments, each by what is usual for its dtype and for its siblings."""
    run, siblings = _run_of(cuts), _siblings(cuts)
    usual_gradient = median([0.0, *(c.row["size"] for c in cuts if _is_gradient(c))])
    limits = [
        _limit(one, usual, run, sharpened or Sharpened()) if _is_float(one) else 0.0
        for one, usual in zip(cuts, siblings, strict=True)
    ]
    fewer = _fewer_bits(cuts, limits)
    judged = [
        _judged(one, max(limit, _TIMES_FEWER * (fewer or 0.0)), usual, usual_gradient, fewer)
        if _is_float(one)
        else _of_choice(one)
        for one, limit, usual in zip(cuts, limits, siblings, strict=True)
    ]
    return Judgement(tuple(judged), fewer, run.name)


def _is_float(one: Cut) -> bool:
    return one.row["size"] is not None


def _is_gradient(one: Cut) -> bool:
    return one.place.kind == "grad" and _is_float(one)


def _dtypes(one: Cut) -> list[torch.dtype]:
    found = (getattr(torch, one.row[name] or "", None) for name in ("dtype", "sender_dtype"))
    return [
        t for t in found if isinstance(t, torch.dtype) and (t.is_floating_point or t.is_complex)
    ]


def _eps(one: Cut) -> float:
    dtypes = _dtypes(one)
    return units(dtypes[0], dtypes[-1])[0]


@dataclass(frozen=True)
class _Run:
    """The coarsest dtype that many taps of a run have, of 16 bits at least."""

    eps: float
    name: str


def _run_of(cuts: Sequence[Cut]) -> _Run:
    counts: dict[torch.dtype, int] = defaultdict(int)
    for one in cuts:
        if _is_float(one) and not one.is_weight:
            for dtype in {*_dtypes(one)}:
                counts[dtype] += 1
    total = sum(counts.values())
    many = [t for t, n in counts.items() if t.itemsize >= 2 and n >= _COARSE_SHARE * total]
    if not many:
        return _Run(torch.finfo(torch.float32).eps, "float32")
    coarsest = max(many, key=lambda t: torch.finfo(t).eps)
    return _Run(torch.finfo(coarsest).eps, str(coarsest).removeprefix("torch."))


class _Usual(NamedTuple):
    """The median error and size of a segment's siblings; None where there are too few."""

    error: float | None = None
    size: float | None = None


def _siblings(cuts: Sequence[Cut]) -> list[_Usual]:
    """Return what is usual for each one's siblings, of its step and rank where those are enough."""
    families = [_family(one) for one in cuts]
    near: dict[Any, list[Cut]] = defaultdict(list)
    far: dict[Any, list[Cut]] = defaultdict(list)
    for one, family in zip(cuts, families, strict=True):
        near[family, one.place.step, one.rank].append(one)
        far[family].append(one)
    usual = {key: _Medians(group) for groups in (near, far) for key, group in groups.items()}
    found = []
    for one, family in zip(cuts, families, strict=True):
        close = usual[family, one.place.step, one.rank].without(one)
        found.append(close if close.error is not None else usual[family].without(one))
    return found


class _Medians:
    """The medians of a group without one of it: sorted once, for groups of thousands."""

    def __init__(self, group: Sequence[Cut]) -> None:
        self._of_place: dict[Place, list[Cut]] = defaultdict(list)
        for one in group:
            self._of_place[one.place].append(one)
        self._errors = sorted(one.error for one in group)
        self._sizes = sorted(one.row["size"] or 0.0 for one in group)

    def without(self, one: Cut) -> _Usual:
        """Return the medians of those of other places, of whichever ranks."""
        same = self._of_place[one.place]
        if len(self._errors) - len(same) < _FEWEST:
            return _Usual()
        return _Usual(
            _median_without(self._errors, [c.error for c in same]),
            _median_without(self._sizes, [c.row["size"] or 0.0 for c in same]),
        )


def _median_without(ordered: Sequence[float], gone: Sequence[float]) -> float:
    """Return the median of sorted values, some of which are taken out."""
    places = sorted(bisect_left(ordered, value) + i for value, i in _numbered(gone))
    left = len(ordered) - len(places)

    def at(k: int) -> float:
        for place in places:
            k += place <= k
        return ordered[k]

    return (at((left - 1) // 2) + at(left // 2)) / 2


def _numbered(values: Sequence[float]) -> Iterator[tuple[float, int]]:
    """Yield each value, and how many equal ones came before it."""
    seen: Counter[float] = Counter()
    for value in values:
        yield value, seen[value]
        seen[value] += 1


def _share_of_siblings(row: Row, size: float | None) -> float:
    """Return how large a few numbers are beside their siblings: what larger ones left is small.

    Of many numbers some are left large, so there it is 1.
    """
    if not size or math.prod(row["shape"]) >= 2 * _FEW:
        return 1.0
    return min(1.0, float(row["size"]) / size)


def _family(one: Cut) -> Any:
    """Return what siblings share: all but tags that are whole numbers, such as the layer."""
    fixed = {t: v for t, v in one.place.tag_values.items() if type(v) is not int}
    return (
        _numberless(one.place.name),
        one.place.kind,
        repr(sorted(fixed.items())),
        one.row["dtype"],
    )


def _numberless(name: str) -> str:
    """Return a name without the numbers in it that are parts of their own, as a layer's is."""
    return _NUMBER.sub("#", name)


def _limit(one: Cut, usual: _Usual, run: _Run, sharpened: Sharpened) -> float:
    eps = _eps(one)
    least, most = most_rounding(eps), most_rounding(run.eps)
    if least < most:
        of_siblings = math.inf if usual.error is None else _SIBLINGS * usual.error
        limit = min(most, max(least, of_siblings))
    else:
        times = _MOST_TIMES[eps < _SIXTEEN]
        limit = max(least, min(_SIBLINGS * (usual.error or 0.0), times * least))
    return max(limit, sharpened.least(one.place))


def _fewer_bits(cuts: Sequence[Cut], limits: Sequence[float]) -> float | None:
    """Return the usual error where many kinds are off in most layers, by about the same.

    Values that have fewer bits themselves were cast, which is a fault of their own segment: what is
    computed in fewer bits is added up in more.
    """
    kinds: Mapping[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for one, limit in zip(cuts, limits, strict=True):
        if limit and not one.is_weight:
            times = 0.0 if "fits" in one.row["look"] else one.error / limit
            kinds[_numberless(one.place.name), one.place.kind].append((one.error, times))
    kinds = {kind: found for kind, found in kinds.items() if any(error for error, _ in found)}
    off = [
        median(error for error, _ in found)
        for found in kinds.values()
        if median(times for _, times in found) > 1
    ]
    many = sum(times > 1 for found in kinds.values() for _, times in found)
    if len(off) < max(_FEWEST_KINDS, _FEWER_BITS * len(kinds)) or many < 2 * _FEWEST_KINDS:
        return None
    alike = min(_MOST_FEWER, max(_TF32, _AS_FAR * min(off)))
    return median(off) if max(off) <= alike else None


def _judged(
    one: Cut, limit: float, siblings: _Usual, usual_gradient: float, fewer: float | None
) -> Judged:
    row, error = one.row, one.error

    def judged(score: float, *reasons: str) -> Judged:
        return Judged(one, limit, siblings.error, score, reasons)

    if row["odd"]:
        return judged(math.inf, "odd")
    dtypes = _dtypes(one)
    rtol, atol = tolerances(dtypes[0], dtypes[-1])
    is_gradient = one.place.kind == "grad"
    # Floats of 8 bits have no tolerance of torch's.
    usual = usual_of(rtol or 2 * _eps(one), row["error_typical"], is_gradient=is_gradient)
    if is_gradient and row["size"] <= usual.whole * usual_gradient:
        return judged(0.0)  # zero beside the others, but for rounding
    if math.isinf(error) and row["size"] <= atol:
        return judged(0.0)  # what is off has no size of its own
    error *= _share_of_siblings(row, siblings.size)
    scores = {"error": error / limit}
    shape, room = row["shape"], max(1.0, limit / most_rounding(_eps(one)))
    if shape and shape[-1] >= _FEW:  # fewer numbers cancel by chance
        scores["row"] = row["error_row"] / (usual.row * room)
        scores["element"] = row["error_element"] / (usual.element * room)
        if is_as_large(row["error_row"], row["error_typical"]):
            scores["row"] = max(scores["row"], 1 + row["error_row"])
    # Fewer have a direction by chance; and so may all that is computed in fewer bits.
    if math.prod(shape) >= 2 * _FEW and (not fewer or one.is_weight):
        is_far = error > most_rounding(torch.finfo(dtypes[0]).eps)
        if row["fits_at"] is not None or (is_far and _is_coherent(row)):
            scores["direction"] = max(_CLEAR, error / limit)
    return judged(max(scores.values()), *(name for name, score in scores.items() if score > 1))


def _is_coherent(row: Row) -> bool:
    """Whether one factor, one of each row or column, or one vector explains the error."""
    shares = row["look"].get("shares", {})
    return bool(max((row["cosine"] or 0.0) ** 2, *shares.values(), 0.0) > _COHERENT)


def _of_choice(one: Cut) -> Judged:
    """Judge indices: near ties are rounding, and without scores a few others are not judged."""
    look = one.row["look"].get("choice", {})
    other = look.get("other", 0)
    if not other:
        return Judged(one, 0.0, None, 0.0)
    if one.is_weight:  # which nobody chose
        return Judged(one, 0.0, None, 1.0 + other, ("choice",))
    if "ties" in look:
        beyond = other - look["ties"]
        return Judged(one, 0.0, None, 1.0 + beyond, ("choice",) if beyond else ())
    if other <= _TIES * look["rows"]:
        why = (
            f"{other} of {look['rows']} rows are another choice, which may be near ties; tap the "
            "scores before it"
        )
        return Judged(one, 0.0, None, 0.0, (), why)
    return Judged(one, 0.0, None, 1.0 + other, ("choice",))
