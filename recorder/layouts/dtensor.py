"""What a DTensor says of itself, read as a layout: its mesh and placements.

`DTensor [8, 6] tp:0/2=Shard(dim=1)` is its whole shape, and for each dim of its mesh the name, this
rank's coordinate, the size and the placement (`capture.local_part` writes it).
"""

from __future__ import annotations

import math
import re
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
        LayoutError: it is none, or a placement that is not known, or not what was declared.
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
    cuts, partial = _order(text, placements, len(shape))
    _check_declared(text, named, cuts, partial)
    return replace(
        named,
        dims=tuple(Dim(dim.names, cut) for dim, cut in zip(dims, cuts, strict=True)),
        partial=tuple(partial),
        replicated=frozenset(),
        data=named.data - mesh.keys(),  # what a placement calls replicated is, whatever its name
        mesh=mesh,
        shape=shape,
        is_named=bool(named.dims),
    )


def _check_declared(
    text: str, named: Dims, cuts: list[tuple[Cut, ...]], partial: list[tuple[str, str]]
) -> None:
    """Refuse cuts that were declared and are not those of the placements."""
    declared = [tuple(cut.axis for cut in dim.cuts) for dim in named.dims]
    placed = [tuple(cut.axis for cut in line) for line in cuts]
    odd = any(cut.zigzag or cut.rule == "split" for dim in named.dims for cut in dim.cuts)
    summed = sorted(axis for axis, _ in named.partial)
    if (
        odd
        or (any(declared) and declared != placed)
        or (summed and summed != sorted(axis for axis, _ in partial))
    ):
        raise LayoutError(
            f"the dims {text!r:.200} contradict the DTensor's own placements", "name its dims only"
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
