"""The parts of a manifest: one for each shard, sealed as parquet or still a journal.

1. `parts_of` lists the parts in a rank's folder.
2. `read_part` reads one by itself; `read_sealed` many at once, many times faster.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DamagedRecording
from ..tags import MOST_TAG_BYTES
from .inflation import check_claims
from .journal import read_journal
from .rows import parse_tags
from .schema import ADDED, COLUMNS, PART, polars_schema, rank_folder, stem
from .shard import Place
from .tables import read_parquet

if TYPE_CHECKING:
    import polars as pl

Places = dict[tuple[str, str], Place]
"""Where the tensors of shards that have no header yet lie, by shard and name."""

_MOST_BYTES = 1 << 60  # of a file, with room to add
_FEW_BYTES = 128 << 20
_ROW_BYTES = 4_096  # of texts, on average


@dataclass(frozen=True)
class Part:
    """One part of a rank's manifest.

    Attributes:
        folder: the rank's folder.
        rank: the rank.
        attempt: the attempt that wrote it.
        index: its number in that attempt.
        is_sealed: whether it is parquet, not a journal.
    """

    folder: Path
    rank: int
    attempt: int
    index: int
    is_sealed: bool

    @property
    def path(self) -> Path:
        """The file that holds it."""
        suffix = ".parquet" if self.is_sealed else ".journal"
        return self.folder / (stem(self.attempt, self.index) + suffix)


def parts_of(rank: int, folder: Path, *, is_ring: bool) -> list[Part]:
    """Return the parts in a rank's folder, in the order in which they were written.

    Args:
        rank: the rank.
        folder: its folder.
        is_ring: whether its writer let go of old parts, and may have been killed in the middle.

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
        if not bare or is_ring:
            break
        # A listing made while a part was sealed can have missed both of its names.
        if not once_more:
            name = f"{stem(*bare[0])}.parquet"
            raise DamagedRecording(folder / name, "it is missing, and its shard is there")
    return [
        Part(folder, rank, *key, is_sealed="parquet" in found[key])
        for key in sorted(found)
        if found[key] & {"parquet", "journal"}
    ]


def read_part(part: Part) -> tuple[pl.DataFrame, Places]:
    """Return a part's rows with `attempt`, and the places that a journal tells of.

    Raises:
        DamagedRecording: it does not hold what it should, or is missing.
    """
    import polars as pl

    found: tuple[pl.DataFrame, Places] | None = None
    sealed = Part(part.folder, part.rank, part.attempt, part.index, is_sealed=True)
    try:
        found = None if part.is_sealed else _from_journal(part.path)
    except FileNotFoundError:
        pass  # sealed since the folder was listed
    if found is None:
        try:
            found = read_parquet([sealed.path], COLUMNS, optional=ADDED), {}
        except FileNotFoundError:
            raise DamagedRecording(sealed.path, "it is missing") from None
    frame, places = found
    _check_rows(frame, part.rank, part.path)
    return frame.with_columns(attempt=pl.lit(part.attempt, pl.Int32)), places


def read_sealed(parts: list[Part]) -> list[pl.DataFrame]:
    """Return the rows of sealed parts, with `attempt`.

    All at once, many times faster than one by one; where anything is odd, one by one, so that the
    message can name the part.
    """
    import polars as pl

    if len(parts) > 1:
        paths = [part.path for part in parts]
        with contextlib.suppress(FileNotFoundError):
            check_claims(paths)
        try:
            source = "\0part"  # no column of ours
            frame = read_parquet(paths, COLUMNS, source, is_checked=True, optional=ADDED)
            belongs = pl.DataFrame(
                {source: [str(path) for path in paths]},
                schema={source: pl.String},
            ).with_columns(
                pl.Series("_rank", [part.rank for part in parts], pl.Int32),
                attempt=pl.Series([part.attempt for part in parts], dtype=pl.Int32),
            )
            frame = frame.join(belongs, on=source, how="left", maintain_order="left")
            if not (frame["rank"] != frame["_rank"]).any():
                _check_rows(frame, None, paths[0].parent.parent)
                return [frame.drop(source, "_rank")]
        except (DamagedRecording, FileNotFoundError):
            pass
    return [read_part(part)[0] for part in parts]


def shard_path(run: Path, shard: str, rank: int) -> Path:
    """Return a shard's path; whatever a manifest says, it lies in its rank's folder.

    Raises:
        DamagedRecording: the manifest names no such path.
    """
    folder, _, file = shard.partition("/")
    part = PART.fullmatch(file)
    if folder != rank_folder(rank) or part is None or part[3] != "safetensors":
        raise DamagedRecording(run, f"a row names the shard {shard!r:.200}")
    return run / folder / file


def _from_journal(path: Path) -> tuple[pl.DataFrame, Places]:
    import polars as pl

    rows = read_journal(path)
    places: Places = {}
    for row in rows:
        offset, nbytes = _size(row.get("offset")), _size(row.get("nbytes"))
        if offset is not None and nbytes is not None:
            places[str(row.get("shard")), str(row.get("tensor"))] = Place(offset, nbytes)
    try:
        frame = pl.DataFrame(
            [[row.get(name) for row in rows] for name in COLUMNS],
            schema=polars_schema(COLUMNS),
            orient="col",
            strict=True,
        )
    except (pl.exceptions.PolarsError, TypeError, OverflowError, ValueError) as err:
        fact = (str(err).splitlines() or [type(err).__name__])[0][:200]
        raise DamagedRecording(path, f"a row does not fit the manifest ({fact})") from None
    return frame, places


def _size(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _MOST_BYTES else None


def _check_rows(frame: pl.DataFrame, rank: int | None, path: Path) -> None:
    """Refuse rows that are not this rank's, or lack what every row has."""
    import polars as pl
    import polars.selectors as cs

    required = ("rank", "seq", "step", "name", "occurrence", "tags", "kind")
    alien = rank is not None and (frame["rank"] != rank).any()
    if alien or any(frame[column].null_count() for column in required):
        raise DamagedRecording(path, f"it holds rows that are not rank {rank}'s")
    sizes = frame.select(cs.string().str.len_bytes().sum())
    texts = sum(n or 0 for n in sizes.row(0))
    if texts > _FEW_BYTES + _ROW_BYTES * frame.height:
        raise DamagedRecording(path, f"its {frame.height} rows have {texts} bytes of text")
    longest = frame.select(pl.col("name", "tags").str.len_bytes().max()).row(0)
    if max((n or 0 for n in longest), default=0) > MOST_TAG_BYTES:
        raise DamagedRecording(path, f"a row has a name or tags of {max(longest)} bytes")
    for text in frame["tags"].unique().to_list():
        parse_tags(text, path)
