"""One attempt's files: payloads to shards, rows to journals, both sealed when a shard is full.

1. `Store.add` takes a payload's bytes with its row: digest, then its place, unless equal bytes were
   written before. What is small is gathered, so that one write serves many.
2. `Store.flush` writes what was gathered, then appends the finished rows to the journal; from then
   on a killed process loses none of them.
3. `Store.seal` closes a shard: header, final name, then its rows as parquet.
4. Statistics of rows that are sealed already (`Store.add_statistics`) are put there by
   `Store.add_late`, in a file that takes the place of the other: no row waits for them.
5. Of a recording of the last steps alone, `Store.end_step` removes the shards of older ones.

Not thread-safe; a `Writer`'s thread owns it. Known limit: equal bytes are recognised among the last
30,000 distinct payloads of a rank.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import xxhash

from ..bits import dtype_name
from ..errors import DamagedRecording, LimitReached
from ..format import disk
from ..format.disk import PRIVATE, Access
from ..format.journal import Journal
from ..format.schema import COLUMNS, STATISTICS, ManifestRow, stem
from ..format.shard import ShardWriter, header_room
from ..format.tables import add_to_parquet, count_rows, seal_journal, trim_parquet

SHARD_BYTES = 1 << 30
_ROWS_A_SHARD = 8_192  # values and repeats need no header room, but rows need memory to seal
_REMEMBERED = 1 << 15
_MEASURED_EVERY = 1 << 20  # bytes between two looks at the room on the disk
_COPIED_BYTES = 8 << 20
_RING_BYTES = 4 << 20  # a shard of the last steps is sealed at the end of a step
_RING_SECONDS = 0.25
_RING_SHARDS = 8  # at least, that the bytes of a ring with a limit are cut into


@dataclass(frozen=True)
class Limits:
    """What a store may write, and how.

    Attributes:
        keeps_payloads: whether to write payloads, or rows alone.
        max_bytes: the most bytes of payload to write.
        min_free: bytes to leave free in the file system.
        keep_last: how many complete steps to keep; all of them by default.
        fsync: when to wait for the device: `off`, at the end of each `shard`, of each `step`.
        access: who may read the files.
    """

    keeps_payloads: bool = True
    max_bytes: int | None = None
    min_free: int | None = None
    keep_last: int | None = None
    fsync: str = "off"
    access: Access = PRIVATE


@dataclass(slots=True)
class Payload:
    """A payload on its way: its row, and what has been gathered of it.

    Attributes:
        row: manifest columns; those that the bytes decide are added as they become known.
        dtype: of its elements; None for a value, which is all in its row.
        shape: its sizes.
        nbytes: how many bytes it has in all.
        completed: how many steps are complete, of one that stands for the end of a step; else None.
        statistics: gathered so far; of use to whoever gathers them alone.
        is_safe: whether its row is in the journal.
        is_left_out: whether its statistics are given up.
        index: the number of the shard whose rows its own is among.

    Of one that comes in parts: the digest so far and those of its beginnings; where another begins
    with the same bytes; how many were written, or need not be; the limit it would exceed.
    """

    row: ManifestRow
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    nbytes: int
    completed: int | None = None
    statistics: Any = None
    is_safe: bool = False
    is_left_out: bool = False
    index: int = -1
    _hash: Any = field(default=None, repr=False)
    _beginnings: list[int] = field(default_factory=list, repr=False)
    _known: int = 0
    _written: int = 0
    _refused: str | None = None


class _Steps(NamedTuple):
    first: int
    last: int


_NO_STEPS = _Steps(1 << 62, -1)


class _Sealed(NamedTuple):
    number: int
    steps: _Steps
    nbytes: int


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
        limits: what to write, and how.
    """

    def __init__(self, folder: Path, attempt: int, limits: Limits = Limits()) -> None:
        self._folder = folder
        self._attempt = attempt
        self._limits = limits
        self._index = 0
        self._tensors = 0
        self._shard: ShardWriter | None = None
        self._journal: Journal | None = None
        self._done: list[ManifestRow] = []
        self._unsafe: list[Payload] = []
        self._journaled = 0
        self._known = Recent(_REMEMBERED)
        self._beginnings = Recent(_REMEMBERED)
        self._unmeasured = _MEASURED_EVERY
        self._step = 0
        self._opened = 0.0
        self._late: dict[int, list[ManifestRow]] = {}
        self._sealed: deque[_Sealed] = deque()  # those of the last steps, where only they are kept
        self._steps = _NO_STEPS
        self.rows = 0
        self.bytes = 0

    def add_value(self, row: ManifestRow) -> None:
        """Add a value row."""
        data = (row["value"] or "").encode()
        row["nbytes"], row["digest"] = len(data), xxhash.xxh3_128_hexdigest(data)
        self.add_row(row)

    def add_row(self, row: ManifestRow) -> None:
        """Add a row that has no payload."""
        self._open()
        self._finish_row(row)

    def add(self, payload: Payload, data: memoryview, *, first: bool, last: bool) -> None:
        """Add a payload, or the next part of one; `data` must stay as it is until `flush`.

        Raises:
            LimitReached: it would exceed a limit, and is left out.
            OSError: it cannot be written.
        """
        if first and last:
            number = xxhash.xxh3_128_intdigest(data)
        else:
            payload._hash = payload._hash or xxhash.xxh3_128()
            payload._hash.update(data)
            number = payload._hash.intdigest()
        known = None
        if last:
            row = payload.row
            assert payload.dtype is not None  # a value is for `add_value`
            row["nbytes"], row["digest"] = payload.nbytes, f"{number:032x}"
            row["dtype"], row["shape"] = dtype_name(payload.dtype), list(payload.shape)
            known = self._known.get(number << 64 | payload.nbytes)
        self._open()
        if self._limits.keeps_payloads and known is None:
            self._write(payload, data, last, number)
        if not last:
            return
        if self._limits.keeps_payloads:
            self._place(payload, number, known)
        self._finish_row(payload.row)
        payload.index = self._index
        self._unsafe.append(payload)

    def add_statistics(
        self,
        seq: int,
        statistics: Mapping[str, float | int | None],
        index: int | None = None,
    ) -> None:
        """Add to a row that was added before.

        Args:
            seq: the row's.
            statistics: what to add.
            index: the number of the shard that it was added to; by default that which is open.
        """
        row = cast(ManifestRow, {"seq": seq, **statistics})
        if index is None or (index == self._index and self._shard is not None):
            self._done.append(row)
        else:
            self._late.setdefault(index, []).append(row)

    def add_late(self, before: int | None = None) -> None:
        """Put statistics of rows that are sealed where those are.

        A failure costs these statistics alone.

        Args:
            before: the shard of which statistics may still come; all by default.
        """
        for index in [i for i in self._late if before is None or i < before]:
            path = self._folder / f"{stem(self._attempt, index)}.parquet"
            rows = self._late.pop(index)
            with contextlib.suppress(OSError, DamagedRecording):
                add_to_parquet(
                    path, rows, COLUMNS, STATISTICS, self._limits.access, durable=self._is_durable
                )

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
        if not self._done or self._journal is None or self._shard is None:
            return
        self._journal.append(self._done)
        self._shard.commit()
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

    def end_step(self, completed: int, seal: Callable[[], None]) -> None:
        """Note that a step is complete: make it durable, let go of old ones, as was asked for.

        Args:
            completed: how many steps are.
            seal: called where the shard that is open is to be sealed.
        """
        self.flush()
        if self._limits.fsync == "step" and self._shard is not None and self._journal is not None:
            self._shard.sync()  # first: a row tells of bytes that are there
            self._journal.sync()
        self._step = completed
        if self._limits.keep_last is None:
            return
        if self._shard is not None and (
            self._shard.data_bytes >= self._ring_bytes
            or time.monotonic() - self._opened >= _RING_SECONDS
        ):
            seal()
        while self._sealed and self._sealed[0].steps.last < self._first_kept:
            self._remove(self._sealed.popleft())

    def seal(self) -> None:
        """Close the shard that is open and turn its journal into parquet.

        Raises:
            OSError: it cannot be written; the journal keeps what it has.
        """
        self.flush()
        self._seal()

    def close(self) -> None:
        """Seal what is open; of a recording of the last steps alone, leave out the others.

        Raises:
            OSError: it cannot be written; the journal keeps what it has.
        """
        self.seal()
        for part in self._sealed:
            if part.steps.first < self._first_kept:
                path = self._folder / f"{stem(self._attempt, part.number)}.parquet"
                self.rows -= trim_parquet(
                    path,
                    COLUMNS,
                    self._first_kept,
                    self._limits.access,
                    durable=self._is_durable,
                )

    def salvage(self) -> None:
        """After a failure: keep what was written, as a seal would leave it if that can be done."""
        shard, journal = self._shard, self._journal
        try:
            if shard is not None and journal is not None:
                journal.trim()
                self._save_written(shard, journal)
                self._seal()
        except Exception:
            pass  # the disk is at fault; readers understand the journal as it is
        for file in (shard, journal):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def _save_written(self, shard: ShardWriter, journal: Journal) -> None:
        """Journal the rows whose payloads were written before the failure, as far as there is room.

        Their bytes are read back: of a write that failed nobody says how much it did.
        """
        where = f"{self._folder.name}/{shard.final.name}"
        rows: list[ManifestRow] = []
        ends = [shard.committed_end]
        for row in self._done:
            end = ends[-1]
            if row.get("shard") == where and row.get("offset") == end:
                end += row["nbytes"]
                if shard.digest(row["offset"], row["nbytes"]) != row["digest"]:
                    break
            rows.append(row)
            ends.append(end)
        self._done.clear()
        self._unsafe.clear()
        while True:
            shard.rollback(ends[len(rows)])  # it may free the room that the journal needs
            if not rows:
                return
            try:
                journal.append(rows)
                break
            except OSError:
                journal.trim()
                del rows[len(rows) * 3 // 4 :]
        shard.commit()
        self.rows += sum("name" in row for row in rows)

    @property
    def _ring_bytes(self) -> int:
        """How large a shard of the last steps grows: where there is little room, it goes sooner."""
        most = self._limits.max_bytes
        return _RING_BYTES if most is None else min(_RING_BYTES, most // _RING_SHARDS)

    @property
    def _is_durable(self) -> bool:
        """Whether a shard and its rows are to be on the device once it is sealed."""
        return self._limits.fsync != "off"

    @property
    def _first_kept(self) -> int:
        return max(0, self._step - (self._limits.keep_last or self._step))

    def _seal(self) -> None:
        shard, journal = self._shard, self._journal
        if shard is None or journal is None:
            return
        durable = self._is_durable
        nbytes = shard.data_bytes
        # In this order a reader finds every row at every moment; see format/schema.py.
        if shard.is_empty:
            shard.discard()
        else:
            shard.finish(durable=durable)
        journal.close()
        self.rows -= seal_journal(
            journal.path,
            COLUMNS,
            STATISTICS,
            self._limits.access,
            first_step=self._first_kept,
            durable=durable,
        )
        if durable:
            disk.sync_folder(self._folder)
        if self._limits.keep_last is not None:
            self._sealed.append(_Sealed(self._index, self._steps, nbytes))
            # What a shard refers to must not go before it.
            self._known, self._beginnings = Recent(_REMEMBERED), Recent(_REMEMBERED)
        self._shard, self._journal, self._journaled = None, None, 0
        self._steps = _NO_STEPS
        self._index += 1

    def _remove(self, part: _Sealed) -> None:
        name = stem(self._attempt, part.number)
        path = self._folder / f"{name}.parquet"
        self.rows -= count_rows(path)
        self.bytes -= part.nbytes
        disk.remove(path)  # first: rows without their shard would look like damage
        disk.remove(path.with_suffix(".safetensors"))

    def _open(self) -> None:
        if self._shard is not None:
            return
        path = self._folder / f"{stem(self._attempt, self._index)}.safetensors"
        # Shards of a ring are many and small, and so are their headers.
        room = header_room(0 if self._limits.keep_last is not None else self._index)
        shard = ShardWriter(path, room, self._limits.access)
        try:
            self._journal = Journal(path.with_suffix(".journal"), self._limits.access)
        except BaseException:
            shard.discard()
            raise
        self._shard, self._opened = shard, time.monotonic()
        if self._limits.fsync != "off":
            disk.sync_folder(self._folder)

    def _finish_row(self, row: ManifestRow) -> None:
        self._done.append(row)
        step = row["step"]
        first, last = self._steps
        if not first <= step <= last:
            self._steps = _Steps(min(first, step), max(last, step))

    def _write(self, payload: Payload, data: memoryview, last: bool, number: int) -> None:
        """Write a payload, or the next part of one; `number` is its digest up to there.

        As long as the parts are those that another payload began with, they are not written: if
        that goes on to the end, they need not be.
        """
        assert self._shard is not None  # `_open` made it
        payload._refused = payload._refused or self._reached(payload, data.nbytes)
        if payload._refused is not None:
            if last:
                raise LimitReached(payload._refused)
            return  # it may prove to be known
        before, end = payload._written, payload._written + data.nbytes
        payload._written = end
        if not last and (before == 0 or payload._known):
            known = self._beginnings.get(number << 64 | end)
            if known is not None:
                payload._known = known
                return
        if payload._known:
            self._copy_beginning(payload._known, before)
            payload._known = 0
        self._shard.write(before, data)
        if not last:
            payload._beginnings.append(number << 64 | end)

    def _copy_beginning(self, known: int, nbytes: int) -> None:
        """Write the bytes that a payload turned out to share with an earlier one only at first."""
        assert self._shard is not None  # `_open` made it
        self._shard.write_out()
        index, offset = known >> 64, known & (1 << 64) - 1
        path = self._folder / f"{stem(self._attempt, index)}.safetensors"
        file = disk.open_regular(path if index != self._index else self._shard.partial)
        try:
            for at in range(0, nbytes, _COPIED_BYTES):
                size = min(_COPIED_BYTES, nbytes - at)
                piece = os.pread(file, size, offset + at)
                if len(piece) < size:
                    raise OSError(0, "a shard is shorter than it was")
                self._shard.write(at, memoryview(piece))
                self._shard.write_out()
        finally:
            os.close(file)

    def _reached(self, payload: Payload, nbytes: int) -> str | None:
        """Say which limit a payload would exceed, of which `nbytes` are at hand."""
        limits, at = self._limits, f"at {payload.row['name']!r}"
        if limits.max_bytes is not None and self.bytes + payload.nbytes > limits.max_bytes:
            if limits.keep_last is not None:
                return (
                    f"--max-bytes has no room for --keep-last {limits.keep_last} and a step more "
                    f"{at}; raise it, or keep fewer steps"
                )
            return f"--max-bytes was reached {at}; raise it, or record less with --filter"
        if limits.min_free is not None:
            self._unmeasured += nbytes
            if self._unmeasured >= _MEASURED_EVERY:
                self._unmeasured = nbytes
                if disk.free_bytes(self._folder) - payload.nbytes < limits.min_free:
                    self._unmeasured = _MEASURED_EVERY  # and so are all that follow
                    return f"--min-free was reached {at}; make room, or record less with --filter"
        return None

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
            for beginning in payload._beginnings:
                self._beginnings.put(beginning, self._index << 64 | place.offset)
            known = self._index << 64 | tensor
            self._known.put(number << 64 | payload.nbytes, known)
        index, tensor = known >> 64, known & (1 << 64) - 1
        payload.row["shard"] = f"{self._folder.name}/{stem(self._attempt, index)}.safetensors"
        payload.row["tensor"] = _tensor_name(tensor)


def _tensor_name(number: int) -> str:
    return f"t{number:08d}"
