"""What a parquet file would make of itself in memory, found out before anybody reads it.

A page of a few kilobytes can claim to be gigabytes once it is decompressed, and readers believe it.
`measure` goes over the file's own description and the head of each page, and adds up the claims.

The format: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift, in
Thrift's compact protocol,
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DamagedRecording
from . import disk

_MAGIC = b"PAR1"
_LARGEST_FOOTER = 4 << 20
_PAGE_HEAD = 1 << 16
_LONGEST_HEAD = 8 << 20
_DEEPEST = 12
_LONGEST_VARINT = 10
_VALUE_BYTES = 16  # of a text's view, the widest
_FEW_BYTES = 64 << 20
_GROWTH = 128  # times that a file may grow when it is read, if not small; equal rows grow 90 times


class Claims(NamedTuple):
    """What a parquet file says it holds.

    Attributes:
        rows: in all row groups.
        nbytes: of all pages once decompressed, and of the most values that these can repeat.
        size: of the file itself.
    """

    rows: int
    nbytes: int
    size: int


def measure(path: Path) -> Claims:
    """Return what a parquet file claims to hold.

    Raises:
        FileNotFoundError: it is not there (any more).
        DamagedRecording: it is not a parquet file, or contradicts itself.
    """
    try:
        file = disk.open_regular(path)
        try:
            size = os.fstat(file).st_size
            tail = os.pread(file, 1 << 14, max(0, size - (1 << 14)))
            length = int.from_bytes(tail[-8:-4], "little")
            if size < 12 or tail[-4:] != _MAGIC or not 0 < length <= min(size, _LARGEST_FOOTER):
                raise DamagedRecording(path, "it is not a parquet file")
            if length + 8 > len(tail):
                tail = os.pread(file, length + 8, size - length - 8)
            footer, _ = _struct(tail[-8 - length : -8], 0)
            rows, nbytes = _measure_groups(file, size, footer)
        finally:
            os.close(file)
    except FileNotFoundError:
        raise
    except OSError as err:
        raise DamagedRecording(path, err.strerror or str(err)) from err
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError):
        raise DamagedRecording(path, "it is not a whole parquet file") from None
    return Claims(rows, nbytes, size)


def check_claims(paths: Iterable[Path]) -> None:
    """Refuse files that would take far more memory together than they take on the disk.

    Raises:
        FileNotFoundError: one is not there (any more).
        DamagedRecording: one is no parquet file, or claims too much.
    """
    size = nbytes = 0
    for path in paths:
        claims = measure(path)
        size, nbytes = size + claims.size, nbytes + claims.nbytes
        if claims.rows > claims.size:  # the time alone takes more than a byte a row
            raise DamagedRecording(
                path, f"it claims {claims.rows} rows, more than {claims.size} bytes can hold"
            )
        if nbytes > _FEW_BYTES + _GROWTH * size:
            raise DamagedRecording(
                path, f"its {claims.size} bytes claim to become {claims.nbytes} when they are read"
            )


def _measure_groups(file: int, size: int, footer: dict[int, Any]) -> tuple[int, int]:
    rows = nbytes = 0
    for group in footer[4]:
        rows += group[3]
        for chunk in group[1]:
            if chunk.get(1):
                raise ValueError("its data is in another file")
            nbytes += _measure_chunk(file, size, chunk[3])
    if rows != footer[3] or rows < 0:
        raise ValueError("its rows do not add up")
    return rows, nbytes


def _measure_chunk(file: int, size: int, chunk: dict[int, Any]) -> int:
    """Return the bytes that a column's pages claim; each begins with its head."""
    at = min(chunk[9], chunk.get(11) or chunk[9])
    left, values, nbytes = chunk[7], 0, 0
    if not 0 <= left <= size or not 0 < at <= size - left:
        raise ValueError("a column lies outside the file")
    data = os.pread(file, min(left, _PAGE_HEAD), at)
    begin = 0
    while left > 0:
        if begin + 512 > len(data) and len(data) < left:
            data, begin = os.pread(file, min(left, _PAGE_HEAD), at), 0
        try:
            head, end = _struct(data, begin)
        except (IndexError, ValueError):  # long texts may stand in it, as least and greatest
            data, begin = os.pread(file, min(left, _LONGEST_HEAD), at), 0
            head, end = _struct(data, begin)
        if head[2] < 0 or head[3] < 0:
            raise ValueError("a page of negative size")
        about = head.get(5) or head.get(8) or head.get(7) or {}
        count = about.get(1, 0)
        if head[1] != 2:  # a dictionary's entries are no values
            values += count
        nbytes += head[2] + _VALUE_BYTES * count
        taken = end - begin + head[3]
        at, left, begin = at + taken, left - taken, begin + taken
        if begin > len(data):
            data, begin = b"", 0
    if left < 0 or values > chunk[5]:
        raise ValueError("its pages do not add up")
    return nbytes


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Return a struct's fields by their numbers, and where it ends; numbers and structs alone."""
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    found: dict[int, Any] = {}
    field = 0
    while True:
        head = data[at]
        at += 1
        if head == 0:
            return found, at
        kind = head & 15
        if head >> 4:
            field += head >> 4
        else:
            field, at = _number(data, at)
        if kind <= 2:
            found[field] = kind == 1
        else:
            found[field], at = _value(data, at, kind, depth)


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if 4 <= kind <= 6:
        byte = data[at]
        if byte < 128:
            return (byte >> 1) ^ -(byte & 1), at + 1
        return _number(data, at)
    if kind == 8:
        length = data[at]
        at += 1
        if length >= 128:
            length, at = _unsigned(data, at - 1)
        if at + length > len(data):
            raise ValueError("a text that does not end")
        return True, at + length  # that there is one is all that matters
    if kind == 12:
        return _struct(data, at, depth + 1)
    if kind == 9:
        head = data[at]
        at += 1
        count, kind = head >> 4, head & 15
        if count == 15:
            count, at = _unsigned(data, at)
        if count > len(data):
            raise ValueError("a list that does not end")
        items = []
        for _ in range(count):
            if kind <= 2:
                item: Any = data[at] == 1
                at += 1
            else:
                item, at = _value(data, at, kind, depth + 1)
            items.append(item)
        return items, at
    if kind == 3:
        return data[at], at + 1
    if kind == 7:
        return 0.0, at + 8
    raise ValueError(f"a field of kind {kind}")


def _number(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    for _ in range(_LONGEST_VARINT):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number that does not end")
