"""Checkpointed jobs: filters, threads, sessions that begin late, and taps in backwards."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from checkpointing import (
    HAS_HOOKS,
    Job,
    as_megatron,
    as_transformer_engine,
    frames,
    plain,
    reentrant,
)
from tapping import outcomes

from recorder import Recording, step, tap
from replayer.log import read_log


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


@pytest.mark.slow
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
