"""Taps of modules in what torch.compile compiles: of a small model, and one of transformers."""

from __future__ import annotations

import pytest
import torch
from tapping import outcomes
from torch._dynamo.utils import counters

from recorder import Recorder, Recording
from replayer import Replayer

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore"),  # whatever the compiler has to say
]
PATHS = [
    "layers.{layer}.attn:output.0",
    "layers.{layer}.attn:output.1.p",
    "layers.{layer}.mlp",
    "layers.{layer}:input",
    "layers.{layer}.attn.q:weight",
    "head",
    "head:grad_output",
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(8, 8)
        self.o = torch.nn.Linear(8, 8)

    def forward(self, x, scale=1.0):
        return self.o(torch.softmax(self.q(x) * scale, -1)), {"p": x * 2}


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.mlp = torch.nn.Linear(8, 8)

    def forward(self, x):
        y, others = self.attn(x, scale=2.0)
        return x + self.mlp(torch.relu(y)) + others["p"]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer() for _ in range(2)])
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def seeded(seed):
    torch.manual_seed(seed)
    return Model()


def train(model, called, seed, steps=3):
    losses = []
    for step in range(steps):
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed + step))
        loss = called(x).square().sum()
        loss.backward()
        losses.append(loss.item())
    return losses, [one.grad.clone() for one in model.parameters()]


def digests(path):
    rows = Recording.open(path).manifest()
    return {
        (r["step"], r["name"], r["tags"], r["kind"]): r["digest"]
        for r in rows.iter_rows(named=True)
    }


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_same_records_and_grafts_as_in_eager_mode(tmp_path, backend):
    def compiled(model):
        return torch.compile(model, backend=backend, fullgraph=True)

    options = {"modules": PATHS, "step_on": "root"}
    with Recorder(tmp_path / "eager", **options):
        model = seeded(0)
        train(model, model, 1)
    with Recorder(tmp_path / "compiled", **options):
        model = seeded(0)
        train(model, compiled(model), 1)
    wanted = digests(tmp_path / "eager")
    assert digests(tmp_path / "compiled") == wanted and len(wanted) == 3 * (2 * 5 + 2)
    with Replayer(tmp_path / "eager", **options) as session:
        model = seeded(7)
        plain = train(model, model, 9)
    assert {*outcomes(session)} == {"grafted"}
    with Replayer(tmp_path / "eager", **options) as session:
        model = seeded(7)
        losses, grads = train(model, compiled(model), 9)
    assert {*outcomes(session)} == {"grafted"} and session.problems() == []
    assert losses == pytest.approx(plain[0])
    for one, other in zip(grads, plain[1], strict=True):
        torch.testing.assert_close(one, other)
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "path", ["layers.0.attn:grad_output.0", "layers.1:grad_input", "layers.1.attn:grad_output.1.p"]
)
def test_gradients_of_members_and_inputs(tmp_path, path):
    for how in ("eager", "compiled"):
        model = seeded(0)
        called = torch.compile(model, backend="aot_eager", fullgraph=True)
        with Recorder(tmp_path / how, modules=[path], step_on="root"):
            train(model, model if how == "eager" else called, 1)
    wanted = digests(tmp_path / "eager")
    assert len(wanted) == 3 and digests(tmp_path / "compiled") == wanted
    found = []
    for is_compiled in (False, True):
        model = seeded(4)
        called = torch.compile(model, backend="aot_eager", fullgraph=True)
        with Replayer(tmp_path / "eager", modules=[path], step_on="root") as session:
            found.append(train(model, called if is_compiled else model, 5)[1])
        assert outcomes(session) == ["grafted"] * 3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_no_operator_takes_breaks_the_graph_and_is_recorded(tmp_path):
    class Counting(torch.nn.Module):
        def forward(self, x):
            return x * 2, 3

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Counting()

        def forward(self, x):
            y, n = self.inner(x)
            return y + n

    model = Outer()
    with Recorder(tmp_path / "run", modules=["inner:output.1", "inner:output.0"]):
        found = torch.compile(model, backend="eager")(torch.ones(2))
    assert found.tolist() == [5, 5]
    back = Recording.open(tmp_path / "run")
    assert {*back.manifest()["kind"]} == {"tensor", "value"}
    assert counters["graph_break"]


@pytest.mark.parametrize("is_training", [False, True])
def test_a_model_of_transformers(tmp_path, is_training):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        attn_implementation="sdpa",
    )  # fmt: skip
    paths = [
        "model.layers.{layer}.self_attn:output.0",
        "model.layers.{layer}.mlp",
        "model.layers.{layer}:output",
        "model.norm",
        "lm_head",
    ]

    def made(seed):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).train(is_training)

    def once(model, seed, *, is_compiled):
        ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(seed))
        called = model
        if is_compiled:
            called = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.set_grad_enabled(is_training):
            logits = called(input_ids=ids, use_cache=False).logits
        if is_training:
            logits.logsumexp(-1).sum().backward()
        return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    with Recorder(tmp_path / "eager", modules=paths):
        once(made(0), 1, is_compiled=False)
    with Recorder(tmp_path / "compiled", modules=paths):
        once(made(0), 1, is_compiled=True)
    wanted = digests(tmp_path / "eager")
    assert len(wanted) == 8 and digests(tmp_path / "compiled") == wanted
    found = []
    for is_compiled in (False, True):
        with Replayer(tmp_path / "eager", modules=paths) as session:
            found.append(once(made(3), 5, is_compiled=is_compiled))
        assert outcomes(session) == ["grafted"] * 8 and session.problems() == []
    torch.testing.assert_close(found[0], found[1])
    assert not counters["graph_break"]


def rotated(x, by):
    return x.roll(by, -1), x * by


class Turning(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x):
        y, _ = rotated(self.inner(x), 1)
        z, _ = rotated(y, 2)
        return z


class Turned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Turning() for _ in range(2)])
        self.head = torch.nn.Linear(8, 8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        x, _ = rotated(x, 3)  # of no layer
        return self.head(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_functions_in_modules_are_tapped_where_they_are_called(tmp_path, backend):
    table = tmp_path / "taps.toml"
    absent = '"layers.{layer}:output.7" = { tap = "absent" }'
    table.write_text(f"""
        [taps]
        "layers.{{layer}} > {__name__}.rotated:output.0" = {{ tap = ["first", "second"] }}
        "layers.{{layer}} > {__name__}.rotated:input.x" = {{ tap = ["in1", "in2"] }}
        {"" if torch.__version__.startswith("2.6") else absent}
    """)  # which 2.6 breaks the graph at, to say that there is none

    def made(seed):
        torch.manual_seed(seed)
        return Turned()

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    with Recorder(tmp_path / "eager", taps=str(table)):
        made(0)(x)
    with Recorder(tmp_path / "compiled", taps=str(table)):
        torch.compile(made(0), backend=backend, fullgraph=True)(x)
    wanted = digests(tmp_path / "eager")
    assert len(wanted) == 8 and digests(tmp_path / "compiled") == wanted
    found = []
    for is_compiled in (False, True):
        model = made(3)
        with Replayer(tmp_path / "eager", taps=str(table)) as session:
            called = torch.compile(model, backend=backend, fullgraph=True) if is_compiled else model
            found.append(called(x))
        assert outcomes(session) == ["grafted"] * 8
    torch.testing.assert_close(found[0], found[1])
    assert not counters["graph_break"]
