"""`graft verify`: each damage is named by its key, and what is whole is saved."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch

from recorder import Recorder, Recording, step, tap, verify
from recorder.errors import RecordingError
from recorder.repair import repair
from recorder.verify import Checker
from replayer import Replayer

RANKS, STEPS = 2, 3


def job(rank):
    for s in range(STEPS):
        for i in range(4):
            tap("x", torch.full((1_000,), 100.0 * rank + 10 * s + i), layer=i)
        tap("same", torch.ones(64), dims="b h", extras={"n": 3})
        tap("loss", [0.5, s])
        tap("empty", torch.zeros(0, 3))
        step()


@pytest.fixture
def made(record):
    return record(job, RANKS)


def problems(path):
    return [problem for report in Checker(path).ranks() for problem in report.problems]


def damage(path, row, at=100):
    """Change a byte in the middle of a record's payload."""
    shard = path / row["shard"]
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    entry = json.loads(shard.read_bytes()[8 : 8 + header])[row["tensor"]]
    with shard.open("r+b") as file:
        file.seek(8 + header + entry["data_offsets"][0] + at)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x40]))


def row_of(back, **key):
    rows = back.rows()
    for column, value in key.items():
        rows = rows.filter(rows[column] == value)
    return rows.row(0, named=True)


@pytest.mark.parametrize("keep", [False, True])
def test_a_shard_that_is_sealed_while_it_is_checked_is_whole(run, tmp_path, keep):
    """It has another name from then on."""
    recorder = Recorder(run)
    with recorder:
        for i in range(50):
            tap("x", torch.full((100,), float(i)), i=i)
        while not run.exists() or Recording.open(run).rows().height < 50:
            time.sleep(0.01)
        assert list(run.rglob("*.partial"))
        checker = Checker(run, keep=keep)
        checker.progress = lambda nbytes: recorder.close()
        if keep:
            assert repair(checker, tmp_path / "saved", lambda report: None) == 50
            assert not problems(tmp_path / "saved")
        else:
            (report,) = checker.ranks()
            assert (report.records, report.problems) == (50, [])
    assert not list(run.rglob("*.partial"))


def test_a_whole_recording_is_whole(made, shell):
    reports = list(Checker(made.path).ranks())
    assert [r.rank for r in reports] == [0, 1] and not any(r.problems for r in reports)
    assert sum(r.records for r in reports) == made.rows().height
    done = shell(shell.graft, "verify", made.path)
    assert done.returncode == 0 and "2 ranks, 42 records" in done.stdout
    assert done.stdout.endswith("whole\n") and done.stderr == ""
    told = json.loads(shell(shell.graft, "verify", made.path, "--json").stdout)
    assert told["whole"] is True and [r["damaged"] for r in told["ranks"]] == [0, 0]


def test_a_flipped_byte_is_named_by_key_and_costs_that_record_alone(made, shell, tmp_path):
    row = row_of(made, rank=1, step=2, tags='{"layer":3}')
    damage(made.path, row)
    (problem,) = problems(made.path)
    assert problem.key == "x layer=3 step=2 occurrence=0" and problem.rank == 1
    assert problem.file == row["shard"] and "digest" in problem.fact
    out = tmp_path / "out"
    done = shell(shell.graft, "verify", made.path, "--repair", out)
    assert done.returncode == 1
    assert "rank 1: x layer=3 step=2 occurrence=0: its bytes do not" in done.stdout
    assert "1 record damaged" in done.stdout and "41 records written" in done.stdout
    back = Recording.open(out)
    assert not problems(out) and back.rows().height == made.rows().height - 1
    assert [one.rank for one in back.incomplete()] == [1]
    again = shell(shell.graft, "verify", out)
    assert again.returncode == 0
    columns = [c for c in made.rows().columns if c not in ("shard", "tensor")]
    lost = (made.rows()["rank"] == 1) & (made.rows()["seq"] == row["seq"])
    assert back.rows().select(columns).equals(made.rows().filter(~lost).select(columns))
    for kept in back.rows().iter_rows(named=True):
        if kept["kind"] == "tensor":
            here = made.rows().filter(
                (made.rows()["rank"] == kept["rank"]) & (made.rows()["seq"] == kept["seq"])
            )
            assert torch.equal(back.read(kept), made.read(here.row(0, named=True)))


def test_the_others_go_on_in_a_replay(made, capsys):
    damage(made.path, row_of(made, rank=0, step=0, tags='{"layer":1}'))
    for check, failed in ((True, 1), (False, 0)):
        targets = [torch.zeros(1_000) for _ in range(4)]
        with Replayer(made.path, rank=0, world_size=2, check=check) as replay:
            for i, target in enumerate(targets):
                tap("x", target, layer=i)
        outcomes = replay.log()["outcome"].to_list()
        assert outcomes.count("error") == failed and outcomes.count("grafted") == 4 - failed
        assert torch.equal(targets[2], torch.full((1_000,), 2.0))
        if failed:
            assert "digest" in replay.log()["message"].to_list()[1]
            assert torch.equal(targets[1], torch.zeros(1_000))
    capsys.readouterr()


def test_a_shard_that_was_copied_half_way(made):
    (shard,) = (made.path / "rank-00000").glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size // 2)
    found = problems(made.path)
    rows = made.rows()
    keys = {problem.key for problem in found}
    assert 3 <= len(found) < rows.filter(rows["rank"] == 0).height - 4
    assert all("ends at byte" in problem.fact for problem in found)
    for row in rows.filter((rows["rank"] == 0) & (rows["kind"] == "tensor")).iter_rows(named=True):
        key = f"{row['name']}{''.join(f' {k}={v}' for k, v in json.loads(row['tags']).items())}"
        if f"{key} step={row['step']} occurrence={row['occurrence']}" not in keys:
            Recording.open(made.path).read(row)
        else:
            with pytest.raises(RecordingError, match="damaged"):
                Recording.open(made.path).read(row)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("*.safetensors", "header"),
        ("*.parquet", "parquet"),
        ("attempt-0.json", "JSON"),
    ],
)
def test_a_file_that_is_something_else(made, shell, tmp_path, name, what):
    (path,) = (made.path / "rank-00001").glob(name)
    height = made.rows().height
    path.write_bytes(b"\xff" * 5_000)
    found = problems(made.path)
    assert found and any(what in p.fact for p in found) and {p.rank for p in found} == {1}
    out = tmp_path / "out"
    assert shell(shell.graft, "verify", made.path, "--repair", out).returncode == 1
    back = Recording.open(out)
    rows = back.rows()
    assert rows.filter(rows["rank"] == 0).height == height // 2
    assert not problems(out)


@pytest.mark.parametrize("name", ["*.safetensors", "*.parquet", "attempt-0.json"])
def test_a_file_that_is_missing(made, name):
    (path,) = (made.path / "rank-00001").glob(name)
    path.unlink()
    assert {p.rank for p in problems(made.path)} == {1}


def test_a_value_that_was_changed(made):
    import polars as pl

    (path,) = (made.path / "rank-00000").glob("*.parquet")
    frame = pl.read_parquet(path, memory_map=False)
    changed = pl.when(pl.col("step") == 1).then(pl.lit("[0.5,7]")).otherwise(pl.col("value"))
    value = pl.when(pl.col("kind") == "value").then(changed).otherwise(pl.col("value"))
    frame.with_columns(value=value).write_parquet(path)
    (problem,) = problems(made.path)
    assert problem.key == "loss step=1 occurrence=0 (value)"


def test_an_open_recording_is_whole_and_repairable(run, tmp_path):
    recorder = Recorder(run, rank=0, world_size=1)
    with recorder:
        for i in range(5):
            tap("x", torch.full((500,), float(i)), i=i)
        while recorder._writer.rows_written < 5:
            pass
        assert not problems(run)
        checker = Checker(run, keep=True)
        assert repair(checker, tmp_path / "out", lambda report: None) == 5
    back = Recording.open(tmp_path / "out")
    assert torch.equal(back.load(0, "x", i=3), torch.full((500,), 3.0))
    assert back.claims()[0]["state"] == "killed"  # nobody goes on writing there


def test_usage(made, shell, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    done = shell(shell.graft, "verify", made.path, "--repair", tmp_path / "taken")
    assert done.returncode == 2 and "is not empty" in done.stderr
    done = shell(shell.graft, "verify", tmp_path / "nowhere")
    assert done.returncode == 2 and "is not a recording" in done.stderr


def test_a_rank_of_another_recording_is_not_made_part_of_the_repaired_one(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        for rank in range(2):
            with Recorder(tmp_path / name, rank=rank, world_size=2):
                tap("x", torch.full((3,), value))
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "out"
    shutil.rmtree(a / "rank-00001")
    shutil.copytree(b / "rank-00001", a / "rank-00001")
    assert repair(Checker(a, keep=True), out, lambda report: None) == 1
    back = Recording.open(out)
    assert back.ranks == [0] and [one.rank for one in back.incomplete()] == [1]


@pytest.mark.parametrize("meshes", ["x", None, [{"seq": True, "axes": {"a": [0, 2]}}]])
def test_a_repaired_recording_opens_whatever_its_meshes_were(run, tmp_path, meshes):
    with Recorder(run):
        tap("x", torch.ones(3))
    claim = run / "rank-00000" / "attempt-0.json"
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "meshes": meshes}))
    assert repair(Checker(run, keep=True), tmp_path / "out", lambda report: None) == 1
    assert Recording.open(tmp_path / "out").rows().height == 1


def test_what_a_ring_lets_go_of_while_it_is_checked_is_no_damage(run, monkeypatch):
    monkeypatch.setattr("recorder.writing.store._RING_BYTES", 1)  # a shard for each step
    with Recorder(run, keep_last=4):
        for s in range(4):
            tap("x", torch.full((40_000,), float(s)))
            step()
    claim = run / "rank-00000" / "attempt-0.json"
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "state": "running"}))
    folder, real, gone = claim.parent, verify.read_part, []

    def read(part):
        if not gone:  # the writer drops the oldest, and seals nothing new
            gone.append(part)
            for path in folder.glob(f"{part.path.stem}.*"):
                path.unlink()
        return real(part)

    monkeypatch.setattr(verify, "read_part", read)
    (report,) = Checker(run).ranks()
    assert gone and report.problems == [] and report.damaged == 0
    monkeypatch.setattr(verify, "read_part", real)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    assert [problem.fact[:16] for problem in problems(run)] == ["its shard ends a"]


def test_a_rank_without_anything_is_not_there_in_the_repaired_recording(made, tmp_path):
    for rank in (2, 3):
        (made.path / f"rank-{rank:05d}").mkdir()
    out = tmp_path / "out"
    assert repair(Checker(made.path, keep=True), out, lambda report: None)
    assert sorted(p.name for p in out.glob("rank-*")) == ["rank-00000", "rank-00001"]


def test_a_rank_folder_that_is_a_link_is_one_problem_among_others(made, tmp_path):
    (made.path / "rank-00001").rename(tmp_path / "elsewhere")
    (made.path / "rank-00001").symlink_to(tmp_path / "elsewhere")
    found = problems(made.path)
    assert [str(problem) for problem in found] == [
        "rank 1: it is a symbolic link, and may lead out of the recording (rank-00001)"
    ]
    out = tmp_path / "out"
    assert repair(Checker(made.path, keep=True), out, lambda report: None)
    assert Recording.open(out).ranks == [0]
