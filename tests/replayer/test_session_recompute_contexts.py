"""Checkpointed jobs whose backward runs outside of the blocks that were around the forward."""

from __future__ import annotations

import contextlib
import json
import threading

import pytest
import torch
from checkpointing import KINDS, as_deepspeed_without_a_node, as_megatron, frames, plain, reentrant
from tapping import outcomes

from recorder import Recorder, Recording, context, rows, tap
from recorder.taps import checkpoints
from replayer import Replayer


def around_backward(where, batch):
    """Return the blocks that a backward runs in."""
    if where == "left":
        return contextlib.nullcontext()
    return context(batch=7 if where == "others" else batch, layer=7)


class Job:
    """Two micro-batches through two checkpointed layers, told apart by contexts alone.

    Attributes:
        seen: (micro-batch, layer, part) and the value there after the tap, in order.
    """

    def __init__(self, kind, order=(1, 0), where="left", shift=0.0, inner=plain):
        self.kind, self.order, self.where, self.inner = kind, order, where, inner
        self.shift, self.seen = shift, []

    def __call__(self, rank):
        losses = []
        for batch in range(2):
            x = torch.full((2, 1), batch + 1.0 + self.shift, requires_grad=True)
            with context(batch=batch):
                for layer in range(2):
                    ids = [10 * batch + layer, 10 * batch + layer + 5]
                    with context(layer=layer), rows(t=ids):
                        x = self.kind(lambda x, at=(batch, layer): self.layer(*at, x), x)
                losses.append(x.sum())
        for batch in self.order:
            with around_backward(self.where, batch):
                losses[batch].backward()

    def layer(self, batch, layer, x):
        def part(x, at):
            h = tap("h", x * (2 + at + layer), dims="t h")
            self.seen.append(((batch, layer, at), h[0].item()))
            return h * h.sigmoid()

        with context(part=0):
            x = self.inner(lambda x: part(x, 0), x)
        return self.inner(lambda x: part(x, 1), x) / 100


def check(job, base):
    """Each tap of the job has the base's value, whichever forward it fires in."""
    want = dict(base.seen)
    assert len(want) == len(base.seen) == 8
    assert all(want[key] == value for key, value in job.seen)


def tags_of(recording, **about):
    taps = recording.rows().filter(kind="tensor", **about)
    return [json.loads(tags) for tags in taps["tags"]]


@pytest.mark.parametrize("where", ["left", "others", "its layer's"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_repeated_has_the_tags_and_rows_of_its_forward(record, kind, where):
    recording = record(Job(kind, where=where))
    taps = recording.rows().filter(kind="tensor")
    firsts, seconds = taps[:8], taps[8:]
    assert set(taps["occurrence"]) == {0}
    found = {}
    for row in firsts.iter_rows(named=True):
        found[row["tags"]] = row["digest"], row["rows"]
    assert len(found) == 8 and seconds.height == 8
    again = {}
    for row in seconds.iter_rows(named=True):
        tags = json.loads(row["tags"])
        assert tags.pop("recompute") is True
        again[json.dumps(tags, separators=(",", ":"))] = row["digest"], row["rows"]
    assert again == found


@pytest.mark.parametrize("where", ["left", "others"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_repeated_gets_the_records_of_its_forward(record, replay, kind, order, where):
    base = Job(plain)
    record(base)
    target = Job(kind, order, where, shift=100.0)
    (session,) = replay(target, strict=True)
    check(target, base)
    assert len(target.seen) == 16 and set(outcomes(session)) == {"grafted"}


NESTED = [(a, b) for a in ("frames", "reentrant", "megatron") for b in ("frames", "reentrant")]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("where", ["left", "others"])
@pytest.mark.parametrize(("outer", "inner"), NESTED)
def test_checkpoints_in_checkpoints_too(record, replay, outer, inner, where):
    base = Job(plain)
    record(base)
    target = Job(KINDS[outer], (1, 0), where, shift=100.0, inner=KINDS[inner])
    (session,) = replay(target, strict=True)
    check(target, base)
    assert len(target.seen) >= 16 and set(outcomes(session)) == {"grafted"}


@pytest.mark.parametrize("kind", [frames, reentrant, as_megatron])
def test_what_is_made_in_a_repetition_without_contexts_has_those_around_it(record, kind):
    def job(rank):
        def outer(x):
            return frames(lambda x: tap("h", x * 2).exp(), kind(lambda x: tap("h", x * 3), x))

        for layer in range(2):
            x = torch.ones(2, requires_grad=True)
            with context(layer=layer):
                y = reentrant(outer, x)
            y.sum().backward()

    taps = tags_of(record(job))
    assert [one["layer"] for one in taps] == [0] * (len(taps) // 2) + [1] * (len(taps) // 2)
    assert all("recompute" in one for one in taps[2 : len(taps) // 2])


@pytest.mark.parametrize("filter", ["layer == 1", "layer != 0", "layer == 1 and recompute"])
@pytest.mark.parametrize("kind", [frames, reentrant])
def test_a_filter_reads_the_tags_around_the_forward(record, kind, filter, capsys):
    def job(rank):
        for layer in (1, 0, 1):
            x = torch.ones(2, requires_grad=True)
            if layer == 0:
                tap("h", x, layer=0)
            with context(layer=layer):
                y = kind(lambda x: tap("h", x * 2).exp(), x)
            with context(layer=0):
                y.sum().backward()

    seen = tags_of(record(job, filter=filter))
    first, second = {"layer": 1}, {"layer": 1, "recompute": True}
    assert seen == ([second] * 2 if "recompute" in filter else [first, second] * 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", [frames, reentrant])
def test_a_tap_that_is_unwanted_outside_of_contexts_is_wanted_in_them_again(record, kind):
    def job(rank):
        x = torch.ones(2, requires_grad=True)
        with context(layer=1):
            y = kind(lambda x: tap("h", x * 2).exp(), x)
        tap("h", x)
        y.sum().backward()

    assert tags_of(record(job, filter="layer == 1")) == [
        {"layer": 1}, {"layer": 1, "recompute": True},
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [frames, reentrant])
def test_a_session_that_begins_in_a_context_knows_it(run, kind):
    x = torch.ones(2, requires_grad=True)
    with contextlib.ExitStack() as blocks:
        blocks.enter_context(context(layer=1))
        with Recorder(run):
            y = kind(lambda x: tap("h", x * 2).exp(), x)
            blocks.close()
            y.sum().backward()
    assert tags_of(Recording.open(run)) == [{"layer": 1}, {"layer": 1, "recompute": True}]


@pytest.mark.parametrize("kind", [frames, reentrant])
def test_what_was_missed_between_two_sessions_is_not_taken_for_what_holds(run, kind, tmp_path):
    def forward():
        return kind(lambda x: tap("h", x * 2).exp(), torch.ones(2, requires_grad=True))

    with Recorder(run), context(layer=0):
        tap("h", torch.ones(2))
    with context(layer=1):
        pass
    with Recorder(tmp_path / "again"):
        y = forward()
        y.sum().backward()
    assert tags_of(Recording.open(tmp_path / "again")) == [{}, {"recompute": True}]


@pytest.mark.parametrize("kind", [frames, reentrant, as_megatron])
def test_rows_around_the_backward_are_none_of_the_forward_s(record, kind):
    def job(rank):
        y = kind(lambda x: tap("h", x * 2, dims="t h").exp(), torch.ones(2, 1).requires_grad_())
        with rows(t=[8, 9]):
            y.sum().backward()

    taps = record(job).rows().filter(kind="tensor")
    assert taps["rows"].to_list() == [None, None] or set(taps["rows"]) == {""}


def test_a_forward_of_another_thread_s_contexts_is_found_or_not_guessed_at(record, capsys):
    def job(kind):
        losses = []

        def forward(layer):
            x = torch.ones(1, requires_grad=True)
            with context(layer=layer):
                losses.append(kind(lambda x: tap("h", x * 2).exp(), x))

        for layer in range(2):
            thread = threading.Thread(target=forward, args=(layer,))
            thread.start()
            thread.join()
        for loss in losses:
            loss.sum().backward()

    recording = record(lambda rank: job(frames))
    # By its node alone, which torch has up to 2.8, the thread cannot be told.
    is_told = checkpoints._top_hooks is None
    assert [one["layer"] for one in tags_of(recording)] == [0, 1] * (1 if is_told else 2)
    assert bool(capsys.readouterr().err) is is_told
    recording = record(lambda rank: job(reentrant), overwrite=True)
    assert tags_of(recording) == [{"layer": 0}, {"layer": 1}]
    assert "of one of several threads, and which cannot be told" in capsys.readouterr().err


@pytest.mark.parametrize("is_left", [True, False])
def test_a_kind_that_tells_nothing_is_refused_under_other_contexts(record, is_left, capsys):
    def job(rank):
        x = torch.ones(1, requires_grad=True)
        block = context(layer=0)
        with block:
            y = as_deepspeed_without_a_node(lambda x: tap("h", x * 2).exp(), x)
            if not is_left:
                y.sum().backward()
        if is_left:
            y.sum().backward()

    seen = tags_of(record(job))
    again = [] if is_left else [{"layer": 0, "recompute": True}]
    assert seen == [{"layer": 0}, *again]
    said = capsys.readouterr().err
    assert ("which contexts were around that cannot be told from this kind" in said) == is_left


@pytest.mark.parametrize("kind", [frames, reentrant])
def test_a_forward_before_the_session_is_not_guessed_at(run, kind, record):
    def forward():
        with context(layer=0):
            return kind(lambda x: tap("h", x * x).exp(), torch.ones(1, requires_grad=True))

    record(lambda rank: forward())
    before = forward()
    with Replayer(run) as session:
        after = forward()
        before.sum().backward()
        after.sum().backward()
    assert session.log()["outcome"].to_list() == ["grafted", "error", "grafted"]


@pytest.mark.slow
def test_a_session_that_the_first_tap_opens_knows_the_contexts_before_it(shell):
    shell.write(
        "job.py",
        """
        import torch
        from torch.utils.checkpoint import checkpoint
        from recorder import context, tap

        def block(x):
            with context(part=0):
                x = tap("h", x * x)
            return tap("h", x + 1).exp()

        for use_reentrant in (True, False):
            x = torch.ones(1, requires_grad=True)
            with context(layer=int(use_reentrant)):
                y = checkpoint(block, x, use_reentrant=use_reentrant)
            y.sum().backward()
        """,
    )
    done = shell(shell.graft, "record", "-o", "base", "--", shell.python, "job.py")
    assert done.returncode == 0, done.stderr
    want = [{"layer": layer, **part} for layer in (1, 0) for part in ({"part": 0}, {})]
    again = [{**tags, "recompute": True} for tags in want]
    assert tags_of(Recording.open(shell.folder / "base")) == [
        *want[:2], *again[:2], *want[2:], *again[2:],
    ]  # fmt: skip
