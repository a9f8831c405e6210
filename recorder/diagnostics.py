"""Lines for people on stderr, and where in the user's code they come from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType

_OWN = ("recorder.", "replayer.")
_EXAMPLES = "replayer.demo."  # a job as users write them
_ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = tuple(f"{_ROOT / name}{os.sep}" for name in ("recorder", "replayer"))
_passed: set[str] = set()
_FOLDER_OF_EXAMPLES = f"{_ROOT / 'replayer' / 'demo'}{os.sep}"


def call_site() -> str:
    """Return `file:line` of the innermost caller outside these packages and torch.

    Where all of them are torch's, as in a thread of its own, that of the innermost.
    """
    frame: FrameType | None = sys._getframe(1)
    outside: FrameType | None = None
    while frame is not None:
        if not _is_own(frame.f_globals.get("__package__")):
            outside = outside or frame
            if not (_is_torch_s(frame) or frame.f_code.co_filename in _passed):
                break
        frame = frame.f_back
    found = frame or outside or sys._getframe(1)
    return f"{found.f_code.co_filename}:{found.f_lineno}"


def pass_over(path: str) -> None:
    """Let no call site be in a file, as of a library through which a program taps."""
    _passed.add(path)


def _is_own(package: object) -> bool:
    name = f"{package}."
    return name.startswith(_OWN) and not name.startswith(_EXAMPLES)


def is_own(path: str) -> bool:
    """Whether a file is of these packages, or passed over, and not of the job."""
    is_ours = path.startswith(_FOLDERS) and not path.startswith(_FOLDER_OF_EXAMPLES)
    return is_ours or path in _passed


def _is_torch_s(frame: FrameType) -> bool:
    name = f"{frame.f_globals.get('__name__')}."
    return name.startswith("torch.") or "_dynamo" in frame.f_code.co_filename


NO_NUMPY = "Failed to initialize NumPy"
"""What torch warns of at every start where there is no numpy, which nothing here uses."""


def say(message: str, where: str = "") -> None:
    """Write one diagnostic line to stderr: `[graft rank=3 step=7] ...`."""
    prefix = f"[graft {where}]" if where else "[graft]"
    text = " ".join(message.split("\n"))
    if sys.stderr is None:  # closed before Python began
        return
    try:
        sys.stderr.write(f"{prefix} {printable(text)}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # a closed stderr must not end the job


def printable(text: str) -> str:
    """Return text without control characters, so that recorded names cannot steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Warnings:
    """Says each distinct thing once, and no more than a hundred of them."""

    def __init__(self) -> None:
        self._said: set[tuple[str, ...]] = set()
        self._also: set[object] = set()

    def once(self, about: tuple[str, ...], message: str, where: str, also: object = None) -> None:
        """Say `message` unless something about the same was said before, or about `also`."""
        told = about in self._said or (also is not None and also in self._also)
        self._also.add(also)
        if told or len(self._said) > 100:
            return
        self._said.add(about)
        if len(self._said) > 100:
            message = "more such warnings follow and are left out"
        say(message, where)
