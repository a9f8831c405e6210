"""The requests that every schedule runs: prompts, some with a prefix in common, and what follows.

The tokens that are decoded are given, so that all schedules compute the same.
"""

from __future__ import annotations

import random

VOCABULARY = 48
DECODED = 4


def requests(seed=0):
    """Return the tokens of six requests, each a prompt of 3 to 17 tokens and four more."""
    r = random.Random(seed)

    def some(n):
        return [r.randrange(VOCABULARY) for _ in range(n)]

    first, second = some(17), some(9)
    prompts = [first, first[:8] + some(3), second, second[:5], some(3), first[:12] + some(2)]
    return [prompt + some(DECODED) for prompt in prompts]


REQUESTS = requests()
