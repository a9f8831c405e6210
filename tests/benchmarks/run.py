"""Measure tensorgraft against what people use today: a table, and JSON.

    python tests/benchmarks/run.py [--quick] [--only NAME ...] [--json FILE]
        [--markdown FILE] [--dir DIR]

Every time is the median of repeats that take turns with its peer's, in one run on one machine;
bytes on disk and in memory are taken once.
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

import compiled
import cuda
import diffing
import localizing
import modules
import recording
import replaying
import rows
import scale
import taps
import tokens
from harness import Result
from rich.console import Console
from rich.table import Table

BENCHMARKS = {
    "inactive": taps.inactive,
    "rejected": taps.rejected,
    "small": taps.small,
    "large": taps.large,
    "compiled": compiled.compiled,
    "modules-unselected": modules.unselected,
    "module-tap": modules.module_tap,
    "tokens-batches": tokens.batches,
    "tokens-steps": tokens.steps,
    "rows-matched": rows.matched,
    "throughput": recording.throughput,
    "repeats": recording.repeats,
    "memory": recording.memory,
    "grafts": replaying.grafts,
    "identity": replaying.identity,
    "layouts": replaying.layouts,
    "metrics": replaying.metrics,
    "opening": replaying.opening,
    "replay-memory": replaying.replay_memory,
    "localizing": localizing.localizing,
    "localizing-memory": localizing.localizing_memory,
    "diff-large": diffing.large,
    "diff-many": diffing.many,
    "diff-manifests": diffing.manifests,
    "growth": scale.growth,
    "cuda": cuda.cuda,
    "cuda-compiled": compiled.compiled_on_cuda,
}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, help="just these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="and the README's table here")
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
    if given.markdown:
        given.markdown.write_text(markdown(found))


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
        ours, theirs, verdict = _texts(one)
        table.add_row(one.measure, ours, one.peer, theirs, one.figure, one.target, verdict)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def markdown(found: list[Result]) -> str:
    """Return the table as the README has it."""
    lines = ["| what | tensorgraft | against | | aim |", "|---|---|---|---|---|"]
    for one in found:
        ours, theirs, verdict = _texts(one)
        peer = f"{one.peer}: {theirs}" if theirs else ""
        aim = f"{one.target}: {verdict}" if one.target else ""
        lines.append(f"| {one.measure} | {ours} | {peer} | {one.figure} | {aim} |")
    return "\n".join(lines) + "\n"


def _texts(one: Result) -> tuple[str, str, str]:
    """Return a result's figure, its peer's, and whether it met its target."""
    theirs = f"{one.peer_figure:.3g} {one.unit}" if one.peer else ""
    return f"{one.ours:.3g} {one.unit}", theirs, {True: "met", False: "missed", None: ""}[one.met]


if __name__ == "__main__":
    main()
