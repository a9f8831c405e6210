"""`graft demo`: parse, one call."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click

from recorder.commands.clicking import expected_errors
from recorder.errors import RecordingError, RecordingExists


@click.command(short_help="Find a planted fault in a small model, start to end.")
@click.option(
    "-o",
    "--out",
    metavar="DIR",
    default="graft-demo",
    show_default=True,
    help="New folder for the demo's recordings.",
)
@click.option("--overwrite", is_flag=True, help="Replace the demo that is in DIR already.")
@expected_errors
def demo(out: str, overwrite: bool) -> None:
    """Record a 4-rank baseline, graft it onto a faulty 2-rank target, and show what that changes.

    Takes under a minute on two cores, uses no network, and prints every command it runs.

    \b
    Example:
      graft demo -o demo
    """
    folder = Path(out)
    if folder.exists():
        if not overwrite:
            raise RecordingExists(folder, "exists already")
        if any(folder.iterdir()) and not (folder / "baseline" / "recording.json").exists():
            raise RecordingError(
                f"{folder} is not the folder of a demo, so it is left alone; name another"
            )
        shutil.rmtree(folder)
    from ..demo.run import run_demo

    sys.exit(run_demo(folder, click.echo))
