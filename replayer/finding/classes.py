"""What kind of fault a segment has, in a word and a sentence, from what was logged at its graft.

Each rule of `_RULES` looks at one thing; the first that fits names the class. What fits none is
`unknown`, which is an honest class: a softmax scale, an activation or a mask leaves no signature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recorder.sizes import count

from ..measuring.look import Look, Zeros
from .judging import Judged
from .where import alone, dim_words, index_words, listed, percent, where_alone

_EXPLAINED, _LEFT = 0.85, 0.03  # of the squared error; of the baseline's size
_EXPLAINED_OF_ROUNDED = 0.3
_ALL = 0.95
_SAME = 0.05  # of the size of a few elements
_FEWEST = 16  # elements
_APART = 0.1  # of the baseline's size, that ranks' parts differ from it and from each other


@dataclass(frozen=True)
class Class:
    """What kind of fault it is.

    Attributes:
        word: `scaled`, `shifted`, `permuted`, `zeros`, `stale`, `partial sum`, `low precision`,
            `noise`, `one rank`, `one head`, `one expert`, `one token`, `last tokens`, `unknown`.
        evidence: what tells so, a sentence without its full stop.
        factor: what the target's values are multiplied by, where one factor explains the error.
    """

    word: str
    evidence: str
    factor: float | None = None


@dataclass(frozen=True)
class _Fault:
    """What a rule looks at.

    Attributes:
        worst: the segment on the rank where it is furthest off.
        faulty: it on all ranks where it is a fault.
        everywhere: it on all ranks.
        noisy: whether it differs between repeats.
    """

    worst: Judged
    faulty: Sequence[Judged]
    everywhere: Sequence[Judged]
    noisy: bool

    @property
    def row(self) -> Mapping[str, Any]:
        return self.worst.cut.row

    @property
    def look(self) -> Look:
        found: Look = self.row["look"]
        return found


def classify(
    faulty: Sequence[Judged], everywhere: Sequence[Judged], *, noisy: bool = False
) -> Class:
    """Return what kind of fault a segment has.

    Args:
        faulty: it on the ranks where it is a fault, at least one.
        everywhere: it on all ranks.
        noisy: whether the target's own values differ between repeats.
    """
    worst = max(faulty, key=lambda one: (one.score, -one.cut.rank))
    fault = _Fault(worst, faulty, everywhere, noisy)
    where = where_alone(fault.row)
    for rule in _RULES:
        found = rule(fault)
        if found is not None:
            if rule is _permuted:  # which says where
                return found
            return Class(found.word, _joined(found.evidence, where), found.factor)
    error = worst.cut.error
    off = f"off by {percent(error)}, while the rest is right"
    word, words = alone(fault.row, off)
    if word:
        return Class(word, words)
    if len(faulty) == 1 < len(everywhere):
        return Class("one rank", f"rank {worst.cut.rank} alone: {off}")
    told = (
        f"the target's values are off by {percent(error)}, more than rounding, in no way that "
        "its numbers tell"
    )
    return Class("unknown", _joined(told, where))


def _joined(evidence: str, where: str) -> str:
    return f"{evidence}, {where}" if where else evidence


def _noise(fault: _Fault) -> Class | None:
    if not fault.noisy:
        return None
    return Class("noise", "the target's values differ between repeats of one and the same run")


def _odd(fault: _Fault) -> Class | None:
    odd = fault.row["odd"] or 0
    if not odd:
        return None
    return Class("unknown", f"{count(odd, 'element')} NaN or infinite on one side alone")


def _chosen(fault: _Fault) -> Class | None:
    look = fault.look.get("choice")
    if look is None:
        return None
    if fault.worst.cut.is_weight:
        told = f"{look['other']} of {look['rows']} rows have other integers"
        return Class("unknown", f"{told}; the first is row {look['first'][0]}")
    told = f"{look['other']} of {look['rows']} rows are another choice"
    if shift := look.get("shift"):
        called = dim_words(fault.row, shift[0])
        return Class("permuted", f"{told}: each of {called} is the one {shift[1]:+d} from it")
    if stand := look.get("stand"):
        pairs = ", ".join(f"{b} for {a}" for a, b in stand)
        return Class("permuted", f"{told}: the target always has {pairs}")
    if "ties" in look:
        told += f", {look['ties']} of them near ties by the scores tapped before"
    return Class("unknown", f"{told}; the first is row {look['first'][0]}")


def _narrow(fault: _Fault) -> Class | None:
    fits = fault.look.get("fits")
    if not fits:
        return None
    return Class(
        "low precision",
        f"each of the target's values has as few bits as {fits} has, and the baseline's have more",
    )


def _stale(fault: _Fault) -> Class | None:
    stale = fault.look.get("stale")
    return Class("stale", f"the target's values are those recorded at {stale}") if stale else None


def _zeros(fault: _Fault) -> Class | None:
    zeros = fault.look.get("zeros")
    if not zeros:
        return None
    share, scale = zeros["share"], zeros["scale"]
    if share > _ALL:
        return Class("zeros", "the target's values are zero where the baseline's are not")
    told = f"{percent(share)} of the target's values are zero where the baseline's are not"
    kept = 1 / (1 - share)
    if share > 0.01 and abs(scale - kept) < 0.1 * (kept - 1) and zeros["explained"] > 0.5:
        return Class("zeros", f"{told}, the others {scale:.3f} x: dropout makes that")
    if fault.look["rows"]["worst"] >= 0.99 and share > 1e-3 and _rest_is_right(fault, zeros):
        return Class("zeros", told)
    return None


def _rest_is_right(fault: _Fault, zeros: Zeros) -> bool:
    """Whether zeros are about all that is wrong, which make an error as large as their share."""
    error = fault.worst.cut.error
    return bool(0.5 < error / math.sqrt(zeros["share"]) < 2.0 and 0.9 < zeros["scale"] < 1.1)


def _constant(fault: _Fault) -> Class | None:
    samples = fault.look.get("samples")
    if samples is None or math.prod(fault.row["shape"]) < _FEWEST:
        return None
    own, base = ({*_flat(samples[side])} for side in ("own", "base"))
    if len(own) > 1 or own == {0.0} or len(base) == 1:
        return None
    return Class("unknown", f"the target's values are all {own.pop():g} wherever they were sampled")


def _partial(fault: _Fault) -> Class | None:
    """Ranks that hold one tensor, whose values add up to the baseline's, or have them as mean."""
    ranks = fault.everywhere
    looks = [one.cut.row["look"].get("samples") for one in ranks]
    shapes = {tuple(one.cut.row["shape"]) for one in ranks}
    if len(ranks) < 2 or len(shapes) > 1 or len(fault.faulty) < len(ranks) or None in looks:
        return None
    base = looks[0]["base"]
    own = [look["own"] for look in looks]
    size = math.hypot(*_flat(base))
    if not size or any(math.dist(_flat(one), _flat(base)) <= _APART * size for one in own):
        return None
    if any(math.dist(_flat(own[0]), _flat(one)) <= _APART * size for one in own[1:]):
        return None  # they are all wrong alike
    factors = " + ".join(f"{one.cut.row['scale']:.3f}" for one in ranks[:8])
    if _add_up(own, base, 1):
        return Class(
            "partial sum",
            f"each rank has a part ({factors} of the baseline's values), and together they are the "
            "baseline's: a sum over ranks is missing",
        )
    if _add_up(own, base, len(ranks)):
        return Class(
            "partial sum",
            f"ranks differ ({factors} times the baseline's values), and their mean is the "
            "baseline's: a mean over ranks is missing",
        )
    return None


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def _add_up(own: Sequence[Sequence[Sequence[float]]], base: Sequence[Any], times: int) -> bool:
    """Whether ranks' rows add up to so many times the baseline's, but for one row in four.

    One and the same rest in each row is let through too: a bias that each rank adds.
    """
    rests = [
        [math.fsum(values) - times * value for *values, value in zip(*parts, row, strict=True)]
        for *parts, row in zip(*own, base, strict=True)
    ]
    most = [_SAME * times * math.hypot(*row) for row in base]
    few = math.ceil(0.75 * len(rests))
    is_told_apart = len({*map(tuple, base)}) > 2  # else any rest is one and the same
    biases = [[0.0] * len(rests[0]), *(rests if is_told_apart else ())]
    return any(
        sum(math.dist(rest, bias) <= far for rest, far in zip(rests, most, strict=True)) >= few
        for bias in biases
    )


def _explains(fault: _Fault, share: float) -> bool:
    """Whether what an explanation leaves of the error is little, or no more than rounding."""
    left = math.sqrt(max(1 - share, 0.0)) * fault.worst.cut.error
    return (share > _EXPLAINED and left <= max(_LEFT, 2 * fault.worst.limit)) or (
        share > _EXPLAINED_OF_ROUNDED and left <= fault.worst.limit
    )


def _scaled(fault: _Fault) -> Class | None:
    row, shares = fault.row, fault.look.get("shares", {})
    share = (row["cosine"] or 0.0) ** 2
    if _explains(fault, share) and share >= shares.get("bias", 0.0):
        scale = row["scale"]
        return Class("scaled", f"the target's values are {_factor(scale)} x the baseline's", scale)
    named = [dim for dim, i in enumerate(row["fits_at"] or ()) if i >= 0]
    if row["factor"] is None or not named or not _is_all(fault, row["fits_at"]):
        return None
    if not all(_explains(fault, shares.get(str(dim), 0.0)) for dim in named):
        return None
    told = f"the target's values are {_factor(row['factor'])} x the baseline's"
    return Class("scaled", f"{told} at {index_words(row, row['fits_at'])}", row["factor"])


def _factor(factor: float) -> str:
    return f"{factor:.3f}" if abs(factor - 1) >= 0.05 else f"{factor:.4f}"


def _is_all(fault: _Fault, at: Sequence[int] | None) -> bool:
    """Whether what fits at an index is all that is wrong."""
    named = [(dim, i) for dim, i in enumerate(at or ()) if i >= 0]
    places = fault.look.get("places", {})
    return all(str(dim) in places and places[str(dim)]["at"] == [i] for dim, i in named)


def _scaled_by_part(fault: _Fault) -> Class | None:
    shares, factors = fault.look.get("shares", {}), fault.look.get("factors", {})
    named = {"row": "row", "column": "index of the last dim"}
    for name in (*sorted(n for n in shares if n.isdigit()), "column", "row"):
        if not _explains(fault, shares.get(name, 0.0)):
            continue
        least, most = factors.get(name, (1.0, 1.0))
        part = named.get(name) or f"index of {dim_words(fault.row, int(name))}"
        if abs(most - least) <= 0.01 * abs(most):
            factor = (least + most) / 2
            place = fault.look.get("places", {}).get(name)
            where = f"in some: by {part}"
            if place:  # which only dims have
                where = f"at {dim_words(fault.row, int(name))} {listed(place)}"
            if factor == 0:
                return Class("zeros", f"the target's values are zero {where}")
            told = f"the target's values are {_factor(factor)} x the baseline's {where}"
            return Class("scaled", told, factor)
        return Class("scaled", f"each {part} has a factor of its own, {least:.3f} to {most:.3f}")
    return None


def _shifted(fault: _Fault) -> Class | None:
    shares = fault.look.get("shares", {})
    if _explains(fault, shares.get("bias", 0.0)):
        return Class(
            "shifted",
            "one and the same vector is added to each row, as a bias that is added once too often "
            "or too seldom",
        )
    if _explains(fault, shares.get("offset", 0.0)):
        return Class("shifted", "one number is added to all of a row, to each its own")
    return None


def _permuted(fault: _Fault) -> Class | None:
    for dim, moved in sorted(fault.look.get("moved", {}).items()):
        called = dim_words(fault.row, int(dim))
        told = f"{moved['found']} of {moved['wrong']} wrong indices of {called} are other ones"
        pairs = ", ".join(
            f"{a} is {b}" for a, b in zip(moved["at"][:3], moved["of"][:3], strict=True)
        )
        more = ", ..." if moved["found"] > 3 else ""
        if moved["shift"] is not None and moved["found"] > 1:
            return Class("permuted", f"{told}: each is the one {moved['shift']:+d} from it")
        if moved["swap"]:
            return Class("permuted", f"{told}: {pairs}{more}")
        return Class("stale", f"{told}: {pairs}{more}")
    return _permuted_over_ranks(fault)


def _permuted_over_ranks(fault: _Fault) -> Class | None:
    """Few indices on each of several ranks, which have one another's values."""
    for dim in fault.look.get("places", {}):
        known = [(one, one.cut.row["look"].get("places", {}).get(dim)) for one in fault.faulty]
        places = [(one.cut.rank, place) for one, place in known if place is not None]
        if len(places) < 2 or any(place["count"] > len(place["at"]) for _, place in places):
            continue
        lines = [
            (rank, index, own, base)
            for rank, place in places
            for index, own, base in zip(place["at"], place["own"], place["lines"], strict=True)
        ]
        found = []
        for rank, index, own, replaced in lines:
            for other, source, _, base in lines:
                if (rank, index) != (other, source) and _is_other(own, replaced, base):
                    found.append(f"{index} of rank {rank} is {source} of rank {other}")
                    break
        if len(found) == len(lines):
            more = ", ..." if len(found) > 3 else ""
            called = dim_words(fault.row, int(dim))
            return Class(
                "permuted",
                f"{len(found)} of {len(lines)} wrong indices of {called} are other ones: "
                f"{', '.join(found[:3])}{more}",
            )
    return None


def _is_other(own: Sequence[float], replaced: Sequence[float], other: Sequence[float]) -> bool:
    """Whether what stands in a place is another's, and not what replaced it, off by some."""
    off = math.dist(own, replaced)
    return off > _APART * math.hypot(*own) and math.dist(own, other) <= _SAME * off


_RULES: tuple[Callable[[_Fault], Class | None], ...] = (
    _noise,
    _odd,
    _chosen,
    _stale,
    _narrow,
    _constant,
    _permuted,
    _zeros,
    _partial,
    _scaled,
    _shifted,
    _scaled_by_part,
)
