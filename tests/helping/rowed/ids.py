"""An id for each prefix of a sequence, in the one place that knows how they are made."""

from __future__ import annotations

import xxhash


def prefix_ids(tokens, salt=0):
    """Return an id for each token: of 63 bits, for the whole prefix that ends there."""
    return [
        xxhash.xxh3_64_intdigest(repr((salt, *tokens[: n + 1])).encode()) >> 1
        for n in range(len(tokens))
    ]
