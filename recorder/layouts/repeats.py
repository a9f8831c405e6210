"""How many ranks share a block where a dim has fewer than ranks: `g[tp:repeat]`, settled.

Servers let ranks share key heads that are fewer than they are. With `repeat` an axis cuts what its
dim's outermost name counts as far as that goes, and neighbours share what is left: of g over n
ranks, n / g hold the same, as `tp/N` says it. The size of g is declared, or known from the other
side of a transfer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..errors import LayoutError
from .blocks import Block, coordinates
from .cutting import Places
from .dims import Dim, Dims


def share_of(dim: Dim, axis: str, ranks: int, size: int) -> int:
    """Return how many neighbours along an axis share what the dim's outermost name counts.

    Raises:
        LayoutError: neither the size nor the number of ranks divides the other.
    """
    if size and ranks % size == 0:
        return ranks // size
    if size and size % ranks == 0:
        return 1
    raise LayoutError(
        f"dim {dim}: {dim.names[0]} has {size}, and {axis} {ranks} ranks, of which neither divides "
        "the other",
        f"mend the dims at the tap, or the size, as in '# {dim.names[0]}=SIZE'",
    )


def size_unknown(dim: Dim) -> LayoutError:
    """Return the refusal of a dim whose outermost name is cut, and nobody says its size."""
    name = dim.names[0]
    return LayoutError(
        f"dim {dim}: the size of {name} is not known, so neither is how many ranks share a block",
        f"declare it as '# {name}=SIZE'",
    )


def settled(*sides: tuple[Sequence[Block], int]) -> tuple[Sequence[Block], ...]:
    """Return the blocks of each side with a number in the place of each `repeat`.

    Args:
        *sides: of one transfer, or one side alone: the blocks, which declare one layout, and how
            many ranks the job has.

    Raises:
        LayoutError: the size of what ranks share is not known, or does not fit their number.
    """
    if not any(_repeats(blocks[0].dims) for blocks, _ in sides):
        return tuple(blocks for blocks, _ in sides)
    placed = [(blocks, coordinates(blocks[0], world)) for blocks, world in sides]
    counts = [set(_counts(blocks[0].dims, at)) for blocks, at in placed]
    # Where both sides repeat alike, each rank has what the one at its place has, whatever the size.
    known = dict(set.intersection(*counts) if len(counts) > 1 else ()) | _known(placed)
    return tuple(_settled(blocks, at, known) for blocks, at in placed)


def _repeats(dims: Dims) -> bool:
    return any(cut.repeat for dim in dims.dims for cut in dim.cuts)


def _counts(dims: Dims, at: Places) -> Iterator[tuple[str, int]]:
    """Yield each name whose blocks repeat, and over how many ranks they do."""
    for dim in dims.dims:
        for cut in dim.cuts:
            if cut.repeat:
                yield dim.names[0], at[cut.axis][1]


def _known(sides: Iterable[tuple[Sequence[Block], Places]]) -> dict[str, int]:
    """Return the size of each name that is declared, or follows from dims of known size."""
    known: dict[str, int] = {}
    wholes: list[tuple[tuple[str, ...], int]] = []
    for blocks, at in sides:
        dims = blocks[0].dims
        known |= dims.sizes
        for i, dim in enumerate(dims.dims):
            sizes = {block.shape[i] for block in blocks}
            is_odd = len(sizes) > 1 or not dims.padded.isdisjoint(dim.names)
            if is_odd or any(cut.repeat and at[cut.axis][1] > 1 for cut in dim.cuts):
                continue
            parts = math.prod(at[cut.axis][1] // cut.share or 1 for cut in dim.cuts)
            wholes.append((dim.names, sizes.pop() * parts))
    wholes.sort(key=lambda whole: len(whole[0]))
    for names, total in [*wholes, *wholes]:  # what the second time around is new, the first told
        unknown = [name for name in names if name not in known]
        rest = math.prod(known.get(name, 1) for name in names)
        if len(unknown) == 1 and rest and total % rest == 0:
            known[unknown[0]] = total // rest
    return known


def _settled(blocks: Sequence[Block], at: Places, known: Mapping[str, int]) -> list[Block]:
    first = blocks[0]
    dims = tuple(_numbered(dim, first.shape[i], at, known) for i, dim in enumerate(first.dims.dims))
    made = {id(block.dims): replace(block.dims, dims=dims) for block in blocks}
    return [replace(block, dims=made[id(block.dims)]) for block in blocks]


def _numbered(dim: Dim, size: int, at: Places, known: Mapping[str, int]) -> Dim:
    if not any(cut.repeat for cut in dim.cuts):
        return dim
    (cut,) = dim.cuts
    ranks = at[cut.axis][1]
    if ranks == 1 or (len(dim.names) == 1 and size > 1):  # what ranks share are blocks of one
        share = 1
    elif dim.names[0] in known:
        share = share_of(dim, cut.axis, ranks, known[dim.names[0]])
    else:
        raise size_unknown(dim)
    return replace(dim, cuts=(replace(cut, share=share, repeat=False),))
