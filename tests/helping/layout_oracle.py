"""Layouts in plain lists and dictionaries, apart from all code of `recorder.layouts`.

A whole tensor is a dictionary: place -> value, a place being the index of each name. A block is
the list of the places of its elements, in order, None for padding. What a layout leaves open is a
list of all readings of it: where they give a block the same elements, nothing is ambiguous.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field, replace


def parts_of(items, n, rule):
    """Cut a list in n parts: `chunk` as torch.chunk does, or `split` as torch.tensor_split."""
    if rule == "chunk":
        size = -(-len(items) // n)
        return [items[k * size : (k + 1) * size] for k in range(n)]
    found, at = [], 0
    for k in range(n):
        size = len(items) // n + (1 if k < len(items) % n else 0)
        found.append(items[at : at + size])
        at += size
    return found


def part_of(items, k, n, rule, zigzag):
    """Return rank k's part of a list."""
    if zigzag:
        parts = parts_of(items, 2 * n, rule)
        return parts[k] + parts[2 * n - 1 - k]
    return parts_of(items, n, rule)[k]


@dataclass
class Cut:
    """An axis that cuts a dim; `rule` is how, `said` whether the text says so."""

    axis: str
    zigzag: bool = False
    rule: str = "chunk"
    said: bool = False
    share: int = 1

    def text(self):
        words = ["zigzag"] * self.zigzag + [self.rule] * self.said
        axis = self.axis + (f"/{self.share}" if self.share > 1 else "")
        return axis + (":" + "+".join(words) if words else "")


@dataclass
class Side:
    """A layout of one side.

    Attributes:
        mesh: axis -> size.
        dims: the names of each dim, none for a 1.
        cuts: of each dim.
        padded: dim -> how many positions of padding stand behind its end.
        facts: what stands behind the #.
        partial: the axis over which ranks hold summands.
        extras: the tap's.
    """

    mesh: dict
    dims: list
    cuts: list
    padded: dict = field(default_factory=dict)
    facts: list = field(default_factory=list)
    partial: str = ""
    extras: dict = field(default_factory=dict)
    form: str = ""

    def ranks(self):
        """Return each rank's coordinates."""
        return [
            dict(zip(self.mesh, at, strict=True))
            for at in itertools.product(*map(range, self.mesh.values()))
        ]

    def places(self):
        """Return each rank's place: axis -> (coordinate, size)."""
        return [{axis: (k, self.mesh[axis]) for axis, k in at.items()} for at in self.ranks()]

    def text(self):
        words = []
        for i, (names, cuts) in enumerate(zip(self.dims, self.cuts, strict=True)):
            word = "1" if not names else names[0] if len(names) == 1 else f"({'*'.join(names)})"
            axes = [cut.text() for cut in cuts]
            if self.partial and i == next(j for j, names in enumerate(self.dims) if names):
                axes.append(f"{self.partial}:partial")
            words.append(word + (f"[{','.join(axes)}]" if axes else ""))
        return " ".join(words) + ("".join(f" {f}" for f in ["#", *self.facts]) * bool(self.facts))

    def positions(self, i, sizes):
        """Return what stands along dim i of the whole: name -> index, None for padding."""
        names = self.dims[i]
        counts = itertools.product(*(range(sizes[name]) for name in names))
        found = [dict(zip(names, at, strict=True)) for at in counts]
        return found + [None] * self.padded.get(i, 0)

    def held(self, i, sizes, at, rules=None):
        """Return what a rank holds along dim i; `rules` in place of the cuts' own."""
        found = self.positions(i, sizes)
        for number, cut in enumerate(self.cuts[i]):
            rule = rules[number] if rules else cut.rule
            k, n = at[cut.axis] // cut.share, self.mesh[cut.axis] // cut.share
            found = part_of(found, k, n, rule, cut.zigzag)
        return found

    def block(self, sizes, at):
        """Return a rank's shape, and the place of each element, None for padding."""
        return joined([self.held(i, sizes, at) for i in range(len(self.dims))])


def joined(held):
    """Return the shape and the places of a block from what it holds along each dim."""
    found = []
    for parts in itertools.product(*held):
        place = None
        if all(part is not None for part in parts):
            place = frozenset(pair for part in parts for pair in part.items())
        found.append(place)
    return tuple(map(len, held)), found


def readings(side, i, sizes, at, length, *, may_pad, must_pad=False):
    """Return all that a block of some length can hold along dim i, if all that is said is true.

    Args:
        side: the layout.
        i: the dim.
        sizes: of each name.
        at: the rank's coordinates.
        length: the block's.
        may_pad: whether it may be padded to a multiple.
        must_pad: whether it was said to be, wherever that fits.
    """
    cuts = side.cuts[i]
    parts = math.prod(side.mesh[cut.axis] // cut.share for cut in cuts)
    plain = Side(side.mesh, side.dims, side.cuts)
    whole = len(plain.positions(i, sizes))
    free = [(cut.rule,) if cut.said else ("chunk", "split") for cut in cuts]
    found = []

    def add(held):
        if len(held) == length and held not in found:
            found.append(held)

    for rules in itertools.product(*free):
        add(plain.held(i, sizes, at, rules))
    if (
        may_pad
        and length * parts > whole
        and (must_pad or not (found and any(cut.said for cut in cuts)))
    ):
        padded = Side(side.mesh, side.dims, side.cuts, {i: length * parts - whole})
        held = padded.held(i, sizes, at)
        plain = not any(cut.said for cut in cuts)  # a declared size is one without padding
        if (must_pad or plain) and len(held) == length and _is_even(side, i, length * parts):
            return [held]
        add(held)
    add(shared(side, i, sizes, at, length))
    return found


def _is_even(side, i, total):
    for cut in side.cuts[i]:
        n = side.mesh[cut.axis] // cut.share
        if total % (2 * n if cut.zigzag and n > 1 else n):
            return False
        total //= n
    return True


def shared(side, i, sizes, at, length):
    """Return what a block has if neighbours share it, as key heads that are fewer than ranks."""
    items = Side(side.mesh, side.dims, side.cuts).positions(i, sizes)
    cuts = [cut for cut in side.cuts[i] if side.mesh[cut.axis] // cut.share > 1]
    ranks, number = 1, 0
    for cut in cuts:
        n = side.mesh[cut.axis] // cut.share
        ranks, number = ranks * n, number * n + at[cut.axis] // cut.share
    plain = not any(cut.said or cut.zigzag or cut.share > 1 for cut in cuts)
    if not cuts or not plain or not length or len(items) % length:
        return []
    copies, rest = divmod(ranks, len(items) // length)
    if rest or copies < 2 or side.mesh[cuts[-1].axis] % copies:
        return []
    return items[number // copies * length :][:length]


def extras_text(extras):
    return json.dumps(extras) if extras else ""


@dataclass
class Tokens:
    """One side's tensor of sequences.

    Attributes:
        form: `t`, packed; `b s`, `s b` or `(b*s)`, a batch; `s`, one sequence.
        mesh: axis -> size.
        cuts: name of a dim -> how it is cut.
        real: how many tokens each sequence has.
        room: how many each has with padding.
        tail: how many positions stand behind packed sequences.
        left: whether padding stands before the tokens.
        extras: the tap's.
        facts: what stands behind the #.
    """

    form: str
    mesh: dict
    cuts: dict
    real: list
    room: list
    tail: int = 0
    left: bool = False
    extras: dict = field(default_factory=dict)
    facts: list = field(default_factory=list)
    is_marked: bool = False  # padding as (sequence, None, position), and not just None

    def ranks(self):
        """Return each rank's coordinates."""
        return Side(self.mesh, [], []).ranks()

    def text(self):
        words = []
        for name in self.form.split():
            cuts = self.cuts.get(name, [])
            words.append(name + (f"[{','.join(cut.text() for cut in cuts)}]" if cuts else ""))
        return " ".join(words) + ("".join(f" {f}" for f in ["#", *self.facts]) * bool(self.facts))

    def rows(self):
        """Return each sequence with its padding, None, as (sequence, token)."""
        found = []
        for i, (real, room) in enumerate(zip(self.real, self.room, strict=True)):
            row, pad = [(i, k) for k in range(real)], [None] * (room - real)
            if self.is_marked and self.form in ("b s", "s b", "(b*s)"):
                pad = [(i, None, k) for k in range(room - real)]
            found.append(pad + row if self.left else row + pad)
        return found

    def block(self, at, rules=None):
        """Return a rank's shape and its elements, (sequence, token), None for padding.

        `rules` are name of a dim -> rules in place of its cuts' own.
        """
        rows = self.rows()
        line = [token for row in rows for token in row]
        if self.form == "t":
            tail = [None] * self.tail
            if self.is_by_sequence():
                parts = [self._cut("t", row, at, rules, steps=slice(1)) for row in rows]
                parts.append(self._cut("t", tail, at, rules, steps=slice(1), plain=True))
                line = [token for part in parts for token in part]
                line = self._cut("t", line, at, rules, steps=slice(1, None))
            else:
                line = self._cut("t", line + tail, at, rules)
            return (len(line),), line
        if self.form in ("(b*s)", "s"):
            line = self._cut(self.form, line, at, rules)
            return (len(line),), line
        kept = [self._cut("s", row, at, rules) for row in self._cut("b", rows, at, rules)]
        width = len(self._cut("s", [None] * max(self.room, default=0), at, rules))
        if self.form == "b s":
            return (len(kept), width), [token for row in kept for token in row]
        return (width, len(kept)), [row[k] for k in range(width) for row in kept]

    def steps(self, name):
        """Return the axes that do cut a dim."""
        return [cut for cut in self.cuts.get(name, []) if self.mesh[cut.axis] > 1]

    def is_by_sequence(self):
        """Whether each packed sequence is cut by itself."""
        cuts = self.steps("t")
        return bool(cuts) and cuts[0].axis == "cp"

    def _cut(self, name, items, at, rules, steps=slice(None), plain=False):
        cuts = self.steps(name)
        chosen = (rules or {}).get(name) or [cut.rule for cut in cuts]
        for cut, rule in list(zip(cuts, chosen, strict=True))[steps]:
            zigzag = cut.zigzag and not plain
            items = part_of(items, at[cut.axis], self.mesh[cut.axis], rule, zigzag)
        return items

    def readings(self, at=None):
        """Return what a block can hold, or where `at` is None all ranks' blocks, by their sizes."""
        names = self.form.split()
        free = [
            list(
                itertools.product(
                    *((cut.rule,) if cut.said else ("chunk", "split") for cut in self.steps(name))
                )
            )
            for name in names
        ]
        ranks = self.ranks() if at is None else [at]
        truth = [self.block(rank)[0] for rank in ranks]
        found = []
        others = [self]
        rows = self.form in ("b s", "s b") and at is not None and bool(self.facts)
        if rows and self.steps("s"):
            parts = math.prod(self.mesh[cut.axis] for cut in self.steps("s"))
            even = truth[0][0 if self.form == "s b" else 1] * parts
            if even > self.room[0]:
                others.append(replace(self, room=[even] * len(self.real)))
        if at is not None and self.form in ("t", "s") and self.steps(self.form):
            # Nobody says whether all of it is padded to a multiple.
            even = truth[0][0] * math.prod(self.mesh[cut.axis] for cut in self.steps(self.form))
            if self.form == "t":
                others += [replace(self, tail=n) for n in (0, max(0, even - sum(self.room)))]
            else:
                others += [replace(self, room=[n]) for n in (self.real[0], max(self.real[0], even))]
        for other, choice in itertools.product(others, itertools.product(*free)):
            other = replace(other, is_marked=True)
            held = [other.block(rank, dict(zip(names, choice, strict=True))) for rank in ranks]
            if [shape for shape, _ in held] == truth and held not in found:
                found.append(held)
        return found
