"""What a cache of numbered places holds: of each place, the prefix that ends with its token.

A step of a server adds tokens to requests. What is in front of them lies in the cache, and the last
token's place says which prefix that is, if this process has computed it:

1. `Slots.stepped` looks up the place in front of each request's first token.
2. Ids follow from there on (`run_on`), and are noted at the places that the tokens go to.
3. What was never seen has no ids, nor has what goes on from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..tokens.hashing import named
from ..tokens.known import with_known
from ..tokens.sums import at_places, run_on
from . import missed

_SMALLEST = 1024


@dataclass(frozen=True)
class Step:
    """Tokens that lie one request behind the other; all int64 on the CPU.

    Attributes:
        tokens: [t].
        counts: how many of them each request has, [requests], together t.
        begins: at which position of its request each one's first token stands, [requests].
        before: the place of the token in front of that, [requests]; any where there is none.
        places: where the tokens go to, [t]; -1 for nowhere.
        seeds: the sum of each request's empty prefix, [requests]; None for 0.
        known: which requests are known to go on as `begins` says, [requests]; None for all.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    begins: torch.Tensor
    before: torch.Tensor
    places: torch.Tensor
    seeds: torch.Tensor | None = None
    known: torch.Tensor | None = None


class Slots:
    """The places of one cache.

    Attributes:
        block: how many of them are a block; 0 where that is not known or not asked for.
    """

    def __init__(self) -> None:
        self.block = 0
        self._missed = missed.count()
        self._made()
        missed.watch_graphs()

    def _made(self) -> None:
        with torch.inference_mode(False):
            self._sums = torch.zeros(_SMALLEST, dtype=torch.int64, device="cpu")
            self._numbers = torch.zeros(_SMALLEST, dtype=torch.int64, device="cpu")

    def clear(self) -> None:
        """Forget what all places hold."""
        self._numbers.zero_()

    def forget(self, places: torch.Tensor) -> None:
        """Forget what some places hold, [n] int64."""
        self._keep(places, torch.zeros_like(places), torch.zeros_like(places))

    def copy(self, sources: torch.Tensor, places: torch.Tensor) -> None:
        """Note that places now hold what others did, both [n] int64."""
        if not len(places):
            return
        sums, numbers = self._at(sources)
        self._keep(places, sums, numbers)

    def stepped(self, step: Step) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return the ids of a step, [t], its tokens' positions, and how many tokens have none.

        Both are -1 where a request goes on from a prefix that was never seen.
        """
        if self._missed != missed.count():
            self._missed = missed.count()
            self.clear()
        sums, numbers = self._at(step.before)
        is_first = step.begins == 0
        known = is_first | ((numbers == step.begins) & (step.begins > 0))
        if step.known is not None:
            known &= step.known
        zero = torch.zeros_like(sums)
        sums = torch.where(is_first, zero if step.seeds is None else step.seeds, sums)
        numbers, sums = run_on(step.tokens, step.counts, step.begins, sums)
        known = known.repeat_interleave(step.counts, output_size=len(step.tokens))
        self._keep(step.places, sums, torch.where(known, numbers, 0))
        absent = ~known
        ids = named(sums.clone()).masked_fill_(absent, -1)
        return ids, (numbers - 1).masked_fill_(absent, -1), int(absent.sum())

    def _at(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of the prefixes at places, and how long each is, 0 where unknown."""
        size = len(self._sums)
        is_there = (places >= 0) & (places < size)
        at = places.clamp(0, size - 1)
        return self._sums[at], torch.where(is_there, self._numbers[at], 0)

    def _keep(self, places: torch.Tensor, sums: torch.Tensor, numbers: torch.Tensor) -> None:
        wanted = places >= 0
        if not bool(wanted.all()):
            places, sums, numbers = places[wanted], sums[wanted], numbers[wanted]
        if not len(places):
            return
        most = int(places.max()) + 1
        if most > len(self._sums):
            self._sums, self._numbers = (_grown(one, most) for one in (self._sums, self._numbers))
        self._sums.index_copy_(0, places, sums)
        self._numbers.index_copy_(0, places, numbers)


def _grown(old: torch.Tensor, least: int) -> torch.Tensor:
    with torch.inference_mode(False):
        found = torch.zeros(max(least, 2 * len(old)), dtype=torch.int64, device="cpu")
        found[: len(old)] = old
    return found


def told(
    ids: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, *shape: int
) -> torch.Tensor:
    """Return the ids of a step's tokens in a tensor of some shape, with what is known of them.

    Args:
        ids: [t], -1 where there are none; as the next two.
        positions: of each token in its request.
        tokens: themselves.
        *shape: of the rows; those behind the tokens are padding.
    """
    tokens, size = torch.where(ids >= 0, tokens, -1), math.prod(shape)
    found, where, what = (
        at_places(one, None, size).view(shape) for one in (ids, positions, tokens)
    )
    return with_known(found, where, what)
