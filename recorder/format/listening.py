"""Which ranks listen in a folder, and what each has taken of what `graft ctl` asked for.

A recording's claims say so. A replay, which has none, says it beside its log while it runs.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import cast

from ..errors import RecordingError
from . import disk
from .claims import ClaimData, claimed_ranks, claims_of, is_alive
from .schema import GRAFTS, json_bytes, rank_folder, read_json

_LISTENING = re.compile(r"rank-(\d{5,7})-a(\d{1,9})\.json")


def tell_listening(out: Path, rank: int, attempt: int, control: int | None) -> None:
    """Say that a replay's rank listens in this process, and which order holds; None: no longer.

    Raises:
        OSError: it cannot be written.
    """
    path = out / GRAFTS / f"{rank_folder(rank)}-a{attempt}.json"
    if control is None:
        disk.remove(path)
        return
    said: ClaimData = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "state": "running",
        "control": control,
    }
    disk.replace(path, json_bytes(said))


def listening(folder: Path) -> list[ClaimData]:
    """Return what those say that listen in a folder, by rank; of other hosts all that began.

    What cannot be read is left out.
    """
    found: list[ClaimData] = []
    for rank in claimed_ranks(folder):
        try:
            found += [{**one, "rank": rank} for one in claims_of(folder, rank)]
        except RecordingError:
            continue
    for path in (folder / GRAFTS).glob("rank-*.json"):
        match = _LISTENING.fullmatch(path.name)
        try:
            if match:
                found.append(cast(ClaimData, {**read_json(path), "rank": int(match[1])}))
        except RecordingError:
            continue
    here = socket.gethostname()
    live = [c for c in found if c.get("state") == "running"]
    return sorted(
        (c for c in live if c.get("host") != here or is_alive(c)), key=lambda c: c["rank"]
    )
