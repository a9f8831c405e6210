"""What is known beforehand of how far clean segments are off: noise floors, and a truth.

A floor is what a check left in its folder, or a second recording of the baseline. The log of any
other replay is none: that of a faulty target would hide its very fault.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Sequence
from pathlib import Path

from recorder.errors import RecordingError
from recorder.format import disk
from recorder.format.rows import parse_tags
from recorder.format.schema import json_bytes
from recorder.recording import Recording

from ..diffing.diff import diff
from ..log import FOLDER, read_log
from ..match import MatchOn
from ..only import Tap
from ..rename import Rename, oriented_to, renamed
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
    floor: dict[Hashable, float] = {}
    was_checked = False
    for one in floors:
        if (Path(one) / FOLDER).is_dir():
            if _checked_by(Path(one)) != recording.meta.get("id"):
                raise RecordingError(
                    f"{one} holds a replay, but no check of {recording.path}, so what differs "
                    "there may be the fault itself; make the floor with graft check"
                )
            was_checked = True
            errors = [(cut.place.tap, cut.error) for cut in cuts_of(read_log(one)).cuts]
        else:
            differences = _differences(recording, one, settings)
            errors = [(tap, error) for (tap, _step), error in differences]
        for tap, error in errors:
            counted = _counts(tap, settings)
            floor[counted] = max(floor.get(counted, 0.0), error)
    known: dict[tuple[Hashable, int], float] = {}
    if truth is not None:
        for (tap, step), error in _differences(recording, truth, settings):
            at = _counts(tap, settings), step
            known[at] = max(known.get(at, 0.0), error)
    renames = oriented_to(settings.rename, recording.latest()["name"].unique())

    def counts(tap: Tap) -> Hashable:
        return _counts(tap, settings, renames)

    return Sharpened(floor, known, truth_factor, counts, settings.step_offset), was_checked


def _counts(
    tap: Tap, settings: ReplaySettings, renames: Sequence[Rename] | None = None
) -> Hashable:
    """Return what counts of a tap for a match: of the baseline's, or with renames of a target's."""
    match_on, tags = MatchOn.parse(settings.match_on), parse_tags(tap.tags)
    if match_on.order:
        return tap  # only its position would tell
    if renames is None:
        return tap.kind, match_on.group(tap.name, tags)
    return tap.kind, match_on.group_of_target(*renamed(renames, tap.name, tags))


def _checked_by(folder: Path) -> object:
    """Return the id of the recording that was checked in a folder, "" where none was."""
    try:
        return json.loads((folder / _CHECK).read_text())["recording"]
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _differences(
    recording: Recording, other: str | os.PathLike[str], settings: ReplaySettings
) -> list[tuple[tuple[Tap, int], float]]:
    """Return how far another recording is from the baseline: tap and step, and the error.

    Raises:
        RecordingError: they have no tap in common.
    """
    # The other is of the baseline too, and calls its taps and tags as that does.
    match_on = MatchOn.parse(settings.match_on)
    text = ",".join(match_on.tags or ()) if match_on.renamed else settings.match_on
    found = diff(recording.path, other, match_on=text)
    if not found.compared:
        raise RecordingError(
            f"{other} has none of the taps of {recording.path}, so it tells nothing of them; give "
            "one that was made of the same model"
        )
    table = found.pairs
    kept = table.filter(table["error"].is_not_null())
    return [
        ((Tap(row["name"], row["tags"], row["kind"]), row["step"]), float(row["error"]))
        for row in kept.iter_rows(named=True)
    ]
