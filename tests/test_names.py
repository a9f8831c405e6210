"""The public names, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import recorder
import replayer

ROOT = Path(recorder.__file__).parent.parent


@pytest.mark.parametrize("package", [recorder, replayer])
def test_public_names_are_sorted_and_there(package):
    assert sorted(package.__all__) == package.__all__
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError):
        package.nothing  # noqa: B018


def test_recorder_never_imports_replayer():
    for path in (ROOT / "recorder").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [n for n in names if n.split(".")[0] == "replayer"], path


@pytest.mark.processes
def test_a_tap_that_is_not_active_and_the_help_cost_no_import_of_torch_or_polars():
    code = (
        "import sys, recorder; from recorder import tap; tap('x', 1); import replayer.cli; "
        "print(sorted({'torch', 'polars', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
