"""Make a recording of what sglang's dumper has written, one file after the other.

1. `dumps_in` says which files there are, and in which order each rank wrote them.
2. `_Rank.import_all`, of a recorder for each rank, takes one file's tensor at a time as if it were
   tapped now.
3. `_of_gradient` finds what a gradient is of: its file says less of it than that of the value does.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dumps import Dump, Dumps, NoDump, Place, Skipped, dumps_in, read, size_of
from .errors import RecordingError, RecordingExists
from .format import disk
from .format.claims import is_live
from .format.disk import PRIVATE
from .format.schema import RECORDING
from .progress import Progress
from .session import Recorder
from .sizes import count
from .taps.call import Call
from .taps.dumped import dims_of, dims_of_gradient, tags_of
from .taps.gradients import Callback, GradientTaps
from .taps.values import classify
from .writing.claim import replace_recording

_APART = (
    "{gradients} could be of several dumps, and {are} recorded with the tags of {their} own file, "
    "which the dumper writes without those of its context; the first: {first}"
)
_IN_ORDER = (
    "{gradients} could be of several dumps of the same tags, and {are} recorded as that of the "
    "first that has none yet; the first: {first}"
)


@dataclass(frozen=True)
class Imported:
    """What an import came to.

    Attributes:
        records: how many dumps are in the recording.
        ranks: of how many ranks.
        nbytes: the bytes of tensors that were written.
        skipped: the files that are left out.
        problems: what else keeps the recording from being trusted.
        notes: what else to know of it, a line each.
    """

    records: int
    ranks: int
    nbytes: int
    skipped: tuple[Skipped, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def import_dumps(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    seen: Callable[[int], None] = lambda nbytes: None,
) -> Imported:
    """Make a recording of the dumps in a folder; one file at a time is in memory.

    Args:
        folder: what the dumper wrote into.
        out: the recording's folder; made if need be.
        overwrite: replace a recording that is there.
        seen: called with the size of each file, as it is looked at and as it is read.

    Raises:
        RecordingError: there are no dumps, those of several jobs, or `out` cannot be written.
        RecordingExists: `out` holds something.
    """
    source, run = Path(folder), Path(os.path.abspath(out))
    _check_free(run, overwrite)
    found = dumps_in(source, seen)
    try:
        if overwrite and (run / RECORDING).exists():
            replace_recording(run)
        disk.make_folder(run, PRIVATE)
    except OSError as err:
        raise RecordingError(
            f"{run} cannot be written: {err.strerror or err}; choose a folder you may write to"
        ) from err
    renamed: set[str] = set()
    apart: list[str] = []
    in_order: list[str] = []
    skipped, problems = list(found.skipped), []
    ranks = records = nbytes = 0
    for rank, places in itertools.groupby(found.places, key=lambda place: place.rank):
        recorder = _Rank(run, rank, found)
        recorder.start()
        ranks += 1
        try:
            recorder.import_all(places, source, seen)
        finally:
            recorder.close()
        skipped += recorder.skipped
        records += recorder.records
        nbytes += recorder.nbytes
        renamed |= recorder.renamed
        apart += recorder.apart
        in_order += recorder.in_order
        if recorder.state != "complete":
            problems.append(f"rank {rank}: {recorder.reason}")
    missing = found.world_size - ranks
    notes = [f"{count(missing, 'rank')} of {found.world_size} dumped nothing"] if missing else []
    notes += [
        f"the tag {tag!r} has a meaning of its own; it is recorded as {tag}_"
        for tag in sorted(renamed)
    ]
    for text, paths in ((_APART, apart), (_IN_ORDER, in_order)):
        if paths:
            notes.append(_told(text, paths))
    return Imported(records, ranks, nbytes, tuple(skipped), tuple(problems), tuple(notes))


def _told(text: str, paths: list[str]) -> str:
    is_one = len(paths) == 1
    return text.format(
        gradients=count(len(paths), "gradient"),
        are="is" if is_one else "are",
        their="its" if is_one else "their",
        first=paths[0],
    )


def _check_free(run: Path, overwrite: bool) -> None:
    if run.exists() and not run.is_dir():
        raise RecordingError(f"{run} is a file; name a folder to record into")
    if (run / RECORDING).exists():
        if is_live(run):
            raise RecordingExists(run, "is being recorded into", "choose another folder")
        if not overwrite:
            raise RecordingExists(run, "holds a recording already")
    elif run.exists() and any(run.iterdir()):
        raise RecordingExists(run, "is not empty, and no recording", "choose another folder")


class _Filed(Call):
    """A dump as a tap; what takes its gradient is kept until that is read.

    Attributes:
        step: as the dump says.
        index: its place in the order of dumps.
        own: its tags, each as text.
        parts: how many parts of its gradient there were.
        arrived: takes one; None before it is asked for, and where it cannot come.
    """

    __slots__ = ("arrived", "index", "own", "parts")

    def __init__(self, dump: Dump, path: str, tags: Mapping[str, Any], *, grad: bool) -> None:
        is_value = not dump.is_gradient
        dims = dims_of(dump.facts) if is_value else dims_of_gradient(dump.facts)
        about = (dump.name, *tags, *tags.values(), *map(type, tags.values()))
        super().__init__(dump.name, dump.value, dims, None, grad, tags, about, path, is_value)
        self.step = dump.step
        self.index = dump.index
        self.own = _texts(tags)
        self.parts = 0
        self.arrived: Callback | None = None

    def hear_gradient(
        self, taps: GradientTaps, arrived: Callback, tell: Callable[[str], None]
    ) -> None:
        """Keep what the gradient is given to."""
        self.arrived = arrived


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    return {tag: repr(value) for tag, value in tags.items()}


class _Rank(Recorder):
    """Records what one rank dumped, as if it were tapped now.

    Attributes:
        records: how many dumps were recorded.
        skipped: the files that were not.
        apart: those of gradients that stand for themselves, since what they are of is not known.
        in_order: those of gradients that were given to the first that may have it.
        renamed: tags that are called otherwise in a recording.
    """

    def __init__(self, run: Path, rank: int, found: Dumps) -> None:
        super().__init__(run, rank=rank, world_size=found.world_size)
        self.records = 0
        self.skipped: list[Skipped] = []
        self.apart: list[str] = []
        self.in_order: list[str] = []
        self.renamed: set[str] = set()
        self._gradients_of = found.gradients
        self._waiting: dict[tuple[int, str], list[_Filed]] = {}
        self._known = 0
        self._why = ""

    @property
    def nbytes(self) -> int:
        """The bytes of tensors that were written."""
        return self._writer.bytes_written if self._writer else 0

    def import_all(
        self, places: Iterable[Place], folder: Path, seen: Callable[[int], None]
    ) -> None:
        """Record the dumps of some files, in order."""
        is_first = True
        for place in places:
            try:
                dump = read(place.path, folder)
            except NoDump as err:  # it has changed since it was looked at
                self.skipped.append(Skipped(place.path, str(err)))
                continue
            if is_first:
                self._standing.fix(dump.mesh)
                is_first = False
            self._import(dump, place.path)
            seen(size_of(folder / place.path))
            if self.state != "running":  # it has said why
                return

    def _import(self, dump: Dump, path: str) -> None:
        self._known, self._why = self._left_out, ""
        kind = classify(dump.value)
        if kind not in ("tensor", "value"):
            can = "only tensors, numbers, strings and flat lists of these can be recorded"
            self.skipped.append(Skipped(path, f"{kind}; {can}"))
            return
        tags, renamed = tags_of(dump.tags)
        self.renamed.update(renamed)
        if dump.is_gradient:
            self._import_gradient(dump, path, tags)
        else:
            where = dump.step, dump.name
            has_gradient = (self.rank, *where) in self._gradients_of
            call = _Filed(dump, path, tags, grad=has_gradient)
            self._offer(call)
            if has_gradient:
                self._waiting.setdefault(where, []).append(call)
        if self._left_out > self._known:
            self.skipped.append(Skipped(path, self._why))
        elif self.state == "running":
            self.records += 1

    def _offer(self, call: _Filed) -> None:
        try:
            self.on_tap(call)
        finally:
            call.forget()

    def _import_gradient(self, dump: Dump, path: str, tags: Mapping[str, Any]) -> None:
        found, sure = self._of_gradient(dump, tags)
        if found is None:
            if not sure:
                self.apart.append(path)
            found = _Filed(dump, path, tags, grad=True)
            self._offer(found)
        elif not sure:
            self.in_order.append(path)
        if found.arrived is not None:
            found.arrived(dump.value, found.parts)
            found.parts += 1

    def _of_gradient(self, dump: Dump, tags: Mapping[str, Any]) -> tuple[_Filed | None, bool]:
        """Return what a gradient is of, None where that is not known, and whether that is sure."""
        own = _texts(tags)
        able = [
            one
            for one in self._waiting.get((dump.step, dump.name), ())
            if one.arrived is not None and own.items() <= one.own.items()
        ]
        # The gradient of a parameter is dumped right after it.
        beside = [one for one in able if one.index == dump.index - 1]
        without = [one for one in able if not one.parts]
        for only in (beside, able, without):
            if len(only) == 1:
                return only[0], True
        if not able:
            return None, True
        if len({tuple(sorted(one.own.items())) for one in able}) > 1:
            return None, False
        return (without or able)[0], False

    @property
    def _left_out(self) -> int:
        return self._skipped + self._selection.refused

    def _tell_full(self, progress: Progress) -> None:
        """Say nothing: no job waits for the disk."""

    def _once(self, about: tuple[str, ...], message: str) -> None:
        """Keep why something is left out, which is told of each file; say all else, once."""
        if self._left_out > self._known:
            self._why = message
        else:
            super()._once(about, message)
