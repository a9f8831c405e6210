"""How time and memory grow with the number of records: a table of its own.

Each figure is of a fresh process, which first does all that is not measured: imports, and opening
what is replayed. Memory is what the process holds at most, beyond what it held then.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import time
from pathlib import Path

import polars as pl
from harness import Result, child, folder

SIZES = (1_000, 10_000, 100_000, 1_000_000)
RANKS = 64
COLUMNS = {
    "record": "recording",
    "ls": "`graft ls`",
    "manifests": "`graft diff --manifest-only`",
    "diff": "`graft diff`",
    "find": "an index and a key",
}


def growth(base: Path, quick: bool) -> list[Result]:
    """Print a table of time a record and memory at each size."""
    table = {}
    for rows in SIZES[:2] if quick else SIZES:
        with folder(base) as out:
            _make(out, rows)
            table[rows] = {
                kind: json.loads(child("scale.py", kind, out, rows).splitlines()[-1])
                for kind in COLUMNS
            }
    print(markdown(table))
    return []


def markdown(table: dict[int, dict[str, list[float]]]) -> str:
    """Return a row a size: microseconds a record, and MiB."""
    lines = [f"| records | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for rows, found in table.items():
        cells = [
            f"{seconds / rows * 1e6:.3g} us, {memory:.0f} MiB"
            for seconds, memory in (found[kind] for kind in COLUMNS)
        ]
        lines.append(f"| {rows:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _make(out: Path, rows: int) -> None:
    from diffing import _with_other_digests
    from replaying import make_manifest

    for name in ("a", "b"):
        make_manifest(out / name, max(rows, RANKS), RANKS)
        for file in (out / name).glob("rank-*/*.parquet"):
            names = (pl.col("seq") % 400).cast(pl.String)
            pl.read_parquet(file).with_columns(name="block." + names).write_parquet(file)
    for file in (out / "b").glob("rank-*/*.parquet"):
        _with_other_digests(file)


def _record(run: Path, rows: int, noise: float) -> None:
    import torch

    from recorder import Recorder, tap

    value = torch.randn(64, generator=torch.Generator().manual_seed(0))
    with Recorder(run):
        for i in range(rows):
            tap(f"block.{i % 400}", value + i * (1 + noise * (i % 2)), i=i // 400)


def _measured(kind: str, out: Path, rows: int) -> tuple[float, float]:
    """Return seconds, and MiB beyond what this process held before."""
    from recorder import Recording
    from recorder.commands import listing
    from replayer import diff
    from replayer.match import Matcher

    if kind == "diff":
        _record(out / "x", rows, 0.0)
        _record(out / "y", rows, 1e-7)
    run = Recording.open(out / "a")
    frame = run.latest() if kind == "find" else None
    before, start = _peak(), time.perf_counter()
    if kind == "record":
        _record(out / "recorded", rows, 0.0)
    elif kind == "ls":
        with contextlib.redirect_stdout(io.StringIO()):
            listing.print_taps(run, run.rows(), listing.taps(run.rows()), 120)
    elif kind == "manifests":
        diff(run, out / "b", manifest_only=True)
    elif kind == "diff":
        assert diff(out / "x", out / "y").counts()["close"]
    elif frame is not None:
        assert Matcher(frame).index.find("tensor", ("block.0", '{"layer":0}'), 0, 0)
    return time.perf_counter() - start, _peak() - before


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(_measured(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
