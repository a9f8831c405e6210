"""A job that taps large and small tensors; prints its peak memory in MiB."""

from __future__ import annotations

import resource
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from recorder import Recorder, step, tap


def peak() -> float:
    """Return the most memory this process has had, in MiB."""
    try:
        # Not getrusage: there a process begins with what the one that started it had.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except OSError:  # not Linux; there in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def main(run: str, large: int, small: int) -> None:
    """Tap `large` tensors of 16 MiB, then `small` ones of 1 KiB, all distinct."""
    value = torch.randn(4 << 20)
    few = torch.randn(256)
    with nullcontext() if run == "-" else Recorder(run):
        for i in range(large):
            value[0] = i
            tap("large", value, i=i)
        for i in range(small):
            few[0] = i
            tap("small", few, layer=i % 80)
            if i % 80 == 79:
                step()
    print(peak())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
