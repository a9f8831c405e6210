"""`graft import sglang`: folders that the real dumper wrote, and folders that it did not."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import typed
from dumping import imported, needs_sglang, place

from recorder import Recorder, Recording
from recorder.errors import RecordingError
from recorder.importing import import_dumps
from replayer import Replayer

# The dumper saves tensors whose gradient it waits for, and torch tells it of that.
pytestmark = pytest.mark.filterwarnings("ignore:backward hook")


@pytest.fixture
def module(tmp_path, monkeypatch):
    for name in [one for one in os.environ if one.startswith("DUMPER_")]:
        monkeypatch.delenv(name)
    yield from imported(tmp_path / "lib", monkeypatch)


@pytest.fixture
def dumps(tmp_path):
    return tmp_path / "dumps" / "exp"


@pytest.fixture
def dumper_of(module, monkeypatch, dumps):
    """Return a rank's dumper, enabled, as it is in a job of two ranks."""

    def make(rank, enable=True, world_size=2, **config):
        monkeypatch.setattr(module, "_get_rank", lambda: rank)
        monkeypatch.setattr(module, "_get_world_size", lambda: world_size)
        given = {"enable": enable, "enable_output_console": False, **config}
        folder = {"dir": str(dumps.parent), "exp_name": dumps.name}
        return module._Dumper(config=module.DumperConfig(**folder, **given))

    return make


def graft(*words):
    done = typed.graft("import", *words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def job(dumper, rank, scale=1.0):
    w = torch.full((2, 2), rank + 1.0, requires_grad=True)
    for _ in range(2):
        h = w * scale
        dumper.dump("model/layers.0/h", h, dims="b h[tp]", dims_grad="b h[tp:partial]", layer_id=0)
        dumper.dump("odd", h * 2, note="a___b=c", kind="q")
        dumper.dump("twice", h)
        dumper.dump("twice", h + 1)
        dumper.dump("loss", 0.5)
        h.sum().backward()
        dumper.step()
    dumper.dump_model(torch.nn.Linear(1, 1, bias=False))


@needs_sglang
def test_a_folder_of_two_ranks_equals_a_recording_of_the_same_job_and_replays(
    dumper_of, dumps, run, tmp_path, record
):
    options = {"enable_grad": True, "enable_model_value": False}
    for rank in range(2):
        job(dumper_of(rank, **options), rank)
    assert any(path.parent != dumps for path in dumps.rglob("*.pt"))  # by the slash in the name
    live = record(lambda rank: job(dumper_of(rank, enable=False, **options), rank), world_size=2)
    out = tmp_path / "out"
    done = graft("sglang", dumps, out)
    assert done.exit_code == 0, done.output
    assert "out: 28 records from 2 ranks" in done.stdout
    assert (
        done.stderr.count("the tag 'kind' has a meaning of its own; it is recorded as kind_") == 1
    )
    back = Recording.open(out)
    columns = ["rank", "step", "name", "tags", "kind", "occurrence", "dims", "digest", "value"]
    assert back.rows().select(columns).equals(live.rows().select(columns))
    assert typed.graft("diff", run, out).exit_code == 0
    assert typed.graft("verify", out).exit_code == 0
    for rank in range(2):
        dumper = dumper_of(rank, enable=False, **options)
        with Replayer(out, rank=rank, world_size=2, strict=True) as replay:
            job(dumper, rank, scale=3.0)
        assert replay.problems() == []
        assert {*replay.log()["outcome"]} == {"grafted", "compared"}
    w = back.load(0, "odd", step=1, note="a___b=c", kind_="q")
    assert torch.equal(w, torch.full((2, 2), 2.0))


@needs_sglang
def test_the_order_is_that_of_dumping_and_gradients_go_to_what_they_are_of(dumper_of, dumps, run):
    dumper = dumper_of(0, world_size=1, enable_grad=True, enable_model_value=True,
                       enable_model_grad=True)  # fmt: skip
    model = torch.nn.Linear(1, 1, bias=False)
    kept = []
    for part in range(11):  # of which the tenth stands before the second in a list of files
        h = model(torch.full((1, 1), float(part)))
        dumper.set_ctx(part=part)
        dumper.dump("h", h)
        dumper.set_ctx(part=None)
        kept.append(h)
    dumper.step()
    kept[-1].sum().backward()  # the step it is of has ended
    dumper.dump_model(model)
    found = import_dumps(dumps, run)
    rows = Recording.open(run).rows()
    assert (found.records, found.skipped, found.notes) == (14, (), ())
    values = rows.filter(rows["name"] == "h")
    assert values["tags"].to_list() == [f'{{"part":{k}}}' for k in [*range(11), 10]]
    assert values["step"].to_list() == [0] * 12 and values["kind"].to_list()[-1] == "grad"
    assert rows.filter(rows["name"] == "param__weight")["step"].to_list() == [1, 1]
    assert rows["seq"].to_list() == list(range(14))


@needs_sglang
def test_what_a_gradient_is_of_is_said_where_its_file_does_not_tell(dumper_of, dumps, run):
    dumper = dumper_of(0, world_size=1, enable_grad=True)
    w = torch.ones(2, requires_grad=True)
    kept = []
    for layer in range(3):
        dumper.set_ctx(layer_id=layer)
        kept.append(w * layer)
        dumper.dump("h", kept[-1])
        dumper.dump("same", kept[-1], where="mlp")
        dumper.set_ctx(layer_id=None)
    dumper.dump("last", w)
    sum(kept).sum().backward()
    found = import_dumps(dumps, run)
    assert found.skipped == () and "6 gradients could be of several dumps" in found.notes[0]
    assert "with the tags of their own file" in found.notes[0]
    rows = Recording.open(run).rows()
    grads = rows.filter(rows["kind"] == "grad")
    assert {(n, t) for n, t in grads.select("name", "tags").rows()} == {
        ("h", "{}"), ("same", '{"where":"mlp"}'), ("last", "{}"),
    }  # fmt: skip


@needs_sglang
def test_equal_dumps_of_one_step_get_their_gradients_in_order_and_that_is_said(
    dumper_of, dumps, run
):
    dumper = dumper_of(0, world_size=1, enable_grad=True)
    w = torch.ones(2, requires_grad=True)
    kept = [w * k for k in (1, 2, 3)]
    for h in kept:
        dumper.dump("h", h)
    (kept[0] + kept[1] * 5 + kept[2]).sum().backward()
    (note,) = import_dumps(dumps, run).notes
    assert "as that of the first that has none yet" in note
    rows = Recording.open(run).rows()
    grads = rows.filter(rows["kind"] == "grad")
    assert sorted(grads["occurrence"].to_list()) == [0, 1, 2]


@needs_sglang
def test_a_gradient_alone_is_one_of_its_name_with_its_layout(dumper_of, dumps, run):
    dumper = dumper_of(0, world_size=1, enable_grad=True, enable_value=False)
    h = torch.ones(2, requires_grad=True) * 2
    dumper.dump("h", h, dims="h", dims_grad="h[tp:partial]", layer_id=1)
    h.sum().backward()
    import_dumps(dumps, run)
    (row,) = Recording.open(run).rows().iter_rows(named=True)
    assert (row["name"], row["kind"], row["tags"]) == ("h", "grad", '{"layer_id":1}')
    assert row["dims"] == "# grad: h[tp:partial]"


@needs_sglang
def test_where_a_rank_stood_is_known_and_what_only_the_file_s_name_needs_is_no_tag(
    module, dumper_of, dumps, run, monkeypatch
):
    plugin = type(module._plugins[0])
    for rank in range(2):
        info = {"tp_rank": rank, "tp_size": 2, "vpp_rank": None, "attn_dp_rank": 0,
                "attn_dp_size": 1, "tcp_rank": rank, "tcp_size": 2}  # fmt: skip
        monkeypatch.setattr(plugin, "collect_parallel_info", lambda self, info=info: info)
        options = {"include_parallel_rank_in_filename": True} if hasattr(
            module.DumperConfig, "include_parallel_rank_in_filename") else {}  # fmt: skip
        dumper_of(rank, **options).dump("h", torch.full((1, 2), float(rank)), dims="b h[tp]")
    import_dumps(dumps, run)
    back = Recording.open(run)
    assert back.rows()["tags"].to_list() == ["{}", "{}"]
    assert dict(back.mesh_of(back.rows().row(1, named=True))) == {
        "tp": (1, 2), "attn_dp": (0, 1), "dp": (0, 1),
    }  # fmt: skip
    assert back.load_logical("h").tolist() == [[0.0, 0.0, 1.0, 1.0]]


@needs_sglang
def test_what_cannot_be_taken_is_named_and_the_rest_is_there(dumper_of, dumps, run):
    dumper = dumper_of(0, world_size=1)
    for name, value in (("a", torch.ones(3)), ("none", None), ("deep", {"x": 1}), ("z", 1.5)):
        dumper.dump(name, value)
    dumper.dump("tag", torch.ones(1), shape={"x": 1})
    meta = {"name": "sparse", "step": 0, "rank": 0, "world_size": 1, "dump_index": 99}
    torch.save({"value": torch.ones(2).to_sparse(), "meta": meta}, dumps / "name=sparse.pt")
    (dumps / "cut.pt").write_bytes(next(dumps.glob("*name=a*")).read_bytes()[:300])
    torch.save(torch.ones(1), dumps / "bare.pt")
    (dumps / "link.pt").symlink_to(dumps / "bare.pt")
    done = graft("sglang", dumps, run)
    assert done.exit_code == 3
    assert "2 records from 1 rank" in done.stdout
    said = done.stderr
    for what, reason in (
        ("cut.pt", "it is damaged: "),
        ("bare.pt", "it holds no value with its meta"),
        ("link.pt", "it is no regular file"),
        ("name=none", "it is a NoneType; only tensors"),
        ("name=deep", "it is a dict; only tensors"),
        ("name=tag", "the tag 'shape' is a dict"),
        ("name=sparse", "its layout is sparse_coo"),
    ):
        assert any(
            f"left out {what}" in line or (what in line and "left out" in line)
            for line in said.splitlines() if reason in line
        ), (what, said)  # fmt: skip
    assert "not to be trusted: 7 files left out, see above" in said


class Code:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-file",)


@needs_sglang
def test_a_file_cannot_run_code_nor_take_more_than_it_holds(dumper_of, dumps, run, monkeypatch):
    dumper_of(0, world_size=1).dump("h", torch.ones(2))
    monkeypatch.chdir(dumps)
    meta = {"name": "x", "step": 0, "rank": 0, "world_size": 1, "dump_index": 7}
    torch.save({"value": Code(), "meta": meta}, "code.pt")
    wide = torch.ones(1).expand(1 << 40)
    torch.save({"value": wide, "meta": {**meta, "dump_index": 8}}, "wide.pt")
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb/data.pkl", pickle.dumps({"value": 0, "meta": meta}))
        file.writestr("bomb/data/0", bytes(1 << 22))
    for name, change in (("far", {"rank": 1}), ("words", {"step": "0"}), ("who", {"name": 3})):
        torch.save({"value": 1, "meta": {**meta, **change}}, f"{name}.pt")
    found = import_dumps(dumps, run)
    reasons = {one.path: one.reason for one in found.skipped}
    assert found.records == 1 and not Path("made-by-a-file").exists()
    assert "cannot be loaded without running code" in reasons["code.pt"]
    assert "its tensor would take 4398046511104 bytes" in reasons["wide.pt"]
    assert "says to hold more than it does" in reasons["bomb.pt"]
    assert "the rank in its meta is 1, expected 0 to 0" in reasons["far.pt"]
    assert "the step in its meta is '0', expected a number from 0 on" in reasons["words.pt"]
    assert "the name in its meta is 3, expected a text" in reasons["who.pt"]


@needs_sglang
def test_the_folders_of_two_jobs_are_refused(dumper_of, dumps, run, tmp_path):
    dumper_of(0, world_size=1).dump("h", torch.ones(2))
    other = dumper_of(0, world_size=1)
    other.configure(exp_name="exp2")
    other.dump("h", torch.ones(2))
    with pytest.raises(
        RecordingError, match=r"rank 0 has its dump 1 twice, in exp/.* and in exp2/"
    ):
        import_dumps(dumps.parent, run)
    third = dumper_of(1, world_size=3)
    third.configure(exp_name="exp")
    third.dump("h", torch.ones(2))
    with pytest.raises(RecordingError, match=r"is of a world of [13], and .* of one of [13]"):
        import_dumps(dumps, run)
    assert not run.exists()
    assert import_dumps(dumps.parent / "exp2", run).records == 1


@needs_sglang
def test_a_recording_that_is_there_is_refused_unless_it_is_to_be_replaced(dumper_of, dumps, run):
    dumper_of(0, world_size=1).dump("h", torch.ones(2))
    with Recorder(run, rank=1, world_size=2):
        pass
    done = graft("sglang", dumps, run)
    assert done.exit_code == 2 and "holds a recording already" in done.stderr
    assert "--overwrite" in done.stderr
    assert graft("sglang", dumps, run, "--overwrite").exit_code == 0
    back = Recording.open(run)
    assert (back.world_size, back.rows().height) == (1, 1)
    with Recorder(run.with_name("live")) as live:
        live._ensure_claim()
        done = graft("sglang", dumps, run.with_name("live"), "--overwrite")
    assert done.exit_code == 2 and "is being recorded into" in done.stderr
    full = run.with_name("full")
    full.mkdir()
    (full / "thesis.txt").touch()
    done = graft("sglang", dumps, full, "--overwrite")
    assert done.exit_code == 2 and "is not empty, and no recording; choose another" in done.stderr
    file = full / "thesis.txt"
    assert "is a file; name a folder to record into" in graft("sglang", dumps, file).stderr
    done = graft("sglang", dumps, file / "deeper")
    assert done.exit_code == 2 and "deeper cannot be written: " in done.stderr


@needs_sglang
def test_a_rank_that_dumped_nothing_is_told_of(dumper_of, dumps, run):
    dumper_of(1).dump("h", torch.ones(2))
    assert import_dumps(dumps, run).notes == ("1 rank of 2 dumped nothing",)
    assert Recording.open(run).ranks == [1]


def test_nonsense_gets_one_sentence_with_the_next_step(tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    torch.save({"weight": torch.ones(1)}, tmp_path / "other" / "model.pt")
    for words, said in (
        (("vllm", "x", run), "no kind of dumps that can be imported; write: graft import sglang"),
        (("sglang", tmp_path / "gone", run), "is not there; name the folder that DUMPER_DIR named"),
        (("sglang", tmp_path / "empty", run), "no .pt file is in it; name another"),
        (("sglang", tmp_path / "other", run), "1 .pt file in it, of which none can be read as one"),
        (("sglang", tmp_path / "other" / "model.pt", run), "is a file; name the folder"),
    ):
        done = graft(*words)
        assert done.exit_code == 2 and done.stdout == ""
        assert done.stderr.startswith("Error: ") and said in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not run.exists()
    assert "Missing argument 'OUT'" in graft("sglang", "x").stderr


def test_its_help_says_what_it_takes():
    done = graft("--help")
    assert done.exit_code == 0 and "--overwrite" in done.stdout and "DUMPER_DIR" in done.stdout


JOB = """
    import torch, torch.distributed as dist
    from sglang.srt.debug_utils.dumper import dumper

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for step in range(2):
        w = torch.full((2,), rank + step + 1.0, requires_grad=True)
        h = w * 2
        dumper.dump("a/b", h, dims="h[tp]", note="x___y")
        h.sum().backward()
        dumper.step()
    dist.destroy_process_group()
"""


@needs_sglang
@pytest.mark.slow
def test_what_a_job_of_two_processes_dumps_is_imported_and_equals_what_is_recorded(shell, run):
    place(shell.folder)
    ranks = shell.torchrun(2, shell.write("job.py", JOB))
    env = {"DUMPER_ENABLE": "1", "DUMPER_DIR": str(shell.folder / "d"), "DUMPER_ENABLE_GRAD": "1"}
    done = shell(shell.graft, "record", "-o", run, "--", ranks, env=env)
    assert done.returncode == 0, done.stderr
    done = shell(shell.graft, "import", "sglang", "d", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out: 8 records from 2 ranks, 48 B stored\n" and done.stderr == ""
    assert shell(shell.graft, "diff", run, "out").returncode == 0
    env = {"DUMPER_ENABLE_GRAD": "1"}
    done = shell(shell.graft, "replay", "out", "--strict", "--", ranks, env=env)
    assert done.returncode == 0, done.stderr
