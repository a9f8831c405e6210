"""Names, version and column types of a recording on disk.

    RUN/recording.json               what, how, of how many ranks: by the first rank to come
    RUN/rank-00003/attempt-0.json    the claim of one process on its rank, and how it ended
    RUN/rank-00003/a0-00000.safetensors   a finished shard
    RUN/rank-00003/a0-00000.parquet       the manifest rows written while that shard was open
    RUN/rank-00003/a0-00001.partial       the shard being written: room for a header, then data
    RUN/rank-00003/a0-00001.journal       its rows so far, a line of JSON each

`a0` is the attempt: torchelastic's restart count, else 0. A finished stem has its `.parquet`; any
journal beside it is then void. An unfinished stem is read from its journal and `.partial` (or
`.safetensors`, renamed just before the end came): offsets are the same in both, because the
header's room is reserved when the file is made.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ..errors import DamagedRecording, NotARecording, RecordingError, UnsupportedVersion
from ..ranks import MAX_WORLD_SIZE
from . import disk

if TYPE_CHECKING:
    import polars as pl

FORMAT_VERSION = 1.1
"""1.1 has the column `rows`."""
READABLE = (1, FORMAT_VERSION)
RECORDING = "recording.json"
RANK_FOLDER = re.compile(r"rank-(\d{5,7})")
PART = re.compile(r"a(\d{1,9})-(\d{5,9})\.(safetensors|parquet|partial|journal)")
ATTEMPT = re.compile(r"attempt-(\d{1,9})\.json")
_MAX_JSON = 4 << 20
_MOST_ENTRIES = 1_000  # of a folder, that are looked at for recordings

ROWS = "rows"
"""The kind of a record that holds the ids of rows, and its name."""
TOKENS = "tokens"
"""The kind of a record that says which token each id is, and at which position."""
AUXILIARY = (ROWS, TOKENS)
"""Kinds of records that are no taps."""

GRAFTS = "grafts"
"""The folder of a replay's logs."""
COLUMNS = {
    "rank": "Int32",
    "seq": "Int64",
    "step": "Int64",
    "name": "String",
    "occurrence": "Int32",
    "tags": "String",
    "kind": "String",
    "dtype": "String",
    "shape": "List(Int64)",
    "dims": "String",
    "extras": "String",
    "value": "String",
    "nbytes": "Int64",
    "digest": "String",
    "shard": "String",
    "tensor": "String",
    "min": "Float64",
    "max": "Float64",
    "mean": "Float64",
    "std": "Float64",
    "l2": "Float64",
    "nan_count": "Int64",
    "inf_count": "Int64",
    "time_ns": "Int64",
    "rows": "String",
}
"""The manifest's columns and their polars types."""

ADDED = ("rows",)
"""Those that an earlier version did not write."""

STATISTICS = ("min", "max", "mean", "std", "l2", "nan_count", "inf_count")
"""The columns that follow in the journal when there is time."""


class ManifestRow(TypedDict, total=False):
    """A row of the manifest, as it is read; on its way there what is not known yet is absent."""

    rank: int
    seq: int
    step: int
    name: str
    occurrence: int
    tags: str
    kind: str
    dtype: str
    shape: list[int] | None
    dims: str | None
    extras: str | None
    value: str | None
    nbytes: int
    digest: str
    shard: str | None
    tensor: str | None
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    l2: float | None
    nan_count: int | None
    inf_count: int | None
    time_ns: int
    rows: str | None
    attempt: int
    """Of the file that it is read from; no column there."""
    offset: int
    """Of the payload in the shard that is open; in the journal alone."""


class Ended(TypedDict):
    """That an attempt ended early, and why."""

    rank: int
    attempt: int
    state: str
    reason: str


class Description(TypedDict, total=False):
    """What `recording.json` says."""

    format_version: float
    id: str
    world_size: int
    job: str
    launcher: str
    created_ns: int
    command: list[str]
    options: dict[str, Any]
    provenance: dict[str, Any]
    ended: list[Ended]
    repaired_from: str | None


def polars_schema(columns: dict[str, str]) -> dict[str, pl.DataType]:
    """Return columns as a polars schema."""
    import polars as pl

    def dtype(text: str) -> Any:
        inner = re.fullmatch(r"List\((\w+)\)", text)
        return pl.List(getattr(pl, inner[1])) if inner else getattr(pl, text)

    return {name: dtype(text) for name, text in columns.items()}


def rank_folder(rank: int) -> str:
    """Return the name of a rank's folder."""
    return f"rank-{rank:05d}"


def stem(attempt: int, index: int) -> str:
    """Return the common name of one shard, its manifest part and its journal."""
    return f"a{attempt}-{index:05d}"


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """Return a description or a claim as it is written."""
    return (json.dumps(data, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        DamagedRecording: no JSON, no object, absurdly large, or no regular file.
        RecordingError: the file cannot be read.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise DamagedRecording(path, "it is not a regular file")
        with os.fdopen(disk.open_regular(path), "rb") as file:
            text = file.read(_MAX_JSON + 1)
    except OSError as err:
        raise RecordingError(
            f"{path} cannot be read: {err.strerror}; check its permissions"
        ) from err
    if len(text) > _MAX_JSON:
        raise DamagedRecording(path, "it is larger than any such file can be")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedRecording(path, "it does not hold JSON") from None
    if not isinstance(data, dict):
        raise DamagedRecording(path, f"expected a JSON object, got a {type(data).__name__}")
    return data


def recordings_in(folder: Path) -> list[str]:
    """Return the recordings that a folder holds, by their paths, sorted; of many only some."""
    try:
        paths = itertools.islice(folder.iterdir(), _MOST_ENTRIES)
        return sorted(str(path) for path in paths if (path / RECORDING).is_file())
    except OSError:
        return []


def check_version(path: Path, data: Mapping[str, Any]) -> None:
    """Refuse a description or a claim of a version that cannot be read.

    Raises:
        UnsupportedVersion: it is.
    """
    if data.get("format_version") not in READABLE:
        raise UnsupportedVersion(path, data.get("format_version"), READABLE)


def read_description(folder: Path) -> Description:
    """Return `recording.json`, its version checked.

    Raises:
        NotARecording: there is none.
        UnsupportedVersion: another version wrote it.
        DamagedRecording: it does not hold what it should.
    """
    path = folder / RECORDING
    if not path.is_file():
        if folder.is_dir():
            raise NotARecording(folder, holds=recordings_in(folder))
        beside = recordings_in(folder.parent)
        close = difflib.get_close_matches(str(folder), beside, 3)
        raise NotARecording(folder, beside=close or beside)
    data = read_json(path)
    check_version(path, data)
    world = data.get("world_size")
    if type(world) is not int or not 1 <= world <= MAX_WORLD_SIZE:
        raise DamagedRecording(path, f"world_size is {world!r}, expected 1 to {MAX_WORLD_SIZE}")
    command = data.get("command", [])
    if not isinstance(command, list) or not all(isinstance(part, str) for part in command):
        raise DamagedRecording(path, "command is not a list of strings")
    for part in ("options", "provenance"):
        if not isinstance(data.get(part, {}), dict):
            raise DamagedRecording(path, f"{part} is not a JSON object")
    return cast(Description, data)
