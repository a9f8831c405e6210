"""The background writer of one rank: staged snapshots to shards and rows, behind the job's back.

1. `submit` (any thread of the job) stages a payload, in pieces if it is large, and queues its row.
2. `_run` (the writer's thread) takes what has queued up: `_take` gathers the digest and writes a
   payload unless equal bytes were written before.
3. `_flush` appends the finished rows to the journal; from then on a killed process loses none.
4. `_summarise` gathers statistics of what is safe, as long as nothing new waits; they follow in
   the journal as lines of their own.
5. `_seal` closes a shard that is full: header, final name, then its rows as parquet.

Failure of any write ends the recording at the last row in the journal; the job never notices.

Known limits: equal bytes are recognised among the last 200,000 distinct payloads of a rank; rows
of a job killed before their statistics came have none.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from .capture import Staging, dtype_name, pieces
from .format.journal import Journal, read_journal, write_parquet
from .format.payload import parse_dtype
from .format.schema import COLUMNS, PART, stem
from .format.shard import ShardWriter, header_room
from .statistics import MANY, Statistics, has_statistics, of_many, workspace

DEFAULT_BUDGET = 256 << 20
SHARD_BYTES = 1 << 30
_ROWS_A_SHARD = 20_000  # values and repeats need no header room, but rows need memory to seal
_FLUSH_SECONDS = 0.2
_TOGETHER = 256  # payloads summarised in one go, before the queue is looked at again
_REMEMBERED = 200_000


@dataclass
class _Payload:
    """A payload on its way: its row, and what has been gathered of it."""

    row: dict[str, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    hash: Any = field(default_factory=xxhash.xxh3_128)
    statistics: Statistics | None = None
    written: int = 0


@dataclass
class _Piece:
    """A part of a payload in the staging ring; a row without one has no payload."""

    row: dict[str, Any]
    payload: _Payload | None = None
    offset: int = 0
    nbytes: int = 0
    first: bool = True
    last: bool = True


class Writer:
    """Writes one rank's recording from a thread of its own.

    Args:
        folder: the rank's folder; exists.
        attempt: the number in this attempt's file names.
        level: `tensors`, `stats` (no payloads) or `digests` (no statistics either).
        budget: bytes of staging memory.
        max_bytes: stop in good order before more bytes of payload than this are written.
        on_stop: called once, from the writer's thread, when recording had to end early, with the
            state (`stopped` or `failed`) and the reason.
    """

    def __init__(
        self,
        folder: Path,
        attempt: int,
        *,
        level: str = "tensors",
        budget: int = DEFAULT_BUDGET,
        max_bytes: int | None = None,
        on_stop: Any = None,
    ) -> None:
        self._folder = folder
        self._attempt = attempt
        self._level = level
        self._max_bytes = max_bytes
        self._on_stop = on_stop or (lambda state, reason: None)
        self._staging = Staging(budget)
        self._submitting = threading.Lock()
        self._queue: deque[_Piece] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._ended = False
        self._index = 0
        self._tensors = 0
        self._shard: ShardWriter | None = None
        self._journal: Journal | None = None
        self._done: list[dict[str, Any]] = []
        self._journaled = 0
        self._written: OrderedDict[tuple[bytes, int], tuple[str, str]] = OrderedDict()
        self._unsummarised: deque[_Piece] = deque()
        self._workspace: torch.Tensor | None = None
        self.rows_written = 0
        self.bytes_written = 0
        self._thread = threading.Thread(target=self._run, name="graft-writer", daemon=True)
        self._thread.start()

    def submit(self, row: dict[str, Any], bits: torch.Tensor | None, dtype: torch.dtype) -> None:
        """Queue a row and a snapshot of its payload; the caller may change `bits` afterwards.

        Args:
            row: manifest columns, without those that the payload decides.
            bits: the payload viewed as integers, of any strides; None for a value row.
            dtype: the payload's real dtype.
        """
        if self._ended or self._closing:
            return
        with self._submitting:
            if bits is None:
                self._put(_Piece(row))
                return
            nbytes = bits.numel() * bits.element_size()
            payload = _Payload(row, dtype, tuple(row["shape"]), nbytes)
            parts = list(pieces(bits, self._staging.largest))
            for i, part in enumerate(parts):
                placed = self._staging.put(part)
                if placed is None:
                    return
                self._put(_Piece(row, payload, *placed, i == 0, i == len(parts) - 1))

    def close(self) -> None:
        """Write what is queued, seal the shard and end the thread; twice is fine."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _put(self, piece: _Piece) -> None:
        with self._wake:
            self._queue.append(piece)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._queue or self._unsummarised or self._closing):
                        self._wake.wait()
                    batch = list(self._queue)
                    self._queue.clear()
                    closing = self._closing
                flushed = time.monotonic()
                for piece in batch:
                    if not self._ended:
                        self._take(piece)
                    if piece.payload is not None:
                        self._unsummarised.append(piece)
                    if time.monotonic() - flushed > _FLUSH_SECONDS:
                        self._flush()
                        flushed = time.monotonic()
                self._flush()
                while self._unsummarised and not self._queue:
                    self._summarise()
                self._flush()
                if closing and not batch and not self._unsummarised:
                    break
            if not self._ended:
                self._seal()
        except OSError as err:
            self._stop("failed", f"writing failed: {err.strerror or err}")
        except Exception as err:  # a bug of ours: the recording ends, the job does not
            self._stop("failed", f"internal error: {type(err).__name__}: {err}")

    def _stop(self, state: str, reason: str) -> None:
        """End recording early; what is in the journal stays."""
        try:
            if state == "stopped":
                self._seal()
        except OSError as err:
            state, reason = "failed", f"writing failed: {err.strerror or err}"
        self._ended = True
        self._staging.close()
        self._done.clear()
        if self._shard is not None:
            self._shard.abandon()
        if self._journal is not None:
            self._journal.close()
        self._on_stop(state, reason)

    def _take(self, piece: _Piece) -> None:
        payload, row = piece.payload, piece.row
        if payload is None:
            data = row["value"].encode()
            row["nbytes"], row["digest"] = len(data), xxhash.xxh3_128_hexdigest(data)
            self._open()
            self._finish_row(row)
            return
        data = self._staging.view(piece.offset, piece.nbytes)
        payload.hash.update(data)
        known = None
        if piece.last:
            row["nbytes"], row["digest"] = payload.nbytes, payload.hash.hexdigest()
            known = self._known(payload)
        if piece.first:
            self._open(len(payload.shape))
        if self._level == "tensors" and known is None:
            over = self._max_bytes is not None and (
                self.bytes_written + payload.nbytes > self._max_bytes
            )
            if over and piece.last:
                self._flush()
                self._stop("stopped", f"--max-bytes was reached at {row['name']!r}")
                return
            if not over:
                shard = self._require_shard()
                shard.write_at(shard.end + payload.written, data)
                payload.written += piece.nbytes
        if not piece.last:
            return
        if self._level == "tensors":
            row["shard"], row["tensor"] = known or self._store(payload)
        self._finish_row(row)

    def _summarise(self) -> None:
        """Gather the statistics of the oldest pieces, and let their memory go."""
        run = self._alike()
        if len(run) > 1:
            self._summarise_many(run)
        else:
            self._summarise_one(run[0])
        for _ in run:
            self._unsummarised.popleft()
            self._staging.release()

    def _summarise_one(self, piece: _Piece) -> None:
        payload = piece.payload
        if payload is None or not self._wants_statistics(payload):
            return
        if payload.statistics is None:
            payload.statistics = Statistics(payload.dtype, self._room_to_work())
        payload.statistics.add(self._staging.tensor(piece.offset, piece.nbytes))
        if piece.last:
            self._done.append({"seq": piece.row["seq"], **payload.statistics.result()})

    def _summarise_many(self, run: list[_Piece]) -> None:
        """Do at once what lies side by side: a call for each small payload costs more than it."""
        first, second = run[0], run[1]
        assert first.payload is not None  # `_alike` chose it
        rows = self._staging.tensor(first.offset, run[-1].offset + first.nbytes - first.offset)
        raw = rows.as_strided(
            (len(run), first.nbytes), (second.offset - first.offset, 1), rows.storage_offset()
        )
        found = of_many(raw, first.payload.dtype, self._room_to_work())
        for piece, statistics in zip(run, found, strict=True):
            self._done.append({"seq": piece.row["seq"], **statistics})

    def _alike(self) -> list[_Piece]:
        """Return the oldest piece, and those behind it that can be summarised together with it."""
        pieces = iter(self._unsummarised)
        first = next(pieces)
        run = [first]
        payload = first.payload
        if (
            payload is None
            or not (first.first and first.last)
            or payload.dtype.is_complex
            or (payload.dtype.itemsize == 1 and payload.dtype.is_floating_point)
            or not 0 < first.nbytes <= MANY * payload.dtype.itemsize
            or not self._wants_statistics(payload)
        ):
            return run
        stride = None
        for piece in pieces:
            stride = stride or piece.offset - first.offset
            if (
                piece.payload is None
                or piece.payload.dtype != payload.dtype
                or piece.nbytes != first.nbytes
                or not (piece.first and piece.last)
                or stride <= 0
                or piece.offset - run[-1].offset != stride
                or len(run) >= _TOGETHER
            ):
                break
            run.append(piece)
        return run

    def _wants_statistics(self, payload: _Payload) -> bool:
        return not self._ended and self._level != "digests" and has_statistics(payload.dtype)

    def _room_to_work(self) -> torch.Tensor:
        if self._workspace is None:
            self._workspace = workspace()
        return self._workspace

    def _known(self, payload: _Payload) -> tuple[str, str] | None:
        key = (payload.hash.digest(), payload.nbytes)
        place = self._written.get(key)
        if place is not None:
            self._written.move_to_end(key)
        return place

    def _store(self, payload: _Payload) -> tuple[str, str]:
        shard = self._require_shard()
        tensor = f"t{self._tensors:08d}"
        self._tensors += 1
        name, size = dtype_name(payload.dtype), payload.dtype.itemsize
        place = shard.add(tensor, name, size, payload.shape, payload.nbytes)
        payload.row["offset"] = place.offset
        self.bytes_written += payload.nbytes
        where = (f"{self._folder.name}/{shard.final.name}", tensor)
        self._written[payload.hash.digest(), payload.nbytes] = where
        if len(self._written) > _REMEMBERED:
            self._written.popitem(last=False)
        return where

    def _finish_row(self, row: dict[str, Any]) -> None:
        self._done.append(row)

    def _flush(self) -> None:
        if self._ended or not self._done or self._journal is None:
            return
        self._journal.append(self._done)
        self._journaled += len(self._done)
        self.rows_written += sum("name" in row for row in self._done)  # the others add statistics
        self._done.clear()

    def _open(self, dimensions: int = 0) -> None:
        """Make sure that there is a shard and a journal with room for one more row."""
        if self._shard is not None:
            full = (
                self._shard.data_bytes >= SHARD_BYTES
                or not self._shard.has_room(dimensions)
                or self._journaled + len(self._done) >= _ROWS_A_SHARD
            )
            if not full:
                return
            self._seal()
        name = stem(self._attempt, self._index)
        self._shard = ShardWriter(self._folder / f"{name}.safetensors", header_room(self._index))
        self._journal = Journal(self._folder / f"{name}.journal")

    def _require_shard(self) -> ShardWriter:
        assert self._shard is not None  # `_open` has just made sure
        return self._shard

    def _seal(self) -> None:
        """Close the current shard and turn its journal into parquet."""
        shard, journal = self._shard, self._journal
        if shard is None or journal is None:
            return
        while self._unsummarised:
            self._summarise()
        self._flush()
        # In this order a reader finds every row at every moment; see format/schema.py.
        if shard.is_empty:
            shard.discard()
        else:
            shard.finish()
        journal.close()
        rows = read_journal(journal.path)
        write_parquet(journal.path.with_suffix(".parquet"), rows, COLUMNS)
        journal.path.unlink(missing_ok=True)
        self._shard, self._journal, self._journaled = None, None, 0
        self._index += 1


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
