"""What an attempt says of itself in `attempt-N.json`: read, and checked for belonging here."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

from ..errors import DamagedRecording, MixedRecordings
from ..mesh import MOST_AXES, MOST_RANKS, FrozenMesh, frozen
from .schema import ATTEMPT, RANK_FOLDER, Description, check_version, rank_folder, read_json


class MeshEntry(TypedDict):
    """Where a rank stood from the tap with number `seq` on: axis -> [coordinate, size]."""

    seq: int
    axes: dict[str, list[int]] | None


class ClaimData(TypedDict, total=False):
    """What an attempt says of itself; of what comes from a file, nothing is sure to be there."""

    format_version: float
    recording: str
    """The recording's id."""
    rank: int
    world_size: int
    rank_source: str
    attempt: int
    restarts: int
    """How often the launcher says that it had restarted the job; not there in older ones."""
    agent: str
    job: str
    launcher: str
    host: str
    pid: int | None
    started_ns: int
    ended_ns: int
    repaired_ns: int
    state: str
    """`running`, `complete`, `stopped`, `failed`, `killed` or `repaired`."""
    reason: str
    keep_last: int | None
    max_hold: float | None
    """Seconds for which a step may be held before taps are dropped; None where that is not so."""
    control: int
    """The number of the latest order of `graft ctl` that the rank has taken."""
    meshes: list[MeshEntry]
    steps: int
    rows: int
    has_ids: bool
    """Whether some of its rows hold the ids of rows, and are no taps."""
    bytes: int
    dropped: int


def attempt_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the attempts that a rank's folder has a claim of, in order, each with its file."""
    try:
        found = [(ATTEMPT.fullmatch(path.name), path) for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((int(match[1]), path) for match, path in found if match)


def read_claim(path: Path, attempt: int) -> ClaimData:
    """Return what an attempt says of itself, unchecked.

    Raises:
        DamagedRecording: the file does not hold a JSON object.
        RecordingError: it cannot be read.
    """
    return cast(ClaimData, {**read_json(path), "attempt": attempt})


def claims_of(run: Path, rank: int) -> list[ClaimData]:
    """Return the claims on a rank, in the order of their attempts; none where it has no folder."""
    return [read_claim(path, n) for n, path in attempt_files(run / rank_folder(rank))]


def claimed_ranks(run: Path) -> list[int]:
    """Return the ranks that have a folder, sorted."""
    try:
        names = [path.name for path in run.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [RANK_FOLDER.fullmatch(name) for name in names]
    return sorted(int(match[1]) for match in found if match)


def is_live(run: Path) -> bool:
    """Whether a process on this host is still recording into a folder."""
    return any(is_recording(claim) for rank in claimed_ranks(run) for claim in claims_of(run, rank))


def is_recording(claim: ClaimData) -> bool:
    """Whether a claim's process runs on this host and has not closed its recording."""
    return claim.get("state") == "running" and is_alive(claim)


def is_alive(claim: ClaimData) -> bool:
    """Whether a claim's process runs on this host; of other hosts nothing is known: False."""
    pid = claim.get("pid")
    if claim.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def check_claim(path: Path, claim: ClaimData, rank: int, about: Description) -> None:
    """Refuse a claim that is not of this rank of this recording.

    Raises:
        DamagedRecording: it is malformed, or of another rank.
        MixedRecordings: it is part of another recording.
        UnsupportedVersion: another version wrote it.
    """
    check_version(path, claim)
    if claim.get("rank") != rank:
        raise DamagedRecording(path, f"it is of rank {claim.get('rank')!r}, its folder of {rank}")
    if not isinstance(claim.get("state"), str) or not isinstance(claim.get("rows", 0), int):
        raise DamagedRecording(path, "its state or its number of rows is malformed")
    if checked_meshes(claim.get("meshes", [])) is None:
        raise DamagedRecording(path, "its meshes are malformed")
    known = {"recording": about.get("id"), "job": about.get("job")}
    known["launcher"] = about.get("launcher")
    said: Mapping[str, object] = claim
    if not any(said.get(name) and said[name] == value for name, value in known.items()):
        raise MixedRecordings(path, claim.get("recording"), about.get("id"))


def checked_meshes(value: object) -> list[tuple[int, FrozenMesh | None]] | None:
    """Return what a claim says of a rank's meshes, each with the seq from which on it held.

    None where it is no such thing: it comes from a file.
    """
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return None
    found: list[tuple[int, FrozenMesh | None]] = []
    for entry in value:
        seq, axes = entry.get("seq"), entry.get("axes")
        if type(seq) is not int or not (axes is None or _are_axes(axes)):
            return None
        if found and seq < found[-1][0]:
            return None
        found.append((seq, frozen(axes and {axis: (k, n) for axis, (k, n) in axes.items()})))
    return found


def _are_axes(axes: object) -> bool:
    return (
        isinstance(axes, dict)
        and len(axes) <= MOST_AXES
        and all(
            isinstance(place, list)
            and len(place) == 2
            and all(type(n) is int for n in place)
            and 0 <= place[0] < place[1] < MOST_RANKS
            for place in axes.values()
        )
    )
