"""Record every baseline and replay every target: `python -m zoo.decoder_job OUT`, by torchrun.

Rank 0 records the baselines alone; targets of two ranks run on both. What a reader of the logs
needs to know stands beside each as `expected.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import traceback
from pathlib import Path

import torch.distributed as dist

from recorder import Recorder
from replayer import Replayer

from .decoder import Decoder
from .decoder_cases import cases


def main():
    """Run all cases of a seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    chosen = [case for case in cases(options.seed) if re.search(options.only, case.name)]
    for case in chosen:
        digest = hashlib.md5(repr(case.base).encode()).hexdigest()[:12]
        base = options.out / "baselines" / digest
        if rank == 0 and not base.exists():
            with Recorder(base, rank=0, world_size=1):
                Decoder(case.base).run()
        dist.barrier()
        out = options.out / "cases" / case.name
        tp = case.target.tp
        if rank < tp:
            try:
                replay = Replayer(base, out=out, own_error=True, rank=rank, world_size=tp)
                with replay:
                    Decoder(case.target, rank, case.faults).run()
            except Exception:
                print(case.name, traceback.format_exc(limit=-2), flush=True)
        if rank == 0:
            told = {
                "expected": case.expected, "classes": sorted(case.classes),
                "dtype": case.base.dtype, "base": str(base),
            }  # fmt: skip
            (out / "expected.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
