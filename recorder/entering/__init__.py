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
    why = ""
    try:
        why = _in_the_way()
        if not why:
            from recorder.modules.watch import watch_environment

            watch_environment()
    except Exception as err:  # an error here would break `import torch` for everybody
        why = f"modules of this process are not tapped: {type(err).__name__}: {err}"
    if why and is_asked and sys.stderr is not None:
        sys.stderr.write(f"[graft] {why}\n")


def _in_the_way() -> str:
    """Say what of the job's stands before tensorgraft's package; it is not run to find out."""
    from importlib import util

    spec = util.find_spec("recorder")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    if any(os.path.exists(f"{one}/modules/watch.py") for one in folders):  # noqa: PTH110  # no pathlib
        return ""
    where = "nothing" if spec is None else spec.origin
    return (
        f"this process is not tapped: its own {where} stands before tensorgraft's package of that "
        "name; call it otherwise"
    )
