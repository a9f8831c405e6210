"""Taps in CUDA graphs: fired around each run, with what that computed.

By a fake of captures, and by real ones where there is a GPU.
"""

from __future__ import annotations

import pytest
import torch
from graphed import MACHINES, captured_by
from tapping import outcomes
from torch._higher_order_ops import effects

from recorder import Recorder, Recording, bits, context, rows, step, tap
from recorder.taps import graphs
from replayer import Replayer, graft


@pytest.fixture(autouse=True, params=MACHINES)
def backend(request, monkeypatch):
    made = request.param()
    monkeypatch.setattr(graphs, "backend", made)
    for module in (bits, graft):
        monkeypatch.setattr(module, "is_capturing", made.is_capturing)
    torch.set_default_device(made.device)
    yield made
    torch.set_default_device(None)
    graphs.unwatch()


class Captured:
    """A job that is captured once, and then run from its graph."""

    def __init__(self, job, size=4):
        self.x = torch.zeros(size)
        self.graph, self.y = captured_by(graphs.backend, lambda: job(self.x))

    def __call__(self, value):
        self.x.fill_(value)
        self.graph.replay()
        return self.y.clone()


def job(x):
    y = tap("y", x * 2, layer=1)
    return tap("z", y + 1)


def test_what_each_run_computes_is_recorded_after_it(run, backend):
    with Recorder(run):
        captured = Captured(job)
        for value in (1.0, 2.0, 5.0):
            assert captured(value).tolist() == [2 * value + 1] * 4
            step()
    back = Recording.open(run)
    assert back.manifest().height == 6, "nothing as it is captured"
    for number, value in enumerate((1.0, 2.0, 5.0)):
        assert back.load(0, "y", step=number, layer=1).tolist() == [2 * value] * 4
        assert back.load(0, "z", step=number).tolist() == [2 * value + 1] * 4
    assert backend.waits == 2, "each run waits for the copies of the one before"


def test_grafts_are_switched_on_and_off_without_a_new_capture(run):
    with Recorder(run):
        for value in (10.0, 20.0):
            job(torch.full((4,), value))
            step()
    with Replayer(run) as first:
        captured = Captured(job)
        assert captured(1.0).tolist() == [21.0] * 4
        step()
        assert captured(1.0).tolist() == [41.0] * 4
    assert captured(1.0).tolist() == [3.0] * 4, "off"
    with Replayer(run, filter='name == "y"') as second:
        assert captured(2.0).tolist() == [21.0] * 4
        step()
        assert captured(2.0).tolist() == [41.0] * 4
        step()
        assert captured(2.0).tolist() == [5.0] * 4, "no record is left: its own value"
    assert outcomes(first) == ["grafted"] * 4
    assert outcomes(second) == ["grafted", "grafted", "missing"]
    log = first.log().filter(first.log()["name"] == "y").sort("seq")
    assert log["max_abs"].to_list() == [18.0, 38.0], "against what this run computed"
    assert captured(3.0).tolist() == [7.0] * 4


def test_one_site_that_fires_twice_has_memory_for_each(run):
    def twice(x):
        for _ in range(2):
            x = tap("x", x + 1)
        return x

    with Recorder(run):
        captured = Captured(twice)
        captured(1.0)
        captured(5.0)
    back = Recording.open(run)
    found = [back.load(0, "x", occurrence=i)[0].item() for i in range(4)]
    assert found == [2.0, 3.0, 6.0, 7.0]
    with Replayer(run) as session:
        assert Captured(twice)(0.0).tolist() == [3.0] * 4
    assert outcomes(session) == ["grafted"] * 2


def test_a_capture_that_is_thrown_away_fires_nothing(run, capsys):
    with Recorder(run):
        thrown = Captured(job)
        thrown.graph.reset()
        with pytest.raises(ValueError, match="in the middle"):
            Captured(lambda x: job(x) + broken())
        captured = Captured(job)
        captured(1.0)
    assert Recording.open(run).manifest().height == 2
    assert "captured while nothing listened" not in capsys.readouterr().err


def broken():
    raise ValueError("in the middle")


def test_contexts_within_the_graph_are_the_capture_s_and_around_it_the_run_s(run):
    def inner(x):
        with context(layer=3):
            return tap("x", x + 1)

    with Recorder(run):
        with context(phase="capture"):
            captured = Captured(inner)
        for i in range(2):
            with context(batch=i):
                captured(float(i))
    tags = Recording.open(run).manifest()["tags"].to_list()
    assert tags == ['{"batch":0,"layer":3}', '{"batch":1,"layer":3}']


def test_rows_of_a_captured_batch_are_the_run_s_and_the_rest_is_padding(run):
    def inner(x):
        return tap("x", x * 2, dims="t")

    with Recorder(run):
        captured = Captured(inner)
        for ids in ([7, 8], [9, 7, 5]):
            with rows(t=torch.tensor(ids)):
                captured(float(ids[0]))
    back = Recording.open(run)
    held = [
        back.ids(row)[0].ids.tolist()
        for row in back.manifest().filter(back.manifest()["kind"] == "tensor").to_dicts()
    ]
    assert held == [[7, 8, -1, -1], [9, 7, 5, -1]]
    static = torch.full((4,), -1)
    with Replayer(run, replicas="last") as session:
        with rows(t=static):  # memory that the job fills before each run
            captured = Captured(inner)
        static.copy_(torch.tensor([5, -1, 8, 4]))
        with rows(t=static):
            found = captured(1.0)
    assert session.log()["rows_found"].to_list() == [2]
    assert found.tolist() == [18.0, 2.0, 14.0, 2.0]


def test_a_graph_of_recordings_alone_is_not_grafted_and_says_so(run, capsys):
    with Recorder(run):
        job(torch.ones(4))
        captured = Captured(job)
    with Replayer(run) as session:
        assert captured(4.0).tolist() == [9.0] * 4
    assert outcomes(session) == ["error", "error"]
    assert "captured while nothing grafted" in session.log()["message"][0]
    capsys.readouterr()


def test_a_graph_that_nobody_saw_captured_is_told_of(run, capsys):
    before = Captured(job)
    graphs.watch()
    between = Captured(job)
    with Recorder(run):
        tap("other", torch.ones(1))
        for captured in (before, between, before):
            captured(1.0)
    err = capsys.readouterr().err
    assert err.count("captured while nothing listened") == 1 and "capture it again" in err


def test_gradients_that_are_captured_too_are_recorded(run, capsys):
    w = torch.full((4,), 3.0, requires_grad=True)

    def training(x):
        h = tap("h", w * x, grad=True)
        (h * h).sum().backward()
        return h.detach()

    with Recorder(run):
        captured = Captured(training)
        captured(1.0)
        captured(2.0)
    back = Recording.open(run)
    found = [back.load(0, "h", kind="grad", occurrence=i)[0].item() for i in range(2)]
    assert found == [6.0, 12.0]
    with Replayer(run, filter='kind == "grad"') as session:
        Captured(training)(1.0)
    assert session.log().height == 0
    assert "comes in a CUDA graph can be recorded, and not grafted" in capsys.readouterr().err


def test_a_backward_goes_on_with_what_was_grafted(run):
    w = torch.full((4,), 0.5, requires_grad=True)

    def training(x):
        h = tap("h", torch.tanh(w * x))  # whose backward reads what it returned
        return torch.autograd.grad(h.sum(), w)[0]

    with Recorder(run):
        tap("h", torch.full((4,), 0.5))
    with Replayer(run):
        found = Captured(training)(2.0)
    assert found.tolist() == [(1 - 0.5**2) * 2] * 4


def test_values_and_expanded_tensors(run):
    def inner(x):
        tap("n", 3)
        wide = x[:1].expand(4)
        tap("wide", wide)
        return wide + 0

    with Recorder(run):
        captured = Captured(inner)
        captured(1.0)
        captured(2.0)
    back = Recording.open(run)
    assert back.manifest()["kind"].to_list() == ["value", "tensor"] * 2
    assert back.load(0, "wide", occurrence=1).tolist() == [2.0] * 4
    with Replayer(run) as session:
        assert Captured(inner)(9.0).tolist() == [9.0] * 4
    assert outcomes(session) == ["compared", "error"]
    assert "overlap" in session.log()["message"][1]


@pytest.mark.filterwarnings("ignore")  # whatever the compiler has to say
@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_what_is_compiled_and_then_captured(run, backend, how):
    if backend.device == "cpu" and not hasattr(effects, "_get_effect"):
        pytest.skip("before torch 2.10 the fake is not asked for what effects do")
    torch._dynamo.reset()

    def inner(x):
        with context(layer=3):
            y = tap("y", torch.tanh(x))
        return tap("z", y * 2)

    def captured():
        program = torch.compile(inner, backend=how, fullgraph=True)
        program(torch.zeros(4))  # warmed up, as whoever captures does
        step()
        return Captured(program)

    with Recorder(run):
        made = captured()
        for value in (1.0, 2.0):
            made(value)
            step()
    back = Recording.open(run)
    for i, value in enumerate((1.0, 2.0), 1):
        wanted = torch.full((4,), value).tanh()
        assert torch.equal(back.load(0, "y", step=i, layer=3), wanted.cpu())
        assert torch.equal(back.load(0, "z", step=i), wanted.cpu() * 2)
    assert back.manifest().height == 6
    with Replayer(run) as session:
        made = captured()
        for value in (1.0, 2.0):
            assert torch.equal(made(5.0), torch.full((4,), value).tanh() * 2)
            step()
    assert outcomes(session) == ["grafted"] * 6
