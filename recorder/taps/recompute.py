"""Which first firing one in a recomputation repeats, as activation checkpointing has it.

1. `checkpoints.look` says what is being repeated where a tap fires.
2. `Firsts.note` keeps where each first firing was: by the number of autograd's nodes so far, which
   every checkpoint that is a node has one of too, or in the checkpoint that is none.
3. `Firsts.find` gives the firing in a recomputation its first: the k-th of its tags in there is the
   k-th of them in the forward that is repeated, whatever else ran in between.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

from .checkpoints import Again, Place, key_of, nodes_so_far

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
        self._since = (_here.number, nodes_so_far())

    def note(self, counted: Counted, place: Place | None, step: int, occurrence: int) -> None:
        """Remember a first firing."""
        lines = self._new.get(counted)
        if lines is None:
            lines = self._new[counted] = {}
        thread = _here.number
        line = lines.get(thread)
        if line is None:
            line = lines[thread] = []
        line += (nodes_so_far(), step, occurrence)
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
            run.fired.setdefault(counted, []).append((nodes_so_far(), found))
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
        key = key_of(again)
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
            repeating = self._activations.get(key_of(outer))
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
