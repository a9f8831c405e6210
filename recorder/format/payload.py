"""Bytes of a recording to tensors, believing nothing that a file claims about itself.

Small payloads are read, large ones mapped copy-on-write: either way the tensor is the caller's own.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..errors import DamagedRecording
from .shard import CODES, Place

_MAPPED_FROM = 1 << 20
_OPEN_FILES = 64
_PLAIN = frozenset(getattr(torch, name) for name in CODES)
_UNSUPPORTED = "it has the dtype {!r}, which this torch does not know"


class _File:
    """An open file; closed when nobody uses it any more."""

    __slots__ = ("number",)

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Files:
    """Reads payloads, and keeps the files of the latest open: opening costs more than reading.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._open: dict[Path, _File] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, place: Place) -> memoryview:
        """Return a payload's bytes, in memory of their own that may be written.

        Raises:
            DamagedRecording: the file is shorter than that, or cannot be read.
            FileNotFoundError: there is no such file.
        """
        try:
            return _read(self._file(path).number, path, place)
        except FileNotFoundError:
            raise
        except OSError as err:
            raise DamagedRecording(path, err.strerror or str(err)) from err

    def read_runs(self, path: Path, into: memoryview, runs: Iterable[tuple[int, int, int]]) -> None:
        """Read runs of bytes: where each begins in the file, and from where to where in memory.

        Raises:
            DamagedRecording: the file is shorter than that, or cannot be read.
            FileNotFoundError: there is no such file.
        """
        try:
            file = self._file(path)
            for at, begin, end in runs:
                view = into[begin:end]
                if os.preadv(file.number, (view,), at) != end - begin:
                    _fill(file.number, path, at, view)
        except FileNotFoundError:
            raise
        except OSError as err:
            raise DamagedRecording(path, err.strerror or str(err)) from err

    def _file(self, path: Path) -> _File:
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = _File(path)
                while len(self._open) >= _OPEN_FILES:
                    self._open.pop(next(iter(self._open)), None)
                self._open[path] = file
        return file


def _read(file: int, path: Path, place: Place) -> memoryview:
    if place.nbytes >= _MAPPED_FROM:
        size = os.fstat(file).st_size
        if place.offset + place.nbytes > size:
            raise DamagedRecording(
                path, f"it ends at byte {size}, a tensor in it at {place.offset + place.nbytes}"
            )
        start = place.offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(
            file, place.nbytes + start, access=mmap.ACCESS_COPY, offset=place.offset - start
        )
        return memoryview(mapped)[start:]
    view = memoryview(bytearray(place.nbytes))
    _fill(file, path, place.offset, view)
    return view


def _fill(file: int, path: Path, offset: int, view: memoryview) -> None:
    done = 0
    while done < view.nbytes:
        got = os.preadv(file, [view[done:] if done else view], offset + done)
        if got == 0:
            raise DamagedRecording(
                path,
                f"it ends at byte {offset + done}, a tensor in it at {offset + view.nbytes}",
            )
        done += got


def parse_dtype(name: str, path: object) -> torch.dtype:
    """Return the dtype of torch's name for it; raise `DamagedRecording` where there is none."""
    dtype = getattr(torch, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(dtype, torch.dtype):
        raise DamagedRecording(path, _UNSUPPORTED.format(name))
    return dtype


def restore(
    data: memoryview, dtype: torch.dtype, shape: Sequence[int], path: object
) -> torch.Tensor:
    """Return bytes as the tensor they were; it shares their memory.

    Raises:
        DamagedRecording: dtype, shape and number of bytes do not fit together.
    """
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != data.nbytes:
        raise DamagedRecording(
            path,
            f"{data.nbytes} bytes do not make a tensor of shape {list(shape)} and dtype {dtype}",
        )
    if data.nbytes == 0:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    if data.nbytes < _MAPPED_FROM and dtype in _PLAIN:
        return torch.frombuffer(data, dtype=dtype).view(tuple(shape))
    raw = torch.frombuffer(data, dtype=torch.uint8)
    if data.nbytes >= _MAPPED_FROM and raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()  # safetensors packs payloads without gaps, so one may be misaligned
    return raw.view(dtype).view(tuple(shape))
