"""Compiled and graphed programs on a GPU: what the fakes stand for elsewhere."""

from __future__ import annotations

import time

import pytest
import torch
from tapping import outcomes
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from recorder import Recorder, Recording, context, step, tap
from replayer import Replayer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # whatever the compiler has to say
]
MODES = ["default", "reduce-overhead", "in one piece"]
STEPS = 5  # runs of a program: one to warm up, one that is captured, and some from the graph


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    assert not counters["graph_break"]
    torch._dynamo.reset()


def compiled(function, mode):
    """Compile a function; "in one piece" as reduce-overhead, where inductor parts no programs."""
    options = {"triton.cudagraphs": True, "graph_partition": False}
    how = {"options": options} if mode == "in one piece" else {"mode": mode}
    return torch.compile(function, fullgraph=True, **how)


def block(x, w, i):
    h = torch.tanh(x @ w)
    h = tap("h", h, grad=True, layer=i, dims="t h")
    with context(inner="y"):
        z = torch.sin(h) * h
        tap("dead", z + 1, layer=i)
        z = tap("z", z, layer=i, words=["a", 1], scale=0.5)
    return z * h * 2


def two(x, w):
    return block(block(x, w, 0), w, 1)


def repeated(x, w):
    for i in range(2):
        x = checkpoint(block, x, w, i, use_reentrant=False)
    return x


def train(function, seed=0):
    """Run steps; return what each computed: output and gradients, on the CPU."""
    found = []
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(64, 64, generator=g).mul(0.2).cuda().requires_grad_()
    for i in range(STEPS):
        x = torch.randn(16, 64, generator=g).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        with context(outer=i):
            y = function(x, w)
            y.square().sum().backward()
        step()
        found.append([y.detach().cpu(), w.grad.cpu()])
        w.grad = None
    return found


def infer(function, seed=0):
    found = []
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(64, 64, generator=g).mul(0.2).cuda()
    for _ in range(STEPS):
        x = torch.randn(16, 64, generator=g).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            found.append([function(x, w).cpu()])
        step()
    return found


def same(one, other, **how):
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, **(how or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("function", [two, repeated])
def test_a_training_step_is_recorded_and_grafted(tmp_path, mode, function):
    eager, other = train(function), train(function, seed=7)
    made = compiled(function, mode)
    plain = train(made)
    same(plain, eager, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
    made = compiled(function, mode)
    with Recorder(tmp_path / "base"):
        same(train(made), plain, rtol=1e-4, atol=1e-4)
    back = Recording.open(tmp_path / "base")
    rows = back.manifest().to_dicts()
    kinds = [row["kind"] for row in rows]
    assert kinds.count("tensor") == 6 * STEPS and kinds.count("grad") == 2 * STEPS
    with Recorder(tmp_path / "eager"):
        train(function)
    other_back = Recording.open(tmp_path / "eager")
    for i in range(STEPS):
        for name in ("h", "dead", "z"):
            for layer in (0, 1):
                tags = {"layer": layer, "outer": i}
                if name != "h":
                    tags["inner"] = "y"
                if name == "z":
                    tags |= {"words": ["a", 1], "scale": 0.5}
                torch.testing.assert_close(
                    back.load(0, name, step=i, **tags),
                    other_back.load(0, name, step=i, **tags),
                    rtol=1e-4, atol=1e-4,
                )  # fmt: skip
    torch._dynamo.reset()
    made = compiled(function, mode)
    for _ in range(2):  # from two sessions, one after the other
        with Replayer(tmp_path / "base") as session:
            grafted = train(made, seed=7)
        counted = outcomes(session)
        assert counted.count("grafted") + counted.count("without effect") == len(counted)
        assert counted.count("without effect") <= 2 * STEPS  # the dead ones
        for (y, _), (wanted, _) in zip(grafted, plain, strict=True):
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    same(train(made, seed=7), other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_without_gradients_values_are_those_of_each_run(tmp_path, mode):
    made = compiled(two, mode)
    with Recorder(tmp_path / "base"):
        found = infer(made)
    back = Recording.open(tmp_path / "base")
    for i, (y,) in enumerate(found):
        h = back.load(0, "h", step=i, layer=1)
        z = back.load(0, "z", step=i, layer=1, inner="y", words=["a", 1], scale=0.5)
        torch.testing.assert_close(z * h * 2, y, rtol=1e-6, atol=1e-6)
    with Replayer(tmp_path / "base") as session:
        same(infer(made, seed=3), found, rtol=1e-6, atol=1e-6)
    assert "error" not in outcomes(session)
    assert bool(counters["inductor"]["cudagraph_skips"]) is (mode == "in one piece")


def test_callables_that_torch_graphs(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.eye(64) * 0.5)

        def forward(self, x):
            h = tap("h", x @ self.w, grad=True)
            return tap("y", torch.tanh(h))

    def steps(model, seed):
        g = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(3):
            x = torch.randn(16, 64, generator=g).cuda()
            y = model(x)
            y.sum().backward()
            step()
            grad = model.w.grad if hasattr(model, "w") else None
            found.append((y.detach().cpu(), grad.cpu().clone()))
            model.w.grad = None
        return found

    sample = torch.randn(16, 64).cuda()
    eager = steps(Model().cuda(), 0)
    with Recorder(tmp_path / "base"):
        graphed = torch.cuda.make_graphed_callables(Model().cuda(), (sample,))
        found = steps(graphed, 0)
    same(found, eager, rtol=1e-3, atol=1e-3)
    rows = Recording.open(tmp_path / "base").manifest()
    for i, (y, _) in enumerate(found):
        values = rows.filter((rows["name"] == "y") & (rows["step"] == i))
        again = values["occurrence"].max()  # behind torch's runs to warm up
        back = Recording.open(tmp_path / "base")
        torch.testing.assert_close(back.load(0, "y", step=i, occurrence=again), y)
    assert rows.filter((rows["kind"] == "grad") & (rows["step"] > 0)).height == 2
    with Replayer(tmp_path / "base") as session:
        graphed = torch.cuda.make_graphed_callables(Model().cuda(), (sample,))
        again = steps(graphed, 5)
    same([(y,) for y, _ in again], [(y,) for y, _ in found], rtol=1e-6, atol=1e-6)
    values = session.log().filter(session.log()["kind"] == "tensor")
    assert set(values["outcome"]) <= {"grafted", "without effect"}


def test_what_a_tap_saw_is_recorded_whatever_the_job_does_next(tmp_path):
    x = torch.zeros(8 << 20, device="cuda")
    y = torch.zeros(1 << 20, device="cuda")
    other = torch.cuda.Stream()
    with Recorder(tmp_path / "base"):
        for i in range(40):
            x.fill_(i)
            tap("x", x)
            x.fill_(-1)
            with torch.cuda.stream(other):
                y.fill_(i)
                tap("y", y)
                y.fill_(-1)
    back = Recording.open(tmp_path / "base")
    for name in "xy":
        for i in range(40):
            value = back.load(0, name, occurrence=i)
            assert value.min() == value.max() == i
    with Replayer(tmp_path / "base") as session:
        for i in range(40):
            x.fill_(-1)
            tap("x", x)
            assert x.sum().item() == i * x.numel()
            with torch.cuda.stream(other):
                y.fill_(-1)
                tap("y", y)
                assert y.sum().item() == i * y.numel()
    assert outcomes(session) == ["grafted"] * 80


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.bool, torch.uint8, torch.int64,
]  # fmt: skip


def wide(value):
    return value.cpu().to(torch.complex128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_strides(tmp_path, dtype):
    def values(seed):
        g = torch.Generator().manual_seed(seed)
        whole = torch.randn(6, 5, 4, generator=g).mul(3).to(dtype).cuda()
        return [whole, whole.transpose(0, 2), whole[::2, 1:], whole[0, 0, 0], whole[:0]]

    with Recorder(tmp_path / "base"):
        for i, value in enumerate(values(0)):
            tap("v", value, at=i)
    back = Recording.open(tmp_path / "base")
    for i, value in enumerate(values(0)):
        read = back.load(0, "v", at=i)
        assert torch.equal(wide(read), wide(value))
    given = [value.clone() for value in values(1)]
    with Replayer(tmp_path / "base") as session:
        for i, value in enumerate(given):
            tap("v", value, at=i)
    assert set(outcomes(session)) == {"grafted"}
    for one, wanted in zip(given, values(0), strict=True):
        assert torch.equal(wide(one), wide(wanted))


def test_what_was_tapped_comes_while_another_thread_captures(tmp_path):
    """Graphs are captured so that other threads may do little, and the writer is one."""
    values = [torch.full((64, 64), float(i), device="cuda") for i in range(12)]
    graphs = []
    with Recorder(tmp_path) as recorder:
        for i, value in enumerate(values):
            tap("x", value, i=i)
            value.fill_(-1.0)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                doubled = value * 2
                time.sleep(0.1)  # the writer lets a burst pass, then begins
            graphs.append((graph, doubled))
            assert i < 2 or recorder._writer.rows_written > 0
        for graph, doubled in graphs:
            graph.replay()
            assert doubled.unique().tolist() == [-2.0]
    back = Recording.open(tmp_path)
    for i in range(12):
        assert back.load(0, "x", i=i).unique().tolist() == [float(i)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_what_is_tapped_is_what_was_there_whatever_the_job_does_next(tmp_path, dtype):
    """Large and small, contiguous or not, leaves and views, from two streams."""
    bits = torch.randint(0, 256, (3 << 20,), dtype=torch.uint8, device="cuda")
    bits = bits % 2 if dtype == torch.bool else bits
    whole = bits.view(dtype).view(1024, -1)
    taken = {
        "whole": whole, "cut": whole.t(), "part": whole[5:9, 3:7], "scalar": whole[3, 4],
        "none": whole[:0], "negative": whole.conj() if whole.is_complex() else whole[1],
    }  # fmt: skip
    if dtype == torch.float32:
        taken["leaf"] = torch.nn.Parameter(whole.clone())
        taken["made"] = taken["leaf"] * 2
    expected = {name: value.detach().resolve_conj().cpu() for name, value in taken.items()}
    side = torch.cuda.Stream()
    with Recorder(tmp_path):
        for stream in (torch.cuda.current_stream(), side):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for name, value in taken.items():
                    tap(name, value)
        side.synchronize()
        bits.zero_()
    back = Recording.open(tmp_path)
    for name, value in expected.items():
        for occurrence in range(2):
            found = back.load(0, name, occurrence=occurrence)
            assert found.dtype == value.dtype and found.shape == value.shape
            assert (
                found.contiguous()
                .view(-1)
                .view(torch.uint8)
                .equal(value.contiguous().view(-1).view(torch.uint8))
            )
