"""`graft skill`: print the page that tells an assistant when and how to use all this."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Print one page for an assistant: when and how to use graft.")
def skill() -> None:
    """Print one page that tells an assistant when and how to use graft, and how to read it.

    \b
    Example:
      graft skill > skills/tensorgraft/SKILL.md
    """
    click.echo(Path(__file__).parents[1].joinpath("SKILL.md").read_text(), nl=False)
