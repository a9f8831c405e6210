"""Is the method to be trusted here? The baseline replayed onto itself, in which no bit may change.

1. A replay with everything grafted, which also records what the job computed by itself.
2. Where something changed, a run without any graft tells whether the job differs from itself, or is
   changed by the grafts.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorder.commands.outcome import UNTRUSTED, recorded
from recorder.filters import Filter
from recorder.format.rows import parse_tags
from recorder.recording import Recording
from recorder.session import Recorder
from recorder.settings import RecordSettings
from recorder.sizes import count
from recorder.tags import is_recompute

from ..diffing.columns import DiffRow
from ..diffing.diff import diff
from ..log import WITHOUT_EFFECT
from ..settings import ReplaySettings
from ..trial import Target, replayed
from .floors import leave_mark
from .localize import at_least_once, settings_of
from .segments import Place

if TYPE_CHECKING:
    import polars as pl

CHANGED = 1
"""Exit status where a bit changed."""


@dataclass(frozen=True)
class Changed:
    """A tap whose own value was not the recorded one, on some rank.

    Attributes:
        place: which, in which step.
        ranks: on which.
        elements: how many changed, on the rank where most did.
        error: their relative error, None where there is none.
        repeats: in how many repeats.
    """

    place: Place
    ranks: tuple[int, ...]
    elements: int
    error: float | None
    repeats: int


@dataclass(frozen=True)
class Checked:
    """What a baseline replayed onto itself came to.

    Attributes:
        run: the baseline's folder.
        changed: what changed, in order of execution; empty where every bit is as recorded.
        taps: how many taps were grafted or compared, of all ranks.
        repeats: how often it was replayed.
        why: what the changes come from, a sentence; "" where there are none.
        out: the folder with the log and the recording of the first replay: a floor.
        command_status: the command's exit status.
        problems: why the result is not to be trusted, a line each.
        notes: what else to say, a line each.
    """

    run: Path
    changed: tuple[Changed, ...]
    taps: int
    repeats: int
    why: str
    out: Path | None
    command_status: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def status(self) -> int:
        """COMMAND's own where that is not 0; 3 where not trusted, 1 where a bit changed, else 0."""
        if self.command_status:
            return self.command_status
        if self.problems:
            return UNTRUSTED
        return CHANGED if self.changed else 0


def check(
    run: str | os.PathLike[str],
    target: Target,
    *,
    out: str | os.PathLike[str] | None = None,
    repeat: int = 1,
    **options: Any,
) -> Checked:
    """Replay a baseline onto itself, and say whether anything changed.

    Args:
        run: the baseline's recording.
        target: what made it: the words of a command, or a function of this process.
        out: a folder for the log and for what the job computed by itself, a floor for localize.
        repeat: how often to replay.
        **options: as of `graft replay`, by their names there.

    Raises:
        RecordingError: the recording cannot be read, or `out` holds a replay already.
        UsageError: an option cannot be used, or the command cannot be started.
    """
    at_least_once(repeat)
    recording = Recording.open(run)
    with tempfile.TemporaryDirectory(prefix="graft-") as spare:
        folder = Path(spare, "check") if out is None else Path(out)
        problems: list[str] = []
        notes: list[str] = []
        logs: list[pl.DataFrame] = []
        status = 0
        for number in range(repeat):
            into = folder if number == 0 else Path(spare, f"repeat-{number}")
            settings = settings_of({**options, "metrics": True, "record": Filter.parse("True")})
            done = replayed(recording, into, settings, target)
            wrong, summary = list(done.problems), done.summary
            status = status or done.command_status
            ran = done.world_size
            if done.log.height and ran != recording.world_size:
                wrong.append(
                    f"{run} was made by {count(recording.world_size, 'rank')}, and COMMAND ran "
                    f"{ran}; give the command that made it"
                )
            elif summary.outcomes.get("missing"):
                wrong.append(f"a tap has no record: {summary.first_missing}")
            elif summary.unused:
                wrong.append(
                    f"{count(summary.unused, 'record')} never used, such as "
                    f"{', '.join(summary.unused_names[:3])}; give the command that made it"
                )
            logs.append(done.log)
            problems += [one for one in wrong if one not in problems]
            notes += done.notes if number == 0 else []
        if out is not None:
            leave_mark(folder, recording)
        changed = _changed(logs)
        why = ""
        if changed and not status and not problems:
            first, is_always = changed[0], changed[0].repeats == repeat
            why = _why(
                recording, target, Path(spare, "plain"), folder if is_always else None, first,
                settings,
            )  # fmt: skip
    unkept = Counter(logs[0]["outcome"].to_list())[WITHOUT_EFFECT]
    if unkept:
        notes.append(
            f"{count(unkept, 'graft')} had no effect; behind such a tap errors are not cut off"
        )
    looked_at = logs[0].filter(logs[0]["outcome"].is_in(["grafted", WITHOUT_EFFECT, "compared"]))
    return Checked(
        Path(run),
        tuple(changed),
        looked_at.height,
        repeat,
        why,
        None if out is None else Path(out),
        status,
        tuple(problems),
        tuple(notes),
    )


def _changed(logs: Sequence[pl.DataFrame]) -> list[Changed]:
    """Return what changed in any repeat, in order of execution."""
    found: dict[Place, list[tuple[int, int, int, float | None]]] = {}
    for number, log in enumerate(logs):
        for row in log.sort("step", "seq", "rank").iter_rows(named=True):
            if is_recompute(parse_tags(row["tags"])):
                continue
            place = Place(row["name"], row["tags"], row["kind"], row["step"], row["occurrence"])
            if row["changed"]:
                elements = row["changed"] if row["numel"] is not None else 0  # a value has none
                found.setdefault(place, []).append((number, row["rank"], elements, row["error"]))
    return [
        Changed(
            place,
            tuple(sorted({rank for _, rank, _, _ in rows})),
            max(elements for _, _, elements, _ in rows),
            max((error for *_, error in rows if error is not None), default=None),
            len({number for number, *_ in rows}),
        )
        for place, rows in found.items()
    ]


def _why(
    recording: Recording,
    target: Target,
    folder: Path,
    own: Path | None,
    first: Changed,
    settings: ReplaySettings,
) -> str:
    """Say whether a run without grafts is the recorded one, or else the one of the replay.

    Args:
        recording: the baseline's.
        target: what made it.
        folder: for the run without grafts.
        own: where the replay left what it computed by itself; None where replays differ.
        first: what changed first.
        settings: how the replay matched.
    """
    if callable(target):
        with Recorder(folder, level="digests"):
            target()
    else:
        recorded(folder, RecordSettings(level="digests"), target)
    plain = Recording.open(folder)
    row = diff(
        recording, plain, manifest_only=True, match_on=settings.match_on,
        step_offset=settings.step_offset, rename=[one.text for one in settings.rename],
    ).first("bitwise")  # fmt: skip
    if row is None:
        return (
            "without grafts the job computes what was recorded, so grafting changes it: a tensor "
            "that it overwrites is used elsewhere too"
        )
    place, rank = _own_place(row), row["rank"]
    where = f"first at {place.label} step={place.step} on rank {rank}"
    # What comes before it is as recorded, so that a job that repeats itself repeats it there too.
    if own is not None and _content(plain, place, rank) == _content(
        Recording.open(own), place, rank
    ):
        return (
            f"the job repeats itself, but is not the one that was recorded: it differs {where}, "
            "alike with and without grafts; give the command, the seed, the data and the machine "
            "that made the recording"
        )
    also = " as well" if place == first.place else ""
    return (
        f"the job is not deterministic: without any graft it differs from its recording{also}, "
        f"{where}; seed it and make its kernels deterministic, or give what differs to localize as "
        "--floor"
    )


def _own_place(row: DiffRow) -> Place:
    """Return where a pair is in the job itself, as it names it."""
    step, occurrence = row["step_b"], row["occurrence_b"]
    return Place(
        row["name_b"] or row["name"],
        row["tags_b"] or row["tags"],
        row["kind"],
        row["step"] if step is None else step,
        row["occurrence"] if occurrence is None else occurrence,
    )


def _content(run: Recording, place: Place, rank: int | None) -> tuple[str | None, str | None]:
    """Return the digest of a tensor, or a value."""
    import polars as pl

    wanted = {**place._asdict(), "rank": rank}
    found = run.latest().filter(*(pl.col(name) == value for name, value in wanted.items()))
    return (found["digest"][0], found["value"][0]) if found.height else (None, None)
