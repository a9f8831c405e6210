"""What is read of records when only some of their rows are needed, and into which memory."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from recorder import Recorder, tap
from replayer import Replayer
from replayer.rowing.gather import _kept, unfilled

MANY = 1 << 19  # of 4 bytes
WIDTH = 64


@pytest.fixture
def values(run):
    """Rows of 2 ranks' records, of so many bytes that they are not read whole."""
    values = torch.randn(8_000, WIDTH, generator=torch.Generator().manual_seed(0))
    for rank, half in enumerate(torch.arange(8_000).split(4_000)):
        with Recorder(run, rank=rank, world_size=2):
            for ids in half.split(2_000):
                tap("x", values[ids], dims="t h", rows={"t": ids})
    return values


def grafted(run, ids):
    x = torch.full((len(ids), WIDTH), 5.0)
    with Replayer(run) as session:
        tap("x", x, dims="t h", rows={"t": ids})
    return x, session.log().row(0, named=True)


@pytest.mark.parametrize(
    "asked",
    [
        [*range(100, 400)],  # a run
        [*range(400, 100, -1)],  # that stands the other way round
        [*range(1_900, 2_100)],  # over two records, of one file
        [*range(3_900, 4_100)],  # of two files
        [99, 100, 4_101, 4_102],  # of two files, where one would go on in the other
        [*range(100, 110), *range(200, 210), 7, 8, *range(110, 120)],
        [*range(5_000, 5_050), *range(5_000, 5_050)],  # each row twice
        [*range(0, 8_000, 3)],
    ],
)
def test_rows_that_lie_side_by_side_are_read_together(run, values, asked):
    x, row = grafted(run, torch.tensor(asked))
    assert torch.equal(x, values[asked])
    assert "read in part, without their digests" in row["message"]


def test_a_run_of_rows_that_the_file_ends_in_is_not_grafted(run, values):
    for path in run.glob("rank-00000/*.safetensors"):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 8 * 4 * WIDTH)
    x, row = grafted(run, torch.arange(3_900, 4_000))
    assert bool((x == 5.0).all()) and row["outcome"] == "error"
    assert "it ends at byte" in row["message"]


def test_memory_that_nobody_has_any_more_is_read_into_again():
    first = unfilled((MANY, 2), torch.float32)
    at = first.data_ptr()
    del first
    assert unfilled((MANY,), torch.int64).data_ptr() == at


@pytest.mark.parametrize("keep", [lambda t: t[5:6], lambda t: t.numpy(), lambda t: t.detach().T])
def test_memory_that_somebody_has_stays_as_it_is(keep):
    first = unfilled((MANY, 1), torch.float32).fill_(1.0)
    kept = keep(first)
    del first
    unfilled((MANY, 1), torch.float32).fill_(2.0)
    assert (kept == 1.0).all()


def test_memory_that_is_kept_is_not_inference_modes_even_if_asked_for_in_it():
    _kept.clear()
    with torch.inference_mode():
        unfilled((MANY,), torch.float32)
    assert not _kept[0].is_inference()


def test_threads_do_not_get_the_same_memory():
    wrong, begin = [], threading.Barrier(4)

    def work(number: int) -> None:
        begin.wait()
        r, held = random.Random(number), []
        for turn in range(50):
            made = unfilled((MANY,), torch.int32).fill_(1000 * number + turn)
            held = [*held, (made, 1000 * number + turn)][-r.randrange(1, 4) :]
            wrong.extend(value for one, value in held if not bool((one == value).all()))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
