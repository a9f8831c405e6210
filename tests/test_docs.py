"""The README is complete: every command, option, variable and column stands in it."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from recorder.format import schema
from replayer import log
from replayer.cli import main
from replayer.diffing import columns

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", main.commands)
def test_every_command_and_option_is_described(name):
    command = main.commands[name]
    assert f"graft {name}" in README
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            for option in [*parameter.opts, *parameter.secondary_opts]:
                assert f"`{option}" in README or f"[{option}" in README, option


@pytest.mark.parametrize("name", main.commands)
def test_every_command_s_help_ends_with_an_example(name):
    assert "Example:" in (main.commands[name].help or "")


def test_every_variable_is_described():
    used = set()
    for path in [*(ROOT / "recorder").rglob("*.py"), *(ROOT / "replayer").rglob("*.py")]:
        used |= set(re.findall(r"\bGRAFT_[A-Z_]+\b", path.read_text()))
    described = set(re.findall(r"`(GRAFT_[A-Z_]+)", README))
    assert used - {"GRAFT_"} == described


def test_every_column_is_described():
    for column in [*schema.COLUMNS, *log.COLUMNS, *columns.COLUMNS]:
        assert f"`{column}`" in README, column


def test_every_python_example_is_python():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(block, "README.md", "exec")


def test_every_file_of_the_packages_is_in_the_picture():
    picture = README.split("## How it is built")[1]
    words = set(re.findall(r"[a-z_]+", picture))
    for package in ("recorder", "replayer"):
        for path in (ROOT / package).rglob("*.py"):
            folders = [part for part in path.relative_to(ROOT).parent.parts if part != "demo"]
            names = [*folders, *([path.stem] if path.stem != "__init__" else [])]
            if "demo" not in path.parts:
                assert words >= set(names), path
