"""What a recording costs in time, bytes and memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from harness import Result, at_most, child, folder, interleaved
from safetensors.torch import save_file

from recorder import Recorder, tap
from recorder.bits import bytes_of

CHUNK = 64 << 20


def throughput(base: Path, quick: bool) -> list[Result]:
    """Distinct data, first tap to closed recording, against writing the same bytes bare."""
    value = torch.randn(CHUNK // 4)
    data = bytes_of(value)

    def record(total: int) -> float:
        with folder(base) as out:
            os.sync()
            start = time.perf_counter()
            with Recorder(out / "run"):
                for i in range(total // CHUNK):
                    value[0] = i
                    tap("x", value, i=i)
            return time.perf_counter() - start

    def bare(total: int) -> float:
        with folder(base) as out:
            os.sync()
            start = time.perf_counter()
            file = os.open(out / "bare", os.O_RDWR | os.O_CREAT)
            for i in range(total // CHUNK):
                value[0] = i
                os.pwrite(file, data, i * CHUNK)
            os.close(file)
            return time.perf_counter() - start

    def save(total: int) -> float:
        with folder(base) as out:
            os.sync()
            start = time.perf_counter()
            for i in range(total // CHUNK):
                value[0] = i
                save_file({"x": value}, out / f"{i}.safetensors")
            return time.perf_counter() - start

    small, large = (128 << 20, 512 << 20) if quick else (2 << 30, 8 << 30)
    some = interleaved({"bare": lambda: bare(small), "record": lambda: record(small)}, 5)
    found = interleaved(
        {
            "bare": lambda: bare(large),
            "record": lambda: record(large),
            "save": lambda: save(large),
        },
        1 if quick else 3,
    )
    rates = {name: large / taken / 1e9 for name, taken in found.items()}
    ours, what = rates["record"], f"recording {large / (1 << 30):g} GiB"
    bare_ratio, save_ratio = ours / rates["bare"], ours / rates["save"]
    return [
        at_most(
            f"recording {small / (1 << 30):g} GiB, first tap to closed", some["record"],
            "bare pwrite", some["bare"], "s", 1.25,
        ),
        Result(
            what, ours, "bare pwrite", rates["bare"], "GB/s", f"{bare_ratio:.2f}x",
            "at least 0.8x", bare_ratio >= 0.8,
        ),
        Result(
            what, ours, "save_file", rates["save"], "GB/s", f"{save_ratio:.2f}x",
            "at least 3x", save_ratio >= 3,
        ),
    ]  # fmt: skip


def repeats(base: Path, quick: bool) -> list[Result]:
    """The same tensor tapped a thousand times: bytes on disk."""

    def on_disk(times: int) -> int:
        value = torch.arange(64 << 10, dtype=torch.float32)
        with folder(base) as out:
            with Recorder(out / "run"):
                for i in range(times):
                    tap("x", value, i=i)
            return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())

    once, often = on_disk(1), on_disk(1000)
    return [
        at_most("the same 256 KiB 1000 times, on disk", often / 1e3, "once", once / 1e3, "kB", 2)
    ]


def memory(base: Path, quick: bool) -> list[Result]:
    """Peak memory of a job that records, beyond that of the same job alone."""
    large, small = (40, 10_000) if quick else (256, 100_000)
    budget = 256
    with folder(base) as out:
        alone = float(child("memory_job.py", "-", large, small))
        recorded = float(child("memory_job.py", out / "run", large, small))
    extra = recorded - alone
    limit = budget + 64
    return [
        Result(
            "recording, peak extra memory", extra, "staging budget", budget, "MiB",
            f"+{extra - budget:.0f} MiB", "at most +64 MiB", extra <= limit,
        )
    ]  # fmt: skip
