"""What a server's requests have had so far, so that the next step of each can go on from there.

1. `TokenBook._appended` takes any step: new requests, chunks, positions.
2. `TokenBook._decoded` takes the usual one, a token more of each of many requests: what it needs to
   know of them is planned once and holds while the requests are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from threading import RLock
from typing import Any, TypeVar

import torch

from ..errors import UsageError
from .chunks import Chunks
from .hashing import ONE, named, numbered
from .inputs import Integers, Request, Requests, Salt, check_names, first_of, integers, seeds_of
from .known import with_known
from .memory import Memory, listed
from .sums import run_on

T = TypeVar("T")

_WORD = 1 << 64
_FAST = (torch.int64, torch.int32)
_SOON = 16  # tokens


@dataclass
class _Plan:
    """What a step of one token a request needs to know of its requests.

    Attributes:
        names: their ids.
        slots: their places in the book's tables, [requests].
        before: one less than where the block of each begins.
        left: how many more tokens each of them has room for, at least.
        salt: what was last found to be their salt.
        spare: room for what is computed on the way.
    """

    names: list[Any]
    slots: torch.Tensor
    before: torch.Tensor
    left: int
    salt: Any
    spare: torch.Tensor


class TokenBook:
    """The tokens that requests have had, as far as ids need them: `token_rows(..., state=book)`.

    It is a mapping of a request's id to the sum and the number of its tokens, `(sum, count)`, as
    far as `in`, `len`, `iter`, `[]`, `del` and `pop` go. Delete a request that is finished: another
    of the same id would go on with its tokens. It keeps 8 bytes a token, in blocks of powers of
    two, so that a request can go back. Threads may share it.
    """

    def __init__(self) -> None:
        # A finaliser may forget a request while this thread is inside.
        self._lock = RLock()
        self.clear()

    def clear(self) -> None:
        """Forget all requests, and free their memory."""
        with self._lock:
            self._slots: dict[Any, int] = {}
            self._memory = Memory()
            self._plan: _Plan | None = None

    def __contains__(self, request: object) -> bool:
        return request in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._slots))

    def __getitem__(self, request: Request) -> tuple[int, int]:
        with self._lock:
            total, count = self._memory.last(self._slots[request])
            return total % _WORD, count

    def __delitem__(self, request: Request) -> None:
        with self._lock:
            self._memory.close(self._slots.pop(request))
            self._plan = None

    def pop(self, request: Request, *default: T) -> tuple[int, int] | T:
        """Delete a request and return what it had: the sum of its tokens, and how many.

        Args:
            request: its id.
            *default: what to return where there is no such request.

        Raises:
            KeyError: there is none, and no default.
        """
        with self._lock:
            if default and request not in self._slots:
                return default[0]
            found = self[request]
            del self[request]
            return found

    def forget(self, request: Request) -> None:
        """Delete a request, if it is there."""
        self.pop(request, None)

    def begin(self, request: Request, tokens: Integers = (), salt: int | str | None = None) -> None:
        """Say that a request begins, with a prefix that the server has in its cache.

        Args:
            request: its id; whatever the book has of it is replaced.
            tokens: the prefix, [n], none by default.
            salt: an integer or a string that its ids depend on.

        Raises:
            UsageError: an argument cannot be used; the book is as it was.
        """
        check_names([request])
        prefix = integers(tokens, "tokens")
        if prefix.dim() != 1:
            raise UsageError(f"tokens has shape {list(prefix.shape)}; give those of one request")
        seeds = seeds_of(salt, 1, "request")
        own = prefix.to("cpu", torch.int64)
        with self._lock:
            self.forget(request)
            seed = seeds[0] if isinstance(seeds, list) else seeds
            [self._slots[request]] = self._memory.open([seed or 0], [len(own) + 1])
            if len(own):
                self._appended(Chunks([request], listed([len(own)]), own, None, None))

    def _appended(self, chunks: Chunks) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the tokens of a step; return each one's number from 1, and the sum of its prefix.

        Raises:
            UsageError: the step does not go on from here; the book is as it was.
        """
        with self._lock:
            names, counts, memory = chunks.names, chunks.counts, self._memory
            new = [i for i, name in enumerate(names) if name not in self._slots]
            begins = self._begins(chunks, new)
            self._plan = None
            seeds = chunks.seeds or [None] * len(names)
            if new:
                sizes = (counts[new] + 1).tolist()
                opened = memory.open([seeds[i] or 0 for i in new], sizes)
                self._slots.update(zip([names[i] for i in new], opened, strict=True))
            slots = listed([self._slots[name] for name in names])
            base = memory.base[slots]
            if chunks.begins is not None:
                for i in (begins == 0).nonzero().view(-1).tolist():
                    if seeds[i] is not None:  # else it begins anew with the one it has
                        memory.sums[base[i]] = seeds[i]
            lacking = memory.end[slots] - base <= begins + counts
            if bool(lacking.any()):
                memory.grow(slots[lacking], (begins + counts + 1)[lacking])
                base = memory.base[slots]
            at = base + begins
            numbers, found = run_on(chunks.tokens, counts, begins, memory.sums[at])
            places = base.repeat_interleave(counts, output_size=len(found)).add_(numbers)
            memory.sums.index_copy_(0, places, found)
            memory.at.index_copy_(0, slots, at + counts)
            return numbers, found

    def _begins(self, chunks: Chunks, new: list[int]) -> torch.Tensor:
        """Return at which position each chunk begins, [chunks], if the step can be added."""
        absent = set(new)
        slots = listed([self._slots.get(one, 0) for one in chunks.names])
        lengths = self._memory.at[slots] - self._memory.base[slots]
        if new:
            lengths[new] = 0
        begins = lengths if chunks.begins is None else chunks.begins
        i = first_of(begins > lengths)
        if i is not None:
            raise UsageError(chunks.gap(i, int(lengths[i]), i in absent))
        if chunks.seeds is not None:
            self._check_salts(chunks, slots, absent)
        return begins

    def _check_salts(self, chunks: Chunks, slots: torch.Tensor, absent: set[int]) -> None:
        """Refuse a salt where a request goes on that began with another."""
        held = self._memory.sums[self._memory.base[slots]].tolist()
        anew = [False] * len(held) if chunks.begins is None else (chunks.begins == 0).tolist()
        for i, seed in enumerate(chunks.seeds or ()):
            if seed not in (None, held[i]) and not anew[i] and i not in absent:
                raise UsageError(
                    f"request {chunks.names[i]!r} began with another salt; give that one, or "
                    "delete it from the book if this is another request"
                )

    def _decoded(
        self, given: object, requests: Requests | None, positions: object, salt: Salt | None
    ) -> torch.Tensor | None:
        """Return the ids of a step that adds a token to each of its requests.

        None where it is another step than that, or one that is to be refused, with nothing changed.
        """
        if type(given) is not torch.Tensor or given.dtype not in _FAST or given.dim() != 1:
            return None
        if type(requests) is not list:
            if not isinstance(requests, (torch.Tensor, tuple)):
                return None
            requests = requests.tolist() if isinstance(requests, torch.Tensor) else [*requests]
        if len(requests) != len(given) or not (given.is_cpu or given.is_cuda):
            return None
        with self._lock:
            plan = self._plan
            if plan is None or plan.left < 1 or plan.names != requests:
                plan = self._plan = self._planned(requests)
                if plan is None:
                    return None
            memory = self._memory
            at = memory.at.index_select(0, plan.slots)
            numbers = at - plan.before
            if salt is not None and not self._is_salt(plan, salt):
                return None
            if positions is not None and not _are_next(positions, numbers):
                return None
            tokens = given.clone() if given.is_cpu else given.cpu()
            if tokens.dtype != torch.int64:
                tokens = tokens.to(torch.int64)
            found = memory.sums.index_select(0, at)
            found.add_(numbered(tokens, numbers, plan.spare))
            at.add_(ONE)
            memory.sums.index_copy_(0, at, found)
            memory.at.index_copy_(0, plan.slots, at)
            plan.left -= 1
            named(found, plan.spare)
        return with_known(found, numbers.sub_(ONE), tokens)

    def _planned(self, requests: list[Any]) -> _Plan | None:
        """Return a plan for requests of which each is here, and once in the step; else None."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # what it holds is written in any mode
                return self._planned(requests)
        many, memory = len(requests), self._memory
        try:
            held = itemgetter(*requests, *requests[:1])(self._slots)
        except (KeyError, TypeError):
            return None
        if len(set(held)) != many:
            return None
        slots = listed(held[:many])
        left = memory.end.index_select(0, slots).sub_(memory.at.index_select(0, slots))
        if (least := int(left.min()) - 1) < 1:
            few = slots[left <= _SOON]  # all that will be full soon, not one at each step
            memory.grow(few, 2 * (memory.end[few] - memory.base[few]))
            least = int((memory.end[slots] - memory.at[slots]).min()) - 1
        before = memory.base.index_select(0, slots).sub_(1)
        return _Plan(requests[:], slots, before, least, None, torch.empty_like(slots))

    def _is_salt(self, plan: _Plan, salt: Salt) -> bool:
        """Whether a salt is that of all requests of a plan, which then remembers it."""
        if type(salt) is type(plan.salt) and type(salt) in (int, str, list) and salt == plan.salt:
            return True
        seeds = seeds_of(salt, len(plan.names), "entry of requests")
        held = self._memory.sums.index_select(0, plan.before + 1).tolist()
        every = seeds if isinstance(seeds, list) else [seeds] * len(held)
        if any(one not in (None, has) for one, has in zip(every, held, strict=True)):
            return False
        plan.salt = list(salt) if isinstance(salt, list) else salt
        return True


def _are_next(positions: object, numbers: torch.Tensor) -> bool:
    """Whether positions, from 0, are those of tokens with these numbers, from 1."""
    if type(positions) is not torch.Tensor or positions.dtype not in _FAST:
        return False
    if positions.shape != numbers.shape:
        return False
    return torch.equal(positions.to("cpu", torch.int64), numbers - 1)
