"""Modules as taps: found as they are first called, tapped by a table, and left as they were."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import calling
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from recorder import Recorder, Recording, attach, context, declare_mesh
from recorder.errors import UsageError
from recorder.mesh import current_mesh
from recorder.modules import survey, watch
from replayer import Replayer


class Attention(nn.Module):
    def __init__(self, h: int) -> None:
        super().__init__()
        self.q = nn.Linear(h, h)
        self.norm = nn.Identity()

    def forward(self, x, scale=1.0):
        return self.norm(rope(self.q(x))) * scale, None


def rope(x):
    return x * 0.5


class Layer(nn.Module):
    def __init__(self, h: int) -> None:
        super().__init__()
        self.attn = Attention(h)
        self.mlp = nn.Linear(h, h)

    def forward(self, x):
        return x + self.mlp(x + self.attn(x, scale=2.0)[0])


class Inner(nn.Module):
    def __init__(self, h: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(h) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    def __init__(self, h: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.model = Inner(h, layers)
        self.head = nn.Linear(h, 3)

    def forward(self, x):
        return {"logits": self.head(self.model(x)), "more": (x, x * 2)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def table(tmp_path):
    def write(rows: str) -> str:
        path = tmp_path / "t.toml"
        path.write_text(rows if "[taps]" in rows else f"[taps]\n{rows}")
        return str(path)

    return write


X = torch.arange(8.0).reshape(2, 4)


def recorded(tmp_path, run, **options):
    """Record what a job taps; return its rows as (name, tags that count, shape)."""
    with Recorder(tmp_path / "run", overwrite=True, **options):
        run()
    return Recording.open(tmp_path / "run")


def keys(run):
    return [
        (r["name"], r["tags"], r["step"]) for r in run.manifest().sort("seq").iter_rows(named=True)
    ]


def hooks_of(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


def test_modules_are_tapped_by_their_names(tmp_path, model):
    run = recorded(tmp_path, lambda: model(X), modules=["model.layers.*.mlp", "head:input"])
    assert [name for name, *_ in keys(run)] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
        "head:input",
    ]
    assert torch.equal(
        run.load(rank=0, name="model.layers.0.mlp", step=0, occurrence=0),
        run_of(model, "model.layers.0.mlp"),
    )


def run_of(model, name):
    """Return what a module gives, by a hook of the test's own."""
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: found.append(out))
    model(X)
    handle.remove()
    return found[0]


def test_what_stands_in_braces_is_a_tag(tmp_path, model):
    run = recorded(tmp_path, lambda: model(X), modules="model.layers.{layer}.mlp")
    assert keys(run) == [
        ("model.layers.mlp", '{"layer":0}', 0), ("model.layers.mlp", '{"layer":1}', 0)
    ]  # fmt: skip


def test_every_kind_of_place(tmp_path, model, table):
    rows = table(
        '''
        "model.layers.{layer}.attn:output.0" = { tap = "attn", dims = "b h" }
        "model.layers.{layer}.attn:input" = { tap = "attn_in", extras = { scale = 2 } }
        "model.layers.{layer}.attn:input.x" = "by_name"
        "model.layers.{layer}.attn:input.scale" = "scale"
        "model.layers.{layer}.mlp:weight" = "w"
        "model.layers.{layer}.attn > test_watch_rope.rope" = "rope"
        ":output.logits" = "logits"
        ":output.more.1" = "twice"
        ":input" = "x"
        "head:output.0" = "bare"
        '''
    )  # fmt: skip
    import sys
    import types

    holder = types.ModuleType("test_watch_rope")
    holder.rope = rope
    sys.modules["test_watch_rope"] = holder
    before = Attention.forward.__globals__["rope"]
    try:
        Attention.forward.__globals__["rope"] = lambda x: holder.rope(x)
        run = recorded(tmp_path, lambda: model(X), taps=rows)
    finally:
        Attention.forward.__globals__["rope"] = before
        del sys.modules["test_watch_rope"]
    names = [name for name, *_ in keys(run)]
    layer = ["w", "attn_in", "by_name", "scale", "rope", "attn"]
    assert names[0] == "x" and names[-3:] == ["bare", "logits", "twice"]
    assert sorted(names[1:-3]) == sorted(2 * layer)
    load = lambda name, **tags: run.load(rank=0, name=name, step=0, occurrence=0, **tags)  # noqa: E731
    assert torch.equal(load("x"), X) and torch.equal(load("twice"), X * 2)
    assert torch.equal(load("w", layer=1), model.model.layers[1].mlp.weight)
    assert torch.equal(load("bare"), load("logits"))
    assert torch.equal(load("attn", layer=0), load("rope", layer=0) * 2)
    rows = {(r["name"], r["tags"]): r for r in run.manifest().iter_rows(named=True)}
    assert rows["attn", '{"layer":0}']["dims"] == "b h"
    assert rows["attn_in", '{"layer":0}']["extras"] == '{"scale":2}'
    assert rows["scale", '{"layer":0}']["value"] == "2.0"
    assert holder.rope is rope  # put back


def test_an_identity_never_matches(tmp_path, model, table, capsys):
    run = recorded(tmp_path, lambda: model(X), taps=table(
        '"model.layers.{layer}.attn.norm" = "norm"\n"head" = "logits"'
    ))  # fmt: skip
    assert [name for name, *_ in keys(run)] == ["logits"]
    assert "fits only modules that hand on their input" in capsys.readouterr().err


def test_an_identity_matches_where_a_table_says_so(tmp_path, model, table):
    rows = table('"model.layers.{layer}.attn.norm" = { tap = "norm", identity = true }')
    assert len(keys(recorded(tmp_path, lambda: model(X), taps=rows))) == 2


def test_a_row_that_fits_nothing_is_said_with_the_nearest(tmp_path, model, table, capsys):
    recorded(
        tmp_path, lambda: model(X), taps=table('"model.layers.{layer}.mlpp" = "a"\n"head" = "b"')
    )
    assert "t.toml:2: 'model.layers.{layer}.mlpp' fits no module; closest: model.layers.0.mlp" in (
        capsys.readouterr().err
    )


def test_a_row_that_may_fit_nothing_is_not_said(tmp_path, model, table, capsys):
    rows = table('"nothing" = { tap = "a", optional = true }\n"head" = "b"')
    recorded(tmp_path, lambda: model(X), taps=rows)
    assert capsys.readouterr().err == ""


def test_a_module_that_never_ran_is_said(tmp_path, model, table, capsys):
    recorded(
        tmp_path, lambda: model.model(X), taps=table('"head" = "b"\n"model.layers.{layer}" = "c"')
    )
    assert "that never ran" in capsys.readouterr().err


def test_a_row_that_does_not_fit_its_module_is_said_once_and_skipped(
    tmp_path, model, table, capsys
):
    rows = table('":output" = "a"\n":output.logit" = "c"\n"head" = "b"')
    run = recorded(tmp_path, lambda: (model(X), model(X)), taps=rows)
    assert [name for name, *_ in keys(run)] == ["b", "b"]
    said = capsys.readouterr().err
    assert (
        said.count("it gives 3 tensors; say which, as in :output.logits or") == 2
    )  # then, and at the end
    assert "output.logit: there is logits, more, and no 'logit'" in said


def test_a_bare_path_taps_all_tensors_there_are(tmp_path, model):
    run = recorded(tmp_path, lambda: model(X), modules=[":output"])
    assert [name for name, *_ in keys(run)] == [
        ":output.logits", ":output.more.0", ":output.more.1"
    ]  # fmt: skip


def test_a_member_of_a_bare_tensor_is_absent_and_never_an_element(tmp_path, model, table, capsys):
    run = recorded(tmp_path, lambda: model(X), taps=table('"head:output.1" = "a"\n"head" = "b"'))
    assert [name for name, *_ in keys(run)] == ["b"]
    assert "tapped nothing: it gives one tensor, which has no '1'" in capsys.readouterr().err


def test_gradients_are_those_of_a_tap_with_grad(tmp_path, model, table, capsys):
    rows = table(
        '"model.layers.{layer}.mlp:grad_output" = "mlp"\n"model.layers.{layer}.mlp" = "mlp"\n'
        '"head:grad_input" = "into_head"'
    )
    run = recorded(tmp_path, lambda: model(X)["logits"].sum().backward(), taps=rows)
    kinds = sorted(
        (r["name"], r["kind"], r["occurrence"]) for r in run.manifest().iter_rows(named=True)
    )
    assert kinds == [
        ("into_head", "grad", 0), ("mlp", "grad", 0), ("mlp", "grad", 0),
        ("mlp", "tensor", 0), ("mlp", "tensor", 0),
    ]  # fmt: skip
    grad = run.load(rank=0, name="into_head", step=0, occurrence=0, kind="grad")
    assert torch.allclose(grad, model.head.weight.sum(0).expand(2, 4))
    assert capsys.readouterr().err == ""


def test_a_graft_writes_through_a_module_tap(tmp_path, model, table):
    rows = table('"model.layers.{layer}.mlp" = "mlp"')
    recorded(tmp_path, lambda: model(X), taps=rows)
    torch.manual_seed(1)
    other = Model()
    other.head.load_state_dict(model.head.state_dict())
    seen = []
    other.model.layers[1].mlp.register_forward_hook(lambda m, args, out: seen.append(out))
    with Replayer(tmp_path / "run", taps=rows, filter="layer == 1") as replay:
        other(X)
    assert replay.log()["outcome"].to_list() == ["grafted"]
    assert torch.equal(seen[0], run_of(model, "model.layers.1.mlp"))


def test_a_graft_into_an_input_reaches_the_residual(tmp_path, table):
    class PreNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            x = self.first(x)
            return x + self.norm(x)

    rows = table('"norm:input" = "resid"')
    baseline, target = PreNorm(), PreNorm()
    with torch.no_grad(), Recorder(tmp_path / "run", taps=rows):
        expected = baseline(X)
    with torch.no_grad(), Replayer(tmp_path / "run", taps=rows):
        assert torch.equal(target(X), expected)


def test_nothing_is_left_on_a_module(tmp_path, model):
    plain = nn.Module.__init__
    recorded(tmp_path, lambda: model(X), modules=["**"])
    assert hooks_of(model) == 0 and nn.Module.__init__ is plain
    assert not torch_modules._global_forward_pre_hooks


def test_only_modules_with_a_tap_have_hooks_while_it_records(tmp_path, model):
    with Recorder(tmp_path / "run", modules=["head"]):
        model(X)
        assert hooks_of(model) == 1 and not torch_modules._global_forward_pre_hooks
        model(X)


def test_a_model_that_is_made_later_is_found(tmp_path):
    def job():
        Model()(X)

    assert len(keys(recorded(tmp_path, job, modules=["head"]))) == 1


def test_modules_that_are_added_later_are_found(tmp_path, model):
    def job():
        model(X)
        model.head = nn.Sequential(OrderedDict(inner=nn.Linear(4, 3)))
        model(X)

    assert [name for name, *_ in keys(recorded(tmp_path, job, modules=["head.inner"]))] == [
        "head.inner"
    ]


def test_modules_that_are_made_in_a_forward_cost_nothing_for_good(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_SHARE", 0)

    class Odd(nn.Module):
        def forward(self, x):
            return nn.Softmax(-1)(x)

    def job():
        odd = Odd()
        for _ in range(6):
            odd(X)
        assert not torch_modules._global_forward_pre_hooks

    recorded(tmp_path, job, modules=["nothing"])


def test_a_module_is_found_after_many_that_stood_alone(tmp_path, model, monkeypatch):
    monkeypatch.setattr(watch, "_SHARE", 0)

    def job():
        model(X)
        for _ in range(6):
            nn.Linear(4, 3)(X)
        model.head = nn.Linear(4, 3)
        model(X)

    assert len(keys(recorded(tmp_path, job, modules=["head"]))) == 2


@pytest.mark.parametrize("wrap", ["holder", "module", "compiled", "deeper"])
def test_a_table_fits_a_model_that_something_holds(tmp_path, model, table, wrap):
    class Holder(nn.Module):
        def __init__(self, one, name):
            super().__init__()
            setattr(self, name, one)
            self.own = nn.Linear(2, 2)
            if name in ("module", "_orig_mod"):
                del self.own

        def forward(self, x):
            return next(iter(self.children()))(x)

    outer = {
        "holder": lambda: Holder(model, "policy"),
        "module": lambda: Holder(model, "module"),
        "compiled": lambda: Holder(model, "_orig_mod"),
        "deeper": lambda: Holder(Holder(Holder(model, "_orig_mod"), "module"), "a"),
    }[wrap]()
    rows = table('"model.layers.{layer}.mlp" = "mlp"\n"head" = "logits"')
    run = recorded(tmp_path, lambda: outer(X), taps=rows)
    assert [name for name, *_ in keys(run)] == ["mlp", "mlp", "logits"]


def test_a_table_fits_the_inner_model_alone(tmp_path, model, table):
    rows = table(
        '"model.layers.{layer}.mlp" = "mlp"\n"model.layers.{layer}" = "hidden"\n"head" = "l"'
    )
    run = recorded(tmp_path, lambda: model.model(X), taps=rows)
    assert [name for name, *_ in keys(run)] == 2 * ["mlp", "hidden"]
    inner = recorded(tmp_path, lambda: copy.deepcopy(model.model)(X), taps=rows)
    assert [name for name, *_ in keys(inner)] == 2 * ["mlp", "hidden"]


def test_a_second_model_has_the_tag_root(tmp_path, model, table):
    reference = copy.deepcopy(model)
    run = recorded(tmp_path, lambda: (reference(X), model(X)), taps=table('"head" = "logits"'))
    assert keys(run) == [("logits", "{}", 0), ("logits", '{"root":1}', 0)]


def test_two_models_in_one_have_the_tag_root(tmp_path, model, table):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy, self.reference = model, copy.deepcopy(model)

        def forward(self, x):
            return self.policy(x), self.reference(x)

    run = recorded(tmp_path, lambda: Both()(X), taps=table('"model.layers.{layer}" = "h"'))
    assert [tags for _, tags, _ in keys(run)] == [
        '{"layer":0}', '{"layer":1}', '{"layer":0,"root":1}', '{"layer":1,"root":1}'
    ]  # fmt: skip


def test_a_copy_of_a_tapped_model_is_a_model_of_its_own(tmp_path, model, table):
    def job():
        model(X)
        copy.deepcopy(model)(X)

    run = recorded(tmp_path, job, taps=table('"head" = "logits"'))
    assert ["root" in tags for _, tags, _ in keys(run)] == [False, True]


def test_a_tapped_model_can_be_saved_and_loaded(tmp_path, model):
    with Recorder(tmp_path / "run", modules=["head"]):
        model(X)
        held = io.BytesIO()
        torch.save(model, held)
    held.seek(0)
    loaded = torch.load(held, weights_only=False)
    assert torch.equal(loaded(X)["logits"], model(X)["logits"])


def test_a_step_ends_as_the_model_is_called_again(tmp_path, model):
    run = recorded(tmp_path, lambda: [model(X) for _ in range(3)], modules=["head"], step_on="root")
    assert [step for *_, step in keys(run)] == [0, 1, 2]


def test_a_step_ends_where_an_optimizer_has_stepped(tmp_path, model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def job():
        for _ in range(2):
            for _ in range(2):
                model(X)["logits"].sum().backward()
            optimizer.step()

    run = recorded(tmp_path, job, modules=["head"], step_on="optimizer")
    assert [step for *_, step in keys(run)] == [0, 0, 1, 1]


def test_a_model_whose_forward_is_called_by_hand_has_its_names_and_steps(tmp_path, model, table):
    rows = table('"model.layers.{layer}.mlp" = "mlp"\n"head" = "logits"')
    run = recorded(
        tmp_path, lambda: (model.forward(X), model.forward(X)), taps=rows, step_on="root"
    )
    names = ["mlp", "mlp", "logits"]
    assert [(name, step) for name, _, step in keys(run)] == [
        (name, step) for step in (0, 1) for name in names
    ]


def test_a_context_is_around_modules_too(tmp_path, model):
    def job():
        with context(phase="a"):
            model(X)

    assert keys(recorded(tmp_path, job, modules=["head"])) == [("head", '{"phase":"a"}', 0)]


def test_checkpointing_is_seen_as_a_second_forward(tmp_path, table):
    class Checkpointed(Inner):
        def forward(self, x):
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return x

    rows = table('"layers.{layer}.attn.q" = "q"')
    run = recorded(tmp_path, lambda: Checkpointed()(X.requires_grad_()).sum().backward(), taps=rows)
    tags = [tags for _, tags, _ in keys(run)]
    assert sorted(tags) == [
        '{"layer":0,"recompute":true}', '{"layer":0}', '{"layer":1,"recompute":true}', '{"layer":1}'
    ]  # fmt: skip


@dataclass
class Out:
    hidden: torch.Tensor
    other: torch.Tensor | None = None


def test_members_of_dataclasses_and_successive_calls(tmp_path, table):
    module = calling.Twice(Out)
    rows = table(
        '":output.hidden" = "hidden"\n":output.0" = "first"\n'
        '" > calling.f" = { tap = ["a", "b"], dims = ["x y", "y x"] }'
    )
    run = recorded(tmp_path, lambda: (module(X), module(X)), taps=rows, step_on="root")
    found = [(r["name"], r["dims"]) for r in run.manifest().sort("seq").iter_rows(named=True)]
    assert found == 2 * [("a", "x y"), ("b", "y x"), ("hidden", None), ("first", None)]


def test_two_sessions_that_want_the_same_get_each_tap_once(tmp_path, model, table):
    rows = table('"head" = "logits"')
    recorded(tmp_path, lambda: model(X), taps=rows)
    with (
        Recorder(tmp_path / "again", taps=rows),
        Replayer(tmp_path / "run", taps=rows, strict=True) as replay,
    ):
        model(X)
    assert len(keys(Recording.open(tmp_path / "again"))) == len(replay.log()) == 1


def test_models_that_come_and_go_leave_nothing(tmp_path, capsys):
    with Recorder(tmp_path / "run", modules=["head", "nothing"]):
        gone = []
        for _ in range(50):
            one = Model()
            one(X)
            gone.append(weakref.ref(one))
        del one
        gc.collect()
        assert sum(ref() is not None for ref in gone) == 0
        (request,) = watch._watch.requests
        assert len(request.attached) < 10
    assert len(keys(Recording.open(tmp_path / "run"))) == 50
    assert "'nothing' fits no module" in capsys.readouterr().err


def test_attach_taps_one_model(tmp_path, model):
    taps = attach(model, modules=["head"])
    with Recorder(tmp_path / "run"):
        model(X)
        Model()(X)
    taps.detach()
    assert len(keys(Recording.open(tmp_path / "run"))) == 1 and hooks_of(model) == 0


def test_attach_refuses_what_fits_nothing(model):
    with pytest.raises(UsageError, match="'heat' fits no module; closest: head"):
        attach(model, modules=["heat"])
    with pytest.raises(UsageError, match="neither taps nor modules"):
        attach(model)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize("how", ["whole", "inner", "in place"])
def test_a_compiled_model_is_tapped_at_graph_breaks(tmp_path, model, table, how):
    torch._dynamo.reset()
    expected = run_of(model, "model.layers.1.mlp")
    if how == "whole":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    called = compiled if how == "whole" else model
    rows = table('"model.layers.{layer}.mlp" = "mlp"\n"head" = "logits"')
    run = recorded(tmp_path, lambda: (called(X), called(X)), taps=rows, step_on="root")
    assert [name for name, *_ in keys(run)] == 2 * ["mlp", "mlp", "logits"]
    found = run.load(rank=0, name="mlp", step=0, occurrence=0, layer=1)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_module_that_takes_no_hook_is_said(tmp_path, model, capsys):
    model.head = torch.jit.script(model.head)
    run = recorded(tmp_path, lambda: model(X), modules=["head", "model.layers.0"])
    assert [name for name, *_ in keys(run)] == ["model.layers.0"]
    assert "and tapped nothing: it takes no hook" in capsys.readouterr().err


class Turn(nn.Module):
    def forward(self, x):
        return x + 1


class Sharing(nn.Module):
    """Layers that have one module in common, as servers' layers have their rope."""

    def __init__(self, layers: int, common: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential() for _ in range(layers))
        for layer in self.layers:
            layer.turn = common
        self.turn = common

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.turn(x)


def test_a_module_of_several_layers_is_tapped_as_that_of_the_one_that_calls_it(tmp_path, table):
    rows = table('"layers.{layer}.turn" = "h"\n"turn" = "end"\n"layers.{layer}.turn:input" = "x"')
    common = Turn()
    run = recorded(tmp_path, lambda: Sharing(3, common)(torch.zeros(1)), taps=rows)
    assert keys(run) == [
        *((n, f'{{"layer":{i}}}', 0) for i in range(3) for n in ("x", "h")), ("end", "{}", 0)
    ]  # fmt: skip
    assert [run.load(rank=0, name="h", layer=i).item() for i in range(3)] == [1, 2, 3]


def test_a_module_that_two_models_have_in_common_is_tapped_in_the_one_that_runs(tmp_path, table):
    rows = table('"layers.{layer}.turn" = "h"')
    common = Turn()
    first, second = Sharing(2, common), Sharing(2, common)
    run = recorded(tmp_path, lambda: (first(X), second(X)), taps=rows)
    assert [tags for _, tags, _ in keys(run)] == [
        '{"layer":0}', '{"layer":1}', '{"layer":0,"root":1}', '{"layer":1,"root":1}'
    ]  # fmt: skip


def test_a_layer_that_stands_in_a_list_twice_is_its_first_place_called_again(tmp_path, table):
    model = Inner(4, 1)
    model.layers.append(model.layers[0])
    run = recorded(tmp_path, lambda: model(X), taps=table('"layers.{layer}.attn.q" = "q"'))
    assert [tags for _, tags, _ in keys(run)] == ['{"layer":0}', '{"layer":0}']


def test_what_an_axis_is_called_is_asked_of_each_model_that_runs(tmp_path, model, table):
    axes = 'axes = { sp = "tp if sequence_parallel" }'
    rows = table(f'{axes}\n[taps]\n"head" = {{ tap = "l", dims = "b v[sp]" }}')
    declare_mesh(tp=(1, 2))
    try:
        for cut in (True, False):
            model.config = SimpleNamespace(sequence_parallel=cut)
            other = Model()  # never runs
            other.config = SimpleNamespace(sequence_parallel=not cut)
            known = []

            def job(known=known):
                model(X)
                known.append("sp" in current_mesh())

            recorded(tmp_path, job, taps=rows, rank=1, world_size=2)
            assert known == [cut] and "sp" not in current_mesh()
    finally:
        declare_mesh()


class Shadowed(nn.Module):
    """A block whose one child is called as wrappers call what they wrap."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.module(x)


def test_a_block_is_no_wrapper_for_the_name_of_its_child(tmp_path):
    model = nn.Sequential(Shadowed())
    run = recorded(tmp_path, lambda: model(X), modules=["0", "0.module"])
    assert [name for name, *_ in keys(run)] == ["0.module", "0"]
    assert torch.equal(run.load(rank=0, name="0", step=0, occurrence=0), model(X))


def test_a_module_that_two_models_share_is_tapped_in_the_one_that_runs(tmp_path):
    backbone = nn.Linear(4, 4)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.back, self.out = backbone, nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.back(x))

    actor, critic = Head(), Head()
    run = recorded(tmp_path, lambda: (actor(X), critic(X), actor(X)), modules=["back"])
    assert keys(run) == [("back", "{}", 0), ("back", '{"root":1}', 0), ("back", "{}", 0)]


def test_a_model_that_was_called_alone_is_tapped_where_something_holds_it(tmp_path, model):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)

    run = recorded(tmp_path, lambda: (model(X), Holder()(X)), modules=["*.mlp"])
    names = [f"model.layers.{layer}.mlp" for layer in (0, 1)]
    assert [name for name, *_ in keys(run)] == [*names, *(f"inner.{name}" for name in names)]


def test_patterns_and_a_table_tap_one_module_each(tmp_path, model, table):
    holder = nn.Sequential(model)
    rows = table('"model.layers.{layer}.mlp" = "mlp"\n"head" = "logits"')
    with Recorder(tmp_path / "run", taps=rows, modules=["*.mlp"]):
        holder(X)
    names = [name for name, *_ in keys(Recording.open(tmp_path / "run"))]
    assert names.count("mlp") == 2 and names.count("0.model.layers.1.mlp") == 1


def test_two_rows_of_one_function_each_have_their_tap(tmp_path, table):
    rows = table(
        '" > calling.f:output" = { tap = ["a", "b"] }\n" > f:input" = { tap = ["c", "d"] }'
    )
    run = recorded(tmp_path, lambda: calling.Twice(Out)(X), taps=rows)
    assert [name for name, *_ in keys(run)] == ["a", "c", "b", "d"] or [
        name for name, *_ in keys(run)
    ] == ["c", "a", "d", "b"]


def test_a_copy_of_a_model_that_graft_taps_looks_at_can_be_made(model, monkeypatch):
    monkeypatch.setattr(survey, "write_report", lambda report: None)
    seen = survey.Survey()
    seen.on_root(model, model)
    copy.deepcopy(model)(X)
    torch.save(model, io.BytesIO())
    model(X)
    assert {one["calls"] for one in seen._found if one["name"]} <= {0, 1}


def test_threads_that_call_a_model_first_lose_no_record(tmp_path, model):
    def job():
        ready = threading.Barrier(4)

        def call(n):
            with context(n=n):
                ready.wait()
                model(X)

        threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(keys(recorded(tmp_path, job, modules=["head:input", "head"]))) == 8


def test_a_key_that_is_a_number_is_a_key(tmp_path):
    class Keys(nn.Module):
        def forward(self, x):
            return {1: x, 0: x * 2}

    run = recorded(tmp_path, lambda: nn.Sequential(Keys())(X), modules=["0:output.0"])
    assert torch.equal(run.load(rank=0, name="0:output.0", step=0, occurrence=0), X * 2)


def test_a_weight_that_is_computed_is_not_asked_for(tmp_path, capsys):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    paths = ["0:weight", "0:parametrizations.weight.original1"]
    run = recorded(tmp_path, lambda: model(X), modules=paths)
    assert [name for name, *_ in keys(run)] == ["0:parametrizations.weight.original1"]
    assert (
        "it has no 'weight'; its parameters are bias, parametrizations" in capsys.readouterr().err
    )


def test_calls_of_a_function_count_from_each_forward_that_is_called_by_hand(tmp_path, table):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = calling.Twice(Out)

        def forward(self, x):
            return self.inner.forward(x)

    module = Outer()
    rows = table('"inner > calling.f" = { tap = ["a", "b"] }')
    run = recorded(tmp_path, lambda: [module(X) for _ in range(3)], taps=rows)
    assert [name for name, *_ in keys(run)] == 3 * ["a", "b"]


def test_a_function_is_put_back_though_its_model_is_gone(tmp_path, table):
    plain = calling.f
    rows = table('" > calling.f" = { tap = ["a", "b"] }')
    recorded(tmp_path, lambda: calling.Twice(Out)(X), taps=rows)
    gc.collect()
    assert calling.f is plain


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_a_function_of_a_class_is_tapped_and_put_back(tmp_path, table, kind, monkeypatch):
    def double(*args):
        return args[-1] * 2

    holder = type("Holder", (), {"double": kind(double)})
    monkeypatch.setattr(calling, "Holder", holder, raising=False)
    before = vars(holder)["double"]

    class Calls(nn.Module):
        def forward(self, x):
            return holder.double(x)

    run = recorded(tmp_path, lambda: Calls()(X), taps=table('" > calling.Holder.double" = "d"'))
    assert torch.equal(run.load(rank=0, name="d", step=0, occurrence=0), X * 2)
    assert vars(holder)["double"] is before


def test_a_call_of_a_part_alone_is_no_step(tmp_path, model):
    def job():
        model.model.layers[0](X)
        for _ in range(2):
            model(X)

    run = recorded(tmp_path, job, modules=["head"], step_on="root")
    assert [step for *_, step in keys(run)] == [0, 1]


def test_what_a_job_s_config_raises_stays_there(tmp_path, model, table):
    class Config:
        def __getattr__(self, name):
            raise KeyError(name)

    model.config = Config()
    rows = table('[sizes]\nd = "hidden / 2"\n[taps]\n"head" = { tap = "l", dims = "b (v*d)" }')
    assert len(keys(recorded(tmp_path, lambda: model(X), taps=rows))) == 1


def test_copies_of_copies_have_no_more_hooks(tmp_path, model):
    def job():
        one = model
        for _ in range(5):
            one(X)
            one = copy.deepcopy(one)
        one(X)
        assert len(one.head._forward_hooks) == 1

    recorded(tmp_path, job, modules=["head"])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_model_that_is_traced_is_as_it_was(tmp_path, model):
    plain = torch.jit.trace(model.head, X, check_trace=False)
    with Recorder(tmp_path / "run", modules=["head", "0"]):
        model(X)
        traced = torch.jit.trace(model.head, X, check_trace=False)
    assert traced.code == plain.code and torch.equal(traced(X), plain(X))
    assert len(keys(Recording.open(tmp_path / "run"))) == 1


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_where_nothing_is_tapped_a_whole_graph_compiles(tmp_path, model):
    torch._dynamo.reset()
    with Recorder(tmp_path / "run", modules=["nothing.of.it"]):
        late = Model()
        compiled = torch.compile(lambda x: late(x)["logits"], backend="eager", fullgraph=True)
        assert torch.equal(compiled(X), late(X)["logits"])
        nn.Linear(2, 2)  # what is made afterwards
        assert torch.equal(compiled(X[:1]), late(X[:1])["logits"])
