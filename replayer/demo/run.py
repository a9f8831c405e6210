"""Run the demo: record the baseline and the faulty target, graft one tap, show what that changed.

1. `commands` lists four `graft` commands; `run_demo` prints each and runs it.
2. `verdict` words what became of the output.
3. `naming` is the command that names the fault from one replay.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recorder import Recording
from recorder.diagnostics import NO_NUMPY

from ..finding.localize import FAULT
from ..measuring.compare import difference
from .model import STEPS
from .target import FAULTY_LAYER

GRAFTED_TAP = "attn_q"  # the first tap after the fault
TOLERANCE = 1e-5  # 4 and 2 ranks sum in another order, so outputs are equal up to rounding

_BASELINE = [
    *("--", "torchrun", "--standalone", "--nproc-per-node", "4", "-m", "replayer.demo.baseline"),
]
BIN = Path(sys.executable).parent

Command = list[list[str]]  # the words of one command, in the lines it is printed in


def run_demo(folder: Path, echo: Callable[[str], None]) -> int:
    """Run the demo in `folder`: 0 if the graft restored the target's output, 1 if it did not.

    A command that fails ends the demo with that command's status.
    """
    environment = dict(os.environ)
    scripts = [BIN / name for name in ("graft", "torchrun") if (BIN / name).exists()]
    if any(shutil.which(script.name) != str(script) for script in scripts):
        echo(f"$ export PATH={shlex.quote(str(BIN))}:$PATH")
        environment["PATH"] = f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    given = environment.get("PYTHONWARNINGS")  # of two that fit, the last one holds
    environment["PYTHONWARNINGS"] = ",".join(filter(None, [given, f"ignore:{NO_NUMPY}"]))
    if "OMP_NUM_THREADS" not in environment:  # torchrun would choose 1 too, but with a warning
        echo("$ export OMP_NUM_THREADS=1")
        environment["OMP_NUM_THREADS"] = "1"

    def status_of(purpose: str, command: Command) -> int:
        echo(f"\n# {purpose}\n$ {spelled(command)}")
        words = [word for line in command for word in line]
        return subprocess.run(words, env=environment, check=False).returncode

    for purpose, command in commands(folder):
        if status := status_of(purpose, command):
            echo(f"\nThe demo stops here: that command ended with status {status}.")
            return status

    baseline, target, grafted = (
        Recording.open(folder / name) for name in ("baseline", "target", "grafted")
    )
    logits = whole(baseline, "logits")
    before = or_nan(difference(logits, whole(target, "logits")).max_abs)
    after = or_nan(difference(logits, whole(grafted, "logits")).max_abs)
    echo("\n" + verdict(before, after))
    status = status_of(*naming(folder))
    echo(f"(status {status}: a fault is named)" if status == FAULT else f"(status {status})")
    echo(next_steps(folder))
    return 0 if restored(before, after) and status == FAULT else 1


def commands(folder: Path) -> list[tuple[str, Command]]:
    """What the demo runs, in order, each with its purpose."""
    graft = program("graft", "replayer.cli")
    torchrun = ["--", *program("torchrun", "torch.distributed.run"), "--standalone"]
    baseline = [*torchrun, "--nproc-per-node", "4", "-m", "replayer.demo.baseline"]
    target = target_command()
    runs = {name: str(folder / name) for name in ("baseline", "target", "grafted")}
    only_first_wrong = f'name == "{GRAFTED_TAP}" and layer == {FAULTY_LAYER}'
    return [
        (
            "The trusted baseline: 4 ranks, every tapped tensor recorded.",
            [[*graft, "record", "-o", runs["baseline"]], baseline],
        ),
        (
            f"The target: 2 ranks, a fault in layer {FAULTY_LAYER}. Recorded to show its effect.",
            [[*graft, "record", "-o", runs["target"]], target],
        ),
        (
            "The target again, one tap overwritten by the baseline's: 4 blocks re-cut into 2, as "
            "both taps' dims say.",
            [
                [*graft, "replay", runs["baseline"], "-o", runs["grafted"]],
                ["--filter", only_first_wrong, "--record", "True"],
                target,
            ],
        ),
        (
            "All three side by side. The grafted tap shows what the target computed there before "
            "it was overwritten, so it stays wrong; what comes after it is right again.",
            [[*graft, "diff", *runs.values()]],
        ),
    ]


def naming(folder: Path) -> tuple[str, Command]:
    """The command that names the fault, and its purpose."""
    return (
        "And the fault named without knowing where it is: one replay with every tap overwritten.",
        [
            [*program("graft", "replayer.cli"), "localize", str(folder / "baseline")],
            ["--limit", "3", *target_command()],
        ],
    )


def target_command() -> list[str]:
    """The words that run the target, `--` before them."""
    torchrun = ["--", *program("torchrun", "torch.distributed.run"), "--standalone"]
    return [*torchrun, "--nproc-per-node", "2", "-m", "replayer.demo.target"]


def program(script: str, module: str) -> list[str]:
    """How to call a console script of this environment, or its module where none is beside."""
    return [script] if (BIN / script).exists() else [sys.executable, "-m", module]


def spelled(command: Command) -> str:
    """The command as it can be pasted into a shell."""
    return " \\\n    ".join(shlex.join(line) for line in command)


def whole(run: Recording, name: str, layer: int | None = None) -> torch.Tensor:
    """One tap of all steps as the uncut model has it, `[steps, ...]`, in float64."""
    tags: dict[str, Any] = {} if layer is None else {"layer": layer}
    steps = [run.load_logical(name, step, replicas="first", **tags) for step in range(STEPS)]
    return torch.stack(steps).double()


def or_nan(figure: float | None) -> float:
    """A figure of a comparison, NaN where a NaN or an infinity leaves it undefined."""
    return math.nan if figure is None else figure


def restored(before: float, after: float) -> bool:
    """Whether an output that was wrong came right; false where either is NaN."""
    return after <= TOLERANCE < before


def verdict(before: float, after: float) -> str:
    """Two lines on the final output."""
    if restored(before, after):
        result = f"PASS: after the graft equal to the baseline's within {TOLERANCE:g}"
    else:
        result = f"FAIL: expected more than {TOLERANCE:g} before and at most that after"
    return (
        f"Final logits, greatest absolute difference: {before:.1e} before, {after:.1e} after.\n"
        f"{result}"
    )


def next_steps(folder: Path) -> str:
    """Commands to look closer, as they can be pasted into a shell."""
    selected = f'name == "{GRAFTED_TAP}" and layer == {FAULTY_LAYER}'
    baseline, target = str(folder / "baseline"), str(folder / "target")
    log = str(folder / "grafted" / "grafts" / "*.parquet")
    scan = (
        f"import polars as pl; print(pl.read_parquet({json.dumps(log)},"
        ' columns=["rank", "step", "name", "outcome", "rel_diff"]))'
    )
    lines = [
        "\nLook closer (to repeat a command above, choose another -o folder):",
        shlex.join(["graft", "diff", baseline, target, "--html", "diff.html"]),
        shlex.join(["graft", "check", baseline, "-o", str(folder / "check"), *_BASELINE]),
        shlex.join(["graft", "ls", baseline]),
        shlex.join(["graft", "show", baseline, "--filter", selected]),
        shlex.join(["python", "-c", scan]),
    ]
    return "\n  ".join(lines)
