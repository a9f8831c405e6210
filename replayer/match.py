"""Which records belong to a tap: manifest and key to a sender slice, or the nearest misses.

1. `MatchOn.parse` reads `--match-on`: the whole key by default, some tags by name, or `order`.
2. `Matcher` indexes the baseline's manifest accordingly. Where occurrences are counted anew, only
   the records that the filter selects count, as on the target.
3. `Matcher.find` counts the target's taps in the same way and returns a `Match`.

A second forward (`recompute`) gets what the first firing with its key got.
"""

from __future__ import annotations

import contextlib
import difflib
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recorder.errors import MissingRecord, ReplayError, UsageError
from recorder.filters import Filter
from recorder.format.index import Group, Index, Near, as_tags, nearest, whole_key
from recorder.format.rows import matching, parse_tags
from recorder.sizes import count
from recorder.tags import PART, RECOMPUTE, TagValue, canonical, key_tags, label

from .rename import Rename, oriented_to, renamed

if TYPE_CHECKING:
    import polars as pl

    from recorder.format.schema import ManifestRow
    from recorder.taps.selection import Selected

ORDER = "order"
_OCCURRENCE = "occurrence"
_EXPLAINING_SECONDS = 2.0  # every miss is logged, but a job with a million gets no million reasons
_ALL: Group = ("", "")


@dataclass(frozen=True)
class MatchOn:
    """What counts for a match.

    Attributes:
        tags: the tags that count, `name` and `step` among them if they do, as the baseline calls
            them; None for the whole key.
        order: pair by position instead.
        renamed: of those tags, what the target calls otherwise.
        rows_use_occurrence: whether rows count the occurrence; all else does in any case.
    """

    tags: tuple[str, ...] | None = None
    order: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    rows_use_occurrence: bool = False

    @classmethod
    def parse(cls, text: str | None) -> MatchOn:
        """Read `--match-on`.

        Raises:
            UsageError: empty, a tag named twice, or `order` among tags.
        """
        if text is None:
            return cls()
        parts = [part.strip().partition("=") for part in text.split(",")]
        names = tuple(name.strip() for name, _, _ in parts)
        renamed = tuple((name.strip(), other.strip()) for name, is_, other in parts if is_)
        if names == (ORDER,) and not renamed:
            return cls(order=True)
        if not all(names) or not all(other for _, other in renamed):
            raise UsageError(
                f"--match-on {text!r} names an empty tag; write tags such as name,layer, or order"
            )
        if ORDER in names:
            raise UsageError("--match-on order stands alone; it pairs by position, not by tags")
        is_counted = _OCCURRENCE in names
        names = tuple(name for name in names if name != _OCCURRENCE)
        given = [*names, *(other for _, other in renamed)]
        if not names or _OCCURRENCE in given:
            raise UsageError(
                "--match-on occurrence counts for rows, beside tags that count; name these too, as "
                "in name,layer,step,occurrence"
            )
        wrong = [n for n in given if n in (RECOMPUTE, "rank", "seq", "kind")]
        if wrong:
            raise UsageError(
                f"--match-on cannot use {wrong[0]!r}; name tags of the taps, `name` or `step`"
            )
        fixed = [f"{one}={other}" for one, other in renamed if {one, other} & {"name", "step"}]
        if fixed:
            raise UsageError(
                f"--match-on cannot use {fixed[0]!r}: `name` and `step` are called so on both "
                "sides; give them alone"
            )
        others = [dict(renamed).get(name, name) for name in names]
        if len(set(names)) < len(names) or len(set(others)) < len(others):
            raise UsageError(f"--match-on {text!r} names a tag twice")
        return cls(names, renamed=renamed, rows_use_occurrence=is_counted)

    def check(self, texts: Collection[str], *, of_target: bool = False) -> None:
        """Refuse a tag that no tap carries: as None on both sides it would match everything.

        Args:
            texts: tags that were recorded, each canonical JSON.
            of_target: whether the target's are among them, whose names for tags count then too.

        Raises:
            UsageError: there is one.
        """
        carried = {tag for text in texts for tag in parse_tags(text)}
        named = [*(self.tags or ()), *(other for _, other in self.renamed if of_target)]
        known = sorted({"name", "step", *carried})
        unknown = [tag for tag in named if tag not in known]
        if unknown and len(texts):  # else there is nothing to match in any case
            close = difflib.get_close_matches(unknown[0], known, 3) or known[:8]
            raise UsageError(
                f"--match-on names {unknown[0]!r}, which no tap carries; there are "
                f"{', '.join(close)}"
            )

    @property
    def whole(self) -> bool:
        """Whether the whole key counts."""
        return self.tags is None and not self.order

    @property
    def use_name(self) -> bool:
        """Whether the name counts."""
        return self.whole or "name" in (self.tags or ())

    @property
    def use_step(self) -> bool:
        """Whether the step counts."""
        return not self.order and (self.tags is None or "step" in self.tags)

    @property
    def rows_use_step(self) -> bool:
        """Whether the step counts for rows: only where it is named."""
        return self.tags is not None and "step" in self.tags

    def group(self, name: str, tags: dict[str, TagValue]) -> Group:
        """Return what counts of the baseline's name and tags."""
        if self.whole:
            return whole_key(name, tags)
        named = self.tags or ()
        counted = {tag: tags.get(tag) for tag in named if tag not in ("name", "step")}
        if PART in tags:  # a later part of a gradient is none of the first ones
            counted[PART] = tags[PART]
        if self.order and not counted:
            return _ALL
        return name if "name" in named else "", canonical(counted)

    def group_of_target(self, name: str, tags: dict[str, TagValue]) -> Group:
        """Return what counts of the target's name and tags."""
        if not self.renamed:
            return self.group(name, tags)
        called = {other: one for one, other in self.renamed}
        hidden = {one for one, _ in self.renamed} - {*called}
        kept = {tag: value for tag, value in tags.items() if tag not in hidden}
        return self.group(name, {called.get(tag, tag): value for tag, value in kept.items()})


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
        renames: what the target calls otherwise.

    Raises:
        UsageError: a tag that is to count is none that was recorded.
    """

    frame: pl.DataFrame
    match_on: MatchOn = MatchOn()
    filter: Filter | None = None
    rank: int = 0
    step_offset: int = 0
    renames: Sequence[Rename] = ()
    _counts: Counter[Any] = field(default_factory=Counter)
    _firsts: dict[Any, Match | None] = field(default_factory=dict)  # None: it had no record
    _before: dict[Any, Match | None] = field(default_factory=dict)  # those of the step before
    _numbers: dict[Any, int] = field(default_factory=dict)  # of what was passed over
    _numbers_before: dict[Any, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _explaining: float = 0.0
    _advised: set[str] = field(default_factory=set)
    _renamed: dict[tuple[str, str], Selected] = field(default_factory=dict)
    _owners: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.renames = oriented_to(self.renames, self.frame["name"].unique())
        if self.match_on.whole:
            self.index = Index.build(self.frame)
            self._offsets: list[int] | None = None
            return
        self.match_on.check(self.frame["tags"].unique().to_list())
        kept = selected_rows(self.frame, self.filter, self.rank, self.step_offset, self.renames)
        self._offsets = kept["row"].to_list()
        self.index = Index.build(
            kept, group=self.match_on.group, use_step=self.match_on.use_step, recount=True
        )

    def find(self, selected: Selected, kind: str) -> Match:
        """Return the records for a tap.

        Raises:
            MissingRecord: there is none; names the nearest and what differs.
            ReplayError: with the renamings two taps have one key, or two renamings fit alike.
        """
        key = selected.key
        first = (kind, key.name, key.tags, key.step, key.occurrence)
        selected = self.as_recorded(selected)
        step = key.step + self.step_offset
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
        selected = self.as_recorded(selected)
        key, step = selected.key, selected.key.step + self.step_offset
        group = key.name, key.tags
        return self.match_on.whole and bool(self.index.find(kind, group, step, key.occurrence))

    def as_recorded(self, selected: Selected) -> Selected:
        """Return a tap under the name and the tags that the baseline has for it."""
        if not self.renames:
            return selected
        key = selected.key
        own = key.name, key.tags
        with self._lock:
            known = self._renamed.get((key.name, selected.text))
            if known is None:
                known = self._renamed[key.name, selected.text] = self._as_renamed(selected, own)
        new = key._replace(name=known.key.name, tags=known.key.tags)
        return selected._replace(key=new, tags=known.tags, text=known.text)

    def _as_renamed(self, selected: Selected, own: tuple[str, str]) -> Selected:
        try:
            name, tags = renamed(self.renames, selected.key.name, selected.tags)
        except UsageError as err:
            raise ReplayError(str(err)) from None
        new = name, key_tags(tags)
        owner = self._owners.setdefault(new, own)
        if owner != own and self.match_on.whole:
            raise ReplayError(
                f"with --rename, {label(*owner)} and {label(*own)} would have one key; rename so "
                "that they stay apart, or leave one of them out with --filter"
            )
        key = selected.key._replace(name=name, tags=new[1])
        return selected._replace(key=key, tags=tags, text=canonical(tags))

    def upcoming(self, selected: Selected, kind: str) -> int:
        """Return which firing of what counts a tap is, before it is found or passed over.

        Args:
            selected: the tap, as the baseline has it.
            kind: `tensor` or `grad`.
        """
        key = selected.key
        if self.match_on.whole:
            return key.occurrence
        first = (kind, key.name, key.tags, key.step, key.occurrence)
        with self._lock:
            for known in (self._numbers, self._numbers_before):
                if selected.recompute and first in known:
                    return known[first]
            group = self.match_on.group_of_target(key.name, selected.tags)
            return self._counts[kind, group, selected.recompute]

    def pass_over(self, selected: Selected, kind: str) -> None:
        """Count a tap, as `find` does, whose rows are matched one by one.

        Args:
            selected: the tap, as the baseline has it.
            kind: `tensor` or `grad`.
        """
        key = selected.key
        if self.match_on.whole:
            return
        first = (kind, key.name, key.tags, key.step, key.occurrence)
        with self._lock:
            if selected.recompute and (first in self._numbers or first in self._numbers_before):
                return
        _, number = self._counted(selected, kind)
        with self._lock:
            self._numbers[first] = number
            self._firsts[first] = None  # nor is its repetition to be found by its place

    def next_step(self) -> None:
        """Forget the firsts of the step before; a backward may come after the step has ended."""
        with self._lock:
            self._before, self._firsts = self._firsts, {}
            self._numbers_before, self._numbers = self._numbers, {}
            if self.match_on.use_step:
                self._counts.clear()

    def _counted(self, selected: Selected, kind: str) -> tuple[Group, int]:
        key = selected.key
        if self.match_on.whole:
            return (key.name, key.tags), key.occurrence
        group = self.match_on.group_of_target(key.name, selected.tags)
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
        told = f"nothing recorded under {asked}; nearest: {'; '.join(one.text for one in close)}"
        advice = self._advice(kind, group, close[0]) if self.match_on.whole else ""
        if not advice or advice in self._advised:
            return told
        self._advised.add(advice)
        return f"{told}; {advice}"

    def _advice(self, kind: str, group: Group, near: Near) -> str:
        """Return how to match where the nearest key differs only in tags that one side lacks."""
        name, wanted = group[0], as_tags(group[1])
        recorded = [as_tags(text) for k, (n, text) in self.index.groups if (k, n) == (kind, name)]
        there, here = ({*near.tags} - {*wanted}, {*wanted} - {*near.tags})
        is_lacking = all(not {*wanted} & there and not {*tags} & here for tags in recorded)
        if near.others or near.name != name or {*near.differing} != there | here or not is_lacking:
            return ""
        shared = sorted({*wanted} & {*near.tags})
        called = []
        for one in sorted(there):
            values = [tags[one] for tags in recorded if one in tags]
            same = [other for other in sorted(here) if wanted[other] in values]
            close = difflib.get_close_matches(one, same, 1, 0.5)
            if close:
                called.append(f"{one}={close[0]}")
                here = here - {close[0]}
        lacking = [f"the target's taps carry no {tag}" for tag in sorted(there)][:1]
        lacking = lacking or [f"the recording's taps carry no {tag}" for tag in sorted(here)][:1]
        return f"{lacking[0]}: match with --match-on {','.join(['name', *shared, *called, 'step'])}"


def selected_rows(
    frame: pl.DataFrame,
    filter: Filter | None,
    rank: int,
    step_offset: int,
    renames: Sequence[Rename] = (),
) -> pl.DataFrame:
    """Return the records that the replay's filter selects for one receiver, with `row` numbers.

    A filter speaks of the target's taps, under their own names: `rank` in it is the receiver's,
    `step` the target's.
    """
    back = [one.reversed() for one in oriented_to(renames, frame["name"].unique())]
    rows = frame.with_row_index("row")
    if filter is None:
        return rows

    def seen(row: ManifestRow) -> dict[str, object]:
        here: dict[str, object] = {"rank": rank, "step": row["step"] - step_offset}
        if back:
            tags = parse_tags(row["tags"])
            name, own = row["name"], tags
            with contextlib.suppress(UsageError):  # the target may call it by several names
                name, own = renamed(back, name, tags)
            here |= {**dict.fromkeys(tags), **own, "name": name}
        return here

    keep = matching(frame, filter, seen, lenient=True)
    return rows.filter(keep)
