"""How pairs are measured side by side: the bound of memory, rows, and ranks that share the work."""

from __future__ import annotations

import queue
import threading
from contextlib import ExitStack

import pytest
import torch

from recorder.errors import GraftError, UsageError
from recorder.ranks import Rank
from replayer.diffing.spread import ALONE, gathered, share
from replayer.diffing.work import Task, _Room
from replayer.measuring import by
from replayer.measuring.by import measure_rows
from replayer.measuring.measures import measure

LONG = 30  # seconds; no test that passes waits so long


# The bound of memory


class Told(threading.Condition):
    """A condition that tells when somebody has to wait for it."""

    def __init__(self, tell):
        super().__init__()
        self.tell = tell

    def wait(self, timeout=None):
        self.tell("waits")
        return super().wait(LONG)


@pytest.fixture
def room():
    """Room for 10 bytes; `room.enter(n)` says whether a thread `waits` for n of them or is `in`."""
    made, said = _Room(10), queue.Queue()
    made._changed = Told(said.put)
    go = threading.Event()
    threads = []

    def inside(nbytes):
        with made.of(nbytes):
            said.put("in")
            assert go.wait(LONG)

    def enter(nbytes):
        threads.append(threading.Thread(target=inside, args=(nbytes,), daemon=True))
        threads[-1].start()
        return said.get(timeout=LONG)

    made.enter, made.next = enter, lambda: said.get(timeout=LONG)
    yield made
    go.set()
    for thread in threads:
        thread.join(LONG)


def test_what_fits_together_is_let_in_together(room):
    assert [room.enter(4), room.enter(6), room.enter(0)] == ["in"] * 3


def test_what_does_not_fit_waits_until_there_is_room(room):
    with room.of(5):
        assert room.enter(6) == "waits"
    assert room.next() == "in"


def test_more_than_all_the_room_goes_alone(room):
    with room.of(1):
        assert room.enter(11) == "waits"
    assert room.next() == "in"
    assert room.enter(1) == "waits"


def test_all_that_wait_are_let_in_when_there_is_room_for_all(room):
    with room.of(10):
        assert [room.enter(3), room.enter(3)] == ["waits"] * 2
    assert [room.next(), room.next()] == ["in"] * 2


def test_a_failure_gives_its_room_back(room):
    with pytest.raises(ZeroDivisionError), room.of(10):
        _ = 1 / 0
    assert room.enter(10) == "in"


# Rows


def rows_of(n, m):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, m, generator=generator, dtype=torch.float64)
    b = a + torch.randn(n, m, generator=generator, dtype=torch.float64) * 1e-7
    b[0] = a[0]
    b[1, 3], b[1, m - 1] = float("nan"), float("inf")
    b[2, 0] += 5.0  # the greatest, in the first part of a row
    b[3, m - 1] -= 5.0  # and in the last
    return a, b


@pytest.mark.parametrize("part", [1, 7, 8, 20, 1000])
def test_rows_longer_than_a_part_have_the_figures_of_whole_rows(monkeypatch, part):
    a, b = rows_of(5, 20)
    monkeypatch.setattr(by, "_ELEMENTS", part)
    found = measure_rows(a, b, (0,), 1e-7, 1e-7)
    for i in range(5):
        whole = vars(measure(a[i], b[i]))
        for name, values in found.items():
            assert values[i] == pytest.approx(whole[name], rel=1e-9), (i, name)


def test_rows_of_dims_in_the_middle_are_those_of_the_index(monkeypatch):
    monkeypatch.setattr(by, "_ELEMENTS", 5)
    a = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[:, 2] += 1
    assert measure_rows(a, b, (1,), 0.0, 0.0)["changed"] == [0, 0, 15, 0]


def test_rows_of_long_integers_tell_apart_what_float64_does_not_hold():
    a = torch.tensor([[2**53, 1], [2**53, 1]])
    b = torch.tensor([[2**53 + 1, 1], [2**53, 1]])
    found = measure_rows(a, b, (0,), 0.0, 0.0)
    assert (found["changed"], found["mismatched"]) == ([1, 0], [1, 0])


# Ranks that share the work


def tasks(*sizes):
    return [Task(i, "rank", ({"nbytes": n},), ({"nbytes": n},)) for i, n in enumerate(sizes)]


def shared(of, world):
    return [share(of, Rank(rank, world, "")) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 50])
def test_each_pair_goes_to_exactly_one_rank_in_order(world):
    of = tasks(*([1 << 20] * 7), 0, *range(0, 40 << 20, 2 << 20))
    parts = shared(of, world)
    assert all([t.pair for t in part] == sorted(t.pair for t in part) for part in parts)
    assert sorted(task.pair for part in parts for task in part) == [task.pair for task in of]


def test_ranks_get_nearly_as_many_bytes_each():
    of = tasks(*(n << 20 for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)))
    loads = [sum(task.nbytes for task in part) for part in shared(of, 4)]
    assert max(loads) <= 1.1 * sum(loads) / 4


def test_a_pair_of_more_than_all_others_goes_alone():
    parts = shared(tasks(10 << 20, *([1 << 20] * 6), 100 << 20), 2)
    assert [[task.pair for task in part] for part in parts] == [[7], [0, 1, 2, 3, 4, 5, 6]]


def test_pairs_without_bytes_are_spread_too():
    assert [len(part) for part in shared(tasks(*[0] * 8), 4)] == [2] * 4


@pytest.fixture
def everyone(monkeypatch):
    """Have rank 0 gather what it is told that the ranks sent."""

    def everyone(*sent):
        monkeypatch.setattr("replayer.diffing.spread._to_rank_0", lambda mine, rank: [mine, *sent])
        return Rank(0, 1 + len(sent), "")

    return everyone


def test_rows_of_all_ranks_come_together(everyone):
    rank = everyone(([{"pair": 1}], None, "same"), ([], None, "same"))
    assert gathered([{"pair": 0}], None, "same", rank) == [{"pair": 0}, {"pair": 1}]


def test_ranks_that_see_other_recordings_are_refused(everyone):
    rank = everyone(([], None, "same"), ([], None, "other"))
    with pytest.raises(UsageError, match="the ranks do not see the same recordings"):
        gathered([], None, "same", rank)


def test_a_problem_names_its_rank(everyone):
    with pytest.raises(GraftError, match="^on rank 1: no memory$"):
        gathered([], None, "same", everyone(([], "no memory", "same")))
    with pytest.raises(GraftError, match="^no disk$"):
        gathered([], GraftError("no disk"), "same", everyone(([], "no memory", "same")))


def test_other_ranks_have_no_rows(monkeypatch):
    sent = []
    monkeypatch.setattr("replayer.diffing.spread._to_rank_0", lambda mine, rank: sent.append(mine))
    assert gathered([{"pair": 1}], None, "same", Rank(1, 2, "")) is None
    assert sent == [[[{"pair": 1}], None, "same"]]


def test_a_rank_alone_gathers_nothing():
    with ExitStack() as stack:
        assert gathered([{"pair": 1}], None, "", ALONE) == [{"pair": 1}]
        stack.enter_context(pytest.raises(GraftError, match="no disk"))
        gathered([], GraftError("no disk"), "", ALONE)
