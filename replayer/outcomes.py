"""What comes of one rank's taps: a row in the log, and a line where it is no good."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recorder.diagnostics import Warnings, say
from recorder.errors import GraftError, MissingRecord, ReplayError
from recorder.format.tables import to_frame
from recorder.mailbox import write_report
from recorder.ranks import RankWatch
from recorder.tags import label
from recorder.taps.selection import Selected, Selection

from .log import COLUMNS, LogRow, ReplayLog, joined
from .match import Match
from .measuring.compare import Difference
from .replaced import Replacement
from .settings import ReplaySettings

if TYPE_CHECKING:
    import polars as pl


_MISSING = 3  # names of taps without a record, for each kind of reason


class Outcomes:
    """The log of one rank, and what is said of it.

    Args:
        settings: what to do where a graft fails.
        ranks: which rank this is.
        selection: which taps are wanted, and in which step the job is.
        fail: told why the replay is not to be trusted, if the log cannot be written.
    """

    def __init__(
        self,
        settings: ReplaySettings,
        ranks: RankWatch,
        selection: Selection,
        fail: Callable[[str], None],
    ) -> None:
        self._settings, self._ranks, self._selection = settings, ranks, selection
        self._fail = fail
        self._warnings = Warnings()
        self._log: ReplayLog | None = None
        self._missing: dict[str, set[tuple[str, ...]]] = {}

    def open(self, out: Path | None, stem: str) -> None:
        """Begin the log.

        Raises:
            RecordingExists: `out` has this log already.
            OSError: it cannot be written.
        """
        self._log = ReplayLog(out, stem, overwrite=self._settings.overwrite)

    def frame(self) -> pl.DataFrame:
        """Return the rows so far."""
        return self._log.frame() if self._log is not None else to_frame([], COLUMNS)

    def close(self) -> None:
        """Finish the log.

        Raises:
            OSError: it cannot be written.
        """
        if self._log is not None:
            self._log.close()

    def finish(
        self,
        selected: Selected,
        kind: str,
        start: float,
        error: GraftError | None,
        match: Match | None = None,
        senders: list[int | None] | None = None,
        made: Replacement | None = None,
        note: str = "",
        changed: int | None = None,
    ) -> LogRow:
        """Log what came of a tap, say it where it failed, raise where that was asked for.

        Args:
            selected: the tap.
            kind: `tensor`, `grad` or `value`.
            start: when it began, in seconds.
            error: why it failed; None where it did not.
            match: its records.
            senders: the `seq` of each sender's record.
            made: what it was overwritten with.
            note: what else to know.
            changed: of a value, 1 where it is another than recorded, else 0.

        Raises:
            ReplayError: it failed, and that was to be raised.
        """
        outcome, message = "compared" if kind == "value" else "grafted", note
        if error is not None:
            outcome = "missing" if isinstance(error, MissingRecord) else "error"
            message = " ".join(str(error).split("\n"))
        key = selected.key
        row: LogRow = {
            "rank": self._ranks.current.rank,
            "seq": self._selection.next_seq() if kind == "grad" else selected.seq,
            "step": key.step,
            "name": key.name,
            "occurrence": key.occurrence,
            "tags": selected.text,
            "kind": kind,
            "outcome": outcome,
            "message": message,
            "seconds": time.perf_counter() - start,
        }
        if match is not None:
            row["n_senders"] = len(match.rows)
        if senders is not None:
            row["senders"] = senders
        if changed is not None:
            row["changed"] = changed
        if isinstance(error, MissingRecord):
            if error.rows is not None:
                row["rows_found"], row["rows_missing"] = 0, error.rows
            if error.dtype is not None and error.shape is not None:
                row["dtype"], row["shape"] = error.dtype, error.shape
        if made is not None and error is None:
            row["numel"] = made.tensor.numel() if made.numel is None else made.numel
            if made.rows is not None:
                senders = made.rows.senders
                row["n_senders"] = sum(seq is not None for seq in senders)
                row["senders"], row["rows_from"] = senders, made.rows.records
                row["rows_found"] = len(made.rows.cells)
                row["rows_missing"] = made.rows.missing
            if figures := made.figures:
                row["rel_diff"], row["max_abs"] = figures.rel_diff, figures.max_abs
                row["mean_abs"], row["changed"] = figures.mean_abs, figures.changed
            row = {**row, **made.own}
        self._write(row)
        if error is None:
            return row
        tap = named(selected)
        policy = self._settings.on_missing if outcome == "missing" else self._settings.on_error
        if policy == "raise":
            raise ReplayError(f"tap {tap} was not grafted: {message}") from error
        about = (key.name, outcome, type(error).__name__)
        if outcome == "error":
            self.once(about, f"tap {tap} was not grafted: {message}", _cause(message))
        else:
            self._tell_missing(about, tap, message)
        return row

    def _tell_missing(self, about: tuple[str, ...], tap: str, message: str) -> None:
        """Name the nearest of a few taps without a record; the log has those of the others."""
        kind = " ".join(message.split()[:2])
        told = self._missing.setdefault(kind, set())
        told.add(about)
        if len(told) <= _MISSING:
            self.once(about, f"tap {tap} was not grafted: {message}")
        elif len(told) == _MISSING + 1:
            self.once((kind,), "more taps have no record, and are counted at the end")

    def _write(self, row: LogRow) -> None:
        assert self._log is not None  # `_ensure_log` made it
        try:
            self._log.add(row)
        except OSError as err:
            # The graft itself is done; only the trace of it is lost, and that is said.
            reason = f"the log cannot be written: {err.strerror or err}"
            self._fail(reason)
            self.say(reason)
            write_report({"session": ReplaySettings.PREFIX, "state": "failed", "reason": reason})

    def once(self, about: tuple[str, ...], message: str, also: str | None = None) -> None:
        """Say something of this rank, once; see `Warnings.once`."""
        self._warnings.once(about, message, self._where(), also)

    def _where(self) -> str:
        return f"rank={self._ranks.current.rank} step={self._selection.step}"

    def say(self, message: str) -> None:
        """Say something of this rank."""
        say(message, self._where())

    def measure(
        self, row: LogRow, figures: Difference | None, unmeasured: str, dropped: Sequence[str]
    ) -> None:
        """Write a row again, with figures that came later, and without those that never came.

        Args:
            row: the row.
            figures: what was changed; None where that was not measured.
            unmeasured: why not.
            dropped: the columns that no figures are known for.
        """
        found: LogRow = {**row, "message": joined(row["message"], unmeasured)}
        for name in dropped:
            found.pop(name, None)  # type: ignore[misc]
        if figures is not None:
            found["rel_diff"], found["max_abs"] = figures.rel_diff, figures.max_abs
            found["mean_abs"], found["changed"] = figures.mean_abs, figures.changed
        self._write(found)

    def amend(self, row: LogRow, outcome: str, reason: str) -> None:
        """Write a row again, with what came to light since."""
        self._write({**row, "outcome": outcome, "message": joined(reason, row["message"])})


def _cause(message: str) -> str:
    """Return a message without what is one tap's alone: its sizes, and what it quotes."""
    return re.sub(r"'[^']*'|[\d\[\], ]+", " ", message)


def named(selected: Selected) -> str:
    """Return a tap as messages call it."""
    key = selected.key
    return f"{label(key.name, selected.tags)} step={key.step} occurrence={key.occurrence}"
