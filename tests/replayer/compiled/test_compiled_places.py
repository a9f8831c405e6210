"""Taps where the compiler makes a program of its own: branches, loops, regions; and in vmap."""

from __future__ import annotations

import pytest
import torch
from compiling import BACKENDS, HAS_COMPILER
from tapping import outcomes
from torch._higher_order_ops import effects

from recorder import Recorder, Recording, context, step, tap
from replayer import Replayer

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inner(x):
    with context(inner=1):
        return tap("t", x * 2)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return inner(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def branch(x):
    return torch.cond(x.sum() > 0, inner, lambda x: tap("t", x * 3), (x,))


def loop(x):
    def body(i, x):
        return i + 1, inner(x)

    return torch._higher_order_ops.while_loop(lambda i, x: i < 2, body, (torch.tensor(0), x))[1]


def batch(x):
    return torch.vmap(inner)(x)


def function(x):
    return Doubled.apply(x)


marked = getattr(torch.compiler, "nested_compile_region", lambda function: function)(inner)


def region(x):
    return marked(x)


HAS_REGIONS = hasattr(torch.compiler, "nested_compile_region")
# From torch 2.10 on effects lead out of it.
REGIONS = [region] if HAS_REGIONS and not hasattr(effects, "_get_effect") else []


def around(part):
    def job(x):
        with context(part=1):
            x = tap("before", x + 1)
            x = part(x)
            return tap("after", x * 1)

    return job


def once(job, scale=1.0):
    found = job(torch.full((3, 2), scale))
    step()
    return found.detach()


def recorded(run):
    rows = Recording.open(run).manifest().sort("seq")
    return rows.select("name", "tags").rows()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", [branch, loop, batch, *REGIONS])
def test_what_no_effect_leads_out_of_is_refused_each_time(tmp_path, capsys, backend, part):
    """Also in a second session, for which nothing is compiled; the taps around it are there."""
    if backend == "inductor" and part is loop and torch.__version__.startswith("2.10."):
        pytest.skip("this torch compiles no program with a loop and any effect")
    is_kept = backend == "eager" and part is not batch
    kept = [("t", '{"inner":1,"part":1}')] * ((1 + (part is loop)) * is_kept)
    wanted = [("before", '{"part":1}'), *kept, ("after", '{"part":1}')]
    job = torch.compile(around(part), backend=backend)
    plain = once(around(part))
    for run in (tmp_path / "one", tmp_path / "two"):
        with Recorder(run):
            assert torch.equal(once(job), plain)
        assert recorded(run) == wanted
        said = capsys.readouterr().err
        assert is_kept or (f"tap 't' at {__file__}:" in said and "tap outside of it" in said)
        assert not is_kept or not said
    with Replayer(run) as session:
        assert torch.equal(once(job, 5.0), plain)
    assert outcomes(session) == ["grafted"] * len(wanted)
    assert bool(session.reason) is not is_kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_inside_is_refused_too(run, capsys, backend):
    def body(x):
        step()
        return x * 2

    def job(x):
        return torch.cond(x.sum() > 0, body, lambda x: x * 3, (x,))

    with Recorder(run):
        torch.compile(job, backend=backend)(torch.ones(3))
    said = capsys.readouterr().err
    assert ("tap 'step()' at " in said) is (backend != "eager")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", [function, region])
def test_regions_that_effects_lead_out_of_are_as_in_eager_mode(run, backend, part):
    if part is region and backend != "eager" and REGIONS:
        pytest.skip("before torch 2.10 no effect leads out of it")
    if part is region and not hasattr(torch.compiler, "nested_compile_region"):
        pytest.skip("torch 2.6 has none")
    job = torch.compile(around(part), backend=backend, fullgraph=True)
    with Recorder(run):
        plain = once(job)
    assert [name for name, _ in recorded(run)] == ["before", "t", "after"]
    with Replayer(run) as session:
        assert torch.equal(once(job, 5.0), plain)
    assert outcomes(session) == ["grafted"] * 3 and not session.reason


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of", ["computed", "input"])
def test_a_graft_onto_an_expanded_tensor_is_refused_and_the_job_goes_on(run, capsys, backend, of):
    def job(x):
        return tap("h", (x * 2 if of == "computed" else x)[:1].expand(4, 2)) * 1

    made = torch.compile(job, backend=backend, fullgraph=True)
    with Recorder(run):
        made(torch.ones(3, 2))
    back = Recording.open(run)
    assert torch.equal(back.load(0, "h"), job(torch.ones(3, 2)))
    plain = job(torch.ones(3, 2) * 5)
    for filter in (None, 'name == "other"'):
        with Replayer(run, filter=filter) as session:
            assert torch.equal(made(torch.ones(3, 2) * 5), plain)
        assert outcomes(session) == (["error"] if filter is None else [])
    assert "overlap in memory" in capsys.readouterr().err


def can_part(test):
    """Mark a test of what inductor does around CUDA graphs."""
    has_tag = hasattr(torch.Tag, "cudagraph_unsafe")
    test = pytest.mark.skipif(not has_tag, reason="torch has no such tag")(test)
    return pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")(test)


@can_part
def test_inductor_keeps_taps_out_of_cuda_graphs(run, monkeypatch):
    from torch._inductor.scheduler import Scheduler
    from torch._inductor.utils import is_cudagraph_unsafe_op

    seen = []
    plain = Scheduler.codegen

    def codegen(self):
        for node in self.nodes:
            of = getattr(node.node, "op_overload", None)
            if getattr(of, "namespace", "") == "tensorgraft":
                seen.append(node.node)
        return plain(self)

    monkeypatch.setattr(Scheduler, "codegen", codegen)
    with Recorder(run), torch._inductor.config.patch(force_disable_caches=True):
        once(torch.compile(around(inner), fullgraph=True))
    assert len(seen) == 7  # taps, and both ends of two blocks
    assert all(map(is_cudagraph_unsafe_op, seen))


def layers(x):
    for i in range(2):
        x = tap("h", torch.tanh(x) * 2, grad=True, layer=i)
        with context(inner="y"):
            tap("dead", x + 1, layer=i)
            x = tap("z", torch.sin(x) * x, layer=i)
        x = x * 3
    return x


@can_part
@pytest.mark.parametrize("is_training", [False, True])
def test_programs_that_inductor_parts_at_taps_run(tmp_path, monkeypatch, is_training):
    """As it does for CUDA graphs, here without any: on a CPU it would part at each operation."""
    from torch._inductor import config
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import FusedSchedulerNode, Scheduler
    from torch._inductor.utils import is_cudagraph_unsafe_op

    parted = []

    def should_partition(self, node, *args, **kwargs):
        parts = node.snodes if isinstance(node, FusedSchedulerNode) else [node]
        here = any(is_cudagraph_unsafe_op(part.node) for part in parts)
        parted.append(here)
        # A graph's function is given tensors alone: what holds several is none of its inputs.
        assert here or not any(isinstance(part.node, MultiOutput) for part in parts)
        return "a tap" if here else None

    def run(job, seed):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        x.requires_grad_(is_training)
        y = job(x)
        if is_training:
            y.sum().backward()
        step()
        return y.detach(), x.grad

    monkeypatch.setattr(Scheduler, "should_partition", should_partition)
    with config.patch(
        {"force_disable_caches": True, "graph_partition": True, "triton.cudagraphs": True}
    ):
        job = torch.compile(layers, fullgraph=True)
        with Recorder(tmp_path / "parted"):
            found = run(job, 0)
        assert any(parted) and not all(parted)
        with Replayer(tmp_path / "parted") as session:
            grafted = run(job, 1)
    assert set(outcomes(session)) == {"grafted"}
    assert torch.equal(grafted[0], found[0])
    with Recorder(tmp_path / "eager"):
        wanted = run(layers, 0)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    one, other = (Recording.open(tmp_path / name) for name in ("parted", "eager"))
    rows, others = one.manifest().sort("seq"), other.manifest().sort("seq")
    columns = ["kind", "name", "tags"]
    assert sorted(rows.select(columns).rows()) == sorted(others.select(columns).rows())
    for name in ("h", "dead", "z"):
        for layer in (0, 1):
            tags = {"layer": layer} | ({} if name == "h" else {"inner": "y"})
            torch.testing.assert_close(one.load(0, name, **tags), other.load(0, name, **tags))
