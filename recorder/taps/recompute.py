"""Which first firing one in a recomputation repeats, as activation checkpointing has it.

1. `checkpoints.look` says what is being repeated where a tap fires.
2. `Firsts.note` keeps where each first firing was: by the number of autograd's nodes so far, which
   every checkpoint that is a node has one of too, or in the checkpoint that is none.
3. `Firsts.find` gives the firing in a recomputation its first: the k-th of its tags in there is the
   k-th of them in the forward that is repeated, whatever else ran in between.
4. `Firsts.around` gives it the tags of contexts that were around that forward, and are left.
"""

from __future__ import annotations

import bisect
import itertools
import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..tags import TagValue
from .checkpoints import Again, Place, nodes_so_far

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
OTHER_TAGS = (
    "it repeats a forward in which taps of this name had other tags, so which record is its own "
    "cannot be told; let the contexts that were around that forward be around the backward too, or "
    "give their tags at the tap"
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


_NONE: tuple[list[int], list[Counted]] = ([], [])


class _Activation:
    """One run of a repeated forward: what has fired in it."""

    def __init__(self, task: int) -> None:
        self.task = task
        self.counts: dict[Counted, int] = {}
        self.around: Mapping[str, TagValue] | None = None  # not known
        self.is_begun = False
        self.fired: dict[Counted, list[tuple[int, First]]] = {}


class Firsts:
    """Where the first firings of one session were. Not thread-safe; whoever owns it locks."""

    def __init__(self) -> None:
        # Flat, `_WIDTH` numbers a firing, for each tags and thread, and in two generations.
        self._new: dict[Counted, dict[int, list[int]]] = {}
        self._old: dict[Counted, dict[int, list[int]]] = {}
        self._room = _REMEMBERED
        self._order: dict[int, tuple[list[int], list[Counted]]] = {}  # as they fired
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
        nodes = nodes_so_far()
        line += (nodes, step, occurrence)
        order = self._order.get(thread)
        if order is None:
            order = self._order[thread] = [], []
        order[0].append(nodes)
        order[1].append(counted)
        self._room -= 1
        if not self._room:
            for known in self._order.values():
                for one in known:
                    del one[:-_REMEMBERED]
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
        if found is None:
            if counted in run.fired:
                return MORE
            if self._has_other_tags(counted, inner):
                return OTHER_TAGS
        if isinstance(found, First):
            run.fired.setdefault(counted, []).append((nodes_so_far(), found))
            if place.within:
                self._enter(place, counted, found)
        return found

    def around(self, name: str, tags: str, place: Place) -> Mapping[str, TagValue]:
        """Return the tags of the contexts that were around a forward, where they are no more.

        They are those by which the first of its taps to be repeated is another. All that fired in
        it has them, but for what was given anew inside.

        Args:
            name: of a tap that fires in a recomputation.
            tags: those of its key.
            place: where it fires.
        """
        inner, *others = place.again
        run = self._activation(inner, place.task)
        if run.around is not None:
            return run.around
        if inner.checkpoint is not None:
            region = self._regions.get(inner.checkpoint)
            if region is not None and (name, tags, False) not in region:
                run.around = _left_out(name, tags, region)
        elif inner.node is not None and not run.is_begun:
            run.around = self._left_out_by_node(name, tags, inner.node)
        run.is_begun = True
        if run.around is None:
            known = (self._activations.get(_key_of(outer)) for outer in others)
            run.around = next((one.around for one in known if one and one.around), None)
        return run.around or {}

    def lacks(self, name: str, tags: str, place: Place) -> bool:
        """Whether a tap may be the repetition of one that has more tags, all else being equal."""
        again = place.again[0]
        own = _pairs(tags).items()
        return any(
            one[0] == name and own < _pairs(one[1]).items() and self._is_since(one, again)
            for one in {**self._old, **self._new}
        )

    def _left_out_by_node(self, name: str, tags: str, node: int) -> Mapping[str, TagValue] | None:
        """Return the tags that the first tap of a repetition lacks to be the first since a node."""
        nodes, fired = self._order.get(_here.number, _NONE)
        at = bisect.bisect_right(nodes, node)
        if at == len(nodes) or fired[at][0] != name:
            return None
        own, first = _pairs(tags), _pairs(fired[at][1])
        if not own.items() <= first.items():
            return None
        return {tag: json.loads(text) for tag, text in first.items() if tag not in own}

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

    def _has_other_tags(self, counted: Counted, again: Again) -> bool:
        """Whether taps of a name, and none of these tags, fired in the forward that is repeated."""
        return any(
            _is_like(one, counted) and self._is_since(one, again)
            for one in {**self._old, **self._new}
        )

    def _is_since(self, counted: Counted, again: Again) -> bool:
        """Whether a tap fired in the forward that is repeated, or since it as far as is known."""
        if again.checkpoint is not None:
            return counted in self._regions.get(again.checkpoint, {})
        node, thread = again.node, _here.number
        lines = (known.get(counted, {}).get(thread) for known in (self._old, self._new))
        return node is not None and any(
            _until(line, node) < len(line) // _WIDTH for line in lines if line is not None
        )

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


def _left_out(name: str, tags: str, region: _Region) -> dict[str, TagValue] | None:
    """Return the tags that a tap lacks to be one of a region; None where that cannot be told.

    All in the region have them: what stands around the region is in none of its taps alone.
    """
    own = _pairs(tags)
    fired = [(one, _pairs(text)) for one, text, _ in region]
    of_all = set.intersection(*(set(of.items()) for _, of in fired)) if fired else set()
    like = [of for one, of in fired if one == name and own.items() <= of.items()]
    found = {frozenset(of.items() - own.items()) for of in like}
    left = [one for one in found if one <= of_all]
    return {tag: json.loads(text) for tag, text in left[0]} if len(left) == 1 else None


def _pairs(tags: str) -> dict[str, str]:
    """Return the JSON of each tag, which tells 1, 1.0 and true apart."""
    return {tag: json.dumps(value) for tag, value in json.loads(tags).items()}


def _is_like(one: Counted, other: Counted) -> bool:
    return one[0] == other[0] and one != other


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
