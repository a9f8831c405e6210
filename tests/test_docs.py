"""The READMEs are complete: every command, option, variable and column stands in them."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from recorder.format import schema
from recorder.settings import Option, RecordSettings
from replayer import log
from replayer.cli import GROUPS, main
from replayer.diffing import columns
from replayer.settings import ReplaySettings

ROOT = Path(__file__).parent.parent
ROOT_README = (ROOT / "README.md").read_text()
PLACES = (
    "README.md",
    "recorder/README.md",
    "recorder/tokens/README.md",
    "replayer/README.md",
    "replayer/finding/README.md",
    "tests/benchmarks/README.md",
)
READMES = {place: (ROOT / place).read_text() for place in PLACES}
ALL = "\n".join(READMES.values())


@pytest.mark.parametrize("name", main.commands)
def test_every_command_and_option_is_described(name):
    command = main.commands[name]
    assert f"graft {name}" in ALL
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            for option in [*parameter.opts, *parameter.secondary_opts]:
                assert f"`{option}" in ALL or f"[{option}" in ALL, option


@pytest.mark.parametrize("name", main.commands)
def test_every_command_s_help_ends_with_an_example(name):
    paragraphs = (main.commands[name].help or "").split("\n\n")
    assert "Example:" in paragraphs[-1]


def test_the_groups_of_the_help_hold_every_command():
    grouped = [str(command.name) for commands in GROUPS.values() for command in commands]
    assert sorted(grouped) == sorted(main.commands)


def row_of(option: Option) -> str:
    """Return an option's row in a README's table, read off the option itself."""
    names = ", ".join(f"`{name}`" for name in option.flag.split("/"))
    values = ", ".join(option.choices) or option.metavar
    text = option.help[0].lower() + option.help[1:].removesuffix(".")
    default = f" (default: {option.default_text})" if option.default_text else ""
    return (
        f"| {' '.join(filter(None, [names, values]))} | `{option.assignment}` | {text}{default} |"
    )


@pytest.mark.parametrize(
    ("place", "settings"),
    [("recorder/README.md", RecordSettings), ("replayer/README.md", ReplaySettings)],
)
def test_the_tables_of_options_are_those_of_the_settings(place, settings):
    for option in settings.options():
        assert row_of(option) in READMES[place].splitlines(), row_of(option)


def test_every_variable_is_described():
    used = {one.variable for each in (RecordSettings, ReplaySettings) for one in each.options()}
    for path in [*(ROOT / "recorder").rglob("*.py"), *(ROOT / "replayer").rglob("*.py")]:
        used |= set(re.findall(r"\bGRAFT_[A-Z_]*[A-Z]\b", path.read_text()))
    assert used == set(re.findall(r"`(GRAFT_[A-Z_]+)", ALL))


def test_every_column_is_described():
    for column in [*schema.COLUMNS, *log.COLUMNS, *columns.COLUMNS]:
        assert f"`{column}`" in ALL, column


@pytest.mark.parametrize("place", PLACES)
def test_every_python_example_is_python(place):
    for block in re.findall(r"```python\n(.*?)```", READMES[place], re.DOTALL):
        compile(block, place, "exec")


@pytest.mark.parametrize("place", [*PLACES, "CONTRIBUTING.md"])
def test_every_link_leads_somewhere(place):
    text = (ROOT / place).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if "://" in target:
            continue
        there = (ROOT / place).parent / path if path else ROOT / place
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert heading in slugs, target


def test_the_first_page_is_short():
    assert len(ROOT_README.splitlines()) <= 250
