"""Ids of tokens by their definition, in Python's integers alone."""

from __future__ import annotations

import itertools

import xxhash

WORD = 1 << 64


def mix(z):
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 % WORD
    z ^= z >> 27
    z = z * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def seed(salt):
    if salt is None:
        return 0
    if isinstance(salt, str):
        return mix(xxhash.xxh3_64_intdigest(salt.encode()) ^ int.from_bytes(b"SALT-STR", "big"))
    return mix(salt % WORD ^ int.from_bytes(b"SALT-INT", "big"))


def ids(tokens, salt=None):
    """The id of each prefix of a sequence."""
    terms = (mix((t + (i + 1) * 0x9E3779B97F4A7C15) % WORD) for i, t in enumerate(tokens))
    sums = itertools.accumulate(terms, lambda a, b: (a + b) % WORD, initial=seed(salt))
    return [mix(total) >> 1 for total in itertools.islice(sums, 1, None)]
