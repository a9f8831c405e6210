"""Run a command with `GRAFT_*` set, its own stdin and stdout, and signals passed on."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..diagnostics import say
from ..errors import UsageError
from ..job import new_job_id
from ..mailbox import SURVEY
from ..mailbox import VARIABLE as REPORTS

_PASSED_ON = ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGWINCH")
_MODULES = ("_MODULES", "_TAPS", "_STEP_ON", SURVEY)
_ENTRY = "tensorgraft_entry"
_SECONDS = 1.0  # between looks at whether the command has ended, should no signal tell
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
    if is_closed(new) and any(name.endswith(_MODULES) and value for name, value in options.items()):
        # Torch is told to load no entry points, which are the way in to a program without taps.
        new["PYTHONPATH"] = os.pathsep.join((*_site(), *filter(None, [new.get("PYTHONPATH")])))
    new["GRAFT_COMMAND"] = json.dumps(list(command))
    new[REPORTS] = str(reports)
    return new


def _site() -> list[str]:
    """Return the folder with a `sitecustomize` that goes in where torch lets nobody in."""
    spec = importlib.util.find_spec(_ENTRY)
    return [] if spec is None else list(spec.submodule_search_locations or ())[:1]


def is_closed(environ: Mapping[str, str]) -> bool:
    """Whether the environment tells torch to load no entry points."""
    return environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0"


def check(command: Sequence[str]) -> None:
    """Refuse a command that is none.

    Raises:
        UsageError: it has no first word.
    """
    if not command or not command[0]:
        raise UsageError("there is no command to run; write it after --, as in: -- python train.py")


def run(
    command: Sequence[str],
    env: Mapping[str, str],
    aside: bool = False,
    look: Callable[[int], None] | None = None,
) -> int:
    """Run a command to its end and return its exit status; 128 + N where signal N ended it.

    Args:
        command: its words.
        env: its environment.
        aside: whether what it prints goes to stderr, since stdout is for a result.
        look: called with its pid now and then while it runs.

    Raises:
        UsageError: it cannot be started.
    """
    words, env = list(command), dict(env)
    if (beside := _beside(words[0], env)) is not None:
        say(f"{words[0]} is not on PATH; taking the one of graft's environment, {beside}")
        words[0] = str(beside)
        env["PATH"] = os.pathsep.join(filter(None, (str(beside.parent), env.get("PATH"))))
    with _Signals() as signals:
        try:
            process = subprocess.Popen(words, env=env, stdout=sys.stderr if aside else None)
        except FileNotFoundError:
            raise UsageError(_not_found(command[0])) from None
        except OSError as err:
            raise UsageError(f"{command[0]} cannot be run: {err.strerror or err}") from None
        with _looking(process, look):
            status = signals.passed_on_to(process)
    return status if status >= 0 else 128 - status


@contextmanager
def _looking(
    process: subprocess.Popen[bytes], look: Callable[[int], None] | None
) -> Iterator[None]:
    """Call `look` about once a second, from a thread: the main one waits for signals."""
    if look is None:
        yield
        return
    ended = threading.Event()

    def repeat() -> None:
        pause = _SECONDS / 4
        while not ended.wait(pause):
            look(process.pid)
            pause = _SECONDS

    thread = threading.Thread(target=repeat, name="graft-look", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _beside(word: str, env: Mapping[str, str]) -> Path | None:
    """Return the program of graft's own environment that PATH does not lead to.

    An environment need not be activated to call its `graft` by its path.
    """
    if os.sep in word or shutil.which(word, path=env.get("PATH")):
        return None
    found = shutil.which(word, path=str(Path(sys.executable).parent))
    return None if found is None else Path(found)


def _not_found(word: str) -> str:
    if os.sep in word:
        return f"command not found: there is no {word} here; check its path"
    if word.endswith(".py") and Path(word).exists():
        return f"command not found: {word} is a script; run it as in: -- python {word}"
    return (
        f"command not found: {word} is neither on PATH nor in {Path(sys.executable).parent}, "
        "graft's own environment; activate the environment that has it, or give its path"
    )


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

    def passed_on_to(self, process: subprocess.Popen[bytes]) -> int:
        """Pass on what came before the process was there, and what comes until it ends.

        Returns its status.
        """
        self._process = process
        for number in self._early:
            self._received(number, None)
        if not self._old or not hasattr(signal, "sigtimedwait"):
            return process.wait()
        awaited = {signal.SIGCHLD, *self._old}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
        try:
            while (status := process.poll()) is None:
                came = signal.sigtimedwait(awaited, _SECONDS)
                if came is not None and came.si_signo in self._old:
                    self._pass_on(came.si_signo, from_terminal=came.si_code > 0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return status

    def _received(self, number: int, frame: Any) -> None:
        self._pass_on(number, from_terminal=_in_foreground())

    def _pass_on(self, number: int, *, from_terminal: bool) -> None:
        # The terminal sends its own to every process in the foreground: once is enough.
        if from_terminal and signal.Signals(number).name in _FROM_THE_KEYBOARD:
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
