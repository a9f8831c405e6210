"""The public names."""

from __future__ import annotations

import re
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


def test_names_that_the_readmes_import_are_public():
    found = set()
    for place in ("README.md", "recorder/README.md", "replayer/README.md"):
        text = (ROOT / place).read_text()
        for module, names in re.findall(r"^from (recorder|replayer) import (.+)$", text, re.M):
            found |= {(module, name.strip()) for name in names.split(",")}
    assert len(found) > 5
    for module, name in found:
        assert name in {"recorder": recorder, "replayer": replayer}[module].__all__, name


@pytest.mark.processes
def test_a_tap_that_is_not_active_and_the_help_cost_no_import_of_torch_or_polars():
    code = (
        "import sys, recorder; from recorder import tap; tap('x', 1); import replayer.cli; "
        "print(sorted({'torch', 'polars', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
