"""What a rank tells the wrapper that started it, beyond what the recording itself says.

`graft record` and `graft replay` make a folder, name it in `GRAFT_REPORTS`, and read it when the
command has ended. A rank under no wrapper reports to nobody.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

VARIABLE = "GRAFT_REPORTS"


def write_report(report: dict[str, Any]) -> None:
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


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """Return the reports in a folder; what cannot be read is left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return found
