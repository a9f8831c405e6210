"""What fires taps in compiled programs, by numbers: an operator is given nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..tags import TagValue


class Source(Protocol):
    """A row of a table at a module."""

    def tap_tags(self) -> Mapping[str, TagValue]:
        """Hear that its tap fires; return the tags."""


class Pinged(Protocol):
    """A hook that does something as its module is called."""

    @property
    def ping(self) -> Callable[[], None] | None:
        """What it does."""


sources: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""Each a `Source`, a `Pinged` or a function by its path, as whoever put it there knows."""
