"""Rows that must outlive their process: appended as JSON lines, later sealed into parquet.

A line is whole or it is nothing: a reader stops at the first that is not, so that a process killed
in the middle of one costs that line alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DamagedRecording
from .schema import polars_schema

if TYPE_CHECKING:
    import polars as pl


class Journal:
    """Appends rows to a file; each `append` is one write. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self._file = os.open(path, flags, 0o666)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, all of them before returning."""
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        data = memoryview(text.encode())
        while data.nbytes:
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        """Close the file; twice is fine."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a journal.

    A line without a name adds to the row with its `seq`: statistics follow when there is time.

    Raises:
        FileNotFoundError: it has been sealed in the meantime.
        DamagedRecording: it cannot be read.
    """
    rows: list[dict[str, Any]] = []
    by_seq: dict[Any, dict[str, Any]] = {}
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    break
                if not isinstance(row, dict):
                    break
                if "name" in row:
                    rows.append(row)
                    by_seq[str(row.get("seq"))] = row
                elif str(row.get("seq")) in by_seq:
                    by_seq[str(row["seq"])].update(row)
    except FileNotFoundError:
        raise
    except OSError as err:
        raise DamagedRecording(path, err.strerror or str(err)) from err
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Write rows as a parquet file that appears whole or not at all."""
    import polars as pl

    frame = pl.DataFrame(
        [[row.get(name) for row in rows] for name in columns],
        schema=polars_schema(columns),
        orient="col",
        strict=False,
    )
    temporary = path.with_name("." + path.name + ".tmp")
    frame.write_parquet(temporary, compression="zstd")
    temporary.replace(path)


def read_parquet(path: Path, columns: dict[str, str], max_rows: int | None = None) -> pl.DataFrame:
    """Return a parquet file's rows, its columns checked.

    Args:
        path: the file.
        columns: names and polars types that it must have.
        max_rows: more rows than an honest file has.

    Raises:
        DamagedRecording: no parquet, or columns missing or of another type.
        FileNotFoundError: it is not there (any more).
    """
    import polars as pl

    schema = polars_schema(columns)
    try:
        rows = pl.scan_parquet(path).select(pl.len()).collect().item()  # from the footer alone
        if max_rows is not None and rows > max_rows:
            raise DamagedRecording(path, f"it claims {rows} rows, more than any part has")
        # Not memory-mapped: a file that shrinks under a mapping kills the process.
        frame = pl.read_parquet(path, memory_map=False)
    except FileNotFoundError:
        raise
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as err:
        raise DamagedRecording(path, f"it is no parquet file ({_first_line(err)})") from None
    for name, dtype in schema.items():
        if frame.schema.get(name) != dtype:
            raise DamagedRecording(
                path, f"column {name} has type {frame.schema.get(name)}, expected {dtype}"
            )
    return frame.select(list(schema))


def _first_line(err: BaseException) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:200]
