"""What a tap costs the job that makes it."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from harness import Result, at_most, faster, folder, interleaved, seconds

from recorder import Recorder, tap


def empty(name, value, *, dims=None, extras=None, grad=False, rows=None, **tags):
    """The peer of a tap: a function of its signature that does nothing."""
    return value


def _each(function, calls: int) -> float:
    value = torch.randn(4)
    start = time.perf_counter()
    for _ in range(calls):
        function("attn_out", value, layer=3)
    return (time.perf_counter() - start) / calls


def drained(recorder: Recorder) -> None:
    """Wait until nothing waits to be written."""
    while recorder.progress().waiting:
        time.sleep(0.002)


def inactive(base: Path, quick: bool) -> list[Result]:
    """A tap with tags while nothing is active."""
    calls = 20_000 if quick else 200_000
    found = interleaved({"empty": lambda: _each(empty, calls), "tap": lambda: _each(tap, calls)}, 9)
    ours, peer = found["tap"] * 1e9, found["empty"] * 1e9
    return [at_most("tap, nothing active", ours, "empty function", peer, "ns", 1.2)]


def rejected(base: Path, quick: bool) -> list[Result]:
    """A tap that the filter rejects, the same call site again and again."""
    calls = 10_000 if quick else 100_000

    def filtered() -> float:
        with folder(base) as run, Recorder(run, filter="layer < 2") as recorder:
            recorder._lazy = True  # nothing is to be said about it
            taken = _each(tap, calls)
            recorder._selection.selected = 1
        return taken

    found = interleaved({"inactive": lambda: _each(tap, calls), "rejected": filtered}, 9)
    ours, peer = found["rejected"] * 1e6, found["inactive"] * 1e6
    more = ours - peer
    name, target = "tap, rejected by a filter", "at most +1.5 us"
    met = more <= 1.5
    return [Result(name, ours, "inactive tap", peer, "us", f"+{more:.2f} us", target, met)]


def small(base: Path, quick: bool) -> list[Result]:
    """Recording many tensors of 4 KiB, digests and statistics included."""
    n = 500 if quick else 2_000
    tensors = [torch.randn(1024) for _ in range(n)]
    files = min(n, 500)
    held: list[float] = []

    def record() -> float:
        with folder(base) as run:
            start = time.perf_counter()
            with Recorder(run) as recorder:
                tap("first", tensors[0])
                drained(recorder)
                time.sleep(0.3)  # what is done once a job is over
                start = time.perf_counter()
                for i, tensor in enumerate(tensors):
                    tap("x", tensor, layer=i % 40, i=i)
                held.append((time.perf_counter() - start) / n)
            return (time.perf_counter() - start) / n

    def save() -> float:
        with folder(base) as out:
            start = time.perf_counter()
            for i in range(files):
                torch.save(tensors[i], out / f"{i}.pt")
            return (time.perf_counter() - start) / files

    def hold() -> float:
        record()
        return held[-1]

    found = interleaved({"hold": hold, "through": record, "save": save}, 3 if quick else 9)
    peer = found["save"] * 1e6
    name = "recording 4 KiB, time the job is held"
    through = "recording 4 KiB, to the closed recording"
    return [
        faster(name, found["hold"] * 1e6, "torch.save", peer, "us", 20),
        faster(through, found["through"] * 1e6, "torch.save", peer, "us", None),
    ]


def large(base: Path, quick: bool) -> list[Result]:
    """Recording bursts of 64 MiB tensors that fit the staging memory, once it was used."""
    burst = [torch.randn(16 << 20) for _ in range(3)]
    into = torch.empty(16 << 20).fill_(0)
    with folder(base) as run, Recorder(run) as recorder:

        def hold() -> float:
            for tensor in burst:
                tensor[0] += 1
            drained(recorder)
            time.sleep(0.05)
            return sum(seconds(lambda t=t: tap("x", t)) for t in burst) / len(burst)

        def copy() -> float:
            drained(recorder)
            return sum(seconds(lambda t=t: into.copy_(t)) for t in burst) / len(burst)

        hold()
        drained(recorder)
        time.sleep(1)  # the writer touches all of the ring, once
        found = interleaved({"hold": hold, "copy": copy}, 3 if quick else 11)
    ours, peer = found["hold"] * 1e3, found["copy"] * 1e3
    return [at_most("recording 64 MiB, time the job is held", ours, "copy_", peer, "ms", 1.2)]
