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
