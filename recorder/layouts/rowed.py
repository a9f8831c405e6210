"""Where ids of rows stand in a tensor, as its layout says.

`rowed` finds the dims that a tap's ids are along; `moved` and `moved_back` put these dims in front,
each group of them as one, and back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import BadRows
from ..tokens.taken import PADDING, Taken
from .dims import Dims


@dataclass(frozen=True)
class Rowed:
    """The ids along one dim of a tensor, or along several of which each combination is a row.

    Attributes:
        names: of these dims, in alphabetical order.
        at: the dims by position, in the order in which the ids go over them.
        ids: [rows] or [rows, numbers], int64 on the CPU.
        known: position and token of each row, [rows, 2]; None where nobody said.
    """

    names: tuple[str, ...]
    at: tuple[int, ...]
    ids: torch.Tensor = field(repr=False)
    known: torch.Tensor | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """The dims as messages call them."""
        return " ".join(self.names)


def rowed(dims: Dims, shape: Sequence[int], given: Iterable[Taken]) -> list[Rowed]:
    """Return the ids along the dims of a tensor; those of dims that it does not have are left out.

    Args:
        dims: its layout.
        shape: its sizes.
        given: ids.

    Raises:
        BadRows: there are more ids than rows, or fewer.
    """
    found = []
    for one in given:
        order = _order(dims, one.names)
        if order is None:
            continue
        if len(dims.dims) != len(shape):
            raise BadRows(
                f"its dims {dims.text!r:.200} name {len(dims.dims)} dims, and it has {len(shape)}",
                "name each of them, so that its rows are known",
            )
        at, names = order
        places = [one.names.index(name) for name in names]
        sizes = [one.ids.shape[i] for i in places]
        fused = [math.prod(sizes)] if len(at) < len(names) else sizes
        here = [shape[i] for i in at]
        if fused != here:
            raise BadRows(
                f"its rows along {' '.join(names)} have {'x'.join(map(str, fused))} ids, and the "
                f"tensor {'x'.join(map(str, here))} places there",
                "give the ids of these rows, at the tap if need be, as in "
                f"rows={{{' '.join(names)!r}: ids}}",
            )
        rest = range(len(names), one.ids.dim())
        ids = one.ids.permute([*places, *rest]).reshape(-1, *one.ids.shape[len(names) :])
        known = one.known
        if known is not None:
            own = known.reshape(*(one.ids.shape[i] for i in range(len(names))), 2)
            known = own.permute([*places, len(names)]).reshape(-1, 2)
        found.append(Rowed(one.names, tuple(at), ids, known))
    return found


def padded(dims: Dims, shape: Sequence[int], given: Taken) -> Taken:
    """Return ids along one dim with padding at the end, as many as the tensor has rows there.

    Args:
        dims: the tensor's layout.
        shape: its sizes.
        given: ids; returned as they are where they are as many, or more, or of several dims.
    """
    order = _order(dims, given.names) if len(given.names) == 1 else None
    more = shape[order[0][0]] - len(given.ids) if order and len(dims.dims) == len(shape) else 0
    if more <= 0:
        return given
    padding = given.ids.new_full((more, *given.ids.shape[1:]), PADDING)
    known = given.known
    if known is not None:
        known = torch.cat([known, known.new_full((more, 2), PADDING)])
    return Taken(given.names, torch.cat([given.ids, padding]), known)


def _order(dims: Dims, names: Sequence[str]) -> tuple[list[int], list[str]] | None:
    """Return the dims that have some names, and these in the dims' order; None where they do not.

    The names are a dim each, or one fused dim's.
    """
    for i, dim in enumerate(dims.dims):
        if len(dim.names) > 1 and sorted(dim.names) == sorted(names):
            return [i], list(dim.names)
    places = {dim.names[0]: i for i, dim in enumerate(dims.dims) if len(dim.names) == 1}
    if not all(name in places for name in names):
        return None
    order = sorted(names, key=lambda name: places[name])
    return [places[name] for name in order], order


def moved(tensor: torch.Tensor, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return a tensor with groups of its dims as one dim each, in front of the others.

    A view where its strides allow that.
    """
    front = [i for at in rows for i in at]
    rest = [i for i in range(tensor.dim()) if i not in front]
    sizes = [math.prod(tensor.shape[i] for i in at) for at in rows]
    return tensor.permute([*front, *rest]).reshape([*sizes, *(tensor.shape[i] for i in rest)])


def moved_back(
    made: torch.Tensor, shape: Sequence[int], rows: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return what `moved` made of a tensor of some shape as that tensor."""
    front = [i for at in rows for i in at]
    order = [*front, *(i for i in range(len(shape)) if i not in front)]
    split = made.reshape([shape[i] for i in order])
    return split.permute([order.index(i) for i in range(len(order))])
