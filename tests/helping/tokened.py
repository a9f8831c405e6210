"""Recordings of the same tokens as a trainer's batch and as a server's steps."""

from __future__ import annotations

import torch

from recorder import Recorder, TokenBook, rows, step, tap, token_rows

BATCH, LENGTH = 4, 10
TOKENS = torch.randint(0, 50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(path, taps, tokens=TOKENS, salt=None, pad=0):
    """Record one padded batch.

    Args:
        path: the recording.
        taps: (name, tags) -> tensor [batch, length, ...].
        tokens: [batch, length].
        salt: of the ids.
        pad: rows of padding in front of each sequence.
    """
    mask = torch.ones(tokens.shape[0], tokens.shape[1] + pad, dtype=torch.long)
    mask[:, :pad] = 0
    padded = torch.nn.functional.pad(tokens, (pad, 0))
    with Recorder(path), rows({"b s": token_rows(padded, attention_mask=mask, salt=salt)}):
        for (name, tags), value in taps.items():
            filler = value.new_full((value.shape[0], pad, *value.shape[2:]), 7)
            tap(name, torch.cat([filler, value], 1), dims=dims_of("b s", value), **dict(tags))


def server(path, taps, tokens=TOKENS, chunk=3, salt=None, drop=()):
    """Record steps in which each sequence advances by a chunk; `drop` names steps left out."""
    book = TokenBook()
    count = len(tokens)
    with Recorder(path):
        for number, start in enumerate(range(0, tokens.shape[1], chunk)):
            part = tokens[:, start : start + chunk]
            order = torch.randperm(count, generator=torch.Generator().manual_seed(number))
            requests = [f"r{i}" for i in order.tolist() for _ in range(part.shape[1])]
            ids = token_rows(part[order].reshape(-1), requests=requests, state=book, salt=salt)
            if number not in drop:
                with rows(t=ids):
                    for (name, tags), value in taps.items():
                        now = value[:, start : start + chunk][order].flatten(0, 1)
                        tap(name, now, dims=dims_of("t", now, 1), **dict(tags))
            step()


def dims_of(front, value, first=2):
    return " ".join([front, *"xyz"[: value.dim() - first]])
