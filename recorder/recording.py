"""Open a recording, finished or still being written, and read from it.

1. `Recording.open` checks the version and lists the ranks.
2. `rows` reads the manifest: the parquet part of each finished shard, the journal of the open one.
3. `load` finds a key, from the third on through the `Index`; `read` brings its bytes back, digest
   checked.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import DamagedRecording, NoSuchRecord, UsageError
from .format.claims import ClaimData, checked_meshes
from .format.ids import HeldIds
from .format.index import Group, Index, nearest, searched, whole_key
from .format.members import (
    Incomplete,
    incomplete,
    latest_attempts,
    rank_folders,
    read_claims,
)
from .format.parts import Part, parts_of, read_part, read_sealed, shard_path
from .format.rows import row_at, tag_columns, taps_of
from .format.schema import (
    COLUMNS,
    Description,
    ManifestRow,
    polars_schema,
    rank_folder,
    read_description,
)
from .format.shard import Extent, Place, read_header
from .mesh import FrozenMesh
from .tags import canonical, clean, label

if TYPE_CHECKING:
    import polars as pl
    import torch

    from .format.payload import Files
    from .tokens.taken import Taken

T = TypeVar("T")
_HEADERS_KEPT = 256
_TRIES = 20
_SEARCHED = 2  # keys, before an index is made: it takes as long as many searches


class Recording:
    """A recording on disk, for reading.

    What is read is what had been completed when it was first asked for; open it again to see more.
    Several threads may `read` at once.

    Attributes:
        path: its folder.
        meta: what `recording.json` says: format version, world size, command, provenance, options.
    """

    def __init__(self, path: Path, meta: Description) -> None:
        self.path = path
        self.meta = meta
        self._rows: pl.DataFrame | None = None
        self._claims: list[ClaimData] = []
        self._places: dict[tuple[str, str], Place] = {}
        self._headers: dict[str, dict[str, Extent]] = {}
        self._frames: dict[int | None, pl.DataFrame] = {}
        self._indices: dict[int | None, Index] = {}
        self._looked_up = 0
        self._files: Files | None = None
        self._lock = threading.Lock()
        self._paths: dict[tuple[str, int], Path] = {}
        self._held = HeldIds(self)
        self._checked: set[tuple[str, str, str]] = set()
        self._meshes: dict[tuple[int, int], list[tuple[int, FrozenMesh | None]]] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Recording:
        """Open the recording in a folder.

        Raises:
            NotARecording: the folder holds none.
            UnsupportedVersion: another version wrote it.
            DamagedRecording: `recording.json` or a claim does not hold what it should.
            MixedRecordings: a rank's folder is part of another recording.
        """
        folder = Path(path)
        found = cls(folder, read_description(folder))
        found.claims()
        return found

    def __repr__(self) -> str:
        return f"Recording({str(self.path)!r}, {self.world_size} ranks)"

    @property
    def world_size(self) -> int:
        """The number of ranks of the job that was recorded."""
        return int(self.meta["world_size"])

    @property
    def ranks(self) -> list[int]:
        """The ranks that recorded something, sorted."""
        return sorted({claim["rank"] for claim in self.claims()})

    def claims(self) -> list[ClaimData]:
        """Return what each attempt of each rank says of itself: state, reason, host, times."""
        return read_claims(self.path, self.meta)

    def incomplete(self) -> list[Incomplete]:
        """Return the ranks whose records end early, each with the first step it lacks, and why."""
        import polars as pl

        rows = self.latest()
        ends = rows.group_by("rank").agg(pl.max("step")).iter_rows()
        return incomplete(self.world_size, self._claims, dict(ends))

    def rows(self, attempt: int | None = None) -> pl.DataFrame:
        """Return the manifest's columns and `attempt`, a row a record, by rank and seq.

        Args:
            attempt: of every rank this attempt only; by default all of them.

        Raises:
            DamagedRecording: a part of the manifest does not hold what it should.
        """
        if self._rows is None:
            self._rows = self._read_all_rows()
        if attempt is None:
            return self._rows
        return self._rows.filter(self._rows["attempt"] == attempt)

    def latest(self) -> pl.DataFrame:
        """Return the rows of the job's latest attempt, without those that hold the ids of rows.

        A rank that recorded nothing in its latest attempt has none, whatever earlier ones hold; nor
        has one that had not begun when others had, after a restart.
        """
        return self._of_latest(taps_of(self.rows()))

    def _of_latest(self, rows: pl.DataFrame) -> pl.DataFrame:
        import polars as pl

        if not any(claim["attempt"] for claim in self._claims):
            return rows
        kept = pl.DataFrame(
            list(latest_attempts(self._claims, self.world_size).items()),
            schema={"rank": pl.Int32, "attempt": pl.Int32},
            orient="row",
        )
        return rows.join(kept, on=["rank", "attempt"], how="semi", maintain_order="left")

    def manifest(self, attempt: int | None = None) -> pl.DataFrame:
        """Return the manifest with one more column per tag, beside the name, and `attempt`.

        A tag with the name of a manifest column gets `tag.` before it. A tag whose values are of
        several types becomes text, as JSON.

        Args:
            attempt: of every rank this attempt only; by default all of them.
        """
        rows = self.rows(attempt)
        tags = tag_columns(rows)
        first = rows.columns.index("name") + 1
        order = [*rows.columns[:first], *tags.columns, *rows.columns[first:]]
        return rows.hstack(tags).select(order)

    def load(
        self,
        rank: int,
        name: str,
        step: int = 0,
        occurrence: int = 0,
        *,
        kind: str = "tensor",
        attempt: int | None = None,
        **tags: Any,
    ) -> torch.Tensor:
        """Return a recorded tensor, on the CPU and the caller's own.

        Args:
            rank: the rank that recorded it.
            name: the tap's name.
            step: the iteration, from 0.
            occurrence: how often the same tags were tapped before it in that step.
            kind: `tensor`, or `grad` for its gradient.
            attempt: which attempt of a restarted job; by default each rank's latest.
            **tags: every other tag of the tap.

        Raises:
            NoSuchRecord: nothing is recorded under this key; names the nearest.
            DamagedRecording: the bytes are not there, or not those that were written.
        """
        row = self.find(rank, name, step, occurrence, kind=kind, attempt=attempt, **tags)
        return self.read(row)

    def find(
        self,
        rank: int,
        name: str,
        step: int = 0,
        occurrence: int = 0,
        *,
        kind: str = "tensor",
        attempt: int | None = None,
        **tags: Any,
    ) -> ManifestRow:
        """Return the manifest row of a key, for `read`; arguments as for `load`.

        Raises:
            NoSuchRecord: nothing is recorded under this key; names the nearest.
        """
        group = self._group(name, tags)
        known = self._searched(attempt, kind, group, step, occurrence)
        if rank in known:
            return row_at(self._frame(attempt), known[rank])
        frame, index = self._index(attempt)
        number = index.find_on(rank, kind, group, step, occurrence)
        if number is not None:
            return row_at(frame, number)
        asked = f"{label(name, canonical(tags))} step={step} occurrence={occurrence} on rank {rank}"
        elsewhere = index.find(kind, group, step, occurrence)
        if elsewhere:
            ranks = ", ".join(map(str, sorted(elsewhere)))
            raise NoSuchRecord(asked, [f"the same key on rank {ranks}"])
        close = nearest(index, kind, group, step, occurrence)
        raise NoSuchRecord(asked, [one.text for one in close])

    def meshes(self, rank: int, attempt: int) -> list[tuple[int, FrozenMesh | None]]:
        """Return where a rank stood, in order, each with the seq of the first tap there."""
        if self._meshes is None:
            self._meshes = {
                (claim["rank"], claim["attempt"]): checked_meshes(claim.get("meshes", [])) or []
                for claim in self._claims or self.claims()
            }
        return self._meshes.get((rank, attempt), [])

    def mesh_of(self, row: ManifestRow) -> FrozenMesh | None:
        """Return where the rank of a manifest row stood, sorted by axis; None where nobody said."""
        meshes = self.meshes(row["rank"], row["attempt"])
        at = bisect_right(meshes, row["seq"], key=lambda entry: entry[0])
        return meshes[at - 1][1] if at else None

    def load_logical(
        self,
        name: str,
        step: int = 0,
        occurrence: int = 0,
        *,
        kind: str = "tensor",
        attempt: int | None = None,
        at: Mapping[str, int] | None = None,
        replicas: str = "error",
        **tags: Any,
    ) -> torch.Tensor:
        """Return the whole tensor that the ranks' blocks are parts of, as their `dims` say.

        Args:
            name: the tap's name.
            step: the iteration, from 0.
            occurrence: how often the same tags were tapped before it in that step.
            kind: `tensor`, or `grad` for its gradient.
            attempt: which attempt of a restarted job; by default each rank's latest.
            at: axis -> coordinate: take only ranks that stand there, as `{"dp": 0}`.
            replicas: where ranks that should hold the same block do not: an `error`, take the
                `first`, the `last`, or their `mean`.
            **tags: every other tag of the tap.

        Returns:
            The tensor, on the CPU, its dims in the order of the declaration. Padding is left out
            where a declaration says the size without it, or the sequences' lengths do.

        Raises:
            NoSuchRecord: nothing is recorded under this key; names the nearest.
            LayoutError: no layout was declared, it does not say enough, or a block is missing.
            UsageError: no rank stands where `at` says.
            ReplicasDiffer: see `replicas`.
            DamagedRecording: the bytes are not there, or not those that were written.
        """
        from .logical import Recorded

        rows = self.find_all(name, step, occurrence, kind=kind, attempt=attempt, **tags)
        return Recorded(self, rows, at=at, replicas=replicas).logical()

    def find_all(
        self,
        name: str,
        step: int = 0,
        occurrence: int = 0,
        *,
        kind: str = "tensor",
        attempt: int | None = None,
        **tags: Any,
    ) -> list[ManifestRow]:
        """Return the manifest rows of a key on all ranks that have it; arguments as for `find`.

        Raises:
            NoSuchRecord: no rank has it; names the nearest.
        """
        group = self._group(name, tags)
        found = self._searched(attempt, kind, group, step, occurrence)
        frame = self._frame(attempt)
        if not found:
            frame, index = self._index(attempt)
            found = index.find(kind, group, step, occurrence)
        if not found:
            asked = f"{label(name, canonical(tags))} step={step} occurrence={occurrence}"
            close = nearest(index, kind, group, step, occurrence)
            raise NoSuchRecord(asked, [one.text for one in close])
        return [row_at(frame, found[rank]) for rank in sorted(found)]

    def _frame(self, attempt: int | None) -> pl.DataFrame:
        if attempt not in self._frames:
            rows = self.rows(attempt) if attempt is not None else self._of_latest(self.rows())
            self._frames[attempt] = rows
        return self._frames[attempt]

    def _index(self, attempt: int | None) -> tuple[pl.DataFrame, Index]:
        frame = self._frame(attempt)
        if attempt not in self._indices:
            self._indices[attempt] = Index.build(frame)
        return frame, self._indices[attempt]

    def _searched(
        self, attempt: int | None, kind: str, group: Group, step: int, occurrence: int
    ) -> dict[int, int]:
        """Return the rows of a key on all ranks by the index, or, of the first keys, without it."""
        self._looked_up += 1
        if attempt in self._indices or self._looked_up > _SEARCHED:
            return self._index(attempt)[1].find(kind, group, step, occurrence)
        return searched(self._frame(attempt), kind, group, step, occurrence)

    def _group(self, name: str, tags: Mapping[str, Any]) -> Group:
        try:
            return whole_key(name, {tag: clean(tag, value) for tag, value in tags.items()})
        except ValueError as err:
            raise UsageError(str(err)) from None

    def value(
        self,
        rank: int,
        name: str,
        step: int = 0,
        occurrence: int = 0,
        *,
        attempt: int | None = None,
        **tags: Any,
    ) -> Any:
        """Return a recorded number, string or list; arguments and errors as for `load`."""
        row = self.find(rank, name, step, occurrence, kind="value", attempt=attempt, **tags)
        return json.loads(row["value"] or "null")

    def read(self, row: ManifestRow, *, check: bool = True) -> torch.Tensor:
        """Return the tensor of a manifest row.

        Args:
            row: a row of `rows`, as a dict.
            check: compare the bytes with the row's digest, once for each payload.

        Raises:
            UsageError: the row holds no tensor.
            DamagedRecording: the bytes are not there, or not those that were written.
        """
        from .bits import plainly
        from .format.payload import parse_dtype, restore

        path, place = self.place_of(row)
        data = self._through_names(path, lambda file: self._opened().read(file, place))
        about = (row["shard"] or "", row["tensor"] or "", row["digest"])
        if check and about not in self._checked:
            import xxhash

            if xxhash.xxh3_128_hexdigest(data) != row["digest"]:
                raise DamagedRecording(
                    path,
                    f"the bytes of {label(row['name'], row['tags'])} step={row['step']} "
                    f"occurrence={row['occurrence']} do not have the digest that was recorded",
                )
            self._checked.add(about)
        with plainly():
            return restore(data, parse_dtype(row["dtype"], path), row["shape"] or [], path)

    def ids(self, row: ManifestRow, *, check: bool = True) -> tuple[Taken, ...]:
        """Return the ids that the rows of a record have, () where it has none.

        Args:
            row: a row of `rows`, as a dict.
            check: as of `read`.

        Raises:
            DamagedRecording: they are not there, or not those that were written.
        """
        return self._held.of(row, check=check)

    def known(self, row: ManifestRow, names: Sequence[str]) -> torch.Tensor | None:
        """Return position and token of each of the ids of a record's rows: [rows, 2].

        None where nobody said.

        Args:
            row: a row of `rows`, as a dict.
            names: of the dims that they are along, in alphabetical order.
        """
        return self._held.known(row, names)

    def read_runs(self, path: Path, into: memoryview, runs: Iterable[tuple[int, int, int]]) -> None:
        """Read runs of a shard's bytes into memory, without comparing them with any digest.

        Args:
            path: the shard, of `place_of`.
            into: the memory.
            runs: where each begins in the file, and from where to where it goes in the memory.

        Raises:
            DamagedRecording: the bytes are not there.
        """
        self._through_names(path, lambda file: self._opened().read_runs(file, into, runs))

    def read_many(
        self,
        payloads: Sequence[tuple[int, str, str, str]],
        into: memoryview,
        nbytes: int,
        *,
        check: bool = True,
    ) -> list[int]:
        """Read payloads of one size into memory, one behind the other.

        Args:
            payloads: of each the rank, the shard, the tensor's name in it and the digest.
            into: the memory.
            nbytes: of each payload.
            check: compare the bytes with the digests.

        Returns:
            The numbers of those that are not there, or not those that were recorded; `read` says
            why.
        """
        import xxhash

        wrong: list[int] = []
        for (rank, shard), group in itertools.groupby(enumerate(payloads), lambda p: p[1][:2]):
            these = list(group)
            try:
                path = self._shard_path(shard, rank)
                places = [self._extent(shard, tensor, path) for _, (_, _, tensor, _) in these]
                if any(size != nbytes for _, size in places):
                    raise DamagedRecording(path, "a tensor has another size than the manifest says")
                self.read_runs(path, into, _runs(these[0][0] * nbytes, places))
            except (DamagedRecording, OSError):
                wrong += [number for number, _ in these]
                continue
            for number, (_, _, _, digest) in these if check else ():
                data = into[number * nbytes : (number + 1) * nbytes]
                if xxhash.xxh3_128_hexdigest(data) != digest:
                    wrong.append(number)
        return wrong

    def place_of(self, row: ManifestRow) -> tuple[Path, Place]:
        """Return the shard of a row's payload, and where in it that lies.

        Args:
            row: a row of `rows`, as a dict.

        Raises:
            UsageError: the row holds no tensor.
            DamagedRecording: the shard does not say where, or otherwise than the manifest.
        """
        shard, tensor = row["shard"], row["tensor"]
        if shard is None or tensor is None:
            raise UsageError(self._why_no_tensor(row))
        path = self._shard_path(shard, row["rank"])
        place = Place(*self._extent(shard, tensor, path))
        if place.nbytes != row["nbytes"]:
            raise DamagedRecording(
                path,
                f"tensor {tensor!r} has {place.nbytes} bytes, the manifest says {row['nbytes']}",
            )
        return path, place

    def _opened(self) -> Files:
        with self._lock:
            if self._files is None:
                from .format.payload import Files

                self._files = Files()
            return self._files

    @staticmethod
    def _through_names(path: Path, read: Callable[[Path], T]) -> T:
        # The second is the shard that is open; sealed between the two, it has the first name.
        for is_open in (False, True, False):
            try:
                return read(path.with_suffix(".partial") if is_open else path)
            except FileNotFoundError:
                continue
        raise DamagedRecording(path, "it is missing")

    def _why_no_tensor(self, row: ManifestRow) -> str:
        what = f"{label(row['name'], row['tags'])} step={row['step']}"
        if row["kind"] == "value":
            return f"{what} is a value, not a tensor; read it with Recording.value"
        level = self.meta.get("options", {}).get("level", "tensors")
        return f"{what} was recorded with --level {level}, without its elements; record it again"

    def _read_all_rows(self) -> pl.DataFrame:
        """Read the rows; again where a ring that is being written dropped a part meanwhile."""
        for _ in range(_TRIES):
            try:
                return self._read_rows()
            except DamagedRecording:
                live = any(c.get("keep_last") and c["state"] == "running" for c in self._claims)
                if not live:
                    raise
        return self._read_rows()

    def _read_rows(self) -> pl.DataFrame:
        import polars as pl

        # Before the rows: a claim that says how many there are is written after them.
        self._claims = self.claims()
        schema = {**polars_schema(COLUMNS), "attempt": pl.Int32()}
        sealed: list[Part] = []
        frames = [pl.DataFrame(schema=schema)]
        rings = {claim["rank"] for claim in self._claims if claim.get("keep_last")}
        for rank, folder in rank_folders(self.path):
            for part in parts_of(rank, folder, is_ring=rank in rings):
                if part.is_sealed:
                    sealed.append(part)
                else:
                    frame, places = read_part(part)
                    frames.append(frame)
                    self._places.update(places)
        rows = pl.concat([*frames, *read_sealed(sealed)], rechunk=True)
        self._check_complete(rows)
        if not _is_sorted(rows):
            rows = rows.sort("rank", "attempt", "seq")
        return rows

    def _check_complete(self, found: pl.DataFrame) -> None:
        """Hold what was found against what each rank wrote down when it closed."""
        counted = found.group_by("rank", "attempt").len()
        rows = {(rank, attempt): n for rank, attempt, n in counted.iter_rows()}
        for claim in self._claims:
            got = rows.get((claim["rank"], claim["attempt"]), 0)
            expected = claim.get("rows")
            if claim.get("state") in ("complete", "stopped") and got != expected:
                raise DamagedRecording(
                    self.path / rank_folder(claim["rank"]),
                    f"its manifest has {got} rows of attempt {claim['attempt']}, "
                    f"expected {expected}",
                )

    def _shard_path(self, shard: str, rank: int) -> Path:
        known = self._paths.get((shard, rank))
        if known is None:
            known = self._paths[shard, rank] = shard_path(self.path, shard, rank)
        return known

    def _extent(self, shard: str, tensor: str, path: Path) -> Extent:
        place = self._places.get((shard, tensor))
        if place is not None:
            return place
        header = self._headers.get(shard)
        if header is None:
            header = self._header(shard, path)
        if tensor not in header:
            raise DamagedRecording(path, f"it holds no tensor {tensor!r}")
        return header[tensor]

    def _header(self, shard: str, path: Path) -> dict[str, Extent]:
        with self._lock:
            header = self._headers.get(shard)
            if header is None:
                if len(self._headers) >= _HEADERS_KEPT:
                    self._headers.pop(next(iter(self._headers)))
                header = self._headers[shard] = read_header(path)
            return header


def _runs(at: int, places: Iterable[Extent]) -> list[tuple[int, int, int]]:
    """Return what `read_runs` reads places by, one behind the other in memory from `at` on."""
    runs: list[tuple[int, int, int]] = []
    behind = -1  # the file's byte behind the last
    for offset, nbytes in places:
        if offset == behind:
            runs[-1] = (*runs[-1][:2], at + nbytes)
        else:
            runs.append((offset, at, at + nbytes))
        at += nbytes
        behind = offset + nbytes
    return runs


def _is_sorted(rows: pl.DataFrame) -> bool:
    """Whether rows are in order of rank, attempt and seq."""
    columns = [rows[name] for name in ("rank", "attempt", "seq")]
    later = columns[2] < columns[2].shift(1)
    for column in columns[1::-1]:
        before = column.shift(1)
        later = (column < before) | ((column == before) & later)
    return not later.any()
