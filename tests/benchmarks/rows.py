"""What rows that are matched one by one cost a receiver, against one slice of as many bytes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
from harness import Result, at_most, folder, interleaved, seconds

from recorder import Recorder, Recording, rows, tap
from recorder.layouts.parse import parse_dims
from recorder.layouts.rowed import Rowed
from recorder.ranks import Rank
from replayer.match import Matcher
from replayer.rowing.aligned import Aligned
from replayer.rowing.match import RowMatcher

_ROW = 4 << 10  # bytes
_EXTRA_MS = 10.0


def _recorded(path: Path, total: int, ranks: int, steps: int) -> None:
    """Record rows of all ids from 0 to `total`, dealt out at random."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    parts = iter(order.split(-(-total // (ranks * steps))))
    for rank in range(ranks):
        with Recorder(path, rank=rank, world_size=ranks, level="tensors") as recorder:
            for _ in range(steps):
                ids = next(parts)
                h = ids[:, None].expand(-1, _ROW // 4).to(torch.float32)
                with rows(t=ids):
                    tap("h", h, dims="t h", layer=0)
                recorder.on_step()


def _indexed(path: Path) -> tuple[Recording, RowMatcher]:
    run = Recording.open(path)
    return run, RowMatcher(run, Matcher(run.latest()), check=True)


def _contiguous(run: Recording, nbytes: int) -> list[tuple[Path, int]]:
    """Return shards that are large enough for one slice, and where it may begin."""
    found = []
    for path in sorted(run.path.glob("rank-*/*.safetensors")):
        size = path.stat().st_size
        if size > nbytes + (1 << 16):
            found.append((path, size - nbytes))
    return found


def matched(base: Path, quick: bool) -> list[Result]:
    """A receiver's 4,096 rows of 1,000,000, from 64 ranks: found and read."""
    total, ranks, steps, wanted = (10_000, 4, 4, 256) if quick else (1_000_000, 64, 16, 4_096)
    rng = random.Random(0)
    with folder(base) as work:
        path = work / "base"
        _recorded(path, total, ranks, steps)
        run, matcher = _indexed(path)
        selected = _selected()
        indexing = seconds(lambda: matcher.find(selected, "tensor", [("t",)]))
        slices = _contiguous(run, wanted * _ROW)
        dims = parse_dims("t h")

        def receiver() -> float:
            ids = torch.tensor(rng.sample(range(total), wanted))
            target = torch.zeros(wanted, _ROW // 4)
            records = matcher.find(selected, "tensor", [("t",)])
            assert records is not None

            def work() -> None:
                made = Aligned(
                    run,
                    records,
                    [Rowed(("t",), (0,), ids)],
                    dims,
                    target,
                    None,
                    Rank(0, 1, ""),
                    replicas="error",
                    check=True,
                ).make()
                assert made.missing == 0
                assert float(made.rows[7, 3]) == float(ids[7])

            return seconds(work)

        def slice_of_as_many() -> float:
            file, most = rng.choice(slices)
            number = os.open(file, os.O_RDONLY)
            into = memoryview(bytearray(wanted * _ROW))
            try:
                at = rng.randrange(most)
                return seconds(lambda: os.preadv(number, [into], at))
            finally:
                os.close(number)

        found = interleaved({"ours": receiver, "slice": slice_of_as_many}, 5 if quick else 15, 3)
        ours, slice_ms = found["ours"] * 1e3, found["slice"] * 1e3
        limit = 3 + _EXTRA_MS / slice_ms
        return [
            at_most(
                f"{wanted:,} rows of 4 KiB found and read, of {total:,} from {ranks} ranks", ours,
                "one slice of as many bytes", slice_ms, "ms", limit,
            ),
            at_most(
                f"index of {total:,} rows, once a name", indexing * 1e3,
                "one slice of as many bytes", slice_ms, "ms", None,
            ),
        ]  # fmt: skip


def _selected():
    from recorder.tags import Key
    from recorder.taps.selection import Selected

    text = '{"layer":0}'
    return Selected(Key("h", text, 0, 0), {"layer": 0}, text, False, 0, True, False)
