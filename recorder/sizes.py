"""Sizes, shapes and durations, as people write and read them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from .errors import UsageError

_MOST_DIMS = 16
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "min": 60.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|min|)\s*", re.IGNORECASE)
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?\s*", re.IGNORECASE)


def parse_size(value: int | str) -> int:
    """Return a number of bytes from a number or text such as `20GB`, `512MiB`, `1.5g`.

    Raises:
        UsageError: it is no size, or not positive.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        found = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if found is None or (found[3] and not found[2]):
            raise UsageError(
                f"{value!r} is not a size; write a number of bytes, or 20GB, or 512MiB"
            )
        number, unit, binary = found.groups()
        power = list(_UNITS).index(unit.lower())
        size = int(float(number) * (1024**power if binary else _UNITS[unit.lower()]))
    if size <= 0:
        raise UsageError(f"the size {value!r} is not positive; write for example 20GB")
    return size


def parse_duration(value: float | str) -> float:
    """Return a number of seconds from one or text such as `2s`, `500ms`, `1.5`, `1min`.

    Raises:
        UsageError: it is no duration, or negative.
    """
    seconds = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and (found := _DURATION.fullmatch(value)) is not None:
        seconds = float(found[1]) * _SECONDS[found[2].lower()]
    if not 0 <= seconds < math.inf:
        raise UsageError(f"{value!r} is not a duration; write a number of seconds, or 2s, or 500ms")
    return seconds


def format_duration(seconds: float) -> str:
    """Return a number of seconds as people write it in an option: `2s`, `500ms`."""
    return f"{seconds * 1000:g}ms" if 0 < seconds < 1 else f"{seconds:g}s"


def format_shape(shape: Sequence[int | None] | None) -> str:
    """Return a shape as Python writes it, `?` where it is not known; a long one is cut."""
    sizes, more = sizes_of(shape)
    return "?" if shape is None else f"[{', '.join(sizes)}]{more}"


def sizes_of(shape: Sequence[int | None] | None) -> tuple[list[str], str]:
    """Return a shape's sizes as texts, the middle of many left out, and how many there are then."""
    sizes = ["?" if size is None else str(size) for size in shape or ()]
    if len(sizes) <= _MOST_DIMS:
        return sizes, ""
    return [*sizes[:3], "...", sizes[-1]], f" ({len(sizes)} dims)"


def format_size(nbytes: float) -> str:
    """Return a number of bytes in three or four digits: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError  # the loop always returns


def format_binary_size(nbytes: int) -> str:
    """Return a number of bytes as people write it in an option: `256MiB`."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes and nbytes % (1 << power) == 0:
            return f"{nbytes >> power}{unit}"
    return str(nbytes)


def count(number: int, noun: str) -> str:
    """Return a number of things: `1 rank`, `2 ranks`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
