"""Replay a recording onto another job, and compare two recordings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diffing.diff import Diff, diff
    from .log import read_log
    from .session import Replayer
    from .transforms import GraftInput

_LAZY = {
    "Diff": "replayer.diffing.diff",
    "GraftInput": "replayer.transforms",
    "Replayer": "replayer.session",
    "diff": "replayer.diffing.diff",
    "read_log": "replayer.log",
}

__all__ = ["Diff", "GraftInput", "Replayer", "diff", "read_log"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
