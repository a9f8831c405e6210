"""Which ids of rows an attempt has recorded: they are stored once for all taps that share them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import xxhash

from .bits import bytes_of
from .capture import Snapshot
from .format.ids import packed
from .format.schema import ROWS, TOKENS, ManifestRow
from .layouts.parse import layout_of
from .layouts.rowed import rowed
from .taps.rows import Ids, check_meant
from .tokens.taken import Taken

Submit = Callable[[ManifestRow, Snapshot], bool]
_REMEMBERED = 1 << 16


class RowRecords:
    """Records the ids of one rank's taps.

    Args:
        rank: the rank.
        submit: queues a record; returns whether it did.
        next_seq: gives a record its place in the order of execution.
        is_ring: whether only the last steps are kept, so that each needs the ids anew.
    """

    def __init__(
        self, rank: int, submit: Submit, next_seq: Callable[[], int], *, is_ring: bool
    ) -> None:
        self._rank, self._submit, self._next_seq, self._is_ring = rank, submit, next_seq, is_ring
        self._noted: dict[tuple[int, int], None] = {}
        self._forms: dict[int, tuple[object, ...]] = {}
        self._latest: tuple[tuple[Taken, ...], int, str] = ((), -1, "")
        self._step, self._occurrences = -1, Counter[str]()
        self._lock = threading.RLock()

    @property
    def has_any(self) -> bool:
        """Whether any ids were recorded."""
        return bool(self._noted)

    def note(self, ids: Sequence[Ids], row: ManifestRow, shape: Sequence[int]) -> str | None:
        """Record what ids of rows a tap has, unless that is done.

        Args:
            ids: those that hold there.
            row: the tap's row, with its dims.
            shape: its sizes on this rank.

        Returns:
            The digest for its column `rows`; None where it has none, "" where its rows could not be
            queued, so that it must not be either.

        Raises:
            BadRows: they cannot be read, or are not as many as the tensor has rows.
        """
        taken = [one.taken() for one in ids]
        dims = layout_of(row.get("dims") or "", row["kind"])
        names = {one.names for one in rowed(dims, shape, taken)}
        check_meant(ids, names, row.get("dims") or "")
        meant = tuple(one for one in taken if one.names in names)
        if not meant:
            return None
        step = row["step"] if self._is_ring else 0
        with self._lock:
            if self._is_latest(meant, step):
                return self._latest[2]
            digest = self._noted_as(meant, row["step"], step)
            if digest:
                self._latest = meant, step, digest
            return digest

    def _is_latest(self, meant: tuple[Taken, ...], step: int) -> bool:
        latest, at, _ = self._latest
        same = len(latest) == len(meant) and all(map(lambda a, b: a is b, latest, meant))
        return same and at == step

    def _noted_as(self, meant: tuple[Taken, ...], step: int, kept: int) -> str:
        payload, about = packed(meant)
        raw = payload.contiguous()
        digest = xxhash.xxh3_128_hexdigest(bytes_of(raw))
        form = about["dims"], *raw.shape
        if self._forms.setdefault(hash(digest), form) != form:
            raw, about = packed(meant, is_coded=True)
            digest = xxhash.xxh3_128_hexdigest(bytes_of(raw))
        key = hash(digest), kept
        if key in self._noted:
            return digest
        if not self._queue(raw, {**about, "kind": ROWS}, step):
            return ""
        for one in meant:
            if one.known is not None:
                names = " ".join(one.names)
                self._queue(one.known, {"kind": TOKENS, "dims": names, "rows": digest}, step)
        while len(self._forms) > _REMEMBERED:
            self._forms.pop(next(iter(self._forms)))
        while len(self._noted) >= _REMEMBERED:
            self._noted.pop(next(iter(self._noted)))
        self._noted[key] = None
        return digest

    def _queue(self, payload: torch.Tensor, about: ManifestRow, step: int) -> bool:
        if step != self._step:
            self._step, self._occurrences = step, Counter()
        kind = about["kind"]
        number, self._occurrences[kind] = self._occurrences[kind], self._occurrences[kind] + 1
        row: ManifestRow = {
            "rank": self._rank,
            "seq": self._next_seq(),
            "step": step,
            "name": ROWS,
            "occurrence": number,
            "tags": "{}",
            "time_ns": time.time_ns(),
            **about,
        }
        return self._submit(row, Snapshot(payload, None))
