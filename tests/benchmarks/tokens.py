"""What ids of tokens cost: whole batches, and a step of a server."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from harness import Result, interleaved, seconds

from recorder import TokenBook, token_rows


def batches(base: Path, quick: bool) -> list[Result]:
    """A batch in each form, against the running total of its tokens, on one core."""
    rows, width = (50, 200) if quick else (500, 2000)
    total, rng = rows * width, random.Random(0)
    tokens = torch.randint(0, 150_000, (rows, width))
    flat = tokens.view(-1)
    real = torch.arange(width) >= torch.tensor([[rng.randrange(width)] for _ in range(rows)])
    ends = sorted(rng.sample(range(1, total), rows - 1))
    bounds = torch.tensor([0, *ends, total], dtype=torch.int32)
    places = torch.cat([torch.arange(int(length)) for length in bounds.diff()])
    calls = {
        "nothing padded": lambda: token_rows(tokens),
        "padded": lambda: token_rows(tokens, attention_mask=real.long()),
        "packed": lambda: token_rows(flat, cu_seqlens=bounds),
        "packed, by position_ids": lambda: token_rows(flat, position_ids=places),
        "cumsum": lambda: flat.cumsum(0),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timed = {name: (lambda call=call: seconds(call)) for name, call in calls.items()}
        found = interleaved(timed, 15, warm_ups=3)
    finally:
        torch.set_num_threads(threads)
    peer = found.pop("cumsum") * 1e3
    return [
        _within(f"ids of {total:,} tokens, {name}", taken * 1e3, "cumsum", peer, "ms", 50)
        for name, taken in found.items()
    ]


def steps(base: Path, quick: bool) -> list[Result]:
    """A token more of each of 256 requests, against a rolling hash of each in a dict."""
    many, calls = 256, 200 if quick else 2_000
    rng, book = random.Random(0), TokenBook()
    requests = [f"request-{i}" for i in range(many)]
    for name in requests:
        book.begin(name, tokens=[rng.randrange(150_000) for _ in range(rng.randrange(10, 500))])
    tokens = torch.randint(0, 150_000, (many,))
    orders = [rng.sample(requests, many) for _ in range(50)]
    rolled = dict.fromkeys(requests, 0)

    def roll() -> None:
        for name, token in zip(requests, tokens.tolist(), strict=True):
            rolled[name] = hash((rolled[name], token))

    def each(call, number: int = calls) -> float:
        start = time.perf_counter()
        for i in range(number):
            call(i)
        return (time.perf_counter() - start) / number

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = interleaved(
            {
                "the same as before": lambda: each(
                    lambda i: token_rows(tokens, requests=requests, state=book)
                ),
                "in another order each time": lambda: each(
                    lambda i: token_rows(tokens, requests=orders[i % 50], state=book)
                ),
                "rolled": lambda: each(lambda i: roll()),
            },
            7,
        )
    finally:
        torch.set_num_threads(threads)
    peer = found.pop("rolled") * 1e6
    limits = {"the same as before": 50}
    return [
        _within(
            f"ids of a step of {many} requests, {name}",
            taken * 1e6,
            "hash() of each",
            peer,
            "us",
            limits.get(name),
        )
        for name, taken in found.items()
    ]


def _within(
    measure: str, ours: float, peer: str, theirs: float, unit: str, limit: float | None
) -> Result:
    """Return a result whose target is a time."""
    target = "" if limit is None else f"at most {limit} {unit}"
    met = None if limit is None else ours <= limit
    return Result(measure, ours, peer, theirs, unit, f"{ours / theirs:.2f}x", target, met)
