"""Find the rows of a key: one sorted array of numbers, searched by bisection.

1. `Index.build` gives every distinct group (kind, name, tags that count) a number.
2. Group, step, occurrence and rank become one integer a row; the rows are sorted by it.
3. `Index.find` turns a key into the range of its ranks' integers and bisects.

Rows of a second forward (`recompute`) share the key of the first, which is the one that is kept.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..errors import DamagedRecording
from ..sizes import count
from ..tags import TagValue, canonical, is_recompute, key_tags, label
from .rows import parse_tags

if TYPE_CHECKING:
    import polars as pl

Group = tuple[str, str]  # name and canonical tags, or whatever stands for them
Grouping = Callable[[str, "dict[str, TagValue]"], Group]


def whole_key(name: str, tags: dict[str, TagValue]) -> Group:
    """Group by name and every tag that is part of the key."""
    return name, key_tags(tags)


@dataclass
class Index:
    """Rows by key.

    Attributes:
        groups: the number of each (kind, group).
    """

    groups: dict[tuple[str, Group], int]
    _steps: dict[int, int]
    _occurrences: dict[int, int]
    _codes: array[int] = field(repr=False)
    _ranks: array[int] = field(repr=False)
    _rows: array[int] = field(repr=False)

    @classmethod
    def build(
        cls,
        frame: pl.DataFrame,
        *,
        group: Grouping = whole_key,
        use_step: bool = True,
        recount: bool = False,
    ) -> Index:
        """Index a manifest.

        Args:
            frame: rows with rank, seq, step, name, occurrence, tags, kind.
            group: what of name and tags counts.
            use_step: whether the step counts.
            recount: count the occurrence anew, in execution order, over what counts.
        """
        import polars as pl

        if frame.height == 0:
            return cls({}, {}, {}, array("q"), array("q"), array("q"))
        names = frame.select("name", "tags").unique(maintain_order=True)
        known: dict[Group, int] = {}
        numbers, seconds = [], []
        for name, text in names.iter_rows():
            tags = parse_tags(text)
            numbers.append(known.setdefault(group(name, tags), len(known)))
            seconds.append(is_recompute(tags))
        names = names.with_columns(
            pl.Series("group", numbers, pl.Int64), pl.Series("second", seconds, pl.Int64)
        )
        kinds = frame["kind"].unique(maintain_order=True).to_list()
        rows = (
            frame.select(
                "rank",
                "seq",
                "step",
                "name",
                "occurrence",
                "tags",
                pl.col("kind").replace_strict(kinds, range(len(kinds)), return_dtype=pl.Int64),
            )
            .with_row_index("row")
            .join(names, on=["name", "tags"], how="left", maintain_order="left")
        )
        if not use_step:
            rows = rows.with_columns(step=pl.lit(0, pl.Int64))
        if recount:
            within = ["rank", "kind", "second", "group", "step"]
            rows = rows.sort("rank", "seq").with_columns(
                occurrence=pl.int_range(pl.len(), dtype=pl.Int32).over(within)
            )
        elif not _in_order(rows):
            rows = rows.sort("rank", "seq")
        steps, occurrences = _sorted(rows["step"]), _sorted(rows["occurrence"])
        ranks = _sorted(rows["rank"])
        sizes = [len(known), len(kinds), len(steps), len(occurrences), len(ranks), 2]
        if math.prod(sizes) >= 1 << 62:
            raise DamagedRecording("the manifest", "it has more keys than can be counted")
        code = pl.col("group")
        for column, size in (
            (pl.col("kind"), len(kinds)),
            (steps.search_sorted(rows["step"]), len(steps)),
            (occurrences.search_sorted(rows["occurrence"]), len(occurrences)),
            (ranks.search_sorted(rows["rank"]), len(ranks)),
            (pl.col("second"), 2),
        ):
            code = code * size + column
        # Stable: the first of a key in execution order is the one that counts.
        order = (
            rows.lazy()
            .select("rank", "row", code=code)
            .sort("code", maintain_order=True)
            .filter((pl.col("code") // 2 != (pl.col("code") // 2).shift(1)).fill_null(True))
            .with_columns(code=pl.col("code") // (2 * len(ranks)))
            .collect()
        )
        groups = {
            (kind, one): number * len(kinds) + k
            for one, number in known.items()
            for k, kind in enumerate(kinds)
        }
        return cls(
            groups,
            {step: i for i, step in enumerate(steps)},
            {occurrence: i for i, occurrence in enumerate(occurrences)},
            array("q", order["code"].to_list()),
            array("q", order["rank"].to_list()),
            array("q", order["row"].to_list()),
        )

    def find(self, kind: str, group: Group, step: int, occurrence: int) -> dict[int, int]:
        """Return the row of each rank that has the key: rank -> row number in the frame."""
        low, high = self._range(kind, group, step, occurrence)
        return dict(zip(self._ranks[low:high], self._rows[low:high], strict=True))

    def find_on(self, rank: int, kind: str, group: Group, step: int, occurrence: int) -> int | None:
        """Return the row number of the key on one rank, None where that rank has none."""
        low, high = self._range(kind, group, step, occurrence)
        at = bisect_left(self._ranks, rank, low, high)
        return self._rows[at] if at < high and self._ranks[at] == rank else None

    def _range(self, kind: str, group: Group, step: int, occurrence: int) -> tuple[int, int]:
        number = self.groups.get((kind, group))
        at_step = self._steps.get(step)
        at_occurrence = self._occurrences.get(occurrence)
        if number is None or at_step is None or at_occurrence is None:
            return 0, 0
        code = (number * len(self._steps) + at_step) * len(self._occurrences) + at_occurrence
        low = bisect_left(self._codes, code)
        return low, bisect_right(self._codes, code, low)

    def places(self, kind: str, group: Group) -> list[tuple[int, int]]:
        """Return the (step, occurrence) pairs recorded for a group, in order."""
        number = self.groups.get((kind, group))
        if number is None:
            return []
        each = len(self._steps) * len(self._occurrences)
        low = bisect_left(self._codes, number * each)
        high = bisect_left(self._codes, (number + 1) * each, low)
        steps, occurrences = list(self._steps), list(self._occurrences)
        return [
            (steps[code // len(occurrences) % len(steps)], occurrences[code % len(occurrences)])
            for code in sorted(set(self._codes[low:high]))
        ]


def searched(
    frame: pl.DataFrame, kind: str, group: Group, step: int, occurrence: int
) -> dict[int, int]:
    """Return what `Index.find` does of whole keys, without an index: it looks at every row.

    Args:
        frame: a manifest, as `Index.build` takes it.
        kind: of the records.
        group: of `whole_key`.
        step: the step.
        occurrence: the occurrence.
    """
    import polars as pl

    wanted = {"step": step, "occurrence": occurrence, "kind": kind, "name": group[0]}
    try:
        same = pl.all_horizontal(pl.col(name) == value for name, value in wanted.items())
        at = frame.select(same.arg_true()).to_series()
    except (pl.exceptions.PolarsError, OverflowError):  # a number beyond its column's
        return {}
    rows = frame.select("rank", "seq", "tags")[at].with_columns(row=at)
    found: dict[int, tuple[bool, int, int]] = {}
    for rank, seq, text, row in rows.iter_rows():
        tags = parse_tags(text)
        if key_tags(tags) == group[1]:
            one = is_recompute(tags), seq, row
            found[rank] = min(one, found.get(rank, one))
    return {rank: found[rank][2] for rank in sorted(found)}


def _in_order(rows: pl.DataFrame) -> bool:
    """Whether rows are sorted by rank and seq."""
    rank, seq = rows["rank"], rows["seq"]
    before, earlier = rank.shift(1), seq.shift(1)
    return not bool(((rank < before) | ((rank == before) & (seq < earlier))).any())


def _sorted(column: pl.Series) -> pl.Series:
    return column.unique().sort()


class Near(NamedTuple):
    """A recorded key that is close to one that is not there.

    Attributes:
        distance: how far it is.
        text: the key, and what differs.
        name: its name.
        tags: its tags.
        differing: the tags that differ.
        others: how many other things do: name, kind, step, occurrence.
    """

    distance: float
    text: str
    name: str
    tags: dict[str, TagValue]
    differing: list[str]
    others: int


def nearest(index: Index, kind: str, group: Group, step: int, occurrence: int) -> list[Near]:
    """Return the recorded keys closest to one that is not there, at most three."""
    import difflib

    name, text = group
    wanted = as_tags(text)
    found: list[Near] = []
    for one_kind, (other, other_text) in index.groups:
        places = index.places(one_kind, (other, other_text))
        if not places:
            continue
        tags = as_tags(other_text)
        differing = sorted(tag for tag in {*wanted, *tags} if not _is_same(wanted, tags, tag))
        likeness = difflib.SequenceMatcher(None, name, other).ratio() if name != other else 1.0
        if likeness < 0.5:
            continue
        facts = [f"{tag} is {_show(tags, tag)}, asked {_show(wanted, tag)}" for tag in differing]
        if other != name:
            facts.insert(0, "the name differs")
        if one_kind != kind:
            facts.append(f"it is a {one_kind}, asked for a {kind}")
        steps = sorted({s for s, _ in places})
        near_step = step if step in steps else min(steps, key=lambda s: (abs(s - step), s))
        if near_step != step:
            facts.append(f"step is {near_step}, asked {step}")
        times = [o for s, o in places if s == near_step]
        near = occurrence if occurrence in times else max(times)
        if near != occurrence:
            facts.append(
                f"it was recorded {count(len(times), 'time')} in that step, "
                f"asked for occurrence {occurrence}"
            )
        if not facts:
            continue
        distance = len(facts) + 4 * (1 - likeness) + (one_kind != kind)
        where = f"{label(other, tags)} step={near_step} occurrence={near}"
        told = f"{where} ({', '.join(facts)})"
        others = len(facts) - len(differing)
        found.append(Near(distance, told, other, tags, differing, others))
    return sorted(found, key=lambda one: one[:2])[:3]


def _is_same(one: dict[str, TagValue], other: dict[str, TagValue], tag: str) -> bool:
    """Whether two keys have the same tag: 3 is not 3.0, and True is not 1."""
    return (
        tag in one and tag in other and canonical({tag: one[tag]}) == canonical({tag: other[tag]})
    )


def as_tags(text: str) -> dict[str, TagValue]:
    """Return the tags of a key's text, none where it is no such text."""
    try:
        tags = json.loads(text)
    except ValueError:
        return {}
    return tags if isinstance(tags, dict) else {}


def _show(tags: dict[str, TagValue], tag: str) -> str:
    return repr(tags[tag]) if tag in tags else "absent"
