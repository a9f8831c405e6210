"""Tap tensors, record them from every rank, and read recordings back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .taps.tap import context, step, tap

if TYPE_CHECKING:
    from .errors import GraftError
    from .filters import Filter
    from .mesh import declare_mesh, global_layer
    from .recording import Recording
    from .session import Recorder

# Loaded when first asked for: a job that only taps, and the command line, need neither torch's
# nor polars' import time.
_LAZY = {
    "Filter": "recorder.filters",
    "GraftError": "recorder.errors",
    "Recorder": "recorder.session",
    "Recording": "recorder.recording",
    "declare_mesh": "recorder.mesh",
    "global_layer": "recorder.mesh",
}

__all__ = [
    "Filter",
    "GraftError",
    "Recorder",
    "Recording",
    "context",
    "declare_mesh",
    "global_layer",
    "step",
    "tap",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
