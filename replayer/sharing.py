"""Two grafts onto one memory in a step: tied weights, or views of one tensor, with other values.

1. `Sharing.overwrite` remembers of each graft where it wrote, and some of what it wrote there.
2. A later one whose bytes may be the same is looked at closely: where the job has not written there
   in between, and what the earlier one wrote is changed by this one, both cannot be right.

Memory is known by its storage, weakly: what is freed and used again is not the same.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from recorder.bits import as_bits, has_statistics

from .graft import overwrite

_SAMPLES = 64
_A_STORAGE = 64  # grafts remembered: a cache is one storage, and sees no end of them


class _Place(NamedTuple):
    dtype: torch.dtype
    offset: int  # in elements, as the other two
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class _Written:
    place: _Place
    sample: torch.Tensor
    start: int  # in bytes, as the other
    end: int
    tap: str
    tensor: weakref.ref[torch.Tensor]
    version: int | None = None  # torch's count of writes in place, as the grafts left it

    def is_counted_untouched(self) -> bool:
        """Whether torch counted no write but ours, or does not count for it."""
        tensor = self.tensor()
        return tensor is None or self.version is None or _version(tensor) == self.version

    def count(self) -> None:
        """Take the writes so far for ours."""
        tensor = self.tensor()
        self.version = None if tensor is None else _version(tensor)


class Sharing:
    """What the grafts of a step wrote where. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Of one place the latest graft alone: it is the one that another would undo.
        self._storages: dict[int, tuple[weakref.ref[Any], dict[_Place, _Written]]] = {}

    def next_step(self) -> None:
        """Forget what was written."""
        with self._lock:
            self._storages.clear()

    def overwrite(self, target: torch.Tensor, new: torch.Tensor, tap: str) -> str:
        """Copy `new` over `target`, as `graft.overwrite`.

        Args:
            target: the receiver's tensor.
            new: of its shape, dtype and device.
            tap: what is grafted, for messages.

        Returns:
            Whose values this changed, as a note; "" where nobody's.
        """
        if target.numel() == 0 or not has_statistics(target.dtype):
            overwrite(target, new)
            return ""
        with self._lock, torch.no_grad():
            here = _written(target, new, tap)
            storage = target.untyped_storage()
            known = self._storages.get(storage.data_ptr())
            if known is None or known[0]() is not storage:
                known = self._storages[storage.data_ptr()] = weakref.ref(storage), {}
            untouched = [one for one in known[1].values() if one.is_counted_untouched()]
            before = [
                (one, view, view.clone())
                for one in untouched
                if one.start < here.end and here.start < one.end
                for view in (_view(one.place, target),)
                if _equal(_sampled(view), one.sample)
            ]
            overwrite(target, new)
            changed = [one for one, view, was in before if not _equal(view, was)]
            known[1].pop(here.place, None)
            known[1][here.place] = here
            for one in (*untouched, here):
                one.count()
            if len(known[1]) > _A_STORAGE:
                del known[1][next(iter(known[1]))]
        if not changed:
            return ""
        return (
            f"it changes what tap {changed[-1].tap} was given in this step: both lie in one memory "
            "(tied weights, or views of one tensor), with other values; graft one of them"
        )


def _written(target: torch.Tensor, new: torch.Tensor, tap: str) -> _Written:
    size, shape, strides = target.element_size(), tuple(target.shape), target.stride()
    offset = int(target.storage_offset())
    if target.is_contiguous():
        reach = target.numel()
    else:
        reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    end = (offset + reach) * size
    sample = _sampled(new).clone()
    place = _Place(target.dtype, offset, shape, strides)
    return _Written(place, sample, offset * size, end, tap, weakref.ref(target))


def _version(tensor: torch.Tensor) -> int | None:
    try:
        return tensor._version
    except RuntimeError:  # of inference mode, which counts nothing
        return None


def _view(one: _Place, target: torch.Tensor) -> torch.Tensor:
    """Return what an earlier graft wrote to, of the target's storage."""
    view = torch.empty(0, dtype=one.dtype, device=target.device)
    return view.set_(target.untyped_storage(), one.offset, one.shape, one.strides)


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    """Return some elements, the same of equal shapes, whatever their strides."""
    some = tensor.detach()
    while some.dim() > 1:
        some = some.diagonal() if some.shape[0] > 1 else some[0]
    return some[:: -(-len(some) // _SAMPLES) or 1] if some.dim() else some


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(as_bits(one), as_bits(other))
