"""Two grafts onto one memory in a step: tied weights, or views of one tensor, with other values.

1. `Sharing.overwrite` remembers of each graft where it wrote, and some of what it wrote there.
2. A later one whose bytes may be the same is looked at closely: where the job has not written there
   in between, by torch's count of writes and by the sample, and what the earlier one wrote is
   changed by this one, both cannot be right.

Memory is known by its storage, weakly: what is freed and used again is not the same.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
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
    sample: torch.Tensor  # as bits
    start: int  # in bytes, as the other
    end: int
    tap: str
    tensor: weakref.ref[torch.Tensor]
    of_job: int = 0  # writes in place that torch counted when it was grafted, without the grafts'


@dataclass
class _Storage:
    memory: weakref.ref[Any]
    grafted: int = 0  # writes that torch counted for the grafts onto it
    # Of one place the latest graft alone: it is the one that another would undo.
    written: dict[_Place, _Written] = field(default_factory=dict)

    def is_as_left(self, one: _Written) -> bool:
        """Whether torch counted no write of the job's since, or does not count for the tensor.

        Tensors of one memory that torch counts apart have fewer of ours.
        """
        tensor = one.tensor()
        return tensor is None or _writes(tensor) - self.grafted <= one.of_job


class Sharing:
    """What the grafts of a step wrote where. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._storages: dict[int, _Storage] = {}

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
            if known is None or known.memory() is not storage:
                known = self._storages[storage.data_ptr()] = _Storage(weakref.ref(storage))
            met = [
                (one, view)
                for one in known.written.values()
                if one.start < here.end and here.start < one.end and known.is_as_left(one)
                for view in (_view(one.place, target),)
                if torch.equal(as_bits(_sampled(view)), one.sample)
            ]
            # Of the very same place no copy is needed: it becomes what is new.
            same = [one for one, view in met if one.place == here.place and not _equal(view, new)]
            before = [(one, view, view.clone()) for one, view in met if one.place != here.place]
            writes = _writes(target)
            overwrite(target, new)
            known.grafted += _writes(target) - writes
            here.of_job = _writes(target) - known.grafted
            changed = [one for one, view, was in before if not _equal(view, was)] + same
            known.written.pop(here.place, None)
            known.written[here.place] = here
            if len(known.written) > _A_STORAGE:
                del known.written[next(iter(known.written))]
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
    sample = as_bits(_sampled(new)).clone()
    place = _Place(target.dtype, offset, shape, strides)
    return _Written(place, sample, offset * size, end, tap, weakref.ref(target))


def _writes(tensor: torch.Tensor) -> int:
    """Return how many writes in place torch counted; 0 in inference mode, which counts none."""
    return 0 if tensor.is_inference() else tensor._version


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
