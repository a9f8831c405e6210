"""The rows of transformers' continuous batching: requests in one row, and a cache of pages.

A step says which tokens are of which request (`cu_seq_lens_q`), where they stand (`position_ids`),
and which places of the cache they read and write: `read_index` and `write_index`, or `block_table`
where each request has one token. Blocks also move without a forward: where a request is forked,
`_copied` has what is known go along; where one comes back from another memory, `_restored` forgets
it; and the count of changes to the cache's tensor tells of all else.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from ..bits import never_compiled
from .batches import DIMS
from .calls import Arguments, Begun, NoRows, Say, on_host, tokens_of
from .causal import is_causal
from .heads import kept
from .slots import Slots, Step, told

_OFFLOADING = "transformers.generation.continuous_batching.offloading_manager"
_FULL = "full_attention"


class _Cache:
    """What is known of one cache of pages.

    Attributes:
        of: the cache.
        slots: its places, of one kind of layer.
        version: as of which change to its tensor that holds; None where these are not counted.
    """

    def __init__(self, cache: Any) -> None:
        self.of = weakref.ref(cache)
        self.slots = Slots()
        self.version = _version(cache)


_known: dict[int, _Cache] = {}
_put: list[tuple[Any, str, Any, Callable[..., Any]]] = []


def is_paged(given: Arguments) -> bool:
    """Whether a call is one of continuous batching."""
    return "cu_seq_lens_q" in given and hasattr(given.get("cache"), "cache_allocators")


def begun(module: torch.nn.Module, given: Arguments, say: Say) -> Begun:
    """Return what is known of the rows of a call; see `batches.begun`.

    Raises:
        NoRows: none of them is known.
    """
    tokens, cache = tokens_of(given), given["cache"]
    if tokens.dim() != 2 or len(tokens) != 1 or not is_causal(module):
        raise _unknown()
    known = _of(cache)
    if _version(cache) != known.version:
        known.slots.clear()
    try:
        step = _step(given, tokens, cache)
    except (AttributeError, KeyError, IndexError, TypeError):  # as in another version
        known.slots.clear()
        raise _unknown() from None
    with torch.inference_mode(False):
        ids, positions, absent = known.slots.stepped(step)
    if absent:
        say(
            "some requests have no ids, since what their cache begins with was not seen here; "
            "start recording before it is filled"
        )
    shape = tuple(tokens.shape)

    def ended(output: Any) -> None:
        known.version = _version(cache)

    def every() -> torch.Tensor:
        return told(ids, positions, step.tokens, *shape)

    return Begun({DIMS: every}, kept(every, given), shape, ended)


def leave() -> None:
    """Leave transformers as it was, and forget all."""
    _known.clear()
    for holder, name, given, replacement in reversed(_put):
        if vars(holder).get(name) is replacement:
            if given is None:
                delattr(holder, name)
            else:
                setattr(holder, name, given)
    _put.clear()


def _unknown() -> NoRows:
    return NoRows(
        "its continuous batching is of a kind that is not known; say which row is which by a "
        "function, as in --rows PKG.MOD.FN"
    )


def _version(cache: Any) -> int | None:
    held = getattr(cache, "cache_tensor", None)
    if not isinstance(held, torch.Tensor) or held.is_inference():
        return None
    return int(held._version)


def _of(cache: Any) -> _Cache:
    found = _known.get(id(cache))
    if found is None or found.of() is not cache:
        for key in [key for key, one in _known.items() if one.of() is None]:
            del _known[key]
        found = _known[id(cache)] = _Cache(cache)
        for kind in {type(one) for one in cache.cache_allocators.values()}:
            _replace(kind, "copy_blocks", _copied)
        manager = getattr(sys.modules.get(_OFFLOADING), "OffloadingManager", None)
        if manager is not None:
            _replace(manager, "restore_scheduled_requests", _restored)
    return found


def _group(cache: Any) -> Any:
    """Return the part of a cache whose places are followed: that of layers that see all tokens."""
    every = list(cache.cache_allocators.values())
    return next((one for one in every if getattr(one, "layer_type", "") == _FULL), every[0])


def _step(given: Arguments, tokens: torch.Tensor, cache: Any) -> Step:
    group = _group(cache)
    bounds = on_host(given["cu_seq_lens_q"])
    total, counts = int(bounds[-1]), bounds.diff()
    used = (counts > 0).nonzero().view(-1)  # the others fill a captured batch up
    counts, firsts = counts[used], bounds[used]
    at = on_host(given["position_ids"]).view(-1)[:total]
    begins = at[firsts]
    due = torch.arange(total, device="cpu") + (begins - firsts).repeat_interleave(counts)
    wrong = (at != due).to(torch.int64).cumsum(0)
    ends = firsts + counts - 1
    known = wrong[ends] - wrong[firsts] == 0
    table = given.get("block_table")
    if table is not None:
        pages, page = on_host(table[group.index])[used], group.tokens_per_page
        request = torch.arange(len(used), device="cpu")
        last = (begins - 1).clamp_min(0)
        before = pages[request, last // page] * page + last % page
        request = request.repeat_interleave(counts)
        places = pages[request, due // page] * page + due % page
    else:
        read, write = (given[name][group.index] for name in ("read_index", "write_index"))
        places = on_host(write)[:total]
        places = places.masked_fill(places == group.write_trash_index, -1)
        lengths = given["cu_seq_lens_k"]
        lengths = lengths[group.layer_type] if isinstance(lengths, Mapping) else lengths
        # Of each request those that it has come first, then its new ones.
        last = on_host(lengths)[used + 1] - counts - 1
        read = on_host(read)
        before = read[last.clamp(0, len(read) - 1)] if len(read) else torch.full_like(begins, -1)
    own = on_host(tokens).view(-1)[:total]
    return Step(own, counts, begins, before, places, None, known)


def _replace(holder: Any, name: str, follow: Callable[[Callable[..., Any]], Any]) -> None:
    original = getattr(holder, name, None)
    if callable(original) and all(one[:2] != (holder, name) for one in _put):
        replacement = follow(original)
        never_compiled(replacement)
        _put.append((holder, name, vars(holder).get(name), replacement))
        setattr(holder, name, replacement)


def _places(group: Any, blocks: Any) -> torch.Tensor:
    """Return the places of blocks, [n], in order."""
    begins: torch.Tensor = on_host(blocks) * group.block_physical_stride
    return (begins[:, None] + torch.arange(group.tokens_per_page, device="cpu")).view(-1)


def _holder_of(group: Any) -> _Cache | None:
    """Return what is known of the cache that a group is the followed part of."""
    for one in list(_known.values()):
        cache = one.of()
        if cache is not None and _group(cache) is group:
            return one
    return None


def _copied(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def copy_blocks(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = _holder_of(self)
        is_current = known is not None and known.version == _version(known.of())
        result = original(self, *args, **kwargs)
        if known is not None and is_current:
            with suppress(Exception):  # the job's call is done
                sources, places = (_places(self, one) for one in [*args, *kwargs.values()][:2])
                known.slots.copy(sources, places)
                known.version = _version(known.of())
        return result

    return copy_blocks


def _restored(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def restore_scheduled_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = _known.get(id(getattr(self, "cache", None)))
        if known is None:
            return original(self, *args, **kwargs)
        is_current = known.version == _version(self.cache)
        gone = None
        with suppress(Exception):
            states = [one.state for one in [*args, *kwargs.values()][0]]
            gone = [state for state in states if state.is_cpu_offloaded]
        result = original(self, *args, **kwargs)
        try:
            group = _group(self.cache)
            for state in gone or ():
                known.slots.forget(_places(group, group.block_table.get(state.request_id, [])))
            if is_current and gone is not None:
                known.version = _version(self.cache)
        except Exception:
            gone = None
        if gone is None:
            known.slots.clear()
        return result

    return restore_scheduled_requests
