"""What a diff costs: large tensors, many small ones, manifests alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import torch
from harness import Result, at_most, folder, interleaved, seconds
from replaying import make_manifest

from recorder import Recorder, Recording, tap
from replayer import diff


def large(base: Path, quick: bool) -> list[Result]:
    """All measures of one pair that differs by rounding, against reading an equal pair.

    `torch.equal` ends at the first element that differs, so the peer has a pair without one.
    """
    n = (32 << 20 if quick else 1 << 30) // 2
    random = torch.Generator().manual_seed(0)  # some figures are slower of some data
    value = torch.randn(n, generator=random).bfloat16()
    with folder(base) as out:
        a, same, b = out / "a", out / "same", out / "b"
        _record(a, [value])
        _record(same, [value])
        noise = torch.randint(1, 4, (n,), generator=random, dtype=torch.int16)
        _record(b, [(value.view(torch.int16) + noise).view(torch.bfloat16)])
        found = diff(a, b)
        assert found.counts()["equal"] == 0 and found.pairs["changed"].item() > 0.99 * n

        def peer() -> None:
            one, other = (_tensors(run) for run in (a, same))
            assert torch.equal(next(one), next(other))

        taken = interleaved(
            {"diff": lambda: seconds(lambda: diff(a, b)), "peer": lambda: seconds(peer)},
            3 if quick else 5,
        )
    what = f"diff, all measures, 2 x {n * 2 >> 20:,} MiB of bfloat16"
    ours, theirs = taken["diff"] * 1e3, taken["peer"] * 1e3
    return [at_most(what, ours, "read both, torch.equal", theirs, "ms", 4)]


def many(base: Path, quick: bool) -> list[Result]:
    """Many small pairs that all differ, against a loop over them with one figure."""
    n = 200 if quick else 2_000
    values = [torch.randn(64, 64) for _ in range(n)]
    with folder(base) as out:
        a, b = out / "a", out / "b"
        _record(a, values)
        _record(b, [value * (1 + 1e-6 * torch.randn(64, 64)) for value in values])
        assert diff(a, b).counts()["equal"] == 0

        def peer() -> None:
            for one, other in zip(_tensors(a), _tensors(b), strict=True):
                (one - other).abs().max().item()

        taken = interleaved(
            {"diff": lambda: seconds(lambda: diff(a, b)), "peer": lambda: seconds(peer)},
            3 if quick else 5,
        )
    what, peer_is = f"diff, {n:,} pairs of 16 KiB", "a loop of read, abs, max"
    return [_within(what, taken["diff"], peer_is, taken["peer"], n / 1e3)]


def manifests(base: Path, quick: bool) -> list[Result]:
    """Two manifests of 64 ranks, opened and compared; every second digest differs."""
    found = []
    for rows in (32_000,) if quick else (500_000, 1_000_000):
        with folder(base) as out:
            a, b = out / "a", out / "b"
            for run in (a, b):
                make_manifest(run, rows, 64)
            files = [*a.glob("rank-*/*.parquet"), *b.glob("rank-*/*.parquet")]
            for file in b.glob("rank-*/*.parquet"):
                _with_other_digests(file)
            kept = rows // 64 * 64
            counts = diff(a, b, manifest_only=True).counts()
            assert counts["equal"] + counts["unmeasured"] == kept and counts["unmeasured"]
            taken = interleaved(
                {
                    "diff": lambda a=a, b=b: seconds(lambda: diff(a, b, manifest_only=True)),
                    "peer": lambda files=files: seconds(lambda: pl.read_parquet(files)),
                },
                3,
            )
        what, limit = f"diff --manifest-only, 2 x {rows:,} rows of 64 ranks", 2 * rows / 500_000
        found.append(_within(what, taken["diff"], "read_parquet of both", taken["peer"], limit))
    return found


def _record(run: Path, values: list[torch.Tensor]) -> None:
    with Recorder(run):
        for i, value in enumerate(values):
            tap("x", value, i=i)


def _tensors(run: Path) -> Iterator[torch.Tensor]:
    opened = Recording.open(run)
    for row in opened.rows().iter_rows(named=True):
        yield opened.read(row)


def _with_other_digests(file: Path) -> None:
    """Change every second row's digest, and its mean by a little."""
    frame, odd = pl.read_parquet(file), pl.col("seq") % 2 == 1
    frame.with_columns(
        digest=pl.when(odd).then(pl.lit("f") + pl.col("digest").str.tail(31)).otherwise("digest"),
        mean=pl.when(odd).then(pl.col("mean") * (1 + 1e-6)).otherwise("mean"),
    ).write_parquet(file, compression="zstd")


def _within(what: str, ours: float, peer: str, theirs: float, limit: float) -> Result:
    """Return a result whose target is a greatest time."""
    target, met = f"at most {limit:g} s", ours <= limit
    return Result(what, ours, peer, theirs, "s", f"{ours / theirs:.2f}x", target, met)
