"""A command line run in this process."""

from __future__ import annotations

import inspect

from click.testing import CliRunner, Result

from replayer.cli import main

# Before 8.2, click kept standard error apart only where it was asked to.
_APART = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}


def graft(*words: object) -> Result:
    """Run `graft` with words; what it prints is captured."""
    return CliRunner(**_APART).invoke(main, [str(word) for word in words])
