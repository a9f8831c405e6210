"""Replaying checkpointed jobs: what a backward runs again gets the records of its first forward."""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import weakref

import pytest
import torch
import torch.utils.checkpoint as checkpointing
from tapping import outcomes
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from recorder import Recording, step, tap
from replayer import Replayer
from replayer.log import read_log


class CheckpointFunction(torch.autograd.Function):
    """As Megatron's and DeepSpeed's: a node, whose backward runs the forward again."""

    @staticmethod
    def forward(ctx, run_function, distribute_saved_activations, *args):
        ctx.run_function = run_function
        with torch.no_grad():
            outputs = run_function(*args)
        ctx.save_for_backward(*args)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.run_function(*inputs)
        torch.autograd.backward((outputs,), grads)
        return (None, None, *(t.grad for t in inputs))


def as_megatron(function, *args):
    return CheckpointFunction.apply(function, False, *args)


class CheckpointWithoutOutputFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run_function, owner, *args):
        with torch.no_grad():
            outputs = run_function(*args)
        ctx.save_for_backward(*args)
        owner.ctx = ctx
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        torch.autograd.backward((ctx.outputs,), grads)
        return (None, None, *(t.grad for t in ctx.inputs))


class CheckpointWithoutOutput:
    """As Megatron's, which is repeated by a hook on what follows."""

    def checkpoint(self, run_function, *args):
        self.run_function = run_function
        return CheckpointWithoutOutputFunction.apply(run_function, self, *args)

    def _recompute(self, _):
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in self.ctx.saved_tensors]
        with torch.enable_grad():
            self.ctx.outputs = self.run_function(*inputs)
        self.ctx.inputs = inputs


def by_an_output_hook(function, *args):
    owner = CheckpointWithoutOutput()
    follows = owner.checkpoint(function, *args) * 1
    follows.register_hook(owner._recompute)
    return follows


def as_transformer_engine(function, *args):
    """A frame and hooks, as torch has, in a file of its own."""

    class _CheckpointFrame:
        def __init__(self, recompute_fn):
            self.recompute_fn = recompute_fn
            self.recomputed = []

    frame, count = _CheckpointFrame(function), itertools.count()

    def pack_hook(x):
        frame.recomputed.clear()
        return next(count)

    def unpack_hook(i):
        if not frame.recomputed:
            kept = []

            def keep(x):
                kept.append(x.detach())
                return x

            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
            with torch.enable_grad(), hooks:
                frame.recompute_fn(*args)
            frame.recomputed = kept
        return frame.recomputed[i]

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, unpack_hook):
        return function(*args)


def with_hooks_between(function, *args):
    """Saved tensors of the job's own hide the checkpoint's."""

    def inner(*args):
        with torch.autograd.graph.save_on_cpu():
            y = function(*args)
        return y * torch.ones_like(y)  # saved by the checkpoint

    return checkpoint(inner, *args, use_reentrant=False)


def selective(function, *args):
    """What is saved is not computed again; its tap fires all the same."""
    if not hasattr(checkpointing, "create_selective_checkpoint_contexts"):
        pytest.skip("torch has no selective checkpoints")

    def policy(context, operator, *args, **options):
        is_saved = operator == torch.ops.aten.mul.Tensor
        kinds = checkpointing.CheckpointPolicy
        return kinds.MUST_SAVE if is_saved else kinds.PREFER_RECOMPUTE

    contexts = functools.partial(checkpointing.create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def by_module(function, *args):
    class Layer(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    return wrapper.checkpoint_wrapper(Layer())(*args)


def reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def frames(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def decorated(function, *args):
    """As from torch 2.14 on."""
    return checkpoint(use_reentrant=False)(function)(*args)


def sequential(function, *args):
    return checkpoint_sequential([function], 1, *args, use_reentrant=False)


def plain(function, *args):
    return function(*args)


HAS_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # torch 2.7
HAS_DECORATOR = inspect.signature(checkpoint).parameters["function"].default is None
KINDS = {
    "frames": frames,
    "reentrant": reentrant,
    "megatron": as_megatron,
    "output hook": by_an_output_hook,
    **({"transformer engine": as_transformer_engine} if HAS_HOOKS else {}),
    "offloading": with_hooks_between,
    "wrapper": by_module,
    "selective": selective,
    **({"decorated": decorated} if HAS_DECORATOR else {}),
}
ORDERS = {"in turn": None, "fifo": (0, 1, 2), "lifo": (2, 1, 0), "any": (1, 2, 0)}


class Job:
    """Three micro-batches through two checkpointed layers, each of which taps `h` twice.

    Attributes:
        seen: (micro-batch, layer, tap) and the value there after the tap, in order.
    """

    def __init__(self, kind, order=None, shift=0.0, inner=plain, steps=1, step_between=False):
        self.kind, self.order, self.inner = kind, order, inner
        self.shift, self.steps, self.step_between = shift, steps, step_between
        self.seen = []

    def __call__(self, rank):
        for number in range(self.steps):
            losses = []
            for batch in range(3):
                x = torch.full((2,), 10.0 * number + batch + 1 + self.shift, requires_grad=True)
                for layer in range(2):
                    x = self.kind(lambda x, b=batch, n=layer: self.layer(b, n, x), x)
                losses.append(x.sum())
                if self.order is None:
                    losses.pop().backward()
            if self.step_between:
                step()
            for batch in self.order or ():
                losses[batch].backward()
            if not self.step_between:
                step()

    def layer(self, batch, layer, x):
        def part(x, at):
            h = tap("h", x * (2 + at + layer))
            self.seen.append(((batch, layer, at), h[0].item()))
            return h * h.sigmoid()

        x = self.inner(lambda x: part(x, 0), x)
        return self.inner(lambda x: part(x, 1), x) / 100


def check(job, base, times):
    """Each tap of the job has the base's value, as often as it fired."""
    want = dict(base.seen)
    assert len(want) == len(base.seen)
    assert all(want[key] == value for key, value in job.seen)
    assert len(job.seen) == times * len(want)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_repeated_forward_gets_its_own_records(record, replay, kind, order):
    base = Job(plain)
    record(base)
    target = Job(kind, order, shift=100.0)
    (session,) = replay(target, strict=True)
    check(target, base, 2)
    assert set(outcomes(session)) == {"grafted"} and len(target.seen) == 24
    occurrences = session.log()["occurrence"].to_list()
    assert sorted(occurrences[12:] if order else occurrences) == sorted(
        [*range(12)] * (1 if order else 2)
    )


NESTED = [(a, b) for a in ("frames", "reentrant", "megatron") for b in ("frames", "reentrant")]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(("outer", "inner"), NESTED)
def test_checkpoints_in_checkpoints_too(record, replay, outer, inner, order):
    base = Job(plain)
    record(base)
    target = Job(KINDS[outer], order, shift=100.0, inner=KINDS[inner])
    (session,) = replay(target, strict=True)
    want = dict(base.seen)
    assert all(want[key] == value for key, value in target.seen)
    assert len(target.seen) >= 24 and set(outcomes(session)) == {"grafted"}


@pytest.mark.parametrize("match_on", ["name", "order", "name,step"])
@pytest.mark.parametrize("kind", [frames, reentrant])
def test_other_matches_too(record, replay, kind, match_on):
    base = Job(plain)
    record(base)
    target = Job(kind, (2, 1, 0), shift=100.0)
    replay(target, match_on=match_on, strict=True)
    check(target, base, 2)


@pytest.mark.parametrize("match_on", [None, "name,step", "name"])
@pytest.mark.parametrize("kind", [frames, reentrant, as_megatron])
def test_a_backward_after_the_step_has_ended_gets_the_records_of_its_forward(
    record, replay, kind, match_on
):
    base = Job(plain, steps=2)
    record(base)
    target = Job(kind, (1, 0, 2), shift=100.0, steps=2, step_between=True)
    replay(target, strict=True, match_on=match_on)
    want: dict = {}
    for key, value in base.seen:
        want.setdefault(key, []).append(value)
    for number in range(2):
        for key, value in target.seen[24 * number : 24 * number + 24]:
            assert value == want[key][number]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_it_is_recorded_as_a_second_forward(record, kind):
    rows = record(Job(kind, (2, 1, 0))).rows().filter(name="h")
    firsts, seconds = rows[:12], rows[12:]
    assert set(firsts["tags"]) == {"{}"} and set(seconds["tags"]) == {'{"recompute":true}'}
    assert firsts["occurrence"].to_list() == [*range(12)]
    same = seconds.join(firsts, on="occurrence")
    assert same.height == 12 and same["digest"].equals(same["digest_right"])


@pytest.mark.parametrize("kind", [frames, reentrant])
def test_a_second_backward_of_a_graph_repeats_the_same_forward(record, replay, kind):
    def job(shift):
        def layer(x):
            h = tap("h", x * x)
            seen.append(h.item())
            return h.exp().log()

        seen = []
        losses = []
        for batch in range(2):
            x = torch.full((1,), batch + 1 + shift, requires_grad=True)
            losses.append(kind(layer, x * 1))
        for loss in losses:
            loss.sum().backward(retain_graph=True)
            loss.sum().backward(retain_graph=True)
        return seen

    record(lambda rank: [tap("h", torch.tensor([1.0])), tap("h", torch.tensor([4.0]))])
    got = []
    replay(lambda rank: got.extend(job(5.0)), strict=True)
    assert got == [1, 4, 1, 1, 4, 4]


@pytest.mark.parametrize("kind", [plain, frames, reentrant, as_megatron])
def test_the_backward_uses_what_was_grafted_at_the_end_of_a_checkpoint(record, replay, kind):
    # A checkpoint stops repeating once its last tensor is saved; exp saves its result.
    def job(rank):
        x = torch.tensor([job.x], requires_grad=True)
        y = kind(lambda x: tap("y", x.exp()), x)
        (y * 3).sum().backward()
        job.grad = x.grad.item()

    job.x = 0.0
    record(job)
    job.x = 5.0
    replay(job)
    assert job.grad == 3.0  # 3 exp(0), as without a checkpoint


def test_a_tap_in_a_backward_that_repeats_nothing_is_a_first(record):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return tap("custom", grad * 2)

    def recompute_fn(x):
        return tap("x", x * 1)

    def job(rank):
        for _ in range(2):
            x = torch.ones(2, requires_grad=True)
            h = recompute_fn(x)
            h.register_hook(lambda g: tap("hook", g * 1))
            y = frames(lambda h: Scale.apply(h), h)
            y.sum().backward()

    rows = record(job).rows()
    assert set(rows["tags"]) == {"{}"}
    assert rows.filter(name="custom")["occurrence"].to_list() == [0, 1]
    assert rows.filter(name="hook")["occurrence"].to_list() == [0, 1]
    assert rows.filter(name="x")["occurrence"].to_list() == [0, 1]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_tap_that_fires_only_where_gradients_are_wanted_is_counted_as_a_first(record, order):
    def layer(x):
        h = x * x
        if torch.is_grad_enabled():
            tap("h", h)
        return h.exp()

    def job(rank):
        losses = [
            reentrant(layer, torch.full((1,), float(b), requires_grad=True)) for b in range(3)
        ]
        for b in order:
            losses[b].sum().backward()

    rows = record(job).rows()
    assert set(rows["tags"]) == {"{}"} and rows["occurrence"].to_list() == [0, 1, 2]


@pytest.mark.parametrize("kind", [frames, reentrant])
def test_a_forward_before_the_session_is_not_guessed_at(run, kind, record, capsys):
    def forward(x):
        return kind(lambda x: tap("h", x * x).exp(), torch.full((1,), x, requires_grad=True))

    record(lambda rank: [tap("h", torch.tensor([1.0])), tap("h", torch.tensor([4.0]))])
    before = forward(0.5)
    with Replayer(run) as session:
        after = forward(1.0)
        before.sum().backward()
        after.sum().backward()
    log = session.log()
    assert log["outcome"].to_list() == ["grafted", "error", "grafted"]
    assert log["occurrence"].to_list()[::2] == [0, 0]
    assert log["message"][1] == (
        "it repeats a forward in which no tap of these tags was seen, so which record is its own "
        "cannot be told; begin the session before that forward"
    )
    assert session.problems()


@pytest.mark.parametrize("kind", [frames, reentrant])
def test_a_forward_that_fires_more_taps_when_it_is_repeated_is_not_guessed_at(
    record, replay, kind, capsys
):
    def job(rank):
        runs = iter((1, 2))

        def layer(x):
            for _ in range(next(runs)):
                x = tap("h", x * 1)
            return (x * x).exp()

        x = torch.ones(1, requires_grad=True)
        kind(layer, x).sum().backward()

    run = record(job)
    assert run.rows()["occurrence"].to_list() == [0, 0]
    assert (
        "is not recorded: the forward that it repeats fired fewer taps" in capsys.readouterr().err
    )
    (session,) = replay(job)
    assert outcomes(session) == ["grafted", "grafted", "error"]


def test_a_kind_that_tells_nothing_is_taken_in_order_and_that_is_noted(record, replay, capsys):
    def as_deepspeed_without_a_node(function, *args):
        kept, count = weakref.WeakKeyDictionary(), itertools.count()  # noqa: F841
        again = []

        def checkpoint_pack(x):
            return next(count)

        def checkpoint_unpack(i):
            if not again:
                hooks = torch.autograd.graph.saved_tensors_hooks(
                    lambda x: again.append(x.detach()) or x, lambda x: x
                )
                with torch.enable_grad(), hooks:
                    function(*args)
            return again[i]

        with torch.autograd.graph.saved_tensors_hooks(checkpoint_pack, checkpoint_unpack):
            return function(*args)

    base = Job(plain)
    record(base)
    target = Job(as_deepspeed_without_a_node, (0, 1, 2), shift=100.0)
    (session,) = replay(target)
    notes = session.log()["message"].to_list()
    assert notes[:12] == [""] * 12
    assert all("which cannot be told from this kind of checkpoint" in note for note in notes[12:])


@pytest.mark.parametrize(("filter", "seconds"), [("recompute", [1]), ("not recompute", [0])])
@pytest.mark.parametrize("kind", [frames, reentrant])
def test_a_filter_reads_which_forward_it_is(record, kind, filter, seconds):
    rows = record(Job(kind, (2, 0, 1)), filter=filter).rows()
    assert rows.height == 12 and rows["occurrence"].sort().to_list() == [*range(12)]
    assert rows["tags"].unique().to_list() == (["{}"] if seconds == [0] else ['{"recompute":true}'])


@pytest.mark.parametrize(
    ("filter", "firsts", "seconds"),
    [
        ("recompute and step == 1", [], [*range(12)]),
        ("recompute and kind != 'grad' and step >= 0", [], 2 * [*range(12)]),
        ("step == 1", [*range(12)], [*range(12)]),
    ],
)
@pytest.mark.parametrize("kind", [frames, reentrant])
def test_a_filter_that_is_asked_each_time_reads_which_forward_it_is(
    record, kind, filter, firsts, seconds
):
    rows = record(Job(kind, (2, 0, 1), steps=2), filter=filter).rows()
    by_forward = {
        tags: sorted(rows.filter(tags=tags)["occurrence"]) for tags in ("{}", '{"recompute":true}')
    }
    assert by_forward == {"{}": sorted(firsts), '{"recompute":true}': sorted(seconds)}


@pytest.mark.parametrize("kind", [frames, reentrant])
def test_a_forward_of_another_thread_is_found(record, replay, kind):
    def job(rank):
        def layer(x):
            h = tap("h", x * x)
            job.seen.append(h.item())
            return h.exp().log()

        job.seen, losses = [], []

        def forward():
            for batch in range(3):
                x = torch.full((1,), batch + 1 + job.shift, requires_grad=True)
                losses.append(kind(layer, x))

        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
        for loss in reversed(losses):
            loss.sum().backward()

    job.shift = 0.0
    record(job)
    job.shift = 50.0
    replay(job, strict=True)
    assert job.seen == [1, 4, 9, 9, 4, 1]


@pytest.mark.parametrize("kind", [plain, frames, reentrant, as_megatron])
def test_a_gradient_comes_once_whichever_forward_it_hangs_on(record, replay, kind, capsys):
    w = torch.nn.Parameter(torch.ones(2))

    def job(rank):
        def layer(x):
            v = tap("w", w, grad=True)
            h = tap("h", x * v, grad=True)
            return (h * h).exp()

        x = torch.tensor([job.x, 0.5], requires_grad=True)
        kind(layer, x).sum().backward()
        step()
        job.grad = x.grad.tolist()

    job.x = 1.0
    run = record(job)
    want = job.grad
    assert sorted(run.rows().filter(kind="grad")["name"]) == ["h", "w"]
    assert set(run.rows().filter(kind="grad")["occurrence"]) == {0}
    job.x = 1.5
    (session,) = replay(job)
    assert job.grad == want and set(outcomes(session)) == {"grafted"}
    assert capsys.readouterr().err == ""


def test_a_lazily_opened_replay_sees_the_first_forward_too(shell):
    shell.write(
        "job.py",
        """
        import torch
        from torch.utils.checkpoint import checkpoint
        from recorder import step, tap

        import os
        shift = 9.0 if "GRAFT_REPLAY" in os.environ else 0.0
        seen = []

        def layer(x):
            h = tap("h", x * x)
            seen.append(h.item())
            return h.exp().log()

        for use_reentrant in (True, False):
            losses = []
            for batch in range(2):
                x = torch.full((1,), batch + 1 + shift, requires_grad=True)
                losses.append(checkpoint(layer, x, use_reentrant=use_reentrant))
            for loss in losses:
                loss.sum().backward()
            step()
        print(seen)
        """,
    )
    done = shell(shell.graft, "record", "-o", "base", "--", shell.python, "job.py")
    assert done.returncode == 0, done.stderr
    again = shell(
        shell.graft, "replay", "base", "-o", "out", "--strict", "--", shell.python, "job.py"
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout == f"{[1.0, 4.0] * 4}\n"
    assert read_log(shell.folder / "out")["occurrence"].to_list() == [0, 1] * 4
    assert Recording.open(shell.folder / "base").rows().height == 8


@pytest.mark.skipif(HAS_HOOKS, reason="torch shows the hooks of a forward")
def test_frames_of_others_are_taken_in_order_where_torch_does_not_show_hooks(record, replay):
    record(Job(plain))
    (session,) = replay(Job(as_transformer_engine, (0, 1, 2), shift=100.0))
    notes = session.log()["message"].to_list()
    assert all("cannot be told from this kind of checkpoint" in note for note in notes[12:])


@pytest.mark.parametrize("kind", [frames, reentrant])
def test_threads_whose_idents_come_again_are_told_apart(record, replay, kind):
    """A thread of a micro-batch each, one after the other: each counts its autograd nodes anew."""

    def job(rank):
        def layer(x):
            h = tap("h", x * x)
            job.seen.append(h.item())
            return h.exp().log()

        job.seen, losses = [], []

        def forward(batch):
            x = torch.full((1,), batch + 1 + job.shift, requires_grad=True)
            losses.append(kind(layer, x))

        def train(batch):
            forward(batch)
            losses.pop().sum().backward()

        for batch in range(4):
            thread = threading.Thread(target=train, args=(batch,))
            thread.start()
            thread.join()

    job.shift = 0.0
    record(job)
    job.shift = 50.0
    replay(job, strict=True)
    assert job.seen == [1, 1, 4, 4, 9, 9, 16, 16]


def test_a_forward_of_one_of_several_threads_is_not_guessed_at(record, replay, capsys):
    def job(rank):
        losses = []

        def forward():
            x = torch.ones(1, requires_grad=True)
            losses.append(reentrant(lambda x: tap("h", x * x).exp(), x))

        for _ in range(2):
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join()
        losses[0].sum().backward()

    run = record(job)
    assert run.rows().height == 2
    err = capsys.readouterr().err
    assert "it repeats a forward of one of several threads, and which cannot be told; tag" in err
    (session,) = replay(job)
    assert outcomes(session) == ["grafted", "grafted", "error"]


class Tapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return tap("dh", grad * 1.0)


@pytest.mark.parametrize("kind", [frames, reentrant, as_megatron, plain])
@pytest.mark.parametrize("how", ["hook", "function"])
def test_a_tap_in_the_backward_of_a_repeated_forward_is_a_first_one(record, replay, kind, how):
    seen = []

    def job(rank, scale=0.3):
        w = torch.full((3,), scale, requires_grad=True)
        x = torch.ones(3, requires_grad=True)

        def tapped(h):
            if how == "function":
                return Tapped.apply(h)
            if h.requires_grad:
                h.register_hook(lambda grad: seen.append(tap("dh", grad.clone())[0].item()))
            return h

        def layer(x):
            return tapped(tap("h", x * w))

        h = kind(layer, x)
        h = tapped(kind(layer, h.sin()).cos())
        (h * h).sum().backward()
        step()

    rows = record(job).rows()
    hooks = rows.filter(name="dh")
    assert hooks["tags"].to_list() == ["{}"] * 3 and hooks["occurrence"].to_list() == [0, 1, 2]
    recorded, seen = seen, []
    (session,) = replay(functools.partial(job, scale=0.9), strict=True)
    assert set(outcomes(session)) == {"grafted"}
    assert seen == recorded


@pytest.mark.parametrize("kind", [frames, reentrant, as_megatron])
@pytest.mark.parametrize("number", [0, 1])
def test_a_filter_by_step_means_the_first_forward_s(record, replay, kind, number):
    """Whose backward may come in the next step."""
    seen = []

    def job(rank, scale=0.3):
        w = torch.full((3,), scale, requires_grad=True)

        def layer(x):
            h = tap("h", x * w)
            seen.append(round(h[0].item(), 3))
            return h.sin()

        def forward(value):
            return kind(layer, torch.full((3,), value, requires_grad=True))

        y = forward(1.0)
        step()
        y.sum().backward()
        y = forward(2.0)
        y.sum().backward()
        step()

    rows = record(job, filter=f"step == {number}").rows()
    assert rows.select("step", "occurrence", "tags").rows() == [
        (number, 0, "{}"), (number, 0, '{"recompute":true}'),
    ]  # fmt: skip
    record(job, overwrite=True)
    seen.clear()
    (session,) = replay(functools.partial(job, scale=0.9), filter=f"step == {number}")
    assert seen == ([0.3, 0.3, 1.8, 1.8] if number == 0 else [0.9, 0.9, 0.6, 0.6])
    assert outcomes(session) == ["grafted"] * 2
