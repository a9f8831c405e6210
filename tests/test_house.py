"""The house: who imports whom, what docstrings name, the words for sides, types at the edges."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import recorder
from recorder import errors
from recorder.format import schema
from recorder.format.schema import ManifestRow
from replayer import log
from replayer.diffing import columns as diffing
from replayer.diffing.columns import DiffRow
from replayer.log import LogRow

ROOT = Path(recorder.__file__).parent.parent
FILES = sorted(path for name in ("recorder", "replayer") for path in (ROOT / name).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def module_of(path: Path) -> str:
    """Return a file's dotted name; a package's is that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported_by(path: Path) -> Iterator[str]:
    """Yield our modules that a file imports, anywhere in it and for whatever reason."""
    name = module_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            target = ".".join([*base, *filter(None, [node.module])]) if node.level else node.module
            for alias in node.names:
                whole = f"{target}.{alias.name}"
                # `recorder.tap` is a function; no file has its name.
                if whole in MODULES or target in MODULES:
                    yield whole if whole in MODULES else str(target)


def room_of(module: str) -> str:
    """Return the folder that a file is in; a file beside the folders is a room of its own."""
    return ".".join(module.split(".")[:2])


GRAPH = {module_of(path): set(imported_by(path)) - {module_of(path)} for path in FILES}
ROOMS: dict[str, set[str]] = {}
for _module, _targets in GRAPH.items():
    ROOMS.setdefault(room_of(_module), set()).update(
        room_of(target) for target in _targets if room_of(target) != room_of(_module)
    )


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Return names that import each other in a ring, none where there is no such ring."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            found = visit(target, [*way, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


@pytest.mark.parametrize("graph", [GRAPH, ROOMS], ids=["files", "folders"])
def test_nothing_imports_in_a_circle(graph):
    assert len(graph) > 20
    assert circle_in(graph) == []


def test_a_circle_is_found_where_there_is_one():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]


def test_the_recorder_never_imports_the_replayer():
    assert not [n for n in GRAPH if n.startswith("recorder") for t in GRAPH[n] if "replayer" in t]


def picture() -> dict[str, list[str]]:
    """Return the lines of CONTRIBUTING's picture, by package: each the names on it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found: dict[str, list[list[str]]] = {}
    for line in re.search(r"```\n(recorder/.*?)```", text, re.DOTALL)[1].splitlines():
        if match := re.match(r"(recorder|replayer)/", line):
            lines = found.setdefault(match[1], [])
        elif re.match(r"  \S", line):
            lines.append(line)
        else:
            lines[-1] += line
    return found


def places() -> dict[str, int]:
    """Return at which line of the picture each room stands, from the top."""
    found = {}
    for package, lines in picture().items():
        for number, line in enumerate(lines):
            first, *more = re.findall(r"[\w.]+/?", line)
            names = [first] if first.endswith("/") else [first, *more]
            for name in names:
                found[f"{package}.{name.removesuffix('/').removesuffix('.py')}"] = number
    return found


def test_the_picture_names_every_file():
    words = {package: re.findall(r"\w+", " ".join(lines)) for package, lines in picture().items()}
    for module in GRAPH:
        package, *rest = module.split(".")
        assert set(rest) <= set(words[package]), module


def test_imports_only_point_up_the_picture():
    at = places()
    for room, targets in ROOMS.items():
        for target in targets:
            if room in at and target in at and room.split(".")[0] == target.split(".")[0]:
                assert at[target] <= at[room], f"{room} imports {target}, which stands below it"


def names_in(tree: ast.AST) -> set[str]:
    """Return every identifier and short text of a file."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.update((node.asname or node.name).split("."))
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(re.findall(r"\w+", node.value) if len(node.value) < 40 else ())
    return found


def members_of(tree: ast.AST) -> dict[str, set[str]]:
    """Return for each class of a file what it and its instances have."""
    return {
        node.name: {name for part in node.body for name in names_in(part)}
        | {name for base in node.bases for name in names_in(base)}
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


CLASSES = {name: has for tree in TREES.values() for name, has in members_of(tree).items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_docstrings_name_what_is_there(path):
    known = names_in(TREES[path]) | set(dir(builtins))
    known |= {part for module in MODULES for part in module.split(".")}
    module = ast.get_docstring(TREES[path]) or ""
    steps = re.findall(r"^\d+\. .*?(?=^\d+\. |^\s*$|\Z)", module, re.MULTILINE | re.DOTALL)
    for text in re.findall(r"`(_?[A-Za-z]\w*)(?:\(\))?`", "".join(steps)):
        assert text in known, f"{text} in the steps of its first docstring"
    for node in ast.walk(TREES[path]):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        for first, second in re.findall(r"`(\w+)\.(_?\w+)`", ast.get_docstring(node) or ""):
            if first in CLASSES:
                assert second in CLASSES[first], f"{first} has no {second}"
            elif any(module.endswith(f".{first}") for module in MODULES) and first != "recorder":
                homes = [TREES[p] for m, p in MODULES.items() if m.endswith(f".{first}")]
                assert any(second in names_in(tree) for tree in homes), f"no {first}.{second}"


def test_the_tree_of_errors_is_drawn_as_it_is():
    for module in GRAPH:
        if not module.endswith("__main__"):
            importlib.import_module(module)
    drawn: dict[str, tuple[str, ...]] = {}
    way: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"((?:[| ]   )*)(?:\+-- )?([A-Z]\w+) {2,}", line):
            depth = 0 if "+-- " not in line else len(match[1]) // 4 + 1
            way = [*way[:depth], match[2]]
            drawn[match[2]] = tuple(way)

    def walk(cls: type, way: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        found = {cls.__name__: (*way, cls.__name__)}
        for child in cls.__subclasses__():
            found |= walk(child, (*way, cls.__name__))
        return found

    assert drawn == walk(errors.GraftError, ())


def test_sides_have_names():
    """A side is a sender or a receiver, a or b; never ours, theirs, mine."""
    for path in FILES:
        tree = TREES[path]
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"ours", "theirs", "mine", "its"}, path


def test_dicts_of_anything_are_few():
    """Data that passes between rooms has a type; what is left are edges: JSON, arguments."""
    count = sum(path.read_text().count("dict[str, Any]") for path in FILES)
    assert count < 30, count


@pytest.mark.parametrize(
    ("row", "columns", "beside"),
    [
        (ManifestRow, schema.COLUMNS, {"attempt", "offset"}),
        (LogRow, log.COLUMNS, set()),
        (DiffRow, diffing.COLUMNS, {"parts", "failed", "is_same", "about"}),
    ],
    ids=["manifest", "log", "diff"],
)
def test_a_row_s_type_has_the_table_s_columns(row, columns, beside):
    assert set(row.__annotations__) - beside == set(columns)


def test_torch_s_private_names_are_used_in_two_files():
    users = [path.name for path in FILES if re.search(r"torch\._C\b|utils\._", path.read_text())]
    assert users == ["bits.py", "checkpoints.py"]  # of tensors, and of autograd


def test_every_package_is_installed():
    """They are listed, since one of them is installed under a name of its own."""
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'"([\w.]+)"', project.partition("packages = [")[2].partition("]")[0])
    folders = {module_of(path) for path in FILES if path.name == "__init__.py"}
    assert set(listed) - {"tensorgraft_entry"} == folders - {"recorder.entering"}
    assert 'tensorgraft_entry = "recorder/entering"' in project
