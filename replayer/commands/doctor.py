"""`graft doctor`: what is installed and active here, and what a tap would do."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

from recorder import ranks
from recorder.commands.clicking import expected_errors
from recorder.commands.launch import is_closed
from recorder.commands.outcome import order_in
from recorder.errors import GraftError, TransformError, UsageError
from recorder.job import Job
from recorder.mailbox import DOCTOR, write_report
from recorder.modules import table
from recorder.provenance import provenance
from recorder.settings import TapSettings
from recorder.sizes import format_size
from recorder.writing.claim import check_free

if TYPE_CHECKING:
    from pathlib import Path

    from recorder import Recording
    from recorder.filters import Filter


def examine(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the facts.

    They are `versions`, `platform`, `devices`, `figures`, `rank`, `variables`, `modules` and
    `taps`.
    """
    about = provenance()
    try:
        rank = ranks.current_rank(environ)
        where: dict[str, Any] = {
            "rank": rank.rank,
            "world_size": rank.world_size,
            "source": rank.source,
        }
    except UsageError as err:
        rank, where = None, {"error": str(err)}
    return {
        "versions": about["versions"],
        "platform": platform.platform(),
        "devices": _devices(),
        "figures": _figures(),
        "rank": where,
        "variables": {k: v for k, v in sorted(environ.items()) if k.startswith("GRAFT_")},
        "modules": _modules(environ),
        "taps": _taps(environ, rank),
    }


def _devices() -> list[str]:
    import torch

    found = [f"cpu: {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found.append(f"cuda:{index}: {about.name}, {format_size(about.total_memory)}")
    else:
        found.append("cuda: none that torch can use")
    return found


def _figures() -> str:
    from recorder.scripting import compiles

    if compiles():
        return "compiled by TorchScript"
    return "op by op, since this torch has no TorchScript: the same figures, but slower"


def _modules(environ: Mapping[str, str]) -> Mapping[str, object]:
    """Return whether modules can be tapped in a program without taps: `open`, `why`."""
    entries = metadata.entry_points(group="torch.backends")
    if not any(one.value == "tensorgraft_entry:enter" for one in entries):
        return {
            "open": False,
            "why": "tensorgraft is on the path, but not installed; install it, so that torch knows",
        }
    if is_closed(environ):
        return {
            "open": False,
            "why": "TORCH_DEVICE_BACKEND_AUTOLOAD=0 tells torch to load nothing; graft's commands "
            "go in by PYTHONPATH then, which python -I does not read",
        }
    for prefix in filter(environ.get, TapSettings.PREFIXES):
        try:
            settings = TapSettings.of_environment(prefix, environ)
            if settings.taps:
                table.load(settings.taps)
        except UsageError as err:
            return {
                "open": False,
                "why": f"what {prefix}_MODULES and {prefix}_TAPS say cannot be used: {err}",
            }
    return {"open": True, "why": "import torch lets tensorgraft in"}


def _taps(environ: Mapping[str, str], rank: ranks.Rank | None) -> list[dict[str, Any]]:
    """Return what a tap does, one entry a session: `does`, `why`, `ready`."""
    asked = [v for v in ("GRAFT_RECORD", "GRAFT_REPLAY") if environ.get(v)]
    if not asked:
        return [
            {
                "does": "nothing",
                "why": "neither GRAFT_RECORD nor GRAFT_REPLAY is set; start the job with "
                "graft record or graft replay, or set them",
                "ready": True,
            }
        ]
    entries = []
    for variable in asked:
        does, examine_one = {
            "GRAFT_RECORD": ("record", _recording),
            "GRAFT_REPLAY": ("replay", _replaying),
        }[variable]
        entry = {"does": does, "why": f"{variable}={environ[variable]}", "ready": True}
        if rank is None:
            entry.update(ready=False, does="nothing", why="the rank is not known, see above")
        else:
            try:
                entry["detail"] = examine_one(environ, rank)
            except (GraftError, ImportError) as err:
                entry.update(ready=False, does="nothing", why=str(err))
        entries.append(entry)
    return entries


def _recording(environ: Mapping[str, str], rank: ranks.Rank) -> str:
    from recorder.session import from_environment

    (session,) = from_environment(environ)
    settings = session.settings
    if not settings.overwrite:
        check_free(session.path, rank.rank, rank.world_size, Job.from_environment(environ))
    which = _which(settings.filter)
    return (
        f"into {session.path} as rank {rank.rank} of {rank.world_size}, {settings.level}, {which}"
        f"{_once_on(session.path)}"
    )


def _replaying(environ: Mapping[str, str], rank: ranks.Rank) -> str:
    from ..session import Replayer, from_environment

    session = next(s for s in from_environment(environ) if isinstance(s, Replayer))
    settings = session.settings
    if isinstance(settings.transform, TransformError):
        raise settings.transform
    how = _how(getattr(settings.transform, "name", ""), session.recording)
    return (
        f"from {session.recording.world_size} senders onto rank {rank.rank} of {rank.world_size}, "
        f"{how}, {_which(settings.filter)}{_once_on(session.out)}"
    )


def _once_on(folder: Path | None) -> str:
    """Say where `graft ctl` has switched it off."""
    is_on = folder is None or order_in(folder).is_on
    return "" if is_on else f", once it is on: graft ctl {folder} on"


def _how(transform: str, recording: Recording) -> str:
    """Say what makes the tensor to write; layouts can where the recorded taps declare some."""
    if transform:
        return f"transform {transform}"
    if recording.latest()["dims"].is_not_null().any():
        return "by the dims of both sides where the tap declares some too, else identity by rank"
    return "identity by rank, since no recorded tap declares dims"


def _which(filter: Filter | None) -> str:
    return f"taps that match {filter.text}" if filter else "every tap"


def print_report(facts: Mapping[str, Any], echo: Callable[[str], None]) -> None:
    """Print the facts for a person."""
    versions = " ".join(f"{name} {version}" for name, version in facts["versions"].items())
    echo(f"versions   {versions}")
    echo(f"platform   {facts['platform']}")
    for device in facts["devices"]:
        echo(f"device     {device}")
    echo(f"figures    {facts['figures']}")
    rank = facts["rank"]
    if "error" in rank:
        echo(f"rank       unknown: {rank['error']}")
    else:
        echo(f"rank       {rank['rank']} of {rank['world_size']} (from {rank['source']})")
    for name, value in facts["variables"].items():
        echo(f"variable   {name}={value}")
    if not facts["variables"]:
        echo("variable   no GRAFT_* is set")
    state = "can be tapped" if facts["modules"]["open"] else "cannot be tapped"
    echo(f"modules    {state} without edits: {facts['modules']['why']}")
    for tap in facts["taps"]:
        if tap["does"] == "nothing":
            echo(f"a tap      would do nothing: {tap['why']}")
        else:
            echo(f"a tap      would {tap['does']} {tap.get('detail', '')} ({tap['why']})")


@click.command(short_help="Say what a tap would do here, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone.")
@expected_errors
def doctor(as_json: bool) -> None:
    """Say what is installed and active here, and whether a tap would record, replay or do nothing.

    Run it in a job's place, under the same launcher, to see what reaches the job:

    \b
    Example:
      graft record -o runs/base -- graft doctor
    """
    facts = examine()
    write_report({"state": DOCTOR})
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        print_report(facts, click.echo)
