"""The replay log: one row per tap that was looked at, kept through a crash.

Rows go to a journal as they come and become `OUT/grafts/*.parquet` when the rank closes, or, after
a crash, when the wrapper or the next reader of the log seals what was left.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from recorder.errors import RecordingExists
from recorder.format import disk
from recorder.format.journal import Journal, read_journal
from recorder.format.schema import GRAFTS
from recorder.format.tables import read_parquet, to_frame, write_parquet

if TYPE_CHECKING:
    import polars as pl

FOLDER = GRAFTS
OF_OWN_ERROR = {
    "dtype": "String",
    "sender_dtype": "String",
    "shape": "List(Int64)",
    "dims": "String",
    "role": "String",
    "size": "Float64",
    "odd": "Int64",
    "error": "Float64",
    "error_extreme": "Float64",
    "error_row": "Float64",
    "error_row_at": "List(Int64)",
    "error_typical": "Float64",
    "error_element": "Float64",
    "factor": "Float64",
    "offset": "Float64",
    "fits_at": "List(Int64)",
    "scale": "Float64",
    "cosine": "Float64",
    "digest": "String",
    "look": "String",
}
"""Columns that a replay with `own_error` fills; see `OwnRow`."""
OF_ROWS = {
    "rows_found": "Int64",
    "rows_missing": "Int64",
    "rows_from": "List(Int64)",
}
"""Columns of a tap whose rows were matched one by one: how many of them were recorded, how many
not, and which records have any of them, each as `rank << SEQ_BITS | seq`."""
SEQ_BITS = 40

WEIGHT = "weight"
"""The role of a parameter."""
COLUMNS = {
    "rank": "Int32",
    "seq": "Int64",
    "step": "Int64",
    "name": "String",
    "occurrence": "Int32",
    "tags": "String",
    "kind": "String",
    "outcome": "String",
    "message": "String",
    "n_senders": "Int32",
    "senders": "List(Int64)",
    **OF_ROWS,
    "rel_diff": "Float64",
    "max_abs": "Float64",
    "mean_abs": "Float64",
    "changed": "Int64",
    "numel": "Int64",
    "seconds": "Float64",
    **OF_OWN_ERROR,
}
"""The log's columns. `senders` has for each sender rank the `seq` of the record that was used."""

AS_THEY_STAND = "row for row as they stand"
"""What a message says of a graft where one side alone tells which row is which."""
LEFT_OUT = "left out, whose ids are damaged"
"""What a message says of records that rows could have been in."""
WITHOUT_EFFECT = "without effect"
"""The outcome of a graft onto a tensor that nobody kept."""


class OwnRow(TypedDict, total=False):
    """What is logged of one graft; null where it is not known.

    `dtype`, `shape` and `dims` are the target's, `sender_dtype` the record's, `role` is `weight` of
    a parameter; `error`, `error_...`, `factor`, `offset` and `fits_at` as of a diff; `size`, `odd`,
    `scale`, `cosine` and `look` (JSON) as `OwnError` has them; `digest` (xxh3-128) is of the
    target's own bytes.
    """

    dtype: str
    sender_dtype: str
    shape: list[int]
    dims: str
    role: str | None
    size: float
    odd: int
    error: float
    error_extreme: float
    error_row: float
    error_row_at: list[int] | None
    error_typical: float
    error_element: float
    factor: float | None
    offset: float | None
    fits_at: list[int] | None
    scale: float | None
    cosine: float | None
    digest: str
    look: str | None


class LogRow(OwnRow, total=False):
    """A row of the log; what is not known is not there."""

    rank: int
    seq: int
    step: int
    name: str
    occurrence: int
    tags: str
    kind: str
    outcome: str
    message: str
    n_senders: int
    senders: list[int | None]
    rows_found: int
    rows_missing: int
    rows_from: list[int]
    rel_diff: float | None
    max_abs: float | None
    mean_abs: float | None
    changed: int
    numel: int
    seconds: float


class ReplayLog:
    """Collects one rank's rows, in memory and, where there is a folder, on disk.

    Args:
        out: the replay's folder, or None to keep the rows in memory only.
        stem: the file's name without its ending, of this rank and attempt alone.
        overwrite: replace a log of that name.

    Raises:
        RecordingExists: the folder has this rank's log already.
        OSError: it cannot be written.
    """

    def __init__(self, out: Path | None, stem: str, overwrite: bool = False) -> None:
        self._rows: list[LogRow] = []
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._path: Path | None = None
        if out is not None:
            folder = out / FOLDER
            disk.make_folder(folder)
            self._path = folder / f"{stem}.journal"
            if overwrite:
                disk.remove(self._path)
                disk.remove(self._path.with_suffix(".parquet"))
            if self._path.exists() or self._path.with_suffix(".parquet").exists():
                raise RecordingExists(out, f"holds the replay log {stem} already")
            self._journal = Journal(self._path)

    def add(self, row: LogRow) -> None:
        """Add a row; one of a rank and seq that were added before takes the other's place.

        Raises:
            OSError: it could not be written; rows are kept in memory from then on.
        """
        with self._lock:
            if self._journal is None:
                self._rows.append(row)
                return
            try:
                self._journal.append([row])
            except OSError:
                self._journal.close()
                self._journal, self._rows = None, [row]
                raise

    def frame(self) -> pl.DataFrame:
        """Return the rows so far."""
        import polars as pl

        with self._lock:
            parts = [to_frame(_final(self._rows), COLUMNS)]
            if self._path is not None:
                parts.insert(0, _read_one(self._path))
        return pl.concat(parts)

    def close(self) -> None:
        """Turn the journal into parquet; twice is fine."""
        with self._lock:
            journal, self._journal = self._journal, None
            if journal is not None:
                journal.close()
                seal(journal.path)


def joined(*texts: str | None) -> str:
    """Return notes as one, for the column `message`."""
    return "; ".join(text for text in texts if text)


def _final(rows: Iterable[Any]) -> list[Any]:
    """Return rows without those that later ones took the place of."""
    return list({(row.get("rank"), row.get("seq")): row for row in rows}.values())


def seal(journal: Path) -> None:
    """Write a journal's rows as parquet and remove it."""
    write_parquet(journal.with_suffix(".parquet"), _final(read_journal(journal)), COLUMNS)
    disk.remove(journal)


def seal_leftovers(out: Path) -> None:
    """Seal the journals that ranks left behind when they were killed."""
    for listening in (out / FOLDER).glob("rank-*.json"):
        disk.remove(listening)  # it is gone; see `listening`
    for journal in sorted((out / FOLDER).glob("*.journal")):
        try:
            seal(journal)
        except FileNotFoundError:
            continue


def leave_columns(out: Path) -> None:
    """Where no rank looked at a tap, leave a log without rows, whose columns a reader finds."""
    folder = out / FOLDER
    if folder.is_dir() and not any(
        path.suffix in (".parquet", ".journal") for path in folder.iterdir()
    ):
        write_parquet(folder / "none.parquet", [], COLUMNS)


def _read_one(journal: Path) -> pl.DataFrame:
    parquet = journal.with_suffix(".parquet")
    if not parquet.exists():
        try:
            return to_frame(_final(read_journal(journal)), COLUMNS)
        except FileNotFoundError:
            pass  # sealed in the meantime
    return read_parquet([parquet], COLUMNS, optional=(*OF_OWN_ERROR, *OF_ROWS))


def read_log(out: str | os.PathLike[str]) -> pl.DataFrame:
    """Return the replay log in a folder, all ranks, by rank and seq.

    Raises:
        DamagedRecording: a file of it does not hold what it should.
    """
    import polars as pl

    folder = Path(out) / FOLDER
    stems = {path.with_suffix(".journal") for path in folder.glob("*.parquet")}
    stems |= set(folder.glob("*.journal"))
    parts = [to_frame([], COLUMNS), *(_read_one(journal) for journal in sorted(stems))]
    return pl.concat(parts).sort("rank", "seq")
