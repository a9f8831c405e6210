"""Run a command with `GRAFT_*` set, its own stdin and stdout, and signals passed on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..job import new_job_id
from ..mailbox import VARIABLE as REPORTS

_PASSED_ON = ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGWINCH")
_FROM_THE_KEYBOARD = ("SIGINT", "SIGQUIT", "SIGWINCH")


@contextmanager
def reports_folder() -> Iterator[Path]:
    """Make a folder for what the ranks report, and remove it in the end."""
    with tempfile.TemporaryDirectory(prefix="graft-") as folder:
        yield Path(folder)


def environment(
    options: Mapping[str, str | None], command: Sequence[str], reports: Path
) -> dict[str, str]:
    """Return the environment for a command.

    Args:
        options: variables to set; one that is None is removed, so that nothing set outside leaks
            into what was typed.
        command: the command, recorded for provenance.
        reports: the folder for reports.
    """
    new = dict(os.environ)
    for name, value in options.items():
        if value is None:
            new.pop(name, None)
        else:
            new[name] = value
    new.setdefault("GRAFT_JOB", new_job_id())
    new["GRAFT_COMMAND"] = json.dumps(list(command))
    new[REPORTS] = str(reports)
    return new


def check(command: Sequence[str]) -> None:
    """Refuse a command that is none.

    Raises:
        UsageError: it has no first word.
    """
    if not command or not command[0]:
        raise UsageError("there is no command to run; write it after --, as in: -- python train.py")


def run(command: Sequence[str], env: Mapping[str, str], aside: bool = False) -> int:
    """Run a command to its end and return its exit status; 128 + N where signal N ended it.

    Args:
        command: its words.
        env: its environment.
        aside: whether what it prints goes to stderr, since stdout is for a result.

    Raises:
        UsageError: it cannot be started.
    """
    with _Signals() as signals:
        try:
            process = subprocess.Popen(
                list(command), env=dict(env), stdout=sys.stderr if aside else None
            )
        except FileNotFoundError:
            raise UsageError(
                f"command not found: {command[0]}; write the command after --, as in: "
                "-- python train.py"
            ) from None
        except OSError as err:
            raise UsageError(f"{command[0]} cannot be run: {err.strerror or err}") from None
        signals.pass_to(process)
        status = process.wait()
    return status if status >= 0 else 128 - status


class _Signals:
    """Passes signals on to the command, and outlives them, to say how it ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals come to the main thread alone
        for name in _PASSED_ON:
            number = getattr(signal, name, None)
            # What is ignored, as under nohup, stays so for the command too.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def pass_to(self, process: subprocess.Popen[bytes]) -> None:
        """Name the process, and pass on what came before it was there."""
        self._process = process
        for number in self._early:
            self._received(number, None)

    def _received(self, number: int, frame: Any) -> None:
        # The terminal sends its own to every process in the foreground: once is enough.
        if signal.Signals(number).name in _FROM_THE_KEYBOARD and _in_foreground():
            return
        if self._process is None:
            self._early.append(number)
        elif self._process.poll() is None:
            self._process.send_signal(number)


def _in_foreground() -> bool:
    try:
        with Path("/dev/tty").open() as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
