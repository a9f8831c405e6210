"""Rows that must outlive their process: appended as JSON lines, later sealed into parquet.

A line is whole or it is nothing: a reader stops at the first that is not, so that a process killed
in the middle of one costs that line alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DamagedRecording
from . import disk
from .disk import PRIVATE, Access

_MAX_LINE = 4 << 20  # of what a row may hold, the texts are a quarter of that each
_encode = json.JSONEncoder(separators=(",", ":")).encode


class Journal:
    """Appends rows to a file; each `append` is one write. Not thread-safe."""

    def __init__(self, path: Path, access: Access = PRIVATE) -> None:
        self.path = path
        self._file = disk.create(path, access, append=True)
        self._size = 0

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, all of them before returning."""
        data = "".join(_encode(row) + "\n" for row in rows).encode()
        disk.append(self._file, data)
        self._size += len(data)

    def trim(self) -> None:
        """Cut off what an `append` that failed has left behind."""
        disk.truncate(self._file, self._size)

    def sync(self) -> None:
        """Return when what was appended is on the device."""
        disk.sync(self._file)

    def close(self) -> None:
        """Close the file; twice is fine."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a journal.

    A line without a name adds to the row with its `seq`: statistics follow when there is time.

    Raises:
        FileNotFoundError: it has been sealed in the meantime.
        DamagedRecording: it cannot be read.
    """
    rows: list[dict[str, Any]] = []
    by_seq: dict[Any, dict[str, Any]] = {}
    for row in whole_lines(path):
        if "name" in row:
            rows.append(row)
            by_seq[str(row.get("seq"))] = row
        elif str(row.get("seq")) in by_seq:
            by_seq[str(row["seq"])].update(row)
    return rows


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file's lines, up to the first that is not whole.

    Raises:
        FileNotFoundError: it is not there (any more).
        DamagedRecording: it cannot be read.
    """
    try:
        with os.fdopen(disk.open_regular(path), "rb") as file:
            while line := file.readline(_MAX_LINE):
                if not line.endswith(b"\n"):
                    return  # torn, or longer than any writer's
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    return
                if not isinstance(row, dict):
                    return
                yield row
    except FileNotFoundError:
        raise
    except OSError as err:
        raise DamagedRecording(path, err.strerror or str(err)) from err
