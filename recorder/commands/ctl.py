"""`graft ctl`: switch a running job's recording, or its replay.

1. `order` writes what is asked for into the folder, on top of what was asked for before.
2. `awaited` waits for the ranks that listen there to take it.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from ..errors import NotARecording, RecordingError, UsageError
from ..filters import Filter
from ..format import disk
from ..format.claims import ClaimData
from ..format.listening import listening
from ..format.schema import GRAFTS, RECORDING, Description, read_description, recordings_in
from ..taps import control
from ..taps.control import Order
from .clicking import expected_errors, note
from .outcome import UNTRUSTED
from .tables import span

ACTIONS = ("on", "off", "filter", "step")
_SECONDS = 1.0
_LOOK = 0.02


@dataclass(frozen=True)
class Taken:
    """Who has taken an order.

    Attributes:
        ranks: those that have.
        late: those that live on this machine and have not.
        elsewhere: those that have not on other machines, where they may be gone.
    """

    ranks: tuple[int, ...]
    late: tuple[ClaimData, ...]
    elsewhere: tuple[ClaimData, ...]


def order(folder: Path, action: str, filter: Filter | None = None) -> Order:
    """Ask something of the sessions in a folder, and return all that is asked for now.

    Args:
        folder: a recording's, a replay's, or one that is empty yet.
        action: one of `ACTIONS`.
        filter: with `filter`, what is to hold; None for the job's own.

    Raises:
        NotARecording: it is none of these.
        RecordingError: it cannot be written, or what was asked for before cannot be read.
    """
    if not folder.is_dir():
        _about(folder)  # says what there is instead
    path = folder / control.FILE
    try:
        with disk.locked(folder):
            about = _about(folder)  # not while another order is half written
            try:
                before = control.read(folder)
            except ValueError as err:
                raise RecordingError(
                    f"{path} is damaged: {err}; remove it, which asks for nothing, and try again"
                ) from None
            if before.job and about and not _is_same(before, about):
                before = Order(before.sequence, steps=before.steps)  # asked of another job
            taken = [c.get("control") for c in listening(folder)]
            after = replace(
                before,
                sequence=max([before.sequence, *(n for n in taken if isinstance(n, int))]) + 1,
                is_on={"on": True, "off": False}.get(action, before.is_on),
                filter=filter if action == "filter" else before.filter,
                steps=before.steps + (action == "step"),
                job=str(about.get("job") or ""),
                launcher=str(about.get("launcher") or ""),
            )
            disk.replace(path, after.as_bytes(), disk.access_of(folder))
    except OSError as err:
        raise RecordingError(
            f"{folder} cannot be written: {err.strerror or err}; switch it as the user who runs it"
        ) from err
    return after


def _about(folder: Path) -> Description:
    """Return a recording's description; of what is no recording, or none yet, nothing.

    Raises:
        NotARecording: no session has this folder.
    """
    if (folder / RECORDING).is_file():
        return read_description(folder)
    if not folder.is_dir():
        return read_description(folder)  # which says what there is beside it
    known = {GRAFTS, control.FILE}
    names = {path.name for path in folder.iterdir()}
    if names and not names & known:
        raise NotARecording(folder, holds=recordings_in(folder))
    return {}


def _is_same(before: Order, about: Description) -> bool:
    return before.job == about.get("job") or bool(
        before.launcher and before.launcher == about.get("launcher")
    )


def awaited(folder: Path, sequence: int, seconds: float = _SECONDS) -> Taken:
    """Wait until the ranks that listen in a folder have taken an order, or no longer."""
    end = time.monotonic() + seconds
    while True:
        found = listening(folder)
        late = [c for c in found if not _has_taken(c, sequence)]
        if not late or time.monotonic() >= end:
            break
        time.sleep(_LOOK)
    here = socket.gethostname()
    return Taken(
        tuple(sorted({c["rank"] for c in found if _has_taken(c, sequence)})),
        tuple(c for c in late if c.get("host") == here),
        tuple(c for c in late if c.get("host") != here),
    )


def _has_taken(claim: ClaimData, sequence: int) -> bool:
    taken = claim.get("control")
    return isinstance(taken, int) and taken >= sequence


def what_holds(order: Order) -> str:
    """Say what is asked for."""
    parts = ["on" if order.is_on else "off"]
    if order.filter is not None:
        parts.append(f"filter {shlex.quote(order.filter.text)}")
    if order.steps:
        parts.append(f"{order.steps} steps ended" if order.steps > 1 else "1 step ended")
    return ", ".join(parts)


def _who(claims: Sequence[ClaimData]) -> str:
    return ", ".join(f"rank {c['rank']} (pid {c.get('pid')} on {c.get('host')})" for c in claims)


@click.command("ctl", short_help="Switch a running job: on, off, another filter, the next step.")
@click.argument("run", metavar="RUN")
@click.argument("action", type=click.Choice(ACTIONS), metavar="on|off|filter|step")
@click.argument("expr", required=False, metavar="[EXPR]")
@expected_errors
def ctl(run: str, action: str, expr: str | None) -> None:
    """Switch the recording of a running job, or with a replay's OUT for RUN its replay.

    \b
    on      taps are recorded, or grafted, again
    off     taps do nothing, and cost nothing, until it is on again; steps are still counted
    filter  only the taps that EXPR selects count, instead of --filter; without EXPR, --filter again
    step    ends an iteration on every rank, as step() does

    Ranks take it within 0.1 s, through a file in RUN; what was asked for holds for those too that
    start later. Ends with 3 where a rank that lives on this machine has not taken it in a second.

    \b
    Example:
      graft ctl runs/server filter 'layer < 4'
    """
    if expr is not None and action != "filter":
        raise UsageError(f"{action} takes no EXPR; give one with: graft ctl {run} filter EXPR")
    folder = Path(os.path.abspath(run))
    done = order(folder, action, Filter.parse(expr) if expr is not None else None)
    taken = awaited(folder, done.sequence)
    if taken.ranks:
        who = f"taken by rank{'s' * (len(taken.ranks) > 1)} {span(list(taken.ranks))}"
    elif taken.late or taken.elsewhere:
        who = "taken by no rank yet"
    else:
        who = "no rank listens there now; the next that does starts with it"
    click.echo(f"{run}: {what_holds(done)}; {who}")
    if taken.elsewhere:
        note(f"not seen to take it, and may be gone: {_who(taken.elsewhere)}")
    if taken.late:
        note(f"not taken within {_SECONDS:g} s: {_who(taken.late)}; see whether it is stopped")
        sys.exit(UNTRUSTED)
