"""Who may write under which rank of a recording's folder.

One job fills a recording, but its ranks never talk to each other and may be started by several
wrappers. So each rank claims its number by creating a file that only one can create
(`attempt-N.json`), and `recording.json` is made by whichever rank comes first.

A claim of another job is never added to or replaced, unless `overwrite` says so. A torchelastic
restart belongs to the same job and claims the next attempt.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path

from ..errors import RecordingError, RecordingExists
from ..format import disk
from ..format.claims import ClaimData, claimed_ranks, claims_of, is_alive, is_recording
from ..format.disk import PRIVATE, Access
from ..format.schema import (
    FORMAT_VERSION,
    RECORDING,
    Description,
    Ended,
    json_bytes,
    rank_folder,
    read_description,
)
from ..job import Job
from ..provenance import provenance
from ..ranks import Rank
from ..sizes import count, format_duration
from ..taps.control import FILE as CONTROL


def check_free(run: Path, rank: int | None, world_size: int | None, job: Job) -> None:
    """Refuse a folder that is known to be taken before anything is written.

    Args:
        run: the recording's folder; need not exist.
        rank: this rank, or None where a wrapper does not know it.
        world_size: likewise.
        job: this job.

    Raises:
        RecordingExists: a recording that nobody can join, or this rank's place is taken.
    """
    if run.exists() and not run.is_dir():
        raise RecordingError(f"{run} is a file; name a folder to record into")
    if not (run / RECORDING).exists():
        return
    meta = read_description(run)
    if rank is not None:
        _check_claims(run, rank, job)
    if world_size is not None and meta["world_size"] != world_size and job.attempt == 0:
        raise _other_world(run, meta["world_size"], world_size)
    if rank is None and set(range(meta["world_size"])) <= set(claimed_ranks(run)):
        raise RecordingExists(run, "holds a recording already")


def _check_claims(run: Path, rank: int, job: Job) -> int:
    """Return the attempt to claim a rank with, or refuse if it is taken."""
    attempt = job.attempt
    for claim in claims_of(run, rank):
        is_here = (claim.get("host"), claim.get("pid")) == (socket.gethostname(), os.getpid())
        is_open = is_recording(claim)
        if is_here and is_open:
            raise RecordingExists(
                run,
                f"is being recorded into as rank {rank} by another session of this very process",
                "close that one first, or choose another folder",
            )
        if is_open and not job.is_same(claim):
            raise RecordingExists(
                run,
                f"is being recorded into as rank {rank} by pid {claim.get('pid')} of another job",
                "wait until it ends, or choose another folder",
            )
        if not job.is_same(claim):
            raise RecordingExists(run, f"already holds a recording of rank {rank} by another job")
        if claim["attempt"] < attempt:
            continue
        # Torchelastic restarts workers without counting when the number of nodes changes.
        again = job.agent and claim.get("agent") == job.agent and not is_alive(claim)
        if not again:
            raise RecordingExists(
                run,
                f"is taken: pid {claim.get('pid')} of this job (on {claim.get('host')}) "
                f"{'records' if is_open else 'recorded'} as rank {rank} already",
                "give this process a GRAFT_RANK of its own, with GRAFT_WORLD_SIZE, or keep the "
                "other from tapping (--filter)",
            )
        attempt = claim["attempt"] + 1
    return attempt


def _check_launcher(run: Path, job: Job) -> None:
    """Refuse to join ranks that another torchrun started, where both are known by name."""
    for other in claimed_ranks(run):
        for claim in claims_of(run, other):
            launcher = claim.get("launcher")
            if launcher and job.launcher and launcher != job.launcher:
                raise RecordingExists(run, f"holds a recording by another job (rank {other})")


def replace_rank(run: Path, rank: int, job: Job, *, own: bool = False) -> None:
    """Remove what another job left under a rank, never what a live process is writing.

    Args:
        run: the recording's folder.
        rank: the rank.
        job: this job.
        own: remove what this job left there too; for code that asks for it itself.
    """
    claims = claims_of(run, rank)
    if any(map(is_recording, claims)):
        return  # the claim is then refused
    if any(not job.is_same(c) or (own and c["attempt"] >= job.attempt) for c in claims):
        disk.remove_tree(run / rank_folder(rank))


def held_too_long(dropped: int, max_hold: float) -> str:
    """Say that taps were dropped for the job's sake, and what to do about it."""
    return (
        f"{count(dropped, 'tap')} dropped: writing held the job for longer than --max-hold "
        f"{format_duration(max_hold)}; record less with --filter or --level stats, or allow more"
    )


def _other_world(run: Path, recorded: int, here: int) -> RecordingExists:
    return RecordingExists(run, f"holds a recording of a world of {recorded}, this job has {here}")


def mark_ended(
    run: Path, claim: ClaimData, state: str, reason: str, access: Access = PRIVATE
) -> None:
    """Write down, in a dead process's place, how it ended; called by its wrapper."""
    path = run / rank_folder(claim["rank"]) / f"attempt-{claim['attempt']}.json"
    disk.rewrite(path, json_bytes({**claim, "state": state, "reason": reason}), access)
    note_end(run, claim, state, reason, access)


def note_end(
    run: Path, claim: ClaimData, state: str, reason: str, access: Access = PRIVATE
) -> None:
    """Say in `recording.json` that a rank's recording ended early, and why; never raises.

    Several ranks may do so at once, so each holds the folder's lock meanwhile, where there are
    locks.
    """
    try:
        with disk.locked(run):
            meta = read_description(run)
            ended = [
                one
                for one in meta.get("ended", [])
                if (one["rank"], one["attempt"]) != (claim["rank"], claim["attempt"])
            ]
            ended.append(
                Ended(rank=claim["rank"], attempt=claim["attempt"], state=state, reason=reason)
            )
            ended.sort(key=lambda one: (one["rank"], one["attempt"]))
            disk.rewrite(run / RECORDING, json_bytes({**meta, "ended": ended}), access)
    except (OSError, RecordingError, TypeError, KeyError):
        pass  # the rank's claim says so too


class Claim:
    """This process's right to write under one rank, and the file that says so.

    Attributes:
        folder: the rank's folder.
        attempt: the attempt's number, part of every file name.
    """

    def __init__(self, path: Path, data: ClaimData, access: Access = PRIVATE) -> None:
        self._path = path
        self._data = data
        self._access = access
        self.folder = path.parent
        self.attempt: int = data["attempt"]

    @property
    def facts(self) -> ClaimData:
        """What it says."""
        return self._data

    def update(self, facts: ClaimData) -> None:
        """Write down how it went, in one step."""
        self._data.update(facts)
        disk.rewrite(self._path, json_bytes(self._data), self._access)

    def note_end(self) -> None:
        """Say in `recording.json` that the recording ended early, and why."""
        run = self._path.parent.parent
        note_end(run, self._data, self._data["state"], self._data["reason"], self._access)


def claim_rank(
    run: Path,
    rank: Rank,
    job: Job,
    *,
    about: Description,
    overwrite: bool = False,
    own: bool = False,
    access: Access = PRIVATE,
    keep_last: int | None = None,
    max_hold: float | None = None,
    control: int = 0,
) -> Claim:
    """Claim a rank's place in a recording, making the recording if this is the first.

    Args:
        run: the recording's folder; made if need be.
        rank: this rank.
        job: this job.
        about: what `recording.json` says beyond the format: command, options.
        overwrite: replace what another job left under this rank.
        own: with `overwrite`, replace what this job left there too.
        access: who may read what is created.
        keep_last: how many complete steps are kept, where not all are.
        max_hold: seconds for which a step may be held before taps are dropped, where that is so.
        control: the number of the latest order of `graft ctl` that holds.

    Raises:
        RecordingExists: the place is taken.
        RecordingError: the folder cannot be written, or holds another version's recording.
    """
    try:
        disk.make_folder(run, access)
        if any(map(is_recording, claims_of(run, rank.rank))):
            _check_claims(run, rank.rank, job)  # before `overwrite` changes anything of it
        meta = _join(run, rank, job, about, overwrite, access)
        folder = run / rank_folder(rank.rank)
        if overwrite:
            replace_rank(run, rank.rank, job, own=own)
        attempt = _check_claims(run, rank.rank, job)
        _check_launcher(run, job)
        disk.make_folder(folder, access)
        data: ClaimData = {
            "format_version": FORMAT_VERSION,
            "recording": meta["id"],
            "rank": rank.rank,
            "world_size": rank.world_size,
            "rank_source": rank.source,
            "attempt": attempt,
            "restarts": job.attempt,
            "agent": job.agent,
            "job": job.id,
            "launcher": job.launcher,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_ns": time.time_ns(),
            "state": "running",
            "keep_last": keep_last,
            "max_hold": max_hold,
            "control": control,
        }
        path = folder / f"attempt-{attempt}.json"
        if not disk.create_whole(path, json_bytes(data), access):
            raise RecordingExists(run, f"holds a recording of rank {rank.rank} already")
    except OSError as err:
        raise RecordingError(
            f"{run} cannot be written: {err.strerror or err}; choose a folder you may write to"
        ) from err
    return Claim(path, data, access)


def _join(
    run: Path, rank: Rank, job: Job, about: Description, overwrite: bool, access: Access
) -> Description:
    """Return the recording's description, writing it if there is none."""
    path = run / RECORDING

    def describe() -> Description:
        return {
            "format_version": FORMAT_VERSION,
            "id": uuid.uuid4().hex,
            "world_size": rank.world_size,
            "job": job.id,
            "launcher": job.launcher,
            "created_ns": time.time_ns(),
            **about,
            "provenance": provenance(),
        }

    def write(data: Description) -> None:
        disk.replace(path, json_bytes(data), access)

    if not path.exists():
        data = describe()
        if disk.create_whole(path, json_bytes(data), access):
            return data
    if overwrite and _is_whole_to_replace(run, rank, job):
        data = describe()
        write(data)
        return data
    meta = read_description(run)
    foreign = any(not job.is_same(claim) for claim in claims_of(run, rank.rank))
    if overwrite and foreign and meta["world_size"] == rank.world_size:
        meta = {**describe(), "id": meta["id"]}
        write(meta)
    if meta["world_size"] != rank.world_size:
        if job.attempt > 0:  # torchelastic restarted with more or fewer ranks
            meta["world_size"] = rank.world_size
        elif overwrite:
            for stale in claimed_ranks(run):
                if stale >= rank.world_size:
                    disk.remove_tree(run / rank_folder(stale))
            meta = {**describe(), "id": meta["id"]}
        else:
            raise _other_world(run, meta["world_size"], rank.world_size)
        write(meta)
    return meta


def _is_whole_to_replace(run: Path, rank: Rank, job: Job) -> bool:
    """Whether no other rank has, or could have, joined the recording that is to be replaced."""
    others = [r for r in claimed_ranks(run) if r != rank.rank]
    begun = any(job.is_same(claim) for claim in claims_of(run, rank.rank))
    return rank.world_size == 1 and not others and not begun


def replace_recording(run: Path) -> None:
    """Remove a recording from a folder, and nothing else that is in it.

    `recording.json` goes first: whatever happens then, no half recording is left to be opened.
    """
    disk.remove(run / RECORDING)
    disk.remove(run / CONTROL)
    for rank in claimed_ranks(run):
        disk.remove_tree(run / rank_folder(rank))
