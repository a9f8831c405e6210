"""What a DTensor says of itself, read as a layout: its mesh and placements.

`DTensor [8, 6] tp:0/2=Shard(dim=1)` is its whole shape, and for each dim of its mesh the name, this
rank's coordinate, the size and the placement (`capture.local_part` writes it). What is declared
beside it names its dims, and axes outside its mesh, as where a batch is cut over `fsdp` and the
DTensor is one over `tp`; of its own axes a DTensor's word holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import LayoutError
from .dims import Cut, Dim, Dims

DTENSOR = re.compile(r"DTensor \[([\d, ]*)\](.*)", re.DOTALL)
_NUMBER = "([0-9]{1,15})"
_PLACED = re.compile(rf"(\w+):(?:{_NUMBER}/)?{_NUMBER}=(\w+\([^()]*\))")
_SHARD = re.compile(rf"_?(?:Strided)?Shard\(dim={_NUMBER}(?:, (?:sf|split_factor)={_NUMBER})?\)")
_PARTIAL = re.compile(r"Partial\((?:reduce_op=)?'?(\w+)'?\)")
_REDUCTIONS = ("sum", "avg", "min", "max")
_MOST_SIZE = 1 << 60
_INSTEAD = "redistribute it to Shard or Replicate before the tap"


def with_placements(text: str, named: Dims, found: re.Match[str]) -> Dims:
    """Return a layout with a DTensor's mesh and placements, and the names that were declared.

    Args:
        text: of the layout, for messages.
        named: what was declared of it.
        found: the match of `DTENSOR` in the text.

    Raises:
        LayoutError: it is none, or a placement that is not known, or that contradicts what was
            declared.
    """
    sizes = [part.strip() for part in found[1].split(",") if part.strip()]
    if any(re.fullmatch(_NUMBER, size) is None for size in sizes):
        raise LayoutError(f"the dims {text!r:.200} cannot be read: the shape is malformed")
    shape = tuple(map(int, sizes))
    if math.prod(shape) >= _MOST_SIZE:
        raise LayoutError(f"the dims {text!r:.200} cannot be read: the shape is too large")
    dims = named.dims or tuple(Dim((f"dim{i}",)) for i in range(len(shape)))
    if len(dims) != len(shape):
        raise LayoutError(
            f"the dims {text!r:.200} name {len(dims)} dims of a DTensor that has {len(shape)}"
        )
    if _PLACED.sub("", found[2]).strip():
        raise LayoutError(f"the dims {text!r:.200} cannot be read: these are not placements")
    mesh: dict[str, tuple[int | None, int]] = {}
    placements: list[tuple[str, int, str]] = []
    for axis, at, size, placement in _PLACED.findall(found[2]):
        if int(size) < 1 or (at and int(at) >= int(size)) or axis in mesh:
            raise LayoutError(f"the dims {text!r:.200} cannot be read: the mesh is malformed")
        mesh[axis] = (int(at) if at else None, int(size))
        placements.append((axis, int(size), placement))
    placed, partial = _order(text, placements, len(shape))
    at = {cut.axis: i for i, line in enumerate(placed) for cut in line}
    aliases: dict[str, tuple[str, ...]] = {}
    cuts: list[tuple[Cut, ...]] = []
    for i, dim in enumerate(dims):
        outside = _outside(text, dims, i, placed[i], at, mesh)
        unnamed = {cut.axis for cut in placed[i]} - {cut.axis for cut in dim.cuts}
        aliases |= {cut.axis: tuple(sorted(unnamed)) for cut in outside if unnamed}
        cuts.append((*outside, *placed[i]))
    for axis, _ in named.partial:
        if axis in at:
            fact = f"they call it partial over {axis}, which cuts {dims[at[axis]].label}"
            raise _contradiction(text, fact)
        if axis not in mesh:
            partial.append((axis, "sum"))
    return replace(
        named,
        dims=tuple(Dim(dim.names, line) for dim, line in zip(dims, cuts, strict=True)),
        partial=tuple(partial),
        replicated=named.replicated - mesh.keys(),
        data=named.data - mesh.keys(),  # what a placement calls replicated is, whatever its name
        mesh=mesh,
        shape=shape,
        aliases=aliases,
        is_named=bool(named.dims),
    )


def _outside(
    text: str,
    dims: Sequence[Dim],
    i: int,
    placed: Sequence[Cut],
    at: Mapping[str, int],
    mesh: Mapping[str, object],
) -> tuple[Cut, ...]:
    """Return the cuts of dim `i` that were declared over axes outside the mesh.

    They cut what all of the mesh has together, so before the placements. Of its own axes a DTensor
    knows best: a cut over one that shards nothing is passed over, so that one row of a table says
    it of the sharded and of the replicated.

    Raises:
        LayoutError: a cut over an axis of the mesh that shards another dim, or this one otherwise.
    """
    label, declared = dims[i].label, dims[i].cuts
    for cut in declared:
        if at.get(cut.axis, i) != i:
            other = dims[at[cut.axis]].label
            raise _contradiction(
                text, f"they cut {label} over {cut.axis}, and a placement cuts {other} over it"
            )
        if cut.axis in at and (cut.zigzag or cut.rule == "split" or cut.share > 1):
            raise _contradiction(
                text, f"they cut {label} as {cut}, and a placement cuts as torch.chunk does"
            )
    own = [cut.axis for cut in declared if cut.axis in at]
    outside = tuple(cut for cut in declared if cut.axis not in mesh)
    order = [cut.axis for cut in outside] + [cut.axis for cut in placed if cut.axis in own]
    if [cut.axis for cut in declared if cut.axis in order] != order:
        raise _contradiction(text, f"{label} is cut over {', '.join(order)}, in this order")
    return outside


def _contradiction(text: str, fact: str) -> LayoutError:
    return LayoutError(
        f"the dims {text!r:.200} contradict the DTensor's own placements: {fact}",
        "name its dims, and of axes those outside its mesh",
    )


def _order(
    text: str, placements: list[tuple[str, int, str]], ndim: int
) -> tuple[list[tuple[Cut, ...]], list[tuple[str, str]]]:
    """Return for each tensor dim its cuts, outermost first, and the partial axes.

    Placements cut from left to right. A strided shard was cut after `split_factor` cuts by dims of
    the mesh to its right, so it stands behind those (torch.distributed.tensor.placement_types).
    """
    cuts: list[list[tuple[Cut, int]]] = [[] for _ in range(ndim)]
    partial: list[tuple[str, str]] = []
    for axis, size, placement in reversed(placements):
        if shard := _SHARD.fullmatch(placement):
            dim, factor = int(shard[1]), int(shard[2] or 1)
            if dim >= ndim:
                raise LayoutError(f"the dims {text!r:.200} cannot be read: {placement} of {ndim}")
            place = 0
            while factor > 1 and place < len(cuts[dim]) and factor % cuts[dim][place][1] == 0:
                factor //= cuts[dim][place][1]
                place += 1
            if factor != 1:
                raise LayoutError(
                    f"the placement {placement} of {text!r:.200} is not one after whole cuts by "
                    f"the mesh",
                    _INSTEAD,
                )
            cuts[dim].insert(place, (Cut(axis, rule="chunk"), size))
        elif (reduction := _PARTIAL.fullmatch(placement)) and reduction[1] in _REDUCTIONS:
            partial.insert(0, (axis, reduction[1]))
        elif placement != "Replicate()":
            raise LayoutError(
                f"the placement {placement} of {text!r:.200} is not known here", _INSTEAD
            )
    return [tuple(cut for cut, _ in line) for line in cuts], partial
