"""Fixtures: a clean environment, many ranks in one process, and real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recorder import Recorder, Recording
from recorder.provenance import provenance
from recorder.taps import sessions
from replayer import Replayer

BIN = Path(sys.executable).parent
JOBS = Path(__file__).parent / "jobs"
_NOT_QUICK = ("slow", "thorough", "processes", "browser")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes or a browser by its fixtures, and all that is left as quick."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & {"shell", "single", "demo"}:
            item.add_marker("processes")
        if "tab" in fixtures:
            item.add_marker("browser")
        if not any(item.get_closest_marker(name) for name in _NOT_QUICK):
            item.add_marker("quick")


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard() -> None:
    """Tests send interrupts, which what a shell runs in the background ignores from the start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def known_provenance() -> Iterator[None]:
    """Ask once for versions and the repository's state: it takes longer than most recordings."""
    facts = provenance()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recorder.writing.claim.provenance", lambda: facts)
        yield


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No rank, no graft from outside, and no session left behind."""
    for name in list(os.environ):
        if name.startswith(("GRAFT_", "TORCHELASTIC_")) or name in _LAUNCHER:
            monkeypatch.delenv(name)
    yield
    assert sessions.active == ()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder to record into, not there yet."""
    return tmp_path / "run"


@pytest.fixture
def record(run: Path) -> Callable[..., Recording]:
    """Record `job(rank)` on each of `world_size` ranks, all in this process."""

    def record(job: Callable[[int], Any], world_size: int = 1, **options: Any) -> Recording:
        for rank in range(world_size):
            with Recorder(run, rank=rank, world_size=world_size, **options):
                job(rank)
        return Recording.open(run)

    return record


@pytest.fixture
def replay(run: Path) -> Callable[..., list[Replayer]]:
    """Replay onto `job(rank)` on each of `world_size` ranks; return each rank's session."""

    def replay(job: Callable[[int], Any], world_size: int = 1, **options: Any) -> list[Replayer]:
        sessions = []
        for rank in range(world_size):
            with Replayer(run, rank=rank, world_size=world_size, **options) as session:
                job(rank)
            sessions.append(session)
        return sessions

    return replay


class Shell:
    """Runs commands in a folder of its own, with the virtual environment's programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])
        self.env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
        self.graft = [sys.executable, "-m", "replayer.cli"]
        self.python = [sys.executable]

    def torchrun(self, ranks: int, *options: str) -> list[str]:
        """The words that run a script on several ranks."""
        how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return [sys.executable, *how, *options]

    def write(self, name: str, text: str) -> str:
        """Write a script; return its name."""
        (self.folder / name).write_text(textwrap.dedent(text))
        return name

    def __call__(
        self, *words: Any, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run words, flattened, to their end; output is captured as text."""
        return subprocess.run(
            _flat(words),
            cwd=self.folder,
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )


def _flat(words: Any) -> list[str]:
    if isinstance(words, (list, tuple)):
        return [part for word in words for part in _flat(word)]
    return [str(words)]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Run commands in `tmp_path`."""
    return Shell(tmp_path)
