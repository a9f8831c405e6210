"""The way into a program that does not import tensorgraft: torch calls `enter` as it is imported.

It is an entry point of the group `torch.backends`, so it runs in every process that imports torch,
and must cost nothing there: without `GRAFT_*` it returns at once, and an error in it stays here.
"""

from __future__ import annotations

import os
import sys


def enter() -> None:
    """Begin what the environment asks for."""
    environ = os.environ
    is_asked = not environ.keys().isdisjoint(("GRAFT_RECORD", "GRAFT_REPLAY", "GRAFT_SURVEY"))
    # Ray gives some of its workers their environment when they run already.
    if not is_asked and "ray" not in sys.modules:
        return
    try:
        from .modules.watch import watch_environment

        watch_environment()
    except Exception as err:  # an error here would break `import torch` for everybody
        if sys.stderr is not None:
            sys.stderr.write(f"[graft] taps without edits are off: {type(err).__name__}: {err}\n")
