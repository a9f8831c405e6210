"""The pasts of transformers' caches, each known by the tensor that the cache has of its keys.

1. `note` says, as a call ends, which past the keys now stand for; they are held weakly.
2. `past_of` finds it again as the next call begins. Keys that nobody knows, such as those of a
   cache that something else wrote to, are held against those that are known: a copy is as good.
3. What takes a cache's rows or columns away (beams, rejected drafts) is put in front of the cache's
   own methods by `watch`, so that the past goes along.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..bits import never_compiled
from .calls import whole
from .past import Past

_OPERATIONS = (
    "reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset"
)  # fmt: skip
_MOST_COMPARED = 8

_lock = threading.RLock()
_known: dict[int, _Noted] = {}
_watched: dict[type, list[tuple[str, Any, Callable[..., Any]]]] = {}


@dataclass(frozen=True)
class _Noted:
    """What some keys stand for, and as of which change to them."""

    keys: weakref.ref[torch.Tensor]
    version: int | None
    past: Callable[[], Past]


def _layer_of(cache: Any) -> Any:
    """Return the last layer that has keys, which all that is in front of it has a part in."""
    for layer in reversed(getattr(cache, "layers", None) or ()):
        if isinstance(getattr(layer, "keys", None), torch.Tensor):
            return layer
    return None


def _keys_of(cache: Any) -> torch.Tensor | None:
    layer = _layer_of(cache)
    if layer is not None:
        return layer.keys  # type: ignore[no-any-return]
    found = getattr(cache, "key_cache", None)  # as up to transformers 4.53
    if isinstance(cache, (list, tuple)) and cache:  # a pair for each layer, as up to 4.47
        found = [pair[0] for pair in cache if isinstance(pair, (list, tuple)) and pair]
    if isinstance(found, list) and found and isinstance(found[-1], torch.Tensor):
        return found[-1]
    return None


def length_of(cache: Any) -> int | None:
    """Return how many columns a cache has; None where it does not say."""
    if isinstance(cache, (list, tuple)):
        keys = _keys_of(cache)
        return 0 if keys is None else int(keys.shape[-2])
    try:
        return whole(cache.get_seq_length())
    except Exception:  # of a kind without sequences, or not begun
        return None


def note(cache: Any, past: Callable[[], Past]) -> None:
    """Say what a cache's keys stand for from now on."""
    keys = _keys_of(cache)
    if keys is None:
        return
    _note(keys, past)
    layer = _layer_of(cache)
    if layer is not None:
        _watch(type(layer))


def past_of(cache: Any, length: int) -> Past | None:
    """Return what a cache holds, of so many columns; None where that is not known."""
    keys = _keys_of(cache)
    if keys is None:
        return None
    found = _past_of(keys) or _copied(keys)
    return found if found is not None and found.length == length else None


def leave() -> None:
    """Leave the classes of caches as they were, and forget all."""
    with _lock:
        _known.clear()
        for kind, put in _watched.items():
            for name, given, replacement in put:
                if vars(kind).get(name) is replacement:
                    if given is None:
                        delattr(kind, name)
                    else:
                        setattr(kind, name, given)
        _watched.clear()


def _version(keys: torch.Tensor) -> int | None:
    return None if keys.is_inference() else int(keys._version)


def _note(keys: torch.Tensor, past: Callable[[], Past]) -> None:
    key = id(keys)

    def gone(ref: weakref.ref[torch.Tensor]) -> None:
        with _lock:
            if key in _known and _known[key].keys is ref:
                del _known[key]

    with _lock:
        _known[key] = _Noted(weakref.ref(keys, gone), _version(keys), past)


def _forget(keys: torch.Tensor) -> None:
    with _lock:
        _known.pop(id(keys), None)


def _past_of(keys: torch.Tensor) -> Past | None:
    with _lock:
        found = _known.get(id(keys))
    if found is None or found.keys() is not keys or found.version != _version(keys):
        return None
    return found.past()


def _copied(keys: torch.Tensor) -> Past | None:
    """Return the past of keys that these are a copy of, as of a prompt that others begin with."""
    with _lock:
        every = list(_known.values())[::-1]
    alike = (
        (noted, other)
        for noted in every
        if (other := noted.keys()) is not None
        and other is not keys
        and other.shape == keys.shape
        and other.dtype == keys.dtype
        and other.device == keys.device
        and noted.version == _version(other)
    )
    for (noted, other), _ in zip(alike, range(_MOST_COMPARED), strict=False):
        if keys.numel() and torch.equal(keys, other):
            return noted.past()
    return None


def _watch(kind: type) -> None:
    """Have the past of a kind of cache's layers go along with what is done to them."""
    if kind in _watched:
        return
    with _lock:
        put = _watched.setdefault(kind, [])
        for name in () if put else _OPERATIONS:
            original = getattr(kind, name, None)
            if not callable(original):
                continue
            replacement = _followed(name, original)
            put.append((name, vars(kind).get(name), replacement))
            setattr(kind, name, replacement)


def _followed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = getattr(self, "keys", None)
        past = None
        if isinstance(before, torch.Tensor) and before.numel():
            with suppress(Exception):  # of the job's call nothing is to fail
                past = _past_of(before) or _copied(before)
        result = original(self, *args, **kwargs)
        if isinstance(before, torch.Tensor):
            _forget(before)
        keys = getattr(self, "keys", None)
        if past is not None and isinstance(keys, torch.Tensor):
            with suppress(Exception):  # the job's call is done, and what is not known has no ids
                changed = _changed(past, name, [*args, *kwargs.values()], self)
                if changed is not None:
                    _note(keys, lambda: changed)
        return result

    never_compiled(method)
    return method


def _changed(past: Past, name: str, given: list[Any], layer: Any) -> Past | None:
    """Return what a past becomes by what was done to the layer that it is of; None if unknown."""
    if name == "reset":
        return None
    length = whole(layer.get_seq_length())
    if length is None or length > past.length:
        return None
    past = past.cut(length)
    if name in ("reorder_cache", "batch_select_indices"):
        rows = torch.as_tensor(given[0]).detach().cpu()
        return past.chosen(rows if rows.dtype == torch.bool else rows.to(torch.int64))
    if name == "batch_repeat_interleave":
        return past.chosen(torch.arange(past.rows, device="cpu").repeat_interleave(int(given[0])))
    return past
