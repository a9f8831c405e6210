"""How often caches were written while nobody looked: what was known of their places is then void.

A model that runs while nothing records, and a CUDA graph that is replayed, write into the places of
a cache, and no hook hears of it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

_count = 0
_running = threading.local()
_plain: Callable[..., Any] | None = None


def count() -> int:
    """Return how often it happened so far."""
    return _count


def note() -> None:
    """Note that it happened."""
    global _count
    _count += 1


def is_running(whether: bool) -> None:
    """Say whether a call that is followed runs in this thread: its own graphs are no others'."""
    _running.now = whether


def watch_graphs() -> None:
    """Note each replay of a CUDA graph outside of a call that is followed, from now on."""
    global _plain
    graph: Any = torch.cuda.CUDAGraph
    if _plain is not None:
        return
    _plain = plain = graph.replay

    @functools.wraps(plain)
    def replay(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(_running, "now", False):
            note()
        return plain(self, *args, **kwargs)

    graph.replay = replay


def leave_graphs() -> None:
    """Leave torch as it was."""
    global _plain
    graph: Any = torch.cuda.CUDAGraph
    if _plain is not None and getattr(graph.replay, "__wrapped__", None) is _plain:
        graph.replay = _plain
    _plain = None
