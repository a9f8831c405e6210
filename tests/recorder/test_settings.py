"""Options: each stands in its settings class and in a session's signature, and nowhere else."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import recorder
import replayer
from recorder import Recorder
from recorder.errors import UsageError
from recorder.filters import Filter
from recorder.format import disk
from recorder.paths import parse_path
from recorder.settings import RecordSettings, Settings
from replayer import Replayer
from replayer.cli import main
from replayer.rename import Rename
from replayer.settings import ReplaySettings

SIDES = [
    (RecordSettings, Recorder, "record"),
    (ReplaySettings, Replayer, "replay"),
]
NO_OPTION = {"self", "path", "out", "rank", "world_size"}

# For each option a text that its variable and its flag take, and what is meant by it.
TAPS = {
    "modules": ("*.mlp; lm_head:input", (parse_path("*.mlp"), parse_path("lm_head:input"))),
    "taps": ("auto", "auto"),
    "step_on": ("root", "root"),
    "rows": ("pkg.mod.fn", "pkg.mod.fn"),
}
VALUES = {
    RecordSettings: {
        **TAPS,
        "filter": ('name == "x"', Filter.parse('name == "x"')),
        "level": ("stats", "stats"),
        "max_bytes": ("20GB", 20 * 10**9),
        "min_free": ("1GiB", 1 << 30),
        "keep_last": ("3", 3),
        "fsync": ("step", "step"),
        "access": ("group", "group"),
        "staging": ("64MiB", 64 << 20),
        "when_full": ("drop", "drop"),
        "max_hold": ("500ms", 0.5),
        "overwrite": ("1", True),
    },
    ReplaySettings: {
        **TAPS,
        "filter": ("layer < 3", Filter.parse("layer < 3")),
        "transform": ("pkg.mod.fn", "pkg.mod.fn"),
        "record": ("True", Filter.parse("True")),
        "match_on": ("name,layer", "name,layer"),
        "step_offset": ("-2", -2),
        "on_error": ("raise", "raise"),
        "on_missing": ("raise", "raise"),
        "strict": ("1", True),
        "metrics": ("0", False),
        "own_error": ("1", True),
        "only": ("taps.json", "taps.json"),
        "check": ("0", False),
        "replicas": ("first", "first"),
        "rename": ("a=b.{i}; c=d", (Rename.parse("a=b.{i}"), Rename.parse("c=d"))),
        "overwrite": ("1", True),
    },
}


@pytest.mark.parametrize(("settings", "session", "command"), SIDES)
def test_the_signature_has_every_option_with_its_default(settings, session, command):
    arguments = inspect.signature(session.__init__).parameters
    options = {one.name: one.default for one in settings.options()}
    assert {n: a.default for n, a in arguments.items() if n not in NO_OPTION} == options


@pytest.mark.parametrize(("settings", "session", "command"), SIDES)
def test_the_command_has_every_option(settings, session, command):
    shown = CliRunner().invoke(main, [command, "--help"]).output
    for one in settings.options():
        assert one.flag.split("/")[0] in shown and one.variable in shown, one.name


@pytest.mark.parametrize("settings", VALUES)
def test_an_option_is_named_in_two_places(settings):
    """Two lines that define it; all other places use it."""
    defined = re.compile(r"^ +(?:self\.)?({}): [^\n]*=".format("|".join(VALUES[settings])), re.M)
    found: dict[str, list[str]] = {}
    for package in (recorder, replayer):
        folder = Path(package.__file__).parent
        for name in ("settings.py", "session.py"):
            for match in defined.finditer((folder / name).read_text()):
                found.setdefault(match[1], []).append(f"{folder.name}/{name}")
    own = "recorder" if settings is RecordSettings else "replayer"
    for name in VALUES[settings]:
        both = (own, "recorder/settings") if name in TAPS else (own,)
        places = sorted(place for place in found[name] if place.startswith(both))
        where = "recorder" if name in TAPS else own  # both sessions have the options of taps
        assert places == sorted([f"{own}/session.py", f"{where}/settings.py"]), name


@pytest.mark.parametrize("settings", VALUES)
def test_settings_go_through_the_environment_and_come_back(settings):
    assert set(VALUES[settings]) == {one.name for one in settings.options()}
    given = settings.given({name: value for name, (_, value) in VALUES[settings].items()})
    variables = {k: v for k, v in given.variables().items() if v is not None}
    assert set(variables) == {one.variable for one in settings.options()}
    assert settings.from_variables(variables) == given
    assert not any(settings().variables().values()) and settings.from_variables({}) == settings()


@pytest.mark.parametrize(
    ("settings", "name"), [(s, name) for s, values in VALUES.items() for name in values]
)
def test_text_means_the_same_as_argument_and_as_variable(settings: type[Settings], name):
    text, meant = VALUES[settings][name]
    (option,) = (one for one in settings.options() if one.name == name)
    assert getattr(settings.from_variables({option.variable: text}), name) == meant
    if not option.is_flag:
        assert getattr(settings.given({name: text}), name) == meant


@pytest.mark.parametrize(
    ("settings", "name", "wrong"),
    [
        (RecordSettings, "level", "some"),
        (RecordSettings, "level", None),
        (RecordSettings, "staging", None),
        (ReplaySettings, "on_error", None),
        (ReplaySettings, "step_offset", None),
        (RecordSettings, "keep_last", "0"),
        (RecordSettings, "keep_last", True),
        (RecordSettings, "max_bytes", "much"),
        (RecordSettings, "staging", "9999999TiB"),
        (RecordSettings, "max_hold", "2h"),
        (RecordSettings, "max_hold", "-1"),
        (RecordSettings, "max_hold", True),
        (RecordSettings, "max_hold", float("nan")),
        (ReplaySettings, "step_offset", "1.5"),
        (ReplaySettings, "step_offset", True),
        (ReplaySettings, "on_error", "stop"),
        (ReplaySettings, "match_on", "name,,"),
        (ReplaySettings, "filter", "layer <"),
    ],
)
def test_a_wrong_value_is_refused_as_argument_and_as_variable(settings, name, wrong):
    with pytest.raises(UsageError):
        settings.given({name: wrong})
    if isinstance(wrong, str):
        (option,) = (one for one in settings.options() if one.name == name)
        with pytest.raises(UsageError):
            settings.from_variables({option.variable: wrong})


@pytest.mark.parametrize("text", ["treu", "2", "10"])
@pytest.mark.parametrize("name", ["strict", "check"])
def test_a_flag_s_variable_is_yes_or_no(name, text):
    with pytest.raises(UsageError, match="give 1 for yes, or 0 for no"):
        ReplaySettings.from_variables({f"GRAFT_REPLAY_{name.upper()}": text})
    for given, meant in (("1", True), ("0", False), ("true", True), ("No", False), ("ON", True)):
        settings = ReplaySettings.from_variables({f"GRAFT_REPLAY_{name.upper()}": given})
        assert getattr(settings, name) is meant


def test_a_function_cannot_go_to_other_processes():
    settings = ReplaySettings.given({"transform": lambda g: g.target})
    with pytest.raises(UsageError, match="give its path"):
        settings.variables()


def test_each_access_is_known_to_the_disk():
    (access,) = (one for one in RecordSettings.options() if one.name == "access")
    assert set(access.choices) == set(disk.ACCESS)
