"""What tells one job from another, and one attempt of it from the next."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass


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

    def is_same(self, claim: Mapping[str, object]) -> bool:
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
