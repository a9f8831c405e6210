"""Files that a diff writes: whole or not at all, and never over a recording."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from recorder.errors import UsageError
from recorder.format.schema import RECORDING


def check_outputs(outputs: Sequence[Path]) -> None:
    """Refuse files that cannot be written, before the work.

    Raises:
        UsageError: one cannot be, is part of a recording, or named twice.
    """
    for path in outputs:
        folder = path.resolve().parent
        if not folder.is_dir():
            raise UsageError(
                f"{folder} is not a folder, so {path.name} cannot be written there; make it first"
            )
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file")
        if any((parent / RECORDING).exists() for parent in (folder, *folder.parents)):
            raise UsageError(f"{path} is inside a recording; name a file elsewhere")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise UsageError(f"{path} cannot be written; choose a place you may write to")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UsageError(f"{outputs[0]} is named twice; give each output a file of its own")


def written(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file aside and put it in place when it is whole; a link is followed.

    Args:
        path: the file. A device or pipe is written to as it is.
        write: writes to the file it is given.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        write(path)
        return
    path = path.resolve()
    handle, name = tempfile.mkstemp(prefix=".graft-", dir=path.parent)
    os.close(handle)
    spare = Path(name)
    try:
        write(spare)
        mask = os.umask(0)
        os.umask(mask)
        spare.chmod(0o666 & ~mask)
        spare.replace(path)
    finally:
        spare.unlink(missing_ok=True)
