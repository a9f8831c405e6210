"""What made a recording: versions, git revision, command."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any


def provenance() -> dict[str, Any]:
    """Return the versions that made a recording, and the git revision where there is one."""
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for name in ("tensorgraft", "torch", "safetensors", "polars", "xxhash"):
        loaded = getattr(sys.modules.get(name), "__version__", None)
        try:
            versions[name] = str(loaded or metadata.version(name))  # loaded says +cpu or +cu too
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "platform": platform.platform(), "git": _git_revision()}


def _git_revision() -> str | None:
    if shutil.which("git") is None:
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def command_line() -> list[str]:
    """Return the command being recorded: the wrapper's, else this process's own."""
    try:
        given = json.loads(os.environ.get("GRAFT_COMMAND", ""))
    except ValueError:
        given = None
    if isinstance(given, list) and all(isinstance(part, str) for part in given):
        return given
    return list(sys.argv)
