"""Several tensors one behind the other along one dim: `s b (g*{q: (r*d) | k: d | v: d})[tp]`.

1. `read` finds the dim with parts in the text of a layout, and what stands around it.
2. `_solve` finds the sizes of all its names: those that are known, and from the shape one more.
3. `parts_of` gives each part its place and its own layout, which `parse` can read.

The place of the cut says which layout it is. Cut inside, `{q: (g*d)[tp] | k: g[tp]}`, each rank has
its own part of each tensor; cut outside, or at the first factor, `(g[tp]*{q: d | k: 1})`, what
stands before the parts is cut, and the whole dim with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ..errors import LayoutError
from ..mesh import FrozenMesh
from .blocks import Block, coordinates
from .braces import Braced, read
from .cutting import Places
from .dims import Cut, Dim, Dims
from .dtensor import DTENSOR
from .parse import parse_dims
from .repeats import share_of, size_unknown

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part:
    """One of the tensors along a dim.

    Attributes:
        name: its name, which is that of its tap.
        dims: its layout.
        dim: which of the whole's dims has parts.
        split: the sizes of the dims that this is taken apart in first; none where it stays one.
        along: which of the dims is narrowed then.
        start: where the part begins along that.
        length: how many indices it has.
    """

    name: str
    dims: str
    dim: int
    split: tuple[int, ...]
    along: int
    start: int
    length: int

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor of the shape it was found for, in the tensor's own memory."""
        if self.split:
            tensor = tensor.unflatten(self.dim, self.split)
        return tensor.narrow(self.along, self.start, self.length)


def has_parts(text: str) -> bool:
    """Whether a layout has a dim with parts."""
    return "{" in text


def names_of(text: str) -> tuple[str, ...]:
    """Return the names of the parts in a layout, in order.

    Raises:
        LayoutError: it cannot be read.
    """
    return tuple(name for name, _ in read(text).parts)


def parts_of(
    text: str,
    shape: Sequence[int],
    sizes: Mapping[str, int] | None = None,
    mesh: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[Part, ...]:
    """Return the parts of a tensor, in order.

    Args:
        text: its layout; of a DTensor with what it says of itself, as `capture.dims_text` has it.
        shape: the sizes of the tensor on this rank, a DTensor's local part.
        sizes: name -> size in all of what is in parts or fused, beside those in the text, which
            hold. All but one of those in the dim with parts are needed.
        mesh: where the rank stands; None where nobody says.

    Raises:
        LayoutError: it cannot be read, or the sizes contradict each other or do not say enough.
    """
    known = tuple(sorted((sizes or {}).items()))
    where = None if mesh is None else tuple(sorted(mesh.items()))
    return _parts_of(text, tuple(shape), known, where)


@dataclass(frozen=True)
class _Term:
    """What one part takes of the dim on this rank.

    Attributes:
        dims: its layout.
        own: those of its dims that become of the dim with parts.
        places: where the rank stands, an axis that the mesh does not have being of size 1; None
            where nobody says.
    """

    dims: Dims
    own: tuple[Dim, ...]
    places: Places | None

    @property
    def names(self) -> tuple[str, ...]:
        """The names whose sizes are multiplied."""
        return tuple(name for dim in self.own for name in dim.names)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What cuts that."""
        return self.own[0].cuts

    def size(self, sizes: Mapping[str, Fraction]) -> Fraction:
        """Return the product of those sizes that are known, in all."""
        return _product(self.names, sizes)

    def blocks(self, known: Mapping[str, int]) -> int:
        """Return into how many blocks it is cut.

        Raises:
            LayoutError: ranks share blocks, and it cannot be told how many do.
        """
        found, head = 1, self.own[0]
        for cut in self.cuts:
            assert self.places is not None
            ranks = self.places[cut.axis][1]
            share = min(cut.share, ranks)
            if cut.repeat and ranks > 1:
                if head.names[0] not in known:
                    raise size_unknown(head)
                share = share_of(head, cut.axis, ranks, known[head.names[0]])
            found *= ranks // share
        return found


@functools.lru_cache(maxsize=4096)
def _parts_of(
    text: str, shape: tuple[int, ...], more: tuple[tuple[str, int], ...], mesh: FrozenMesh | None
) -> tuple[Part, ...]:
    found = read(text)
    if len(shape) != found.ndim:
        raise LayoutError(
            f"the dims {text!r:.200} name {found.ndim}, and its tensor has the shape {list(shape)}",
            "mend the dims at the tap",
        )
    width, middle = shape[found.dim], int(bool(found.outer))
    count = middle + 1 + bool(found.inner)
    terms = []
    known = dict(more)
    for _, dim in found.parts:
        dims = parse_dims(found.layout(dim, {}, (1,) * count))
        is_open = mesh is None and dims.mesh is None
        places = None if is_open else coordinates(Block(0, dims, (), mesh), 1)
        terms.append(_Term(dims, dims.dims[found.dim :][:count], places))
        known |= dims.sizes
    for term in terms:  # of what is padded, the size without padding is another
        known = {name: size for name, size in known.items() if name not in term.dims.padded}
    sizes, blocks = _solve(found, terms, known, width)
    each = []
    for term, n in zip(terms, blocks, strict=True):
        taken = [_product(dim.names, sizes) for dim in term.own]
        taken[0] /= n
        if any(size.denominator != 1 for size in taken):
            raise _uneven(found, term, n, known)
        each.append([int(size) for size in taken])
    total = sum(held[middle] for held in each)
    split = [*each[0][:middle], total, *each[0][middle + 1 :]]
    if math.prod(split) != width:
        raise _misfit(found, terms, known, width)
    _check_placed(found, terms, split)
    parts, start = [], 0
    taken_apart = tuple(split) if count > 1 else ()
    for (name, dim), term, held in zip(found.parts, terms, each, strict=True):
        whole = [*split[:middle], held[middle], *split[middle + 1 :]]
        if middle:
            whole[0] *= _over_mesh(terms[0])
        made = found.layout(dim, _facts(term.dims, known), whole)
        parse_dims(made)
        along, length = found.dim + middle, held[middle]
        parts.append(Part(name, made, found.dim, taken_apart, along, start, length))
        start += length
    return tuple(parts)


def _solve(
    found: Braced, terms: Sequence[_Term], known: Mapping[str, int], width: int
) -> tuple[dict[str, Fraction], list[int]]:
    """Return the size of each name, and into how many blocks each part is cut.

    Where nobody says where the rank stands, but all that is cut is cut alike, and begins with the
    name whose size is not known, that has its size on this rank, and the cut is none.
    """
    names = list(dict.fromkeys(name for term in terms for name in term.names))
    sizes = {name: Fraction(known[name]) for name in names if name in known}
    unknown = [name for name in names if name not in sizes]
    if len(unknown) > 1:
        raise _unknown(found, unknown[1:])
    cut = [term for term in terms if term.cuts]
    if not cut or cut[0].places is not None:
        blocks = [term.blocks(known) for term in terms]
    else:
        is_alike = len({term.cuts for term in cut}) == 1
        is_plain = is_alike and not any(c.repeat or c.share > 1 for c in cut[0].cuts)
        of_unknown = [term for term in terms if {*unknown} & {*term.names}]
        if is_plain and unknown and of_unknown == cut == [t for t in cut if t.names[0] in unknown]:
            blocks = [1] * len(terms)
        elif is_plain and not unknown:
            rest = width - _sum(term.size(sizes) for term in terms if not term.cuts)
            in_all = _sum(term.size(sizes) for term in cut)
            if rest <= 0 or (in_all / rest).denominator != 1:
                raise _misfit(found, terms, known, width)
            blocks = [int(in_all / rest) if term.cuts else 1 for term in terms]
        else:
            axes = ", ".join(f"{axis}=(rank, size)" for axis in sorted(cut[0].dims.cut_axes))
            raise LayoutError(
                f"dim {found.label}: nobody says how many ranks cut it",
                f"declare where this one stands: recorder.declare_mesh({axes})",
            )
    for name in unknown:
        taken = [term.size(sizes) / n for term, n in zip(terms, blocks, strict=True)]
        of_name = [size for term, size in zip(terms, taken, strict=True) if name in term.names]
        size = (width - _sum(taken) + _sum(of_name)) / _sum(of_name)
        if size < 1 or size.denominator != 1:
            raise _misfit(found, terms, known, width)
        sizes[name] = size
    return sizes, blocks


def _facts(dims: Dims, known: Mapping[str, int]) -> dict[str, int]:
    """Return the known sizes that the other side of a transfer may need, and nobody wrote down.

    Those are of what is fused, and of what ranks share.
    """
    names = [name for dim in dims.dims if len(dim.names) > 1 for name in dim.names]
    names += [dim.names[0] for dim in dims.dims if any(cut.repeat for cut in dim.cuts)]
    return {n: known[n] for n in dict.fromkeys(names) if n in known and n not in dims.sizes}


def _sum(sizes: Iterable[Fraction]) -> Fraction:
    return sum(sizes, start=Fraction(0))


def _product(names: Iterable[str], sizes: Mapping[str, Fraction]) -> Fraction:
    found = Fraction(1)
    for name in names:
        found *= sizes.get(name, 1)
    return found


def _over_mesh(term: _Term) -> int:
    """Return over how many ranks of a DTensor's mesh its placements cut the dim with parts."""
    mesh = term.dims.mesh or {}
    return math.prod(mesh[cut.axis][1] for cut in term.cuts if cut.axis in mesh)


def _check_placed(found: Braced, terms: Sequence[_Term], split: Sequence[int]) -> None:
    """Refuse a DTensor whose placements cut through its parts."""
    shape = terms[0].dims.shape
    ranks = _over_mesh(terms[0])
    if shape is None or ranks == 1:
        return
    placed = DTENSOR.search(found.placed)
    assert placed is not None
    whole = int(placed[1].split(",")[found.dim])
    if not found.outer or math.prod(split) * ranks != whole:
        raise LayoutError(
            f"dim {found.label}: the DTensor's own placements cut its {whole} as one over {ranks} "
            "ranks, and so through its parts",
            "tap its parts where each is a tensor of its own",
        )


def _unknown(found: Braced, names: Sequence[str]) -> LayoutError:
    facts = " ".join(f"{name}=SIZE" for name in names)
    which = f"the size of {names[0]} is" if len(names) == 1 else f"the sizes of {_list(names)} are"
    them = "it" if len(names) == 1 else "them"
    return LayoutError(f"dim {found.label}: {which} not known", f"declare {them} as '# {facts}'")


def _list(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _said(terms: Sequence[_Term], known: Mapping[str, int]) -> str:
    """Return the sizes and the axes that a dim with parts goes by, for messages."""
    names = dict.fromkeys(name for term in terms for name in term.names)
    words = [f"{name}={known[name]}" for name in names if name in known]
    places = {axis: at for term in terms for axis, at in (term.places or {}).items()}
    axes = dict.fromkeys(cut.axis for term in terms for cut in term.cuts)
    words += [f"{axis} of {places[axis][1]}" for axis in axes if axis in places]
    return _list(words)


def _misfit(
    found: Braced, terms: Sequence[_Term], known: Mapping[str, int], width: int
) -> LayoutError:
    said = _said(terms, known)
    return LayoutError(
        f"dim {found.label} has {width} here, which is not what its parts make"
        + (f" with {said}" if said else ""),
        _declaring(terms) + "mend the dims or the sizes at the tap, or say what is padded, as in "
        f"'# {terms[0].names[0]}:padded'",
    )


def _declaring(terms: Sequence[_Term]) -> str:
    """Return what to declare where an axis that cuts a part was counted as 1."""
    counted = (c.axis for t in terms for c in t.cuts if t.places and t.places[c.axis][1] == 1)
    axis = next(counted, "")
    return f"declare_mesh({axis}=(rank, size)) if {axis} is of more ranks; else " if axis else ""


def _uneven(found: Braced, term: _Term, n: int, known: Mapping[str, int]) -> LayoutError:
    fact = f"dim {found.label}: {n} blocks of {term.own[0]} with {_said([term], known)} are uneven"
    if found.outer:
        return LayoutError(
            f"{fact}, so that ranks are cut through its parts",
            "tap its parts where each is a tensor of its own",
        )
    return LayoutError(
        fact, f"leave out the size of {term.own[0].names[0]}, which follows from the shape"
    )
