"""Write and read one shard, a plain safetensors file.

Layout of the file (https://github.com/huggingface/safetensors#format): 8 bytes with the header's
length, the header as JSON padded with spaces, the data.

1. `ShardWriter` reserves room for the header and appends payloads behind it.
2. `ShardWriter.finish` writes the header into its room and gives the file its final name.
3. `read_header` checks every number of a finished shard's header before anybody believes it.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import xxhash

from ..errors import DamagedRecording
from . import disk
from .disk import PRIVATE, Access

_LENGTH = struct.Struct("<Q")
_PREAMBLE = len(_LENGTH.pack(0))
_FIRST_ROOM = 16 << 10
_LAST_ROOM = 4 << 20
_GATHERED_BYTES = 1 << 20
_GATHERED = 1_000  # the system takes 1024 parts in one write
_READ_BYTES = 4 << 20
MAX_HEADER = 2 * _LAST_ROOM
_MAX_DIMENSIONS = 256

# What every release of the safetensors libraries reads; other dtypes travel as bytes.
CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
_ITEMSIZES = {code: max(1, int(re.sub(r"_.*|\D", "", code) or 8) // 8) for code in CODES.values()}

# An entry of a header as `ShardWriter` writes it, without what stands between two of them.
_BETWEEN = '},"'
_SIZE = "0|[1-9][0-9]{0,17}"
_ENTRY = (
    r'^(t[0-9]+)":\{("dtype":"[0-9A-Z_]+","shape":\[[0-9, ]*\]),'
    rf'"data_offsets":\[({_SIZE}),({_SIZE})\]$'
)
_FEW_BYTES = 16 << 10  # of a header that is read as any other


class Place(NamedTuple):
    """Where a payload lies: absolute byte offset in the shard, and length in bytes."""

    offset: int
    nbytes: int


Extent = tuple[int, int]
"""What a `Place` is of, as a plain tuple, of which Python's collector of garbage keeps no track."""


def header_room(index: int) -> int:
    """Return the bytes reserved for the header of a rank's `index`-th shard, length included.

    It doubles from shard to shard, so that a small recording stays small and a long one gets few
    shards.
    """
    return min(_FIRST_ROOM << min(index, 20), _LAST_ROOM)


class ShardWriter:
    """Appends payloads to one shard. Not thread-safe; one writer thread owns it."""

    def __init__(
        self, final: Path, room: int, access: Access = PRIVATE, *, resume: bool = False
    ) -> None:
        """Begin a shard, or with `resume` take up one whose writer is gone."""
        self.final = final
        self.partial = final.with_suffix(".partial")
        self._room = room
        self._entries: list[tuple[str, int]] = []  # each with where it ends
        self._header_bytes = 2
        self._end = room
        self.committed_end = room
        self._gathered: list[memoryview] = []
        self._gathered_at = 0
        self._gathered_bytes = 0
        if resume:
            self._file = disk.reopen(self.partial)
        else:
            self._file = disk.create(self.partial, access)
            disk.truncate(self._file, room)

    @property
    def data_bytes(self) -> int:
        """Bytes of payload written so far."""
        return self._end - self._room

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added."""
        return not self._entries

    def write(self, at: int, data: memoryview) -> None:
        """Write `data` behind what was added, `at` bytes further on.

        What is small is gathered: it must stay as it is until `write_out`.
        """
        offset = self._end + at
        if offset != self._gathered_at + self._gathered_bytes or (
            self._gathered_bytes + data.nbytes > _GATHERED_BYTES or len(self._gathered) >= _GATHERED
        ):
            self.write_out()
            self._gathered_at = offset
        if data.nbytes >= _GATHERED_BYTES:
            disk.write_at(self._file, offset, [data])
            self._gathered_at = offset + data.nbytes
        elif data.nbytes:
            self._gathered.append(data)
            self._gathered_bytes += data.nbytes

    def write_out(self) -> None:
        """Write what was gathered."""
        disk.write_at(self._file, self._gathered_at, self._gathered)
        self._gathered_at += self._gathered_bytes
        self._gathered, self._gathered_bytes = [], 0

    @property
    def end(self) -> int:
        """The absolute offset at which the next payload starts."""
        return self._end

    def add(
        self, tensor: str, dtype: str, itemsize: int, shape: Sequence[int], nbytes: int
    ) -> Place:
        """Make the `nbytes` written from `end` on a tensor of the shard.

        Args:
            tensor: its name in the shard.
            dtype: torch's name of the dtype.
            itemsize: bytes an element.
            shape: its sizes.
            nbytes: how many bytes it has.
        """
        code, sizes = CODES.get(dtype), [int(n) for n in shape]
        if code is None:
            code, sizes = "U8", [*sizes, itemsize]
        begin = self.data_bytes
        entry = (
            f'"{tensor}":{{"dtype":"{code}","shape":{json.dumps(sizes)},'
            f'"data_offsets":[{begin},{begin + nbytes}]}}'
        )
        place = Place(self._end, nbytes)
        self._end += nbytes
        self._entries.append((entry, self._end))
        self._header_bytes += len(entry) + 1
        return place

    def has_room(self, dimensions: int) -> bool:
        """Whether the header can take one more tensor of so many dimensions."""
        longest = 120 + 24 * (dimensions + 1)
        return self._header_bytes + longest <= self._room - _PREAMBLE

    def finish(self, *, durable: bool = False) -> None:
        """Write the header and give the file its final name.

        Args:
            durable: whether its bytes are to be on the device before it gets the name.
        """
        self.write_out()
        header = ("{" + ",".join(entry for entry, _ in self._entries) + "}").encode()
        room = self._room - _PREAMBLE
        self.trim()
        disk.write_at(self._file, 0, [memoryview(_LENGTH.pack(room) + header.ljust(room, b" "))])
        if durable:
            disk.sync(self._file)
        self.close()
        disk.rename(self.partial, self.final)

    def commit(self) -> None:
        """Note that the rows of what was added so far are safe."""
        self.committed_end = self._end

    def rollback(self, end: int) -> None:
        """Forget what was added behind `end`, and cut it off."""
        while self._end > end:
            entry, _ = self._entries.pop()
            self._header_bytes -= len(entry) + 1
            self._end = self._entries[-1][1] if self._entries else self._room
        self._gathered, self._gathered_bytes = [], 0
        self.trim()

    def digest(self, offset: int, nbytes: int) -> str:
        """Return the digest of bytes as they are in the file, "" where it ends before."""
        hashed = xxhash.xxh3_128()
        for at in range(offset, offset + nbytes, _READ_BYTES):
            size = min(_READ_BYTES, offset + nbytes - at)
            piece = os.pread(self._file, size, at)
            if len(piece) < size:
                return ""
            hashed.update(piece)
        return hashed.hexdigest()

    def trim(self) -> None:
        """Cut off what a payload that was not added has left behind the last that was."""
        disk.truncate(self._file, self._end)

    def sync(self) -> None:
        """Return when what was written is on the device."""
        disk.sync(self._file)

    def close(self) -> None:
        """Close the file and leave it as it is; twice is fine."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def discard(self) -> None:
        """Close and remove a shard that nothing was added to."""
        self.close()
        disk.remove(self.partial)


def read_header(path: Path) -> dict[str, Extent]:
    """Return the offset and length of each tensor of a finished shard; it may be behind its end.

    Raises:
        DamagedRecording: the header is no header, or contradicts itself.
    """
    try:
        with os.fdopen(disk.open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(_PREAMBLE)
            if len(start) < _PREAMBLE:
                raise DamagedRecording(path, f"it has {len(start)} bytes, a shard has more")
            (length,) = _LENGTH.unpack(start)
            if length > MAX_HEADER or _PREAMBLE + length > size:
                raise DamagedRecording(
                    path, f"its header claims {length} bytes of a file of {size}"
                )
            raw = file.read(length)
    except OSError as err:
        raise DamagedRecording(path, err.strerror or str(err)) from err
    base = _PREAMBLE + length
    places = _as_written(raw, base)
    if places is None:
        places = _as_json(raw, base, path)
    end = base
    for place in sorted(places.values()):
        offset, nbytes = place
        if offset < end:
            tensor = next(name for name, one in places.items() if one is place)
            raise DamagedRecording(path, f"tensor {tensor!r:.100} overlaps another")
        end = offset + nbytes
    return places


def _as_written(raw: bytes, base: int) -> dict[str, Extent] | None:
    """Return the places in a large header that `ShardWriter` wrote; None of any other.

    As JSON, each of its many tensors is several objects, and Python's collector of garbage goes
    over all of them again and again, while no other thread can do anything.
    """
    import polars as pl

    end = raw.rfind(b"}") + 1
    if end < _FEW_BYTES or raw[end:] != b" " * (len(raw) - end):
        return None
    text = raw[:end].decode("ascii", "replace")
    if not (text.startswith('{"') and text.endswith("}}")):
        return None
    entries = pl.Series([text[2:-2]]).str.split(_BETWEEN).explode()
    found = entries.str.extract_groups(_ENTRY).struct.unnest()
    if any(column.has_nulls() for column in found):
        return None
    found.columns = ["tensor", "about", "start", "end"]
    found = found.with_columns(pl.col("start", "end").cast(pl.Int64))
    found = found.with_columns(size=pl.col("end") - pl.col("start"), start=pl.col("start") + base)
    for about, size in found.select("about", "size").unique().iter_rows():
        try:
            entry = json.loads(f'{{{about},"data_offsets":[0,{size}]}}')
        except ValueError:
            return None
        if _read_entry(entry, base)[1] is None:
            return None
    extents = zip(found["start"].to_list(), found["size"].to_list(), strict=True)
    places = dict(zip(found["tensor"].to_list(), extents, strict=True))
    return places if len(places) == len(found) else None


def _as_json(raw: bytes, base: int, path: Path) -> dict[str, Extent]:
    """Return the places in any header; raise `DamagedRecording` where it is none."""
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except _Duplicate as err:
        raise DamagedRecording(path, f"its header has {str(err)!r:.100} twice") from None
    except (ValueError, RecursionError):
        raise DamagedRecording(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise DamagedRecording(path, "its header is not a JSON object")
    places: dict[str, Extent] = {}
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        wrong, place = _read_entry(entry, base)
        if place is None:
            raise DamagedRecording(path, f"tensor {tensor!r:.100} has {wrong}")
        places[tensor] = place
    return places


def _read_entry(entry: Any, base: int) -> tuple[str, Extent | None]:
    """Return where a header's entry says that a tensor lies, or what is wrong with it."""
    entry = entry if isinstance(entry, dict) else {}
    offsets, shape = entry.get("data_offsets"), entry.get("shape")
    if not _are_sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"the offsets {offsets!r:.100}", None
    if not _are_sizes(shape, _MAX_DIMENSIONS):
        return f"the shape {shape!r:.100}", None
    nbytes, itemsize = offsets[1] - offsets[0], _ITEMSIZES.get(str(entry.get("dtype")))
    if itemsize is not None and math.prod(shape) * itemsize != nbytes:
        return f"{nbytes} bytes, and the shape {shape!r:.100} of {entry['dtype']}", None
    return "", (base + offsets[0], nbytes)


class _Duplicate(ValueError):
    """A JSON object has a key twice."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Duplicate(counts.most_common(1)[0][0])
    return found


def _are_sizes(value: Any, most: int) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(n) is int and 0 <= n < 1 << 60 for n in value)
    )
