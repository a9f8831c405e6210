"""Which segments are rounding, and which are not: judged from the error itself, not one threshold.

A segment's error is rounding where it is at most the largest of

- what rounding comes to in the coarser dtype of both sides (`most_rounding`);
- `_SIBLINGS` times the median error of its siblings, the same segment in other layers, as long as
  that is no more than `_MOST_TIMES` the former, for a fault may sit in all of them. Where a tap is
  finer than the run, which may have computed it in fewer bits, it is as many times the
  siblings', up to what rounding comes to in the run's dtype;
- `_FLOOR` times the noise floor, and m times the baseline's error against the truth, where given;

and where no row, element or direction of the error gives it away, as in a diff. If a third of all
kinds of segments are beyond that in most layers, and off by about the same, as products in TF32
are, the whole run computes in fewer bits: that is said once, and each is held against three times
that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from ..measuring.measures import tolerances, units
from ..measuring.own import most_rounding
from ..rules import is_as_large, usual_of
from .segments import Cut, Place

_SIBLINGS, _FEWEST = 4.0, 3
_MOST_TIMES = {True: 10.0, False: 3.0}  # by whether the dtype has 32 bits or more
_COHERENT = 0.85  # of the squared error, that one explanation takes
_FLOOR = 3.0
_COARSE_SHARE = 0.25  # of the taps, that make a run one of 16 bits
_FEWER_BITS, _AS_FAR = 0.3, 4.0  # of the kinds of segments; times one another
_MOST_FEWER, _FEWEST_KINDS = 0.1, 3  # relative error; kinds of segments
_TIMES_FEWER = 3.0
_CLEAR = 3.0  # times its limit: such faults come in the order of execution
_FEW = 8  # numbers of a row
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
        floor: by name, tags and kind, the greatest error of replays of the baseline onto itself.
        truth: by name, tags, kind and step, the baseline's own error against the truth.
        times: how many times that a segment may be off.
    """

    floor: Mapping[tuple[str, str, str], float] = field(default_factory=dict)
    truth: Mapping[tuple[str, str, str, int], float] = field(default_factory=dict)
    times: float = 2.0

    def least(self, place: Place) -> float:
        """Return the limit that it gives a segment, 0 where it knows none."""
        floor = self.floor.get((place.name, place.tags, place.kind), 0.0)
        truth = self.truth.get((place.name, place.tags, place.kind, place.step), 0.0)
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
    sharpened = sharpened or Sharpened()
    run = _run_of(cuts)
    siblings = _siblings(cuts)
    usual_gradient = median([0.0, *(c.row["size"] for c in cuts if _is_gradient(c))])
    limits = {
        id(one): _limit(one, siblings[id(one)][0], run, sharpened) for one in cuts if _is_float(one)
    }
    fewer = _fewer_bits(cuts, limits)
    judged = []
    for one in cuts:
        if not _is_float(one):
            judged.append(_of_choice(one))
            continue
        limit = max(limits[id(one)], _TIMES_FEWER * (fewer or 0.0))
        errors, sizes = siblings[id(one)]
        judged.append(_judged(one, limit, errors, sizes, usual_gradient, fewer))
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


def _siblings(cuts: Sequence[Cut]) -> dict[int, tuple[float | None, float | None]]:
    """Return the median error and size of each one's siblings, of its step and rank if those do."""
    near: dict[Any, list[Cut]] = defaultdict(list)
    far: dict[Any, list[Cut]] = defaultdict(list)
    for one in cuts:
        if one.error is None:
            continue
        family = _family(one)
        near[family, one.place.step, one.rank].append(one)
        far[family].append(one)
    found: dict[int, tuple[float | None, float | None]] = {}
    for one in cuts:
        family = _family(one)
        for group in (near[family, one.place.step, one.rank], far[family]):
            others = [other for other in group if other.place != one.place]
            if len(others) >= _FEWEST:
                break
        found[id(one)] = None, None
        if len(others) >= _FEWEST:
            sizes = [other.row["size"] or 0.0 for other in others]
            found[id(one)] = median(other.error or 0.0 for other in others), median(sizes)
    return found


def _share_of_siblings(row: Mapping[str, Any], sizes: float | None) -> float:
    """Return how large a few numbers are beside their siblings: what larger ones left is small.

    Of many numbers some are left large, so there it is 1.
    """
    if not sizes or math.prod(row["shape"]) >= 2 * _FEW:
        return 1.0
    return min(1.0, float(row["size"]) / sizes)


def _family(one: Cut) -> Any:
    """Return what siblings share: all but tags that are whole numbers, such as the layer."""
    fixed = {t: v for t, v in one.place.tag_values.items() if type(v) is not int}
    return one.place.name, one.place.kind, repr(sorted(fixed.items())), one.row["dtype"]


def _limit(one: Cut, siblings: float | None, run: _Run, sharpened: Sharpened) -> float:
    eps = _eps(one)
    least, most = most_rounding(eps), most_rounding(run.eps)
    if least < most:
        usual = math.inf if siblings is None else _SIBLINGS * siblings
        limit = min(most, max(least, usual))
    else:
        limit = max(least, min(_SIBLINGS * (siblings or 0.0), _MOST_TIMES[eps < 1e-5] * least))
    return max(limit, sharpened.least(one.place))


def _fewer_bits(cuts: Sequence[Cut], limits: Mapping[int, float]) -> float | None:
    """Return the usual error where about all kinds of segments are off, by about the same."""
    kinds: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for one in cuts:
        if id(one) in limits and not one.is_weight and one.error:
            kinds[one.place.name, one.place.kind].append((one.error, limits[id(one)]))
    usual = [median(e for e, _ in found) for found in kinds.values()]
    off = [
        median(e for e, _ in found)
        for found in kinds.values()
        if median(e / limit for e, limit in found) > 1
    ]
    many = sum(e > limit for found in kinds.values() for e, limit in found)
    if len(off) < max(_FEWEST_KINDS, _FEWER_BITS * len(usual)) or many < 2 * _FEWEST_KINDS:
        return None
    return median(off) if max(off) <= min(_MOST_FEWER, _AS_FAR * min(off)) else None


def _judged(
    one: Cut,
    limit: float,
    siblings: float | None,
    sizes: float | None,
    usual_gradient: float,
    fewer: float | None,
) -> Judged:
    row, error = one.row, one.error
    assert error is not None
    if row["odd"]:
        return Judged(one, limit, siblings, math.inf, ("odd",))
    dtypes = _dtypes(one)
    rtol, atol = tolerances(dtypes[0], dtypes[-1])
    is_gradient = one.place.kind == "grad"
    # Floats of 8 bits have no tolerance of torch's.
    usual = usual_of(rtol or 2 * _eps(one), row["error_typical"], is_gradient=is_gradient)
    if is_gradient and row["size"] <= usual.whole * usual_gradient:
        return Judged(one, limit, siblings, 0.0)  # zero beside the others, but for rounding
    if math.isinf(error) and row["size"] <= atol:
        return Judged(one, limit, siblings, 0.0)  # what is off has no size of its own
    error *= _share_of_siblings(row, sizes)
    room = max(1.0, limit / most_rounding(_eps(one)))
    scores = {"error": error / limit}
    shape = row["shape"]
    if shape and shape[-1] >= _FEW:  # a few numbers cancel, and have a direction, by chance
        scores["row"] = row["error_row"] / (usual.row * room)
        scores["element"] = row["error_element"] / (usual.element * room)
        if is_as_large(row["error_row"], row["error_typical"]):
            scores["row"] = max(scores["row"], 1 + row["error_row"])
    is_far = error > most_rounding(torch.finfo(dtypes[0]).eps)
    is_told = math.prod(shape) >= 2 * _FEW
    if (
        is_told
        and (not fewer or one.is_weight)
        and (row["fits_at"] is not None or (is_far and _is_coherent(row)))
    ):
        scores["direction"] = max(_CLEAR, error / limit)
    reasons = tuple(name for name, score in scores.items() if score > 1)
    return Judged(one, limit, siblings, max(scores.values()), reasons)


def _is_coherent(row: Mapping[str, Any]) -> bool:
    """Whether one factor, one of each row or column, or one vector explains the error."""
    shares = row["look"].get("shares", {})
    return bool(max((row["cosine"] or 0.0) ** 2, *shares.values(), 0.0) > _COHERENT)


def _of_choice(one: Cut) -> Judged:
    """Judge indices: near ties are rounding, and without scores a few others are not judged."""
    look = one.row["look"].get("choice", {})
    other = look.get("other", 0)
    if not other:
        return Judged(one, 0.0, None, 0.0)
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
