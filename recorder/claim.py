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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RecordingError, RecordingExists
from .format import disk
from .format.disk import PRIVATE, Access
from .format.schema import (
    ATTEMPT,
    FORMAT_VERSION,
    RANK_FOLDER,
    RECORDING,
    json_bytes,
    rank_folder,
    read_json,
    read_recording_json,
)
from .provenance import provenance
from .ranks import Rank


@dataclass(frozen=True)
class Job:
    """What tells one job from another, and one attempt of it from the next.

    Attributes:
        id: `GRAFT_JOB`, which the wrapper sets, else one made up here.
        launcher: torchelastic's run id, "" where there is none.
        attempt: torchelastic's restart count, else 0.
        agent: the torchelastic agent that started this process, "" where there is none.
    """

    id: str
    launcher: str
    attempt: int
    agent: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Job:
        """Return the job this process belongs to."""
        launcher = environ.get("TORCHELASTIC_RUN_ID", "")
        count = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(
            environ.get("GRAFT_JOB") or new_job_id(environ),
            "" if launcher == "none" else launcher,  # torchrun's id when it was given none
            int(count) if count.isascii() and count.isdigit() else 0,
            f"{socket.gethostname()}:{os.getppid()}" if "TORCHELASTIC_RUN_ID" in environ else "",
        )

    def is_same(self, claim: Mapping[str, Any]) -> bool:
        """Whether a claim was made by this job."""
        return claim.get("job") == self.id or bool(
            self.launcher and claim.get("launcher") == self.launcher
        )


def new_job_id(environ: Mapping[str, str] = os.environ) -> str:
    """Return an id that a restart of this process by the same torchrun agent gets again."""
    if "TORCHELASTIC_RUN_ID" in environ:
        run = environ["TORCHELASTIC_RUN_ID"]
        return f"torchelastic-{run}-{socket.gethostname()}-{os.getppid()}"
    return uuid.uuid4().hex


def read_claims(run: Path, rank: int) -> list[dict[str, Any]]:
    """Return the claims on a rank, in the order of their attempts."""
    folder = run / rank_folder(rank)
    try:
        files = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    claims = {}
    for path in files:
        found = ATTEMPT.fullmatch(path.name)
        if found:
            claims[int(found[1])] = {**read_json(path), "attempt": int(found[1])}
    return [claims[attempt] for attempt in sorted(claims)]


def claimed_ranks(run: Path) -> list[int]:
    """Return the ranks that have a folder, sorted."""
    try:
        names = [path.name for path in run.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [RANK_FOLDER.fullmatch(name) for name in names]
    return sorted(int(match[1]) for match in found if match)


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
    meta = read_recording_json(run)
    if rank is not None:
        _check_claims(run, rank, job)
    if world_size is not None and meta["world_size"] != world_size and job.attempt == 0:
        raise _other_world(run, meta["world_size"], world_size)
    if rank is None and set(range(meta["world_size"])) <= set(claimed_ranks(run)):
        raise RecordingExists(run, "holds a recording already")


def _check_claims(run: Path, rank: int, job: Job) -> int:
    """Return the attempt to claim a rank with, or refuse if it is taken."""
    attempt = job.attempt
    for claim in read_claims(run, rank):
        if not job.is_same(claim):
            raise RecordingExists(run, f"holds a recording of rank {rank} by another job already")
        if claim["attempt"] < attempt:
            continue
        # Torchelastic restarts workers without counting when the number of nodes changes.
        again = job.agent and claim.get("agent") == job.agent and not is_alive(claim)
        if not again:
            raise RecordingExists(
                run,
                f"holds a recording of rank {rank} already, made by pid {claim.get('pid')}"
                f" on {claim.get('host')}",
            )
        attempt = claim["attempt"] + 1
    return attempt


def _check_launcher(run: Path, job: Job) -> None:
    """Refuse to join ranks that another torchrun started, where both are known by name."""
    for other in claimed_ranks(run):
        for claim in read_claims(run, other):
            theirs = claim.get("launcher")
            if theirs and job.launcher and theirs != job.launcher:
                raise RecordingExists(run, f"holds a recording by another job (rank {other})")


def replace_rank(run: Path, rank: int, job: Job, *, own: bool = False) -> None:
    """Remove what another job left under a rank, never what a live process is writing.

    Args:
        run: the recording's folder.
        rank: the rank.
        job: this job.
        own: remove what this job left there too; for code that asks for it itself.
    """
    claims = read_claims(run, rank)
    if any(is_alive(c) and c.get("state") == "running" for c in claims):
        return  # the claim is then refused
    if any(not job.is_same(c) or (own and c["attempt"] >= job.attempt) for c in claims):
        disk.remove_tree(run / rank_folder(rank))


def _other_world(run: Path, theirs: int, ours: int) -> RecordingExists:
    return RecordingExists(run, f"holds a recording of a world of {theirs}, this job has {ours}")


def mark_ended(
    run: Path, claim: Mapping[str, Any], state: str, reason: str, access: Access = PRIVATE
) -> None:
    """Write down, in a dead process's place, how it ended; called by its wrapper."""
    path = run / rank_folder(claim["rank"]) / f"attempt-{claim['attempt']}.json"
    disk.rewrite(path, json_bytes({**claim, "state": state, "reason": reason}), access)
    note_end(run, claim, state, reason, access)


def note_end(
    run: Path, claim: Mapping[str, Any], state: str, reason: str, access: Access = PRIVATE
) -> None:
    """Say in `recording.json` that a rank's recording ended early, and why; never raises.

    Several ranks may do so at once, so each holds the folder's lock meanwhile, where there are
    locks.
    """
    try:
        with disk.locked(run):
            meta = read_recording_json(run)
            ended = [
                one
                for one in meta.get("ended", [])
                if (one["rank"], one["attempt"]) != (claim["rank"], claim["attempt"])
            ]
            ended.append(
                {
                    "rank": claim["rank"],
                    "attempt": claim["attempt"],
                    "state": state,
                    "reason": reason,
                }
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

    def __init__(self, path: Path, data: dict[str, Any], access: Access = PRIVATE) -> None:
        self._path = path
        self._data = data
        self._access = access
        self.folder = path.parent
        self.attempt: int = data["attempt"]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What it says."""
        return self._data

    def update(self, **facts: Any) -> None:
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
    about: Mapping[str, Any],
    overwrite: bool = False,
    own: bool = False,
    access: Access = PRIVATE,
    **facts: Any,
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
        **facts: what else the claim says.

    Raises:
        RecordingExists: the place is taken.
        RecordingError: the folder cannot be written, or holds another version's recording.
    """
    try:
        disk.make_folder(run, access)
        meta = _join(run, rank, job, about, overwrite, access)
        folder = run / rank_folder(rank.rank)
        if overwrite:
            replace_rank(run, rank.rank, job, own=own)
        attempt = _check_claims(run, rank.rank, job)
        _check_launcher(run, job)
        disk.make_folder(folder, access)
        data = {
            "format_version": FORMAT_VERSION,
            "recording": meta["id"],
            "rank": rank.rank,
            "world_size": rank.world_size,
            "rank_source": rank.source,
            "attempt": attempt,
            "agent": job.agent,
            "job": job.id,
            "launcher": job.launcher,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_ns": time.time_ns(),
            "state": "running",
            **facts,
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
    run: Path, rank: Rank, job: Job, about: Mapping[str, Any], overwrite: bool, access: Access
) -> dict[str, Any]:
    """Return the recording's description, writing it if there is none."""
    path = run / RECORDING

    def describe() -> dict[str, Any]:
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

    def write(data: dict[str, Any]) -> None:
        disk.replace(path, json_bytes(data), access)

    if not path.exists():
        data = describe()
        if disk.create_whole(path, json_bytes(data), access):
            return data
    if overwrite and _is_all_ours_to_replace(run, rank, job):
        data = describe()
        write(data)
        return data
    meta = read_recording_json(run)
    foreign = any(not job.is_same(claim) for claim in read_claims(run, rank.rank))
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


def _is_all_ours_to_replace(run: Path, rank: Rank, job: Job) -> bool:
    """Whether no other rank has, or could have, joined the recording that is to be replaced."""
    others = [r for r in claimed_ranks(run) if r != rank.rank]
    ours = any(job.is_same(claim) for claim in read_claims(run, rank.rank))
    return rank.world_size == 1 and not others and not ours


def replace_recording(run: Path) -> None:
    """Remove a recording from a folder, and nothing else that is in it.

    `recording.json` goes first: whatever happens then, no half recording is left to be opened.
    """
    disk.remove(run / RECORDING)
    for rank in claimed_ranks(run):
        disk.remove_tree(run / rank_folder(rank))


def is_live(run: Path) -> bool:
    """Whether a process on this host is still recording into a folder."""
    for rank in claimed_ranks(run):
        for claim in read_claims(run, rank):
            if claim.get("state") == "running" and is_alive(claim):
                return True
    return False


def is_alive(claim: Mapping[str, Any]) -> bool:
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
