"""Saves what is whole of a damaged recording, as a recording of its own."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from .errors import RecordingError
from .format import disk
from .format.claims import checked_meshes
from .format.disk import PRIVATE, Access
from .format.payload import parse_dtype
from .format.schema import (
    AUXILIARY,
    COLUMNS,
    FORMAT_VERSION,
    RECORDING,
    STATISTICS,
    Description,
    ManifestRow,
    json_bytes,
    rank_folder,
)
from .format.shard import Place
from .verify import Checker, RankReport, Stored, pieces_of
from .writing.store import Limits, Payload, Store

_FLUSHED_EVERY = 512


def repair(
    checker: Checker,
    out: Path,
    report: Callable[[RankReport], None],
    access: Access = PRIVATE,
) -> int:
    """Write what is whole of a recording as a recording of its own.

    Args:
        checker: made with `keep`.
        out: the folder to write; must be empty or not be there.
        report: called with each rank's report, once it is written.
        access: who may read what is written.

    Returns:
        How many records were written.

    Raises:
        RecordingError: `out` holds something, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecordingError(f"{out} is not empty; choose another folder for --repair")
    written = 0
    try:
        disk.make_folder(out, access)
        identity = uuid.uuid4().hex
        for found in checker.ranks():
            written += _write_rank(out, found, identity, checker.about, access)
            report(found)
        meta = {**checker.about, "id": identity, "repaired_from": checker.about.get("id")}
        meta.pop("ended", None)
        disk.replace(out / RECORDING, json_bytes(meta), access)
    except OSError as err:
        raise RecordingError(
            f"{out} cannot be written: {err.strerror or err}; choose a folder with room for it"
        ) from err
    return written


def _write_rank(
    out: Path, found: RankReport, identity: str, about: Description, access: Access
) -> int:
    """Write one rank's whole records, each attempt as it was; nothing where there is nothing."""
    if not found.whole and not set(found.claims) - found.foreign:
        return 0
    folder = out / rank_folder(found.rank)
    disk.make_folder(folder, access)
    written = 0
    attempts = {stored.row["attempt"] for stored in found.whole} | set(found.claims)
    for attempt in sorted(attempts - found.foreign):
        store = Store(folder, attempt, Limits(access=access))
        kept = (stored for stored in found.whole if stored.row["attempt"] == attempt)
        ids = 0
        for i, stored in enumerate(kept):
            ids += stored.row["kind"] in AUXILIARY
            _write_record(store, stored)
            if i % _FLUSHED_EVERY == 0:
                store.flush()
        store.close()
        written += store.rows - ids
        claim = dict(found.claims.get(attempt, {}))
        if checked_meshes(claim.get("meshes", [])) is None:
            del claim["meshes"]
        lost = found.damaged or bool(found.problems)
        state = "repaired" if lost else "complete"
        if claim.get("state") not in ("complete", "stopped", None):
            state = str(claim["state"])  # how the job ended stays as it was
        data = {
            "host": "",
            "pid": None,
            **claim,
            "format_version": FORMAT_VERSION,
            "recording": identity,
            "rank": found.rank,
            "world_size": about["world_size"],
            "attempt": attempt,
            "state": state if state != "running" else "killed",
            "reason": "; ".join(map(str, found.problems[:3])) or claim.get("reason", ""),
            "rows": store.rows,
            "bytes": store.bytes,
            "repaired_ns": time.time_ns(),
        }
        path = folder / f"attempt-{attempt}.json"
        disk.replace(path, json_bytes(data), access)
    return written


def _write_record(store: Store, stored: Stored) -> None:
    recorded = dict(stored.row)
    kept = {column: recorded[column] for column in COLUMNS if column not in STATISTICS}
    row = cast(ManifestRow, {**kept, "shard": None, "tensor": None})
    statistics = cast("Mapping[str, float | int | None]", {c: recorded[c] for c in STATISTICS})
    if not store.has_room(len(row["shape"] or [])):
        store.seal()
    if stored.path is None or stored.place is None:
        store.add_row(row)
    else:
        _write_payload(store, stored, stored.path, stored.place, row)
    if any(value is not None for value in statistics.values()):
        store.add_statistics(row["seq"], statistics)


def _write_payload(
    store: Store, stored: Stored, path: Path, place: Place, row: ManifestRow
) -> None:
    dtype = parse_dtype(row["dtype"], path)
    payload = Payload(row, dtype, tuple(row["shape"] or ()), place.nbytes)
    done = 0
    for piece in pieces_of(path, place):
        done += piece.nbytes
        first, last = done == piece.nbytes, done == place.nbytes
        store.add(payload, piece, first=first, last=last)
        store.write_out()
    if place.nbytes == 0:
        store.add(payload, memoryview(b""), first=True, last=True)
    if row["digest"] != stored.row["digest"]:
        raise OSError(0, f"{path} changes while it is read")
