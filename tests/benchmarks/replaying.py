"""What a replay costs: grafts, their figures, finding records, memory."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import exchange
import polars as pl
import torch
import xxhash
from harness import Result, at_most, child, faster, folder, interleaved, seconds

from recorder import Recorder, Recording, declare_mesh, tap
from recorder.format.index import Index, whole_key
from recorder.format.schema import COLUMNS, polars_schema
from replayer import Replayer
from replayer.measuring.compare import difference

_CLAIM = {"format_version": 1, "recording": "made", "state": "complete"}


def grafts(base: Path, quick: bool) -> list[Result]:
    """4 senders to 2 receivers from disk, with metrics, against a live exchange without.

    Both sides need the user's own transform; the aim is for what each takes beyond it.
    """
    found = []
    for nbytes, repeats in ((64 << 10, 60), (4 << 20, 12), (64 << 20, 4)):
        if quick and nbytes > 1 << 20:
            continue
        with folder(base) as out:
            run = str(out / "run")
            exchange.make(run, nbytes, repeats)
            taken = interleaved(
                {
                    "exchange": lambda n=nbytes, r=repeats: exchange.spawn("exchange", 6, n, r),
                    "graft": lambda n=nbytes, r=repeats, run=run: exchange.spawn(
                        "graft", 2, run, n, r
                    ),
                    "transform": lambda n=nbytes, r=repeats: exchange.spawn("transform", 2, n, r),
                },
                1 if quick else 3,
                warm_ups=0,
            )
        size = f"{nbytes >> 10} KiB" if nbytes < 1 << 20 else f"{nbytes >> 20} MiB"
        ours, alone, live = (taken[name] * 1e3 for name in ("graft", "transform", "exchange"))
        what = f"graft, 4 to 2, {size} a rank"
        found.append(faster(what, ours, "exchange", live, "ms", None))
        found.append(at_most(what, ours, "transform and copy_ alone", alone, "ms", None))
        beyond, theirs = ours - alone, live - alone
        found.append(
            Result(
                f"the same beyond transform and copy_, {size} a rank", beyond,
                "exchange beyond them", theirs, "ms",
                f"1/{theirs / beyond:.1f}" if beyond > 0 else "nothing",
                "at most 1/50", beyond * 50 <= theirs,
            )
        )  # fmt: skip
    return found


def layouts(base: Path, quick: bool) -> list[Result]:
    """4 senders to 2 receivers by what both declare, each record for the first time, no metrics."""
    rows, n = (512, 4) if quick else (16_384, 12)
    return [_layout(base, rows, n, 0, "t[tp] h"), _layout(base, rows, n, 1, "t h[tp]")]


def _layout(base: Path, rows: int, n: int, dim: int, dims: str) -> Result:
    values = [torch.randn(rows, 1024) for _ in range(4)]
    target = torch.cat(values, dim).chunk(2, dim)[1].clone()
    with folder(base) as out:
        for rank, value in enumerate(values):
            declare_mesh(tp=(rank, 4))
            with Recorder(out / "run", rank=rank, world_size=4):
                for i in range(n):
                    value[0, 0] = i
                    tap("x", value, dims=dims, i=i)
        declare_mesh(tp=(1, 2))
        with Replayer(out / "run", metrics=False, rank=1, world_size=2) as replay:
            counted = iter(range(n))
            taken = interleaved(
                {
                    "graft": lambda: seconds(lambda: tap("x", target, dims=dims, i=next(counted))),
                    "by hand": lambda: seconds(
                        lambda: target.copy_(torch.cat(values, dim).chunk(2, dim)[1])
                    ),
                },
                n - 1,
            )
        declare_mesh()
        assert replay.log()["outcome"].to_list() == ["grafted"] * n
    ours, peer = taken["graft"] * 1e3, taken["by hand"] * 1e3
    what = f"layouts, 4 to 2, {rows >> 8} MiB a rank, cut along dim {dim}"
    return at_most(what, ours, "torch.cat, slice, copy_", peer, "ms", 2)


def identity(base: Path, quick: bool) -> list[Result]:
    """Grafting 64 MiB by identity, metrics off, each record for the first time."""
    n = 4 if quick else 12
    value, target = torch.randn(16 << 20), torch.randn(16 << 20)
    with folder(base) as out:
        with Recorder(out / "run"):
            for i in range(n):
                value[0] = i
                tap("x", value, i=i)
        with Replayer(out / "run", metrics=False) as replay:
            counted = iter(range(n))
            taken = interleaved(
                {
                    "graft": lambda: seconds(lambda: tap("x", target, i=next(counted))),
                    "copy": lambda: seconds(lambda: target.copy_(value)),
                },
                n - 1,
            )
        assert replay.log()["outcome"].to_list() == ["grafted"] * n
    ours, peer = taken["graft"] * 1e3, taken["copy"] * 1e3
    return [at_most("graft by identity, 64 MiB", ours, "copy_", peer, "ms", 2)]


def metrics(base: Path, quick: bool) -> list[Result]:
    """The log's figures over a pair of 64 MiB, against `torch.equal` over the same pair."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        n = (4 << 20 if quick else 64 << 20) // dtype.itemsize
        a = torch.randn(n).to(dtype)
        same, last = a.clone(), a.clone()
        last[-1] += 1
        b = (a.float() * (1 + 0.01 * torch.randn(n))).to(dtype)
        _check(a, b)
        taken = interleaved(
            {
                "last": lambda a=a, last=last: seconds(lambda: difference(a, last)),
                "every": lambda a=a, b=b: seconds(lambda: difference(a, b)),
                "equal": lambda a=a, last=last: seconds(lambda: torch.equal(a, last)),
                "same": lambda a=a, same=same: seconds(lambda: torch.equal(a, same)),
            },
            9,
        )
        name = str(dtype).removeprefix("torch.")
        for what, peer, how in (
            ("last", "equal", "the last element differs"),
            ("every", "same", "all elements differ"),
        ):
            found.append(
                at_most(
                    f"log metrics, {name}, {how}", taken[what] * 1e3, "torch.equal",
                    taken[peer] * 1e3, "ms", 2,
                )
            )  # fmt: skip
    return found


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    """Compare the figures with their definitions in float64."""
    x, y, got = a.double(), b.double(), difference(a, b)
    apart = x - y
    expected = {
        "rel_diff": apart.dot(apart) / (x.dot(x) + y.dot(y)),
        "max_abs": apart.abs().max(),
        "mean_abs": apart.abs().mean(),
    }
    for name, value in expected.items():
        assert abs(getattr(got, name) / value.item() - 1) < 1e-9, name
    assert got.changed == int((x != y).sum())


def opening(base: Path, quick: bool) -> list[Result]:
    """A manifest of a million rows from 64 ranks: read it, index it, find 10,000 keys."""
    rows, ranks, keys = (64_000, 64, 1_000) if quick else (1_000_000, 64, 10_000)
    with folder(base) as out:
        run = out / "run"
        make_manifest(run, rows, ranks)
        files = sorted(run.glob("rank-*/*.parquet"))
        steps = rows // ranks // 320
        picked = random.Random(0)
        wanted = [
            (f"tap{picked.randrange(8)}", picked.randrange(40), picked.randrange(steps))
            for _ in range(keys)
        ]
        frame = Recording.open(run).latest()
        index = Index.build(frame)

        def find() -> float:
            start = time.perf_counter()
            for name, layer, step in wanted:
                assert (
                    len(index.find("tensor", whole_key(name, {"layer": layer}), step, 0)) == ranks
                )
            return (time.perf_counter() - start) / keys

        name, layer, step = wanted[0]
        taken = interleaved(
            {
                "open": lambda: seconds(lambda: Recording.open(run).rows()),
                "one": lambda: seconds(
                    lambda: Recording.open(run).find(ranks - 1, name, step, layer=layer)
                ),
                "index": lambda: seconds(lambda: Index.build(Recording.open(run).latest())),
                "peer": lambda: seconds(lambda: pl.read_parquet(files)),
                "find": find,
            },
            3 if quick else 5,
        )
    what, peer = f"{rows:,} rows of {ranks} ranks", taken["peer"] * 1e3
    found = taken["find"] * 1e6
    return [
        at_most(f"opening {what}", taken["open"] * 1e3, "read_parquet", peer, "ms", 3),
        at_most("the same, and finding a key", taken["one"] * 1e3, "read_parquet", peer, "ms", 3),
        at_most("opening and indexing", taken["index"] * 1e3, "read_parquet", peer, "ms", None),
        Result(
            "finding a key on all ranks", found, "", 0.0, "us", f"{found:.1f} us",
            "at most 20 us", found <= 20,
        ),
    ]  # fmt: skip


def replay_memory(base: Path, quick: bool) -> list[Result]:
    """Peak memory of a job that replays 50 GiB, beyond that of the same job alone."""
    tensors = 32 if quick else 800
    with folder(base) as out:
        make_sparse(out / "run", tensors)
        alone = float(child("replay_job.py", "-", tensors))
        replayed = float(child("replay_job.py", out / "run", tensors))
    extra, flight = replayed - alone, 64
    return [
        Result(
            f"replaying {tensors / 16:g} GiB, peak memory", extra, "tensors in flight", flight,
            "MiB", f"+{extra - flight:.0f} MiB", "at most +256 MiB", extra - flight <= 256,
        )
    ]  # fmt: skip


def make_manifest(run: Path, rows: int, ranks: int) -> None:
    """Write a recording that has a manifest and nothing else."""
    run.mkdir(parents=True)
    about = {"format_version": 1, "id": "made", "world_size": ranks, "command": [], "options": {}}
    (run / "recording.json").write_text(json.dumps(about))
    schema = polars_schema(COLUMNS)
    for rank in range(ranks):
        folder = run / f"rank-{rank:05d}"
        folder.mkdir()
        seq = range(rows // ranks)
        frame = pl.DataFrame(
            {
                "rank": [rank] * len(seq),
                "seq": list(seq),
                "step": [i // 320 for i in seq],
                "name": [f"tap{i % 8}" for i in seq],
                "occurrence": [0] * len(seq),
                "tags": [f'{{"layer":{i // 8 % 40}}}' for i in seq],
                "kind": ["tensor"] * len(seq),
                "dtype": ["bfloat16"] * len(seq),
                "shape": [[1024, 8]] * len(seq),
                "nbytes": [16384] * len(seq),
                "digest": [f"{rank:08x}{i:024x}" for i in seq],
                "shard": [f"{folder.name}/a0-00000.safetensors"] * len(seq),
                "tensor": [f"t{i:08d}" for i in seq],
                "mean": [i * 0.1 for i in seq],
                "time_ns": [10**18 + i for i in seq],
            }
        )
        missing = [pl.lit(None).alias(name) for name in schema if name not in frame.columns]
        frame = frame.with_columns(missing).select(
            pl.col(name).cast(dtype) for name, dtype in schema.items()
        )
        frame.write_parquet(folder / "a0-00000.parquet", compression="zstd")
        (folder / "attempt-0.json").write_text(
            json.dumps({**_CLAIM, "rank": rank, "rows": len(seq)})
        )


def make_sparse(run: Path, tensors: int, nbytes: int = 64 << 20) -> None:
    """Write a recording of zeros that takes no room on disk."""
    folder = run / "rank-00000"
    folder.mkdir(parents=True)
    about = {"format_version": 1, "id": "made", "world_size": 1, "command": [], "options": {}}
    (run / "recording.json").write_text(json.dumps(about))
    digest = xxhash.xxh3_128_hexdigest(bytes(nbytes))
    schema, each = polars_schema(COLUMNS), 16
    for shard in range(-(-tensors // each)):
        mine = range(shard * each, min((shard + 1) * each, tensors))
        name = f"a0-{shard:05d}"
        header = {
            f"t{i:08d}": {
                "dtype": "F32",
                "shape": [nbytes // 4],
                "data_offsets": [(i - mine.start) * nbytes, (i - mine.start + 1) * nbytes],
            }
            for i in mine
        }
        text = json.dumps(header).encode().ljust(16384 - 8)
        with (folder / f"{name}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(16384 + len(mine) * nbytes)
        rows = [
            {
                "rank": 0, "seq": i, "step": 0, "name": "x", "occurrence": 0,
                "tags": f'{{"i":{i}}}', "kind": "tensor", "dtype": "float32",
                "shape": [nbytes // 4], "nbytes": nbytes, "digest": digest,
                "shard": f"rank-00000/{name}.safetensors", "tensor": f"t{i:08d}", "time_ns": i,
            }
            for i in mine
        ]  # fmt: skip
        pl.DataFrame(rows, schema=schema).write_parquet(folder / f"{name}.parquet")
    (folder / "attempt-0.json").write_text(json.dumps({**_CLAIM, "rank": 0, "rows": tensors}))
