"""Taps in what torch.compile compiles: exact values, no graph break, grafts as in eager mode."""

from __future__ import annotations

import contextlib

import pytest
import torch
from compiling import BACKENDS
from tapping import outcomes
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from recorder import Recorder, Recording, context, rows, step, tap
from recorder.taps import tracing
from replayer import Replayer

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore"),  # whatever the compiler has to say
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    assert not counters["graph_break"]
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def block(x, w, i):
    h = torch.exp(x @ w)
    h = tap("h", h, grad=True, layer=i, dims="t h")
    with context(inner="y"):
        z = torch.sin(h) * h
        tap("dead", z + 1, layer=i)
        tap("z", z, layer=i, flag=True, words=["a", 1], scale=0.5)
    return (z * h * 2).sum(), h.detach(), z.detach()


def repeated(x, w, i):
    return checkpoint(block, x, w, i, use_reentrant=False)


def train(function, seed=0, steps=3):
    """Run steps of other sizes; return what each computed: loss, activations, gradients."""
    found = []
    for i in range(steps):
        g = torch.Generator().manual_seed(seed + i)
        x = torch.randn(5 + i, 8, generator=g, requires_grad=True)
        w = torch.randn(8, 8, generator=g, requires_grad=True)
        with context(outer=i):
            loss, *others = function(x, w, i)
        loss.backward()
        step()
        found.append([loss.detach(), *others, x.grad, w.grad])
    return found


def heights(function, backend):
    """How many records there may be: three taps and a gradient, in three steps.

    A checkpoint that is compiled fires nothing twice; by the eager backend it is repeated from some
    torch on (not by 2.6), as in eager mode.
    """
    return (12, 21) if function is repeated and backend == "eager" else (12,)


def assert_same(one, other, **how):
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, **(how or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [block, repeated])
def test_recordings_hold_what_the_compiled_program_computes(run, backend, function):
    plain = train(compiled(function, backend))
    torch._dynamo.reset()
    with Recorder(run):
        tapped = train(compiled(function, backend))
    assert_same(plain, tapped)
    back = Recording.open(run)
    for i, (_, h, z, *_) in enumerate(tapped):
        assert torch.equal(back.load(0, "h", step=i, layer=i, outer=i), h)
        tags = {"layer": i, "outer": i, "inner": "y"}
        assert torch.equal(
            back.load(0, "z", step=i, flag=True, words=["a", 1], scale=0.5, **tags), z
        )
        assert torch.equal(back.load(0, "dead", step=i, **tags), z + 1)
        assert back.load(0, "h", step=i, kind="grad", layer=i, outer=i).shape == h.shape
    assert back.manifest().height in heights(function, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [block, repeated])
def test_grafts_are_those_of_eager_mode(run, backend, function):
    with Recorder(run):
        train(function)
    with Replayer(run):
        wanted = train(function, seed=50)
    with Replayer(run) as session:
        found = train(compiled(function, backend), seed=50)
    assert_same(found, wanted, rtol=1e-5, atol=1e-5)
    back = Recording.open(run)
    for i, (_, h, *_) in enumerate(found):
        assert torch.equal(back.load(0, "h", step=i, layer=i, outer=i), h)
    assert session.problems() == [] and {*outcomes(session)} == {"grafted"}
    # Also what nobody reads.
    assert session.log().height in heights(function, backend)


def test_on_and_off_compile_once_each(run, tmp_path):
    function = compiled(block, dynamic=True)

    def graphs():
        return counters["stats"]["unique_graphs"]

    train(function)
    before = graphs()
    for i in range(3):
        with Recorder(tmp_path / str(i)):
            train(function)
        assert graphs() == before + 1, "one for all recordings"
        train(function)
    for _ in range(2):
        with Replayer(tmp_path / "0"):
            train(function)
        assert graphs() == before + 2, "and one for all replays"


def test_layers_of_a_loop_and_sizes_share_programs(run):
    def layers(x, n):
        for i in range(n):
            x = tap("x", x.sin(), layer=i)
        return x

    function = compiled(layers)
    with Recorder(run):
        for size in range(3, 12):
            function(torch.randn(size), 3)
            step()
    assert counters["stats"]["unique_graphs"] == 2, "one for the first size, one for all others"
    manifest = Recording.open(run).manifest()
    assert manifest["shape"].to_list() == [[size] for size in range(3, 12) for _ in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_and_types_in_tags_and_extras_are_those_of_each_call(tmp_path, capsys, backend):
    def job(x, scale):
        extras = {"shape": x.shape, "of": {"n": [x.shape[0], 1]}, "by": (scale, True), "empty": []}
        with context(around=[x.shape[0], "a"]):
            tap("h", x * 2, extras=extras, size=x.shape, dtype=x.dtype)
            tap("wide", x, number=(1 << 63) - 1, other=-(1 << 63))
            tap("refused", x, device=x.device)
            tap("refused", x, number=1 << 63)
            return tap("n", x + 1, deep=[[x.shape[0]], []], scale=scale)

    rows = []
    for name, function in (("eager", job), ("compiled", compiled(job, backend))):
        with Recorder(tmp_path / name):
            for n in (2, 3, 4):
                function(torch.ones(n, 3), 0.5 * n)
        found = Recording.open(tmp_path / name).manifest().sort("seq")
        rows.append(found.select("name", "tags", "extras", "occurrence").rows())
    assert rows[0] == rows[1] and len(rows[0]) == 9
    said = capsys.readouterr().err
    assert said.count("'device' is a device") == said.count("more than 64 bits") == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_micro_batches_of_equal_tags_keep_their_own(run, backend, order):
    """Several forwards before their backwards: what is repeated there is told by what it holds."""

    def forward(x, w):
        h = tap("h", torch.exp(x * w), grad=True)
        return (torch.sin(h) * h).sum()

    def repeat(x, w):
        return checkpoint(forward, x, w, use_reentrant=False)

    def job(function, seed):
        g = torch.Generator().manual_seed(seed)
        w = torch.randn(4, generator=g, requires_grad=True)
        xs = [torch.randn(4, generator=g, requires_grad=True) for _ in order]
        losses = [function(x, w) for x in xs]
        for i in order:
            losses[i].backward()
        return [[x.grad for x in xs] + [w.grad]]

    with Recorder(run):
        job(forward, 0)
    with Replayer(run):
        wanted = job(forward, 9)
    with Replayer(run) as session:
        found = job(compiled(repeat, backend), 9)
    assert_same(found, wanted, rtol=1e-6, atol=1e-6)
    assert session.problems() == []
    log = session.log().filter(session.log()["kind"] == "grad")
    assert sorted(log["occurrence"].to_list()) == [0, 1, 2]


def test_blocks_and_decorators_within_and_around(run):
    @context(by="decorator")
    def inner(x, i):
        with context(held=1), context(i=i):
            return tap("x", x + i)

    def outer(x, i):
        return inner(inner(x, i), 7)

    function = compiled(outer)
    with Recorder(run), context(around="yes"):
        for i in range(3):
            function(torch.zeros(2), i)
        tap("after", torch.zeros(1))
    manifest = Recording.open(run).manifest()
    tags = '{{"around":"yes","by":"decorator","held":1,"i":{}}}'
    assert manifest["tags"].to_list() == [
        *(tags.format(i) for first in range(3) for i in (first, 7)),
        '{"around":"yes"}',
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_of_a_program_that_raised_is_left(run, backend):
    def job(x, i):
        x = tap("before", x + 1)
        with context(a=1), rows(t=torch.arange(3)):
            x = tap("x", x * 2, dims="t")
            return x[i]

    function = compiled(job, backend)
    with Recorder(run):
        for i in (1, 7, 1):
            with contextlib.suppress(IndexError, RuntimeError):
                function(torch.ones(3), torch.tensor([i]))
        with contextlib.suppress(IndexError, RuntimeError):
            function(torch.ones(3), torch.tensor([9]))
        compiled(lambda x: tap("other", x * 1, dims="t"), backend)(torch.ones(3))
        with contextlib.suppress(IndexError, RuntimeError):
            function(torch.ones(3), torch.tensor([9]))
        tap("after", torch.ones(3), dims="t")
    rows_of = Recording.open(run).manifest().filter(kind="tensor")
    for name, tags, ids in rows_of.select("name", "tags", "rows").iter_rows():
        assert (tags, ids is not None) == (('{"a":1}', True) if name == "x" else ("{}", False)), (
            name
        )


def test_rows_within_and_around(run):
    def job(x, ids, others):
        with rows(t=ids):
            x = tap("a", x * 2, dims="t h")
        x = tap("b", x * 2, dims="n h", rows={"n": others})
        return tap("c", x * 2, dims="s h")

    def once(function, ids):
        ids = torch.tensor(ids)
        x = ids[:, None] * torch.ones(1, 3)
        with rows(s=ids + 200):
            return function(x, ids, ids + 100)

    with Recorder(run):
        once(compiled(job), [1, 2, 3, 4])
    back = Recording.open(run)
    tapped = back.manifest().filter(back.manifest()["kind"] == "tensor")
    assert tapped.height == 3 and tapped["rows"].null_count() == 0
    with Replayer(run) as session:
        found = once(compiled(lambda x, *ids: job(x * 0, *ids)), [4, 2, 9])
    assert session.log()["rows_found"].to_list() == [2, 2, 2]
    assert found[:, 0].tolist() == [32, 16, 0]


def views(x):
    h = tap("h", x + 1)
    y = h[1:]
    step()
    y = tap("y", y)
    step()
    return tap("x", x) + h.sum() + y.sum()


def blocks(x):
    with context(layer=0):
        h = tap("h", x + 1)
        y = tap("y", h[1:])
    with context(layer=1):
        z = tap("h", y * 2)
    step()
    return z * 1, h * 1


def factors(x):
    h = tap("h", x)
    y = torch.linalg.qr(h.expand(3, 3) + torch.eye(3))[0]
    step()
    with context(layer=1):
        y = tap("y", y)
    step()
    tap("x", x)
    return y


def branches(x):
    with context(layer=0):
        h = tap("h", x + 1)
        y = torch.cond(h.sum() > 0, lambda h: h * 2, lambda h: h * 3, (h,))
        y = tap("y", y)
    step()
    return tap("y", y * 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("job", [views, blocks, factors, branches])
def test_steps_and_blocks_stand_where_they_stood(run, backend, job):
    """Inductor forgets that effects are ordered, from 2.9 to 2.14; a graft came behind a step."""
    with Recorder(run):
        for i in range(3):
            job(torch.full((3,), 10.0 * i))
    asked, logs = [], []
    for function in (job, compiled(job, backend)):
        with Replayer(run, filter='name != "x"') as session:
            asked.append([function(torch.zeros(3)) for _ in range(3)])
        logs.append(session.log().drop("call_site", "seconds", strict=False))
        assert not session.reason
    torch.testing.assert_close(asked[0], asked[1])
    what = ("name", "tags", "step", "occurrence", "outcome")
    assert logs[0].select(what).rows() == logs[1].select(what).rows()


def test_what_the_compiler_moves_is_refused_and_not_taken_for_another(run, capsys):
    """As were it to forget again that effects are ordered."""
    numbers = iter((0, 2, 1))
    with Recorder(run), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "number_in_program", lambda: next(numbers))

        def job(x):
            for name in "abc":
                x = tap(name, x + 1)
            return x

        compiled(job)(torch.zeros(3))
    back = Recording.open(run)
    assert back.manifest()["name"].to_list() == ["a"]
    assert capsys.readouterr().err.count("in another place than it stands") == 2


def test_parts_of_a_tensor(run):
    def job(x):
        qkv = tap("qkv", x + 1, dims="t ({q: r | k: 1 | v: 1}*d) # r=2 d=2")
        return qkv * 1

    with Recorder(run):
        compiled(job)(torch.arange(24.0).view(3, 8))
    back = Recording.open(run)
    assert torch.equal(back.load(0, "k").flatten(1), torch.arange(24.0).view(3, 8)[:, 4:6] + 1)
    with Replayer(run, filter='name != "v"') as session:
        found = compiled(job)(torch.zeros(3, 8))
    assert outcomes(session) == ["grafted"] * 2
    assert torch.equal(found[:, :6], torch.arange(24.0).view(3, 8)[:, :6] + 1)
    assert torch.equal(found[:, 6:], torch.ones(3, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_inputs_parameters_and_leaves_are_grafted_in_place(run, backend):
    def job(x, w):
        y = x * 1
        tap("view", y[1:3])
        tap("input", x)
        tap("w", w, grad=True)
        return y + x * w

    def once(function, by):
        x, w = torch.full((4,), by), torch.full((4,), by, requires_grad=True)
        found = function(x, w)
        found.sum().backward()
        return [found.detach(), x, w.detach(), w.grad]

    with Recorder(run, filter='kind == "tensor"'):
        once(job, 3.0)
    with Replayer(run):
        wanted = once(job, 1.0)
    with Replayer(run) as session:
        found = once(compiled(job, backend), 1.0)
    assert outcomes(session)[:3] == ["grafted"] * 3
    assert_same([found], [wanted])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_asked_for_under_no_grad_is_told_of(run, backend, capsys):
    def job(x, w):
        y = x * w
        with torch.no_grad():
            tap("y", y, grad=True)
            tap("w", w, grad=True)  # of which eager code has none either
        return (y * y).sum()

    x, w = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    program = compiled(job, backend)
    with Recorder(run):
        for _ in range(3):
            program(x, w).backward()
            step()
    taps = Recording.open(run).manifest()
    assert set(taps["kind"]) == {"tensor"} and taps.height == 6
    said = capsys.readouterr().err
    assert "'y' at" in said and said.count("under no_grad; tap it outside of no_grad()") == 1
    with Replayer(run) as session:
        program(x, w).backward()
    assert outcomes(session) == ["grafted"] * 2
    assert "tap 'y'" in (said := capsys.readouterr().err)
    assert said.count("under no_grad; tap it outside of no_grad()") == 1
    with Recorder(run, filter='kind != "grad"', overwrite=True):
        program(x, w).backward()
    assert "no_grad" not in capsys.readouterr().err


@pytest.mark.parametrize("how", ["used", "not used"])
def test_a_gradient_comes_whether_or_not_tap_s_result_is_used(run, how, capsys):
    def job(x, w):
        y = torch.exp(x * 2)
        z = tap("y", y, grad=True)
        v = tap("v", y[1:], grad=True)
        u = tap("w", w, grad=True)
        return (z * y.sin()).sum() + (v * u).sum() if how == "used" else (y * y.sin() * w[0]).sum()

    x, w = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    with Recorder(run):
        compiled(job)(x, w).backward()
    names = Recording.open(run).manifest().filter(kind="grad")["name"].to_list()
    said = capsys.readouterr().err
    if how == "used":
        assert sorted(names) == ["v", "w", "y"] and said == ""
    else:  # what is a view, or a leaf, stays what it is
        assert names == ["y"] and said.count("its gradient never came: in a compiled program") == 2
        assert "h = tap('h', h, grad=True)" in said


def test_a_gradient_that_comes_steps_later_has_come(run, capsys):
    def job(x):
        h = tap("h", x.sin(), grad=True)
        step()
        step()
        return h * 2

    with Recorder(run):
        function = compiled(job)
        for _ in range(3):
            function(torch.ones(3, requires_grad=True)).sum().backward()
            step()
    rows = Recording.open(run).manifest()
    assert rows.filter(rows["kind"] == "grad")["step"].to_list() == [0, 3, 6]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_written_to_a_tapped_tensor_is_seen_by_all_who_have_it(run, backend):
    def job(x):
        h = x * 2
        y = tap("h", h, grad=True)
        y.add_(1)
        z = h + 3
        tap("z", z, grad=True)
        z.mul_(2)
        return (h * z).sum()

    def once(function):
        x = torch.ones(3, requires_grad=True)
        found = function(x)
        found.backward()
        return [found.detach(), x.grad]

    plain = once(compiled(job, backend))
    torch._dynamo.reset()
    with Recorder(run):
        tapped = once(compiled(job, backend))
    assert_same([plain], [tapped], rtol=1e-6, atol=1e-6)
    assert_same([plain], [once(job)], rtol=1e-6, atol=1e-6)
    with (
        pytest.raises(Exception, match="is a view and is being modified inplace"),
        Recorder(run, overwrite=True),
    ):
        compiled(lambda x: tap("v", (x * 2)[:2], grad=True).add_(1).sum(), backend)(
            torch.ones(3, requires_grad=True)
        )


def test_a_callable_is_traced_and_a_step_may_be_inside(run):
    def job(x):
        tap("y", lambda: x * 3)
        step()
        return tap("z", x + 1)

    with Recorder(run):
        compiled(job)(torch.ones(2))
        compiled(job)(torch.ones(2))
    manifest = Recording.open(run).manifest()
    found = manifest.select("name", "step").rows()
    assert found == [("y", 0), ("z", 1), ("y", 1), ("z", 2)]


def test_without_gradients_and_in_inference_mode(run):
    def job(x):
        return tap("x", x * 2, grad=True) + 1

    w = torch.ones(3, requires_grad=True)
    with Recorder(run):
        with torch.no_grad():
            compiled(job)(w)
        with torch.inference_mode():
            compiled(job)(torch.ones(3))
    with Replayer(run) as session, torch.no_grad():
        assert torch.equal(compiled(job)(w * 9), torch.full((3,), 3.0))
    assert outcomes(session) == ["grafted"]


def test_a_failing_graft_is_the_log_s_and_raises_where_asked_to(run):
    from recorder.errors import ReplayError

    def job(x):
        return tap("x", x * 2) + 1

    with Recorder(run):
        job(torch.ones(3))
    function = compiled(job)
    with Replayer(run) as session:
        assert torch.equal(function(torch.ones(4)), torch.full((4,), 3.0))
    assert outcomes(session) == ["error"]
    with pytest.raises(ReplayError), Replayer(run, on_error="raise"):
        function(torch.ones(4))


def test_the_site_is_that_of_the_tap(run, capsys):
    def job(x):
        return tap("x", x, dims="a b")

    with Recorder(run):
        compiled(job)(torch.ones(3))
    assert f"at {__file__}:{job.__code__.co_firstlineno + 1} " in capsys.readouterr().err


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_exported_has_no_taps(run, strict):
    class Model(torch.nn.Module):
        def forward(self, x):
            with context(a=1):
                x = tap("x", x * 2, grad=True)
            step()
            return tap("y", x + 1)

    if not (strict or hasattr(torch.compiler, "is_exporting")):
        pytest.skip("torch 2.6 does not say")
    with Recorder(run):
        exported = torch.export.export(Model(), (torch.ones(2),), strict=strict)
    assert not any("tensorgraft" in str(node.target) for node in exported.graph.nodes)
    assert not run.exists() or Recording.open(run).manifest().height == 0


class TestWhatNoOperatorTakes:
    """It breaks the graph at that place, as everything did, and is recorded and grafted."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("how", ["number", "tensor as a tag", "sparse"])
    def test_taps(self, run, how, capsys):
        def job(x):
            x = x + 1
            if how == "number":
                tap("n", 7)
            elif how == "sparse":
                tap("s", x.to_sparse())
            else:
                tap("t", x, bad=x)
            return tap("x", x * 2)

        function = torch.compile(job, backend="eager")
        with Recorder(run):
            assert function(torch.ones(2)).tolist() == [4, 4]
        names = Recording.open(run).manifest()["name"].to_list()
        said = capsys.readouterr().err
        if how == "number":
            assert names == ["n", "x"] and said == ""
        else:
            assert names == ["x"] and said.count("[graft ") == 1 and f"{__file__}:" in said
        with Replayer(run, filter='name == "x"') as session:
            assert function(torch.zeros(2)).tolist() == [4, 4]
        assert outcomes(session) == ["grafted"]
