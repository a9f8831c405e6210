"""Grafts that nobody sees: onto a tensor that was made for the tap, and dropped as it returned.

1. `watch` looks, before the tap returns, whether its result is thrown away by the very next thing
   its caller does, and whether the tensor has memory of its own. Both are so for
   `tap("kv", cache[slots])`; neither alone says anything.
2. If the tensor is freed right there, nobody had it: no variable, no list, no view, no graph.
   Anything else that frees it, later or elsewhere, says nothing.

What the tap's callable made is the same where it is freed as the tap lets go of it.
"""

from __future__ import annotations

import dis
import functools
import sys
import weakref
from collections.abc import Callable
from types import CodeType, FrameType

import torch

from recorder.bits import owns_memory
from recorder.taps.call import Call
from recorder.taps.tap import tap

_POP, _CACHE = dis.opmap["POP_TOP"], dis.opmap.get("CACHE")
_RETURN = dis.opmap["RETURN_VALUE"]
FREED = (
    "nobody kept the tensor, which was freed as soon as the tap at {site} returned; "
    "tap the tensor that is used on, or use what tap returns"
)
OF_CALLABLE = (
    "nobody has what the callable of the tap at {site} made, which was freed as soon as it was "
    "grafted; tap the tensor itself that is used on, and use what tap returns"
)
_UNIT = 2  # bytes of an instruction
_MOST_WRAPPERS = 4


def watch(
    call: Call, value: torch.Tensor, target: torch.Tensor, freed: Callable[[], None]
) -> weakref.ref[torch.Tensor] | None:
    """Have `freed` called if a grafted tensor is freed as soon as its tap returns.

    Args:
        call: the tap.
        value: what stands there.
        target: the tensor that was overwritten.
        freed: called at most once, in the middle of the job.

    Returns:
        What does the watching, as long as it is kept; None where the tensor is seen in any case.
    """
    if target is not value or not owns_memory(target):
        return None
    if call.is_made_here:
        return weakref.ref(value, lambda _: freed() if _is_forgotten() else None)
    place = _thrown_away()
    if place is None:
        return None
    frame, at = place
    return weakref.ref(value, lambda _: freed() if _is_at(frame, at) else None)


def _thrown_away() -> tuple[int, int] | None:
    """Return the frame, by identity, and the instruction that throw away what the tap returns."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not tap.__code__:
        frame = frame.f_back
    for _ in range(_MOST_WRAPPERS):
        frame = None if frame is None else frame.f_back
        if frame is None:
            return None
        at, operation = _next(frame.f_code, frame.f_lasti)
        if operation == _POP:
            return id(frame), at
        if operation != _RETURN:  # a function that hands it on does nothing with it itself
            return None
    return None


@functools.lru_cache(1024)
def _next(code: CodeType, at: int) -> tuple[int, int]:
    """Return where the instruction after one is, and which it is."""
    instructions = code.co_code
    at += _UNIT
    while at < len(instructions) and instructions[at] == _CACHE:
        at += _UNIT
    return at, instructions[at] if at < len(instructions) else -1


def _is_at(frame: int, at: int) -> bool:
    """Whether the function in which a tensor was just freed is at this instruction."""
    here = _freeing()
    return here is not None and id(here) == frame and here.f_lasti == at


def _is_forgotten() -> bool:
    """Whether a tensor was just freed as the tap let go of what its callable had made."""
    here = _freeing()
    return here is not None and here.f_code is Call.forget.__code__


def _freeing() -> FrameType | None:
    """Return the frame under those of the callback; None where there is none, as at the end."""
    try:
        return sys._getframe(3)
    except (ValueError, AttributeError):
        return None
