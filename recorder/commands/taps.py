"""`graft taps`: run COMMAND, say which modules could be tapped, and what a table finds."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from ..mailbox import SURVEY, SurveyedModule, read_reports
from ..settings import TapSettings
from ..sizes import count
from . import launch
from .clicking import COMMAND, WrappingCommand, expected_errors, note, options_of
from .outcome import of_tables, with_table
from .processes import Processes
from .tables import console_of, natural_width, shape_text, span, table_of, terminal_width

_NOTHING = 1
"""Exit status where no model was called."""


@dataclass(frozen=True)
class Surveyed:
    """What a program's modules are.

    Attributes:
        command_status: the program's own exit status.
        modules: its modules that were called, in the order in which their models have them.
        never: how many were never called.
        notes: what else to say, a line each.
    """

    command_status: int
    modules: tuple[SurveyedModule, ...]
    never: int
    notes: tuple[str, ...]

    @property
    def status(self) -> int:
        """The exit status of the whole."""
        return self.command_status or (0 if self.modules else _NOTHING)


def surveyed(settings: TapSettings, command: Sequence[str], aside: bool = False) -> Surveyed:
    """Run a command and return what could be tapped in it.

    Args:
        settings: a table whose taps are noted at their modules.
        command: its words.
        aside: whether what it prints goes to stderr.

    Raises:
        UsageError: a table cannot be read, or the command cannot be started.
    """
    launch.check(command)
    settings = with_table(settings)
    named = {name.replace("GRAFT_", f"{SURVEY}_", 1): v for name, v in settings.variables().items()}
    silent = dict.fromkeys(TapSettings.PREFIXES)
    with launch.reports_folder() as reports:
        env = launch.environment({SURVEY: "1", **silent, **named}, command, reports)
        processes = Processes()
        status = launch.run(command, env, aside, processes.look)
        found = [one for one in read_reports(reports) if one.get("session") == SURVEY]
        notes = of_tables(settings, reports, processes, always=True)
    modules: dict[tuple[str, int, str], SurveyedModule] = {}
    for report in found:
        for module in report["modules"]:
            modules.setdefault((module["model"], module["root"], module["name"]), module)
    called = tuple(one for one in modules.values() if one["calls"])
    if not called and not found:
        notes = [*notes, "no process said what it called: it imported no torch, or was killed"]
    elif not called:
        notes = [*notes, "no model was called, so nothing could be tapped"]
    return Surveyed(status, called, max((r["never"] for r in found), default=0), tuple(notes))


@click.command(
    "taps", cls=WrappingCommand, short_help="Say what of COMMAND's modules could be tapped."
)
@options_of(TapSettings, without=("step_on", "rows"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone: a list of objects.")
@COMMAND
@expected_errors
def taps(command: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Run COMMAND and say which of its modules could be tapped, and what a table finds.

    Modules that differ by a number alone are one line. Nothing is recorded. Ends with COMMAND's own
    status; else 0, or 1 where no model was called.

    \b
    Example:
      graft taps --taps my/megatron.toml -- torchrun --nproc-per-node 2 train.py
    """
    done = surveyed(TapSettings.named(options), command, aside=as_json)
    if as_json:
        click.echo(json.dumps(list(done.modules), indent=2))
    else:
        _print(done)
    for line in done.notes:
        note(line)
    sys.exit(done.status)


def _print(done: Surveyed) -> None:
    """Print a table of each model."""
    width = terminal_width()
    models: dict[tuple[str, int], list[SurveyedModule]] = {}
    for one in done.modules:
        models.setdefault((one["model"], one["root"]), []).append(one)
    for modules in models.values():
        cells = _cells(modules)
        columns = ["module", "class", "calls", "output", "tap"]
        if not any(cell["tap"] for cell in cells):
            columns.remove("tap")
        for spare in ("calls", "class"):
            if natural_width(columns, cells) > width and (spare == "calls" or "tap" in columns):
                columns.remove(spare)
        table = table_of(*columns, left=columns, folded=("module", "output", "tap"))
        for cell in cells:
            table.add_row(*(cell[column] for column in columns))
        click.echo(f"{modules[0]['model']}: {count(len(modules), 'module')} called")
        console_of(width).print(table)
    if done.never:
        click.echo(f"{count(done.never, 'module')} never called")


def _cells(modules: Sequence[SurveyedModule]) -> list[dict[str, str]]:
    """Return a line for all modules whose names differ by numbers alone, and that are alike."""
    lines: dict[tuple[str, ...], list[SurveyedModule]] = {}
    for one in modules:
        form = re.sub(r"(?<![^.])\d+(?![^.])", "*", one["name"])
        about = (
            form,
            one["class"],
            str(one["calls"]),
            _tensors(one),
            " ".join(map(_named, one["taps"])),
        )
        lines.setdefault(about, []).append(one)
    cells = []
    for (form, kind, calls, output, _), same in lines.items():
        names = [re.findall(r"(?<![^.])\d+(?![^.])", one["name"]) for one in same]
        numbers = [span(sorted({int(n) for n in column})) for column in zip(*names, strict=True)]
        name = form
        for number in numbers:
            name = name.replace("*", number if number.isdigit() else f"{{{number}}}", 1)
        taps = sorted({text for one in same for text in map(_named, one["taps"])})
        cells.append(
            {
                "module": name or "(the model)",
                "class": kind + (" (hands on its input)" if same[0]["is_identity"] else ""),
                "calls": calls,
                "output": output,
                "tap": ", ".join(taps),
            }
        )
    return cells


def _named(tap: str) -> str:
    return tap.partition(" ")[0]


def _tensors(one: Mapping[str, Any]) -> str:
    """Return what a module gives: `float32 2x12x32`, or each member."""
    tensors = one["output"]
    if len(tensors) == 1 and tensors[0]["place"] == "output":
        return f"{tensors[0]['dtype']} {shape_text(tensors[0]['shape'])}"
    return ", ".join(
        f"{t['place'].removeprefix('output')} {t['dtype']} {shape_text(t['shape'])}"
        for t in tensors
    )
