"""Ways to run the same requests: each a `Schedule`, whose `run` plays one of its ranks."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from recorder import declare_mesh, rows, step

from .ids import prefix_ids
from .model import Decoder, Segment
from .requests import REQUESTS
from .views import Log, View

BUCKET = 8
"""A captured batch has a multiple of so many rows."""


@dataclass
class Schedule:
    """A way to run the requests.

    Attributes:
        play: plays one rank: (rank, log, salt).
        world_size: how many there are.
        mesh: where a rank stands.
        agrees: whether its values are those of other schedules, but for rounding.
    """

    play: Callable[..., None]
    world_size: int = 1
    mesh: Callable[[int], dict] = lambda rank: {}
    agrees: bool = True

    def run(self, open_session, salt: Any = 0):
        """Play all ranks, each in a session of its own; return what their taps saw, and those."""
        fired, sessions = [], []
        for rank in range(self.world_size):
            declare_mesh(**self.mesh(rank))
            log = Log(rank)
            with open_session(rank, self.world_size) as session, torch.no_grad():
                self.play(rank, log, salt)
            fired += log.fired
            sessions.append(session)
        declare_mesh()
        return fired, sessions


def padded_ids(requests, width, left, salt):
    """Return [b, s] of ids as rows, and where each request begins in a row."""
    table, starts = [], []
    for tokens in requests:
        padding = [-1] * (width - len(tokens))
        ids = prefix_ids(tokens, salt)
        starts.append(len(padding) if left else 0)
        table.append(padding + ids if left else ids + padding)
    return table, starts


def padded(left=False, at_taps=True):
    """One padded batch."""

    def play(rank, log, salt):
        width = max(map(len, REQUESTS))
        table, starts = padded_ids(REQUESTS, width, left, salt)
        segments = [
            Segment(tokens, 0, i * width + start)
            for i, (tokens, start) in enumerate(zip(REQUESTS, starts, strict=True))
        ]
        flat = [one for row in table for one in row]
        view = View(log, flat, (len(table), width), "b s", at_taps=at_taps)
        with rows({"s b": lambda: torch.tensor(table).T}):  # in another order than the dims'
            Decoder()(segments, len(flat), view)

    return Schedule(play)


def packed(tail=3, requests=REQUESTS):
    """All tokens one behind the other, with a tail of padding."""

    def play(rank, log, salt):
        flat, segments = [], []
        for tokens in reversed(requests):
            segments.append(Segment(tokens, 0, len(flat)))
            flat += prefix_ids(tokens, salt)
        flat += [-1] * tail
        view = View(log, flat, (len(flat),), "t", at_taps=False)
        with rows(t=flat):
            Decoder()(segments, len(flat), view)

    return Schedule(play)


class Server:
    """Chunked prefill and decode of requests that come when they like.

    A prefix whose keys and values are there is not computed again, but for a request's last token.
    Now and then a request is put off, and all that only it needs is dropped.
    """

    def __init__(self, seed, log, salt, captured=True):
        self.random, self.log, self.salt = random.Random(seed), log, salt
        self.captured = captured
        self.model = Decoder()
        self.waiting = list(enumerate(REQUESTS))
        self.random.shuffle(self.waiting)
        self.running: dict = {}
        self.computed = 0

    def known(self, tokens):
        """Return how many tokens of a request the cache has."""
        n = 0
        while n < len(tokens) and tuple(tokens[: n + 1]) in self.model.cache[-1]:
            n += 1
        return min(n, len(tokens) - 1)

    def put_off(self, number):
        tokens = self.running.pop(number)[0]
        self.waiting.append((number, tokens))
        needed = {tuple(other[: i + 1]) for other, at in self.running.values() for i in range(at)}
        for i in range(self.random.randrange(4), len(tokens)):
            if tuple(tokens[: i + 1]) not in needed:
                for cache in self.model.cache:
                    cache.pop(tuple(tokens[: i + 1]), None)

    def play(self):
        while self.waiting or self.running:
            self.next()
            step()
            self.log.next_step()

    def next(self):
        if self.waiting and (not self.running or self.random.random() < 0.7):
            number, tokens = self.waiting.pop(0)
            self.running[number] = tokens, self.known(tokens)
        if len(self.running) > 1 and self.random.random() < 0.4:
            self.put_off(max(self.running, key=lambda number: self.running[number][1]))
        segments, ids, last = [], [], []
        for number in self.random.sample([*self.running], min(2, len(self.running))):
            tokens, at = self.running[number]
            rest = len(tokens) - at
            n = min(rest, self.random.choice([1, 5, 9]))
            segments.append(Segment(tokens[: at + n], at, len(ids)))
            ids += prefix_ids(tokens, self.salt)[at : at + n]
            last.append(len(ids) - 1)
            self.running[number] = tokens, at + n
            if n == rest:
                del self.running[number]
        self.computed += len(ids)
        if self.captured:
            ids += [-1] * (-len(ids) % BUCKET)
        view = View(self.log, ids, (len(ids),), "t", with_logits=last, at_taps=False)
        with rows(t=ids):
            self.model(segments, len(ids), view)


def server(seed=0):
    """A server, a call of `step()` after each of its batches."""
    return Schedule(lambda rank, log, salt: Server(seed, log, salt).play())


def context_parallel(cp=2, tp=2):
    """A padded batch over context-parallel ranks in zigzag, times tensor-parallel ones."""

    def play(rank, log, salt):
        k, here = divmod(rank, tp)
        width = max(map(len, REQUESTS))
        width += -width % (2 * cp * tp)
        table, _ = padded_ids(REQUESTS, width, False, salt)
        segments = [Segment(tokens, 0, i * width) for i, tokens in enumerate(REQUESTS)]
        flat = [one for row in table for one in row]
        chunks = torch.arange(len(flat)).view(-1, width).chunk(2 * cp, 1)
        index = torch.cat([chunks[k], chunks[2 * cp - 1 - k]], 1)
        view = View(log, flat, index.shape, "b s[cp:zigzag]", index, (here, tp))
        Decoder()(segments, len(flat), view)

    def mesh(rank):
        return {"cp": (rank // tp, cp), "tp": (rank % tp, tp)}

    return Schedule(play, cp * tp, mesh)


def expert_parallel(ep=2):
    """Experts over ranks, each of which has a part of the requests; a prompt, then decoding.

    Each expert drops some prefixes, the same ones whenever they come: the last one all of them, and
    the one before most, so that a rank may get none.
    """

    def taken(expert, ids):
        return {one for one in ids if one % 6 > (1, 1, 4, 5)[expert]}

    def play(rank, log, salt):
        model = Decoder(capacity=taken)
        for batch in ([0, 2, 4], [1], [3, 5]):
            for decodes in range(2):
                segments, flat, starts = [], [], []
                for number in batch:
                    tokens, prompt = REQUESTS[number], len(REQUESTS[number]) - 4
                    begin, end = (prompt, len(tokens)) if decodes else (0, prompt)
                    starts.append(len(flat))
                    segments.append(Segment(tokens[:end], begin, len(flat)))
                    flat += prefix_ids(tokens, salt)[begin:end]
                starts.append(len(flat))
                half = starts[(len(batch) + 1) // 2]
                own = (0, half) if rank == 0 else (half, len(flat))
                index = torch.arange(*own)
                experts = range(4)[rank * 4 // ep : (rank + 1) * 4 // ep]
                view = View(log, flat, index.shape, "t", index, experts=experts)
                model(segments, len(flat), view)
            step()
            log.next_step()

    return Schedule(play, ep, lambda rank: {"ep": (rank, ep)}, agrees=False)


def data_parallel(dp=2):
    """The requests dealt out to ranks one by one, in micro-batches of two."""

    def play(rank, log, salt):
        model = Decoder()
        mine = REQUESTS[rank::dp][::-1]
        for at in range(0, len(mine), 2):
            batch = mine[at : at + 2]
            width = max(map(len, batch))
            table, starts = padded_ids(batch, width, True, salt)
            segments = [
                Segment(tokens, 0, i * width + start)
                for i, (tokens, start) in enumerate(zip(batch, starts, strict=True))
            ]
            flat = [one for row in table for one in row]
            view = View(log, flat, (len(batch), width), "b[dp] s")
            model(segments, len(flat), view)

    return Schedule(play, dp, lambda rank: {"dp": (rank, dp)})


SCHEDULES = {
    "right": padded(),
    "left": padded(left=True, at_taps=False),
    "packed": packed(),
    "server": server(),
    "context": context_parallel(),
    "experts": expert_parallel(),
    "data": data_parallel(),
}
