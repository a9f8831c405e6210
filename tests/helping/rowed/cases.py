"""Random taps of rows on both sides, to be played on all ranks.

A `Case` is one tap under a tag of its own. Each of its firings has some ids along one or two groups
of its dims, in any order, with padding; its other dims are whole, cut over tensor-parallel ranks,
or partial. `expecting` says what a replay has to make of them.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch

from recorder import declare_mesh, step, tap

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATS, torch.float32, torch.int64, torch.uint8, torch.bool, torch.complex64)
NAMES = (("t",), ("n",), ("b", "s"))
REST = ([], [("h", 4)], [("h", 8)], [("g", 4), ("d", 2)], [("g", 2), ("h", 4)])


@dataclass(frozen=True)
class Mesh:
    """The ranks of a side: data-parallel ones, times tensor-parallel ones."""

    dp: int = 1
    tp: int = 1

    @property
    def world_size(self):
        return self.dp * self.tp

    def declare(self, rank):
        """Say where a rank stands, and return that."""
        d, k = divmod(rank, self.tp)
        declare_mesh(dp=(d, self.dp), tp=(k, self.tp))
        return d, k


@dataclass
class Layout:
    """How one side lays its tensor out.

    Attributes:
        words: for each group of rows its dims, as `t`, or `b` and `s`, or `b*s`.
        rest: name and size of each other dim.
        order: the numbers of all of these dims as they stand in the tensor.
        cut: which of the rest is cut over tp; `sum` for a partial result; None for neither.
        tp: how many ranks tp has.
        is_fused: whether the rest is written as one dim.
        text: as declared.
    """

    words: list
    rest: list
    order: list
    cut: Any
    tp: int
    is_fused: bool
    text: str = ""

    @property
    def many(self):
        """How many dims have rows."""
        return sum(map(len, self.words))

    def part(self, whole, k):
        """Return what rank k of tp has of a whole row."""
        if self.cut is None:
            return whole
        return (
            summand(whole, k, self.tp) if self.cut == "sum" else whole.chunk(self.tp, self.cut)[k]
        )

    def tensor(self, rows, sizes, like):
        """Lay rows out; `sizes` are those of their dims, `like` is one row."""
        made = torch.stack(rows) if rows else torch.empty(0, *like.shape, dtype=like.dtype)
        rest = [like.numel()] if self.is_fused else like.shape
        return made.reshape(*sizes, *rest).permute(self.order)

    def rows(self, tensor, like):
        """Return the rows of a tensor, as `tensor` takes them."""
        back = tensor.permute([self.order.index(i) for i in range(len(self.order))])
        n = math.prod(back.shape[: self.many])
        return [*back.reshape(n, *like.shape)]


def summand(whole, k, n):
    """Return the k-th of n summands of a row."""
    is_whole = not (whole.dtype.is_floating_point or whole.dtype.is_complex)
    share = whole // n if is_whole else whole / n
    return whole - share * (n - 1) if k == 0 else share


@dataclass
class Fired:
    """One firing of a case on one rank.

    Attributes:
        attempt: as `step`, `rank`, and `occurrence`, of its key.
        number: which firing of the case on its rank it is, in all steps.
        ids: for each row what it stands for; None for padding.
        rows: as they were before the tap.
        tensor: the tapped one.
        k: its rank of tp.
    """

    attempt: int
    step: int
    rank: int
    occurrence: int
    number: int
    ids: list
    rows: list
    tensor: Any
    k: int


@dataclass
class Firing:
    """A firing to be: in which step, on which data-parallel rank or None for all of them.

    `ids` are those along each group of rows, None for padding; `sizes` of its names' dims.
    """

    step: int
    dp: Any
    ids: list
    sizes: list


@dataclass
class Case:
    """One tap, and all that both sides do with it.

    Attributes:
        number: its tag.
        seed: of all it does.
        dtypes: of the baseline, and of the target.
        layouts: of the two.
        plans: what the two fire.
        noise: how a row that is computed again differs: `none`, `rounding`, `beyond`.
        gaps: firings of the baseline that one tensor-parallel rank leaves out.
        numbers: how many numbers an id is, for each group.
    """

    number: int
    seed: int
    dtypes: tuple
    layouts: tuple
    plans: tuple
    noise: str
    gaps: set
    numbers: list
    values: dict = field(default_factory=dict)
    fired: list = field(default_factory=list)

    def value(self, ids, again):
        """Return a row of the whole, as computed the n-th time."""
        if ids not in self.values:
            g = torch.Generator().manual_seed(random.Random(repr((self.seed, ids))).getrandbits(40))
            self.values[ids] = some([n for _, n in self.layouts[0].rest], self.dtypes[0], g)
        value = self.values[ids]
        is_float = value.dtype.is_floating_point or value.dtype.is_complex
        if self.noise == "beyond" and again % 2:
            return ~value if value.dtype == torch.bool else -value if is_float else value + 3
        if self.noise == "rounding" and is_float:
            return value * (1 + torch.finfo(value.dtype).eps * (again % 3))
        return value


def some(shape, dtype, g):
    """Return random values."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=g) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        wide = dtype if dtype.is_complex else torch.float32
        return torch.randn(shape, generator=g, dtype=wide).to(dtype)
    return torch.randint(0, 50, shape, generator=g).to(dtype)


def make(seed, number, meshes, steps, *, most=8, **fixed):
    """Return a random case.

    Args:
        seed: of all it does.
        number: its tag.
        meshes: of both sides.
        steps: how many there are.
        most: rows of a firing, along a group.
        **fixed: `dtype`, `noise`, `groups`, `rest`, `to`, where they are not to be random.
    """
    r = random.Random(seed)
    groups = fixed.get("groups") or r.choice([1, 1, 1, 2])
    dtype = fixed.get("dtype") or r.choice(DTYPES)
    other = r.choice(FLOATS) if dtype in FLOATS and r.random() < 0.3 else dtype
    rest = fixed["rest"] if "rest" in fixed else r.choice(REST)
    shared = r.choice(NAMES)
    names = [[shared if groups > 1 else r.choice(NAMES)] for _ in meshes]
    for own in names:
        own.extend([("e",)] * (groups - 1))
    layouts = tuple(
        _layout(r, own, rest, mesh.tp, dtype) for own, mesh in zip(names, meshes, strict=True)
    )
    numbers = [r.choice([1, 1, 1, 2, 3]) for _ in range(groups)]
    universes = [_universe(r, n, 4 if g else 12) for g, n in enumerate(numbers)]
    plans = []
    for side, mesh in enumerate(meshes):
        plan = [
            _firing(r, universes, layouts[side], numbers, side, mesh, steps, most)
            for _ in range(r.randint(1, 3))
        ]
        plans.append(sorted(plan, key=lambda one: one.step))
    gaps = {i for i in range(len(plans[0])) if meshes[0].tp > 1 and r.random() < 0.1}
    if any(layout.is_fused for layout in layouts):  # then a gap leaves the whole's size open
        gaps = set()
    noise = fixed.get("noise") or r.choice(["none", "none", "rounding", "beyond"])
    dtypes = dtype, fixed.get("to", other)
    return Case(number, seed, dtypes, layouts, tuple(plans), noise, gaps, numbers)


def _layout(r, names, rest, tp, dtype):
    words = []
    for own in names:
        own = r.sample(own, len(own))
        words.append(["*".join(own)] if len(own) > 1 and r.random() < 0.4 else own)
    cuts = [None, *(i for i, (_, n) in enumerate(rest) if n % tp == 0), "sum"]
    cut = r.choice(cuts) if tp > 1 else None
    if cut == "sum" and dtype == torch.bool:
        cut = None
    is_fused = len(rest) > 1 and cut in (None, 0, "sum") and r.random() < 0.3
    labels = ["*".join(n for n, _ in rest)] if is_fused else [name for name, _ in rest]
    texts = [f"({one})" if "*" in one else one for one in (*itertools.chain(*words), *labels)]
    many = sum(map(len, words))
    if cut == "sum":
        texts[-1] += "[tp:partial]"
    elif cut is not None:
        texts[many + cut] += "[tp]"
    if r.random() < 0.3 and "[" not in texts[0]:  # what cuts rows, the ids say better
        texts[0] += r.choice(["[dp]", "[cp:zigzag]", "[cp,dp]"])
    order = [*range(len(texts))]
    if r.random() < 0.5:
        r.shuffle(order)
    text = " ".join(texts[i] for i in order)
    return Layout(words, rest, order, cut, tp, is_fused, text)


def _universe(r, numbers, most):
    is_small = r.random() < 0.5
    one = (lambda: r.randrange(6)) if is_small else (lambda: r.getrandbits(63))
    return [*{tuple(one() for _ in range(numbers)) for _ in range(r.randint(2, most))}]


def _firing(r, universes, layout, numbers, side, mesh, steps, most):
    every, sizes = [], []
    for universe, words, n in zip(universes, layout.words, numbers, strict=True):
        names = [name for word in words for name in word.split("*")]
        own = [r.randint(r.random() > 0.1, max(1, most // len(names))) for _ in names]
        rows = math.prod(own)
        is_once = r.random() < 0.6
        pool = r.sample(universe, min(rows, len(universe))) if is_once else universe
        ids = []
        for i in range(rows):
            known = r.choice(pool) if not is_once else pool[i] if i < len(pool) else None
            if side == 1 and r.random() < 0.15:
                known = tuple(r.getrandbits(62) for _ in range(n))
            ids.append(None if r.random() < 0.1 else known)
        every.append(ids)
        sizes.append(own)
    dp = None if r.random() < 0.15 else r.randrange(mesh.dp)
    return Firing(r.randrange(steps), dp, every, sizes)


class Play:
    """Both sides of some cases, on all ranks."""

    def __init__(self, cases, meshes, steps, seed):
        self.cases, self.meshes, self.steps, self.seed = cases, meshes, steps, seed

    def baseline(self, rank, attempt=0):
        """Play one rank of the baseline."""
        for case, fired in self._play(rank, 0, attempt):
            case.fired.append(fired)

    def target(self, rank):
        """Play one rank of the target; return each case with its firing, in order."""
        return [*self._play(rank, 1, 0)]

    def _play(self, rank, side, attempt):
        d, k = self.meshes[side].declare(rank)
        r = random.Random(repr((self.seed, rank, side, attempt)))
        numbers: dict = {}
        found = []
        for at in range(self.steps):
            counts: dict = {}
            for case in self.cases:
                for i, firing in enumerate(case.plans[side]):
                    is_gap = side == 0 and i in case.gaps and k == self.meshes[0].tp - 1
                    if firing.step != at or firing.dp not in (None, d) or is_gap:
                        continue
                    place = counts.get(case.number, 0), numbers.get(case.number, 0)
                    counts[case.number], numbers[case.number] = (n + 1 for n in place)
                    again = i + 5 * d + 9 * attempt
                    fired = Fired(
                        attempt, at, rank, *place, *_fire(r, case, side, k, firing, again)
                    )
                    found.append((case, fired))
            step()
        declare_mesh()
        return found


def _fire(r, case, side, k, firing, again):
    """Tap once; return ids, rows, the tensor, and the rank of tp."""
    layout, dtype = case.layouts[side], case.dtypes[side]
    shape = [n for _, n in layout.rest]
    cells = [None if None in cell else cell for cell in itertools.product(*firing.ids)]
    rows = []
    for cell in cells:
        if side == 1 or cell is None:
            whole = some(shape, dtype, torch.Generator().manual_seed(r.getrandbits(40)))
        else:
            whole = case.value(cell, again)
        rows.append(layout.part(whole, k).clone())
    like = layout.part(torch.zeros(shape, dtype=dtype), k)
    sizes, given = [], {}
    for words, ids, own, n in zip(
        layout.words, firing.ids, firing.sizes, case.numbers, strict=True
    ):
        names = [word.split("*") for word in words]
        at = [0, *itertools.accumulate(map(len, names))]
        sizes += [math.prod(own[a:b]) for a, b in itertools.pairwise(at)]
        label, value = _given(r, [*itertools.chain(*names)], ids, own, n)
        given[label] = value
    tensor = layout.tensor(rows, sizes, like)
    tensor = tensor.contiguous() if r.random() < 0.7 else tensor
    tap("x", tensor, dims=layout.text, rows=given, case=case.number)
    return cells, rows, tensor, k


def _given(r, names, ids, sizes, numbers):
    """Return ids as a user may give them: their dims in any order, as a list or a tensor."""
    flat = [[*one] if one is not None else [-1] * numbers for one in ids]
    for row, one in zip(flat, ids, strict=True):
        if one is None and numbers > 1 and r.random() < 0.5:
            row[r.randrange(1, numbers)] = r.randrange(5)  # one -1 makes padding of them all
    order = r.sample(range(len(names)), len(names))
    tensor = torch.tensor(flat, dtype=torch.int64).reshape(*sizes, numbers)
    tensor = tensor.permute([*order, len(names)])
    if numbers == 1 and r.random() < 0.8:
        tensor = tensor.squeeze(-1)
    label = r.choice([" ", "*"]).join(names[i] for i in order)
    label = f"({label})" if "*" in label and r.random() < 0.5 else label
    return label, tensor.tolist() if tensor.numel() and r.random() < 0.2 else tensor
