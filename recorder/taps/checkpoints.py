"""Where a tap fires: in the backward of which checkpoint, or in the first forward of which.

`look` asks the autograd engine, which takes a fraction of a microsecond, and looks at the stack
only inside a backward or a checkpoint it has not seen.

Known: torch's checkpoint in both forms, and all that call it (Hugging Face, FSDP, Lightning); as
Megatron, DeepSpeed, fairscale and others write their own, an `autograd.Function` with "checkpoint"
in its name. Torch's private names, and the names inside torch's functions, are used here and in
`bits`.
"""

from __future__ import annotations

import sys
import weakref
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

nodes_so_far = torch._C._autograd._get_sequence_nr
"""Returns the number of nodes that autograd made so far in this thread."""
current_task = torch._C._current_graph_task_id
"""Returns the number of the backward that calls, -1 outside of any."""
_current_node = getattr(torch._C, "_current_autograd_node", None)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.7
_ENGINE = "_engine_run_backward"
_AUTOGRAD = ("torch.autograd", "torch._tensor")
_HOLDERS = ("checkpoint", "_checkpoint_impl")  # up to torch 2.13, and from 2.14 on


class Again(NamedTuple):
    """A checkpoint whose forward is being repeated.

    Attributes:
        at: the Python frame that repeats it, by identity.
        node: the number of its autograd node, or None where it is none.
        checkpoint: the object that torch keeps of it where it is no node; None where unknown.
        keeps_graph: whether gradients flow through what is computed again.
    """

    at: int
    node: int | None
    checkpoint: Any
    keeps_graph: bool

    @property
    def is_unknown(self) -> bool:
        """Whether nothing tells which forward is repeated."""
        return self.node is None and self.checkpoint is None


class Place:
    """Where a tap fires.

    Attributes:
        task: the backward it fires in, -1 outside of any.
        again: what is being repeated, the innermost first; empty for a first firing.
        within: checkpoints without a node whose forward this is in, as weak references, since it is
            the job's memory that they hold.
    """

    __slots__ = ("again", "task", "within")

    def __init__(self, task: int, again: tuple[Again, ...], within: tuple[Any, ...]) -> None:
        self.task, self.again, self.within = task, again, within


def look() -> Place | None:
    """Return where the tap that calls this fires; None where no checkpoint is to be seen."""
    task = current_task()
    if task == -1:
        if _top_hooks is None:
            return None
        hooks = _top_hooks(False)
        return None if hooks is None else _place_in_forward(hooks)
    again: list[Again] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name == _ENGINE and not again:
            frame = _caller_of_engine(frame)
            if frame is None or (frame.f_code.co_name == "backward" and _of_backward(frame)):
                break  # in the backward of what was repeated, in a hook as a rule
            continue
        recognise = _RECOGNISED.get(name)
        found = None if recognise is None else recognise(frame)
        if found is not None:
            again.append(found)
        frame = frame.f_back
    hooks = None if _top_hooks is None else _top_hooks(False)
    within = () if hooks is None else _place_in_forward(hooks).within
    return Place(task, tuple(again), within)


def is_in_backward() -> bool:
    """Whether the caller is called by the autograd engine, as what a checkpoint repeats is."""
    return current_task() != -1


def is_of_caller() -> bool:
    """Whether this thread has called for a backward, and is none of the engine's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != _ENGINE:
        frame = frame.f_back
    return frame is not None


def number_of_current_node() -> int | None:
    """Return the number of the node in whose backward this is, None where it cannot be told."""
    return None if _current_node is None else _number(_current_node())


def key_of(again: Again) -> tuple[int, int | None, int]:
    """Return what tells a repetition from others for as long as it runs."""
    return again.at, again.node, id(again.checkpoint)


def _caller_of_engine(frame: FrameType | None) -> FrameType | None:
    """Return the frame that called for a backward, which is none of torch's own."""
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_AUTOGRAD):
        frame = frame.f_back
    return frame


def checkpoints_around() -> list[Any]:
    """Return torch's objects of the checkpoints without a node whose forward this is in."""
    hooks = None if _top_hooks is None else _top_hooks(False)
    pack = None if hooks is None else hooks[0]
    found = [_checkpoint_of(pack)] if _is_checkpoint_s(pack) else []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _HOLDERS:
            generator = frame.f_locals.get("gen")
            inner = getattr(generator, "gi_frame", None)
            checkpoint = inner.f_locals.get("new_frame") if inner is not None else None
            if checkpoint is not None and checkpoint not in found:
                found.append(checkpoint)
        frame = frame.f_back
    return found


def repeat_to_the_end() -> None:
    """Let the checkpoints that a graft happens in be repeated to their end.

    They stop once every saved tensor is there: a tap after the last of them would not fire again,
    and the backward would use what was computed, not what was grafted.
    """
    for checkpoint in checkpoints_around():
        if getattr(checkpoint, "early_stop", False):
            checkpoint.early_stop = False


_latest: tuple[Any, Place] = (lambda: None, Place(-1, (), ()))
_cells: dict[CodeType, int] = {}


def _place_in_forward(hooks: Any) -> Place:
    """Return the place of a tap whose saved tensors go to these hooks."""
    global _latest
    pack = hooks[0]
    latest, place = _latest  # most taps come several to a checkpoint
    if latest() is pack:
        return place
    place = Place(-1, (), tuple(map(weakref.ref, checkpoints_around())))
    if _is_checkpoint_s(pack):  # and no hook of the job's own, such as those that offload
        _latest = weakref.ref(pack), place
    return place


def _is_checkpoint_s(pack: Any) -> bool:
    """Whether a function packs for a checkpoint, whose object it has in a cell."""
    code = getattr(pack, "__code__", None)
    if code is None:
        return False
    if code not in _cells:
        names = code.co_freevars
        is_one = code.co_name == "pack_hook" and "frame" in names
        _cells[code] = names.index("frame") if is_one else -1
    return _cells[code] >= 0


def _checkpoint_of(pack: Any) -> Any:
    return pack.__closure__[_cells[pack.__code__]].cell_contents


def _of_unpacking(frame: FrameType) -> Again | None:
    checkpoint = frame.f_locals.get("frame")
    if not callable(getattr(checkpoint, "recompute_fn", None)):
        return None
    # Up to torch 2.8 its inputs were saved by a node, made before its forward began.
    saver = getattr(getattr(checkpoint, "input_saver", None), "grad_fn", None)
    node = None if saver is None else _number(saver)
    is_known = node is not None or _top_hooks is None
    return Again(id(frame), node, None if is_known else checkpoint, keeps_graph=False)


def _of_backward(frame: FrameType) -> Again | None:
    code = frame.f_code
    node = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if "checkpoint" not in type(node).__name__.lower():
        return None
    number = _number(node)
    return None if number is None else Again(id(frame), number, None, keeps_graph=True)


def _of_output_hook(frame: FrameType) -> Again | None:
    """Megatron's checkpoint whose output is freed and made again by a hook on what follows."""
    checkpoint = frame.f_locals.get("self")
    if "checkpoint" not in type(checkpoint).__name__.lower():
        return None
    return Again(id(frame), _number(getattr(checkpoint, "ctx", None)), None, keeps_graph=True)


def _of_unknown(frame: FrameType) -> Again | None:
    return Again(id(frame), None, None, keeps_graph=False)


def _number(node: Any) -> int | None:
    try:
        return int(node._sequence_nr())
    except (AttributeError, TypeError, RuntimeError):
        return None


_RECOGNISED = {
    "unpack_hook": _of_unpacking,  # torch, Transformer Engine
    "backward": _of_backward,
    "_recompute": _of_output_hook,
    "checkpoint_unpack": _of_unknown,  # DeepSpeed, without a node
}
