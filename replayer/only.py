"""Which taps a trial grafts, where it is some of many: a file that names them.

The file is a JSON list of [name, tags, kind], the tags as canonical JSON without the name. Of what
it names all steps and occurrences are grafted, and nothing else is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from recorder.errors import UsageError
from recorder.tags import Key, label


class Tap(NamedTuple):
    """A tap of all steps and occurrences."""

    name: str
    tags: str
    kind: str

    @property
    def label(self) -> str:
        """Name and tags, as messages have them; a gradient's says so."""
        return label(self.name, self.tags) + (" (gradient)" if self.kind == "grad" else "")


def write(path: Path, taps: Iterable[Tap]) -> None:
    """Write a file that names some taps."""
    path.write_text(json.dumps([list(tap) for tap in taps]))


class Only:
    """The taps that a file names.

    Args:
        path: the file.

    Raises:
        UsageError: it cannot be read, or is no such list.
    """

    def __init__(self, path: str) -> None:
        try:
            self._taps = {Tap(*map(str, one)) for one in json.loads(Path(path).read_text())}
        except (OSError, ValueError, TypeError) as err:
            raise UsageError(
                f"--only {path} is no list of [name, tags, kind], as graft bisect writes it: {err}"
            ) from None

    def has(self, key: Key, kind: str) -> bool:
        """Whether a tap of some kind is named."""
        return Tap(key.name, key.tags, kind) in self._taps
