"""Ids of a server's step: tokens of many requests, each going on where it ended before."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

from ..errors import UsageError
from .batch import copied, flattened
from .book import TokenBook
from .chunks import Chunks
from .hashing import named, signed
from .inputs import (
    Integers,
    Request,
    Requests,
    Salt,
    beside,
    check_names,
    first_of,
    lengths_of,
    mask_of,
    names_of,
    seeds_of,
)
from .known import with_known
from .memory import listed
from .sums import at_places, run_on

State = TokenBook | MutableMapping[Any, tuple[int, int]]

_WORD = 1 << 64


def stepped(
    tokens: torch.Tensor,
    requests: Requests,
    state: State,
    bounds: Integers | None,
    mask: object,
    positions: Integers | None,
    salt: Salt | None,
) -> torch.Tensor:
    """Return the ids of a step, on the CPU, and have the state go on to its end.

    Args:
        tokens: integers, [t] or [1, t].
        requests: an id for each token, or for each sequence of `bounds`.
        state: what is known of the requests.
        bounds: `cu_seqlens`, or None.
        mask: `attention_mask`, of the tokens' shape, or None.
        positions: of the tokens' shape, -1 at padding, or None.
        salt: for all, or one for each of `requests`.

    Raises:
        UsageError: the arguments contradict each other or the state, which then is as it was.
    """
    if not isinstance(state, (TokenBook, MutableMapping)):
        raise UsageError(f"state is of type {type(state).__name__}; give a TokenBook or a dict")
    own = copied(flattened(tokens, "requests").cpu())
    lengths = None if bounds is None else lengths_of(bounds, len(own))
    if lengths is None:
        names = names_of(requests, len(own), "token of input_ids")
    else:
        names = names_of(requests, len(lengths), "sequence of cu_seqlens")
    seeds = seeds_of(salt, len(names), "entry of requests")
    places = None
    if positions is not None:
        places = beside(positions, "positions", tokens).reshape(-1).to("cpu", torch.int64)
        if len(places) and int(places.min()) < -1:
            raise UsageError(f"positions holds {int(places.min())}; give -1 at padding")
    where = _kept(len(own), lengths, places, None if mask is None else mask_of(mask, tokens))
    chunks, where = _chunks(own, names, lengths, where, places, seeds)
    if not len(chunks.tokens):
        numbers = sums = chunks.tokens
    elif isinstance(state, TokenBook):
        numbers, sums = state._appended(chunks)
    else:
        numbers, sums = _appended(state, chunks)
    ids, stand, ends = (
        at_places(one, where, len(own)).view(tokens.shape)
        for one in (named(sums), numbers - 1, chunks.tokens)
    )
    return with_known(ids, stand, ends)


def _kept(
    size: int,
    lengths: torch.Tensor | None,
    places: torch.Tensor | None,
    real: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return which of a step's tokens are no padding; None for all."""
    kept = None if places is None else places >= 0
    if real is not None:
        real = real.reshape(-1).cpu()
        kept = real if kept is None else kept & real
    total = size if lengths is None else int(lengths.sum())
    if total < size:
        inside = torch.arange(size, device="cpu") < total
        kept = inside if kept is None else kept & inside
    return None if kept is None or bool(kept.all()) else kept.nonzero().view(-1)


def _chunks(
    tokens: torch.Tensor,
    names: list[Any],
    lengths: torch.Tensor | None,
    where: torch.Tensor | None,
    places: torch.Tensor | None,
    seeds: list[int | None] | int | None,
) -> tuple[Chunks, torch.Tensor | None]:
    """Return the tokens by request, and where in the step each of them is; None for all in order.

    Args:
        tokens: of the whole step, [t].
        names: the ids that were given, one for each token, or for each sequence.
        lengths: of the sequences; None where there is one for each token.
        where: the tokens that are no padding; None for all.
        places: the position of each token, [t], or None.
        seeds: one for each of `names`, or one for all, or None.

    Raises:
        UsageError: ids or salts cannot be used, or a request's tokens are out of order.
    """
    if where is not None:
        tokens = tokens.index_select(0, where)
        places = None if places is None else places.index_select(0, where)
    used, which = list(range(len(names))) if where is None else where.tolist(), None
    if lengths is not None:
        which = torch.repeat_interleave(lengths)
        which = which if where is None else which.index_select(0, where)
        used = which.unique().tolist()
    held = [names[i] for i in used]
    check_names(held)
    number = {name: i for i, name in enumerate(dict.fromkeys(held))}
    numbers = list(map(number.__getitem__, held))
    if which is None:
        which = listed(numbers)
    else:
        table = torch.zeros(len(names), dtype=torch.int64, device="cpu")
        table[listed(used)] = listed(numbers)
        which = table.index_select(0, which)
    if bool((which.diff() < 0).any()):
        which, order = which.sort(stable=True)
        tokens = tokens.index_select(0, order)
        places = None if places is None else places.index_select(0, order)
        where = order if where is None else where.index_select(0, order)
    counts = which.bincount(minlength=len(number))
    begins = None
    if places is not None:
        firsts = counts.cumsum(0) - counts
        begins = places.index_select(0, firsts)
        due = torch.arange(len(places), device="cpu") + (begins - firsts).index_select(0, which)
        i = first_of(places != due)
        if i is not None:
            raise UsageError(
                f"request {list(number)[int(which[i])]!r} has a token at position {int(places[i])} "
                f"where {int(due[i])} comes next; give the tokens of a request in their order"
            )
    salted = _by_name(seeds, used, numbers, number)
    return Chunks(list(number), counts, tokens, begins, salted), where


def _by_name(
    seeds: list[int | None] | int | None,
    used: list[int],
    numbers: list[int],
    names: dict[Any, int],
) -> list[int | None] | None:
    """Return the seed of each request, from those of its entries, which are to be the same."""
    if seeds is None or isinstance(seeds, int):
        return None if seeds is None else [seeds] * len(names)
    found: dict[int, int | None] = {}
    for i, number in zip(used, numbers, strict=True):
        if found.setdefault(number, seeds[i]) != seeds[i]:
            name = list(names)[number]
            raise UsageError(f"request {name!r} has two salts in one step; give it one")
    return [found[number] for number in range(len(names))]


def _appended(
    state: MutableMapping[Any, tuple[int, int]], chunks: Chunks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as `TokenBook._appended`, with a dict of the last sum and the number of tokens."""
    unsaid = [None] * len(chunks.names)
    begins = unsaid if chunks.begins is None else chunks.begins.tolist()
    seeds, lengths, sums = chunks.seeds or unsaid, [], []
    for i, (name, begin, seed) in enumerate(zip(chunks.names, begins, seeds, strict=True)):
        total, length = _held(state, name) if name in state else (seed or 0, 0)
        if begin == 0 and length:
            total, length = seed or 0, 0
        elif begin is not None and begin > length:
            raise UsageError(chunks.gap(i, length, name not in state))
        elif begin is not None and begin < length:
            raise UsageError(
                f"request {name!r} goes back from position {length} to {begin}, and a dict has no "
                "sums of earlier positions; use a TokenBook as state"
            )
        lengths.append(length)
        sums.append(signed(total))
    numbers, found = run_on(chunks.tokens, chunks.counts, listed(lengths), listed(sums))
    last = chunks.counts.cumsum(0) - 1
    ends = zip(chunks.names, found[last].tolist(), numbers[last].tolist(), strict=True)
    state.update({name: (total % _WORD, length) for name, total, length in ends})
    return numbers, found


def _held(state: MutableMapping[Any, tuple[int, int]], name: Request) -> tuple[int, int]:
    """Return what a dict has of a request.

    Raises:
        UsageError: it is not from here.
    """
    held = state[name]
    if (
        isinstance(held, tuple)
        and len(held) == 2
        and all(type(one) is int and one >= 0 for one in held)
    ):
        return held
    raise UsageError(
        f"state has {held!r} for request {name!r}; give a dict that only token_rows fills, "
        "empty at first"
    )
