"""Fills in the statistics that were not gathered as a recording was made.

`verify` reads all bytes anyway: a `Filling` takes in those of records without statistics, from many
threads, and writes a part's at once, where its rows are sealed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch

from .bits import has_statistics, plainly
from .errors import DamagedRecording
from .format import disk
from .format.claims import ClaimData
from .format.parts import Part
from .format.payload import parse_dtype
from .format.schema import COLUMNS, STATISTICS, Description, ManifestRow
from .format.tables import add_to_parquet
from .writing.statistics import Statistics, workspace

NOT_GATHERED = (
    "without statistics, which were not gathered in time; graft verify {run} fills them in"
)
_ENDED = ("complete", "stopped", "failed")

Gathered = dict[torch.dtype, Statistics]
"""Of one payload: as each of the dtypes that its bytes were tapped as."""


class Filling:
    """The statistics of a rank's records that have none.

    Args:
        about: what the recording says of itself.
        is_on: whether any are to be filled in.

    Attributes:
        filled: how many records have got theirs.
        missing: how many have none still.
        why: why not, "" where all have.
    """

    def __init__(self, about: Description, is_on: bool = True) -> None:
        self._is_on = is_on and _can_be_filled_in(about)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._found: list[dict[str, float | int | None]] = []
        self.filled = self.missing = 0
        self.why = ""

    def begin(self, rows: Sequence[ManifestRow]) -> Gathered:
        """Return what takes in the bytes of records that share a payload; empty where none does.

        Equal bytes may be of several dtypes.
        """
        found = {_summable(row) for row in rows if _has_none(row)} if self._is_on else set()
        dtypes = [dtype for dtype in found if dtype is not None]
        if dtypes and getattr(self._local, "wide", None) is None:
            self._local.wide = workspace()
        return {dtype: Statistics(dtype, self._local.wide) for dtype in dtypes}

    def add(self, gathered: Gathered, piece: memoryview) -> None:
        """Take in a piece of a payload, a whole number of elements of any dtype."""
        if not gathered:
            return
        with plainly():
            raw = torch.frombuffer(piece, dtype=torch.uint8)
            for statistics in gathered.values():
                statistics.add(raw)

    def end(self, gathered: Gathered, rows: Sequence[ManifestRow]) -> None:
        """Note the statistics of records whose payload is whole."""
        bare = [(row["seq"], _summable(row)) for row in rows if gathered and _has_none(row)]
        found = [
            {"seq": seq, **gathered[dtype].result()} for seq, dtype in bare if dtype is not None
        ]
        with self._lock:
            self._found += found

    def write(self, part: Part, claim: ClaimData) -> None:
        """Write what was found of a part's records; what cannot be is counted."""
        found, self._found = self._found, []
        if not found:
            return
        why = "" if claim.get("state") in _ENDED else "it is perhaps still being recorded"
        if not why and not part.is_sealed:
            why = "the job was killed, and they have no place in what is left of it"
        if not why:
            try:
                access = disk.access_of(part.folder)
                add_to_parquet(part.path, found, COLUMNS, STATISTICS, access, durable=True)
            except (OSError, DamagedRecording) as err:
                why = (isinstance(err, OSError) and err.strerror) or str(err)
        if why:
            self.missing += len(found)
            self.why = self.why or why
        else:
            self.filled += len(found)


def lacking(about: Description, claims: Iterable[ClaimData], rows: Iterable[ManifestRow]) -> int:
    """Return how many of some records have no statistics, and none to come, that `verify` fills in.

    Args:
        about: what the recording says of itself.
        claims: what each attempt of each rank says of itself.
        rows: the records.
    """
    if not _can_be_filled_in(about):
        return 0
    ended = {
        (claim.get("rank"), claim.get("attempt"))
        for claim in claims
        if claim.get("state") in _ENDED
    }
    bare = (row for row in rows if (row["rank"], row["attempt"]) in ended and _has_none(row))
    return sum(_summable(row) is not None for row in bare)


def _can_be_filled_in(about: Description) -> bool:
    """Whether statistics were asked for, and there is something to gather them from."""
    level: str = about.get("options", {}).get("level", "tensors")
    return level == "tensors"


def _summable(row: ManifestRow) -> torch.dtype | None:
    """Return the dtype of a record's elements where they have statistics."""
    try:
        dtype = parse_dtype(row["dtype"], "")
    except DamagedRecording:
        return None
    return dtype if has_statistics(dtype) else None


def _has_none(row: ManifestRow) -> bool:
    """Whether a record is without statistics; all that have any have this one."""
    return row["nan_count"] is None
