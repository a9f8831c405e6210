"""Which records belong to a tap: manifest and key to a sender slice, or the nearest misses.

1. `MatchOn.parse` reads `--match-on`: the whole key by default, some tags by name, or `order`.
2. `Matcher` indexes the baseline's manifest accordingly. Where occurrences are counted anew, only
   the records that the filter selects count, as on the target.
3. `Matcher.find` counts the target's taps in the same way and returns a `Match`.

A second forward (`recompute`) gets what the first firing with its key got.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recorder.errors import MissingRecord, UsageError
from recorder.filters import Filter
from recorder.format.index import Group, Index, nearest, whole_key
from recorder.format.rows import matching, parse_tags
from recorder.sizes import count
from recorder.tags import PART, RECOMPUTE, TagValue, canonical, label

if TYPE_CHECKING:
    import polars as pl

    from recorder.taps.selection import Selected

ORDER = "order"
_EXPLAINING_SECONDS = 2.0  # every miss is logged, but a job with a million gets no million reasons
_ALL: Group = ("", "")


@dataclass(frozen=True)
class MatchOn:
    """What counts for a match.

    Attributes:
        tags: the tags that count, `name` and `step` among them if they do; None for the whole key.
        order: pair by position instead.
    """

    tags: tuple[str, ...] | None = None
    order: bool = False

    @classmethod
    def parse(cls, text: str | None) -> MatchOn:
        """Read `--match-on`.

        Raises:
            UsageError: empty, a tag named twice, or `order` among tags.
        """
        if text is None:
            return cls()
        names = tuple(part.strip() for part in text.split(","))
        if names == (ORDER,):
            return cls(order=True)
        if not all(names):
            raise UsageError(
                f"--match-on {text!r} names an empty tag; write tags such as name,layer, or order"
            )
        if ORDER in names:
            raise UsageError("--match-on order stands alone; it pairs by position, not by tags")
        wrong = [n for n in names if n in (RECOMPUTE, "rank", "occurrence", "seq", "kind")]
        if wrong:
            raise UsageError(
                f"--match-on cannot use {wrong[0]!r}; name tags of the taps, `name` or `step`"
            )
        if len(set(names)) < len(names):
            raise UsageError(f"--match-on {text!r} names a tag twice")
        return cls(names)

    @property
    def whole(self) -> bool:
        """Whether the whole key counts."""
        return self.tags is None and not self.order

    @property
    def use_step(self) -> bool:
        """Whether the step counts."""
        return not self.order and (self.tags is None or "step" in self.tags)

    def group(self, name: str, tags: dict[str, TagValue]) -> Group:
        """Return what counts of a name and tags."""
        if self.whole:
            return whole_key(name, tags)
        named = self.tags or ()
        counted = {tag: tags.get(tag) for tag in named if tag not in ("name", "step")}
        if PART in tags:  # a later part of a gradient is none of the first ones
            counted[PART] = tags[PART]
        if self.order and not counted:
            return _ALL
        return name if "name" in named else "", canonical(counted)


@dataclass(frozen=True)
class Match:
    """The records that belong to a tap.

    Attributes:
        rows: sender rank -> row number in `Matcher.frame`; ranks that have none are left out.
        warning: how the paired tags contradict each other, or "".
    """

    rows: dict[int, int]
    warning: str = ""


@dataclass
class Matcher:
    """Finds the records of each tap of one receiver rank. Thread-safe.

    Args:
        frame: the baseline's manifest rows.
        match_on: what counts.
        filter: the replay's filter.
        rank: the receiver's rank, for filters that read it.
        step_offset: added to the target's step to get the baseline's.
    """

    frame: pl.DataFrame
    match_on: MatchOn = MatchOn()
    filter: Filter | None = None
    rank: int = 0
    step_offset: int = 0
    _counts: Counter[Any] = field(default_factory=Counter)
    _firsts: dict[Any, Match | None] = field(default_factory=dict)  # None: it had no record
    _before: dict[Any, Match | None] = field(default_factory=dict)  # those of the step before
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _explaining: float = 0.0

    def __post_init__(self) -> None:
        if self.match_on.whole:
            self.index = Index.build(self.frame)
            self._offsets: list[int] | None = None
            return
        kept = selected_rows(self.frame, self.filter, self.rank, self.step_offset)
        self._offsets = kept["row"].to_list()
        self.index = Index.build(
            kept, group=self.match_on.group, use_step=self.match_on.use_step, recount=True
        )

    def find(self, selected: Selected, kind: str) -> Match:
        """Return the records for a tap.

        Raises:
            MissingRecord: there is none; names the nearest and what differs.
        """
        key = selected.key
        step = key.step + self.step_offset
        first = (kind, key.name, key.tags, key.step, key.occurrence)
        if not self.match_on.whole:
            with self._lock:
                known = self._firsts if first in self._firsts else self._before
                if selected.recompute and first in known:
                    match = known[first]
                    if match is None:
                        raise MissingRecord("its first forward had no record either, see there")
                    return match
        group, occurrence = self._counted(selected, kind)
        at_step = step if self.match_on.use_step else 0
        rows = self.index.find(kind, group, at_step, occurrence)
        if not rows:
            if not self.match_on.whole and not selected.recompute:
                with self._lock:
                    self._firsts[first] = None
            raise MissingRecord(self._why_missing(kind, group, at_step, occurrence))
        if self._offsets is not None:
            rows = {rank: self._offsets[row] for rank, row in rows.items()}
        match = Match(rows, self._contradiction(selected, rows))
        if not self.match_on.whole and not selected.recompute:
            with self._lock:
                self._firsts[first] = match
        return match

    def has(self, selected: Selected, kind: str) -> bool:
        """Whether a key was recorded; False where not the whole key counts, and none is known."""
        key, step = selected.key, selected.key.step + self.step_offset
        group = key.name, key.tags
        return self.match_on.whole and bool(self.index.find(kind, group, step, key.occurrence))

    def next_step(self) -> None:
        """Forget the firsts of the step before; a backward may come after the step has ended."""
        with self._lock:
            self._before, self._firsts = self._firsts, {}
            if self.match_on.use_step:
                self._counts.clear()

    def _counted(self, selected: Selected, kind: str) -> tuple[Group, int]:
        key = selected.key
        if self.match_on.whole:
            return (key.name, key.tags), key.occurrence
        group = self.match_on.group(key.name, selected.tags)
        counted = (kind, group, selected.recompute)
        with self._lock:
            occurrence = self._counts[counted]
            self._counts[counted] += 1
        return group, occurrence

    def _contradiction(self, selected: Selected, rows: dict[int, int]) -> str:
        """Say which tags of an order pairing differ where both sides carry them."""
        if not self.match_on.order:
            return ""
        row = self.frame.row(next(iter(rows.values())), named=True)
        sender = {**parse_tags(row["tags"]), "name": row["name"]}
        receiver = {**selected.tags, "name": selected.key.name}
        differing = [
            tag
            for tag in sorted(receiver.keys() & sender.keys() - {RECOMPUTE})
            if receiver[tag] != sender[tag]
        ]
        if not differing:
            return ""
        return (
            f"paired by order with {label(row['name'], row['tags'])} step={row['step']}, "
            f"but {' and '.join(differing)} differ; check that both sides tap the same places, "
            "or match on tags"
        )

    def _why_missing(self, kind: str, group: Group, step: int, occurrence: int) -> str:
        if self.match_on.order:
            total = len(self.index.places(kind, group))
            return (
                f"this is selected tap number {occurrence + 1}, and the recording has only {total}"
                " selected; check that both sides tap the same places, or match on tags"
            )
        places = self.index.places(kind, group)
        times = [o for s, o in places if s == step]
        if times and occurrence > max(times):
            within = f" in step {step}" if self.match_on.use_step else ""
            return (
                f"already replayed: it was recorded {count(len(times), 'time')}{within}, and "
                f"this is time {occurrence + 1}; nearest: {label(*group)} step={step} "
                f"occurrence={max(times)}"
            )
        asked = f"{label(*group)} step={step} occurrence={occurrence}"
        if self._explaining > _EXPLAINING_SECONDS:
            return f"nothing recorded under {asked}; the first such messages name the nearest"
        start = time.perf_counter()
        close = nearest(self.index, kind, group, step, occurrence)
        self._explaining += time.perf_counter() - start
        if not close:
            names = sorted({one[0] for _, one in self.index.groups})
            some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            return f"nothing recorded under {asked}; names recorded: {some or 'none'}"
        return f"nothing recorded under {asked}; nearest: {'; '.join(close)}"


def selected_rows(
    frame: pl.DataFrame, filter: Filter | None, rank: int, step_offset: int
) -> pl.DataFrame:
    """Return the records that the replay's filter selects for one receiver, with `row` numbers.

    A filter speaks of the target's taps: `rank` in it is the receiver's, `step` the target's.
    """
    rows = frame.with_row_index("row")
    if filter is None:
        return rows
    keep = matching(
        frame, filter, lambda row: {"rank": rank, "step": row["step"] - step_offset}, lenient=True
    )
    return rows.filter(keep)
