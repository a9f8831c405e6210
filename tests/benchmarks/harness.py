"""What the benchmarks share: interleaved repeats, medians, a line of the table."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Result:
    """One measure against its peer.

    Attributes:
        measure: what was measured.
        ours: the figure, in `unit`.
        peer: what it was measured against.
        peer_figure: the peer's figure, in `unit`.
        unit: of both.
        figure: what the target speaks of: a ratio, or a difference.
        target: what it is to reach, as text.
        met: whether it does; None where there is no target.
    """

    measure: str
    ours: float
    peer: str
    peer_figure: float
    unit: str
    figure: str
    target: str
    met: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def at_most(
    measure: str, ours: float, peer: str, theirs: float, unit: str, limit: float | None
) -> Result:
    """Return a result whose target is a greatest multiple of the peer's figure."""
    ratio = ours / theirs
    target = "" if limit is None else f"at most {limit:g}x"
    met = None if limit is None else ratio <= limit
    return Result(measure, ours, peer, theirs, unit, f"{ratio:.2f}x", target, met)


def faster(
    measure: str, ours: float, peer: str, theirs: float, unit: str, least: float | None
) -> Result:
    """Return a result whose target is a least multiple of the peer's speed, from times."""
    ratio = theirs / ours
    target = "" if least is None else f"{least:g}x faster"
    met = None if least is None else ratio >= least
    return Result(measure, ours, peer, theirs, unit, f"{ratio:.1f}x faster", target, met)


def interleaved(
    timed: dict[str, Callable[[], float]], repeats: int, warm_ups: int = 1
) -> dict[str, float]:
    """Return the median of what each function returns, called in turn."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(warm_ups + repeats):
        for name, function in timed.items():
            value = function()
            if i >= warm_ups:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@contextmanager
def folder(base: Path) -> Iterator[Path]:
    """Give a fresh folder, and remove it."""
    path = Path(tempfile.mkdtemp(prefix="graft-benchmark-", dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def child(script: str, *args: object, env: dict[str, str] | None = None) -> str:
    """Run a script of this folder in a fresh process; return what it prints."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, args)],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script} {args} failed: {done.stderr[-2000:]}")
    return done.stdout
