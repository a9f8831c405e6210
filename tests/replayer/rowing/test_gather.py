"""The memory that rows are read into."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from replayer.rowing.gather import _kept, unfilled

MANY = 1 << 19  # of 4 bytes


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
