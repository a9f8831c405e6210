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


@seen
def test_repeated_taps_have_the_tags_of_the_forward_that_they_repeat(run, capsys):
    with Recorder(run):
        for seed in range(2):
            train(seed)
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


@seen
@pytest.mark.parametrize("filter", [None, "layer == 1", 'name == "h" and layer == 0'])
def test_a_replay_grafts_onto_the_repetition_too(run, filter):
    with Recorder(run):
        wanted = train(0)
    with Replayer(run, filter=filter) as session:
        found = train(1)
    log = session.log()
    # Nobody keeps what a block computes last as it is repeated.
    assert set(outcomes(session)) <= {"grafted", "without effect"}
    first = log.filter(~log["tags"].str.contains("recompute"))
    assert log.height == 2 * first.height - (filter is None)
    if filter is None:
        torch.testing.assert_close(found, wanted)


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


def test_what_a_checkpoint_with_a_node_repeats_is_told(run, capsys):
    with Recorder(run):
        train(0, is_reentrant=True)
    rows = Recording.open(run).manifest()
    assert rows.height == 7
    assert "let the contexts that were around that forward be around" in capsys.readouterr().err
