"""How far a recording is: from the writer of each rank to one line for whoever watches.

1. A rank's writer hands its `Progress` to `publish`, once a second at most.
2. Under a wrapper that goes to the folder of reports; `Watcher` there adds up the ranks of its
   machine and says a line. Without a wrapper, rank 0 says its own.

Lines, not a bar: COMMAND writes to the same terminal. They come after 1 s, 2 s, 4 s and so on, in
the end once a minute, and only while something is recorded.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from .mailbox import VARIABLE
from .sizes import count, format_size

SECONDS = 1.0
"""How often a rank tells how far it is."""
_FIRST, _LONGEST = 1.0, 60.0
_SUFFIX = ".progress"


@dataclass(frozen=True)
class Progress:
    """How far a writer is.

    Attributes:
        staged: bytes of payload taken so far, repeats included.
        waiting: bytes of these that wait to be written.
        dropped: taps left out because there was no room.
        dropped_bytes: their bytes.
        seconds: since the first of them.
        held: seconds in which the job waited for room.
    """

    staged: int = 0
    waiting: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    seconds: float = 0.0
    held: float = 0.0

    @property
    def written(self) -> int:
        """Bytes that were dealt with."""
        return max(0, self.staged - self.waiting)

    def __add__(self, other: Progress) -> Progress:
        """Return that of two ranks side by side."""
        return Progress(
            self.staged + other.staged,
            self.waiting + other.waiting,
            self.dropped + other.dropped,
            self.dropped_bytes + other.dropped_bytes,
            max(self.seconds, other.seconds),
            max(self.held, other.held),
        )


class Teller:
    """Says lines of progress, ever more rarely."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._start = self._last = time.monotonic()
        self._wait = _FIRST
        self._written = 0

    def tell(self, progress: Progress) -> None:
        """Say how far it is, if it is time to and something has come."""
        now = time.monotonic()
        if now - self._last < self._wait or progress.written == self._written:
            return
        rate = (progress.written - self._written) / (now - self._last)
        parts = [
            f"{format_size(progress.written)} recorded",
            f"{format_size(rate)}/s",
            f"{format_size(progress.waiting)} waiting",
        ]
        if progress.held >= 0.1:
            parts.append(f"the job was held {progress.held:.1f} s")
        if progress.dropped:
            parts.append(f"{count(progress.dropped, 'tap')} dropped")
        self._say(", ".join(parts))
        self._last, self._written = now, progress.written
        self._wait = min(2 * self._wait, _LONGEST)


class Publisher:
    """Takes one rank's progress to where it is watched.

    Args:
        rank: the rank.
        say: says a line for this rank; used where there is no wrapper and stderr is a terminal.
    """

    def __init__(self, rank: int, say: Callable[[str], None]) -> None:
        folder = os.environ.get(VARIABLE)
        self._path = Path(folder) / f"{rank}-{os.getpid()}{_SUFFIX}" if folder else None
        self._teller: Teller | None = None
        if self._path is None and rank == 0 and is_terminal():
            self._teller = Teller(say)

    def publish(self, progress: Progress) -> None:
        """Tell how far the rank is; never raises."""
        if self._teller is not None:
            self._teller.tell(progress)
        if self._path is None:
            return
        try:
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(progress)))
            temporary.replace(self._path)
        except OSError:
            self._path = None  # the wrapper is gone


def read_progress(folder: Path) -> dict[tuple[int, int], Progress]:
    """Return how far the ranks that report to a folder are, by rank and process id."""
    found = {}
    for path in folder.glob("*" + _SUFFIX):
        rank, _, pid = path.name.removesuffix(_SUFFIX).partition("-")
        try:
            found[int(rank), int(pid)] = Progress(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue  # just being replaced
    return found


class Watcher:
    """Says lines of progress for all ranks that report to a folder, from a thread of its own."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="graft-progress", daemon=True)

    def __enter__(self) -> Watcher:
        if is_terminal():
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        # Signals are the main thread's, which may wait for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        teller = Teller(self._say)
        while not self._end.wait(SECONDS):
            teller.tell(sum(read_progress(self._folder).values(), Progress()))


def is_terminal() -> bool:
    """Whether stderr is one."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
