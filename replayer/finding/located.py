"""Segments ranked: the log of one replay -> which segments are faults, what kind, and where.

1. `cuts_of` reads the log as segments, `judge` judges each on each rank.
2. `located` takes the ranks of a segment together, classifies faults, and puts the worst first:
   wrong parameters, then what is clearly beyond rounding in the order of execution, then the rest.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recorder.sizes import count

from ..only import Tap
from .classes import Class, classify
from .judging import Judged, Judgement, Sharpened, judge
from .segments import Cuts, Place, Unjudged, cuts_of

if TYPE_CHECKING:
    import polars as pl

COLUMNS = {
    "name": "String",
    "tags": "String",
    "kind": "String",
    "step": "Int64",
    "occurrence": "Int32",
    "ranks": "List(Int32)",
    "begins": "List(String)",
    "fault": "Boolean",
    "class": "String",
    "factor": "Float64",
    "evidence": "String",
    "error": "Float64",
    "expected": "Float64",
    "siblings": "Float64",
    "score": "Float64",
    "weight": "Boolean",
    "order": "Int64",
}
_MOST_OFF = 0.6  # of the kinds of segments, that cannot well be faults each
_FEWEST_KINDS, _BEHIND = 4, 0.9  # and of the segments behind the first fault


@dataclass(frozen=True)
class Segment:
    """What one tap computed from what was grafted before it, on all ranks.

    Attributes:
        place: the tap where it ends, its step and occurrence.
        ranks: where it is a fault, or all where it is none.
        of: how many ranks have it.
        begins: the taps where it begins, with their tags.
        class_: what kind of fault; None where it is none.
        error: relative error of the target's own values, the greatest of its ranks.
        expected: the greatest that is taken for rounding.
        siblings: the median error of the same segment in other layers, None of too few.
        score: how many times beyond what is taken for rounding it is.
        is_weight: whether it is a parameter.
        is_clear: whether it is so far beyond that its place in the order counts.
        order: its position in the order of execution.
    """

    place: Place
    ranks: tuple[int, ...]
    of: int
    begins: tuple[Place, ...]
    class_: Class | None
    error: float
    expected: float
    siblings: float | None
    score: float
    is_weight: bool
    is_clear: bool
    order: int

    @property
    def is_fault(self) -> bool:
        """Whether it is more than rounding."""
        return self.class_ is not None

    @property
    def names(self) -> list[str]:
        """The names of the taps where it begins, each once."""
        return list(dict.fromkeys(place.name for place in self.begins))

    def as_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        class_ = self.class_ or Class("", "")
        return {
            "name": self.place.name,
            "tags": self.place.tag_values,
            "kind": self.place.kind,
            "step": self.place.step,
            "occurrence": self.place.occurrence,
            "rank": list(self.ranks),
            "from": self.names,
            "fault": self.is_fault,
            "class": class_.word or None,
            "factor": class_.factor,
            "evidence": class_.evidence or rounding_words(self),
            "error": _finite(self.error),
            "expected": _finite(self.expected),
            "siblings": self.siblings,
        }


@dataclass(frozen=True)
class Located:
    """What one replay shows of all segments.

    Attributes:
        segments: the worst first.
        not_judged: taps whose own error says nothing, in order of execution.
        notes: what else there is to know, a line each.
        units: the coarsest dtype that many taps have.
        fewer_bits: the usual error where the whole run computes in fewer bits, else None.
        trouble: why the result is not to be trusted, "" where it is.
    """

    segments: tuple[Segment, ...]
    not_judged: tuple[Unjudged, ...]
    notes: tuple[str, ...]
    units: str
    fewer_bits: float | None
    trouble: str = ""

    @property
    def faults(self) -> list[Segment]:
        """Those that are more than rounding, the worst first."""
        return [one for one in self.segments if one.is_fault]

    def frame(self) -> pl.DataFrame:
        """Return the segments as a table, the worst first."""
        from recorder.format.tables import to_frame

        return to_frame([_as_row(one) for one in self.segments], COLUMNS)


def _as_row(one: Segment) -> dict[str, object]:
    found = one.as_dict()
    return {
        **{name: found[name] for name in COLUMNS.keys() & found.keys()},
        "tags": one.place.tags,
        "ranks": list(one.ranks),
        "begins": [place.label for place in one.begins],
        "score": one.score,
        "weight": one.is_weight,
        "order": one.order,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def located(
    log: pl.DataFrame,
    sharpened: Sharpened | None = None,
    noisy: Collection[tuple[int, Place]] = (),
) -> Located:
    """Return what a replay's log shows.

    Args:
        log: of all ranks, with the columns that `own_error` adds.
        sharpened: what else is known of clean segments.
        noisy: ranks and places whose own values differ between repeats.
    """
    cuts = cuts_of(log)
    judgement = judge(cuts.cuts, sharpened)
    orders = _orders(cuts)
    of_place: dict[Place, list[Judged]] = defaultdict(list)
    for one in judgement.judged:
        of_place[one.cut.place].append(one)
    segments, unjudged = [], list(cuts.unjudged)
    for place, ranks in of_place.items():
        open_ones = [one for one in ranks if one.why_not]
        if open_ones:
            where = tuple(one.cut.rank for one in open_ones)
            unjudged.append(Unjudged(place, where, open_ones[0].why_not))
        if len(open_ones) < len(ranks):
            segments.append(_segment(place, ranks, orders[place], noisy))
    segments.sort(key=_worst_first)
    notes = [*cuts.notes, *_notes(judgement)]
    return Located(
        tuple(segments),
        tuple(unjudged),
        tuple(notes),
        judgement.units,
        judgement.fewer_bits,
        _trouble(segments),
    )


def _orders(cuts: Cuts) -> dict[Place, int]:
    """Return each place's position among all: that of the first rank which has it."""
    found: dict[Place, int] = {}
    for one in sorted(cuts.cuts, key=lambda one: (one.place.step, one.order, one.rank)):
        found.setdefault(one.place, len(found))
    return found


def _segment(
    place: Place, ranks: Sequence[Judged], order: int, noisy: Collection[tuple[int, Place]]
) -> Segment:
    faulty = [one for one in ranks if one.is_fault]
    shown = faulty or ranks
    worst = max(shown, key=lambda one: (one.score, -one.cut.rank))
    class_ = None
    if faulty:
        is_noisy = any((one.cut.rank, place) in noisy for one in faulty)
        class_ = classify(faulty, ranks, noisy=is_noisy)
    begins = dict.fromkeys(one.cut.begins for one in shown if one.cut.begins is not None)
    return Segment(
        place=place,
        ranks=tuple(sorted(one.cut.rank for one in shown)),
        of=len(ranks),
        begins=tuple(begins),
        class_=class_,
        error=max(one.cut.error for one in shown),
        expected=worst.limit,
        siblings=worst.siblings,
        score=worst.score,
        is_weight=worst.cut.is_weight,
        is_clear=any(one.is_clear for one in faulty),
        order=order,
    )


def _worst_first(one: Segment) -> tuple[Any, ...]:
    if one.is_fault and one.is_clear:
        return 0, one.place.step, not one.is_weight, one.order
    return 1, not one.is_fault, -one.score, one.order


def _notes(judgement: Judgement) -> list[str]:
    notes = []
    if judgement.fewer_bits:
        notes.append(
            "the whole run computes in fewer bits than its dtypes tell: many kinds of "
            f"segments are off by {judgement.fewer_bits:.1e} of their size; each was held against "
            "three times that"
        )
    pairs = Counter(
        (one.cut.row["sender_dtype"], one.cut.row["dtype"])
        for one in judgement.judged
        if one.cut.row["sender_dtype"] != one.cut.row["dtype"]
    )
    for (sender, receiver), total in pairs.most_common(2):
        notes.append(
            f"{count(total, 'tap')} have {sender} in the baseline and {receiver} in the target: "
            "what the coarser of both rounds off is rounding"
        )
    return notes


def _trouble(segments: Sequence[Segment]) -> str:
    """Say that about everything is off and the more so the later, as where grafts do nothing."""
    kinds: dict[tuple[str, str], list[Segment]] = defaultdict(list)
    for one in segments:
        if not one.is_weight and one.place.kind != "grad":
            kinds[one.place.name, one.place.kind].append(one)
    off = [found for found in kinds.values() if sum(one.is_fault for one in found) > len(found) / 2]
    if len(kinds) < _FEWEST_KINDS or len(off) < _MOST_OFF * len(kinds):
        return ""
    inner = sorted((one for found in kinds.values() for one in found), key=lambda one: one.order)
    behind = inner[next(i for i, one in enumerate(inner) if one.is_fault) :]
    if sum(one.is_fault for one in behind) < _BEHIND * len(behind):
        return ""
    return (
        f"{len(off)} of {len(kinds)} kinds of segments are off, as where grafts have no effect, "
        "the target computes from copies, or its inputs differ; check the first, and that the "
        "target goes on with what tap returns"
    )


def rounding_words(one: Segment) -> str:
    """Say how a segment that is no fault stands."""
    if not one.error:
        return "equal bit for bit" if one.expected else "the same choices"
    times = f", {one.error / one.siblings:.1f} x what its siblings show" if one.siblings else ""
    return f"rounding: off by {one.error:.1e}{times}; up to {one.expected:.1e} is taken for it"


def steps_of(segments: Sequence[Segment]) -> Mapping[Tap, list[Segment]]:
    """Return segments of all steps and occurrences by their taps, in the given order."""
    found: dict[Tap, list[Segment]] = {}
    for one in segments:
        found.setdefault(one.place.tap, []).append(one)
    return found
