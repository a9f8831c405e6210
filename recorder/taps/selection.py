"""Which taps a session wants, and the key of each: shared by recording and replaying.

`Selection.select` cleans a call's tags, asks the filter (once per distinct tags, unless the filter
reads the step), and counts the occurrence; that of a forward repeated by activation checkpointing
is that of its first. It also remembers what it saw, so that a filter that selected nothing can say
why.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import tags as tagging
from ..errors import BadTag, FilterError
from ..filters import Filter
from ..tags import MOST_TAG_BYTES, PART, RECOMPUTE, Key, TagValue
from . import repeats  # noqa: F401  # knows the tags of what is repeated, once it is imported
from .call import Call
from .checkpoints import Place, look
from .recompute import IN_ORDER, First, Firsts
from .values import classify

THREADS = (
    "several threads tap it in one step, so which firing is which occurrence is by chance; tag "
    "them apart, as in context(micro_batch=i)"
)
SWITCHED = (
    "graft ctl switched it in the middle of step {step}, so occurrences there need not be those of "
    "another rank or run; begin another step, while nothing is tapped, with: graft ctl RUN step"
)
GONE = (
    "its step {step} ended many steps ago, so its occurrence there is not known any more; "
    "dump what belongs to one step together"
)
_CACHED = 100_000
_MOST_STEPS = 64
"""In which taps are counted at a time, where the program says to which step a tap belongs."""
_NAMES_KEPT = 2_000
_PLAIN = frozenset({str, int, float, bool, type(None)})

_Counted = tuple[str, str, bool]
"""What is counted together: a name, the tags of the key, whether it is a second forward."""


@dataclass(slots=True)  # frozen, one takes three times as long to make
class _Site:
    """What is fixed for equal tags."""

    tags: dict[str, TagValue]
    text: str
    key_text: str
    recompute: bool
    counted: _Counted
    wanted: bool | None  # None: depends on the step or the kind


class Selected(NamedTuple):
    """A tap that the session wants.

    Attributes:
        key: its key; `recompute` is no part of it.
        tags: all its tags but the name.
        text: the canonical JSON of `tags`.
        recompute: whether this is a second forward.
        seq: its position in execution order on this rank.
        forward: whether the tapped value itself is wanted.
        grad: whether its gradient is wanted.
        note: what to know of how its key was found, "" where there is nothing.
        trouble: why its key cannot be told, so that nothing is to be done with it; "" where it can.
    """

    key: Key
    tags: dict[str, TagValue]
    text: str
    recompute: bool
    seq: int
    forward: bool
    grad: bool
    note: str = ""
    trouble: str = ""


def about_note(call: Call, selected: Selected) -> tuple[str, ...]:
    """Return what a note is about: of a switch, all taps of its step."""
    is_of_all = selected.note == SWITCHED.format(step=selected.key.step)
    return (selected.note,) if is_of_all else (call.shown, selected.note)


def part_of(selected: Selected, number: int) -> Selected:
    """Return what a part of the gradient is selected as: the first as the whole would be."""
    if number == 0:
        return selected
    tags = {**selected.tags, PART: number}
    key = selected.key._replace(tags=tagging.key_tags(tags))
    return selected._replace(key=key, tags=tags, text=tagging.canonical(tags))


class _Env(dict[str, Any]):
    """What a filter sees of a tap; its kind is found out only if asked for."""

    def __init__(self, tags: dict[str, Any], call: Call) -> None:
        super().__init__(tags)
        self._call = call

    def get(self, name: str, default: Any = None) -> Any:
        """Return a tag's value, None where the tap does not carry it."""
        if name == "kind":  # may call the tap's callable
            return "tensor" if classify(self._call.value()) == "tensor" else "value"
        return super().get(name, default)


class Selection:
    """The taps of one rank as one session sees them. Thread-safe."""

    def __init__(
        self,
        filter: Filter | None,
        on_unwanted: Callable[[Call, Key], None] = lambda call, key: None,
    ) -> None:
        self.filter = filter
        self._on_unwanted = on_unwanted
        self.step = 0
        self.selected = 0
        self.names_seen: set[str] = set()
        self.tags_seen: set[str] = set()
        self.refused = 0
        self._seq = 0
        self._sites: dict[Any, _Site] = {}
        self.ignored: set[Any] = set()
        self._rank: int | None = None
        self._counts: Counter[_Counted] = Counter()
        # Of the latest steps, as they were used: the session's own, and those that taps name.
        self._counts_in: OrderedDict[int, Counter[_Counted]] = OrderedDict({0: self._counts})
        self._is_step_given = False
        self._gone: set[int] = set()
        self._firsts = Firsts()
        self._threads: dict[tuple[str, str, bool], int] = {}
        self._lock = threading.RLock()  # a signal's handler may tap, or end a step, under it
        self._switched = -1
        self._read_filter()

    def _read_filter(self) -> None:
        names = frozenset() if self.filter is None else self.filter.names
        self._late = bool(names & {"step", "kind"})
        self._splits = RECOMPUTE in names

    def switch(self, filter: Filter | None, missed: bool) -> bool:
        """Take another filter; return whether it is another.

        Args:
            filter: what is wanted from now on.
            missed: whether taps of this step may have been missed.
        """
        with self._lock:
            if missed:
                self._switched = self.step
                self._firsts.begin()
            if filter == self.filter:
                return False
            self.filter = filter
            self._read_filter()
            self._sites.clear()
            self.ignored.clear()
            return True

    def begin(self) -> None:
        """Note that the job was under way before: forwards may be repeated that nobody saw."""
        self._firsts.begin()

    def next_step(self) -> None:
        """Begin the next step: occurrences count from 0 again."""
        with self._lock:
            self.step += 1
            self._gone.discard(self.step)
            self._counts = self._counts_of(self.step)
            if not self._is_step_given:
                self._counts_in = OrderedDict({self.step: self._counts})
            self._threads.clear()

    def repeats(self) -> int:
        """Return how often each of several taps came in the first step, the only one; 0 if not so.

        More than once, they are iterations whose end nobody told, or so it seems.
        """
        with self._lock:
            counts = {*self._counts.values()}
            is_so = self.step == 0 and len(self._counts) > 1 and len(counts) == 1
            return counts.pop() if is_so else 0

    def next_seq(self) -> int:
        """Return the next position in execution order."""
        with self._lock:
            self._seq += 1
            return self._seq - 1

    def select(self, call: Call, rank: int) -> Selected | None:
        """Return the tap's key if it is wanted.

        Raises:
            BadTag: the call has a tag that cannot be part of a key.
            FilterError: the filter compares what cannot be compared.
        """
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise BadTag(
                "it is tapped in the middle of another tap, by a signal's handler or a finalizer"
            )
        place = call.place(look)
        again = place is not None and bool(place.again)
        site = self._site(call, rank, again)
        if site.wanted is False:
            if self._splits and not again:  # its repetition may be wanted, and is told apart by it
                with self._lock:
                    self._count_unwanted(call, site, place)
            return None
        own = self.step if call.step is None else call.step
        step, occurrence, note, trouble = own, 0, "", ""
        if again and place is not None:  # it is wanted, or not, as of its first
            plain = self._site(call, rank, False)
            with self._lock:
                first, note, trouble, is_second = self._repeated(call, plain, place)
            site = site if is_second else plain
            step, occurrence = first
        forward, grad = call.forward, True
        wants = self.filter  # it may be switched meanwhile
        if site.wanted is None and wants is not None:
            env = {**site.tags, "name": call.name, "step": step, "rank": rank}
            forward = call.forward and wants(_Env(env, call))
            if call.grad:
                grad = wants({**env, "kind": "grad"})
            if not forward and not (grad and call.grad):
                if not again:
                    with self._lock:  # of one key, it may want some taps and not others
                        self._count_unwanted(call, site, place)
                return None
        if place is not None and place.again and not place.again[0].keeps_graph:
            grad = False  # it comes by way of the first forward
        with self._lock:
            if not again:
                occurrence = self._count(call, site, place)
                if self._is_another_thread_s(call, site, place):
                    note = THREADS
            seq = self._seq
            self._seq += 1
            self.selected += 1
            key = Key(call.name, site.key_text, step, occurrence)
            if step == self._switched:
                note = note or SWITCHED.format(step=step)
        return Selected(
            key,
            site.tags,
            site.text,
            site.recompute,
            seq,
            forward,
            grad and call.grad,
            note,
            trouble,
        )

    def _count_unwanted(self, call: Call, site: _Site, place: Place | None) -> None:
        """Count a tap that is not wanted; tell of it where its repetition may be."""
        occurrence = self._count(call, site, place)
        if self._splits and not site.recompute:
            step = self.step if call.step is None else call.step
            self._on_unwanted(call, Key(call.name, site.key_text, step, occurrence))

    def _count(self, call: Call, site: _Site, place: Place | None) -> int:
        """Return the next occurrence of these tags."""
        counted = site.counted
        step, counts = self.step, self._counts
        if call.step is not None:
            step, self._is_step_given = call.step, True
            counts = self._counts_of(step)
        occurrence = counts.get(counted, 0)
        counts[counted] = occurrence + 1
        if not (site.recompute or (place is not None and place.again)):
            self._firsts.note(counted, place, step, occurrence)
        return occurrence

    def _counts_of(self, step: int) -> Counter[_Counted]:
        """Return how often each of several taps came in a step.

        Raises:
            BadTag: that is not known any more.
        """
        if step in self._gone:
            raise BadTag(GONE.format(step=step))
        found = self._counts_in.setdefault(step, Counter())
        self._counts_in.move_to_end(step)
        while len(self._counts_in) > _MOST_STEPS:
            oldest = next(one for one in self._counts_in if one != self.step)
            del self._counts_in[oldest]
            self._gone.add(oldest)
        return found

    def _is_another_thread_s(self, call: Call, site: _Site, place: Place | None) -> bool:
        """Whether another thread, not ended yet, tapped these tags in this step.

        The threads of a backward do not count.
        """
        if place is not None and place.task != -1:
            return False
        thread = threading.get_ident()
        known = self._threads.setdefault(site.counted, thread)
        if known == thread:
            return False
        if any(other.ident == known for other in threading.enumerate()):
            return True
        self._threads[site.counted] = thread
        return False

    def _repeated(self, call: Call, plain: _Site, place: Place) -> tuple[First, str, str, bool]:
        """Return what one in a recomputation repeats, a note, what is wrong, if it repeats any."""
        counted = (call.name, plain.key_text, False)
        so_far = self._counts[counted]
        if call.trouble:
            return First(self.step, so_far), "", call.trouble, True
        found = self._firsts.find(counted, place, self.step, so_far)
        if isinstance(found, First):
            unsure = place.again[0].is_unknown and so_far > 1
            return found, IN_ORDER if unsure else "", "", True
        if found is None or plain.recompute:  # the job's own tag says which it is
            return First(self.step, self._count(call, plain, place)), "", "", plain.recompute
        return First(self.step, so_far), "", found, True

    def _site(self, call: Call, rank: int, again: bool) -> _Site:
        if rank != self._rank:
            with self._lock:  # a process group has come up
                self._sites.clear()
                self.ignored.clear()
                self._rank = rank
        # Others may be mutable, or equal without being the same.
        plain = type(call.name) is str and _PLAIN.issuperset(map(type, call.tags.values()))
        about = call.about if plain else ()
        if again and about:
            about = (RECOMPUTE, about)
        site = self._sites.get(about)
        if site is not None:
            return site
        with self._lock:
            return self._new_site(call, rank, about, again)

    def _new_site(self, call: Call, rank: int, about: tuple[Any, ...], again: bool) -> _Site:
        if not isinstance(call.name, str):
            raise BadTag(f"its name is a {type(call.name).__name__}, expected a string")
        name = tagging.text("its name", call.name)
        if PART in call.tags:
            raise tagging.reserved(PART)
        tags = {tag: tagging.clean(tag, value) for tag, value in call.tags.items()}
        if len(self.names_seen) < _NAMES_KEPT:
            self.names_seen.add(name)
            self.tags_seen.update(tags)
        if again:
            tags[RECOMPUTE] = True
        wanted: bool | None = True
        if self._late:
            wanted = None
        elif self.filter is not None:
            wanted = self.filter({**tags, "name": name, "rank": rank})
        text = tagging.canonical(tags)
        if max(len(name), len(text)) * 4 > MOST_TAG_BYTES:  # UTF-8 takes up to four a character
            raise BadTag("its name and tags are of more than 16,000 characters; shorten them")
        key_text = tagging.key_tags(tags) if RECOMPUTE in tags else text
        is_second = tagging.is_recompute(tags)
        site = _Site(tags, text, key_text, is_second, (name, key_text, is_second), wanted)
        if about:
            if len(self._sites) >= _CACHED:
                self._sites.clear()
                self.ignored.clear()
            if rank == self._rank:
                self._sites[about] = site
                if wanted is False and not again and not self._splits:
                    self.ignored.add(about)
        return site

    def select_or_warn(
        self, call: Call, rank: int, warn: Callable[[tuple[str, ...], str], None]
    ) -> Selected | None:
        """As `select`; what cannot be selected is told to `warn`, with its call site."""
        try:
            return self.select(call, rank)
        except (BadTag, FilterError) as err:
            self.refused += 1
            reason = err.reason if isinstance(err, FilterError) else str(err)
            message = f"tap {call.shown} at {call.site} is ignored: {reason}"
            warn((call.shown, reason), message)
            return None

    def why_nothing(self) -> str | None:
        """Say why the filter selected nothing; None where there is no filter or it did."""
        if self.selected or self.filter is None:
            return None
        return self.filter.why_nothing(self.tags_seen, self.names_seen)
