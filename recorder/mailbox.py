"""What a rank tells the wrapper that started it, beyond what the recording itself says.

`graft record` and `graft replay` make a folder, name it in `GRAFT_REPORTS`, and read it when the
command has ended. A rank under no wrapper reports to nobody.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

from .filters import Filter

VARIABLE = "GRAFT_REPORTS"
DOCTOR = "doctor"
"""What `graft doctor` reports as its state: it makes no tap, and nobody expects one."""


SURVEY = "GRAFT_SURVEY"
"""The variable with which `graft taps` asks what could be tapped."""
TAPS = "taps"
"""What a process reports as its session of what tap tables found in it."""
LOADED = "entry"
"""What a process reports as its session in which torch let tensorgraft in."""


class RowReport(TypedDict):
    """What became of one row of a tap table in one process."""

    path: str
    where: str
    optional: bool
    found: int
    """How many modules it fits."""
    identities: int
    """How many of these only hand on their input, and are left alone."""
    ran: int
    fired: int
    misfit: str
    closest: list[str]


class SurveyedTensor(TypedDict):
    """A tensor that goes into a module or comes out of it."""

    place: str
    dtype: str
    shape: list[int]


SurveyedModule = TypedDict(
    "SurveyedModule",
    {
        "model": str,
        "root": int,
        "name": str,
        "class": str,
        "calls": int,
        "input": list[SurveyedTensor],
        "output": list[SurveyedTensor],
        "taps": list[str],
        "is_identity": bool,
    },
)
"""What `graft taps` knows of a module: its model's class and number, and its first call."""


class ModelReport(TypedDict):
    """What the tables found in one process."""

    rows: list[RowReport]
    models: list[str]
    """The classes of the models that are tapped."""
    others: list[str]
    """The classes of roots in which nothing was found."""
    followed: list[str]
    """The classes of models of which rows are told apart."""
    unfollowed: list[str]
    """The classes of roots with no such model."""
    is_compiled: bool
    """Whether the compiler was there: what it compiled before taps were made has none."""


class Report(TypedDict, total=False):
    """What a rank's session says of itself; of what was not known, nothing is there."""

    session: str
    """`GRAFT_RECORD` or `GRAFT_REPLAY`."""
    rank: int
    world_size: int
    state: str
    reason: str
    selected: int
    refused: int
    repeats: int
    pid: int
    taps: ModelReport
    is_last: bool
    """Whether that is what it came to, and not what it was when a model was found."""
    modules: list[SurveyedModule]
    never: int
    """How many modules were never called."""
    names_seen: list[str]
    tags_seen: list[str]


def write_report(report: Report) -> None:
    """Leave a report for the wrapper, if there is one; never raises."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    path = Path(folder) / f"{uuid.uuid4().hex}.json"
    try:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(report))
        temporary.replace(path)
    except (OSError, TypeError, ValueError):
        pass  # the wrapper then judges by the recording or the log alone


def failures_of(reports: Iterable[Report]) -> set[str]:
    """Return why ranks failed or were refused, a line each."""
    return {
        f"rank {one.get('rank', '?')}: {one.get('reason')}"
        for one in reports
        if one.get("state") in ("refused", "failed")
    }


def why_nothing(filter: Filter | None, reports: Sequence[Report]) -> str:
    """Say why a filter selected none of the taps that ranks saw; "" where it saw none."""
    names = {name for one in reports for name in one.get("names_seen", ())}
    if filter is None or not names:
        return ""
    return filter.why_nothing({tag for one in reports for tag in one.get("tags_seen", ())}, names)


def read_reports(folder: Path) -> list[Report]:
    """Return the reports in a folder; what cannot be read is left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return found
