"""What the corners of a diff share."""

from __future__ import annotations

import torch

from recorder import tap
from replayer import Diff

X = torch.randn(6, 8, 16, generator=torch.Generator().manual_seed(0))  # tokens, heads, head dim


def only(found: Diff) -> dict:
    (row,) = found.pairs.iter_rows(named=True)
    return row


def over(axis, size):
    """A mesh of one axis."""
    return lambda rank: {axis: (rank, size)}


def each(values):
    """A job that taps some values, numbered."""

    def job(rank):
        for i, value in enumerate(values):
            tap("v", value, i=i)

    return job


TOKENS = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def padded(room, dims, fill, wrong=0.0):
    """A job of two sequences of 3 and 5 tokens, of which the first may be wrong."""

    def job(rank):
        x = torch.full((2, room, 4), fill)
        x[0, :3], x[1, :5] = TOKENS[:3] + wrong, TOKENS[3:]
        shape = (-1, 4) if "(" in dims else x.shape
        tap("x", x.reshape(shape), dims=dims, extras={"seq_lens": [3, 5]})

    return job
