"""Functions of users by their dotted path: `pkg.mod.fn`."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path
from typing import Any

from .errors import UsageError


def is_path(text: str) -> bool:
    """Whether a text is a dotted path."""
    parts = text.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def imported(path: str, what: str) -> Any:
    """Return what a dotted path names.

    The working directory is searched after `sys.path`, as users expect of a command line.

    Args:
        path: the path.
        what: what it is for, for messages.

    Raises:
        UsageError: it cannot be imported.
    """
    if not is_path(path):
        raise UsageError(f"{what} {path!r} is not a path such as pkg.mod.fn")
    name, _, attribute = path.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # for good: the module may import from there later
    try:
        module = importlib.import_module(name)
    except Exception as err:
        raise UsageError(
            f"{what} {path!r} cannot be imported: {type(err).__name__}: {err}; "
            "check the path, and PYTHONPATH in the job's environment"
        ) from err
    found = getattr(module, attribute, None)
    if found is None:
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(attribute, names, 6, cutoff=0)
        raise UsageError(
            f"{what} {path!r} cannot be imported: module {name} has no {attribute!r}; "
            f"it has {', '.join(near) or 'no functions'}"
        )
    return found
