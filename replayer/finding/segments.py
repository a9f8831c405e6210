"""The log of a replay as segments: what each tap computed from what was grafted before it.

A segment ends at a graft, and begins at the last effective graft before it in its rank's order; of
a gradient, at the last gradient's. What was missed, failed or had no effect cuts nothing: the
segment behind it begins further back. Parameters are computed from nothing, and begin nothing.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from recorder.format.rows import parse_tags
from recorder.sizes import count
from recorder.tags import TagValue, is_recompute

from ..log import WEIGHT, WITHOUT_EFFECT
from ..only import Tap

if TYPE_CHECKING:
    import polars as pl

_MISS = "no record"
Row = Mapping[str, Any]
"""A row of the log."""


class Place(NamedTuple):
    """What a segment is called by: that of all ranks is one."""

    name: str
    tags: str
    kind: str
    step: int
    occurrence: int

    @property
    def tap(self) -> Tap:
        """The tap where it ends, of all steps and occurrences."""
        return Tap(self.name, self.tags, self.kind)

    @property
    def label(self) -> str:
        """Name and tags, as messages have them."""
        return self.tap.label

    @property
    def tag_values(self) -> dict[str, TagValue]:
        """Its tags but the name."""
        return parse_tags(self.tags)


@dataclass(frozen=True)
class Cut:
    """A segment on one rank.

    Attributes:
        place: where it ends.
        row: what the log has of it, with `look` parsed.
        begins: the grafts it begins at; None at the beginning.
        order: its position among all of its rank's segments.
    """

    place: Place
    row: Row
    begins: Place | None
    order: int

    @property
    def rank(self) -> int:
        """Whose it is."""
        return int(self.row["rank"])

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter, which nothing of the step computed."""
        return self.row.get("role") == WEIGHT and self.row["kind"] != "grad"

    @property
    def error(self) -> float:
        """Its own relative error, that of extremes counted."""
        return float(max(self.row["error"], self.row["error_extreme"] or 0.0))


@dataclass(frozen=True)
class Unjudged:
    """A tap whose own error says nothing, on some ranks.

    Attributes:
        place: which.
        ranks: on which.
        why: why not.
        is_miss: whether it had no record, which says nothing of the target.
    """

    place: Place
    ranks: tuple[int, ...]
    why: str
    is_miss: bool = False


@dataclass(frozen=True)
class Cuts:
    """All of a log.

    Attributes:
        cuts: by rank and order of execution.
        unjudged: what is no segment, in order of execution.
        notes: what else there is to know, a line each.
    """

    cuts: tuple[Cut, ...]
    unjudged: tuple[Unjudged, ...]
    notes: tuple[str, ...] = ()


def cuts_of(log: pl.DataFrame) -> Cuts:
    """Return the segments of a log, of all ranks."""
    cuts: list[Cut] = []
    apart: dict[tuple[Place, str], list[int]] = defaultdict(list)
    orders: dict[int, list[Place]] = defaultdict(list)
    latest: dict[tuple[int, str], Place] = {}
    for row in log.sort("rank", "seq").iter_rows(named=True):
        tags = parse_tags(row["tags"])
        if is_recompute(tags):
            continue
        place = Place(row["name"], row["tags"], row["kind"], row["step"], row["occurrence"])
        rank = row["rank"]
        why = _why_not(row)
        if why is not None:
            if why:
                apart[place, why].append(rank)
            continue
        row["look"] = json.loads(row["look"]) if row["look"] else {}
        begins = latest.get((rank, row["kind"]), latest.get((rank, "tensor")))
        one = Cut(place, row, begins, len(orders[rank]))
        if one.is_weight:
            one = Cut(place, row, None, len(orders[rank]))
        elif row["outcome"] != WITHOUT_EFFECT:
            latest[rank, row["kind"]] = place
        orders[rank].append(place)
        cuts.append(one)
    unjudged = [
        Unjudged(place, tuple(ranks), why, why.startswith(_MISS))
        for (place, why), ranks in apart.items()
    ]
    return Cuts(tuple(cuts), tuple(unjudged), tuple(_notes(log, orders)))


def _why_not(row: Row) -> str | None:
    """Return why a row is no segment, "" where that is nothing to tell; None if it is one."""
    outcome, message = row["outcome"], row["message"] or ""
    if outcome == "compared":
        return f"its value is another: {message}" if row["changed"] else ""
    if outcome == "missing":
        return f"{_MISS}: {message}"
    if outcome not in ("grafted", WITHOUT_EFFECT):
        return message or outcome
    if row["error"] is None:
        return message or "its own error was not measured"
    return None


def _notes(log: pl.DataFrame, orders: Mapping[int, list[Place]]) -> list[str]:
    notes = []
    counts = Counter(log["outcome"].to_list())
    if counts["missing"]:
        notes.append(
            f"{count(counts['missing'], 'tap')} had no record and cut nothing: the segments behind "
            "them are longer"
        )
    if counts[WITHOUT_EFFECT]:
        notes.append(
            f"{count(counts[WITHOUT_EFFECT], 'graft')} had no effect: what they are off by, the "
            "segments behind them are off by too"
        )
    lacking = log.filter((log["outcome"] == "grafted") & (log["rows_missing"] > 0))
    if lacking.height:
        rows = count(int(lacking["rows_missing"].sum()), "row")
        notes.append(
            f"{rows} of {count(lacking.height, 'tap')} had no record and kept the target's values: "
            "what they are off by, the segments behind them are off by too"
        )
    if len(orders) > 1:
        first, *others = sorted(orders)
        for rank in others:
            if apart := _other_order(orders[first], orders[rank]):
                one, other = apart
                notes.append(
                    f"taps come in another order on rank {rank} than on rank {first}, the first: "
                    f"{other.label} where rank {first} has {one.label}"
                )
                break
    return notes


def _other_order(one: Iterable[Place], other: Iterable[Place]) -> tuple[Place, Place] | None:
    """Return the first two places that come otherwise, of those that both have, None if none."""
    a, b = list(one), list(other)
    common = {*a} & {*b}
    for x, y in zip((p for p in a if p in common), (p for p in b if p in common), strict=True):
        if x != y:
            return x, y
    return None
