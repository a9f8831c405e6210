"""Open a recording, finished or still being written, and read from it.

1. `Recording.open` checks the version and lists the ranks.
2. `rows` reads the manifest: the parquet part of each finished shard, the journal of the open one.
3. `load` finds a key through the `Index`, then `read` brings its bytes back, digest checked.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DamagedRecording, NoSuchRecord, UsageError
from ..tags import canonical, clean, label
from .index import Index, nearest, whole_key
from .journal import read_journal, read_parquet
from .rows import parse_tags, tag_columns
from .schema import (
    ATTEMPT,
    COLUMNS,
    PART,
    RANK_FOLDER,
    polars_schema,
    rank_folder,
    read_json,
    read_recording_json,
    stem,
)
from .shard import Place, read_header

if TYPE_CHECKING:
    import polars as pl
    import torch

    from .payload import Files

_HEADERS_KEPT = 256
_ROWS_A_PART = 1 << 20  # far more than a writer puts into one


class Recording:
    """A recording on disk, for reading.

    What is read is what had been completed when it was first asked for; open it again to see more.

    Attributes:
        path: its folder.
        meta: what `recording.json` says: format version, world size, command, provenance, options.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta
        self._rows: pl.DataFrame | None = None
        self._claims: list[dict[str, Any]] = []
        self._places: dict[tuple[str, str], Place] = {}
        self._headers: dict[str, dict[str, Place]] = {}
        self._indices: dict[int | None, tuple[pl.DataFrame, Index]] = {}
        self._files: Files | None = None
        self._paths: dict[tuple[str, int], Path] = {}
        self._checked: set[tuple[str, str, str]] = set()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Recording:
        """Open the recording in a folder.

        Raises:
            NotARecording: the folder holds none.
            UnsupportedVersion: another version wrote it.
            DamagedRecording: `recording.json` does not hold what it should.
        """
        folder = Path(path)
        return cls(folder, read_recording_json(folder))

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

    def claims(self) -> list[dict[str, Any]]:
        """Return what each attempt of each rank says of itself: state, reason, host, times."""
        claims = []
        for rank, folder in self._rank_folders():
            for path in sorted(folder.iterdir()):
                found = ATTEMPT.fullmatch(path.name)
                if found:
                    claim = read_json(path)
                    claims.append({**claim, "rank": rank, "attempt": int(found[1])})
        return sorted(claims, key=lambda claim: (claim["rank"], claim["attempt"]))

    def rows(self, attempt: int | None = None) -> pl.DataFrame:
        """Return the manifest's columns and `attempt`, a row a record, by rank and seq.

        Args:
            attempt: of every rank this attempt only; by default all of them.

        Raises:
            DamagedRecording: a part of the manifest does not hold what it should.
        """
        if self._rows is None:
            self._rows = self._read_rows()
        if attempt is None:
            return self._rows
        return self._rows.filter(self._rows["attempt"] == attempt)

    def latest(self) -> pl.DataFrame:
        """Return the rows of each rank's latest attempt, of the ranks there are since then.

        A rank that recorded nothing in its latest attempt has none, whatever earlier ones hold.
        """
        import polars as pl

        rows = self.rows()
        last = {claim["rank"]: claim["attempt"] for claim in self._claims}  # sorted by attempt
        if not any(last.values()):
            return rows
        kept = pl.DataFrame(
            [(rank, attempt) for rank, attempt in last.items() if rank < self.world_size],
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
    ) -> dict[str, Any]:
        """Return the manifest row of a key, for `read`; arguments as for `load`.

        Raises:
            NoSuchRecord: nothing is recorded under this key; names the nearest.
        """
        if attempt not in self._indices:
            frame = self.latest() if attempt is None else self.rows(attempt)
            self._indices[attempt] = frame, Index.build(frame)
        frame, index = self._indices[attempt]
        try:
            group = whole_key(name, {tag: clean(tag, value) for tag, value in tags.items()})
        except ValueError as err:
            raise UsageError(str(err)) from None
        number = index.find_on(rank, kind, group, step, occurrence)
        if number is not None:
            return dict(zip(frame.columns, frame.row(number), strict=True))
        asked = f"{label(name, canonical(tags))} step={step} occurrence={occurrence} on rank {rank}"
        elsewhere = index.find(kind, group, step, occurrence)
        if elsewhere:
            ranks = ", ".join(map(str, sorted(elsewhere)))
            raise NoSuchRecord(asked, [f"the same key on rank {ranks}"])
        raise NoSuchRecord(asked, nearest(index, kind, group, step, occurrence))

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
        return json.loads(row["value"])

    def read(self, row: dict[str, Any], *, check: bool = True) -> torch.Tensor:
        """Return the tensor of a manifest row.

        Args:
            row: a row of `rows`, as a dict.
            check: compare the bytes with the row's digest, once for each payload.

        Raises:
            UsageError: the row holds no tensor.
            DamagedRecording: the bytes are not there, or not those that were written.
        """
        from .payload import Files, parse_dtype, restore

        shard, tensor = row["shard"], row["tensor"]
        if shard is None or tensor is None:
            raise UsageError(self._why_no_tensor(row))
        path = self._shard_path(shard, row["rank"])
        place = self._place(shard, tensor, path)
        if place.nbytes != row["nbytes"]:
            raise DamagedRecording(
                path,
                f"tensor {tensor!r} has {place.nbytes} bytes, the manifest says {row['nbytes']}",
            )
        if self._files is None:
            self._files = Files()
        try:
            data = self._files.read(path, place)
        except FileNotFoundError:
            try:  # the shard that is open
                data = self._files.read(path.with_suffix(".partial"), place)
            except FileNotFoundError:
                raise DamagedRecording(path, "it is missing") from None
        about = (shard, tensor, row["digest"])
        if check and about not in self._checked:
            import xxhash

            if xxhash.xxh3_128_hexdigest(data) != row["digest"]:
                raise DamagedRecording(
                    path,
                    f"the bytes of {label(row['name'], row['tags'])} step={row['step']} "
                    f"occurrence={row['occurrence']} do not have the digest that was recorded",
                )
            self._checked.add(about)
        return restore(data, parse_dtype(row["dtype"], path), row["shape"] or [], path)

    def _why_no_tensor(self, row: dict[str, Any]) -> str:
        what = f"{label(row['name'], row['tags'])} step={row['step']}"
        if row["kind"] == "value":
            return f"{what} is a value, not a tensor; read it with Recording.value"
        level = self.meta.get("options", {}).get("level", "tensors")
        return f"{what} was recorded with --level {level}, without its elements; record it again"

    def _rank_folders(self) -> list[tuple[int, Path]]:
        found = []
        for path in sorted(self.path.iterdir()):
            match = RANK_FOLDER.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found.append((int(match[1]), path))
        return found

    def _read_rows(self) -> pl.DataFrame:
        import polars as pl

        # Before the rows: a claim that says how many there are is written after them.
        self._claims = self.claims()
        schema = {**polars_schema(COLUMNS), "attempt": pl.Int32()}
        sealed: list[tuple[Path, int, int]] = []
        parts = [pl.DataFrame(schema=schema)]
        for rank, folder in self._rank_folders():
            for attempt, index, has_parquet in _stems(folder):
                base = folder / stem(attempt, index)
                if has_parquet:
                    sealed.append((base.with_suffix(".parquet"), rank, attempt))
                    continue
                try:
                    frame = self._from_journal(base.with_suffix(".journal"))
                except FileNotFoundError:  # sealed since the folder was listed
                    sealed.append((base.with_suffix(".parquet"), rank, attempt))
                    continue
                _check_rows(frame, rank, base.with_suffix(".journal"))
                parts.append(frame.with_columns(attempt=pl.lit(attempt, pl.Int32)))
        rows = pl.concat([*parts, *_read_sealed(sealed)], rechunk=True)
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

    def _from_journal(self, path: Path) -> pl.DataFrame:
        import polars as pl

        rows = read_journal(path)
        for row in rows:
            offset, nbytes = row.get("offset"), row.get("nbytes")
            if type(offset) is int and type(nbytes) is int and min(offset, nbytes) >= 0:
                self._places[str(row.get("shard")), str(row.get("tensor"))] = Place(offset, nbytes)
        try:
            return pl.DataFrame(
                [[row.get(name) for row in rows] for name in COLUMNS],
                schema=polars_schema(COLUMNS),
                orient="col",
                strict=True,
            )
        except (pl.exceptions.PolarsError, TypeError, OverflowError, ValueError) as err:
            raise DamagedRecording(path, f"a row does not fit the manifest ({err})") from None

    def _shard_path(self, shard: str, rank: int) -> Path:
        """Return a shard's path; whatever a manifest says, it lies in its rank's folder."""
        known = self._paths.get((shard, rank))
        if known is not None:
            return known
        folder, _, file = shard.partition("/")
        part = PART.fullmatch(file)
        if folder != rank_folder(rank) or part is None or part[3] != "safetensors":
            raise DamagedRecording(self.path, f"a row names the shard {shard!r}")
        path = self._paths[shard, rank] = self.path / folder / file
        return path

    def _place(self, shard: str, tensor: str, path: Path) -> Place:
        place = self._places.get((shard, tensor))
        if place is not None:
            return place
        header = self._headers.get(shard)
        if header is None:
            if len(self._headers) >= _HEADERS_KEPT:
                self._headers.pop(next(iter(self._headers)))
            header = self._headers[shard] = read_header(path)
        if tensor not in header:
            raise DamagedRecording(path, f"it holds no tensor {tensor!r}")
        return header[tensor]


def _read_sealed(parts: list[tuple[Path, int, int]]) -> list[pl.DataFrame]:
    """Return the rows of sealed parts, each a path with its rank and attempt, and `attempt`.

    All at once, many times faster than one by one; where anything is odd, one by one, so that the
    message can name the part.
    """
    import polars as pl

    if len(parts) > 1:
        paths = [path for path, _, _ in parts]
        try:
            source = "\0part"  # no column of ours
            frame = read_parquet(paths, COLUMNS, _ROWS_A_PART, source)
            belongs = pl.DataFrame(
                {source: [str(path) for path in paths]},
                schema={source: pl.String},
            ).with_columns(
                pl.Series("_rank", [rank for _, rank, _ in parts], pl.Int32),
                attempt=pl.Series([attempt for _, _, attempt in parts], dtype=pl.Int32),
            )
            frame = frame.join(belongs, on=source, how="left", maintain_order="left")
            if not (frame["rank"] != frame["_rank"]).any():
                _check_rows(frame, None, paths[0].parent.parent)
                return [frame.drop(source, "_rank")]
        except (DamagedRecording, FileNotFoundError):
            pass
    found = []
    for path, rank, attempt in parts:
        try:
            frame = read_parquet([path], COLUMNS, _ROWS_A_PART)
        except FileNotFoundError:
            raise DamagedRecording(path, "it is missing") from None
        _check_rows(frame, rank, path)
        found.append(frame.with_columns(attempt=pl.lit(attempt, pl.Int32)))
    return found


def _check_rows(frame: pl.DataFrame, rank: int | None, path: Path) -> None:
    """Refuse rows that are not this rank's, or lack what every row has."""
    required = ("rank", "seq", "step", "name", "tags", "kind")
    alien = rank is not None and (frame["rank"] != rank).any()
    if alien or any(frame[column].null_count() for column in required):
        raise DamagedRecording(path, f"it holds rows that are not rank {rank}'s")
    for text in frame["tags"].unique().to_list():
        parse_tags(text, path)


def _is_sorted(rows: pl.DataFrame) -> bool:
    """Whether rows are in order of rank, attempt and seq."""
    columns = [rows[name] for name in ("rank", "attempt", "seq")]
    later = columns[2] < columns[2].shift(1)
    for column in columns[1::-1]:
        before = column.shift(1)
        later = (column < before) | ((column == before) & later)
    return not later.any()


def _stems(folder: Path) -> list[tuple[int, int, bool]]:
    """Return (attempt, index, whether it has parquet) of each part that has rows.

    Raises:
        DamagedRecording: a finished shard has neither parquet nor journal.
    """
    for once_more in (True, False):
        found: dict[tuple[int, int], set[str]] = {}
        for path in folder.iterdir():
            match = PART.fullmatch(path.name)
            if match and path.is_file() and not path.is_symlink():
                found.setdefault((int(match[1]), int(match[2])), set()).add(match[3])
        bare = [key for key, kinds in found.items() if kinds == {"safetensors"}]
        if not bare:
            break
        # A listing made while a part was sealed can have missed both of its names.
        if not once_more:
            name = f"{stem(*bare[0])}.parquet"
            raise DamagedRecording(folder / name, "it is missing, and its shard is there")
    return [
        (*key, "parquet" in found[key])
        for key in sorted(found)
        if found[key] & {"parquet", "journal"}
    ]
