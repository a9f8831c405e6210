"""Ids of rows as records: one of kind `rows` for what the taps of some rows have in common.

    kind   dims     payload, int64                          the column `rows`
    rows   "b s"    ids [b, s], or [b, s, numbers]          null
    rows   "b s,e"  ids along b s and ids along e, flat,    null
                    a separator between, and a code;
                    shapes in extras
    tokens "b s"    [rows, 2]: position and token           the digest of the record of ids

A tap's row has the digest of its rows' record in the column `rows`. Where a rank has the same
numbers along other dims, the later have the form of several groups, too: the code is of dims and
shapes, so that they have another digest. Ids are in alphabetical order of the dims' names, so that
taps whose dims stand in another order share them.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import DamagedRecording
from ..tags import label
from ..tokens.taken import Taken
from .rows import row_at
from .schema import ROWS, TOKENS, ManifestRow, rank_folder

if TYPE_CHECKING:
    import polars as pl
    import torch

_SEPARATOR = -(1 << 63)
_MOST_DIMS = 64
_KEPT = 1_024
_KEPT_BYTES = 256 << 20


def packed(groups: Sequence[Taken], *, is_coded: bool = False) -> tuple[torch.Tensor, ManifestRow]:
    """Return ids as a payload, and the columns that say what it is.

    Args:
        groups: the ids, by group.
        is_coded: whether their dims are to be part of the payload.
    """
    import torch

    groups = sorted(groups, key=lambda one: one.names)
    dims = ",".join(" ".join(one.names) for one in groups)
    shapes = [list(one.ids.shape) for one in groups]
    if len(groups) == 1 and not is_coded:
        return groups[0].ids, {"dims": dims}
    parts = []
    for one in groups:
        parts += [one.ids.reshape(-1), torch.tensor([_SEPARATOR], device="cpu")]
    code = torch.tensor([_code(dims, shapes)], device="cpu")
    extras = json.dumps({"shapes": shapes})
    return torch.cat([*parts[:-1], code]), {"dims": dims, "extras": extras}


def _code(dims: str, shapes: Sequence[Sequence[int]]) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(json.dumps([dims, shapes]).encode()) >> 1


def unpacked(tensor: torch.Tensor, row: ManifestRow, path: object) -> tuple[Taken, ...]:
    """Return the ids of a record of kind `rows`.

    Raises:
        DamagedRecording: it does not hold what it should.
    """
    import torch

    dims = row["dims"] or ""
    names = [tuple(words.split()) for words in dims.split(",")]
    flat = [name for one in names for name in one]
    is_wrong = tensor.dtype != torch.int64 or not all(names) or len(flat) > _MOST_DIMS
    if is_wrong or len({*flat}) < len(flat):
        raise DamagedRecording(path, f"a record of rows has the dims {row['dims']!r:.80}")
    if row["extras"] is None and len(names) == 1:
        if tensor.dim() - len(names[0]) not in (0, 1):
            raise DamagedRecording(path, f"ids along {dims!r:.80} have {tensor.dim()} dims")
        return (Taken(names[0], tensor),)
    shapes = _shapes(row["extras"], path)
    sizes = [math.prod(shape) for shape in shapes]
    fits = all(len(s) - len(n) in (0, 1) for s, n in zip(shapes, names, strict=False))
    total = sum(sizes) + len(sizes)
    if len(shapes) != len(names) or not fits or total != tensor.numel():
        raise DamagedRecording(path, f"a record of rows has the shapes {shapes!r:.80}")
    found, at = [], 0
    parts = tensor.reshape(-1)
    if int(parts[-1]) != _code(dims, shapes):
        raise DamagedRecording(path, f"a record of rows is not along {dims!r:.80}")
    for name, shape, size in zip(names, shapes, sizes, strict=True):
        found.append(Taken(name, parts[at : at + size].view(shape)))
        at += size + 1
    return tuple(found)


def _shapes(extras: str | None, path: object) -> list[list[int]]:
    try:
        shapes = json.loads(extras or "")["shapes"]
        if all(type(n) is int and n >= 0 for shape in shapes for n in shape):
            return [list(shape) for shape in shapes]
    except (ValueError, RecursionError, TypeError, KeyError):
        pass
    raise DamagedRecording(path, f"a record of rows has the extras {extras!r:.80}")


class Source(Protocol):
    """What ids are read from: a `Recording`."""

    path: Path

    def rows(self, attempt: int | None = None) -> pl.DataFrame:
        """Return the manifest's rows."""

    def read(self, row: ManifestRow, *, check: bool = True) -> torch.Tensor:
        """Return the tensor of a manifest row."""


class HeldIds:
    """The ids that a recording holds; the latest are kept. Thread-safe."""

    def __init__(self, recording: Source) -> None:
        self._recording = recording
        self._holders: dict[tuple[str, str], list[int]] | None = None
        self._found: dict[tuple[str, int, int], tuple[Taken, ...]] = {}
        self._nbytes = 0
        self._lock = threading.RLock()

    def of(self, row: ManifestRow, *, check: bool) -> tuple[Taken, ...]:
        """Return the ids of a record's rows; see `Recording.ids`."""
        digest = row.get("rows")
        if not digest:
            return ()
        about = digest, row["rank"], row["attempt"]
        with self._lock:
            found = self._found.get(about)
            if found is None:
                holder = self._holder(ROWS, row)
                if holder is None:
                    what = f"{label(row['name'], row['tags'])} step={row['step']}"
                    fact = f"the ids of the rows of {what} are not there"
                    raise DamagedRecording(self._recording.path / rank_folder(row["rank"]), fact)
                tensor = self._recording.read(holder, check=check)
                found = unpacked(tensor, holder, self._recording.path)
                self._keep(about, found)
        return found

    def known(self, row: ManifestRow, names: Sequence[str]) -> torch.Tensor | None:
        """Return position and token of each id of a record, [rows, 2]; None where nobody said.

        Args:
            row: the record's.
            names: of the dims that the ids are along.
        """
        with self._lock:
            holder = self._holder(TOKENS, row, " ".join(names))
        if holder is None:
            return None
        found = self._recording.read(holder)
        if found.dim() != 2 or found.shape[1] != 2 or found.is_floating_point():
            raise DamagedRecording(self._recording.path, "a record of tokens is none")
        return found

    def _keep(self, about: tuple[str, int, int], found: tuple[Taken, ...]) -> None:
        nbytes = sum(one.ids.nbytes for one in found)
        while self._found and (len(self._found) >= _KEPT or self._nbytes + nbytes > _KEPT_BYTES):
            oldest = self._found.pop(next(iter(self._found)))
            self._nbytes -= sum(one.ids.nbytes for one in oldest)
        self._found[about] = found
        self._nbytes += nbytes

    def _holder(self, kind: str, row: ManifestRow, dims: str | None = None) -> ManifestRow | None:
        """Return the row that holds a record's ids, or says which tokens they are: its own rank's.

        Another rank may have the same numbers along other dims.
        """
        frame = self._recording.rows()
        if self._holders is None:
            numbered = frame.with_row_index("at")
            self._holders = {}
            for held, by in ((ROWS, "digest"), (TOKENS, "rows")):
                found = numbered.filter(numbered["kind"] == held)
                found = found.unique([by, "dims", "rank", "attempt"], keep="first").sort("at")
                for one, at in found.select(by, "at").iter_rows():
                    self._holders.setdefault((held, one), []).append(at)
        there = [row_at(frame, at) for at in self._holders.get((kind, row.get("rows") or ""), [])]
        there = [one for one in there if dims is None or one["dims"] == dims]
        own = [one for one in there if _owner(one) == _owner(row)]
        return next(iter(own or there), None)


def _owner(row: ManifestRow) -> tuple[int, int]:
    return row["rank"], row["attempt"]
