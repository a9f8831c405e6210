"""`graft` alone: its commands in groups, and the nearest to one that is unknown."""

from __future__ import annotations

import re

import pytest
from typed import graft

import recorder
from replayer.cli import GROUPS, main


def test_help_shows_the_groups_in_the_order_of_use():
    shown = graft("--help").stdout
    titles = [shown.index(f"{title}:") for title in GROUPS]
    assert titles == sorted(titles)
    assert {one.name for commands in GROUPS.values() for one in commands} == set(main.commands)
    assert all(f"\n  {name} " in shown for name in main.commands)
    assert all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("recrod", "record"), ("reply", "replay"), ("dif", "diff"), ("verfy", "verify")],
)
def test_an_unknown_command_is_answered_with_the_nearest(typed, nearest):
    done = graft(typed, "--option", "RUN")
    assert done.exit_code == 2
    assert f"no such command '{typed}'; closest: {nearest}" in done.stderr


def test_a_command_like_no_other_is_answered_with_the_help():
    done = graft("xyzzy")
    assert done.exit_code == 2
    assert "no such command 'xyzzy'; graft --help lists the commands" in done.stderr


def test_skill_prints_a_page_whose_commands_and_names_exist():
    page = graft("skill").stdout
    assert page.startswith("---\nname: tensorgraft\n") and len(page.splitlines()) < 90
    named = set(re.findall(r"(?:^|`)graft ([a-z]+) ", page, re.MULTILINE))
    assert named <= set(main.commands) and {"record", "check", "localize", "bisect"} <= named
    for name in re.findall(r"from recorder import (.*)", page)[0].split(", "):
        assert name in recorder.__all__
