"""What is wrong with a replay's options, as far as recording and code can tell beforehand."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorder.errors import UsageError
from recorder.filters import Filter
from recorder.format.rows import matching, seen_in
from recorder.recording import Recording

from .match import MatchOn, selected_rows
from .rename import oriented_to
from .settings import ReplaySettings
from .transforms import check_path

if TYPE_CHECKING:
    import polars as pl


def foreseen(recording: Recording, settings: ReplaySettings) -> list[str]:
    """Return what will go wrong, a line each, as far as that can be known.

    Raises:
        UsageError: `match_on` names a tag that no record carries, or `transform` is no path.
        DamagedRecording: the manifest does not hold what it should.
    """
    rows = recording.latest()
    match_on = MatchOn.parse(settings.match_on)
    match_on.check(rows["tags"].unique().to_list())
    found: list[str] = []
    if settings.filter is not None and rows.height:
        found += _of_filter(rows, settings.filter, match_on, settings)
    names = rows["name"].unique()
    for one in oriented_to(settings.rename, names):
        if rows.height and not one.a.fits(names):
            some = ", ".join(sorted(names)[:6]) + (", ..." if len(names) > 6 else "")
            found.append(f"--rename {one.text!r}: {one.a.text!r} fits no record; there are {some}")
    if isinstance(settings.transform, str):
        found += _of_transform(settings.transform)
    return found


def tell(run: str, options: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Say what is foreseen of a replay from a recording, given a command's options.

    Raises:
        RecordingError: the recording cannot be read.
        UsageError: an option cannot be used.
    """
    for line in foreseen(Recording.open(run), ReplaySettings.named(options)):
        say(f"before COMMAND runs: {line}")


def check_watched(recording: Recording, filter: Filter) -> None:
    """Refuse to watch what was not recorded.

    Raises:
        UsageError: the filter selects no record.
    """
    rows = recording.latest()
    if rows.height and not matching(rows, filter).any():
        names, values = seen_in(rows)
        raise UsageError(
            f"--watch: of what was recorded, {filter.why_nothing(values, names, values)}"
        )


def _of_filter(
    rows: pl.DataFrame, filter: Filter, match_on: MatchOn, settings: ReplaySettings
) -> Iterator[str]:
    """Say that a filter selects nothing, or reads a tag that looks misspelt.

    Where only some tags count, the target's taps may carry others than the records.
    """
    names, values = seen_in(rows)
    is_known = match_on.whole and "rank" not in filter.names
    if "step" in filter.names and rows["rows"].is_not_null().any():
        is_known = False  # the target's steps need not be those of the rows
    offset, renames = settings.step_offset, settings.rename
    if is_known and not selected_rows(rows, filter, 0, offset, renames).height:
        yield f"of what was recorded, {filter.why_nothing(values, names, values)}"
        return
    tags = {"name", *values}
    for name in filter.unknown(tags) if not renames else ():
        meant = filter.meant(name, tags, names)
        if meant:
            yield f"the filter {filter.text!r} reads {name!r}, which no record carries{meant}"


def _of_transform(path: str) -> Iterator[str]:
    """Say that a module or a function is not to be found; neither is run for that."""
    check_path(path)
    module, _, name = path.rpartition(".")
    said = "where COMMAND runs it may be another matter: check the path, and PYTHONPATH there"
    here = str(Path.cwd())
    is_new = here not in sys.path
    if is_new:
        sys.path.append(here)
    top, *rest = module.split(".")
    spec = None
    try:
        with contextlib.suppress(ImportError, ValueError, AttributeError):
            spec = importlib.util.find_spec(top)  # of a part of it, this would import what is above
    finally:
        if is_new:
            sys.path.remove(here)
    if spec is None:
        yield f"transform {path!r} cannot be imported here: there is no module {module}; {said}"
        return
    origin = spec.origin
    for i, part in enumerate(rest):
        places = [Path(one, *rest[:i]) for one in spec.submodule_search_locations or ()]
        files = [file for one in places for file in one.glob(f"{part}*") if file.stem == part]
        if places and not files:
            yield f"transform {path!r} cannot be imported here: there is no module {module}; {said}"
            return
        modules = [one / "__init__.py" if one.is_dir() else one for one in files]
        origin = next((str(one) for one in modules if one.suffix == ".py" and one.is_file()), None)
    if origin is None or not origin.endswith(".py"):
        return  # built in, compiled, or bound by the package itself
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        names = _names_in(ast.parse(Path(origin).read_text(encoding="utf-8")))
        if "*" not in names and "__getattr__" not in names and name not in names:
            yield f"transform {path!r}: {origin} defines no {name!r}; {said}"


def _names_in(tree: ast.Module) -> set[str]:
    """Return the names that a module may bind, wherever; `*` where it takes another's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(one.asname or one.name).partition(".")[0] for one in node.names}
    return found
