"""Replaying checkpointed jobs: what a backward runs again gets the records of its first forward."""

from __future__ import annotations

import pytest
import torch
from checkpointing import (
    KINDS,
    ORDERS,
    Job,
    as_deepspeed_without_a_node,
    as_megatron,
    check,
    frames,
    plain,
    reentrant,
)
from tapping import outcomes

from recorder import tap
from replayer import Replayer


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
    base = Job(plain)
    record(base)
    target = Job(as_deepspeed_without_a_node, (0, 1, 2), shift=100.0)
    (session,) = replay(target)
    notes = session.log()["message"].to_list()
    assert notes[:12] == [""] * 12
    assert all("which cannot be told from this kind of checkpoint" in note for note in notes[12:])
