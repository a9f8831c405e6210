"""The line in the user's code."""

from __future__ import annotations

import enum
import gc
import inspect
import threading
import weakref

import numpy as np
import pytest
import torch

from recorder import Recorder, Recording, context, step, tap
from recorder.errors import UsageError
from recorder.tags import OF_TAP


def test_returns_the_value_itself_and_never_calls_a_callable_while_inactive():
    h = torch.randn(3)
    assert tap("h", h, layer=1) is h
    called = []
    assert callable(tap("h", lambda: called.append(1)))
    step()
    with context(phase="prefill"):
        tap("h", object())
    assert called == []


def test_returns_the_value_itself_while_recording(run):
    h = torch.randn(3)
    with Recorder(run):
        assert tap("h", h) is h
        made = lambda: h * 2  # noqa: E731
        assert tap("twice", made) is made
    assert torch.equal(Recording.open(run).load(0, "twice"), h * 2)


def test_a_callable_is_called_only_if_the_tap_is_wanted_and_then_once(run):
    calls = []

    def make(name):
        calls.append(name)
        return torch.zeros(1)

    with Recorder(run, filter='name == "a"'):
        tap("a", lambda: make("a"))
        tap("b", lambda: make("b"))
    assert calls == ["a"]


def test_contexts_nest_the_inner_value_wins_and_the_call_wins_over_both(record):
    def job(rank):
        with context(phase="prefill", layer=0):
            tap("a", torch.zeros(1))
            with context(layer=1):
                tap("a", torch.zeros(1))
                tap("a", torch.zeros(1), layer=2)
        tap("a", torch.zeros(1))

    table = record(job).manifest()
    assert table["phase"].to_list() == ["prefill", "prefill", "prefill", None]
    assert table["layer"].to_list() == [0, 1, 2, None]


def test_a_context_refuses_what_no_tap_could_be_given_as_a_tag():
    assert {*inspect.signature(tap).parameters} - {"tags"} == OF_TAP
    for name in OF_TAP - {"rows"}:
        said = f"context adds tags, and '{name}' cannot be one, since a tap takes it as something"
        with pytest.raises(UsageError, match=f"{said} else; call the tag otherwise"):
            context(layer=1, **{name: 3})
    with pytest.raises(UsageError, match=r"'rows' cannot be one, .*; write with rows\(t=ids\)"):
        context(rows=3)


def test_context_is_a_decorator_that_may_recurse(record):
    @context(phase="decode")
    def inner(depth):
        tap("x", torch.zeros(1), depth=depth)
        if depth:
            inner(depth - 1)

    def job(rank):
        inner(2)
        tap("y", torch.zeros(1))

    assert record(job).manifest()["phase"].to_list() == ["decode"] * 3 + [None]


def test_steps_count_from_0_and_occurrences_start_over_with_each(record):
    def job(rank):
        for _ in range(2):
            for _ in range(3):
                tap("x", torch.zeros(1))
            tap("x", torch.zeros(1), layer=0)
            step()

    table = record(job).manifest()
    assert table["step"].to_list() == [0] * 4 + [1] * 4
    assert table["occurrence"].to_list() == [0, 1, 2, 0] * 2
    assert table["seq"].to_list() == list(range(8))


def test_scalars_strings_and_flat_lists_become_value_rows(record):
    def job(rank):
        tap("lr", 0.1)
        tap("n", 3)
        tap("ok", True)
        tap("prompt", "héllo")
        tap("lens", [3, 5])
        tap("empty", ())

    run = record(job)
    assert run.manifest()["kind"].to_list() == ["value"] * 6
    assert run.value(0, "lr") == 0.1
    assert run.value(0, "ok") is True
    assert run.value(0, "prompt") == "héllo"
    assert run.value(0, "lens") == [3, 5]
    assert run.value(0, "empty") == []
    row = run.rows().row(0, named=True)
    assert row["value"] == "0.1" and row["nbytes"] == 3 and len(row["digest"]) == 32


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "it is a NoneType"),
        ({"a": 1}, "it is a dict"),
        ([[1]], "it is a list holding a list"),
        ((torch.zeros(1),), "it is a tuple holding a Tensor"),
    ],
)
def test_anything_else_is_warned_about_once_with_its_call_site(record, capsys, value, what):
    def job(rank):
        for _ in range(3):
            tap("odd", value)
        tap("fine", 1)

    assert record(job).manifest()["name"].to_list() == ["fine"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("[graft rank=0 step=0] tap 'odd' at ")
    assert "test_tap.py:" in lines[0] and what in lines[0]


def test_a_callable_that_raises_is_said_and_the_job_goes_on(record, capsys):
    def job(rank):
        tap("x", lambda: 1 / 0)
        tap("y", 1)

    assert record(job).manifest()["name"].to_list() == ["y"]
    assert "its callable raised ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tags", "what"),
    [
        ({"layer": object()}, "the tag 'layer' is a object; tags are strings, numbers"),
        ({"step": 3}, "the tag 'step' has a meaning of its own"),
        ({"x": float("nan")}, "is not a finite number"),
        ({"x": "\ud800"}, "not valid Unicode"),
    ],
)
def test_a_tag_that_cannot_be_part_of_a_key_is_refused_with_a_reason(record, capsys, tags, what):
    def job(rank):
        tap("x", 1, **tags)
        tap("y", 1)

    assert record(job).manifest()["name"].to_list() == ["y"]
    assert what in capsys.readouterr().err


def test_equal_looking_tags_of_different_types_are_different_keys(record):
    def job(rank):
        for layer in (1, True, 1.0, "1", None, 0.0, -0.0):
            tap("x", 1, layer=layer)

    table = record(job).rows()
    assert table["tags"].to_list() == [
        '{"layer":1}',
        '{"layer":true}',
        '{"layer":1.0}',
        '{"layer":"1"}',
        '{"layer":null}',
        '{"layer":0.0}',
        '{"layer":0.0}',
    ]
    assert table["occurrence"].to_list() == [0] * 6 + [1]


def test_tags_that_are_integers_in_disguise_are_integers(record):
    def job(rank):
        tap("x", 1, layer=torch.tensor(3))
        tap("x", 1, layer=(1, 2))

    assert record(job).rows()["tags"].to_list() == ['{"layer":3}', '{"layer":[1,2]}']


class Phase(enum.Enum):
    PREFILL = "prefill"
    SPAN = (1, 2)


class Level(enum.IntEnum):
    TOP = 3


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (np.bool_(True), "true"),
        (np.float32(0.5), "0.5"),
        (np.float64(0.5), "0.5"),
        (np.float16(2), "2.0"),
        (np.int8(3), "3"),
        (np.str_("a"), '"a"'),
        (np.array(0.5), "0.5"),
        (torch.tensor(0.5), "0.5"),
        (torch.tensor(True), "true"),
        (torch.tensor(0.5).bfloat16(), "0.5"),
        (Phase.PREFILL, '"prefill"'),
        (Phase.SPAN, "[1,2]"),
        (Level.TOP, "3"),
        (torch.bfloat16, '"bfloat16"'),
        (np.dtype("float32"), '"float32"'),
        ([np.bool_(False), torch.float16], '[false,"float16"]'),
    ],
    ids=repr,
)
def test_tags_are_what_they_hold(record, value, held):
    run = record(lambda rank: tap("x", 1, on=value))
    assert run.rows()["tags"].to_list() == [f'{{"on":{held}}}']
    assert run.find(0, "x", on=value, kind="value")["value"] == "1"


def test_they_are_one_key_with_the_plain_ones(record):
    def job(rank):
        for value in (True, np.bool_(True)):
            tap("b", 1, on=value)
        for value in (0.5, np.float32(0.5), torch.tensor(0.5)):
            tap("f", 1, on=value)

    assert record(job).rows()["occurrence"].to_list() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.float32("nan"), "not a finite number"),
        (np.ones(2), "the tag 'on' is a ndarray; tags are strings"),
        (np.datetime64("2020-01-01"), "the tag 'on' is a datetime64; tags are"),
        (np.complex64(1), "the tag 'on' is a complex64; tags are"),
        (torch.ones(2), "the tag 'on' is a Tensor; tags are"),
        (enum.Enum("Odd", {"A": object()}).A, "the tag 'on' is a object; tags are"),
        (torch.device("cpu"), "the tag 'on' is a device; tags are"),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_others_are_named_by_their_type(record, capsys, value, named):
    assert record(lambda rank: tap("x", 1, on=value)).rows().height == 0
    assert named in capsys.readouterr().err


def test_contexts_left_in_another_order_are_said_once(record, capsys):
    def reads(number):
        with context(reader=number):
            yield
            tap("x", 1)
            yield

    def in_turn():
        one, other = reads(0), reads(1)
        for reader in (one, other, one, one, other, other):
            next(reader, None)

    def job(rank):
        in_turn()
        in_turn()

    record(job)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[graft] a context is left at ") and __file__ in line
    assert line.endswith(
        "while one that was entered later is not, as by generators that are read in turn, so taps "
        "in between have each other's tags; give these at the taps, or make context a decorator of "
        "the generators"
    )


def test_contexts_left_in_order_are_not(record, capsys):
    @context(reader=1)
    def decorated():
        yield
        tap("x", 1)
        yield

    def job(rank):
        shared = context(a=1)
        with shared, shared, context(b=2):
            tap("x", 1)
        one, other = decorated(), decorated()
        for reader in (one, other, one, one, other, other):
            next(reader, None)
        with pytest.raises(ZeroDivisionError), context(a=1), context(b=2):
            1 / 0  # noqa: B018

    record(job)
    assert capsys.readouterr().err == ""


def test_recompute_is_recorded_but_not_part_of_the_key(record):
    def job(rank):
        tap("x", torch.zeros(1), layer=0)
        with context(recompute=True):
            tap("x", torch.ones(1), layer=0)

    run = record(job)
    assert run.rows()["occurrence"].to_list() == [0, 0]
    assert run.load(0, "x", layer=0).item() == 0  # the first forward's


def test_extras_take_small_tensors_and_say_what_json_cannot_hold(record, capsys):
    def job(rank):
        tap("x", torch.zeros(1), extras={"lens": torch.tensor([1, 2]), "bad": object()})

    assert record(job).rows()["extras"].to_list() == ['{"lens":[1,2]}']
    assert "extras['bad'] is a object, which JSON cannot hold" in capsys.readouterr().err


def test_context_decorates_coroutines_and_generators_and_can_be_shared(record):
    shared = context(phase="p")

    @shared
    async def coroutine():
        tap("coroutine", 1)

    @shared
    def generator():
        tap("first", 1)
        got = yield 1
        tap("second", got)

    def job(rank):
        import asyncio

        asyncio.run(coroutine())
        items = generator()
        next(items)
        tap("between", 1)
        with pytest.raises(StopIteration):
            items.send(2)
        with shared, shared:
            pass
        tap("after", 1)

    table = record(job).manifest()
    assert dict(table.select("name", "phase").rows()) == {
        "coroutine": "p",
        "first": "p",
        "between": None,
        "second": "p",
        "after": None,
    }
    with pytest.raises(TypeError, match="async generator"):

        @shared
        async def asynchronous():
            yield


def test_one_context_may_be_entered_by_two_threads_at_a_time(record):
    shared = context(phase="p")

    def job(rank):
        both = threading.Barrier(2)

        def worker(i):
            with shared:
                both.wait(10)
                tap("x", i, i=i)
            both.wait(10)

        threads = [threading.Thread(target=worker, args=(i,)) for i in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]

    assert record(job).manifest()["phase"].to_list() == ["p", "p"]


def test_a_tag_that_changes_in_place_is_read_each_time(record):
    def job(rank):
        at = torch.tensor(0)
        for _ in range(3):
            tap("x", 1, at=at, pair=(1, at))
            at += 1

    assert record(job).rows()["tags"].to_list() == [
        f'{{"at":{i},"pair":[1,{i}]}}' for i in range(3)
    ]


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("arguments", "tags", "what"),
    [
        ((Unprintable(), 1), {}, "its name is a Unprintable"),
        (("x", 1), {"big": 10**30}, "more than 64 bits"),
        (("x", 10**5000), {}, "Exceeds the limit"),
        (("x", torch.zeros(1)), {"dims": 5}, "its dims are a int"),
        (("x", torch.zeros(1)), {"dims": "\ud800"}, "not valid Unicode"),
        (("x", torch.zeros(1)), {"extras": [1]}, "extras is a list, expected a dict"),
        (("x", torch.nn.parameter.UninitializedParameter()), {}, "is not recorded"),
        (("x", 1), {"\ud800": 1}, "not valid Unicode"),
    ],
)
def test_one_odd_tap_costs_that_tap_alone(record, capsys, arguments, tags, what):
    def job(rank):
        tap(*arguments, **tags)
        tap("next", 1)

    assert record(job).manifest()["name"].to_list()[-1] == "next"
    assert what in capsys.readouterr().err


@pytest.mark.thorough
def test_a_real_tensor_inside_fake_tensor_mode_is_recorded(record):
    from torch._subclasses.fake_tensor import FakeTensorMode

    t = torch.arange(3.0)

    def job(rank):
        with FakeTensorMode(allow_non_fake_inputs=True):
            tap("x", t)

    assert torch.equal(record(job).load(0, "x"), t)


def test_tied_and_pipelined_parameters_get_their_gradients_in_line_and_are_told_so(record, capsys):
    w = torch.nn.Parameter(torch.ones(1))

    def job(rank):
        losses = []
        for mb in range(2):  # 1F1B: both forwards, then both backwards
            tap("w", w, grad=True, mb=mb)
            losses.append((w * (mb + 1)).sum())
        for loss in losses:
            loss.backward()
        step()
        tap("emb", w, grad=True)  # two names of one tensor: both get its gradient
        tap("head", w, grad=True)
        (w * 5).sum().backward()

    run = record(job)
    assert [run.load(0, "w", mb=mb, kind="grad").item() for mb in range(2)] == [1, 2]
    assert [run.load(0, n, step=1, kind="grad").item() for n in ("emb", "head")] == [5, 5]
    assert "get them first in, first out" in capsys.readouterr().err


def test_gradients_are_recorded_under_the_step_of_their_tap(record):
    w = torch.nn.Parameter(torch.ones(2))

    def job(rank):
        for scale in (1.0, 2.0):
            tap("w", w, grad=True)
            h = tap("h", w * scale, grad=True)
            (h * 3).sum().backward()
            step()

    run = record(job)
    table = run.manifest()
    assert table["kind"].to_list() == ["tensor", "tensor", "grad", "grad"] * 2
    assert table["step"].to_list() == [0] * 4 + [1] * 4
    assert torch.equal(run.load(0, "h", step=1, kind="grad"), torch.full((2,), 3.0))
    assert torch.equal(run.load(0, "w", step=1, kind="grad"), torch.full((2,), 6.0))


def test_a_forward_without_backward_leaves_no_hook_to_misfire(record, capsys):
    w = torch.nn.Parameter(torch.ones(2))

    def job(rank):
        with torch.no_grad():
            tap("w", w, grad=True)  # an evaluation: nobody expects a backward
        tap("w", w, grad=True)  # this one's never comes
        step()
        tap("w", w, grad=True)
        (w * 2).sum().backward()

    table = record(job).manifest().filter(kind="grad")
    assert table.select("step", "occurrence").rows() == [(1, 0)]
    assert capsys.readouterr().err.count("its gradient never came in the step of the tap") == 1


def test_a_tapped_activation_is_let_go_of(record):
    alive = []

    def job(rank):
        for _ in range(5):
            h = tap("h", torch.ones(4, requires_grad=True) * 2, grad=True)
            alive.append(weakref.ref(h))
            if len(alive) % 2:
                h.sum().backward()
            del h

    record(job)
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5


def test_a_filter_on_kind_calls_no_callable_that_the_rest_of_it_rejects(run):
    called = []

    def make(name):
        called.append(name)
        return torch.ones(1)

    with Recorder(run, filter='name == "x" and kind == "tensor"'):
        tap("x", lambda: make("x"))
        tap("y", lambda: make("y"))
    assert called == ["x"]


def in_threads(*functions, overlapping=True):
    """Run functions one after the other, in threads that live on beside one another, or do not."""
    end = threading.Event()
    threads = []
    for function in functions:
        done = threading.Event()

        def run(function=function, done=done):
            function()
            done.set()
            if overlapping:
                end.wait(30)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        done.wait(30)
        if not overlapping:
            threads[-1].join()
    end.set()
    for thread in threads:
        thread.join()


def test_threads_that_tap_one_key_are_told_once_what_to_tag(record, capsys):
    """As dual batch overlap does, whose two halves share every tag."""

    def forward(*tags):
        for i in range(3):
            tap("h", torch.ones(1), **dict(tags))
            tap("own", torch.ones(1), thread=threading.get_ident(), i=i)

    def job(rank):
        in_threads(forward, forward)
        step()
        in_threads(forward, forward)

    run = record(job)
    assert run.rows().filter(name="h", step=1)["occurrence"].to_list() == [*range(6)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[graft rank=0 step=0] tap 'h' at ") and line.endswith(
        ": several threads tap it in one step, so which firing is which occurrence is by chance; "
        "tag them apart, as in context(micro_batch=i)"
    )


def test_threads_that_share_no_key_at_a_time_are_left_alone(record, capsys):
    def forward():
        tap("h", torch.ones(1))

    def job(rank):
        for _ in range(2):
            in_threads(forward)
            step()
        in_threads(forward, forward, forward, overlapping=False)
        step()
        in_threads(*(lambda i=i: tap("h", torch.ones(1), micro_batch=i) for i in range(2)))

    record(job)
    assert capsys.readouterr().err == ""


def test_a_replay_notes_it_too(record, replay, capsys):
    kept = torch.ones(1)

    def job(rank):
        in_threads(lambda: tap("h", kept), lambda: tap("h", kept))

    record(job)
    capsys.readouterr()
    (session,) = replay(job)
    messages = session.log()["message"].to_list()
    assert messages[0] == "" and "which occurrence is by chance" in messages[1]
    assert capsys.readouterr().err.count("by chance") == 1
