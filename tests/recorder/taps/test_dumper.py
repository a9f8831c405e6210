"""Programs that are instrumented for sglang's dumper, run as they are; with the real dumper."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from dumping import HAS_STEP, NAME, imported, needs_sglang, place
from torch.utils.checkpoint import checkpoint

from recorder import Recorder, Recording, context, tap
from recorder.taps.dumped import dims_of, tags_of
from replayer import Replayer

needs_step = pytest.mark.skipif(not HAS_STEP, reason="this sglang has no get_grad")


@pytest.fixture
def module(tmp_path, monkeypatch):
    for name in [one for one in os.environ if one.startswith("DUMPER_")]:
        monkeypatch.delenv(name)
    yield from imported(tmp_path / "lib", monkeypatch)


@pytest.fixture
def dumper(module, tmp_path):
    module.dumper.configure(dir=str(tmp_path / "dumps"))
    return module.dumper


def keys(run):
    table = Recording.open(run).rows()
    return [(r["name"], r["tags"], r["step"], r["kind"]) for r in table.iter_rows(named=True)]


def test_tags_that_mean_something_else_are_called_otherwise():
    given = {"layer_id": 3, "kind": "q", "grad_part": 1, "recompute_status": "disabled"}
    assert tags_of(given) == ({"layer_id": 3, "kind_": "q", "grad_part_": 1}, ["kind", "grad_part"])
    assert tags_of({"recompute_status": "recompute"}) == ({"recompute": True}, [])


@pytest.mark.parametrize(
    ("facts", "dims"),
    [
        (None, None),
        ({}, None),
        ({"dims": "b h[tp]"}, "b h[tp]"),
        ({"dims": "b h", "dims_grad": "b h"}, "b h"),
        ({"dims": "b h", "dims_grad": "b h[tp:partial]"}, "b h # grad: b h[tp:partial]"),
        ({"dims_grad": "b h"}, None),
    ],
)
def test_the_layout_of_the_gradient_stands_behind_that_of_the_value(facts, dims):
    assert dims_of(facts) == dims


@needs_sglang
def test_what_is_dumped_is_tapped_with_its_name_its_tags_and_its_context(dumper, run):
    x = torch.randn(2, 3)

    @dumper.ctx(lambda self: {"layer_id": self})
    def forward(layer):
        dumper.dump("h", x, dims="b h", grafter_extras={"scale": 2}, head=1)
        dumper.dump_dict("both", {"a": x, "n": 3})

    with Recorder(run):
        forward(7)
        dumper.step()
        dumper.set_ctx(phase="decode")
        dumper.dump("lazy", lambda: x * 2)
    both, one = '{"layer_id":7}', '{"head":1,"layer_id":7}'
    assert keys(run) == [
        ("h", one, 0, "tensor"),
        ("both_a", both, 0, "tensor"),
        ("both_n", both, 0, "value"),
        ("lazy", '{"phase":"decode"}', 1, "tensor"),
    ]
    back = Recording.open(run)
    row = back.rows().row(0, named=True)
    assert (row["dims"], row["extras"]) == ("b h", '{"scale":2}')
    assert torch.equal(back.load(0, "lazy", step=1, phase="decode"), x * 2)


@needs_sglang
def test_a_tap_s_own_context_holds_too_and_the_dump_s_tags_win(dumper, run):
    with Recorder(run), context(phase="prefill", layer=0):
        dumper.dump("h", torch.zeros(1), layer=4)
        tap("h", torch.zeros(1), layer=4)
    table = Recording.open(run).manifest()
    assert table["layer"].to_list() == [4, 4] and table["phase"].to_list() == ["prefill"] * 2
    assert table["occurrence"].to_list() == [0, 1]


@needs_sglang
def test_what_is_dumped_is_overwritten_in_place_and_the_job_goes_on_with_it(dumper, run):
    def job(scale):
        h = torch.arange(4.0) * scale
        dumper.dump("h", h, layer_id=0)
        return h + 1

    with Recorder(run):
        base = job(1)
    with Replayer(run) as replay:
        assert torch.equal(job(3), base)
    assert replay.log()["outcome"].to_list() == ["grafted"] and replay.problems() == []


@needs_sglang
def test_each_rank_dumps_what_it_likes(dumper, record, replay):
    def job(rank, scale=1.0):
        for _ in range(2):
            h = torch.full((2,), rank + 1.0) * scale
            dumper.dump("h", h)
            if rank == 1:
                dumper.dump("extra", h)
                dumper.step()
        return h

    assert record(job, world_size=2).rows().height == 6
    logs = [one.log() for one in replay(lambda rank: job(rank, 3.0), world_size=2)]
    assert [log["outcome"].to_list() for log in logs] == [["grafted"] * 2, ["grafted"] * 4]
    assert [log["step"].to_list() for log in logs] == [[0, 0], [0, 0, 1, 1]]


@needs_sglang
def test_nothing_is_left_of_it_once_nobody_records(module, dumper, run):
    cls, path = module._Dumper, list(sys.meta_path)
    before = {name: vars(cls)[name] for name in ("_dump_inner", "step")}
    with Recorder(run):
        assert vars(cls)["_dump_inner"] is not before["_dump_inner"]
        with Recorder(run.with_name("other")):
            dumper.dump("h", torch.zeros(1))
        assert vars(cls)["step"] is not before["step"]
    assert sys.meta_path == path
    if "torch._dynamo" not in sys.modules:  # which would not see them go
        assert {name: vars(cls)[name] for name in before} == before
    dumper.dump("h", torch.zeros(1))
    assert len(keys(run)) == len(keys(run.with_name("other"))) == 1


@needs_sglang
def test_it_is_found_where_it_is_imported_while_a_session_listens(module, run):
    del sys.modules[NAME]
    with Recorder(run):
        again = importlib.import_module(NAME)
        assert again is not module
        again.dumper.dump("h", torch.zeros(2))
    assert keys(run) == [("h", "{}", 0, "tensor")]


@needs_sglang
def test_it_is_found_where_the_file_is_imported_by_itself(module, run, monkeypatch):
    monkeypatch.syspath_prepend(Path(module.__file__).parent)
    monkeypatch.delitem(sys.modules, "dumper", raising=False)
    with Recorder(run):
        importlib.import_module("dumper").dumper.dump("h", torch.zeros(2))
    sys.modules.pop("dumper")
    assert keys(run) == [("h", "{}", 0, "tensor")]


def test_another_module_of_that_name_is_left_alone(tmp_path, run, monkeypatch):
    (tmp_path / "dumper.py").write_text("class _Dumper:\n    def step(self):\n        return 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dumper", raising=False)
    with Recorder(run):
        other = importlib.import_module("dumper")
        step = vars(other._Dumper)["step"]
        assert other._Dumper().step() == 5 and step.__qualname__ == "_Dumper.step"
        assert not hasattr(step, "__wrapped__")
    sys.modules.pop("dumper")


def test_a_version_without_the_seam_is_told_of(tmp_path, run, monkeypatch, capsys):
    home = tmp_path / "sglang" / "srt" / "debug_utils"
    home.mkdir(parents=True)
    for folder in (home, home.parent, home.parent.parent):
        (folder / "__init__.py").touch()
    (home / "dumper.py").write_text("class _Dumper:\n    def dump(self, name, value): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [one for one in sys.modules if one.partition(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    with Recorder(run):
        importlib.import_module(NAME)
    for name in [one for one in sys.modules if one.partition(".")[0] == "sglang"]:
        del sys.modules[name]
    assert "is of a version that is not known: what it dumps is not tapped" in (
        capsys.readouterr().err
    )


@needs_sglang
def test_its_filter_selects_and_one_that_fails_is_told_and_fails_no_job(dumper, run, capsys):
    x = torch.zeros(1)
    with Recorder(run):
        dumper.configure(filter='layer_id is not None and layer_id < 2 and search("at", name)')
        for layer in range(3):
            dumper.dump("attn", x, layer_id=layer)
            dumper.dump("mlp", x, layer_id=layer)
        dumper.configure(filter="layer_id < 2")  # which theirs fails for without a layer
        dumper.dump("logits", x)
        dumper.dump("late", x, layer_id=1)
    assert [(name, tags) for name, tags, *_ in keys(run)] == [
        ("attn", '{"layer_id":0}'),
        ("attn", '{"layer_id":1}'),
        ("late", '{"layer_id":1}'),
    ]
    said = capsys.readouterr().err
    assert said.count("the dumper's filter 'layer_id < 2' cannot be asked: TypeError") == 1


@needs_sglang
def test_what_no_tap_takes_is_said_once_and_keeps_no_replay_from_being_trusted(dumper, run, capsys):
    def job():
        for _ in range(2):
            dumper.dump_dict("x", {"none": None, "h": torch.zeros(1), "deep": {"a": 1}})

    with Recorder(run):
        job()
    with Replayer(run) as replay:
        job()
    assert replay.problems() == [] and replay.log().height == 2
    said = capsys.readouterr().err
    assert said.count("'x_none' is not tapped: it is a NoneType; tensors, numbers") == 1
    assert said.count("'x_deep' is not tapped: it is a dict") == 1


@needs_sglang
def test_messages_name_the_line_that_dumps(dumper, run, capsys):
    with Recorder(run):
        dumper.dump("h", torch.zeros(2).to_sparse())
    assert f"tap 'h' at {__file__}:" in capsys.readouterr().err


@needs_sglang
def test_gradients_of_what_is_dumped_come_and_are_grafted(dumper, run):
    dumper.configure(enable_grad=True)

    def job(scale):
        w = torch.ones(3, requires_grad=True)
        h = w * 2
        dumper.set_ctx(layer_id=5)
        dumper.dump("h", h, dims="h", dims_grad="h # tp:replicated")
        dumper.set_ctx(layer_id=None)
        (h * scale).sum().backward()
        return w.grad

    with Recorder(run):
        base = job(1)
    assert keys(run) == [(*("h", '{"layer_id":5}', 0), kind) for kind in ("tensor", "grad")]
    with Replayer(run, filter='kind == "grad"'):
        assert torch.equal(job(4), base)


@needs_sglang
def test_only_the_gradient_is_tapped_where_only_that_is_dumped(dumper, run):
    dumper.configure(enable_grad=True, enable_value=False)
    with Recorder(run):
        h = torch.ones(3, requires_grad=True) * 2
        dumper.dump("h", h)
        h.sum().backward()
    assert keys(run) == [("h", "{}", 0, "grad")]


@needs_sglang
def test_a_model_is_tapped_as_its_flags_say_with_the_gradients_that_are_there(dumper, run):
    def job(scale):
        model = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(model.weight)
        (model(torch.ones(1, 2)) * scale).sum().backward()
        dumper.dump_model(model, phase="end")
        return model.weight.grad

    with Recorder(run.with_name("off")):
        job(1)
    dumper.configure(enable_model_grad=True)
    with Recorder(run):
        base = job(1)
    assert [one[0::3] for one in keys(run)] == [
        ("param__weight", "grad"),
        ("param__bias", "grad"),
    ]
    with Replayer(run) as replay:
        assert torch.equal(job(7), base)
    assert replay.log()["outcome"].to_list() == ["grafted"] * 2
    dumper.configure(enable_model_value=True)
    with Recorder(run.with_name("both")):
        job(1)
    assert len(keys(run.with_name("both"))) == 4
    assert Recording.open(run.with_name("off")).rows().height == 0


@needs_sglang
@needs_step
def test_a_step_that_ended_long_ago_is_refused_since_its_occurrences_are_forgotten(
    dumper, run, capsys
):
    model = torch.nn.Linear(1, 1, bias=False)
    dumper.configure(enable_model_value=True)
    with Recorder(run):
        for step in [*range(5, 75), 74, 5]:
            dumper.dump_model(model, step=step)
        dumper.dump("param__weight", model.weight)
    rows = Recording.open(run).rows()
    assert rows.filter(rows["step"] == 74)["occurrence"].to_list() == [0, 1]
    assert rows.filter(rows["step"] == 5)["occurrence"].to_list() == [0]
    assert rows.filter(rows["step"] == 0).height == 1
    assert "its step 5 ended many steps ago" in capsys.readouterr().err


@needs_sglang
@needs_step
def test_get_grad_and_the_step_of_a_model_s_dump_hold(dumper, run, tmp_path):
    asked = []

    def get_grad(param):
        asked.append(param)
        return torch.full_like(param, 9.0)

    model = torch.nn.Linear(2, 1)
    dumper.configure(enable=True, enable_model_value=True, enable_model_grad=True)
    with Recorder(run):
        for step in (4, 4, 0):
            dumper.dump_model(model, get_grad=get_grad, step=step)
    assert len(asked) == 6  # once a parameter, though the dumper wants it too
    back = Recording.open(run)
    rows = back.rows()
    assert rows["step"].unique().sort().to_list() == [0, 4]
    at = rows.filter((rows["name"] == "param__bias") & (rows["kind"] == "grad"))
    assert at.select("step", "occurrence").rows() == [(4, 0), (4, 1), (0, 0)]
    assert len(list((tmp_path / "dumps").rglob("*grad__param__bias*.pt"))) == 3


@needs_sglang
def test_a_get_grad_that_raises_fails_no_job_that_does_not_dump(dumper, run, capsys):
    if not HAS_STEP:
        pytest.skip("this sglang has no get_grad")
    dumper.configure(enable_model_value=True, enable_model_grad=True)

    def get_grad(param):
        raise KeyError("main_grad")

    with Recorder(run):
        dumper.dump_model(torch.nn.Linear(1, 1, bias=False), get_grad=get_grad)
    assert keys(run) == [("param__weight", "{}", 0, "tensor")]
    assert "the gradient of param__weight is not tapped: get_grad raised KeyError" in (
        capsys.readouterr().err
    )


@needs_sglang
def test_a_forward_that_is_repeated_gets_the_key_of_its_first(dumper, run):
    w = torch.ones(2, requires_grad=True)

    def layer(x):
        h = x * w
        dumper.dump("h", h)
        return h.sin()

    with Recorder(run):
        checkpoint(layer, torch.ones(2), use_reentrant=False).sum().backward()
        dumper.configure(filter='recompute_status != "recompute"')
        checkpoint(layer, torch.ones(2), use_reentrant=False).sum().backward()
    table = Recording.open(run).manifest()
    assert table["recompute"].to_list() == [None, True, None]


@needs_sglang
def test_one_that_is_enabled_dumps_what_was_grafted_and_asks_a_callable_once(dumper, run, tmp_path):
    calls = []

    def job(scale):
        h = torch.arange(4.0) * scale
        dumper.dump("h", h)
        dumper.dump("lazy", lambda: calls.append(1) or h * 2)
        dumper.step()

    with Recorder(run):
        job(1)
    assert not (tmp_path / "dumps").exists() and len(calls) == 1
    dumper.configure(enable=True)
    with Replayer(run):
        job(3)
    assert len(calls) == 2
    (found,) = (tmp_path / "dumps").rglob("*name=h*.pt")
    assert torch.equal(torch.load(found)["value"], torch.arange(4.0))
    assert "step=0" in found.name and dumper.get_state()["step"] == 1


@needs_sglang
def test_without_a_session_it_dumps_as_it_always_did(dumper, tmp_path):
    dumper.configure(enable=True)
    dumper.dump("h", torch.ones(2))
    assert len(list((tmp_path / "dumps").rglob("*.pt"))) == 1


@needs_sglang
@pytest.mark.thorough
@pytest.mark.parametrize("grafts", [False, True])
def test_a_compiled_program_that_dumps_keeps_its_graph(dumper, run, grafts):
    def program(x, layer):
        h = x * 2
        dumper.dump("h", h, layer_id=layer)
        return h + 1

    with Recorder(run):
        base = program(torch.ones(3), 1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(program, backend="eager", fullgraph=True)
    if grafts:
        with Replayer(run) as replay:
            assert torch.equal(compiled(torch.full((3,), 5.0), 1), base)
        assert replay.log()["outcome"].to_list() == ["grafted"]
    else:
        again = run.with_name("again")
        with Recorder(again):
            compiled(torch.ones(3), 1)
        assert keys(again) == keys(run)
    assert not torch._dynamo.utils.counters["graph_break"]


JOB = """
    import os, sys
    import torch, torch.distributed as dist
    from sglang.srt.debug_utils.dumper import dumper

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if not dumper.may_enable:
        def woken(*args, **kwargs):
            raise AssertionError("a collective was begun")
        dist.broadcast_object_list = dist.all_gather_object = dist.barrier = woken
    scale = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0

    @dumper.ctx(lambda self: dict(layer_id=self))
    def forward(layer, h):
        h = h * (scale if layer == 0 else 1)
        dumper.dump("h", h, dims="b h[tp]")
        if rank == 1 and "more" in sys.argv:
            dumper.dump("extra", h)
        return h + 1

    for step in range(2):
        h = torch.full((2, 2), float(rank))
        for layer in range(2):
            h = forward(layer, h)
        if not (rank == 0 and "less" in sys.argv):
            dumper.dump("logits", h)
            dumper.step()
    print("rank", rank, h.tolist())
    dist.destroy_process_group()
"""


@pytest.fixture
def job(shell):
    place(shell.folder)
    return shell.write("job.py", JOB)


@needs_sglang
@pytest.mark.thorough
def test_what_was_compiled_before_anybody_recorded_is_heard_too(module, dumper, run):
    class Block(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        @dumper.ctx(lambda self: {"layer_id": self.layer})
        def forward(self, x):
            h = x * 2
            dumper.dump("h", h)
            return h + 1

    dumper.step()  # up to Python 3.11 the compiler follows it from its second call on
    torch._dynamo.reset()
    model = torch.nn.Sequential(Block(0), Block(1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.ones(3)
    base = compiled(x)
    for out in (run, run.with_name("again")):
        with Recorder(out):
            compiled(x)
        assert [tags for _, tags, *_ in keys(out)] == ['{"layer_id":0}', '{"layer_id":1}']
        compiled(x)
    with Replayer(run) as replay:
        assert torch.equal(compiled(x * 5), base)
    assert replay.log()["outcome"].to_list() == ["grafted"] * 2


FIRST = """
    from sglang.srt.debug_utils.dumper import dumper
    import torch

    dumper.dump("h", torch.ones(2))
"""


@needs_sglang
def test_a_program_that_imports_it_before_anything_else_is_recorded(shell, run):
    place(shell.folder)
    job = shell.write("job.py", FIRST)
    done = shell(shell.graft, "record", "-o", run, "--", shell.python, job)
    assert done.returncode == 0 and "1 record from 1 rank" in done.stderr, done.stderr


@needs_sglang
def test_two_ranks_are_recorded_though_one_dumps_more(shell, job, run):
    done = shell(shell.graft, "record", "-o", run, "--", shell.torchrun(2, job), 1, "more", "less")
    assert done.returncode == 0, done.stderr
    table = Recording.open(run).rows()
    assert table.group_by("rank").len().sort("rank").rows() == [(0, 4), (1, 10)]


@needs_sglang
@pytest.mark.slow
def test_two_ranks_are_grafted_though_one_dumps_more(shell, job, run):
    ranks = shell.torchrun(2, job)
    done = shell(shell.graft, "record", "-o", run, "--", ranks)
    assert done.returncode == 0, done.stderr
    done = shell(shell.graft, "replay", run, "--", ranks, 3, "more")
    assert done.returncode == 0, done.stderr
    assert "rank 1 [[3.0, 3.0], [3.0, 3.0]]" in done.stdout and "12 grafted" in done.stderr
    assert "4 missing" in done.stderr


@needs_sglang
@pytest.mark.slow
def test_ranks_that_the_user_has_enabled_dump_and_are_recorded(shell, job, run, tmp_path):
    env = {"DUMPER_ENABLE": "1", "DUMPER_DIR": str(tmp_path / "dumps")}
    done = shell(shell.graft, "record", "-o", run, "--", shell.torchrun(2, job), env=env)
    assert done.returncode == 0, done.stderr
    assert Recording.open(run).rows().height == 12
    assert len(list((tmp_path / "dumps").rglob("*.pt"))) == 12
