"""What is known beforehand of how far clean segments are off: noise floors, and a truth.

A floor is what a check left in its folder, or a second recording of the baseline. The log of any
other replay is none: that of a faulty target would hide its very fault.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from recorder.errors import RecordingError
from recorder.format import disk
from recorder.format.schema import json_bytes
from recorder.recording import Recording

from ..diffing.diff import diff
from ..log import FOLDER, read_log
from ..settings import ReplaySettings
from .judging import Sharpened
from .segments import cuts_of

_CHECK = "check.json"


def leave_mark(folder: Path, recording: Recording) -> None:
    """Say in the folder of a check which recording was checked."""
    disk.replace(folder / _CHECK, json_bytes({"recording": recording.meta.get("id")}))


def sharpened_by(
    recording: Recording,
    floors: Sequence[str | os.PathLike[str]],
    truth: str | os.PathLike[str] | None,
    truth_factor: float,
    settings: ReplaySettings,
) -> tuple[Sharpened, bool]:
    """Return what floors and a truth say of clean segments, and whether a floor is a check's.

    Raises:
        RecordingError: one of them is neither a recording nor what a check left.
    """
    floor: dict[tuple[str, str, str], float] = {}
    was_checked = False
    for one in floors:
        if (Path(one) / FOLDER).is_dir():
            log = read_log(one)
            cuts = [cut for cut in cuts_of(log).cuts if cut.error is not None]
            if _checked_by(Path(one)) != recording.meta.get("id"):
                raise RecordingError(
                    f"{one} holds a replay, but no check of {recording.path}, so what differs "
                    "there may be the fault itself; make the floor with graft check"
                )
            was_checked = True
            errors = [(cut.place[:3], cut.error) for cut in cuts]
        else:
            errors = [(key[:3], error) for key, error in _differences(recording, one, settings)]
        for key, noise in errors:
            floor[key] = max(floor.get(key, 0.0), noise or 0.0)
    known: dict[tuple[str, str, str, int], float] = {}
    if truth is not None:
        for at, error in _differences(recording, truth, settings):
            known[at] = max(known.get(at, 0.0), error)
    return Sharpened(floor, known, truth_factor), was_checked


def _checked_by(folder: Path) -> object:
    """Return the id of the recording that was checked in a folder, "" where none was."""
    try:
        return json.loads((folder / _CHECK).read_text())["recording"]
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _differences(
    recording: Recording, other: str | os.PathLike[str], settings: ReplaySettings
) -> list[tuple[tuple[str, str, str, int], float]]:
    """Return how far another recording is from the baseline: name, tags, kind, step -> error."""
    table = diff(recording.path, other, match_on=settings.match_on).pairs
    kept = table.filter(table["error"].is_not_null())
    return [
        ((row["name"], row["tags"], row["kind"], row["step"]), float(row["error"]))
        for row in kept.iter_rows(named=True)
    ]
