"""Random layouts of every documented form, held element by element against plain dictionaries."""

from __future__ import annotations

import collections
import itertools
import math
import random
import re

import layout_oracle as oracle
import pytest
import torch
from layout_oracle import Cut, Side, extras_text

from recorder.errors import LayoutError
from recorder.layouts.assemble import assemble, keep_padding
from recorder.layouts.blocks import Block
from recorder.layouts.parse import parse_dims
from recorder.layouts.plan import plan
from recorder.mesh import frozen

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]
KEPT = -7
"""What a target holds before."""


def random_mesh(rng, most=12):
    mesh = {}
    for axis in rng.sample(("tp", "cp", "sp", "ep"), rng.randint(1, 3)):
        size = rng.choice((1, 2, 2, 3, 4))
        if math.prod(mesh.values()) * size <= most:
            mesh[axis] = size
    return mesh


def random_side(rng, sizes, *, is_receiver):
    """Return a random layout of names over a random mesh."""
    mesh = random_mesh(rng)
    names = rng.sample(list(sizes), len(sizes))
    dims = []
    while names:
        take = min(len(names), rng.choice((1, 1, 1, 2, 3)))
        dims.append(tuple(names[:take]))
        names = names[take:]
    for _ in range(rng.choice((0, 0, 0, 1))):
        dims.insert(rng.randint(0, len(dims)), ())
    side = Side(mesh, dims, [[] for _ in dims])
    for axis in rng.sample(list(mesh), len(mesh)):
        i = rng.randrange(len(dims))
        choice = rng.random()
        if choice < 0.1 and not side.partial:
            side.partial = axis
        elif choice < 0.8 and dims[i]:
            zigzag = rng.random() < 0.25
            said = rng.random() < (0.5 if is_receiver else 0.2)
            said |= axis == "ep"  # else it is cut as experts have it
            share = rng.choice([n for n in (1, 2, 4) if mesh[axis] % n == 0])
            share = share if rng.random() < 0.2 else 1
            side.cuts[i].append(Cut(axis, zigzag, rng.choice(("chunk", "split")), said, share))
    for i, dim in enumerate(dims):
        if len(dim) != 1:
            continue
        size, name = sizes[dim[0]], dim[0]
        parts = math.prod(mesh[cut.axis] // cut.share * (1 + cut.zigzag) for cut in side.cuts[i])
        choice = rng.random()
        if choice < 0.25:
            side.padded[i] = -size % parts if side.cuts[i] else rng.randint(0, 3)
            if side.padded[i]:
                for cut in side.cuts[i]:
                    cut.said = False  # what is padded to a multiple is cut evenly
            is_said = is_receiver and rng.random() < 0.3
            if is_said:
                side.facts.append(rng.choice((f"{name}:padded", f"{name}:fill={KEPT}")))
            if not is_said or rng.random() < 0.5:
                side.facts.append(f"{name}={size}")
        elif choice < 0.4:
            side.facts.append(f"{name}={size}")
    return side


class Case:
    """Senders and receivers of one tensor.

    `run` counts what came of each receiver: `right`, or why it was refused; a refusal is an error
    where all that is said leaves one reading. `wrong, and said` is a receiver whose log says what
    was taken for granted, which was not so.
    """

    def __init__(self, seed, sizes, sender, receiver):
        self.seed, self.sizes, self.sender, self.receiver = seed, sizes, sender, receiver
        self.about = (
            f"seed {seed}: {sender.text()!r} over {sender.mesh} {sender.extras} -> "
            f"{receiver.text()!r} over {receiver.mesh} {receiver.extras}, {sizes}"
        )
        counts = itertools.product(*(range(sizes[name]) for name in sizes))
        self.value = {
            frozenset(zip(sizes, at, strict=True)): number
            for number, at in enumerate(counts, start=1)
        }

    def blocks(self, side):
        dims = parse_dims(side.text())
        found = []
        for rank, (at, place) in enumerate(zip(side.ranks(), side.places(), strict=True)):
            shape, held = side.block(self.sizes, at)
            extras = extras_text(side.extras)
            found.append((Block(rank, dims, shape, frozen(place), extras), at, held))
        return found

    def summand(self, place, k, n):
        """Return what the k-th of n ranks has of a value: parts of it that add up."""
        value = self.value[place]
        return value - (n - 1) * 1000 if k == 0 else 1000

    def sent(self):
        blocks, tensors = [], []
        for rank, (block, at, held) in enumerate(self.blocks(self.sender)):
            values = []
            for place in held:
                if place is None:
                    values.append(-1000 - rank)  # padding that no receiver may see
                elif self.sender.partial:
                    axis = self.sender.partial
                    values.append(self.summand(place, at[axis], self.sender.mesh[axis]))
                else:
                    values.append(self.value[place])
            blocks.append(block)
            tensors.append(torch.tensor(values, dtype=torch.int64).view(block.shape))
        return blocks, tensors

    def wanted(self, at, held):
        """Return what a receiver is to hold."""
        mine, its = self.receiver.partial, self.sender.partial
        n = self.receiver.mesh.get(mine, 1)
        alike = mine and mine == its and n == self.sender.mesh[mine]
        found = []
        for place in held:
            if place is None:
                found.append(KEPT)
            elif mine and n > 1 and alike:
                found.append(self.summand(place, at[mine], n))
            elif mine and n > 1 and at[mine] > 0:
                found.append(0)
            else:
                found.append(self.value[place])
        return found

    def same(self, got, wanted):
        return got == wanted

    def run(self, counts, is_ambiguous, lost=None):
        """Count what comes of each receiver; `lost` is a sender that recorded nothing."""
        blocks, tensors = self.sent()
        world = len(blocks)
        blocks = [block for block in blocks if block.rank != lost]
        receivers = self.blocks(self.receiver)
        for block, at, held in receivers:
            try:
                made = plan(blocks, world, block, len(receivers))
            except LayoutError as err:
                kind = kind_of(str(err))
                plain = lost is None and not is_ambiguous(self, at, block)
                assert not plain, f"{self.about}, rank {block.rank}: {err}"
                counts[f"refused: {kind}"] += 1
                continue
            got = assemble(
                made, blocks, block, lambda rank, share: tensors[rank], lambda rank: "same"
            )
            got = keep_padding(made, block.shape, got, torch.full(block.shape, KEPT))
            wanted = self.wanted(at, held)
            if self.same(got.flatten().tolist(), wanted):
                counts["right"] += 1
            elif "was taken to have" in made.note or "taken to be padded" in made.note:
                counts["wrong, and said"] += 1
            else:
                raise AssertionError(
                    f"{self.about}, rank {block.rank}: {got.flatten().tolist()}, {wanted}"
                )


def report(first, count, counts):
    print(f"seeds {first} to {first + count - 1}:")
    for what, n in counts.most_common():
        print(f"{n:7} {what}")


def kind_of(message):
    """Return a message without what differs from case to case."""
    return re.sub(r"'[^']*'|\([^()]*\)|\[[^\[\]]*\]|\d+|(?<=dim )\S+", "_", message)[:70]


def is_open(case, at, block):
    """Whether anything of a case depends on what nobody says."""
    sender, receiver, sizes = case.sender, case.receiver, case.sizes
    declared = {f.split("=")[0] for side in (sender, receiver) for f in side.facts if "=" in f}
    single = {
        dim[0] for i, dim in enumerate(sender.dims) if len(dim) == 1 and not sender.padded.get(i)
    }
    known = declared | single
    for i, dim in enumerate(receiver.dims):
        if dim and not set(dim) <= known:
            return True  # of a dim of unknown size
        padded = {f.split(":")[0] for f in receiver.facts if ":" in f}
        may_pad = len(dim) == 1 and dim[0] in declared | padded
        found = oracle.readings(
            receiver,
            i,
            sizes,
            at,
            block.shape[i],
            may_pad=may_pad,
            must_pad=len(dim) == 1 and dim[0] in padded,
        )
        if len(found) > 1:
            return True
    return any(len(sender_readings(sender, i, sizes)) > 1 for i in range(len(sender.dims)))


def sender_readings(sender, i, sizes):
    """Return all that the senders' blocks can hold along a dim, given all of their lengths."""
    cuts = sender.cuts[i]
    free = [(cut.rule,) if cut.said or not cut.zigzag else ("chunk", "split") for cut in cuts]
    truth = [sender.held(i, sizes, at) for at in sender.ranks()]
    found = []
    for rules in itertools.product(*free):
        held = [sender.held(i, sizes, at, rules) for at in sender.ranks()]
        if [len(h) for h in held] == [len(h) for h in truth] and held not in found:
            found.append(held)
    return found


def plain_case(seed):
    rng = random.Random(seed)
    sizes = {n: rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 12)) for n in "hdev"[: rng.randint(1, 3)]}
    sender = random_side(rng, sizes, is_receiver=False)
    receiver = random_side(rng, sizes, is_receiver=True)
    declared = {f.split("=")[0] for side in (sender, receiver) for f in side.facts if "=" in f}
    for i, dim in enumerate(receiver.dims):
        if len(dim) == 1 and dim[0] in declared and not receiver.padded.get(i):
            for cut in receiver.cuts[i]:
                cut.said = True  # else a size that is declared is that without padding
    return Case(seed, sizes, sender, receiver)


@pytest.mark.parametrize("extent", ["short", pytest.param("long", marks=LONG)])
def test_plain_dims_against_the_oracle(extent):
    first, count = (0, 1_500) if extent == "short" else (1_000_000, 60_000)
    counts = collections.Counter()
    for seed in range(first, first + count):
        plain_case(seed).run(counts, is_open)
    report(first, count, counts)
    assert counts["right"] > 3 * count and not counts["wrong, and said"]


def random_tokens(rng, real, *, is_receiver):
    """Return a random layout of sequences."""
    forms = ["t", "t", "b s", "s b", "(b*s)"] + ["s"] * (len(real) == 1)
    form = rng.choice(forms)
    mesh = {axis: rng.choice((1, 2, 2, 3)) for axis in rng.sample(("cp", "sp", "ep"), 2)}
    cuts = {}
    for axis in mesh:
        if rng.random() < 0.7:
            name = rng.choice(form.split())
            said = rng.random() < (0.5 if is_receiver else 0.3)
            said |= axis == "ep"  # else it is cut as experts have it
            zigzag = rng.random() < 0.3
            cuts.setdefault(name, []).append(
                Cut(axis, zigzag, rng.choice(("chunk", "split")), said)
            )
    made = oracle.Tokens(form, mesh, cuts, real, list(real), left=rng.random() < 0.2)
    parts = {
        name: math.prod(mesh[cut.axis] * (1 + cut.zigzag) for cut in made.steps(name))
        for name in form.split()
    }
    if form == "t":
        if rng.random() < 0.5:
            multiple = rng.choice((1, 2, parts["t"]))
            made.room = [-(-n // multiple) * multiple for n in real]
        total = sum(made.room)
        made.tail = rng.choice((0, -total % parts["t"])) + rng.choice((0, parts["t"]))
        uneven = made.is_by_sequence() and any(n % parts["t"] for n in made.room)
        if is_receiver and made.steps("t") and (uneven or (total + made.tail) % parts["t"]):
            made.tail = 0  # what is padded is so to a multiple
    else:
        longest = max(real) + rng.choice((0, 0, 1, 2))
        if rng.random() < 0.6:
            longest += -longest % math.prod(parts.values())
        if form == "s" and is_receiver and made.steps("s") and longest % parts["s"]:
            longest = max(real)
        made.room = [longest] * len(real)
        for name in ("s", "(b*s)"):  # what is uneven says so
            whole = longest * (1 if name == "s" else len(real))
            if is_receiver and form != "s" and name in parts and whole % parts[name]:
                for cut in made.steps(name):
                    cut.said = True
        if form in ("b s", "s b") and rng.random() < 0.3:
            made.facts.append(f"s={longest}")
    return made


def tokens_case(seed):
    rng = random.Random(seed)
    real = [rng.randint(0, 6) for _ in range(rng.randint(1, 3))]
    sides = [random_tokens(rng, real, is_receiver=k == 1) for k in range(2)]
    who = rng.choice((0, 1, 2, 2))
    if all(side.form != "t" for side in sides):
        for side in sides:
            side.facts.clear()
        if len(real) != 1 and sides[1].steps("s") + sides[1].steps("(b*s)"):
            sides[1].room = sides[0].room  # between batches the room is the same
        elif sides[1].steps("s") + sides[1].steps("(b*s)"):
            sides[1].room = [sum(sides[0].room)]
    is_padded = any(side.form == "t" and side.room != real for side in sides)
    for k, side in enumerate(sides):
        spoken = side.left or (side.form == "t" and is_padded)
        if spoken or who in (k, 2):
            cumulated = [0, *itertools.accumulate(real)]
            side.extras = rng.choice(({"seq_lens": real}, {"cu_seqlens": cumulated}))
            if side.form == "t" and side.room != real:
                side.extras = side.extras | {"padded_seq_lens": side.room}
            if side.left or rng.random() < 0.3:
                side.extras = side.extras | {"padding": "left" if side.left else "right"}
    return TokensCase(seed, real, *sides)


class TokensCase(Case):
    """As `Case`, of sequences."""

    def __init__(self, seed, real, sender, receiver):
        self.seed, self.sizes, self.sender, self.receiver = seed, real, sender, receiver
        self.about = (
            f"seed {seed}: {sender.text()!r} over {sender.mesh} room {sender.room}+{sender.tail} "
            f"{sender.extras} -> {receiver.text()!r} over {receiver.mesh} room {receiver.room}"
            f"+{receiver.tail} {receiver.extras}, {real}"
        )
        self.value = {(i, k): 10 * i + k + 1 for i, n in enumerate(real) for k in range(n)}
        sender.partial = receiver.partial = ""

    def blocks(self, side):
        dims = parse_dims(side.text())
        found = []
        for rank, at in enumerate(side.ranks()):
            shape, held = side.block(at)
            place = {axis: (k, side.mesh[axis]) for axis, k in at.items()}
            found.append(
                (Block(rank, dims, shape, frozen(place), extras_text(side.extras)), at, held)
            )
        return found

    def same(self, got, wanted):
        if "t" in (self.sender.form, self.receiver.form):
            return got == wanted
        # Between batches nothing is left out: what stands in their padding is copied like the rest.
        return all(b in (KEPT, a) for a, b in zip(got, wanted, strict=True))


def is_open_batch(sender, receiver, at):
    """Whether anything of two batches depends on what nobody says."""
    forms = {sender.form, receiver.form}
    sides = {side.extras.get("padding", "") for side in (sender, receiver)}
    parts = math.prod(receiver.mesh[cut.axis] * (1 + cut.zigzag) for cut in receiver.steps("s"))
    return (
        not forms <= {"b s", "s b"}
        or sender.room != receiver.room
        or (len(sides) > 1 and "left" in sides)
        or len(sender.readings()) > 1
        or len(receiver.readings(at)) > 1
        or bool(receiver.room and receiver.room[0] % parts)
    )


def is_open_tokens(case, at, block):
    """Whether anything of a case depends on what nobody says."""
    sender, receiver = case.sender, case.receiver
    if "t" not in (sender.form, receiver.form):
        return is_open_batch(sender, receiver, at)
    if len(sender.readings()) > 1 or len(receiver.readings(at)) > 1:
        return True
    for side, other in ((sender, receiver), (receiver, sender)):
        if side.form == "t" and not side.extras and other.extras.get("padded_seq_lens"):
            return True
        unsaid = side.form == "t" and side.left and side.room == side.real
        if unsaid and (side.tail or side.steps("t")):
            return True  # nobody says whose padding is on the left
    lengths = case.sizes
    if receiver.form == "t" and receiver.steps("t"):
        return bool(receiver.tail)
    if (
        receiver.form in ("b s", "s b", "s")
        and receiver.left
        and receiver.room[0]
        % math.prod(receiver.mesh[cut.axis] * (1 + cut.zigzag) for cut in receiver.steps("s"))
    ):
        return True  # tokens count from the end of a row, and how long that is hangs on padding
    if receiver.form in ("b s", "s b", "(b*s)"):
        name = "s" if " " in receiver.form else "(b*s)"
        cuts = receiver.steps(name)
        if cuts and not receiver.facts:
            parts = math.prod(receiver.mesh[cut.axis] * (1 + cut.zigzag) for cut in cuts)
            total = receiver.room[0] * (1 if name == "s" else len(lengths))
            even = total % parts == 0
            last = all(at[cut.axis] == receiver.mesh[cut.axis] - 1 for cut in cuts)
            said = any(cut.said for cut in cuts)  # then it may be uneven
            return not even or said or (last and not receiver.extras)
    return False


@pytest.mark.parametrize("extent", ["short", pytest.param("long", marks=LONG)])
def test_a_sender_that_recorded_nothing_never_shifts_the_others(extent):
    first, count = (500_000, 1_000) if extent == "short" else (5_000_000, 40_000)
    counts = collections.Counter()
    for seed in range(first, first + count):
        case = plain_case(seed) if seed % 2 else tokens_case(seed)
        ranks = len(case.sender.ranks())
        room = [getattr(side, "room", None) for side in (case.sender, case.receiver)]
        if ranks > 1 and ("t" in (case.sender.form, case.receiver.form) or room[0] == room[1]):
            case.run(counts, is_open, lost=seed % ranks)
    report(first, count, counts)
    assert counts["right"] > count // 2


@pytest.mark.parametrize("extent", ["short", pytest.param("long", marks=LONG)])
def test_tokens_against_the_oracle(extent):
    first, count = (0, 2_000) if extent == "short" else (1_000_000, 60_000)
    counts = collections.Counter()
    for seed in range(first, first + count):
        tokens_case(seed).run(counts, is_open_tokens)
    report(first, count, counts)
    assert counts["right"] > 2 * count and not counts["wrong, and said"]
