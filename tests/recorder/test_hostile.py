"""Files from strangers: a clear error, soon, in little memory, and nothing read from elsewhere."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import struct
import time
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch
import typed
from safetensors.torch import save_file

from recorder import Recorder, Recording, step, tap
from recorder.errors import GraftError
from recorder.format import parts as parts_module
from recorder.format import shard as shard_module
from recorder.format.inflation import check_claims, measure
from recorder.format.rows import tag_columns
from recorder.format.shard import read_header
from recorder.verify import Checker

pytestmark = pytest.mark.thorough

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]
EXTENT = pytest.mark.parametrize("extent", ["short", pytest.param("long", marks=LONG)])
SECONDS, MEBIBYTES = 5.0, 256


@pytest.fixture
def made(run):
    with Recorder(run):
        for s in range(3):
            for i in range(12):
                tap("x", torch.full((10,), float(i)), layer=i, phase="p", odd=[1, None, "é"])
            tap("loss", [0.5, s])
            step()
    return run


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mutated(rng, data, lo=0):
    """Change a few bytes of `data` from `lo` on."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(lo, len(out)) if len(out) > lo else 0
        how = rng.random()
        if how < 0.4 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif how < 0.6 and out:
            out[at] = rng.choice((0, 255, 127, 128, ord('"'), ord("["), ord("{"), ord("9")))
        elif how < 0.75:
            del out[at : at + rng.randrange(1, 9)]
        elif how < 0.9:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        else:
            out[at:at] = out[max(0, at - rng.randrange(1, 64)) : at]
    return bytes(out)


def fuzz(make, read, count, seed):
    """Read `count` inputs: each a result or an expected error, in time, in little memory."""
    rng = random.Random(seed)
    before, seen = peak(), Counter()
    for number in range(count):
        make(rng)
        started = time.monotonic()
        try:
            read()
            seen["read"] += 1
        except GraftError as err:
            assert str(err)
            seen[type(err).__name__] += 1
        except BaseException as err:
            raise AssertionError(f"seed {seed}, input {number}: {err!r}") from err
        assert time.monotonic() - started < SECONDS, f"seed {seed}, input {number}"
    assert peak() - before < MEBIBYTES
    print(f"seed {seed}, {count} inputs: {dict(seen)}")
    return seen


LARGE = pytest.mark.parametrize("few", [0, 1 << 30], ids=["as large ones", "as small ones"])


@EXTENT
@LARGE
@pytest.mark.filterwarnings("ignore")
def test_shard_headers(tmp_path, extent, few, monkeypatch):
    monkeypatch.setattr(shard_module, "_FEW_BYTES", few)
    path = tmp_path / "a0-00000.safetensors"
    save_file({f"t{i:08d}": torch.zeros(i, 3) for i in range(5)}, path)
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    pieces = ['"dtype"', '"shape"', '"data_offsets"', "[0,0]", "[-1,5]", "1e999", "null", "{}"]
    pieces += ['"__metadata__":{"a":"b"},', "99999999999999999999", "NaN", "[" * 3000, '"\\ud800"']

    def make(rng):
        head = bytearray(mutated(rng, good[:end]))
        if rng.random() < 0.5:
            at = rng.randrange(8, len(head)) if len(head) > 8 else 0
            head[at : at + rng.randrange(20)] = rng.choice(pieces).encode()
            head[:8] = struct.pack("<Q", max(0, len(head) - 8))
        path.write_bytes(bytes(head) + good[end:])

    seen = fuzz(make, lambda: read_header(path), 60_000 if extent == "long" else 1_500, 1)
    assert seen["DamagedRecording"] > seen["read"] > 0


def test_a_large_header_says_what_it_says_as_json(tmp_path, monkeypatch):
    """However it was changed: the same places, or an error both times."""
    monkeypatch.setattr(shard_module, "_FEW_BYTES", 0)
    rng = random.Random(5)
    entries, at = [], 0
    for i in range(40):
        shape = [rng.randrange(4) for _ in range(rng.randrange(3))]
        size = math.prod(shape) * 4
        about = f'"dtype":"F32","shape":{json.dumps(shape)},"data_offsets":[{at},{at + size}]'
        entries.append(f'"t{i:08d}":{{{about}}}')
        at += size
    good = f"{{{','.join(entries)}}}".ljust(4096)
    pieces = ["9", "0", "[", "]", "{", "}", ",", '"', " ", "\n", "t", "-", '},"', "é", "\\u0031"]
    seen = Counter()
    for _ in range(1_500):
        text = list(good)
        for _ in range(rng.randrange(3)):
            where = rng.randrange(len(text) if rng.random() < 0.2 else at + 60)
            size = rng.randrange(3)
            text[where : where + size] = rng.choice([*pieces, *entries])
        raw = "".join(text).encode()
        try:
            expected = shard_module._as_json(raw, 8, tmp_path)
        except GraftError:
            expected = None
        found = shard_module._as_written(raw, 8)
        assert found is None or found == expected, raw
        seen[found is None, expected is None] += 1
    assert seen[False, False] > 100 and seen[True, True] > 100 and not seen[False, True]


@EXTENT
def test_parquet_files(made, extent, monkeypatch):
    part = parts_module.Part(made / "rank-00000", 0, 0, 0, is_sealed=True)
    good = part.path.read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")

    def make(rng):
        part.path.write_bytes(mutated(rng, good, footer if rng.random() < 0.7 else 0))

    seen = fuzz(make, lambda: parts_module.read_part(part), 20_000 if extent == "long" else 500, 2)
    assert seen["DamagedRecording"] > 0


@EXTENT
@pytest.mark.parametrize("name", ["recording.json", "rank-00000/attempt-0.json"])
def test_descriptions_and_claims(made, extent, name):
    path = made / name
    good = path.read_bytes().rstrip() + b"\n"
    values = [None, -1, 1 << 70, 1e300, "x" * 10_000, [], {}, [[]] * 50, True, "../../etc"]

    def make(rng):
        if rng.random() < 0.5:
            path.write_bytes(mutated(rng, good))
            return
        data = json.loads(good)
        data[rng.choice(sorted(data))] = rng.choice(values)
        path.write_text(json.dumps(data))

    def read():
        back = Recording.open(made)
        back.claims()
        back.incomplete()

    fuzz(make, read, 10_000 if extent == "long" else 300, 3)


@EXTENT
def test_journals_and_tags(run, extent):
    recorder = Recorder(run)
    with recorder:
        for i in range(6):
            tap("x", torch.full((10,), float(i)), layer=i)
            tap("loss", i)
        while recorder._writer.rows_written < 12:
            time.sleep(0.01)
        (path,) = run.rglob("*.journal")
        good = path.read_bytes()
        copy = run.with_name("copy")
        shutil.copytree(run, copy)
    path = copy / path.relative_to(run)
    odd = [None, -5, 1 << 65, 1.5, "é\u0000", [1], {"a": 1}, '{"a":' * 500, "[]", "\x1b[31m", True]

    def make(rng):
        if rng.random() < 0.5:
            path.write_bytes(mutated(rng, good))
            return
        lines = [json.loads(line) for line in good.decode().splitlines()]
        for _ in range(rng.randrange(1, 4)):
            line = rng.choice(lines)
            line[rng.choice(sorted(line))] = rng.choice(odd)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read():
        back = Recording.open(copy)
        for row in back.rows().iter_rows(named=True):
            if row["shard"] is not None:
                try:
                    back.read(row)
                except GraftError:
                    pass
        back.manifest()

    fuzz(make, read, 10_000 if extent == "long" else 300, 4)


@EXTENT
def test_all_of_a_recording_by_every_command(made, tmp_path, capfd, extent):
    """Mutate any file; each command answers with 0, 1 or 2 and no traceback."""
    rng = random.Random(5)
    for number in range(300 if extent == "long" else 10):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(made, copy)
        path = rng.choice(sorted(p for p in copy.rglob("*") if p.is_file()))
        path.write_bytes(mutated(rng, path.read_bytes().rstrip() or b" "))
        for command in (
            ["ls"],
            ["show"],
            ["verify"],
            ["verify", "--repair", f"{copy}.out"],
            ["diff", made],
        ):
            done = typed.graft(command[0], copy, *command[1:])
            assert done.exit_code in (0, 1, 2), (command, done.stderr)
            assert done.exception is None or isinstance(done.exception, SystemExit), command
            assert "Traceback" not in done.stderr
    assert "panicked" not in capfd.readouterr().err


def alter(run, **columns):
    """Rewrite the sealed manifest with other columns."""
    (path,) = run.glob("rank-*/*.parquet")
    frame = pl.read_parquet(path, memory_map=False).with_columns(
        **{name: pl.lit(value) for name, value in columns.items()}
    )
    frame.write_parquet(path, statistics=False)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "rank-00000/../../secret.safetensors",
        "/etc/passwd",
        "rank-00000/a0-00000.safetensors/../../secret.safetensors",
        "rank-00001/a0-00000.safetensors",
        "rank-00000\\..\\secret.safetensors",
        "rank-00000/a0-00000.safetensors\n",
    ],
)
def test_no_shard_outside_the_rank_s_folder(made, shard):
    save_file({"t00000000": torch.zeros(10)}, made.parent / "secret.safetensors")
    alter(made, shard=shard)
    back = Recording.open(made)
    row = back.rows().filter(back.rows()["kind"] == "tensor").row(0, named=True)
    with pytest.raises(GraftError, match="names the shard"):
        back.read(row)
    assert all("names the shard" in p.fact for r in Checker(made).ranks() for p in r.problems)


def link_shard(run, away):
    (shard,) = run.glob("rank-*/*.safetensors")
    shard.rename(away)
    shard.symlink_to(away)


def link_parquet(run, away):
    (part,) = run.glob("rank-*/*.parquet")
    part.rename(away)
    part.symlink_to(away)


def link_rank(run, away):
    (run / "rank-00000").rename(away)
    (run / "rank-00000").symlink_to(away)


def link_description(run, away):
    (run / "recording.json").rename(away)
    (run / "recording.json").symlink_to(away)


def pipe(run, away):
    (shard,) = run.glob("rank-*/*.safetensors")
    shard.unlink()
    os.mkfifo(shard)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", [link_shard, link_parquet, link_rank, link_description, pipe])
def test_links_and_pipes_are_not_followed(made, what, shell):
    what(made, made.parent / "away")
    with pytest.raises(GraftError):
        back = Recording.open(made)
        back.load(rank=0, name="x", layer=0, phase="p", odd=[1, None, "é"])
    done = shell(shell.graft, "verify", made)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr


@pytest.mark.thorough
def test_a_bomb_of_zeros_in_the_manifest(made):
    (path,) = made.glob("rank-*/*.parquet")
    frame = pl.read_parquet(path, memory_map=False)
    frame = frame.head(1).with_columns(extras=pl.lit("0" * (300 << 20)))
    frame.write_parquet(path, compression="zstd", statistics=False)
    del frame
    assert path.stat().st_size < 1 << 20 and measure(path).nbytes > 300 << 20
    before = peak()
    with pytest.raises(GraftError, match="claim to become"):
        Recording.open(made).rows()
    assert peak() - before < MEBIBYTES


def test_a_manifest_that_pretends_to_have_many_rows(made):
    (path,) = made.glob("rank-*/*.parquet")
    frame = pl.read_parquet(path, memory_map=False)
    pl.concat([frame.head(1)] * 1_000).sample(2_000_000, with_replacement=True).write_parquet(path)
    with pytest.raises(GraftError, match="rows, more than"):
        Recording.open(made).rows()


@pytest.mark.thorough
def test_many_rows_that_repeat_one_another_are_a_recording_like_any_other(made):
    """A job that taps the same few tensors a million times has a manifest that packs very well."""
    (path,) = made.glob("rank-*/*.parquet")
    row = pl.read_parquet(path, memory_map=False).head(1)
    rows = pl.concat([row] * 200_000).with_columns(
        seq=pl.int_range(200_000), time_ns=pl.int_range(200_000) * 1_000
    )
    rows.write_parquet(path, compression="zstd", statistics=False)
    assert measure(path).nbytes > 40 * path.stat().st_size
    check_claims([path])


def test_huge_claims_of_a_shard_take_no_memory(made):
    (path,) = made.glob("rank-*/*.safetensors")
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    header = json.dumps({"t00000000": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    alter(made, nbytes=1 << 42)
    before = peak()
    back = Recording.open(made)
    row = back.rows().filter(back.rows()["kind"] == "tensor").row(0, named=True)
    with pytest.raises(GraftError, match="it ends at byte"):
        back.read(row)
    assert next(iter(Checker(made).ranks())).damaged > 0
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(GraftError, match="header claims"):
        read_header(path)
    assert peak() - before < MEBIBYTES


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ('{"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
         '"u":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}', "overlaps"),
        ('{"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
         '"t":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}', "twice"),
        ('{"t":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}', "the shape"),
        ('{"t":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}}', "the shape"),
        ('{"t":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}', "the offsets"),
        ("[" * 100_000, "not JSON"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("named", ["as others do", "as a shard's writer does"])
@LARGE
def test_headers_that_contradict_themselves(tmp_path, header, said, named, few, monkeypatch):
    monkeypatch.setattr(shard_module, "_FEW_BYTES", few)
    path = tmp_path / "x.safetensors"
    if named == "as a shard's writer does":
        header = header.replace('"t"', '"t0"').replace('"u"', '"t1"')
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(64))
    with pytest.raises(GraftError, match=said):
        read_header(path)


@LARGE
def test_a_header_says_the_same_however_it_is_written(tmp_path, few, monkeypatch):
    monkeypatch.setattr(shard_module, "_FEW_BYTES", few)
    header = {
        "t00000000": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "t00000001": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
        "t00000002": {"dtype": "BF16", "shape": [0], "data_offsets": [25, 25]},
    }
    found = []
    for separators in ((",", ":"), (", ", ": ")):
        text = json.dumps(header, separators=separators).ljust(400).encode()
        path = tmp_path / f"x{len(found)}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(25))
        found.append(read_header(path))
    places = {"t00000000": (408, 24), "t00000001": (432, 1), "t00000002": (433, 0)}
    assert found == [places, places]


@pytest.mark.slow
def test_a_million_tags(made, shell):
    tags = json.dumps({f"tag{i}": i for i in range(1_000_000)})
    alter(made, tags=tags)
    before = peak()
    with pytest.raises(GraftError, match="tags of|bytes of text"):
        Recording.open(made).rows()
    assert peak() - before < MEBIBYTES
    frame = pl.DataFrame({"tags": [json.dumps({f"tag{i}": 0}) for i in range(2_000)]})
    with pytest.raises(GraftError, match="2000 different tags"):
        tag_columns(frame)


def test_a_sparse_journal_of_gigabytes(made):
    folder = made / "rank-00000"
    with (folder / "a0-00001.journal").open("wb") as file:
        file.truncate(50 << 30)
    before, started = peak(), time.monotonic()
    assert Recording.open(made).rows().height == 39
    assert time.monotonic() - started < SECONDS and peak() - before < MEBIBYTES


def test_too_long_values_are_refused_when_they_are_tapped(run, capsys):
    with Recorder(run):
        tap("value", [0.123456789] * 200_000)
        tap("extras", torch.ones(3), extras={"a": "b" * 2_000_000})
        tap("tags", torch.ones(3), tag="c" * 20_000)
        tap("fine", torch.ones(3))
    err = capsys.readouterr().err
    assert "more than a megabyte; tap it as a tensor" in err
    assert "extras are of more than a megabyte" in err and "more than 16,000 characters" in err
    assert Recording.open(run).rows()["name"].to_list() == ["extras", "fine"]


def test_a_recording_of_the_first_version_stays_readable():
    back = Recording.open(Path(__file__).parent.parent / "data" / "recording-v1")
    assert back.meta["format_version"] == 1 and back.world_size == 2 and not back.incomplete()
    assert back.rows().height == 20
    for rank in range(2):
        for i in range(2):
            got = back.load(rank=rank, name="attn_q", step=1, layer=i)
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, torch.full((2, 3), 8.0 * rank + i + 4, dtype=torch.bfloat16))
        assert back.value(rank=rank, name="loss", step=1) == 0.5
    grads = back.rows().filter(back.rows()["kind"] == "grad")
    assert grads.height == 4 and torch.equal(back.read(grads.row(0, named=True)), torch.ones(2))
    assert all(not report.problems for report in Checker(back.path).ranks())
