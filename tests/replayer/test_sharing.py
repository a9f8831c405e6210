"""Two grafts onto one memory in a step: the second names the first, where they contradict."""

from __future__ import annotations

import gc

import pytest
import torch
from tapping import outcomes

from recorder import step, tap
from replayer.sharing import Sharing


def contradiction(session):
    return [message for message in session.log()["message"] if "in one memory" in message]


def base(**values):
    def job(rank):
        for name, value in values.items():
            tap(name, value)

    return job


def test_tied_weights_with_other_values_are_said(record, replay, capsys):
    record(base(embed=torch.ones(4, 2), head=torch.full((4, 2), 2.0)))
    w = torch.nn.Parameter(torch.zeros(4, 2))

    def job(rank):
        tap("embed", w)
        tap("head", w)

    (session,) = replay(job)
    assert outcomes(session) == ["grafted"] * 2
    assert session.log()["message"].to_list() == [
        "",
        "it changes what tap embed step=0 occurrence=0 was given in this step: both lie in one "
        "memory (tied weights, or views of one tensor), with other values; graft one of them",
    ]
    assert (
        capsys.readouterr().err.count("tap head step=0 occurrence=0 was grafted: it changes") == 1
    )


def test_nan_among_the_values_hides_nothing(record, replay):
    nan = torch.tensor([1.0, float("nan")])
    record(base(embed=nan, head=torch.tensor([2.0, 2.0])))
    w = torch.zeros(2)

    def job(rank):
        tap("embed", w)
        tap("head", w)

    (session,) = replay(job)
    assert "it changes what tap embed" in session.log()["message"][1]


OVERLAPS = {
    "a view": lambda x: (x, x[1]),
    "another view": lambda x: (x[1], x),
    "its transposition": lambda x: (x, x.t()),
    "some of its columns": lambda x: (x[:, 1:3], x[:, 2:4]),
    "other strides": lambda x: (x[::2], x[:, ::3]),
    "its elements as others": lambda x: (x, x.view(torch.int32)),
    "detached": lambda x: (x, x.detach()),
}


@pytest.mark.parametrize("views", OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize("inference", [False, True])
def test_views_that_meet_are_said(record, replay, views, inference, capsys):
    with torch.inference_mode(inference):
        one, other = views(torch.zeros(6, 6))
        record(base(one=torch.ones_like(one), other=torch.full_like(other, 7)))

        def job(rank):
            kept = views(torch.zeros(6, 6))
            tap("one", kept[0])
            tap("other", kept[1])

        (session,) = replay(job)
    assert outcomes(session) == ["grafted"] * 2
    assert len(contradiction(session)) == 1


APART = {
    "columns of a fused matrix": lambda x: (x[:, :2], x[:, 2:4]),
    "every other row": lambda x: (x[::2], x[1::2]),
    "halves": lambda x: (x[:3], x[3:]),
    "chunks": lambda x: x.chunk(3, dim=1)[:2],
}


@pytest.mark.parametrize("views", APART.values(), ids=APART)
def test_views_that_lie_side_by_side_are_not(record, replay, views, capsys):
    one, other = views(torch.zeros(6, 6))
    record(base(one=torch.ones_like(one), other=torch.full_like(other, 7)))

    def job(rank):
        kept = views(torch.zeros(6, 6))
        tap("one", kept[0])
        tap("other", kept[1])

    (session,) = replay(job)
    assert contradiction(session) == [] and capsys.readouterr().err == ""


def test_equal_values_do_not_contradict(record, replay):
    record(base(embed=torch.ones(4, 2), head=torch.ones(4, 2)))
    w = torch.nn.Parameter(torch.zeros(4, 2))
    (session,) = replay(lambda rank: [tap("embed", w), tap("head", w)])
    assert contradiction(session) == []


def test_what_the_job_wrote_in_between_is_its_own(record, replay):
    """A residual stream in place, and a kernel's buffer that autograd hears nothing of."""
    record(base(**{f"h{i}": torch.full((8,), float(i)) for i in range(3)}))

    def job(rank):
        h = torch.zeros(8)
        tap("h0", h)
        h += 1
        tap("h1", h)
        h.data.copy_(torch.full((8,), 9.0))
        tap("h2", h)

    (session,) = replay(job)
    assert contradiction(session) == []


def test_a_cache_that_the_job_fills_slot_by_slot_is_its_own(record, replay):
    def job(rank, first=0.0):
        cache = torch.zeros(64, 8)
        for t in range(10, 20):
            cache[t] = first + t
            tap("k_cache", cache)
            tap("slot", cache[t])

    record(job)
    (session,) = replay(lambda rank: job(rank, 5.0))
    assert session.log()["message"].to_list() == [""] * 20


@pytest.mark.parametrize("alias", [lambda w: w.detach(), lambda w: w.data, lambda w: w])
def test_an_alias_is_tied_however_torch_counts_its_writes(record, replay, alias):
    record(base(a=torch.ones(4), b=torch.ones(4), c=torch.full((4,), 2.0)))
    w = torch.zeros(4)

    def job(rank):
        tap("a", w)
        other = alias(w)
        tap("b", other)
        tap("c", other)

    (session,) = replay(job)
    assert [bool(message) for message in session.log()["message"]] == [False, False, True]


def test_another_step_is_another_matter(record, replay):
    def job(fill):
        def run(rank):
            for number in range(2):
                run.w.data.fill_(fill + number if fill else run.w[0])
                tap("w", run.w)
                step()

        run.w = torch.zeros(4)
        return run

    record(job(5.0))
    (session,) = replay(job(0))
    assert contradiction(session) == []


def test_memory_that_is_used_again_is_not_the_same():
    sharing = Sharing()
    places = set()
    for i in range(200):
        t = torch.zeros(1000)
        places.add(t.data_ptr())
        assert sharing.overwrite(t, torch.full((1000,), float(i)), f"h i={i}") == ""
        del t
        gc.collect(0)
    assert len(places) < 200  # memory was used again


def test_a_cache_that_sees_no_end_of_grafts_is_not_remembered_for_good():
    sharing, cache = Sharing(), torch.zeros(1000, 4)
    for slot in range(1000):
        assert sharing.overwrite(cache[slot], torch.ones(4), f"kv slot={slot}") == ""
    (storage,) = sharing._storages.values()
    assert len(storage.written) == 64
    for _ in range(1000):
        sharing.overwrite(cache, torch.ones(1000, 4), "cache")
    assert len(storage.written) == 64
    assert "what tap cache was given" in sharing.overwrite(cache, torch.zeros(1000, 4), "again")
