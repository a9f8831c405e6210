"""The recording on disk: readable without this package, and believed only where it is whole."""

from __future__ import annotations

import json
import os
import shutil
import threading

import polars as pl
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from recorder import Recorder, Recording, tap
from recorder.errors import (
    DamagedRecording,
    NoSuchRecord,
    NotARecording,
    UnsupportedVersion,
    UsageError,
)
from recorder.format.index import Index, searched
from recorder.format.schema import COLUMNS
from recorder.writing import store as store_module
from recorder.writing import summaries as summaries_module
from recorder.writing.leftovers import seal_leftovers


def job(rank):
    for layer in range(3):
        tap("attn_out", torch.full((2, 3), rank + layer / 10), dims="b h[tp]", layer=layer)
    tap("mask", torch.tensor([True, False, True]))
    tap("x", torch.arange(4, dtype=torch.int64))
    tap("note", "hello", extras={"scale": 0.5})


def test_shards_are_plain_safetensors_and_the_manifest_plain_parquet(record, run):
    record(job, 2)
    rows = pl.scan_parquet(run / "rank-*" / "*.parquet").collect()
    assert dict(rows.schema) == {
        name: pl.List(pl.Int64) if dtype == "List(Int64)" else getattr(pl, dtype)
        for name, dtype in COLUMNS.items()
    }
    assert rows.height == 12
    for row in rows.filter(pl.col("kind") == "tensor").iter_rows(named=True):
        assert row["shard"].startswith(f"rank-{row['rank']:05d}/")
        with safe_open(run / row["shard"], "pt") as shard:
            t = shard.get_tensor(row["tensor"])
        assert list(t.shape) == row["shape"] and str(t.dtype) == f"torch.{row['dtype']}"
    for shard in run.glob("rank-*/*.safetensors"):
        assert load_file(shard)


def test_open_tells_world_size_ranks_and_meta(record):
    run = record(job, 3)
    assert run.world_size == 3 and run.ranks == [0, 1, 2]
    assert run.meta["format_version"] == 1.1
    assert run.meta["options"] == {
        "modules": [],
        "taps": None,
        "step_on": "step",
        "rows": None,
        "max_hold": None,
        "filter": None,
        "level": "tensors",
        "max_bytes": None,
        "min_free": None,
        "keep_last": None,
        "fsync": "off",
        "access": "private",
        "staging": 256 << 20,
        "when_full": "hold",
    }
    assert run.meta["provenance"]["versions"]["torch"] == torch.__version__
    assert isinstance(run.meta["command"], list)
    assert {c["state"] for c in run.claims()} == {"complete"}


def test_load_finds_by_whole_key(record):
    run = record(job, 2)
    assert torch.equal(
        run.load(rank=1, name="attn_out", step=0, occurrence=0, layer=2)[0, 0], torch.tensor(1.2)
    )
    mine = run.load(0, "attn_out", layer=0)
    mine.fill_(9)  # the caller's own
    assert run.load(0, "attn_out", layer=0).sum() == 0


def test_a_missing_key_names_the_nearest_and_what_differs(record):
    run = record(job, 2)
    with pytest.raises(
        NoSuchRecord,
        match=r"nearest: attn_out layer=2 .* \(layer is 2, asked 7\)|"
        r"layer is \d, asked 7",
    ):
        run.load(0, "attn_out", layer=7)
    with pytest.raises(NoSuchRecord, match="nearest: attn_out layer=0 .*the name differs"):
        run.load(0, "attn_ou", layer=0)
    with pytest.raises(NoSuchRecord, match="the same key on rank 0, 1"):
        run.load(5, "attn_out", layer=0)
    with pytest.raises(NoSuchRecord, match="it was recorded 1 time in that step"):
        run.load(0, "attn_out", occurrence=1, layer=0)
    with pytest.raises(UsageError, match="is a value, not a tensor"):
        run.read(run.rows().filter(pl.col("name") == "note").row(0, named=True))


def test_statistics_are_over_the_finite_elements_and_count_the_others(record):
    t = torch.tensor([1.0, 2.0, 6.0, float("nan"), float("inf"), float("-inf")])
    rows = record(lambda rank: [tap("a", t), tap("b", t[3:]), tap("c", t[:0])]).rows()
    a, b, c = rows.iter_rows(named=True)
    assert (a["min"], a["max"], a["mean"], a["nan_count"], a["inf_count"]) == (1, 6, 3, 1, 2)
    assert a["std"] == pytest.approx(torch.tensor([1.0, 2, 6]).std().item())
    assert a["l2"] == pytest.approx(41**0.5)
    assert b["min"] is b["mean"] is b["l2"] is None and b["nan_count"] == 1
    assert c["max"] is None and c["nan_count"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8])
def test_statistics_agree_with_torch_in_float64(record, dtype):
    t = (torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)) * 50 + 100).to(dtype)
    row = record(lambda rank: tap("a", t)).rows().row(0, named=True)
    wide = t.double()
    for name in ("min", "max", "mean", "std"):
        assert row[name] == pytest.approx(getattr(wide, name)().item(), rel=1e-9)
    assert row["l2"] == pytest.approx(wide.norm().item(), rel=1e-9)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int16, torch.bool, torch.float8_e5m2]
)
@pytest.mark.parametrize("shape", [(7,), (64, 16), (1,)])
def test_many_small_payloads_have_the_statistics_of_each(record, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    many = [(torch.randn(shape, generator=generator) * 9 + i).to(dtype) for i in range(60)]
    if dtype.is_floating_point:
        many[3].view(-1)[0] = float("inf")
        many[59].view(-1)[-1] = float("nan")
    run = record(lambda rank: [tap("x", t, i=i) for i, t in enumerate(many)])
    for t, row in zip(many, run.rows().iter_rows(named=True), strict=True):
        x = t.to(torch.float32).double().flatten() if dtype.is_floating_point else t.double()
        finite = x.flatten()[x.flatten().isfinite()]
        assert row["nan_count"] == int(x.isnan().sum())
        assert row["inf_count"] == int(x.isinf().sum())
        if not finite.numel():
            assert row["min"] is row["mean"] is row["l2"] is None
            continue
        assert row["min"] == finite.min() and row["max"] == finite.max()
        assert row["mean"] == pytest.approx(finite.mean().item(), rel=1e-9, abs=1e-12)
        assert row["l2"] == pytest.approx(finite.norm().item(), rel=1e-9)
        if finite.numel() > 1:
            assert row["std"] == pytest.approx(finite.std().item(), rel=1e-9, abs=1e-12)
        else:
            assert row["std"] is None


def test_equal_bytes_are_stored_once_per_rank(record, run):
    def repeat(rank):
        for i in range(100):
            tap("same", torch.ones(1000), i=i)

    back = record(repeat, 2)
    assert back.rows().height == 200
    assert back.rows()["tensor"].n_unique() == 1
    assert sum(f.stat().st_size for f in run.rglob("*.safetensors")) < 2 * (4000 + 20_000)
    assert torch.equal(back.load(1, "same", i=99), torch.ones(1000))


def test_shards_follow_one_another_when_they_are_full(record, run, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 10_000)

    def many(rank):
        for i in range(50):
            tap("x", torch.full((500,), float(i)), i=i)

    back = record(many)
    assert len(list(run.rglob("*.safetensors"))) > 5
    assert all(back.load(0, "x", i=i)[0] == i for i in range(50))
    assert sum(len(load_file(s)) for s in run.rglob("*.safetensors")) == 50


def test_a_full_header_begins_a_new_shard(record, run):
    def many(rank):
        for i in range(1000):
            tap("x", torch.tensor([i]), i=i)

    back = record(many)
    assert len(list(run.rglob("*.safetensors"))) > 2
    assert [back.load(0, "x", i=i).item() for i in (0, 499, 999)] == [0, 499, 999]


@pytest.mark.parametrize("level", ["stats", "digests"])
def test_levels_below_tensors_store_no_elements(record, run, level):
    back = record(job, level=level)
    row = back.rows().row(0, named=True)
    assert row["digest"] and row["shard"] is None and row["shape"] == [2, 3]
    assert (row["mean"] is None) == (level == "digests")
    assert not list(run.rglob("*.safetensors"))
    with pytest.raises(UsageError, match=f"recorded with --level {level}, without its elements"):
        back.load(0, "attn_out", layer=0)


def test_max_bytes_stops_in_good_order(record, capsys):
    def much(rank):
        for i in range(100):
            tap("x", torch.full((1000,), float(i)), i=i)

    back = record(much, max_bytes=20_000)
    assert back.rows().height == 5
    assert back.claims()[0]["state"] == "stopped"
    assert back.load(0, "x", i=4)[0] == 4
    assert (
        "recording stopped, the job goes on: --max-bytes was reached at" in capsys.readouterr().err
    )


def test_a_recording_is_readable_while_it_is_written(run):
    with Recorder(run) as recorder:
        for i in range(3):
            tap("x", torch.full((3,), float(i)), i=i)
            tap("v", i)
        _drained(recorder)
        back = Recording.open(run)
        assert back.rows().height == 6
        assert back.load(0, "x", i=2)[0] == 2
        assert back.claims()[0]["state"] == "running"
    assert back.load(0, "x", i=1)[0] == 1  # and across the moment in which it is closed
    late = ["min", "max", "mean", "std", "l2", "nan_count", "inf_count"]  # after the row itself
    assert Recording.open(run).rows().drop(late).equals(back.rows().drop(late))


def test_a_row_is_safe_before_its_statistics_are_gathered(run, monkeypatch):
    """Statistics are the slow part, so a killed job must not lose a payload to them."""
    gate = threading.Event()
    real = summaries_module.Statistics.add
    monkeypatch.setattr(
        summaries_module.Statistics, "add", lambda self, raw: (gate.wait(10), real(self, raw))
    )
    with Recorder(run):
        tap("x", torch.ones(3), i=0)
        while not run.exists() or not Recording.open(run).rows().height:
            pass
        tap("x", torch.ones(3), i=1)
        back = Recording.open(run)
        assert back.load(0, "x", i=0).sum() == 3 and back.rows()["mean"][0] is None
        gate.set()
    assert Recording.open(run).rows()["mean"].to_list() == [1.0, 1.0]


def _drained(recorder):
    """Wait until all that was submitted is safe."""
    tick = threading.Event()
    for _ in range(1000):
        if recorder._writer.rows_written == recorder._selection.selected:
            return
        tick.wait(0.002)
    raise AssertionError("the writer never came to an end")


def test_a_torn_journal_line_costs_that_line_alone(run, tmp_path):
    with Recorder(run) as recorder:
        for i in range(4):
            tap("x", torch.full((3,), float(i)), i=i)
        _drained(recorder)
        killed = tmp_path / "killed"
        shutil.copytree(run, killed)
    journal = next(killed.rglob("*.journal"))
    data = journal.read_bytes()
    journal.write_bytes(data[: data.rindex(b'"name"') + 3])  # in the middle of the last row
    back = Recording.open(killed)
    assert back.rows().height == 3
    assert back.load(0, "x", i=2)[0] == 2
    seal_leftovers(killed / "rank-00000", 0)
    assert Recording.open(killed).rows().equals(back.rows())
    assert back.load(0, "x", i=1)[0] == 1
    (shard,) = killed.rglob("*.safetensors")
    assert sorted(t[0].item() for t in load_file(shard).values()) == [0, 1, 2]
    assert not list(killed.rglob("*.journal")) and not list(killed.rglob("*.partial"))


def test_tags_become_columns_and_collisions_get_a_prefix(record):
    def tagged(rank):
        tap("x", 1, layer=1, dtype="mine", mixed=1, **{"tag.dtype": 7})
        tap("x", 1, layer=2, mixed="two", axes=["tp"])

    table = record(tagged).manifest()
    assert table["layer"].to_list() == [1, 2]
    assert table["tag.dtype"].to_list() == ["mine", None]
    assert table["tag.tag.dtype"].to_list() == [7, None]
    assert table["mixed"].to_list() == ["1", '"two"']
    assert table["axes"].to_list() == [None, '["tp"]']


def test_ranks_with_different_tags_make_one_manifest(record):
    run = record(lambda rank: tap("x", 1, **{f"only_{rank}": rank}), 2)
    assert run.manifest().select("only_0", "only_1").rows() == [(0, None), (None, 1)]


# What is damaged or hostile ----------------------------------------------------------------------


def test_no_recording(tmp_path):
    with pytest.raises(NotARecording, match="is not a recording: it has no recording.json"):
        Recording.open(tmp_path)


def test_another_version(record, run):
    record(job)
    meta = json.loads((run / "recording.json").read_text())
    (run / "recording.json").write_text(json.dumps({**meta, "format_version": 99}))
    with pytest.raises(UnsupportedVersion, match="has format version 99, expected 1"):
        Recording.open(run)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format_version": 1, "world_size": "many"}'])
def test_a_description_that_is_none(record, run, text):
    record(job)
    (run / "recording.json").write_text(text)
    with pytest.raises((DamagedRecording, UnsupportedVersion)):
        Recording.open(run)


def test_a_flipped_byte_is_noticed(record, run):
    back = record(job)
    shard = next(run.rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DamagedRecording, match="do not have the digest that was recorded"):
        back.load(0, "x")
    assert back.load(0, "attn_out", layer=0).sum() == 0  # the others are whole


def test_a_truncated_or_missing_shard_is_an_error(record, run):
    back = record(job)
    shard = next(run.rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DamagedRecording):
        back.load(0, "x")
    shard.unlink()
    with pytest.raises(DamagedRecording):
        Recording.open(run).load(0, "x")


@pytest.mark.parametrize(
    "shard", ["../../secret.safetensors", "/etc/passwd", "rank-00001/a0-00000.safetensors", ""]
)
def test_no_manifest_makes_the_reader_leave_its_rank_s_folder(record, run, shard):
    back = record(job, 2)
    row = back.rows().row(0, named=True)
    with pytest.raises(DamagedRecording, match="a row names the shard"):
        back.read({**row, "shard": shard})


def test_a_missing_part_of_the_manifest_is_noticed(record, run):
    record(job, 2)
    part = next(run.rglob("*.parquet"))
    part.unlink()
    with pytest.raises(DamagedRecording, match="it is missing, and its shard is there"):
        Recording.open(run).rows()
    part.with_suffix(".safetensors").unlink()
    with pytest.raises(DamagedRecording, match="has 0 rows of attempt 0, expected 6"):
        Recording.open(run).rows()


@pytest.mark.parametrize(
    "change",
    [
        {"world_size": 20_000_000_000},
        {"world_size": True},
        {"command": 5},
        {"options": [1]},
        {"provenance": "x"},
    ],
)
def test_a_description_of_the_wrong_types(record, run, change):
    record(job)
    meta = json.loads((run / "recording.json").read_text())
    (run / "recording.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(DamagedRecording):
        Recording.open(run)


@pytest.mark.thorough
def test_rows_whose_tags_are_none_or_that_are_too_many(record, run):
    record(job)
    part = next(run.rglob("*.parquet"))
    rows = pl.read_parquet(part)
    rows.with_columns(tags=pl.lit("[1]")).write_parquet(part)
    with pytest.raises(DamagedRecording, match="expected a JSON object"):
        Recording.open(run).rows()
    for _ in range(18):
        rows = pl.concat([rows, rows])
    rows.write_parquet(part)
    with pytest.raises(DamagedRecording, match="claims 1572864 rows"):
        Recording.open(run).rows()


def test_pipes_in_the_place_of_files_do_not_stop_a_reader(record, run):
    record(job)
    os.mkfifo(run / "rank-00000" / "a0-00007.journal")
    assert Recording.open(run).rows().height == 6
    (run / "recording.json").unlink()
    os.mkfifo(run / "recording.json")
    with pytest.raises(NotARecording):
        Recording.open(run)


def test_a_parquet_part_that_is_none(record, run):
    record(job)
    next(run.rglob("*.parquet")).write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DamagedRecording, match="it is not a parquet file"):
        Recording.open(run).rows()


def test_shapes_that_do_not_fit_their_bytes(record):
    back = record(job)
    row = back.rows().row(0, named=True)
    for change in ({"shape": [1 << 40, 3]}, {"shape": [-2, -3]}, {"dtype": "nonsense"}):
        with pytest.raises(DamagedRecording):
            back.read({**row, **change})


# Finding the first keys without an index ---------------------------------------------------------


def test_a_key_is_found_without_an_index_as_with_one(record):
    def tapped(rank):
        for step in range(2):
            for i in range(3):
                tap("x", torch.ones(2) * i, layer=i % 2, z="a")
                tap("y", i, layer=i % 2)
            tap("x", torch.zeros(2), layer=0, z="a", recompute=True)
            tap("again", torch.zeros(2), recompute=step == 0)
            tap("again", torch.ones(2))

    frame = record(tapped, 2).rows()
    index = Index.build(frame)
    keys = [(kind, group) for kind, group in index.groups]
    seen = 0
    for kind, group in [*keys, ("tensor", ("x", "{}")), ("tensor", ("none", "{}"))]:
        for step in (0, 1, 2, 1 << 70):
            for occurrence in (0, 1, 7):
                found = searched(frame, kind, group, step, occurrence)
                assert found == index.find(kind, group, step, occurrence)
                seen += len(found)
    assert seen >= 12


def test_the_first_keys_make_no_index_and_all_are_the_same(record, monkeypatch):
    run = record(lambda rank: [tap("x", torch.tensor(float(i)), i=i) for i in range(6)], 2)
    built = []
    build = Index.build
    monkeypatch.setattr(Index, "build", lambda frame, **kwargs: built.append(1) or build(frame))
    assert [run.load(1, "x", i=i).item() for i in range(2)] == [0.0, 1.0]
    assert not built
    assert [run.load(1, "x", i=i).item() for i in range(6)] == [0, 1, 2, 3, 4, 5]
    assert len(run.find_all("x", i=3)) == 2 and len(built) == 1
