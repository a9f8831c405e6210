"""What a tap costs on a GPU; nothing where there is none."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import torch
from harness import Result, at_most, folder, interleaved
from taps import drained

from recorder import Recorder, tap

_BURST = 100


def cuda(base: Path, quick: bool) -> list[Result]:
    """The host's and the stream's time for taps; what arrives, against a pinned copy."""
    if not torch.cuda.is_available():
        return []
    value = torch.randn(16 << 20, device="cuda")
    small = torch.randn(8 << 10, device="cuda")
    aside = torch.empty_like(value)
    pinned = torch.empty(16 << 20, pin_memory=True)
    kept: deque[torch.Tensor] = deque(maxlen=_BURST)
    found = []
    with folder(base) as run, Recorder(run) as recorder:

        def settle() -> None:
            drained(recorder)
            torch.cuda.synchronize()
            value[0] += 1
            torch.cuda.synchronize()

        def host() -> float:
            settle()
            start = time.perf_counter()
            tap("x", value)
            return time.perf_counter() - start

        def burst(work) -> float:
            settle()
            start = time.perf_counter()
            for _ in range(_BURST):
                work()
            return (time.perf_counter() - start) / _BURST

        def copied() -> None:
            kept.append(small.clone())
            event = torch.cuda.Event(blocking=True)
            event.record()

        def stream(work) -> float:
            settle()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            work()
            events[1].record()
            events[1].synchronize()
            return events[0].elapsed_time(events[1]) / 1e3

        def arriving() -> float:
            settle()
            start = time.perf_counter()
            tap("x", value)
            parts = list(recorder._writer._staging._waiting)
            recorder._writer._staging.bring(parts)  # sooner than the writer, who lets a burst pass
            for part in parts:
                part.wait()
            return time.perf_counter() - start

        def plain() -> float:
            settle()
            start = time.perf_counter()
            pinned.copy_(value, non_blocking=True)
            torch.cuda.synchronize()
            return time.perf_counter() - start

        for _ in range(3):
            host()
        taken = interleaved(
            {
                "host": host,
                "stream": lambda: stream(lambda: tap("x", value)),
                "aside": lambda: stream(lambda: aside.copy_(value)),
                "small": lambda: burst(lambda: tap("x", small)),
                "copied": lambda: burst(copied),
                "arriving": arriving,
                "plain": plain,
            },
            3 if quick else 15,
        )
    us = taken["host"] * 1e6
    found.append(
        Result(
            "64 MiB on a GPU, time the host is held", us, "", 0.0, "us", f"{us:.0f} us",
            "at most 50 us", us <= 50,
        )
    )  # fmt: skip
    found.append(
        at_most(
            "64 MiB on a GPU, time the stream is held", taken["stream"] * 1e6,
            "copy on the device", taken["aside"] * 1e6, "us", None,
        )
    )  # fmt: skip
    found.append(
        at_most(
            "32 KiB on a GPU, time the host is held", taken["small"] * 1e6,
            "clone and event", taken["copied"] * 1e6, "us", None,
        )
    )  # fmt: skip
    rate, peer = (value.nbytes / taken[name] / 1e9 for name in ("arriving", "plain"))
    found.append(
        Result(
            "64 MiB from a GPU into staging", rate, "plain pinned copy", peer, "GB/s",
            f"{rate / peer:.2f}x", "", None,
        )
    )  # fmt: skip
    return found
