"""Grafts onto what nobody keeps: said where it is so, and never where the tensor is seen."""

from __future__ import annotations

import asyncio
import functools
import gc
import weakref

import numpy as np
import pytest
import torch
from tapping import outcomes

from recorder import context, tap
from replayer import Replayer

kept: list = []


@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    kept.clear()


def wrapped(name, value, **tags):
    return tap(name, value, **tags)


def twice_wrapped(*args, **options):
    return wrapped(*args, **options)


class Module(torch.nn.Module):
    def forward(self, x):
        tap("h", x.double())
        return x


async def coroutine(x):
    tap("h", x.double())


def generator(x):
    tap("h", x.double())
    yield 1


def statement(x):
    tap("h", x.double())


def rows_of_a_cache(x):
    tap("h", x[torch.tensor([0, 2])])


def a_copying_reshape(x):
    tap("h", x.t().reshape(-1))


def a_mask(x):
    tap("h", x[x > 0])


def joined(x):
    tap("h", torch.cat([x, x]))


def in_a_context(x):
    with context(layer=1), torch.no_grad():
        tap("h", x.double())


def by_keyword(x):
    tap(name="h", value=x.double())


def by_words(x):
    tap(*("h", x.double()), **{"layer": 1})


def by_partial(x):
    functools.partial(tap, "h")(x.double())


def in_a_wrapper(x):
    wrapped("h", x.double())


def in_two_wrappers(x):
    twice_wrapped("h", x.double(), layer=1)


def in_a_branch(x):
    tap("h", x.double()) if x.numel() else None


def of_a_graph(x):
    tap("h", x.requires_grad_().double())


def with_its_gradient(x):
    tap("h", x.requires_grad_().double(), grad=True)


def in_a_module(x):
    Module()(x)


def in_a_coroutine(x):
    asyncio.run(coroutine(x))


def in_a_generator(x):
    list(generator(x))


def by_a_callable(x):
    tap("h", lambda: x.double())


def by_a_callable_of_which_the_result_is_kept(x):
    kept.append(tap("h", lambda: x.double()))


UNSEEN = [
    statement,
    rows_of_a_cache,
    a_copying_reshape,
    a_mask,
    joined,
    in_a_context,
    by_keyword,
    by_words,
    by_partial,
    in_a_wrapper,
    in_two_wrappers,
    in_a_branch,
    of_a_graph,
    with_its_gradient,
    in_a_module,
    in_a_coroutine,
    in_a_generator,
    by_a_callable,
    by_a_callable_of_which_the_result_is_kept,
]


@pytest.mark.parametrize("job", UNSEEN, ids=lambda job: job.__name__)
def test_a_graft_that_nobody_sees_is_without_effect(record, replay, job, capsys):
    record(lambda rank: job(torch.ones(3, 2)))
    capsys.readouterr()
    (session,) = replay(lambda rank: job(torch.full((3, 2), 2.0)))
    row = session.log().row(0, named=True)
    assert row["outcome"] == "without effect"
    assert "freed as soon as" in row["message"] and f"{__file__}:" in row["message"]
    assert session.summary().line() == "1 without effect"
    assert session.problems()[0].startswith(
        "nothing was grafted that anything could see, the first"
    )
    assert "was grafted without effect: nobody" in capsys.readouterr().err


def a_variable(x):
    tap("h", x)


def a_name_for_it(x):
    h = tap("h", x.double())
    return h + 1


def an_unused_name(x):
    h = tap("h", x.double())  # noqa: F841  # who knows what reads it


def a_view(x):
    tap("h", x[0])


def a_view_of_a_cache(x):
    tap("h", x.view(-1)[1:3])


def detached(x):
    tap("h", x.detach())


def a_cast_that_is_none(x):
    tap("h", x.float())


def in_a_list(x):
    kept.append(tap("h", x.double()))


def an_operand(x):
    kept.append((tap("h", x.double()) * 2).sum())


def an_argument(x):
    twice(tap("h", x.double()))


def twice(x):
    return x * 2


def in_a_comparison(x):
    _ = 0 < tap("h", x.double().sum()) < 5


def in_a_comparison_thrown_away(x):
    0 < tap("h", x.double().sum()) < 5  # noqa: B015


def in_a_condition(x):
    tap("h", x.double().sum()) and kept.append(1)


def a_method(x):
    tap("h", x.double()).mul_(2)


def kept_by_its_maker(x):
    def make():
        kept.append(x.double())
        return kept[-1]

    tap("h", make())


def kept_in_a_circle(x):
    def make():
        h = x.double()
        h.itself = h
        return h

    tap("h", make())


def saved_for_backward(x):
    def make():
        h = x.requires_grad_() * 2
        kept.append((h * h).sum())
        return h

    tap("h", make())


def an_output_saved_for_backward(x):
    def make():
        h = x.requires_grad_().exp()
        kept.append(h.sum())
        return h

    tap("h", make())


def viewed(x):
    def make():
        h = x.double()
        kept.append(h[0])
        return h

    tap("h", make())


def its_storage(x):
    def make():
        h = x.double()
        kept.append(h.untyped_storage())
        return h

    tap("h", make())


def as_an_array(x):
    def make():
        h = x.double()
        kept.append(h.numpy())
        return h

    tap("h", make())


def as_a_capsule(x):
    def make():
        h = x.double()
        kept.append(torch.utils.dlpack.to_dlpack(h))
        return h

    tap("h", make())


def of_an_array(x):
    kept.append(np.ones(6))
    tap("h", torch.from_numpy(kept[-1]))


def of_a_buffer(x):
    kept.append(bytearray(24))
    tap("h", torch.frombuffer(kept[-1], dtype=torch.float32))


def shared_with_other_processes(x):
    tap("h", x.double().share_memory_())


def handed_on(x):
    y = wrapped("h", x.double())
    return y * 2


def used_by_a_wrapper(x):
    def used(name, value):
        h = tap(name, value)
        kept.append(h * 2)
        return h

    used("h", x.double())


def used_beside_the_tap(x):
    def used(name, value):
        tap(name, value)
        kept.append(value * 2)

    used("h", x.double())


def what_a_module_returns(x):
    class Tapping(torch.nn.Module):
        def forward(self, x):
            return tap("h", x.double())

    kept.append(Tapping()(x))


def what_a_generator_yields(x):
    def yields():
        yield tap("h", x.double())

    kept.extend(yields())


def by_a_callable_that_hands_out_its_own(x):
    tap("h", lambda: x)


def by_a_callable_that_views(x):
    tap("h", lambda: x[1])


SEEN = [
    a_variable,
    a_name_for_it,
    an_unused_name,
    a_view,
    a_view_of_a_cache,
    detached,
    a_cast_that_is_none,
    in_a_list,
    an_operand,
    an_argument,
    in_a_comparison,
    in_a_comparison_thrown_away,
    in_a_condition,
    a_method,
    kept_by_its_maker,
    kept_in_a_circle,
    saved_for_backward,
    an_output_saved_for_backward,
    viewed,
    its_storage,
    as_an_array,
    as_a_capsule,
    of_an_array,
    of_a_buffer,
    shared_with_other_processes,
    handed_on,
    used_by_a_wrapper,
    used_beside_the_tap,
    what_a_module_returns,
    what_a_generator_yields,
    by_a_callable_that_hands_out_its_own,
    by_a_callable_that_views,
]


@pytest.mark.parametrize("job", SEEN, ids=lambda job: job.__name__)
def test_a_graft_that_may_be_seen_counts_as_one(record, replay, job, capsys):
    def three_times(x):
        for _ in range(3):  # what is freed later says nothing
            job(x.clone())
        kept.clear()
        gc.collect()

    record(lambda rank: three_times(torch.ones(3, 2)))
    capsys.readouterr()
    (session,) = replay(lambda rank: three_times(torch.full((3, 2), 2.0)), strict=True)
    assert outcomes(session) == ["grafted"] * 3
    assert capsys.readouterr().err == ""


def test_such_grafts_are_counted_apart(record, replay, run):
    def job(rank):
        x = torch.full((2,), 3.0)
        tap("kept", x)
        tap("kept", x.clone(), i=1)
        return x

    record(job)
    with Replayer(run) as session:
        job(0)
    assert session.summary().line() == "1 grafted, 1 without effect"
    assert session.problems() == []
    (problem,) = session.summary().problems(strict=True)
    assert problem.startswith("--strict: 1 graft had no effect, the first: kept i=1 step=0")


def test_the_log_on_disk_has_the_row_once(record, run, tmp_path):
    def job():
        tap("h", torch.ones(2))
        tap("h", torch.ones(2))

    record(lambda rank: job())
    with Replayer(run, out=tmp_path / "out") as session:
        job()
        assert session.log()["outcome"].to_list() == ["without effect"] * 2
    assert session.log()["outcome"].to_list() == ["without effect"] * 2
    assert session.log()["seq"].to_list() == [0, 1]


def test_nothing_is_kept_alive_for_it(record, replay):
    def job(rank):
        x = tap("h", torch.ones(2))
        job.gone = weakref.ref(x)

    record(job)
    replay(job)
    assert job.gone() is None


@pytest.mark.slow
def test_the_status_follows(shell):
    shell.write(
        "job.py",
        """
        import torch
        from recorder import tap

        cache, slots = torch.ones(8, 2), torch.tensor([1, 4])
        tap("cache", cache)
        tap("rows", cache[slots])
        """,
    )
    shell(shell.graft, "record", "-o", "base", "--", shell.python, "job.py")
    for options, status in (((), 0), (("--strict",), 3), (("--filter", 'name == "rows"'), 3)):
        done = shell(shell.graft, "replay", "base", *options, "--", shell.python, "job.py")
        assert done.returncode == status, done.stderr
        assert "1 without effect" in done.stderr


@pytest.mark.slow
def test_a_tensor_that_lives_to_the_very_end_says_nothing(shell):
    shell.write(
        "job.py",
        """
        import torch
        from recorder import tap

        h = torch.ones(3)
        tap("h", h)
        """,
    )
    shell(shell.graft, "record", "-o", "base", "--", shell.python, "job.py")
    done = shell(shell.graft, "replay", "base", "--", shell.python, "job.py")
    assert done.returncode == 0
    first, following = done.stderr.splitlines()
    assert first == "[graft] replay: 1 grafted" and following.startswith("[graft] next: ")
