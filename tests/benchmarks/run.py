"""Measure tensorgraft against what people use today: a table, and JSON.

    python tests/benchmarks/run.py [--quick] [--only NAME ...] [--json FILE] [--dir DIR]

Every figure is the median of repeats that take turns with its peer's, in one run on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cuda
import recording
import replaying
import taps
from harness import Result
from rich.console import Console
from rich.table import Table

BENCHMARKS = {
    "inactive": taps.inactive,
    "rejected": taps.rejected,
    "small": taps.small,
    "large": taps.large,
    "throughput": recording.throughput,
    "repeats": recording.repeats,
    "memory": recording.memory,
    "grafts": replaying.grafts,
    "identity": replaying.identity,
    "metrics": replaying.metrics,
    "opening": replaying.opening,
    "replay-memory": replaying.replay_memory,
    "cuda": cuda.cuda,
}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, help="just these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="where to write recordings"
    )
    given = parser.parse_args()
    found: list[Result] = []
    for name in given.only or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found += BENCHMARKS[name](given.dir, given.quick)
    show(found)
    if given.json:
        report = {"machine": machine(), "results": [result.as_dict() for result in found]}
        given.json.write_text(json.dumps(report, indent=2) + "\n")


def machine() -> dict[str, object]:
    """Say what this was measured on."""
    return {
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def show(found: list[Result]) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False)
    for title in ("measure", "tensorgraft", "peer", "", "ratio", "to reach", ""):
        table.add_column(title, overflow="fold")
    for one in found:
        peer = f"{one.peer_figure:.4g} {one.unit}" if one.peer else ""
        verdict = {True: "met", False: "missed", None: ""}[one.met]
        ours = f"{one.ours:.4g} {one.unit}"
        table.add_row(one.measure, ours, one.peer, peer, one.figure, one.target, verdict)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
