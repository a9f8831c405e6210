"""Which firings are in a forward that activation checkpointing repeats, and what they repeat.

1. `look` says where a tap fires: in the backward of which checkpoint, or in the first forward of
   which. It asks the autograd engine, which takes a fraction of a microsecond, and looks at the
   stack only inside a backward or a checkpoint it has not seen.
2. `Firsts.note` keeps where each first firing was: by the number of autograd's nodes so far, which
   every checkpoint that is a node has one of too, or in the checkpoint that is none.
3. `Firsts.find` gives the firing in a recomputation its first: the k-th of its tags in there is the
   k-th of them in the forward that is repeated, whatever else ran in between.

Known: torch's checkpoint in both forms, and all that call it (Hugging Face, FSDP, Lightning); as
Megatron, DeepSpeed, fairscale and others write their own, an `autograd.Function` with "checkpoint"
in its name. Torch's private names, and the names inside torch's functions, are used here and in
`bits`.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import OrderedDict
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

_task = torch._C._current_graph_task_id
_nodes_so_far = torch._C._autograd._get_sequence_nr
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.7

_REMEMBERED = 1 << 17
"""First firings, of all tags together: at least as many of the latest, at most twice as many."""
_ACTIVATIONS = 256
_WIDTH = 3  # numbers kept of a first firing: nodes so far, step, occurrence


class _Here(threading.local):
    """What tells this thread from all others, ended ones included, whose idents come again."""

    numbers = itertools.count()

    def __init__(self) -> None:
        self.number = next(self.numbers)


_here = _Here()

Counted = tuple[str, str, bool]
"""What is counted together: a name, the tags of the key, and False, since it is a first forward."""

UNSEEN = (
    "it repeats a forward in which no tap of these tags was seen, so which record is its own "
    "cannot be told; begin the session before that forward"
)
MORE = (
    "the forward that it repeats fired fewer taps of these tags, so which record is its own cannot "
    "be told; make both runs of a checkpointed function the same"
)
IN_ORDER = (
    "it repeats one of several forwards, and which cannot be told from this kind of checkpoint: "
    "the first to be repeated counts as the first; tag micro-batches apart"
)


SEVERAL_THREADS = (
    "it repeats a forward of one of several threads, and which cannot be told; tag what each of "
    "them runs apart, as in context(micro_batch=i)"
)


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
    task = _task()
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


_ENGINE = "_engine_run_backward"


def _caller_of_engine(frame: FrameType | None) -> FrameType | None:
    """Return the frame that called for a backward, which is none of torch's own."""
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_AUTOGRAD):
        frame = frame.f_back
    return frame


_AUTOGRAD = ("torch.autograd", "torch._tensor")
_HOLDERS = ("checkpoint", "_checkpoint_impl")  # up to torch 2.13, and from 2.14 on


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


class First(NamedTuple):
    """The first firing that a recomputation repeats: its step and occurrence."""

    step: int
    occurrence: int


_Region = dict[Counted, list[tuple[int, int]]]


class _Activation:
    """One run of a repeated forward: what has fired in it."""

    def __init__(self, task: int) -> None:
        self.task = task
        self.counts: dict[Counted, int] = {}
        self.fired: dict[Counted, list[tuple[int, First]]] = {}


class Firsts:
    """Where the first firings of one session were. Not thread-safe; whoever owns it locks."""

    def __init__(self) -> None:
        # Flat, `_WIDTH` numbers a firing, for each tags and thread, and in two generations.
        self._new: dict[Counted, dict[int, list[int]]] = {}
        self._old: dict[Counted, dict[int, list[int]]] = {}
        self._room = _REMEMBERED
        self._claims: dict[tuple[Counted, First], int | None] = {}
        self._regions: weakref.WeakKeyDictionary[Any, _Region] = weakref.WeakKeyDictionary()
        self._latest: tuple[Place | None, list[_Region]] = (None, [])
        self._activations: OrderedDict[Any, _Activation] = OrderedDict()
        self._unlinked: dict[tuple[int, Counted], int] = {}
        self._since = (_here.number, -1)

    def begin(self) -> None:
        """Note that no forward was seen before now; else every one was."""
        self._since = (_here.number, _nodes_so_far())

    def note(self, counted: Counted, place: Place | None, step: int, occurrence: int) -> None:
        """Remember a first firing."""
        lines = self._new.get(counted)
        if lines is None:
            lines = self._new[counted] = {}
        thread = _here.number
        line = lines.get(thread)
        if line is None:
            line = lines[thread] = []
        line += (_nodes_so_far(), step, occurrence)
        self._room -= 1
        if not self._room:
            self._old, self._new, self._room = self._new, {}, _REMEMBERED
            self._claims.clear()
        if place is not None and place.within:
            self._enter(place, counted, (step, occurrence))

    def find(self, counted: Counted, place: Place, step: int, so_far: int) -> First | str | None:
        """Return the firing that one in a recomputation repeats.

        Args:
            counted: its name and tags.
            place: where it fires; something is repeated there.
            step: the step that it fires in.
            so_far: how many first firings of these tags there were in this step.

        Returns:
            That firing; a reason where it cannot be told; None where such tags fire in backwards
            alone, so that this is a first firing.
        """
        inner = place.again[0]
        run = self._activation(inner, place.task)
        k = run.counts.get(counted, 0)
        run.counts[counted] = k + 1
        if inner.checkpoint is not None:
            found = self._by_region(counted, inner.checkpoint, k)
        elif inner.node is not None:
            found = self._by_node(counted, place, inner.node, k)
        else:
            found = self._in_order(counted, step, so_far)
        if found is None and counted in run.fired:
            return MORE
        if isinstance(found, First):
            run.fired.setdefault(counted, []).append((_nodes_so_far(), found))
            if place.within:
                self._enter(place, counted, found)
        return found

    def _enter(self, place: Place, counted: Counted, first: tuple[int, int]) -> None:
        latest, regions = self._latest
        if latest is not place:
            regions = []
            for reference in place.within:
                checkpoint = reference()
                if checkpoint is not None:
                    region = self._regions.get(checkpoint)
                    if region is None:
                        region = self._regions[checkpoint] = {}
                    regions.append(region)
            self._latest = place, regions
        for region in regions:
            fired = region.get(counted)
            if fired is None:
                fired = region[counted] = []
            fired.append(first)

    def _activation(self, again: Again, task: int) -> _Activation:
        key = _key_of(again)
        found = self._activations.get(key)
        if found is None or task != found.task:  # a frame may lie where another did
            found = self._activations[key] = _Activation(task)
            while len(self._activations) > _ACTIVATIONS:
                self._activations.popitem(last=False)
        self._activations.move_to_end(key)
        return found

    def _by_region(self, counted: Counted, checkpoint: Any, k: int) -> First | str | None:
        region = self._regions.get(checkpoint)
        if region is None:
            return UNSEEN
        fired = region.get(counted, [])
        return First(*fired[k]) if k < len(fired) else None

    def _by_node(self, counted: Counted, place: Place, node: int, k: int) -> First | str | None:
        inner, *others = place.again
        # A checkpoint inside another's may have been made when that was repeated.
        for outer in others:
            repeating = self._activations.get(_key_of(outer))
            fired = [] if repeating is None else repeating.fired.get(counted, [])
            after = [first for start, first in fired if start > node]
            if k < len(after):
                return after[k]
        started_by, since = self._since
        lines = [*self._old.get(counted, {}).items(), *self._new.get(counted, {}).items()]
        found: dict[int, tuple[list[int], int]] = {}
        for thread in {thread for thread, _ in lines}:
            left = k
            for line in (line for other, line in lines if other == thread):
                before, size = _until(line, node), len(line) // _WIDTH
                if before + left < size:
                    found[thread] = line, before + left
                    break
                left -= size - before
        # On a CPU a backward runs in the thread that calls it, as a rule that of the forward.
        thread = _here.number if _here.number in found else next(iter(found), -1)
        if not found or (thread == started_by and node < since):
            return UNSEEN if node < since else None
        if thread != _here.number and len(found) > 1:
            return SEVERAL_THREADS
        return self._claimed(counted, *found[thread], inner)

    def _claimed(self, counted: Counted, line: list[int], at: int, by: Again) -> First | str:
        """Return a first firing, unless another checkpoint of the kind has repeated it already."""
        first = First(*line[at * _WIDTH + 1 : at * _WIDTH + 3])
        # Each of this kind stands alone in its first forward.
        is_alone = by.keeps_graph and by.node is not None
        if is_alone and self._claims.setdefault((counted, first), by.node) != by.node:
            return UNSEEN
        return first

    def _in_order(self, counted: Counted, step: int, so_far: int) -> First | str:
        key = (step, counted)
        at = self._unlinked.get(key, 0)
        if at >= so_far:
            return UNSEEN
        if len(self._unlinked) > _REMEMBERED:
            self._unlinked.clear()
        self._unlinked[key] = at + 1
        return First(step, at)


def _key_of(again: Again) -> tuple[int, int | None, int]:
    return again.at, again.node, id(again.checkpoint)


def _until(line: list[int], node: int) -> int:
    """Return how many firings of a line were before a node was made."""
    low, high = 0, len(line) // _WIDTH
    while low < high:
        middle = (low + high) // 2
        if line[middle * _WIDTH] > node:
            high = middle
        else:
            low = middle + 1
    return low
