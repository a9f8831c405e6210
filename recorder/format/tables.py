"""The manifest as parquet: journals sealed, rows read and written."""

from __future__ import annotations

import functools
import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..errors import DamagedRecording
from . import disk
from .disk import PRIVATE, Access
from .inflation import check_claims
from .journal import read_journal
from .schema import polars_schema

if TYPE_CHECKING:
    import polars as pl

_TRIES = 100
F = TypeVar("F", bound=Callable[..., Any])


def through_interrupts(function: F) -> F:
    """Have a function begin again where Ctrl-C ended it in another thread than the main one.

    Polars raises KeyboardInterrupt in whichever thread it works for, beside the main thread, where
    Python raises it in any case.
    """

    @functools.wraps(function)
    def whole(*args: Any, **options: Any) -> Any:
        while True:
            try:
                return function(*args, **options)
            except KeyboardInterrupt:
                if threading.current_thread() is threading.main_thread():
                    raise

    return cast(F, whole)


@through_interrupts
def seal_journal(
    path: Path,
    columns: dict[str, str],
    later: Iterable[str],
    access: Access = PRIVATE,
    *,
    first_step: int = 0,
    durable: bool = False,
) -> int:
    """Turn the journal of a process that is alive into parquet, and remove it.

    Args:
        path: the journal, every line of it whole.
        columns: names and polars types.
        later: the columns that lines without a name add.
        access: who may read it.
        first_step: leave out the rows of earlier steps.
        durable: whether the parquet is to be on the device before the journal goes.

    Returns:
        The number of rows left out.
    """
    import polars as pl

    try:
        # As `read_journal`, many times faster and without the interpreter, which is the job's.
        lines = pl.read_ndjson(path, schema=polars_schema(columns))
        named = lines["name"].is_not_null()
        rows = lines.filter(named).drop(later)
        added = lines.filter(~named).select("seq", *later)
        frame = rows.join(added, on="seq", how="left", maintain_order="left").select(list(columns))
        if frame.height != rows.height:
            raise ValueError("two lines add to one row")
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError):
        frame = to_frame(read_journal(path), columns)
    kept = frame.filter(pl.col("step") >= first_step) if first_step else frame
    _write_frame(path.with_suffix(".parquet"), kept, access, durable)
    disk.remove(path)
    return frame.height - kept.height


@through_interrupts
def trim_parquet(
    path: Path, columns: dict[str, str], first_step: int, access: Access, *, durable: bool = False
) -> int:
    """Leave out the rows of steps before `first_step`; return how many there were."""
    import polars as pl

    frame = read_parquet([path], columns)
    kept = frame.filter(pl.col("step") >= first_step)
    if kept.height < frame.height:
        _write_frame(path, kept, access, durable)
    return frame.height - kept.height


@through_interrupts
def add_to_parquet(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    columns: dict[str, str],
    later: Iterable[str],
    access: Access = PRIVATE,
    *,
    durable: bool = False,
) -> None:
    """Add to rows of a parquet file, by their `seq`; one that is not there any more is left so.

    Args:
        path: the file.
        rows: each a `seq` and some of the `later` columns.
        columns: names and polars types.
        later: the columns that may be added to; what is there already stays.
        access: who may read it.
        durable: whether it is to be on the device before it takes the other's place.

    Raises:
        OSError: it cannot be written; the file is as it was.
        DamagedRecording: it does not hold what it should.
    """
    import polars as pl

    try:
        frame = read_parquet([path], columns)
    except FileNotFoundError:
        return
    names = list(later)
    added = to_frame(rows, {"seq": columns["seq"], **{name: columns[name] for name in names}})
    both = frame.join(
        added.unique("seq", keep="last"), on="seq", how="left", suffix="_new", maintain_order="left"
    )
    filled = both.with_columns(pl.coalesce(name, f"{name}_new").alias(name) for name in names)
    _write_frame(path, filled.select(list(columns)), access, durable)


@through_interrupts
def count_rows(path: Path) -> int:
    """Return the number of rows in a parquet file, from its footer."""
    import polars as pl

    return int(pl.scan_parquet(path).select(pl.len()).collect().item())


@through_interrupts
def write_parquet(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: dict[str, str], access: Access = PRIVATE
) -> None:
    """Write rows as a parquet file that appears whole or not at all."""
    _write_frame(path, to_frame(rows, columns), access)


@through_interrupts
def to_frame(rows: Sequence[Mapping[str, Any]], columns: dict[str, str]) -> pl.DataFrame:
    """Return rows as a table of these columns."""
    import polars as pl

    return pl.DataFrame(
        [[row.get(name) for row in rows] for name in columns],
        schema=polars_schema(columns),
        orient="col",
        strict=False,
    )


def _write_frame(path: Path, frame: pl.DataFrame, access: Access, durable: bool = False) -> None:
    data = io.BytesIO()
    frame.write_parquet(data, compression="zstd", statistics=False)
    disk.replace(path, data.getbuffer(), access, durable=durable)


@through_interrupts
def read_parquet(
    paths: list[Path],
    columns: dict[str, str],
    source: str = "",
    *,
    is_checked: bool = False,
    optional: Collection[str] = (),
) -> pl.DataFrame:
    """Return the rows of parquet files, one behind the other, their columns checked.

    Args:
        paths: the files, at least one.
        columns: names and polars types that they must have.
        is_checked: whether `check_claims` has passed them.
        source: the name of a column to add, with each row's path.
        optional: columns that are null where they are missing, as an earlier version left them.

    Raises:
        DamagedRecording: no parquet, more than it can be, or columns missing or of another type;
            names the first path where it is not known which.
        FileNotFoundError: one is not there (any more).
    """
    # Polars opens a file more than once: of one that is replaced meanwhile it reads half of each.
    # Of many, whoever asks goes on one by one: each is then read again by itself.
    for i in range(_TRIES if len(paths) == 1 else 2):
        before = _versions(paths)
        try:
            frame = _read_once(paths, columns, source, is_checked and i == 0, optional)
        except DamagedRecording:
            if _versions(paths) == before:
                raise
        else:
            if _versions(paths) == before:
                return frame
    raise DamagedRecording(paths[0], "it is replaced again and again while it is read")


def _versions(paths: list[Path]) -> list[tuple[int, int, int]]:
    """Return what tells a file from one that took its place."""
    found = [path.stat() for path in paths]
    return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in found]


def _read_once(
    paths: list[Path],
    columns: dict[str, str],
    source: str,
    is_checked: bool,
    optional: Collection[str],
) -> pl.DataFrame:
    import polars as pl

    path, schema = paths[0], polars_schema(columns)
    if not is_checked:
        check_claims(paths)
    try:
        with _panics_contained():
            # Not memory-mapped: a file that shrinks under a mapping kills the process.
            frame = pl.read_parquet(paths, memory_map=False, include_file_paths=source or None)
    except FileNotFoundError:
        raise
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as err:
        raise DamagedRecording(path, f"it is not a parquet file ({_first_line(err)})") from None
    missing = [name for name in optional if name not in frame.columns]
    if missing:
        frame = frame.with_columns(pl.lit(None, dtype=schema[name]).alias(name) for name in missing)
    for name, dtype in schema.items():
        if frame.schema.get(name) != dtype:
            raise DamagedRecording(
                path, f"column {name} has type {frame.schema.get(name)}, expected {dtype}"
            )
    return frame.select([*schema, *([source] if source else [])])


is_command = False
"""Whether this process is a command of ours, whose stderr nobody else writes to."""


@contextmanager
def _panics_contained() -> Iterator[None]:
    """Keep what polars' core prints when it panics over a damaged file: we say it in a sentence."""
    if not is_command:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as told:
            os.dup2(told.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
    finally:
        os.close(kept)


def _first_line(err: BaseException) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:200]
