"""Repeated forwards whose context is left before the backward."""

from __future__ import annotations

import pytest
import torch
from tapping import outcomes
from torch.utils.checkpoint import checkpoint

from recorder import Recorder, Recording, context, step, tap
from recorder.taps import checkpoints
from replayer import Replayer

seen = pytest.mark.skipif(
    checkpoints._top_hooks is None, reason="torch shows the hooks of a forward from 2.7 on"
)


def block(x):
    with context(inner=1):
        h = tap("h", x.sin() * 1)
    h = tap("h", h * h)
    return tap("o", h * 1.5, own="o")


def train(seed=0, is_reentrant=False, blocks=2, **around):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    y = tap("h", x * 1.0)  # of no context
    for i in range(blocks):
        with context(layer=i, words=["a", i]):
            y = checkpoint(block, y, use_reentrant=is_reentrant)
    with context(**around):
        y.square().sum().backward()
    step()
    return x.grad


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_repeated_taps_have_the_tags_of_the_forward_that_they_repeat(run, capsys, is_reentrant):
    with Recorder(run):
        for seed in range(2):
            train(seed, is_reentrant)
    rows = Recording.open(run).manifest()
    is_again = rows["tags"].str.contains("recompute")
    first, again = rows.filter(~is_again), rows.filter(is_again)
    assert first.height == 14 and again.height >= 4  # it stops once what was saved is there
    what = ("name", "step", "occurrence", "digest")
    keys = {(*row, tags) for *row, tags in first.select(*what, "tags").rows()}
    told = {
        (*row, tags.replace('"recompute":true,', ""))
        for *row, tags in again.select(*what, "tags").rows()
    }
    assert told < keys and len(told) == again.height
    assert not capsys.readouterr().err.count("not recorded")


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_a_whole_replay_grafts_onto_the_repetition_too(run, is_reentrant):
    with Recorder(run):
        wanted = train(0, is_reentrant)
    with Replayer(run) as session:
        found = train(1, is_reentrant)
    assert set(outcomes(session)) <= {"grafted", "without effect"} and len(outcomes(session)) == 13
    torch.testing.assert_close(found, wanted)


@seen
@pytest.mark.parametrize("filter", ["layer == 1", 'name == "h" and layer == 0'])
def test_a_replay_grafts_onto_the_repetition_too(run, filter):
    with Recorder(run):
        train(0)
    with Replayer(run, filter=filter) as session:
        train(1)
    log = session.log()
    # Nobody keeps what a block computes last as it is repeated.
    assert set(outcomes(session)) <= {"grafted", "without effect"}
    first = log.filter(~log["tags"].str.contains("recompute"))
    assert log.height == 2 * first.height


@seen
def test_an_unwanted_tap_of_the_name_hides_no_repetition(run):
    with Recorder(run):
        train(0)
    with Replayer(run, filter='name == "h" and layer == 0') as session:
        with torch.no_grad():
            for _ in range(3):
                tap("h", torch.ones(3, 4))  # outside of any context, and not wanted
        train(1)
    assert outcomes(session) == ["grafted"] * 4


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_what_a_backward_s_own_context_hides_is_told(run, capsys, is_reentrant):
    with Recorder(run):
        train(0, is_reentrant, layer=7)
    rows = Recording.open(run).manifest()
    assert not rows["tags"].str.contains("recompute").any() and rows.height == 7
    assert "taps of this name had other tags" in capsys.readouterr().err


@pytest.mark.parametrize("filter", ["layer == 1", 'name == "h"'])
def test_what_a_checkpoint_with_a_node_repeats_is_told_under_a_filter(run, capsys, filter):
    """Nobody knows where those were that it left out, so whose tags are lacking cannot be told."""
    with Recorder(run):
        train(0, is_reentrant=True)
    with Replayer(run, filter=filter) as session:
        train(1, is_reentrant=True)
    log = session.log()
    assert not log.filter(log["tags"].str.contains("recompute"))["outcome"].is_in(["grafted"]).any()
    assert "taps of this name had other tags" in capsys.readouterr().err


def test_a_job_s_own_tags_at_a_tap_are_nobody_s_else(run):
    def part(x, i):
        return tap("h", x.sin() * 1, layer=i)

    def once(x):
        for i in range(3):
            x = checkpoint(part, x * 1.0, i, use_reentrant=True)
        x.sum().backward()

    with Recorder(run):
        once(torch.ones(2, requires_grad=True))
    with Replayer(run, filter="layer == 1") as session:
        once(torch.zeros(2, requires_grad=True))
    assert session.log().height == 2 and not session.reason
