"""Where a rank stands: declared, found in a framework, kept with the recording."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from recorder import Recorder, Recording, declare_mesh, step, tap
from recorder.commands import listing as report
from recorder.errors import GraftError, UsageError
from recorder.mesh import current_mesh
from recorder.repair import repair
from recorder.verify import Checker


@pytest.fixture(autouse=True)
def undeclared():
    declare_mesh()
    yield
    declare_mesh()


class DeviceMesh:
    """As torch's, of one rank."""

    def __init__(self, at, shape, names):
        self.mesh, self.mesh_dim_names, self._at = torch.zeros(shape), names, at

    def get_coordinate(self):
        return self._at


def test_what_was_declared_last_holds():
    assert current_mesh() is None
    declare_mesh(tp=(1, 4), cp=(0, 2))
    assert current_mesh() == {"tp": (1, 4), "cp": (0, 2)}
    declare_mesh(DeviceMesh([1, 0], (2, 3), ("dp", "tp")), ep=(0, 2))
    assert current_mesh() == {"dp": (1, 2), "tp": (0, 3), "ep": (0, 2)}
    declare_mesh()
    assert current_mesh() is None


@pytest.mark.parametrize(
    ("given", "axes", "said"),
    [
        (None, {"tp": (4, 4)}, "tp=(4, 4) is not a coordinate on an axis of 4"),
        (None, {"tp": (-1, 4)}, "is not a coordinate"),
        (None, {"tp": 3}, "tp is 3; give each axis as declare_mesh(tp=(rank, size))"),
        (None, {"tp": "ab"}, "tp is 'ab'"),
        (DeviceMesh([0], (2,), None), {}, "has no mesh_dim_names"),
        (DeviceMesh(None, (2,), ("tp",)), {}, "this rank is not in the DeviceMesh"),
        ({"tp": (0, 2)}, {}, "got a dict"),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(given, axes, said):
    declare_mesh(tp=(0, 2))
    with pytest.raises(UsageError) as caught:
        declare_mesh(given, **axes)
    assert said in str(caught.value)
    assert current_mesh() == {"tp": (0, 2)}


def module(monkeypatch, name, **functions):
    made = types.ModuleType(name)
    for function, result in functions.items():
        setattr(made, function, result if callable(result) else lambda result=result: result)
    monkeypatch.setitem(sys.modules, name, made)
    return made


MEGATRON = {
    "get_tensor_model_parallel_rank": 1,
    "get_tensor_model_parallel_world_size": 4,
    "get_context_parallel_rank": 0,
    "get_context_parallel_world_size": 2,
    "get_data_parallel_rank": 1,
    "get_data_parallel_world_size": 2,
}


def absent():
    raise AssertionError("expert parallel group is not initialized")


def test_megatron_core_is_asked_once_its_groups_are_up(monkeypatch):
    up = []
    module(
        monkeypatch,
        "megatron.core.parallel_state",
        model_parallel_is_initialized=lambda: bool(up),
        get_expert_model_parallel_rank=absent,
        get_expert_model_parallel_world_size=absent,
        **MEGATRON,
    )
    assert current_mesh() is None
    up.append(1)
    expected = {"tp": (1, 4), "cp": (0, 2), "dp": (1, 2)}
    assert current_mesh() == expected
    arguments = types.SimpleNamespace(sequence_parallel=True)
    module(monkeypatch, "megatron.training.global_vars", get_args=lambda: arguments)
    assert current_mesh() == {**expected, "sp": (1, 4)}
    declare_mesh(tp=(0, 1))
    assert current_mesh() == {"tp": (0, 1)}, "who declares is not overruled"


def group(rank, size):
    return types.SimpleNamespace(rank_in_group=rank, world_size=size)


def test_vllm_and_sglang_are_asked_too(monkeypatch):
    module(
        monkeypatch,
        "vllm.distributed.parallel_state",
        get_tp_group=group(3, 4),
        get_pp_group=group(0, 1),
        get_dp_group=absent,
    )
    assert current_mesh() == {"tp": (3, 4), "pp": (0, 1)}
    module(
        monkeypatch,
        "sglang.srt.distributed.parallel_state",
        get_tp_group=group(1, 8),
        get_moe_ep_group=group(1, 2),
    )
    module(
        monkeypatch,
        "sglang.srt.layers.dp_attention",
        get_attention_tp_rank=1,
        get_attention_tp_size=4,
        get_attention_dp_rank=0,
        get_attention_dp_size=2,
    )
    assert current_mesh() == {
        "tp": (1, 8), "moe_ep": (1, 2), "ep": (1, 2),
        "attn_tp": (1, 4), "attn_dp": (0, 2), "dp": (0, 2),
    }  # fmt: skip


def test_a_framework_s_mesh_is_recorded_without_asking(run, monkeypatch):
    for rank in range(2):
        with monkeypatch.context() as patch:
            module(patch, "vllm.distributed.parallel_state", get_tp_group=group(rank, 2))
            with Recorder(run, rank=rank, world_size=2):
                tap("x", torch.full((2,), float(rank)), dims="h[tp]")
    assert Recording.open(run).load_logical("x").tolist() == [0, 0, 1, 1]


def test_each_record_knows_the_mesh_it_was_recorded_under(run):
    with Recorder(run):
        tap("none", torch.zeros(1))
        tap("before", torch.zeros(2), dims="h")
        declare_mesh(tp=(0, 2))
        tap("first", torch.zeros(2), dims="h")
        step()
        declare_mesh(cp=(1, 3))
        tap("second", torch.zeros(2), dims="h")
        tap("plain", torch.zeros(2))
        meshes = {}
        back = Recording.open(run)
    back = Recording.open(run)
    for row in back.rows().iter_rows(named=True):
        meshes[row["name"]] = back.mesh_of(row)
    assert meshes["none"] is meshes["before"] is None
    assert meshes["first"] == (("tp", (0, 2)),)
    assert meshes["second"] == meshes["plain"] == (("cp", (1, 3)),)


def test_a_mesh_that_never_rests_is_given_up_and_said(run, capsys, monkeypatch):
    monkeypatch.setattr("recorder.writing.standing._MOST_MESHES", 3)
    with Recorder(run):
        for i in range(8):
            declare_mesh(tp=(i % 2, 2))
            tap("x", torch.zeros(2), dims="h[tp]", i=i)
    err = capsys.readouterr().err
    assert err.count("the mesh has changed 3 times") == 1
    back = Recording.open(run)
    known = [back.mesh_of(row) is not None for row in back.rows().iter_rows(named=True)]
    assert known == [True] * 3 + [False] * 5
    assert back.claims()[0]["meshes"][-1]["axes"] is None


def test_a_repaired_recording_keeps_its_meshes(run, tmp_path):
    for rank in range(2):
        declare_mesh(tp=(rank, 2))
        with Recorder(run, rank=rank, world_size=2):
            tap("x", torch.full((2,), float(rank)), dims="h[tp]")
    checker = Checker(run, keep=True)
    repair(checker, tmp_path / "out", lambda report: None)
    assert Recording.open(tmp_path / "out").load_logical("x").tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "meshes",
    [
        5, [5], [{}], [{"seq": "0", "axes": {}}], [{"seq": 0, "axes": {"tp": [2, 2]}}],
        [{"seq": 0, "axes": {"tp": [0, 1 << 70]}}], [{"seq": 0, "axes": {"tp": [True, 2]}}],
        [{"seq": 3, "axes": {}}, {"seq": 1, "axes": {}}], [{"seq": 0, "axes": [0, 2]}],
        [{"seq": 0, "axes": {f"a{i}": [0, 1] for i in range(100)}}],
    ],
)  # fmt: skip
def test_meshes_from_a_stranger_are_looked_at_first(run, meshes):
    declare_mesh(tp=(0, 1))
    with Recorder(run):
        tap("x", torch.zeros(2), dims="h[tp]")
    claim = run / "rank-00000" / "attempt-0.json"
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "meshes": meshes}))
    with pytest.raises(GraftError, match="its meshes are malformed"):
        Recording.open(run)


def test_dims_that_cannot_be_read_are_said_at_the_tap_and_recorded(run, capsys):
    with Recorder(run):
        for _ in range(2):
            tap("x", torch.zeros(2, 3), dims="b h(tp)")
            tap("y", torch.zeros(2, 3), dims="b s h[tp]")
        tap("fine", torch.zeros(2, 3), dims="b h[tp]")
    err = capsys.readouterr().err
    assert err.count("'h(tp)' is not a dim") == 1
    assert err.count("its dims 'b s h[tp]' name 3 dims, and it has 2") == 1
    assert "recorded, but cannot be cut or put together" in err and "'fine'" not in err
    assert Recording.open(run).rows()["dims"].to_list()[-1] == "b h[tp]"


@pytest.mark.parametrize(("width", "shown"), [(44, ""), (80, "mean"), (120, "std")])
def test_show_prints_where_each_block_lies_if_there_is_room(run, capsys, width, shown):
    declare_mesh(cp=(1, 2), tp=(0, 4))
    with Recorder(run):
        tap("q", torch.randn(4, 8, 4), dims="s[cp:zigzag] heads[tp] d")
        tap("p", torch.randn(4), dims="h[tp:partial]")
        tap("odd", torch.randn(4), dims="h(")
    back = Recording.open(run)
    report.print_records(back, back.rows(), width)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width and " q " in out
    assert ("s[cp 1/2 zigzag] heads[tp 0/4] d" in out) is (width > 44)
    assert ("h (partial: tp 0/4 sum)" in out) is (width > 44)
    assert not shown or shown in out.splitlines()[1]
    (first, *_) = report.records(back, back.rows())
    assert first["mesh"] == {"cp": [1, 2], "tp": [0, 4]}
