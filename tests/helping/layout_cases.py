"""Random layouts, and the blocks of a tensor under them by plain torch, apart from our own code."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch

AXES = ("dp", "cp", "tp", "sp", "ep")
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.complex128,
    torch.float8_e5m2,
)
UNITS = ("heads", "width", "x", "y", "s")


def random_mesh(rng, most_ranks, most_axes=5):
    """Return axis -> size."""
    mesh = {}
    for axis in rng.sample(AXES, rng.randint(1, most_axes)):
        size = rng.choice((1, 2, 2, 3, 4, 8))
        if math.prod(mesh.values()) * size <= most_ranks:
            mesh[axis] = size
    return mesh or {"tp": 1}


def places(mesh):
    """Return each rank's coordinates: axis -> (coordinate, size)."""
    return [
        {axis: (k, n) for (axis, n), k in zip(mesh.items(), at, strict=True)}
        for at in itertools.product(*map(range, mesh.values()))
    ]


@dataclass
class Side:
    """One side's layout of a logical tensor."""

    dims: list  # names, or None for a 1
    cuts: list  # for each dim [(axis, how)], how one of natural, zigzag, chunk, split
    facts: str = ""
    pad: dict = field(default_factory=dict)  # position -> multiple

    def text(self, *, declare_rules):
        parts = []
        for names, cuts in zip(self.dims, self.cuts, strict=True):
            text = "1" if names is None else names[0] if len(names) == 1 else f"({'*'.join(names)})"
            words = []
            for axis, how in cuts:
                plain = how == "natural" or (how in ("chunk", "split") and not declare_rules)
                words.append(axis if plain else f"{axis}:{how}")
            parts.append(text + (f"[{','.join(words)}]" if words else ""))
        return " ".join(parts) + self.facts

    def whole(self, logical, names):
        """Return the logical tensor in this side's order of dims, fused as here."""
        order = [name for dim in self.dims if dim for name in dim]
        moved = logical.permute([names.index(name) for name in order])
        sizes = dict(zip(names, logical.shape, strict=True))
        return moved.reshape(
            [1 if d is None else math.prod(sizes[n] for n in d) for d in self.dims]
        )

    def block(self, logical, names, at, pad_with=None):
        """Return one rank's block."""
        found = self.whole(logical, names)
        for dim, multiple in self.pad.items():
            short = -found.shape[dim] % multiple
            if short:
                shape = list(found.shape)
                shape[dim] = short
                found = torch.cat([found, torch.full(shape, pad_with, dtype=found.dtype)], dim)
        for dim, cuts in enumerate(self.cuts):
            for axis, how in cuts:
                k, n = at.get(axis, (0, 1))
                found = cut(found, dim, k, n, how)
        return found.clone()


def cut(tensor, dim, k, n, how):
    if how == "zigzag":
        parts = empty_padded(tensor.chunk(2 * n, dim), 2 * n, dim)
        return torch.cat([parts[k], parts[2 * n - 1 - k]], dim)
    parts = tensor.tensor_split(n, dim) if how == "split" else tensor.chunk(n, dim)
    return empty_padded(parts, n, dim)[k]


def empty_padded(parts, n, dim):
    return [*parts, *[parts[0].narrow(dim, 0, 0)] * (n - len(parts))]


def random_sizes(rng, count):
    return {name: rng.choice((1, 2, 3, 4, 5, 8, 12)) for name in rng.sample(UNITS, count)}


def random_side(rng, sizes, mesh, *, fuse=True, uneven=True, zigzag=True):
    """Return a random layout of a tensor of these sizes over this mesh."""
    names = rng.sample(list(sizes), len(sizes))
    dims = []
    while names:
        take = 2 if fuse and len(names) > 1 and rng.random() < 0.3 else 1
        dims.append(tuple(names[:take]))
        names = names[take:]
    for _ in range(rng.choice((0, 0, 1))):
        dims.insert(rng.randint(0, len(dims)), None)
    axes = [axis for axis in mesh if axis != "dp"]
    cuts = [[] for _ in dims]
    rng.shuffle(axes)
    for axis in axes:
        at = rng.randrange(len(dims))
        if dims[at] is None or rng.random() < 0.3:
            continue
        size = math.prod(sizes[name] for name in dims[at])
        held = math.prod(mesh[a] for a, _ in cuts[at])
        even = size % (held * mesh[axis]) == 0
        whole = len(dims[at]) == 1 and not any(how in ("chunk", "split") for _, how in cuts[at])
        if zigzag and even and size % (2 * held * mesh[axis]) == 0 and rng.random() < 0.3:
            cuts[at].append((axis, "zigzag"))
        elif even:
            cuts[at].append((axis, "natural"))
        elif uneven and whole and not any(how == "zigzag" for _, how in cuts[at]):
            how = rng.choice(("chunk", "split"))
            cuts[at] = [(a, how) for a, _ in cuts[at]] + [(axis, how)]
    return Side(dims, cuts)


def random_values(rng, shape, dtype):
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator)
    raw = raw.to(torch.uint8)
    if dtype == torch.bool:
        return (raw % 2).to(torch.bool).reshape(shape)
    return raw.view(dtype).reshape(shape)


def same_bits(a, b):
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.numel() == 0:
        return True
    one, other = (torch.empty(t.numel(), dtype=t.dtype).copy_(t.flatten()) for t in (a, b))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
