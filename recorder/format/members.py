"""Which ranks and attempts a recording has, whether they belong together, and which are whole.

Folders of single ranks may be brought together by copying, so each claim (`attempt-N.json`) says
which recording it is part of: by that recording's id, or, where every machine wrote a folder of its
own, by the job that the ranks have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import DamagedRecording
from .claims import ClaimData, attempt_files, check_claim, read_claim
from .schema import RANK_FOLDER, Description, rank_folder

LINKED = "it is a symbolic link, and may lead out of the recording"


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
    for _, path in linked_folders(run):
        raise DamagedRecording(path, LINKED)
    return own_folders(run)


def own_folders(run: Path) -> list[tuple[int, Path]]:
    """Return the ranks that have a folder in the recording's own, sorted, and these."""
    named = _named_folders(run)
    return [(rank, path) for rank, path in named if not path.is_symlink() and path.is_dir()]


def linked_folders(run: Path) -> list[tuple[int, Path]]:
    """Return the ranks whose folder is a symbolic link, sorted, and these."""
    return [(rank, path) for rank, path in _named_folders(run) if path.is_symlink()]


def _named_folders(run: Path) -> list[tuple[int, Path]]:
    found = ((RANK_FOLDER.fullmatch(path.name), path) for path in run.iterdir())
    # Any other name is another one for a rank that has one.
    return sorted(
        (int(match[1]), path)
        for match, path in found
        if match and path.name == rank_folder(int(match[1]))
    )


def read_claims(run: Path, about: Description) -> list[ClaimData]:
    """Return what each attempt of each rank says of itself, by rank and attempt.

    Raises:
        DamagedRecording: a claim is none, or of another rank.
        MixedRecordings: a claim is part of another recording.
        UnsupportedVersion: another version wrote it.
    """
    found = []
    for rank, folder in rank_folders(run):
        for attempt, path in attempt_files(folder):
            claim = read_claim(path, attempt)
            check_claim(path, claim, rank, about)
            found.append(claim)
    return found


def latest_attempts(claims: Sequence[ClaimData], world_size: int) -> dict[int, int]:
    """Return each rank's attempt of the job's latest start; ranks that had not begun it have none.

    A launcher restarts all ranks at once. One that died before its first tap then has claims of
    earlier starts alone, which are no part of what the others recorded after.

    Args:
        claims: as `read_claims` returns them.
        world_size: how many ranks there were.
    """
    latest = {claim["rank"]: claim for claim in claims if claim["rank"] < world_size}
    starts = {rank: _restarts(claim) for rank, claim in latest.items()}
    last = max(starts.values(), default=0)
    return {rank: claim["attempt"] for rank, claim in latest.items() if starts[rank] == last}


def _restarts(claim: ClaimData) -> int:
    found = claim.get("restarts")
    return found if isinstance(found, int) else claim["attempt"]


def incomplete(
    world_size: int, claims: Sequence[ClaimData], last_steps: Mapping[int, int]
) -> list[Incomplete]:
    """Return the ranks whose latest attempt is not whole, by rank.

    Args:
        world_size: how many ranks there were.
        claims: as `read_claims` returns them.
        last_steps: of each rank that has records in its latest attempt, the last step of these.
    """
    latest = {claim["rank"]: claim for claim in claims}
    begun = latest_attempts(claims, world_size)
    furthest = max(last_steps.values(), default=-1)
    found = []
    for rank in range(world_size):
        claim, last = latest.get(rank), last_steps.get(rank, -1)
        if claim is None:
            found.append(Incomplete(rank, "missing", 0, "has no folder here"))
            continue
        if rank not in begun:
            which = f"of attempt {claim['attempt']}, those of others of {max(begun.values())}"
            reason = f"had no tap since the job restarted: its records are {which}"
            found.append(Incomplete(rank, "missing", 0, reason))
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
