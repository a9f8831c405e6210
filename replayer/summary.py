"""What a replay came to: its log against the records it could have used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recorder.format.rows import parse_tags, seen_in
from recorder.sizes import count
from recorder.tags import is_recompute, label

from .log import AS_THEY_STAND, LEFT_OUT, SEQ_BITS, WITHOUT_EFFECT
from .match import MatchOn, selected_rows
from .rename import oriented_to
from .routing import without_weights
from .steps import forgotten_step

if TYPE_CHECKING:
    import polars as pl

    from .settings import ReplaySettings


@dataclass(frozen=True)
class Summary:
    """Counts over all receivers.

    Attributes:
        outcomes: how many taps had each outcome.
        first_error: the message of the first tap that failed, or "".
        first_missing: the message of the first tap without a record, or "".
        first_unkept: the message of the first graft without effect, or "".
        steps: that one side counted no steps where records or taps are left over, or "".
        values: that values differ from the recorded ones, with the first, or "".
        renames: which renamings fit no tap of the target, a line each.
        rows: how many rows of grafted taps were recorded, how many not, and of how many taps.
        first_rows: the first of these taps, "" where there is none.
        weights: that a router's indices were grafted, and not their weights, or "".
        one_sided: of how many grafted taps one side alone tells which row is which.
        first_one_sided: the first of these and why, "" where there is none.
        damaged: for how many grafted taps records were left out whose ids are damaged.
        first_damaged: the first of these, "" where there is none.
        bare: how many grafted taps have no rows to graft, but padding.
        selected: records that the filter selects.
        unused: those of them that no tap was given.
        unused_names: names and tags of some of these, most frequent first.
    """

    outcomes: dict[str, int]
    first_error: str
    first_missing: str
    selected: int
    unused: int
    unused_names: tuple[str, ...]
    first_unkept: str = ""
    steps: str = ""
    values: str = ""
    renames: tuple[str, ...] = ()
    rows: tuple[int, int, int] = (0, 0, 0)
    first_rows: str = ""
    weights: str = ""
    bare: int = 0
    one_sided: int = 0
    first_one_sided: str = ""
    damaged: int = 0
    first_damaged: str = ""

    def problems(self, strict: bool, refused: int = 0, status: int = 0) -> list[str]:
        """Return why the replay is not to be trusted; empty where it is.

        Args:
            strict: whether anything missed or unused counts.
            refused: taps whose tags or filter could not be made sense of.
            status: of the command.
        """
        found = []
        if self.outcomes.get("error"):
            found.append(
                f"{count(self.outcomes['error'], 'graft')} failed, the first: {self.first_error}"
            )
        unkept = self.outcomes.get(WITHOUT_EFFECT, 0)
        has_any = self.outcomes.get("grafted", 0) > self.bare
        if not has_any:
            found.append("nothing was grafted" + self._why_nothing(status))
        elif strict and self.outcomes.get("missing"):
            found.append(
                f"--strict: {count(self.outcomes['missing'], 'selected tap')} had no record, "
                f"the first: {self.first_missing}"
            )
        if strict and unkept and has_any:
            found.append(
                f"--strict: {count(unkept, 'graft')} had no effect, the first: {self.first_unkept}"
            )
        if strict and self.rows[1]:
            found.append(
                f"--strict: {count(self.rows[1], 'row')} of {count(self.rows[2], 'tap')} had no "
                f"record, the first: {self.first_rows}"
            )
        if strict and self.one_sided:
            found.append(
                f"--strict: {count(self.one_sided, 'tap')} matched where one side alone says which "
                f"row is which, the first: {self.first_one_sided}"
            )
        if strict and self.damaged:
            found.append(
                f"--strict: rows of {count(self.damaged, 'tap')} may have been in records that are "
                f"damaged, the first: {self.first_damaged}"
            )
        if strict and refused:
            found.append(f"--strict: {count(refused, 'tap')} could not be judged, see above")
        if strict and self.unused:
            found.append(
                f"--strict: {count(self.unused, 'selected record')} of {self.selected} never "
                f"used, such as {', '.join(self.unused_names[:3])}"
            )
        return found

    def _why_nothing(self, status: int) -> str:
        if self.outcomes.get(WITHOUT_EFFECT):
            return f" that anything could see, the first: {self.first_unkept}"
        if self.outcomes.get("missing"):
            return f": no selected tap has a record, the first: {self.first_missing}"
        if not self.outcomes and status:
            return f": COMMAND ended with {status} before it made a tap that was selected"
        if self.bare:
            return f": all rows of {count(self.bare, 'tap')} are padding"
        if not self.outcomes:
            return ": no tap was selected; see --filter, and graft doctor in the command's place"
        return ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What else to say of it, a line each."""
        rest = (self._rows_line, self.weights, self.values, self.steps, *self.renames)
        return tuple(filter(None, rest))

    @property
    def _rows_line(self) -> str:
        there, lost, taps = self.rows
        if not lost:
            return ""
        return (
            f"rows: {there} grafted, {lost} not recorded in {count(taps, 'tap')}, which kept their "
            f"values, the first: {self.first_rows}"
        )

    def line(self) -> str:
        """Return the counts as one line."""
        order = ("grafted", WITHOUT_EFFECT, "compared", "missing", "error")
        counts = [f"{self.outcomes[o]} {o}" for o in order if self.outcomes.get(o)]
        tail = f"; {self.unused} of {self.selected} selected records unused" if self.unused else ""
        return (", ".join(counts) or "no tap was selected") + tail


def summarize(
    log: pl.DataFrame,
    records: pl.DataFrame,
    settings: ReplaySettings,
    world_size: int,
) -> Summary:
    """Compare a replay's log with the baseline's records.

    Args:
        log: the log's rows, of all receivers.
        records: the baseline's manifest rows that could be used.
        settings: the replay's.
        world_size: the number of receivers.
    """

    outcomes = dict(log.group_by("outcome").len().iter_rows())
    used = _used(log)
    selected = _selected(records, settings, world_size)
    unused = selected.join(used, on=["rank", "seq"], how="anti")
    names = (
        unused.group_by("name", "tags")
        .len()
        .sort("len", "name", "tags", descending=[True, False, False])
    )
    has_rest = unused.height or outcomes.get("missing")
    return Summary(
        outcomes,
        _first(log, "error"),
        _first(log, "missing"),
        selected.height,
        unused.height,
        tuple(label(name, tags) for name, tags in names.head(5).select("name", "tags").iter_rows()),
        _first(log, WITHOUT_EFFECT),
        _steps(log, selected, settings) if has_rest else "",
        _values(log),
        _renames(log, records, settings),
        *_rows(log),
        without_weights(log, records),
        log.filter((log["outcome"] == "grafted") & (log["rows_found"] == 0)).height,
        *_said(log, AS_THEY_STAND),
        *_said(log, LEFT_OUT),
    )


def _rows(log: pl.DataFrame) -> tuple[tuple[int, int, int], str]:
    import polars as pl

    grafted = log.filter(
        pl.col("outcome") == "grafted"
    )  # a tap that has none is one without record
    lacking = grafted.filter(pl.col("rows_missing") > 0)
    there, lost = (int(grafted[name].sum()) for name in ("rows_found", "rows_missing"))
    if not lacking.height:
        return (there, 0, 0), ""
    row = lacking.sort("seq", "rank").row(0, named=True)
    first = f"{label(row['name'], row['tags'])} step={row['step']} on rank {row['rank']}"
    return (there, lost, lacking.height), first


def _said(log: pl.DataFrame, text: str) -> tuple[int, str]:
    """Return of how many grafted taps the message says something, and the first of them."""
    import polars as pl

    is_so = pl.col("message").str.contains(text, literal=True)
    found = log.filter((pl.col("outcome") == "grafted") & is_so)
    return found.height, _first(found, "grafted")


def _renames(log: pl.DataFrame, records: pl.DataFrame, settings: ReplaySettings) -> tuple[str, ...]:
    if settings.filter is not None:  # what it leaves out is not in the log
        return ()
    names = log["name"].unique()
    return tuple(
        f"--rename {one.text!r}: {one.b.text!r} fits no tap of the target"
        for one in oriented_to(settings.rename, records["name"].unique())
        if len(names) and not one.b.fits(names)
    )


def _values(log: pl.DataFrame) -> str:
    other = log.filter((log["outcome"] == "compared") & (log["changed"] > 0))
    if not other.height:
        return ""
    row = other.sort("step", "seq", "rank").row(0, named=True)
    verb = "differs" if other.height == 1 else "differ"
    return (
        f"{count(other.height, 'value')} {verb} from what was recorded, the first: "
        f"{label(row['name'], row['tags'])} step={row['step']} on rank {row['rank']}: "
        f"{row['message']}"
    )


def _steps(log: pl.DataFrame, records: pl.DataFrame, settings: ReplaySettings) -> str:
    if not MatchOn.parse(settings.match_on).use_step:
        return ""
    (_, here), (_, there) = seen_in(log), seen_in(records)
    common = ({*here} & {*there}) - {"step"}
    repeats = bool((records["occurrence"] > 0).any()), bool((log["occurrence"] > 0).any())
    sides = "the recording", "the target"
    return forgotten_step((there["step"], here["step"]), repeats, sides, common)


def _used(log: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    lists = log["senders"].drop_nulls().to_list()
    pairs = {(rank, seq) for seqs in lists for rank, seq in enumerate(seqs) if seq is not None}
    numbers = log["rows_from"].explode().drop_nulls().unique().to_list()
    pairs |= {(number >> SEQ_BITS, number & (1 << SEQ_BITS) - 1) for number in numbers}
    return pl.DataFrame(sorted(pairs), schema={"rank": pl.Int32, "seq": pl.Int64}, orient="row")


def _selected(records: pl.DataFrame, settings: ReplaySettings, world_size: int) -> pl.DataFrame:
    """Return the records that some receiver selects; a second forward's are never asked for."""
    import polars as pl

    seconds = [text for text in records["tags"].unique() if is_recompute(parse_tags(text))]
    first = records.filter(~pl.col("tags").is_in(seconds))
    chosen = settings.filter
    reads_rank = chosen is not None and "rank" in chosen.names
    receivers: Iterable[int] = range(world_size) if reads_rank else (0,)
    offset, renames = settings.step_offset, settings.rename
    parts = [selected_rows(first, chosen, rank, offset, renames) for rank in receivers]
    return pl.concat(parts).unique(["rank", "seq"])


def _first(log: pl.DataFrame, outcome: str) -> str:
    import polars as pl

    rows = log.filter(pl.col("outcome") == outcome).sort("seq", "rank")
    if not rows.height:
        return ""
    row = rows.row(0, named=True)
    return (
        f"{label(row['name'], row['tags'])} step={row['step']} occurrence={row['occurrence']} on "
        f"rank {row['rank']}: {row['message']}"
    )
