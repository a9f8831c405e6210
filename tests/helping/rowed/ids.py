"""An id for each prefix of a sequence, in the one place that knows how they are made."""

from __future__ import annotations

import functools

import torch

from recorder import token_rows


def prefix_ids(tokens, salt=0):
    """Return an id for each token, for the whole prefix that ends there."""
    return [*_ids(tuple(tokens), salt)]


@functools.cache
def _ids(tokens, salt):
    return token_rows(torch.tensor(tokens, dtype=torch.int64), salt=salt).tolist()
