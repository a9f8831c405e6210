"""One attempt's files: payloads to shards, rows to journals, both sealed when a shard is full.

1. `Store.add` takes a payload's bytes with its row: digest, then its place, unless equal bytes were
   written before. What is small is gathered, so that one write serves many.
2. `Store.flush` writes what was gathered, then appends the finished rows to the journal; from then
   on a killed process loses none of them.
3. `Store.seal` closes a shard: header, final name, then its rows as parquet.

Not thread-safe; a `Writer`'s thread owns it. Known limit: equal bytes are recognised among the last
30,000 distinct payloads of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from .capture import dtype_name
from .format.journal import Journal, read_journal, seal_journal, write_parquet
from .format.payload import parse_dtype
from .format.schema import COLUMNS, PART, STATISTICS, stem
from .format.shard import ShardWriter, header_room

SHARD_BYTES = 1 << 30
_ROWS_A_SHARD = 8_192  # values and repeats need no header room, but rows need memory to seal
_REMEMBERED = 1 << 15


class LimitReached(Exception):
    """A payload would exceed the bytes that may be written."""


@dataclass(slots=True)
class Payload:
    """A payload on its way: its row, and what has been gathered of it.

    Attributes:
        row: manifest columns; those that the bytes decide are added as they become known.
        dtype: of its elements; None for a value, which is all in its row.
        shape: its sizes.
        nbytes: how many bytes it has in all.
        statistics: gathered so far; of use to whoever gathers them alone.
        is_safe: whether its row is in the journal.
    """

    row: dict[str, Any]
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    nbytes: int
    statistics: Any = None
    is_safe: bool = False
    _hash: Any = field(default=None, repr=False)
    _written: int = 0


class Recent:
    """Remembers numbers by numbers: the latest entries, at least `size` and at most twice as many.

    Numbers alone, since there are many and a tuple of them takes several times the memory.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._new: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def get(self, key: int) -> int | None:
        """Return what was put under a key, if it is remembered; it counts as new again."""
        found = self._new.get(key)
        if found is None:
            found = self._old.get(key)
            if found is not None:
                self.put(key, found)
        return found

    def put(self, key: int, value: int) -> None:
        """Remember a value."""
        self._new[key] = value
        if len(self._new) >= self._size:
            self._old, self._new = self._new, {}


class Store:
    """Writes one attempt of one rank.

    Args:
        folder: the rank's folder; exists.
        attempt: the number in this attempt's file names.
        keeps_payloads: whether to write payloads, or rows alone.
        max_bytes: the most bytes of payload to write.
    """

    def __init__(
        self, folder: Path, attempt: int, *, keeps_payloads: bool, max_bytes: int | None = None
    ) -> None:
        self._folder = folder
        self._attempt = attempt
        self._keeps_payloads = keeps_payloads
        self._max_bytes = max_bytes
        self._index = 0
        self._tensors = 0
        self._shard: ShardWriter | None = None
        self._journal: Journal | None = None
        self._done: list[dict[str, Any]] = []
        self._unsafe: list[Payload] = []
        self._journaled = 0
        self._known = Recent(_REMEMBERED)
        self.rows = 0
        self.bytes = 0

    def add_value(self, row: dict[str, Any]) -> None:
        """Add a value row."""
        data = row["value"].encode()
        row["nbytes"], row["digest"] = len(data), xxhash.xxh3_128_hexdigest(data)
        self._open()
        self._done.append(row)

    def add(self, payload: Payload, data: memoryview, *, first: bool, last: bool) -> None:
        """Add a payload, or the next part of one; `data` must stay as it is until `flush`.

        Raises:
            LimitReached: it would exceed `max_bytes`, and is left out.
            OSError: it cannot be written.
        """
        if first and last:
            number = xxhash.xxh3_128_intdigest(data)
        else:
            payload._hash = payload._hash or xxhash.xxh3_128()
            payload._hash.update(data)
            number = payload._hash.intdigest() if last else 0
        known = None
        if last:
            row = payload.row
            assert payload.dtype is not None  # a value is for `add_value`
            row["nbytes"], row["digest"] = payload.nbytes, f"{number:032x}"
            row["dtype"], row["shape"] = dtype_name(payload.dtype), list(payload.shape)
            known = self._known.get(number << 64 | payload.nbytes)
        self._open()
        if self._keeps_payloads and known is None:
            self._write(payload, data, last)
        if not last:
            return
        if self._keeps_payloads:
            self._place(payload, number, known)
        self._done.append(payload.row)
        self._unsafe.append(payload)

    def add_statistics(self, payload: Payload, statistics: dict[str, Any]) -> None:
        """Add to a row that is safe."""
        self._done.append({"seq": payload.row["seq"], **statistics})

    def write_out(self) -> None:
        """Write what was gathered; the bytes that were added may change from then on.

        Raises:
            OSError: it cannot be written.
        """
        if self._shard is not None:
            self._shard.write_out()

    def flush(self) -> None:
        """Write what was gathered, then make the rows safe.

        Raises:
            OSError: it cannot be written.
        """
        self.write_out()
        if not self._done or self._journal is None:
            return
        self._journal.append(self._done)
        self._journaled += len(self._done)
        self.rows += sum("name" in row for row in self._done)  # the others add statistics
        self._done.clear()
        for payload in self._unsafe:
            payload.is_safe = True
        self._unsafe.clear()

    def has_room(self, dimensions: int = 0) -> bool:
        """Whether the shard that is open, if one is, can take a payload of so many dimensions."""
        return self._shard is None or (
            self._shard.data_bytes < SHARD_BYTES
            and self._shard.has_room(dimensions)
            and self._journaled + len(self._done) < _ROWS_A_SHARD
        )

    def seal(self) -> None:
        """Close the shard that is open and turn its journal into parquet.

        Raises:
            OSError: it cannot be written; the journal keeps what it has.
        """
        self.flush()
        shard, journal = self._shard, self._journal
        if shard is None or journal is None:
            return
        # In this order a reader finds every row at every moment; see format/schema.py.
        if shard.is_empty:
            shard.discard()
        else:
            shard.finish()
        journal.close()
        seal_journal(journal.path, COLUMNS, STATISTICS)
        self._shard, self._journal, self._journaled = None, None, 0
        self._index += 1

    def abandon(self) -> None:
        """Close the files as they are; what is in the journal stays."""
        self._done.clear()
        self._unsafe.clear()
        if self._shard is not None:
            self._shard.abandon()
        if self._journal is not None:
            self._journal.close()

    def _open(self) -> None:
        if self._shard is not None:
            return
        name = stem(self._attempt, self._index)
        self._shard = ShardWriter(self._folder / f"{name}.safetensors", header_room(self._index))
        self._journal = Journal(self._folder / f"{name}.journal")

    def _write(self, payload: Payload, data: memoryview, last: bool) -> None:
        assert self._shard is not None  # `_open` made it
        if self._max_bytes is not None and self.bytes + payload.nbytes > self._max_bytes:
            if last:
                raise LimitReached(payload.row["name"])
            return  # it may prove to be known
        self._shard.write(payload._written, data)
        payload._written += data.nbytes

    def _place(self, payload: Payload, number: int, known: int | None) -> None:
        """Note where a payload lies, a new one's place or a known one's."""
        assert self._shard is not None and payload.dtype is not None  # `_open` made it
        if known is None:
            tensor = self._tensors
            self._tensors += 1
            place = self._shard.add(
                _tensor_name(tensor),
                payload.row["dtype"],
                payload.dtype.itemsize,
                payload.shape,
                payload.nbytes,
            )
            payload.row["offset"] = place.offset
            self.bytes += payload.nbytes
            known = self._index << 64 | tensor
            self._known.put(number << 64 | payload.nbytes, known)
        index, tensor = known >> 64, known & (1 << 64) - 1
        payload.row["shard"] = f"{self._folder.name}/{stem(self._attempt, index)}.safetensors"
        payload.row["tensor"] = _tensor_name(tensor)


def _tensor_name(number: int) -> str:
    return f"t{number:08d}"


def seal_leftovers(folder: Path, attempt: int) -> None:
    """Seal what the writer of an attempt left open when its process was killed.

    Args:
        folder: the rank's folder; nobody writes there any more.
        attempt: the number in the attempt's file names.

    Raises:
        OSError: it cannot be written; a reader goes on to find what it found before.
        DamagedRecording: a journal cannot be read.
    """
    for path in sorted(folder.glob(f"a{attempt}-*.journal")):
        found = PART.fullmatch(path.name)
        if found is None:
            continue
        if not path.with_suffix(".parquet").exists():
            rows = read_journal(path)
            final = path.with_suffix(".safetensors")
            if final.with_suffix(".partial").exists():
                _finish_shard(final, int(found[2]), rows)
            write_parquet(path.with_suffix(".parquet"), rows, COLUMNS)
        path.unlink(missing_ok=True)


def _finish_shard(final: Path, index: int, rows: list[dict[str, Any]]) -> None:
    """Finish a shard with the payloads that its journal tells of."""
    shard = ShardWriter(final, header_room(index), resume=True)
    where = f"{final.parent.name}/{final.name}"
    for row in rows:
        if row.get("shard") == where and row.get("offset") == shard.end:
            itemsize = parse_dtype(row["dtype"], final).itemsize
            shard.add(row["tensor"], row["dtype"], itemsize, row["shape"], row["nbytes"])
    if shard.is_empty:
        shard.discard()
    else:
        shard.finish()
