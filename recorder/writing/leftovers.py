"""What an attempt left behind: its bytes counted, its open files sealed in its stead."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from ..format import disk
from ..format.disk import PRIVATE, Access
from ..format.journal import read_journal
from ..format.payload import parse_dtype
from ..format.schema import COLUMNS, PART, ManifestRow
from ..format.shard import ShardWriter, header_room
from ..format.tables import write_parquet


def stored_bytes(folder: Path) -> int:
    """Return the bytes of the shards in a rank's folder, headers left aside."""
    found = 0
    for path in folder.iterdir():
        match = PART.fullmatch(path.name)
        if match and match[3] in ("safetensors", "partial"):
            found += max(0, path.stat().st_size - header_room(int(match[2])))
    return found


def seal_leftovers(folder: Path, attempt: int, access: Access = PRIVATE) -> None:
    """Seal what the writer of an attempt left open when its process was killed.

    Args:
        folder: the rank's folder; nobody writes there any more.
        attempt: the number in the attempt's file names.
        access: who may read the files.

    Raises:
        OSError: it cannot be written; a reader goes on to find what it found before.
        DamagedRecording: a journal cannot be read.
    """
    for path in sorted(folder.glob(f"a{attempt}-*.journal")):
        if PART.fullmatch(path.name) is None:
            continue
        if not path.with_suffix(".parquet").exists():
            rows = cast("list[ManifestRow]", read_journal(path))
            final = path.with_suffix(".safetensors")
            if final.with_suffix(".partial").exists():
                _finish_shard(final, rows)
            write_parquet(path.with_suffix(".parquet"), rows, COLUMNS, access)
        disk.remove(path)


def _finish_shard(final: Path, rows: list[ManifestRow]) -> None:
    """Finish a shard with the payloads that its journal tells of."""
    where = f"{final.parent.name}/{final.name}"
    inside = [row for row in rows if row.get("shard") == where and "offset" in row]
    # The first lies behind the header's room.
    shard = ShardWriter(final, inside[0]["offset"] if inside else 0, resume=True)
    for row in inside:
        if row["offset"] == shard.end:
            itemsize = parse_dtype(row["dtype"], final).itemsize
            shard.add(
                row["tensor"] or "", row["dtype"], itemsize, row["shape"] or [], row["nbytes"]
            )
    if shard.is_empty:
        shard.discard()
    else:
        shard.finish()
