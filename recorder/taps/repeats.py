"""The tags around a forward that a checkpoint repeats: the backward may run in others, or in none.

1. `follow` hears that the first session comes, and has `TAGS` tell a new `Repeats` of each context
   from then on: what holds is kept in a `_Line`, by the number of autograd's nodes so far, one for
   each thread, and one for each repetition, in which others may be made that are repeated later.
2. A checkpoint that is a node has a number, and around it was what held then. Of one that is none,
   `Repeats.see` notes that at the first context or tap inside it; where nothing was noted, the node
   in whose backward it is repeated has a number too.
3. `Repeats.again` gives a tap in a repetition these tags, and over them those of the contexts that
   the repetition itself has entered. What holds around the backward plays no part.

Of rows nothing is kept here: they go by the key that these tags make (`firsts`).
"""

from __future__ import annotations

import bisect
import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

from . import checkpoints, firing, sessions
from .around import ROWS, TAGS
from .call import Call
from .checkpoints import Place, is_of_caller, key_of, look, nodes_so_far
from .recompute import SEVERAL_THREADS
from .rows import Ids

_MOST_CHANGES = 1 << 15
"""Of what holds in a thread: at least as many of the latest are kept, at most twice as many."""
_MOST_LINES = 256

Tags = Mapping[str, Any]

LONG_AGO = (
    "it repeats a forward from before so many contexts that those around it are not known any "
    "more; give the tags at the tap"
)
UNTOLD = (
    "it repeats a forward, and which contexts were around that cannot be told from this kind of "
    "checkpoint; give the tags at the tap"
)


class _Unknown(NamedTuple):
    """Stands for tags that cannot be told."""

    reason: str


class _Where(NamedTuple):
    """Where a block is entered.

    Attributes:
        again: the repetitions that it is in.
        within: see `Place`.
    """

    again: tuple[Any, ...]
    within: tuple[Any, ...]


class _Line:
    """What held when, by the number of autograd's nodes so far.

    Args:
        before: what held before the first change.
    """

    def __init__(self, before: Tags | None) -> None:
        self.before: Tags | _Unknown | None = before
        self.numbers: list[int] = []
        self.values: list[Tags | _Unknown | None] = []

    def note(self, number: int, value: Tags | _Unknown | None) -> None:
        """Note what holds from here on."""
        if self.numbers and self.numbers[-1] == number:
            self.values[-1] = value
            return
        if len(self.numbers) >= 2 * _MOST_CHANGES:
            del self.numbers[:_MOST_CHANGES], self.values[:_MOST_CHANGES]
            self.before = _Unknown(LONG_AGO)
        self.numbers.append(number)
        self.values.append(value)

    def has(self, number: int) -> bool:
        """Whether anything changed until a node was made."""
        return bool(self.numbers) and self.numbers[0] <= number

    def at(self, number: int) -> Tags | _Unknown | None:
        """Return what held when a node was made."""
        at = bisect.bisect_right(self.numbers, number)
        return self.values[at - 1] if at else self.before


class Repeat:
    """A tap in a forward that a checkpoint repeats.

    Attributes:
        tags: those around it, but those at the tap itself.
    """

    def __init__(self, place: Place, tags: Tags | None, trouble: str) -> None:
        self.tags = tags
        self._place, self._trouble = place, trouble

    def give(self, call: Call) -> None:
        """Tell a call what is known of it."""
        call.place(lambda: self._place)
        call.trouble = self._trouble
        rows: tuple[Ids, ...] | None = ROWS.since(ROWS.below(_is_in(self._place)))
        call.own_rows = rows or ()


class Repeats:
    """What was around the forwards that may be repeated, since sessions listen. Thread-safe."""

    task = staticmethod(checkpoints.current_task)

    def __init__(self) -> None:
        self._here = threading.local()
        self._lines: OrderedDict[int, _Line] = OrderedDict()
        self._runs: OrderedDict[Any, _Line] = OrderedDict()
        self._of: weakref.WeakKeyDictionary[Any, Tags | _Unknown | None]
        self._of = weakref.WeakKeyDictionary()
        self._seen: Place | None = None
        self._lock = threading.RLock()  # a signal's handler may enter a context under it

    def found_out(self) -> _Where | None:
        """Return where a block is entered, as it is."""
        firing.repeats = self
        place = look()
        if place is None:
            return None
        self._see(place)
        return _Where(tuple(map(key_of, place.again)), place.within)

    def moved(self, before: Tags | None, now: Tags | None) -> None:
        """Note that a context is entered or left."""
        firing.repeats = self
        if self.task() != -1:
            place = look()
            if place is not None and place.again:
                self._line_of_run(place).note(nodes_so_far(), self._tags_in(place))
                return
            if not is_of_caller():
                return  # a thread of torch's own, in which no forward runs
        line: _Line | None = getattr(self._here, "line", None)
        if line is None:
            line = self._here.line = _Line(before)
            with self._lock:
                self._lines[id(line)] = line
                while len(self._lines) > _MOST_LINES:
                    self._lines.popitem(last=False)
        line.note(nodes_so_far(), now)

    def see(self, call: Call) -> None:
        """Note what is around the checkpoints whose forward a tap is in."""
        place = call.place(look)
        if place is not None:
            self._see(place)

    def again(self) -> Repeat | None:
        """Return what is known of a tap in a backward; None where nothing is repeated."""
        place = look()
        if place is None or not place.again:
            return None
        if place.within:
            self._see(place)
        found = self._tags_in(place)
        if not isinstance(found, _Unknown):
            return Repeat(place, found, "")
        return Repeat(place, TAGS.since(TAGS.below(_is_in(place))), found.reason)

    def _see(self, place: Place) -> None:
        if place is self._seen:
            return
        for reference in place.within:
            checkpoint = reference()
            if checkpoint is None or checkpoint in self._of:
                continue
            mark = TAGS.below(functools.partial(_is_within, reference))
            found: Tags | _Unknown | None = TAGS.value_at(mark)
            if place.again:  # it is made in what is repeated
                outer = self._around(place.again)
                inner = TAGS.since(TAGS.below(_is_in(place)), until=mark)
                found = outer if isinstance(outer, _Unknown) else _merged(outer, inner)
            self._of[checkpoint] = found
        self._seen = place

    def _tags_in(self, place: Place) -> Tags | _Unknown | None:
        """Return the tags that hold in what is repeated."""
        mark = TAGS.below(_is_in(place))
        outer, inner = self._around(place.again), TAGS.since(mark)
        if not place.again[0].is_unknown:
            return outer if isinstance(outer, _Unknown) else _merged(outer, inner)
        # Contexts that it entered itself cannot be told from those around it.
        now = TAGS.value_at(mark)
        is_same = isinstance(outer, _Unknown) or _same(_without(outer, inner), _without(now, inner))
        return _merged(now, inner) if is_same else _Unknown(UNTOLD)

    def _around(self, again: tuple[checkpoints.Again, ...]) -> Tags | _Unknown | None:
        """Return the tags around what is repeated, the innermost first."""
        inner, number = again[0], again[0].node
        if inner.checkpoint is not None and inner.checkpoint in self._of:
            return self._of[inner.checkpoint]
        if number is None:
            number = checkpoints.number_of_current_node()
        if number is None:
            return _Unknown(UNTOLD)
        for at, outer in enumerate(again[1:], 1):
            if outer.keeps_graph:  # in what it has computed again, the inner one was made
                line = self._runs.get(_run_of(outer))
                return line.at(number) if line and line.has(number) else self._around(again[at:])
        return self._at(number)

    def _at(self, number: int) -> Tags | _Unknown | None:
        """Return what held in the thread of a forward when a node was made."""
        line: _Line | None = getattr(self._here, "line", None)
        if line is not None:  # on a CPU it is the thread of the backward, as a rule
            return line.at(number)
        with self._lock:
            found = [line.at(number) for line in self._lines.values()]
        if is_of_caller():
            found.append(TAGS.value)
        if not found:
            return None
        if any(not _same(found[0], one) for one in found[1:]):
            return _Unknown(SEVERAL_THREADS)
        return found[0]

    def _line_of_run(self, place: Place) -> _Line:
        key = _run_of(place.again[0])
        with self._lock:
            line = self._runs.get(key)
            if line is None:
                line = self._runs[key] = _Line(None)
            self._runs.move_to_end(key)
            while len(self._runs) > _MOST_LINES:
                self._runs.popitem(last=False)
            return line


def follow(is_any: bool) -> None:
    """Have contexts noted, or no more; for `sessions.follow`.

    Args:
        is_any: whether any session is there.
    """
    noted = Repeats() if is_any else None  # what was missed meanwhile makes the old one wrong
    firing.repeats = None  # until a block is entered or left
    for stack in (TAGS, ROWS):
        stack.find_out = None if noted is None else noted.found_out
    TAGS.moved = None if noted is None else noted.moved


def _is_in(place: Place) -> Any:
    """Return what tells whether a block was entered in what is repeated."""
    key = key_of(place.again[0])
    return lambda where: where is not None and key in where.again


def _is_within(checkpoint: Any, where: _Where | None) -> bool:
    """Whether a block was entered in the forward of a checkpoint, given as a weak reference."""
    return where is not None and checkpoint in where.within


def _run_of(again: checkpoints.Again) -> Any:
    """Return what a repetition is known by, also where its backward is another frame."""
    return again.node if again.node is not None else ("", *key_of(again))


def _merged(outer: Tags | None, inner: Tags | None) -> Tags | None:
    return {**outer, **inner} if outer and inner else inner or outer


def _without(tags: Any, others: Tags | None) -> Tags:
    return {tag: one for tag, one in (tags or {}).items() if tag not in (others or ())}


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool((one or {}) == (other or {}))
    except Exception:  # tags that cannot be compared, such as tensors
        return False


sessions.follow(follow)
