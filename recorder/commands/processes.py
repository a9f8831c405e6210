"""Which processes of a command run torch and never loaded tensorgraft, so that no tap reached them.

`Processes.look` is called now and then while the command runs, and notes its descendants; where
there is no /proc, as on macOS, nobody is noted but the command itself.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

_PROC = Path("/proc")
_TORCH = b"/libtorch"
_TRIAL = "from ctypes import cdll"  # in which torch's compiler tries what this machine can do
_MOST = 4  # named in a line


class Processes:
    """The processes of one command, as far as they were seen."""

    def __init__(self) -> None:
        self._words: dict[int, str] = {}
        self._parents: dict[int, int] = {}
        self._has_torch: set[int] = set()

    @property
    def seen(self) -> str:
        """How many there were."""
        return _processes(max(1, len(self._words)))

    def look(self, root: int) -> None:
        """Note the command and its descendants."""
        children: dict[int, list[int]] = {}
        for folder in _PROC.glob("[0-9]*") if _PROC.is_dir() else ():
            try:
                stat = (folder / "stat").read_text()
                parent = int(stat.rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            children.setdefault(parent, []).append(int(folder.name))
        waiting = [root]
        while waiting:
            pid = waiting.pop()
            waiting += children.get(pid, ())
            self._note(pid, children)

    def _note(self, pid: int, children: dict[int, list[int]]) -> None:
        folder = _PROC / str(pid)
        for child in children.get(pid, ()):
            self._parents[child] = pid
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            text = b" ".join(words).decode(errors="replace").strip()
            if text or pid not in self._words:  # one that has just ended has none any more
                self._words[pid] = text
            if pid not in self._has_torch and _TORCH in (folder / "maps").read_bytes():
                self._has_torch.add(pid)
        except OSError:
            pass  # it has ended, or is another user's

    def without(self, loaded: Collection[int]) -> list[str]:
        """Return the processes that run torch and are not among those that loaded tensorgraft.

        One that was forked from another is as that one is.
        """
        found = []
        for pid in sorted(self._has_torch):
            if pid in loaded or _TRIAL in self._words.get(pid, ""):
                continue
            parent = self._parents.get(pid, 0)
            if parent in loaded and self._words.get(parent) == self._words.get(pid):
                continue
            found.append(f"pid {pid}: {self._words.get(pid, '?')[:80]}")
        return found


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def never_loaded(found: Collection[str]) -> str:
    """Return the line for some processes that never loaded tensorgraft."""
    some = "; ".join(list(found)[:_MOST]) + ("; ..." if len(found) > _MOST else "")
    return (
        f"{_processes(len(found))} of the command never loaded tensorgraft, and no module of "
        f"theirs is tapped: {some}; tensorgraft is to be installed where they import torch, and "
        "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps it out of python -I, -E, and where it is set later"
    )
