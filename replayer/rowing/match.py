"""Which records may hold the rows of a tap: those of its name and tags, of any step and rank."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recorder.errors import ReplayError
from recorder.format.rows import parse_tags, row_at
from recorder.format.schema import AUXILIARY
from recorder.recording import Recording
from recorder.tags import is_recompute
from recorder.taps.selection import Selected

from ..match import Matcher, selected_rows
from .held import paired
from .places import Keys, Places
from .records import Records

if TYPE_CHECKING:
    import polars as pl

_MOST_KEPT = 256
_Key = tuple[object, ...]


class RowMatcher:
    """Finds the records of rows. Thread-safe.

    Args:
        recording: the baseline's.
        matcher: what counts of name and tags.
        check: whether to hold ids against their digest.
        is_last: whether of rows that were recorded several times the last is taken.
    """

    def __init__(
        self, recording: Recording, matcher: Matcher, *, check: bool, is_last: bool = False
    ) -> None:
        self._recording, self._matcher, self._check = recording, matcher, check
        self._is_last = is_last
        self._numbers: dict[_Key, list[int]] | None = None
        self._frame: pl.DataFrame | None = None
        self._kept: dict[_Key, Records] = {}
        self._latest: dict[int, int] = {}
        self._shared: dict[object, tuple[list[Places], list[Keys]]] = {}
        self._lock = threading.RLock()

    @property
    def has_any(self) -> bool:
        """Whether any record has rows."""
        return bool(self._by_key())

    def find(
        self,
        selected: Selected,
        kind: str,
        receivers: Sequence[tuple[str, ...]],
        *,
        fires: bool = True,
    ) -> Records | None:
        """Return the records of a tap; None where none of them has rows.

        Args:
            selected: the tap.
            kind: `tensor` or `grad`.
            receivers: the dims that its own rows are along, by group.
            fires: whether it does, and is counted as one that did.

        Raises:
            ReplayError: it is matched by order, which says nothing of rows.
            LayoutError: the records contradict each other.
            DamagedRecording: the ids of none of the records can be read.
        """
        match_on = self._matcher.match_on
        if not self.has_any:
            return None
        if match_on.order:
            raise ReplayError(
                "both sides say which row is which, and --match-on order pairs taps by their "
                "place, whatever rows they have; match on tags, as in --match-on name,layer"
            )
        selected = self._matcher.as_recorded(selected)
        key = selected.key
        step = key.step + self._matcher.step_offset if match_on.rows_use_step else None
        number = self._matcher.upcoming(selected, kind) if match_on.rows_use_occurrence else None
        at: _Key = (kind, match_on.group_of_target(key.name, selected.tags), step, number)
        with self._lock:
            numbers = self._by_key().get(at)
            if numbers is None:
                return None
            if fires:
                self._matcher.pass_over(selected, kind)
            known = (*at, tuple(receivers))
            found = self._kept.get(known)
            if found is None:
                assert self._frame is not None  # `_by_key` made it
                rows = [row_at(self._frame, number) for number in numbers]
                found = Records.of(
                    self._recording,
                    rows,
                    lambda own: paired(own, receivers),
                    self._shared,
                    latest=self._latest,
                    check=self._check,
                    is_lenient=True,
                )
                while len(self._kept) >= _MOST_KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[known] = found
            return found

    def _by_key(self) -> dict[_Key, list[int]]:
        with self._lock:
            if self._numbers is None:
                self._numbers = self._numbered()
            return self._numbers

    def _numbered(self) -> dict[_Key, list[int]]:
        """Return the rows of the frame by what counts of their keys, in the order they count."""
        import polars as pl

        matcher, match_on = self._matcher, self._matcher.match_on
        frame = self._recording.rows().filter(~pl.col("kind").is_in(AUXILIARY))
        has_any = bool(frame["rows"].is_not_null().any())
        if not has_any or match_on.order:
            return {("",): [0]} if has_any else {}
        if not match_on.whole:
            frame = selected_rows(
                frame, matcher.filter, matcher.rank, matcher.step_offset, matcher.renames
            ).drop("row")
        self._latest = dict(self._recording.latest().select("rank", "attempt").unique().iter_rows())
        names = frame.select("name", "tags").unique(maintain_order=True)
        groups: dict[tuple[str, str], tuple[object, bool]] = {}
        for name, text in names.iter_rows():
            tags = parse_tags(text)
            groups[name, text] = match_on.group(name, tags), is_recompute(tags)
        codes = {one: code for code, one in enumerate({*groups.values()})}
        names = names.with_columns(code=pl.Series([codes[one] for one in groups.values()]))
        frame = frame.join(names, on=["name", "tags"], how="left", maintain_order="left")
        # Counted anew over what counts, those without rows too: as the target's are.
        within = ["rank", "attempt", "kind", "code", *["step"] * match_on.use_step]
        frame = frame.sort("rank", "attempt", "seq").with_columns(
            number=pl.int_range(pl.len(), dtype=pl.Int64).over(within)
        )
        # The latest attempt first, or last if that is taken; else as one rank would compute them.
        frame = frame.filter(pl.col("rows").is_not_null()).sort(
            "attempt", "step", "occurrence", "rank", "seq",
            descending=[not self._is_last, False, False, False, False], maintain_order=True,
        )  # fmt: skip
        self._frame = frame.drop("code", "number")
        found: dict[_Key, list[int]] = {}
        seconds: dict[_Key, list[int]] = {}
        by = ["kind", "code"]
        by += ["step"] * match_on.rows_use_step + ["number"] * match_on.rows_use_occurrence
        known = {code: one for one, code in codes.items()}
        for values, part in frame.with_row_index("at").group_by(by, maintain_order=True):
            given = dict(zip(by, values, strict=True))
            group, is_second = known[given["code"]]
            key = (given["kind"], group, given.get("step"), given.get("number"))
            # A second forward computes nothing that its first has not.
            (seconds if is_second else found).setdefault(key, []).extend(part["at"].to_list())
        return {**seconds, **{key: sorted(numbers) for key, numbers in found.items()}}
