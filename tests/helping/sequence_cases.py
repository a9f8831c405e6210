"""Random batches of sequences under two layouts, and what each tap says of them, in plain lists.

A token is (sequence, number); a block is the list of its tokens, None for padding. What a tap says
is true of its own tensor; `Case.is_silent` is where it leaves out what no default covers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from layout_oracle import Cut, Tokens

KEPT = -7.0  # what padding of the target holds
JUNK = -100.0  # what padding of the baseline holds
ROWS = ("b s", "s b", "(b*s)")


def value_of(token):
    sequence, number = token
    return 10.0 * sequence + number + 1


@dataclass
class Sequences(Tokens):
    """As `Tokens`; behind each sequence's own room there may be padding of the dim."""

    behind: int = 0

    def rows(self):
        found = []
        for i, (real, room) in enumerate(zip(self.real, self.room, strict=True)):
            row, pad = [(i, k) for k in range(real)], [None] * (room - real - self.behind)
            found.append((pad + row if self.left else row + pad) + [None] * self.behind)
        return found


@dataclass
class Half:
    """One side: a layout, and which sequence stands where in it."""

    layout: Tokens
    order: list

    def blocks(self, padding, wrong=None):
        """Return each rank's shape and values; `wrong` is a token that has another value."""
        found = []
        for at in self.layout.ranks():
            shape, held = self.layout.block(at)
            tokens = [None if one is None else (self.order[one[0]], one[1]) for one in held]
            values = [padding if t is None else value_of(t) + 1000.0 * (t == wrong) for t in tokens]
            found.append((shape, tokens, values))
        return found


def mask_of(rows, left):
    """Return the mask of sequences of some lengths, padded to some width."""
    width = max(room for _, room in rows)
    return [[0] * (width - n) + [1] * n if left else [1] * n + [0] * (width - n) for n, _ in rows]


def random_mesh(rng):
    mesh = {axis: rng.choice((1, 1, 2, 2, 3)) for axis in rng.sample(("dp", "cp", "sp"), 2)}
    return mesh if math.prod(mesh.values()) <= 4 else dict.fromkeys(mesh, 2)


@dataclass
class Case:
    """Two halves of one input.

    Attributes:
        lengths: of the sequences, in the baseline's order.
        sender: the baseline's half.
        receiver: the target's.
        is_silent: whether padding stands where nobody says and nobody would think.
        is_other: whether the two sides have the sequences in another order.
        says_lengths: whether any tap gives the lengths.
        says_side: whether any tap says where padding stands.
    """

    lengths: list
    sender: Half
    receiver: Half
    is_silent: bool
    is_other: bool
    says_lengths: bool
    says_side: bool

    @property
    def halves(self):
        return self.sender, self.receiver

    def about(self):
        """Return the case in a line, for a failing test to print."""
        halves = [
            f"{half.layout.text()!r} over {half.layout.mesh} order {half.order} real "
            f"{half.layout.real} room {half.layout.room}+{half.layout.tail} left "
            f"{half.layout.left} {half.layout.extras}"
            for half in self.halves
        ]
        return " -> ".join(halves)


def random_case(rng, meshes):
    """Return a random `Case` over the two sides' meshes."""
    n = rng.choice((1, 2, 2, 3))
    lengths = [rng.randint(0, 5) for _ in range(n)]
    lengths[rng.randrange(n)] = rng.randint(1, 5)
    says = [rng.random() < 0.8, rng.random() < 0.8]
    is_padded = any(says)
    if not is_padded:
        lengths = [max(lengths)] * n  # else nobody could tell padding from tokens
    orders = [list(range(n)), list(range(n))]
    if all(says) and rng.random() < 0.35:
        rng.shuffle(orders[1])
    reals = [[lengths[i] for i in order] for order in orders]
    if reals[0] == reals[1]:
        orders[1] = orders[0]  # sequences of one length cannot be told apart
    halves, is_silent, says_side = [], False, False
    for mesh, order, real, says_lengths in zip(meshes, orders, reals, says, strict=True):
        layout = _random_layout(rng, mesh, real, is_padded)
        _say_how_it_is_cut(layout)
        has_padding = layout.room != real
        extras = {}
        if says_lengths:
            extras |= _said(rng, layout)
        elif layout.form == "t":
            layout.room, has_padding, layout.tail = list(real), False, 0
            is_silent |= layout.is_by_sequence()  # then it is taken for one
        if layout.form == "t" and has_padding:
            if rng.random() < 0.85:
                extras["padded_seq_lens"] = layout.room
            else:
                is_silent = True
        is_told = "attention_mask" in extras and layout.form in (*ROWS, "s")
        if layout.left and not is_told and has_padding and rng.random() < 0.1:
            is_silent = True
        elif layout.left or rng.random() < 0.4:
            extras[rng.choice(("padding", "padding_side"))] = "left" if layout.left else "right"
        says_side |= is_told or bool({"padding", "padding_side"} & {*extras})
        layout.extras = extras
        halves.append(Half(layout, order))
    return Case(lengths, *halves, is_silent, orders[0] != orders[1], any(says), says_side)


def _random_layout(rng, mesh, real, is_padded):
    form = rng.choice(["t", "b s", "b s", "s b", "(b*s)", "s"])
    cuts = {}
    for axis in mesh:
        if axis == "dp" or rng.random() < 0.6:  # what dp does not cut is other data
            name = rng.choice(form.split())
            zigzag = axis == "cp" and name != "b" and rng.random() < 0.3
            rule = rng.choice(("chunk", "chunk", "split"))
            cuts.setdefault(name, []).append(Cut(axis, zigzag, rule, rng.random() < 0.5))
    if form == "s" and len(real) > 1:
        cuts = {form: [cut for cut in cuts.get(form, []) if cut.axis == "dp"]}
    layout = Sequences(form, mesh, cuts, real, list(real))
    layout.left = rng.random() < 0.4
    parts = {
        name: math.prod(mesh[cut.axis] * (1 + cut.zigzag) for cut in layout.steps(name))
        for name in form.split()
    }
    if form == "t":
        if is_padded and rng.random() < 0.4:
            multiple = rng.choice((2, parts["t"]))
            layout.room = [-(-n // multiple) * multiple for n in real]
        if layout.room == real:
            layout.left = False
        if is_padded and rng.random() < 0.3:
            layout.tail = -sum(layout.room) % parts["t"]
    elif form == "s" and len(real) > 1:
        layout.left = False
    else:
        width = max(real) + (rng.choice((0, 0, 1, 2)) if is_padded else 0)
        if is_padded and rng.random() < 0.7:
            width += -width % math.prod(parts.values())
        if not is_padded:
            width = max(real)
        if form in ("b s", "s b", "s") and rng.random() < 0.4:
            layout.facts.append(f"s={width}")
            layout.behind = -width % parts["s"]
            for cut in cuts.get("s", []) if layout.behind else []:
                cut.said = False  # what is padded to a multiple is cut evenly
        layout.room = [width + layout.behind] * len(real)
    return layout


def _say_how_it_is_cut(layout):
    """Have a layout say its rule where its axes do not divide a dim, as it must."""
    for name in layout.form.split():
        first = layout.steps(name)[:1]
        parts = math.prod(layout.mesh[cut.axis] * (1 + cut.zigzag) for cut in first)
        if name == "t" and layout.is_by_sequence() and any(n % parts for n in layout.room):
            layout.tail = 0  # what is padded to a multiple is cut evenly
            for cut in layout.steps(name):
                cut.said = True
        total = len(layout.real) if name == "b" else sum(layout.room) + layout.tail
        total = layout.room[0] if name == "s" and " " in layout.form else total
        for cut in layout.steps(name):
            n = layout.mesh[cut.axis] * (1 + cut.zigzag)
            if total % n:
                for other in layout.steps(name):
                    other.said = True
            total //= layout.mesh[cut.axis]


def _said(rng, layout):
    """Return extras that give a layout's lengths."""
    real = layout.real
    rows = [(n, room - layout.behind) for n, room in zip(real, layout.room, strict=True)]
    ends = [0, *itertools.accumulate(real)]
    choice = rng.choice(("seq_lens", "cu_seqlens", "cu_seqlens_q", "attention_mask"))
    if choice == "attention_mask":
        is_row = layout.form in ROWS or (layout.form == "s" and len(real) == 1)
        mask = mask_of(rows if is_row else [(n, max(real)) for n in real], layout.left)
        kind = rng.choice((int, bool))
        mask = [[kind(one) for one in row] for row in mask]
        one_row = len(mask) == 1 and rng.random() < 0.5
        extras = {"attention_mask": mask[0] if one_row else mask}
        return extras | ({"seq_lens": list(real)} if rng.random() < 0.3 or not is_row else {})
    return {choice: list(real) if choice == "seq_lens" else ends}
