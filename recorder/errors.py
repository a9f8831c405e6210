"""The exceptions of tensorgraft; each words itself and says what to do next.

GraftError                     every expected failure; the command line prints it and exits with 2
+-- UsageError                 an option or argument that cannot be used
|   +-- FilterError            a filter that cannot be read or evaluated, with its place
+-- RecordingError             a recording that cannot be opened, read or begun
|   +-- NotARecording          the folder holds no recording
|   +-- RecordingExists        the folder, or this rank's place in it, is taken
|   +-- UnsupportedVersion     written by a format this version does not read
|   +-- DamagedRecording       a file does not hold what it should
|   +-- MixedRecordings        a folder of another recording has got in
|   +-- NoSuchRecord           no record under that key; carries the nearest ones
|   +-- LimitReached           a payload would exceed what may be written; ends a recording well
+-- CaptureError               a value that cannot be recorded faithfully
|   +-- BadTag                 a name or tag that cannot be part of a key
+-- LayoutError                a layout that cannot be read, or two that contradict each other
|   +-- BadRows                ids of rows that cannot be used, or do not fit
|   +-- BlocksMissing          blocks that are needed were not recorded
|   +-- ReplicasDiffer         ranks that should hold the same block do not
|   +-- ShapesDiffer           two whole tensors that are to be compared have unequal shapes
+-- ReplayError                a tap that could not be grafted
    +-- MissingRecord          nothing recorded matches the tap
    +-- TransformError         the transform failed or cannot be loaded
    +-- GraftRefused           the copy would not be faithful
    +-- Interrupted            a search by trials was stopped in one of them
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from string import Template

_LIBRARIES = frozenset(
    {"recorder", "replayer", "torch", "polars", "xxhash", "numpy", "safetensors"}
    | {"transformers", "vllm", "sglang"}  # asked what a call is of
)


class GraftError(Exception):
    """Base of every expected failure."""


class UsageError(GraftError):
    """An option or argument that cannot be used."""


class FilterError(UsageError):
    """A filter that cannot be read or evaluated.

    Attributes:
        text: the filter as typed.
        reason: one fact, without the filter's text.
        column: 0-based offset of the place in `text`.
        width: how many characters the place covers, at least 1.
        what: what the text is.
    """

    def __init__(
        self, text: str, reason: str, column: int = 0, width: int = 1, what: str = "filter"
    ) -> None:
        self.text = text
        self.reason = reason
        self.column = max(0, min(column, len(text)))
        self.width = max(1, min(width, len(text) - self.column))
        self.what = what
        super().__init__(text, reason, column, width, what)

    def __str__(self) -> str:
        marker = " " * self.column + "^" * self.width
        return f"{self.what} cannot be used: {self.reason}\n  {self.text}\n  {marker}"

    def of(self, what: str) -> FilterError:
        """Return the same error of a text that is something else."""
        return FilterError(self.text, self.reason, self.column, self.width, what)


class RecordingError(GraftError):
    """A recording that cannot be opened, read or begun."""


class NotARecording(RecordingError):
    """The folder holds no recording."""

    def __init__(self, path: object, holds: Sequence[str] = (), beside: Sequence[str] = ()) -> None:
        self.path, self.near = path, (*holds, *beside)
        advice = "make one with: graft record -o RUN -- COMMAND"
        if self.near:
            some = ", ".join(self.near[:8]) + (", ..." if len(self.near) > 8 else "")
            advice = f"{'it holds' if holds else 'beside it there are'} these: {some}"
        super().__init__(f"{path} is not a recording: it has no recording.json; {advice}")


class RecordingExists(RecordingError):
    """The folder, or this rank's place in it, is taken."""

    def __init__(
        self,
        path: object,
        what: str,
        advice: str = "choose another folder, or replace it with --overwrite",
    ) -> None:
        self.path = path
        super().__init__(f"{path} {what}; {advice}")


class UnsupportedVersion(RecordingError):
    """Written by a format that this version does not read."""

    def __init__(self, path: object, got: object, expected: Iterable[float]) -> None:
        self.path = path
        super().__init__(
            f"{path} has format version {got!r}, expected {' or '.join(map(str, expected))}; "
            "read it with the version of tensorgraft that wrote it, or record again"
        )


class DamagedRecording(RecordingError):
    """A file of a recording does not hold what it should."""

    def __init__(self, path: object, fact: str) -> None:
        self.path, self.fact = path, fact
        super().__init__(
            f"{path} is damaged: {fact}; restore it from a copy, or keep what is whole with: "
            "graft verify RUN --repair OUT"
        )


class MixedRecordings(RecordingError):
    """A rank's folder is part of another recording."""

    def __init__(self, path: object, got: object, expected: object) -> None:
        self.path, self.got, self.expected = path, got, expected
        super().__init__(
            f"{path} is part of another recording (got {got!r}, expected {expected!r}): two "
            "recordings are mixed up here; bring together folders of one job only, and give its "
            "machines one GRAFT_JOB if they record into folders of their own"
        )


class NoSuchRecord(RecordingError):
    """No record under the key that was asked for.

    Attributes:
        nearest: the closest recorded keys, best first, each with what differs.
    """

    def __init__(self, asked: str, nearest: Sequence[str]) -> None:
        self.asked, self.nearest = asked, tuple(nearest)
        tail = f"; nearest: {'; '.join(nearest)}" if nearest else "; graft ls RUN lists what is"
        super().__init__(f"nothing recorded under {asked}{tail}")


class LimitReached(RecordingError):
    """A payload would exceed what may be written; the text says what."""


class CaptureError(GraftError):
    """A value that cannot be recorded faithfully."""


class BadTag(CaptureError):
    """A name or tag that cannot be part of a key; the text is one fact."""


class LayoutError(GraftError):
    """A layout that cannot be read, or two that contradict each other.

    Attributes:
        fact: what is wrong; `$senders`, `$sender`, `$rank` and `$receiver` in it stand for the
            sides, which not everybody calls that.
        advice: what to do about it at the taps, "" where the fact says enough. Whoever knows of
            more, such as an option, adds that.
    """

    def __init__(self, fact: str, advice: str = "") -> None:
        self.fact, self.advice = fact, advice
        super().__init__(fact, advice)

    def __str__(self) -> str:
        text = f"{self.fact}; {self.advice}" if self.advice else self.fact
        return Template(text).safe_substitute(_SIDES)

    def of(self, where: str, sides: Mapping[str, str] | None = None) -> LayoutError:
        """Return the same error said of some place, where the sides may have other names."""
        fact, advice = (
            Template(text).safe_substitute(sides or {}) for text in (self.fact, self.advice)
        )
        return type(self)(f"{where}: {fact}" if where else fact, advice)


_SIDES = {
    "senders": "the senders",
    "sender": "sender",
    "rank": "sender rank",
    "receiver": "the target",
}


class BadRows(LayoutError):
    """Ids of rows that cannot be used, or do not fit a tensor or the other side's."""


class BlocksMissing(LayoutError):
    """Blocks of a tensor that are needed were not recorded."""

    def __init__(self, fact: str, advice: str = "record all ranks") -> None:
        super().__init__(fact, advice)


class ReplicasDiffer(LayoutError):
    """Ranks that should hold the same block do not."""


class ShapesDiffer(LayoutError):
    """Two whole tensors that are to be compared have unequal shapes."""


class ReplayError(GraftError):
    """A tap that could not be grafted."""


class MissingRecord(ReplayError):
    """Nothing recorded matches the tap.

    Attributes:
        rows: how many rows of it were looked for one by one; None where none were.
        dtype: of the tensor that was tapped; None where nobody said.
        shape: likewise.
    """

    def __init__(self, reason: str, rows: int | None = None) -> None:
        self.rows = rows
        self.dtype: str | None = None
        self.shape: list[int] | None = None
        super().__init__(reason)


class TransformError(ReplayError):
    """The transform failed, returned something unusable, or cannot be loaded."""


class GraftRefused(ReplayError):
    """The copy would not be faithful."""


class Interrupted(ReplayError):
    """A search by trials was stopped; `status` is that of the command which was running."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


def is_from_the_job(err: Exception) -> bool:
    """Whether an exception was raised by the job's code: a signal's handler, such as a deadline's.

    What the job's callables raise in our hands is not asked about.
    """
    trace = err.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    module = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return module not in _LIBRARIES and module not in sys.stdlib_module_names
