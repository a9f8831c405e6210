"""Record every baseline of some pairs, and replay every target, on two ranks under torchrun."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recorder import Recorder
from replayer import Replayer

WAIT = timedelta(seconds=30)


def run(
    cases: Callable[[int], Sequence[Any]],
    base: Callable[[Any, int], None],
    target: Callable[[Any, int, int, Any], None],
    ranks: Callable[[Any], int],
) -> None:
    """Run the pairs that the command line names; what a reader needs to know stands beside each.

    Args:
        cases: the pairs of a seed, each with `name`, `base`, `expected`, `classes`, and perhaps
            `also`, other taps at which a fault shows by itself.
        base: runs a baseline, of one rank, given its options and the seed.
        target: runs a pair's target, given the pair, the seed, the rank and the process group.
        ranks: how many ranks a pair's target has.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="a regular expression that finds case names")
    parser.add_argument("--every", type=int, default=1, help="one of so many")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank = dist.get_rank()
    chosen = [case for case in cases(given.seed) if re.search(given.only, case.name)]
    chosen = chosen[given.seed % given.every :: given.every]

    def place_of(options: Any) -> Path:
        return given.out / "baselines" / hashlib.sha256(repr(options).encode()).hexdigest()[:16]

    def record(options: Any) -> None:
        with Recorder(place_of(options), rank=0, world_size=1):
            base(options, given.seed)

    def replay(case: Any) -> None:
        folder, world = given.out / "cases" / case.name, ranks(case)
        if rank >= world:
            return
        with Replayer(place_of(case.base), out=folder, own_error=True, rank=rank, world_size=world):
            target(case, given.seed, rank, group)
        if rank == 0:
            also = getattr(case, "also", ())
            told = {"expected": case.expected, "also": also, "classes": sorted(case.classes)}
            (folder / "expected.json").write_text(json.dumps(told))

    if rank == 0:
        for options in dict.fromkeys(case.base for case in chosen):
            attempt("a baseline", record, options)
    dist.barrier()
    group, failures = dist.new_group(timeout=WAIT), []
    for case in chosen:
        failed = torch.tensor(int(attempt(case.name, replay, case)))
        dist.all_reduce(failed)
        if failed.item():
            failures.append(case.name)
            group = dist.new_group(timeout=WAIT)
    dist.destroy_process_group()
    sys.exit(f"{len(failures)} of {len(chosen)} cases failed: {failures}" if failures else 0)


def attempt(what: str, call: Callable[[Any], None], argument: Any) -> bool:
    """Call; report what was raised, and return whether something was."""
    try:
        call(argument)
    except Exception:
        print(f"{what} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return True
    return False
