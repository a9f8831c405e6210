"""The `graft` command: its commands, in groups, as they are used."""

from __future__ import annotations

import warnings

import click

from recorder.commands.cli import ls, record, show, verify
from recorder.commands.clicking import Group
from recorder.commands.ctl import ctl
from recorder.commands.importing import import_
from recorder.commands.taps import taps
from recorder.diagnostics import NO_NUMPY

from .commands.bisect import bisect
from .commands.check import check
from .commands.demo import demo
from .commands.diff import diff
from .commands.doctor import doctor
from .commands.localize import localize
from .commands.replay import replay
from .commands.skill import skill


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tensorgraft", prog_name="graft")
def main() -> None:
    """Record tensors from a baseline, graft them onto a target, and see what that changes.

    \b
    Exit status: COMMAND's own when that is not 0; else
      0  fine
      1  localize names a fault; the comparison differs, or compared nothing;
         check found a change, verify damage
      2  wrong usage, or an unreadable recording
      3  COMMAND ended well, but the recording or replay is not to be trusted
    """
    warnings.filterwarnings("ignore", NO_NUMPY)


GROUPS: dict[str, tuple[click.Command, ...]] = {
    "Start here": (demo, doctor, skill),
    "Record and replay": (record, replay, ctl, import_),
    "Find the fault": (localize, check, bisect, diff),
    "Look": (taps, ls, show),
    "Keep": (verify,),
}
for title, commands in GROUPS.items():
    for command in commands:
        main.add_to(title, command)


if __name__ == "__main__":
    main()
