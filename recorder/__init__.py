"""Tap tensors, record them from every rank, and read recordings back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import GraftError
    from .filters import Filter
    from .mesh import declare_mesh, global_layer
    from .modules.attach import attach, follow_rows
    from .recording import Recording
    from .session import Recorder
    from .taps.blocks import context, rows
    from .taps.tap import step, tap
    from .tokens.book import TokenBook
    from .tokens.rows import token_rows

# Loaded when first asked for: a job that only taps, and the command line, need neither torch's
# nor polars' import time; and torch itself loads this package, in programs that want none of it.
_LAZY = {
    "Filter": "recorder.filters",
    "GraftError": "recorder.errors",
    "Recorder": "recorder.session",
    "Recording": "recorder.recording",
    "TokenBook": "recorder.tokens.book",
    "attach": "recorder.modules.attach",
    "context": "recorder.taps.blocks",
    "declare_mesh": "recorder.mesh",
    "follow_rows": "recorder.modules.attach",
    "global_layer": "recorder.mesh",
    "rows": "recorder.taps.blocks",
    "step": "recorder.taps.tap",
    "tap": "recorder.taps.tap",
    "token_rows": "recorder.tokens.rows",
}

__all__ = [
    "Filter",
    "GraftError",
    "Recorder",
    "Recording",
    "TokenBook",
    "attach",
    "context",
    "declare_mesh",
    "follow_rows",
    "global_layer",
    "rows",
    "step",
    "tap",
    "token_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return found


def __dir__() -> list[str]:
    return __all__
