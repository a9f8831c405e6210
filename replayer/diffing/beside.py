"""Of a baseline's record the others beside it: of the same tags, or of the next layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import polars as pl

from recorder.format.rows import parse_tags, rows_of
from recorder.format.schema import ManifestRow
from recorder.recording import Recording
from recorder.tags import canonical

from ..pairing.marked import in_order
from ..routing import neighbours

_FLOATS = ("float64", "float32", "bfloat16", "float16")


class Beside:
    """Finds them, whatever the diff's filter leaves out. Thread-safe.

    Args:
        recording: the baseline.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._known: dict[tuple[object, ...], pl.DataFrame] | None = None
        self._lock = threading.Lock()

    def of(self, row: ManifestRow, *, by_rows: bool) -> Iterator[list[ManifestRow]]:
        """Yield the records of floats with a record's tags, name by name.

        Args:
            row: the record; one of these is of its rank, step and occurrence, unless `by_rows`.
            by_rows: whether they are compared row by row: then all of a name.
        """
        same = [pl.col(name) == row[name] for name in ("rank", "step", "occurrence", "attempt")]
        floats = self._of_tags(row["tags"]).filter(
            pl.col("dtype").is_in(_FLOATS), *([pl.col("rows").is_not_null()] if by_rows else same)
        )
        for _, part in floats.group_by("name", maintain_order=True):
            yield in_order(list(rows_of(part)))

    def near(self, row: ManifestRow) -> Iterator[tuple[str, list[ManifestRow]]]:
        """Yield the records of a record's name of which one tag is one more or one less: the tags.

        Those that are compared row by row alone.
        """
        for tags in neighbours(parse_tags(row["tags"])):
            other = canonical(tags)
            found = self._of_tags(other).filter(
                pl.col("rows").is_not_null(),
                *(pl.col(name) == row[name] for name in ("name", "kind")),
            )
            if found.height:
                yield other, in_order(list(rows_of(found)))

    def _of_tags(self, tags: str) -> pl.DataFrame:
        with self._lock:
            frame = self._recording.latest()
            if self._known is None:
                by = frame.filter(pl.col("kind").is_in(["tensor", "grad"]))
                self._known = dict(by.partition_by("tags", as_dict=True, maintain_order=True))
            return self._known.get((tags,), frame.clear())
