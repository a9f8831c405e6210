"""A tap table: TOML text to sections of rows, checked when it is read, with line and column.

    [hf]                  # one system; a table may have several, or none of it: then [taps] alone
    roots = ["Llama*"]    # the classes of models it is meant for
    layer = "layer_number - 1"  # a tag's value, from the module, where its path has another number
    axes = { sp = "tp if sequence_parallel" }  # an axis that is another, where the config says so
    [hf.sizes]            # of dims that are fused or in parts: numbers, or what the config gives
    r = "num_attention_heads / num_key_value_heads"
    [hf.taps]
    "model.layers.{layer}.mlp" = { tap = "mlp_out", dims = "b s h" }

A row's value is a table of `tap`, `dims`, `tags`, `extras`, `grad`, `optional`, `identity`, or the
name of the tap alone. A tag's value is a constant, `last` for the last layer, or, after `=`, an
expression over the config.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from ..errors import GraftError, UsageError
from ..filters import Filter
from ..layouts import parts
from ..layouts.parse import parse_dims
from ..paths import Path, parse_path
from ..tags import RESERVED, TagValue

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AUTO = "auto"
LAST = "last"
_FOLDER = File(__file__).parent / "tables"
_SECTION = ("taps", "sizes", "roots", "axes")
_ROW = ("tap", "dims", "tags", "extras", "grad", "optional", "identity")
_KEY = re.compile(r"""^\s*("(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_\-.]+)\s*=""")
_HEADER = re.compile(r"^\s*\[\s*([^\[\]]+?)\s*\]")
_AXIS = re.compile(r"\s*([A-Za-z_]\w*)(?:\s+if\s+(.+))?\s*", re.DOTALL)
_MOST = 1 << 20


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        path: which modules, and what of them.
        taps: what the taps are called; one, or one for each successive call of a function; none
            where the dims have parts, which name themselves, and where the path is to name it.
        dims: the layout of each, or none.
        tags: what is fixed of their tags; a `Filter` where the config gives it.
        extras: what goes with each record.
        grad: whether the gradient is wanted too.
        is_optional: whether it may fit nothing without a word.
        takes_identity: whether modules that only hand on their input are taken too.
        where: its place, for messages: `llama.toml:12`.
    """

    path: Path
    taps: tuple[str, ...] = ()
    dims: tuple[str, ...] = ()
    tags: Mapping[str, Any] = field(default_factory=dict, hash=False)
    extras: Mapping[str, Any] | None = field(default=None, hash=False)
    grad: bool = False
    is_optional: bool = False
    takes_identity: bool = False
    where: str = "--modules"

    @classmethod
    def of_pattern(cls, path: Path) -> Row:
        """Return the row of `--modules`, whose taps are called as their modules are."""
        return cls(path, where=f"--modules {path.text!r}")


@dataclass(frozen=True)
class Section:
    """The rows of one system.

    Attributes:
        name: of the table, and of the section where it has several.
        rows: its rows.
        sizes: name -> size, or the expression that gives it.
        roots: patterns of the classes of models that it is meant for.
        numbers: tag -> expression over the module's attributes that gives its value.
        axes: axis -> (the axis it is, the condition or None).
        system: what the file calls it, "" where it is the whole file.
    """

    name: str
    rows: tuple[Row, ...]
    sizes: Mapping[str, int | Filter] = field(default_factory=dict, hash=False)
    roots: tuple[str, ...] = ()
    numbers: Mapping[str, Filter] = field(default_factory=dict, hash=False)
    axes: Mapping[str, tuple[str, Filter | None]] = field(default_factory=dict, hash=False)
    system: str = ""

    def is_meant_for(self, module: Any) -> bool:
        """Whether a module is of a class that it is meant for."""
        names = [(one.__name__, f"{one.__module__}.{one.__name__}") for one in type(module).__mro__]
        return any(
            fnmatch.fnmatchcase(name, root)
            for both in names
            for name in both
            for root in self.roots
        )


@dataclass(frozen=True)
class Table:
    """All sections of one file."""

    name: str
    sections: tuple[Section, ...]


def known() -> list[str]:
    """Return the names of the tables that come with the product."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load(name: str) -> tuple[Table, ...]:
    """Return the table of a name or a file, `FILE:SECTION` for one of its sections; `auto` for all.

    Raises:
        UsageError: there is none, with the nearest, or it cannot be read.
    """
    if name == AUTO:
        return tuple(load(one)[0] for one in known())
    if name in known():
        return (_read(str(_FOLDER / f"{name}.toml"), name),)
    file, colon, section = name.rpartition(":")
    if not colon or File(name).exists():
        file, section = name, ""
    if file in known():
        table = _read(str(_FOLDER / f"{file}.toml"), file)
    elif File(file).is_file():
        table = _read(file, File(file).name)
    else:
        close = difflib.get_close_matches(name, [*known(), AUTO], 3, cutoff=0.5)
        raise UsageError(
            f"there is no tap table {name!r}: neither a file, nor one of those that come with "
            f"tensorgraft; {'closest: ' + ', '.join(close) if close else ', '.join(known())}"
        )
    if not section:
        return (table,)
    chosen = [one for one in table.sections if one.system == section]
    if not chosen:
        names = ", ".join(one.system for one in table.sections) or "none"
        raise UsageError(f"{file} has no section {section!r}; it has {names}")
    return (Table(table.name, tuple(chosen)),)


def absolute(name: str) -> str:
    """Return what names the same table from another working directory."""
    file, colon, section = name.rpartition(":")
    if name in (AUTO, *known()) or file in known():
        return name
    if File(name).is_file() or not colon:
        return str(File(name).absolute())
    return f"{File(file).absolute()}:{section}"


@functools.lru_cache(maxsize=64)
def _cached(path: str, name: str, stamp: tuple[int, int]) -> Table:
    try:
        text = File(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise UsageError(f"the tap table {path} cannot be read: {reason}") from None
    return parse_table(text, name)


def _read(path: str, name: str) -> Table:
    about = File(path).stat()
    if about.st_size > _MOST:
        raise UsageError(f"{path} is of {about.st_size} bytes, and no tap table")
    return _cached(path, name, (about.st_mtime_ns, about.st_size))


def parse_table(text: str, name: str) -> Table:
    """Read a table's text.

    Raises:
        UsageError: it is no TOML, or not a table; names the line and column.
    """
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"{name}: it is too deeply nested for a tap table") from None
    except tomllib.TOMLDecodeError as err:
        fact, line, column = re.fullmatch(
            r"(.*?)(?: \(at line (\d+), column (\d+)\))?(?: \(at end of document\))?", str(err),
            re.DOTALL,
        ).groups()  # type: ignore[union-attr]  # anything fits  # fmt: skip
        end = text.count("\n") + 1
        raise UsageError(f"{name}:{line or end}:{column or 1}: {fact}, which TOML does not have") \
            from None  # fmt: skip
    reader = _Reader(text, name)
    sections = tuple(reader.sections(data))
    if not any(section.rows for section in sections):
        raise UsageError(f"{name} names no tap; write rows below [taps], or [SYSTEM.taps]")
    return Table(name, sections)


class _Reader:
    """Reads one table, and knows where in its text things stand."""

    def __init__(self, text: str, name: str) -> None:
        self._name = name
        self._lines = text.splitlines()
        self._at: dict[tuple[str, str], tuple[int, int]] = {}
        header = ""
        for number, line in enumerate(self._lines, 1):
            if found := _HEADER.match(line):
                header = ".".join(_bare(part) for part in found[1].split("."))
            elif found := _KEY.match(line):
                self._at[header, _bare(found[1])] = (number, found.start(1) + 1)

    def sections(self, data: Mapping[str, Any]) -> Iterator[Section]:
        """Yield the sections: the whole file as one, or each of its tables."""
        if "taps" in data:
            yield self._section(data, "", self._name)
            return
        for system, one in data.items():
            if not isinstance(one, Mapping):
                raise self._error("", system, f"{system!r} is no section such as [hf.taps]")
            if "taps" not in one:
                hint = difflib.get_close_matches("taps", one, 1)
                raise self._error(
                    "", system, f"the section {system!r} has no [{system}.taps]"
                    + (f"; is {hint[0]!r} meant to be that?" if hint else ""),
                )  # fmt: skip
            only = len(data) == 1
            yield self._section(one, system, self._name if only else f"{self._name}:{system}")

    def _section(self, data: Mapping[str, Any], system: str, name: str) -> Section:
        prefix = f"{system}." if system else ""
        numbers = {}
        for key, value in data.items():
            if key in _SECTION:
                continue
            if not isinstance(value, str) or not key.isidentifier() or key in RESERVED:
                raise self._error(
                    system, key, f"{key!r} is not one of {', '.join(_SECTION)}, or a tag whose "
                    "value a module gives, as in layer = \"layer_number - 1\"",
                )  # fmt: skip
            numbers[key] = self._expression(system, key, value)
        return Section(
            name,
            tuple(self._rows(data["taps"], prefix + "taps")),
            self._sizes(data.get("sizes", {}), prefix + "sizes"),
            self._roots(data.get("roots", ()), system),
            numbers,
            self._axes(data.get("axes", {}), system, prefix),
            system,
        )

    def _rows(self, data: Any, at: str) -> Iterator[Row]:
        if not isinstance(data, Mapping):
            raise self._error(at.rpartition(".")[0], "taps", "taps is no table of rows")
        for key, value in data.items():
            try:
                path = parse_path(key)
            except UsageError as err:
                raise self._error(at, key, str(err)) from None
            given = {"tap": value} if isinstance(value, str) else value
            if not isinstance(given, Mapping):
                raise self._error(at, key, "a row is { tap = NAME, dims = DIMS }, or a name")
            for word in given:
                if word not in _ROW:
                    close = difflib.get_close_matches(word, _ROW, 1)
                    hint = f"is {close[0]} meant?" if close else f"there is {', '.join(_ROW)}"
                    raise self._error(at, key, f"a row has no {word!r}; {hint}", word)
            yield self._row(path, given, at, key)

    def _row(self, path: Path, given: Mapping[str, Any], at: str, key: str) -> Row:
        taps = self._texts(given, "tap", at, key)
        dims = self._texts(given, "dims", at, key)
        is_in_parts = any(map(parts.has_parts, dims))
        if is_in_parts and taps:
            raise self._error(
                at, key, "the parts of its dims name its taps; leave out tap, or the parts", "tap"
            )
        if not taps and not is_in_parts:
            raise self._error(at, key, "it names no tap; write { tap = NAME }")
        if len(taps) > 1 and not path.function:
            raise self._error(
                at, key, "several taps are those of a function's successive calls, behind >; of a "
                "module's tuple, write a row for each member, as in :output.0", "tap",
            )  # fmt: skip
        if len(dims) > 1 and len(dims) != len(taps):
            raise self._error(at, key, f"{len(taps)} taps have {len(dims)} dims", "dims")
        for text in dims:
            try:
                parts.names_of(text) if parts.has_parts(text) else parse_dims(text)
            except GraftError as err:
                raise self._error(at, key, str(err), "dims") from None
        for word, kind in (("grad", bool), ("optional", bool), ("identity", bool)):
            if not isinstance(given.get(word, False), kind):
                raise self._error(at, key, f"{word} is true or false", word)
        return Row(
            path,
            taps,
            dims,
            self._tags(given.get("tags", {}), path, at, key),
            self._extras(given.get("extras"), at, key),
            given.get("grad", False),
            given.get("optional", False),
            given.get("identity", False),
            f"{self._name}:{self._at.get((at, key), ('?',))[0]}",
        )

    def _texts(self, given: Mapping[str, Any], word: str, at: str, key: str) -> tuple[str, ...]:
        value = given.get(word, [])
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
            raise self._error(at, key, f"{word} is a text, or a list of texts", word)
        return tuple(found)

    def _tags(self, given: Any, path: Path, at: str, key: str) -> Mapping[str, Any]:
        if not isinstance(given, Mapping):
            raise self._error(at, key, "tags is a table, as in { layer = 3 }", "tags")
        tags: dict[str, TagValue | Filter] = {}
        for tag, value in given.items():
            if tag in RESERVED or tag == "name" or not tag.isidentifier():
                raise self._error(at, key, f"{tag!r} cannot be a tag", "tags")
            if tag in dict(path.tags):
                raise self._error(at, key, f"the tag {tag!r} stands in the path already", "tags")
            if isinstance(value, str) and value.startswith("="):
                value = self._expression(at, key, value[1:], "tags")
            elif not isinstance(value, (str, int, float, bool)):
                raise self._error(at, key, f"the tag {tag!r} is no number, text or truth", "tags")
            tags[tag] = value
        return tags

    def _extras(self, given: Any, at: str, key: str) -> Mapping[str, Any] | None:
        if given is not None and not isinstance(given, Mapping):
            raise self._error(at, key, "extras is a table, as in { scale = 0.125 }", "extras")
        return given

    def _sizes(self, given: Any, at: str) -> dict[str, int | Filter]:
        sizes: dict[str, int | Filter] = {}
        if not isinstance(given, Mapping):
            raise self._error(at.rpartition(".")[0], "sizes", "sizes is a table of names and sizes")
        for name, value in given.items():
            if isinstance(value, str):
                sizes[name] = self._expression(at, name, value)
            elif type(value) is int and value > 0:
                sizes[name] = value
            else:
                raise self._error(at, name, f"the size of {name} is a number from 1 on, or a text")
        return sizes

    def _roots(self, given: Any, system: str) -> tuple[str, ...]:
        found = [given] if isinstance(given, str) else given
        if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) for one in found):
            raise self._error(system, "roots", "roots is a list of names of classes")
        return tuple(found)

    def _axes(self, given: Any, system: str, prefix: str) -> dict[str, tuple[str, Filter | None]]:
        axes: dict[str, tuple[str, Filter | None]] = {}
        if not isinstance(given, Mapping):
            raise self._error(system, "axes", "axes is a table, as in { sp = 'tp' }")
        for axis, text in given.items():
            found = _AXIS.fullmatch(text) if isinstance(text, str) else None
            if found is None:
                at, key = (
                    (prefix + "axes", axis)
                    if (prefix + "axes", axis) in self._at
                    else (system, "axes")
                )
                raise self._error(
                    at, key, f"the axis {axis} is another's name, as in 'tp', or 'tp if COND'"
                )
            condition = None if found[2] is None else self._expression(system, "axes", found[2])
            axes[axis] = (found[1], condition)
        return axes

    def _expression(self, at: str, key: str, text: str, word: str = "") -> Filter:
        try:
            return Filter.parse(text)
        except UsageError as err:
            fact = f"{text!r} is no expression: {getattr(err, 'reason', err)}"
            raise self._error(at, key, fact, word) from None

    def _error(self, at: str, key: str, fact: str, word: str = "") -> UsageError:
        line, column = self._at.get((at, key), (0, 0))
        if not line:  # a section, or a key written in another way
            for number, text in enumerate(self._lines, 1):
                header = _HEADER.match(text)
                if (header and header[1].split(".")[0] == key) or (key and key in text):
                    line, column = number, text.find(key) + 1 if key in text else 1
                    break
        if line and word:
            found = re.search(rf"\b{re.escape(word)}\s*=", self._lines[line - 1][column:])
            column += found.start() + 1 if found else 0
        return UsageError(f"{self._name}:{line or 1}:{column or 1}: {fact}")


def _bare(key: str) -> str:
    """Return a key without its quotes."""
    key = key.strip()
    if key.startswith('"'):
        try:
            return str(json.loads(key))
        except ValueError:
            return key[1:-1]
    return key[1:-1] if key.startswith("'") else key
