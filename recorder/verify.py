"""Checks all of a recording.

1. `Checker.ranks` goes through the ranks; each part of the manifest is read by itself, so that a
   damaged one costs its own rows alone.
2. Of each payload the digest is checked: in several threads, since reading and hashing leave the
   interpreter to others, and in pieces of a few megabytes each.
3. What is wrong becomes a `Problem`: the rank, the file and, for a record, its key.
4. Statistics that are missing are filled in, since the bytes are read anyway: see `filling`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from .errors import DamagedRecording, MixedRecordings, RecordingError, UnsupportedVersion
from .filling import Filling, Gathered
from .format import disk
from .format.claims import ClaimData, attempt_files, check_claim, read_claim
from .format.members import LINKED, linked_folders, own_folders
from .format.parts import Part, Places, parts_of, read_part, shard_path
from .format.payload import parse_dtype
from .format.rows import parse_tags, rows_of, taps_of
from .format.schema import Description, ManifestRow, read_description
from .format.shard import Place, read_header
from .sizes import format_shape
from .tags import label

_PIECE = 4 << 20
_LISTINGS = 8  # of a folder that parts leave while they are checked


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        rank: whose files it is in.
        file: the file or folder, below the recording's.
        fact: what is wrong.
        key: of a damaged record its name, tags, step, occurrence and, if it is no tensor, kind.
    """

    rank: int
    file: str
    fact: str
    key: str = ""

    def __str__(self) -> str:
        key = f"{self.key}: " if self.key else ""
        return f"rank {self.rank}: {key}{self.fact} ({self.file})"


@dataclass
class Stored:
    """A record that nothing is wrong with.

    Attributes:
        row: its manifest row, with `attempt`.
        path: the file its payload is in, None where it has none.
        place: where in it.
    """

    row: ManifestRow
    path: Path | None = None
    place: Place | None = None


@dataclass
class RankReport:
    """What was found of one rank.

    Attributes:
        rank: the rank.
        records: rows of its manifest that could be read, of taps.
        ids: those that hold the ids of rows.
        damaged: how many of all these are damaged.
        nbytes: bytes of payload that were checked.
        problems: what is wrong.
        claims: what its attempts say of themselves, those that could be read.
        foreign: those of its attempts that are of another recording, rank or version.
        whole: the records that nothing is wrong with, where they were asked for.
        filled: how many records have got their statistics.
        unfilled: how many have none still, and `why` not.
    """

    rank: int
    records: int = 0
    ids: int = 0
    damaged: int = 0
    nbytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    claims: dict[int, ClaimData] = field(default_factory=dict)
    foreign: set[int] = field(default_factory=set)
    whole: list[Stored] = field(default_factory=list)
    filled: int = 0
    unfilled: int = 0
    why: str = ""


class Checker:
    """Checks a recording, rank by rank.

    Args:
        run: the recording's folder.
        keep: whether reports are to hold the records that are whole, for `repair`.

    Raises:
        NotARecording: the folder holds none.
        UnsupportedVersion: another version wrote it.
        DamagedRecording: `recording.json` does not hold what it should.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        keep: bool = False,
    ) -> None:
        self.path = Path(run)
        self.about = read_description(self.path)
        self._keep = keep
        self.progress: Callable[[int], None] = lambda nbytes: None
        """Called with the bytes checked since it was last called, from any thread."""

    @property
    def nbytes(self) -> int:
        """Bytes of the shards there are: about what there is to be checked."""
        return sum(
            path.lstat().st_blocks * 512
            for _, folder in own_folders(self.path)
            for path in folder.iterdir()
            if path.suffix in (".safetensors", ".partial")
        )

    def ranks(self) -> Iterator[RankReport]:
        """Check the ranks one after the other, and return a report of each."""
        with ThreadPoolExecutor(os.cpu_count() or 1, "graft-verify") as pool:
            for rank, folder in linked_folders(self.path):
                yield RankReport(rank, problems=[Problem(rank, folder.name, LINKED)])
            for rank, folder in own_folders(self.path):
                yield _RankCheck(self.path, rank, folder, self.about, self._keep).run(
                    pool, self.progress
                )


class _RankCheck:
    """The check of one rank."""

    def __init__(self, run: Path, rank: int, folder: Path, about: Description, keep: bool) -> None:
        self._run = run
        self._folder = folder
        self._about = about
        self._keep = keep
        self._report = RankReport(rank)
        self._headers: dict[str, Places | None] = {}
        self._filling = Filling(about, is_on=not keep)  # what is kept is recorded anew

    def run(self, pool: ThreadPoolExecutor, progress: Callable[[int], None]) -> RankReport:
        self._read_claims()
        rings = [claim for claim in self._report.claims.values() if claim.get("keep_last")]
        if any(claim.get("state") == "running" for claim in rings):
            self._check_live_ring(pool, progress)
            return self._report
        parts = self._try(
            self._folder, lambda: parts_of(self._report.rank, self._folder, is_ring=bool(rings))
        )
        if parts is None:  # a shard has lost its part of the manifest; the others are left
            parts = parts_of(self._report.rank, self._folder, is_ring=True)
        for part in parts:
            self._check_part(part, pool, progress)
        self._check_count()
        return self._report

    def _check_live_ring(self, pool: ThreadPoolExecutor, progress: Callable[[int], None]) -> None:
        """Check what a ring holds that is perhaps being written: a part that goes is none."""
        seen: set[tuple[int, int]] = set()
        for _ in range(_LISTINGS):
            parts = parts_of(self._report.rank, self._folder, is_ring=True)
            new = [part for part in parts if (part.attempt, part.index) not in seen]
            seen |= {(part.attempt, part.index) for part in new}
            report, gone = self._report, False
            for part in new:
                before = replace(report, problems=[*report.problems], whole=[*report.whole])
                self._check_part(part, pool, progress)
                sealed = replace(part, is_sealed=True)
                if not part.path.exists() and not sealed.path.exists():
                    vars(report).update(vars(before))
                    gone = True
            if not gone:
                return

    def _read_claims(self) -> None:
        for number, path in attempt_files(self._folder):
            claim = self._try(path, partial(read_claim, path, number))
            if claim is None:
                continue
            self._report.claims[number] = claim
            if claim.get("rank") != self._report.rank:
                self._report.foreign.add(number)
            self._try(path, partial(self._check_claim, path, claim, number))

    def _check_claim(self, path: Path, claim: ClaimData, number: int) -> None:
        try:
            check_claim(path, claim, self._report.rank, self._about)
        except (MixedRecordings, UnsupportedVersion):
            self._report.foreign.add(number)
            raise

    def _check_count(self) -> None:
        """Compare the rows that were found with what the attempts counted when they closed."""
        claims = self._report.claims.values()
        if not claims:
            self._problem(self._folder, "nothing in it says who recorded it")
            return
        if all(claim.get("state") in ("complete", "stopped") for claim in claims):
            expected = sum(n for claim in claims if type(n := claim.get("rows")) is int)
            got = self._report.records + self._report.ids
            if expected != got:
                fact = f"its manifest has {got} rows, expected {expected}"
                self._problem(self._folder, fact)

    def _check_part(
        self, part: Part, pool: ThreadPoolExecutor, progress: Callable[[int], None]
    ) -> None:
        read = self._try(part.path, lambda: read_part(part))
        if read is None:
            return
        frame, places = read
        taps = taps_of(frame).height
        self._report.records += taps
        self._report.ids += frame.height - taps
        payloads: dict[tuple[str, str], list[ManifestRow]] = {}
        for row in rows_of(frame):
            if row["shard"] is None:
                fact = _wrong_without_payload(row)
                self._settle(row, part.path, fact)
            else:
                payloads.setdefault((row["shard"], str(row["tensor"])), []).append(row)
        found = [
            self._find(part, shard, tensor, rows, places)
            for (shard, tensor), rows in payloads.items()
        ]

        def check(one: tuple[list[ManifestRow], Path, Place | None, str]) -> str:
            rows, path, place, fact = one
            if fact or place is None:
                return fact
            fact = self._wrong_payload(rows, path, place)
            progress(place.nbytes)
            return fact

        for (rows, path, place, _), fact in zip(found, pool.map(check, found), strict=True):
            self._report.nbytes += place.nbytes if place is not None else 0
            for row in rows:
                self._settle(row, path, fact or _wrong_row(row), place)
        report, filling = self._report, self._filling
        filling.write(part, report.claims.get(part.attempt, {}))
        report.filled, report.unfilled, report.why = filling.filled, filling.missing, filling.why
        self._check_own_shard(part, places)

    def _find(
        self, part: Part, shard: str, tensor: str, rows: list[ManifestRow], places: Places
    ) -> tuple[list[ManifestRow], Path, Place | None, str]:
        """Return rows with the path and place of the payload they share, or what is wrong."""
        try:
            path = shard_path(self._run, shard, self._report.rank)
        except DamagedRecording as err:
            return rows, part.path, None, err.fact
        place = places.get((shard, tensor))
        if place is not None:
            return rows, path if path.exists() else path.with_suffix(".partial"), place, ""
        header = self._header(path, shard)
        if header is None:
            return rows, path, None, "its shard cannot be read"
        place = header.get((shard, tensor))
        return rows, path, place, "" if place else f"its shard holds no tensor {tensor!r:.100}"

    def _header(self, path: Path, shard: str) -> Places | None:
        if shard not in self._headers:
            header = self._try(path, lambda: read_header(path))
            self._headers[shard] = header and {(shard, t): Place(*p) for t, p in header.items()}
        return self._headers[shard]

    def _check_own_shard(self, part: Part, places: Places) -> None:
        """Check the header of a part's shard even if no row has led to it."""
        path = part.path.with_suffix(".safetensors")
        if path.exists() and not places:
            self._header(path, f"{self._folder.name}/{path.name}")

    def _wrong_payload(self, rows: list[ManifestRow], path: Path, place: Place) -> str:
        """Return what is wrong with a payload, "" where nothing is; called from many threads."""
        if any(row["nbytes"] != place.nbytes for row in rows):
            return f"it has {place.nbytes} bytes, the manifest says {rows[0]['nbytes']}"
        filling = self._filling
        gathered = Gathered() if any(map(_wrong_row, rows)) else filling.begin(rows)
        try:
            hashed = xxhash.xxh3_128()
            for piece in pieces_of(path, place):
                hashed.update(piece)
                filling.add(gathered, piece)
        except FileNotFoundError:
            return "its shard is missing"
        except OSError as err:
            return str(err.strerror or err)
        if any(row["digest"] != hashed.hexdigest() for row in rows):
            return "its bytes do not have the digest that was recorded"
        filling.end(gathered, rows)
        return ""

    def _settle(self, row: ManifestRow, path: Path, fact: str, place: Place | None = None) -> None:
        if fact:
            self._report.damaged += 1
            self._problem(path, fact, _key(row))
        elif self._keep:
            self._report.whole.append(Stored(row, path if place else None, place))

    def _try(self, path: Path, read: Callable[[], Any]) -> Any:
        """Return what can be read; None, and a problem noted, where it cannot."""
        try:
            return read()
        except DamagedRecording as err:
            self._problem(Path(str(err.path)), err.fact)
        except FileNotFoundError:
            self._problem(path, "it is missing")
        except (RecordingError, OSError) as err:
            self._problem(path, str(err))
        return None

    def _problem(self, path: Path, fact: str, key: str = "") -> None:
        try:
            path = path.relative_to(self._run)
        except ValueError:
            path = Path(path.name)
        self._report.problems.append(Problem(self._report.rank, str(path), fact, key))


def pieces_of(path: Path, place: Place) -> Iterator[memoryview]:
    """Return a payload's bytes in pieces of a whole number of elements, each gone with the next.

    Raises:
        OSError: the file ends before, or cannot be read.
    """
    try:
        file = disk.open_regular(path)
    except FileNotFoundError:
        if path.suffix != ".partial":
            raise
        file = disk.open_regular(path.with_suffix(".safetensors"))  # sealed since it was looked for
    try:
        buffer = memoryview(bytearray(min(_PIECE, place.nbytes)))
        done = 0
        while done < place.nbytes:
            piece = buffer[: place.nbytes - done]
            filled = 0
            while filled < len(piece):
                got = os.preadv(file, [piece[filled:]], place.offset + done + filled)
                if got == 0:
                    at, end = place.offset + done + filled, place.offset + place.nbytes
                    raise OSError(0, f"its shard ends at byte {at}, it at {end}")
                filled += got
            yield piece
            done += filled
    finally:
        os.close(file)


def _wrong_without_payload(row: ManifestRow) -> str:
    if row["kind"] == "value":
        value = (row["value"] or "").encode()
        if xxhash.xxh3_128_hexdigest(value) != row["digest"]:
            return "its value does not have the digest that was recorded"
    return ""


def _wrong_row(row: ManifestRow) -> str:
    """Return what keeps a tensor from being made of a row's whole payload."""
    try:
        itemsize = parse_dtype(row["dtype"], "").itemsize
    except DamagedRecording as err:
        return err.fact
    numel = 1
    for n in row["shape"] or []:
        numel *= n if n is not None and n >= 0 else -1
    if numel < 0 or numel * itemsize != row["nbytes"]:
        shape = format_shape(row["shape"])
        return f"{row['nbytes']} bytes do not make a tensor of shape {shape} and {row['dtype']}"
    return ""


def _key(row: ManifestRow) -> str:
    kind = "" if row["kind"] == "tensor" else f" ({row['kind']})"
    try:
        parse_tags(row["tags"])
        what = label(row["name"], row["tags"])
    except DamagedRecording:
        what = str(row["name"])
    return f"{what} step={row['step']} occurrence={row['occurrence']}{kind}"
