"""Which ranks and attempts a recording has, whether they belong together, and which are whole.

Folders of single ranks may be brought together by copying, so each claim (`attempt-N.json`) says
which recording it is part of: by that recording's id, or, where every machine wrote a folder of its
own, by the job that the ranks have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DamagedRecording, MixedRecordings, UnsupportedVersion
from ..layouts.mesh import MOST_AXES, MOST_RANKS, FrozenMesh, frozen
from .schema import ATTEMPT, FORMAT_VERSION, RANK_FOLDER, rank_folder, read_json


class Incomplete(NamedTuple):
    """A rank whose records end before those of others, or before it closed them.

    Attributes:
        rank: the rank.
        state: `missing`, `running`, `killed`, `failed`, `stopped`, or `behind`.
        step: from this step on its records may be missing.
        reason: one fact, to be read after "rank N".
    """

    rank: int
    state: str
    step: int
    reason: str


def rank_folders(run: Path) -> list[tuple[int, Path]]:
    """Return the ranks that have a folder, sorted, and these.

    Raises:
        DamagedRecording: one is a symbolic link, which may lead anywhere.
    """
    found = []
    for path in sorted(run.iterdir()):
        match = RANK_FOLDER.fullmatch(path.name)
        if match and path.name != rank_folder(int(match[1])):
            continue  # another name for a rank that has one
        if match and path.is_symlink():
            raise DamagedRecording(path, "it is a symbolic link, and may lead out of the recording")
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def read_claims(run: Path, meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what each attempt of each rank says of itself, by rank and attempt.

    Raises:
        DamagedRecording: a claim is none, or of another rank.
        MixedRecordings: a claim is part of another recording.
        UnsupportedVersion: another version wrote it.
    """
    found = []
    for rank, folder in rank_folders(run):
        for path in folder.iterdir():
            match = ATTEMPT.fullmatch(path.name)
            if match:
                claim = {**read_json(path), "attempt": int(match[1])}
                check_claim(path, claim, rank, meta)
                found.append(claim)
    return sorted(found, key=lambda claim: (claim["rank"], claim["attempt"]))


def check_claim(path: Path, claim: Mapping[str, Any], rank: int, meta: Mapping[str, Any]) -> None:
    """Refuse a claim that is not of this rank of this recording; see `read_claims`."""
    if claim.get("format_version") != FORMAT_VERSION:
        raise UnsupportedVersion(path, claim.get("format_version"), FORMAT_VERSION)
    if claim.get("rank") != rank:
        raise DamagedRecording(path, f"it is of rank {claim.get('rank')!r}, its folder of {rank}")
    if not isinstance(claim.get("state"), str) or not isinstance(claim.get("rows", 0), int):
        raise DamagedRecording(path, "its state or rows are none")
    if checked_meshes(claim.get("meshes", [])) is None:
        raise DamagedRecording(path, "its meshes are none")
    same = any(
        claim.get(theirs) and claim.get(theirs) == meta.get(ours)
        for theirs, ours in (("recording", "id"), ("job", "job"), ("launcher", "launcher"))
    )
    if not same:
        raise MixedRecordings(path, claim.get("recording"), meta.get("id"))


def incomplete(
    world_size: int, claims: Sequence[Mapping[str, Any]], last_steps: Mapping[int, int]
) -> list[Incomplete]:
    """Return the ranks whose latest attempt is not whole, by rank.

    Args:
        world_size: how many ranks there were.
        claims: as `read_claims` returns them.
        last_steps: of each rank that has records in its latest attempt, the last step of these.
    """
    latest = {claim["rank"]: claim for claim in claims}
    furthest = max(last_steps.values(), default=-1)
    found = []
    for rank in range(world_size):
        claim, last = latest.get(rank), last_steps.get(rank, -1)
        if claim is None:
            found.append(Incomplete(rank, "missing", 0, "has no folder here"))
            continue
        state = claim["state"]
        where = f"its records end in step {last}" if last >= 0 else "it has no records"
        if 0 <= last < furthest:
            where += f", those of others in step {furthest}"
        if state == "running":
            found.append(Incomplete(rank, state, max(last, 0), f"has not closed; {where}"))
        elif state != "complete":
            reason = f"{state} ({claim.get('reason') or 'it is not known why'}); {where}"
            found.append(Incomplete(rank, state, max(last, 0), reason))
        elif 0 <= last < furthest:
            found.append(Incomplete(rank, "behind", last + 1, f"closed, but {where}"))
    return found


def checked_meshes(value: Any) -> list[tuple[int, FrozenMesh | None]] | None:
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


def _are_axes(axes: Any) -> bool:
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
