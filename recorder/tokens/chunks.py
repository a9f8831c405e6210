"""A step of a server by request: which tokens it adds to each, and where they are to stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Chunks:
    """The tokens that a step adds to each of its requests, one request behind the other.

    Attributes:
        names: the requests, each once.
        counts: how many tokens each has here, at least one, [requests].
        tokens: all of them, int64 on the CPU.
        begins: at which position each request's first one stands, [requests]; None where they go on
            from where they ended.
        seeds: the sum of each one's empty prefix, None where nothing was said; None for all.
    """

    names: list[Any]
    counts: torch.Tensor
    tokens: torch.Tensor
    begins: torch.Tensor | None
    seeds: list[int | None] | None

    def gap(self, index: int, length: int, is_new: bool) -> str:
        """Say that a request's chunk leaves out tokens in front of it."""
        begin = -1 if self.begins is None else int(self.begins[index])
        held = "is new" if is_new else f"has {length} tokens so far"
        return (
            f"request {self.names[index]!r} {held} and goes on at position {begin}: what is before "
            "that was never seen; feed the cached prefix first, as in "
            "book.begin(request, tokens=prefix)"
        )
