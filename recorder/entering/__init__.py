"""The way into a program that does not import tensorgraft: torch calls `enter` as it is imported.

It is an entry point of the group `torch.backends`, so it runs in every process that imports torch,
and must cost nothing there: without `GRAFT_*` it returns at once, and an error in it stays here. It
is installed as a package of its own, `tensorgraft_entry`, since a job may have a `recorder.py`,
which must not keep torch from being imported.
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
        from recorder.modules.watch import watch_environment

        watch_environment()
    except Exception as err:  # an error here would break `import torch` for everybody
        if sys.stderr is not None and is_asked:
            sys.stderr.write(f"[graft] {_why(err)}\n")


def _why(err: Exception) -> str:
    """Say why nothing is tapped in this process."""
    found = getattr(sys.modules.get("recorder"), "__file__", None)
    if isinstance(err, ImportError) and found and "modules" in str(err):
        return (
            f"this process is not tapped: its own {found} stands before tensorgraft's package of "
            "that name; call it otherwise"
        )
    return f"modules of this process are not tapped: {type(err).__name__}: {err}"
