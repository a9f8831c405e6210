"""Replay a recording onto another job, compare two recordings, and name what is faulty."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diffing.diff import Diff, diff
    from .finding.bisect import Bisected, bisect
    from .finding.check import Checked, check
    from .finding.localize import Localized, localize
    from .log import read_log
    from .session import Replayer
    from .transforms import GraftInput

_LAZY = {
    "Bisected": "replayer.finding.bisect",
    "Checked": "replayer.finding.check",
    "Diff": "replayer.diffing.diff",
    "GraftInput": "replayer.transforms",
    "Localized": "replayer.finding.localize",
    "Replayer": "replayer.session",
    "bisect": "replayer.finding.bisect",
    "check": "replayer.finding.check",
    "diff": "replayer.diffing.diff",
    "localize": "replayer.finding.localize",
    "read_log": "replayer.log",
}

__all__ = [
    "Bisected",
    "Checked",
    "Diff",
    "GraftInput",
    "Localized",
    "Replayer",
    "bisect",
    "check",
    "diff",
    "localize",
    "read_log",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
