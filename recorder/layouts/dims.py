"""Read the text of a layout once into plain data: `"b s[cp:zigzag,sp] h[tp] d # ep:replicated"`.

    layout    = { dim } [ "#" { fact } ]
    dim       = "1" | NAME [ cuts ] | "(" NAME { "*" NAME } ")" [ cuts ]
    cuts      = "[" AXIS [ ":" qualifier { "+" qualifier } ] { "," ... } "]", the outermost first
    qualifier = "natural" | "sharded" | "zigzag" | "partial" | "chunk" | "split"
    fact      = AXIS ":replicated" | "dp:=" AXIS | NAME "=" SIZE | NAME ":padded"
                | NAME ":fill=" NUMBER

The grammar up to `partial` and `dp:=` is the one of sglang's dump comparator
(`sglang/srt/debug_utils/comparator/dims_spec`). `chunk` and `split` say how a dim that an axis does
not divide is cut: as `torch.chunk` does, or as `torch.tensor_split`. `NAME=SIZE` is the size
without padding.

A DTensor writes its own: `DTensor [8, 6] tp:0/2=Shard(dim=1)`, its shape, and for each dim of its
mesh the name, this rank's coordinate, the size and the placement; behind a `#` where its dims have
names.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..errors import LayoutError

TOKENS = "t"
"""The name of a dim of flattened tokens, whose sequence lengths are in the extras."""
_NAME = re.compile(r"[A-Za-z_]\w*")
_DIM = re.compile(r"(?:(1)|([A-Za-z_]\w*)|\(([^()]*)\))(?:\[([^\[\]]*)\])?(?=\s|$)")
_DTENSOR = re.compile(r"DTensor \[([\d, ]*)\](.*)", re.DOTALL)
_PLACED = re.compile(r"(\w+):(?:(\d+)/)?(\d+)=(\w+\([^()]*\))")
_SHARD = re.compile(r"_?(?:Strided)?Shard\(dim=(\d+)(?:, (?:sf|split_factor)=(\d+))?\)")
_PARTIAL = re.compile(r"Partial\((?:reduce_op=)?'?(\w+)'?\)")
_QUALIFIERS = ("natural", "sharded", "zigzag", "partial", "chunk", "split")
_REDUCTIONS = ("sum", "avg", "min", "max")
_MOST_DIMS = 64
_MOST_SIZE = 1 << 60


@dataclass(frozen=True)
class Cut:
    """One axis that cuts a dim.

    Attributes:
        axis: its name.
        zigzag: whether rank k of n gets chunks k and 2n-1-k of 2n, as context parallelism does to
            balance causal attention; else chunk k of n.
        rule: `chunk` or `split` where that was declared, else "".
    """

    axis: str
    zigzag: bool = False
    rule: str = ""


@dataclass(frozen=True)
class Dim:
    """One dim of a tensor: no names for a `1`, several for a fused dim, outermost first."""

    names: tuple[str, ...]
    cuts: tuple[Cut, ...] = ()

    def __str__(self) -> str:
        text = self.label
        if self.cuts:
            text += f"[{','.join(c.axis + (':zigzag' if c.zigzag else '') for c in self.cuts)}]"
        return text

    @property
    def label(self) -> str:
        """Its name as declared, without the cuts."""
        if len(self.names) == 1:
            return self.names[0]
        return f"({'*'.join(self.names)})" if self.names else "1"


@dataclass(frozen=True)
class Dims:
    """A layout as declared.

    Attributes:
        text: as written.
        dims: its dims, one for each of the tensor's.
        partial: axes over which ranks hold partial results, each with how to reduce them.
        replicated: axes declared replicated.
        data: axes whose ranks hold other data (`dp`) or other layers (`pp`).
        sizes: name -> size without padding, where declared.
        padded: names of dims with padding behind their end.
        fills: name -> what a graft writes into the target's padding, where declared.
        mesh: a DTensor's: axis -> this rank's coordinate (None where not known) and the size.
        shape: a DTensor's whole shape.
        is_named: whether the dims' names were declared, and not just counted.
    """

    text: str
    dims: tuple[Dim, ...]
    partial: tuple[tuple[str, str], ...] = ()
    replicated: frozenset[str] = frozenset()
    data: frozenset[str] = frozenset(("dp", "pp"))
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    padded: frozenset[str] = frozenset()
    fills: Mapping[str, float] = field(default_factory=dict, hash=False)
    mesh: Mapping[str, tuple[int | None, int]] | None = field(default=None, hash=False)
    shape: tuple[int, ...] | None = None
    is_named: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all dims, fused ones taken apart, in order."""
        return tuple(name for dim in self.dims for name in dim.names)

    @property
    def cut_axes(self) -> tuple[str, ...]:
        """The axes that cut a dim, in order."""
        return tuple(cut.axis for dim in self.dims for cut in dim.cuts)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes over which blocks differ: cut or partial."""
        return (*self.cut_axes, *(axis for axis, _ in self.partial))

    def says_the_same(self, other: Dims) -> bool:
        """Whether two ranks declare one layout; their coordinates may differ."""
        mine, theirs = self.mesh or {}, other.mesh or {}
        sizes = [{axis: size for axis, (_, size) in mesh.items()} for mesh in (mine, theirs)]
        blank = {"text": "", "mesh": None}
        return sizes[0] == sizes[1] and replace(self, **blank) == replace(other, **blank)  # type: ignore[arg-type]

    def whole(self) -> Dims:
        """The layout of the tensor that nothing cuts."""
        return replace(
            self,
            text=" ".join(dim.label for dim in self.dims),
            dims=tuple(Dim(dim.names) for dim in self.dims),
            partial=(),
            padded=frozenset(),
            sizes={},
            fills={},
            mesh=None,
            shape=None,
        )

    def renamed(self, other: Dims) -> Dims:
        """This layout with the names of another's dims, by position."""
        dims = tuple(Dim(o.names, d.cuts) for d, o in zip(self.dims, other.dims, strict=True))
        return replace(self, dims=dims, is_named=True)


@functools.lru_cache(maxsize=4096)
def parse_dims(text: str) -> Dims:
    """Read a layout.

    Raises:
        LayoutError: it cannot be read; names the place.
    """
    named, _, facts = text.partition("#")
    placed = _DTENSOR.search(text)
    if placed is not None:
        named, _, facts = text[: placed.start()].partition("#")
        facts = facts.rstrip().removesuffix("#")
    found = Dims(text, tuple(_dims(text, named)))
    names = found.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _unreadable(text, f"the dim {twice[0]!r} stands in it twice")
    found = _with_facts(text, _with_partial(text, named, found), facts)
    axes = found.axes
    again = sorted({axis for axis in axes if axes.count(axis) > 1})
    if again:
        raise _unreadable(text, f"the axis {again[0]!r} cuts twice; an axis cuts one dim")
    both = sorted(set(axes) & found.replicated)
    if both:
        raise _unreadable(text, f"the axis {both[0]!r} both cuts and is replicated")
    if placed is not None:
        return _placed(text, found, placed)
    return found


def _unreadable(text: str, fact: str) -> LayoutError:
    return LayoutError(
        f"the dims {text!r:.200} cannot be read: {fact}; write them as in "
        "'b s[cp:zigzag,sp] h[tp] d'"
    )


def _matches(text: str, named: str) -> Iterator[re.Match[str]]:
    at, count = 0, 0
    while True:
        at += len(named[at:]) - len(named[at:].lstrip())
        if at == len(named):
            return
        match = _DIM.match(named, at)
        if match is None:
            raise _unreadable(text, f"{named[at:].split()[0]!r:.60} is no dim")
        count += 1
        if count > _MOST_DIMS:
            raise _unreadable(text, f"it has more than {_MOST_DIMS} dims")
        yield match
        at = match.end()


def _dims(text: str, named: str) -> Iterator[Dim]:
    for match in _matches(text, named):
        one, name, fused, cuts = match.groups()
        if one:
            names: tuple[str, ...] = ()
            if cuts is not None:
                raise _unreadable(text, "a dim of size 1 cannot be cut")
        elif name:
            names = (name,)
        else:
            names = tuple(part.strip() for part in fused.split("*"))
            if len(names) < 2 or not all(_NAME.fullmatch(part) for part in names):
                raise _unreadable(text, f"'({fused})' is no fused dim such as '(heads*head_dim)'")
        yield Dim(names, tuple(cut for cut, partial in _cuts(text, cuts) if not partial))


def _cuts(text: str, cuts: str | None) -> Iterator[tuple[Cut, bool]]:
    """Yield each axis in brackets, and whether it is one of partial results."""
    for part in cuts.split(",") if cuts is not None else ():
        axis, _, rest = (piece.strip() for piece in part.partition(":"))
        qualifiers = [word.strip() for word in rest.split("+") if word.strip()]
        if not _NAME.fullmatch(axis):
            raise _unreadable(text, f"{part.strip()!r:.60} names no axis")
        odd = [word for word in qualifiers if word not in _QUALIFIERS]
        if odd:
            known = ", ".join(_QUALIFIERS)
            raise _unreadable(text, f"{odd[0]!r:.60} is none of {known}")
        rules = [word for word in qualifiers if word in ("chunk", "split")]
        orders = {word for word in qualifiers if word in ("natural", "zigzag")}
        if len(rules) > 1 or len(orders) > 1 or (rules and "zigzag" in orders):
            raise _unreadable(text, f"{part.strip()!r:.60} contradicts itself")
        rule = rules[0] if rules else ""
        yield Cut(axis, "zigzag" in qualifiers, rule), "partial" in qualifiers


def _with_partial(text: str, named: str, found: Dims) -> Dims:
    axes: list[str] = []
    for match in _matches(text, named):
        for cut, partial in _cuts(text, match[4]):
            if partial and cut.zigzag:
                raise _unreadable(text, f"{cut.axis!r} holds partial sums, which have no order")
            if partial and cut.axis not in axes:  # on each dim of the tensor, it means the same
                axes.append(cut.axis)
    return replace(found, partial=tuple((axis, "sum") for axis in axes))


def _with_facts(text: str, found: Dims, facts: str) -> Dims:
    replicated: set[str] = set()
    padded: set[str] = set()
    sizes: dict[str, int] = {}
    fills: dict[str, float] = {}
    data = set(found.data)
    for fact in facts.split():
        if match := re.fullmatch(r"dp:=(\w+)", fact):
            data = (data - {"dp"}) | {match[1]}
        elif match := re.fullmatch(r"(\w+):replicated", fact):
            replicated.add(match[1])
        elif match := re.fullmatch(r"(\w+)=(\d{1,18})", fact):
            sizes[match[1]] = int(match[2])
        elif match := re.fullmatch(r"(\w+):padded", fact):
            padded.add(match[1])
        elif match := re.fullmatch(r"(\w+):fill=(\S+)", fact):
            try:
                fills[match[1]] = float(match[2])
            except ValueError:
                raise _unreadable(text, f"{match[2]!r:.60} is no number to fill with") from None
            padded.add(match[1])
        else:
            raise _unreadable(
                text,
                f"{fact!r:.60} behind the # is none of AXIS:replicated, dp:=AXIS, DIM=SIZE, "
                "DIM:padded, DIM:fill=NUMBER",
            )
    unknown = sorted({*padded, *sizes} - set(found.names))
    if unknown:
        raise _unreadable(text, f"{unknown[0]!r} behind the # is none of its dims")
    return replace(
        found,
        replicated=frozenset(replicated),
        data=frozenset(data - replicated),
        sizes=sizes,
        padded=frozenset(padded),
        fills=fills,
    )


def _placed(text: str, named: Dims, found: re.Match[str]) -> Dims:
    """Read what a DTensor says of itself."""
    shape = tuple(int(n) for n in found[1].split(",") if n.strip())
    if any(n >= _MOST_SIZE for n in shape) or math.prod(shape) >= _MOST_SIZE:
        raise _unreadable(text, "its shape is larger than any tensor's")
    dims = named.dims or tuple(Dim((f"dim{i}",)) for i in range(len(shape)))
    if len(dims) != len(shape):
        raise LayoutError(
            f"the dims {text!r:.200} name {len(dims)} dims of a DTensor that has {len(shape)}"
        )
    if _PLACED.sub("", found[2]).strip():
        raise _unreadable(text, f"{found[2].strip()!r:.80} are no placements")
    mesh: dict[str, tuple[int | None, int]] = {}
    placements: list[tuple[str, int, str]] = []
    for axis, at, size, placement in _PLACED.findall(found[2]):
        mesh[axis] = (int(at) if at else None, int(size))
        placements.append((axis, int(size), placement))
    cuts, partial = _order(text, placements, len(shape))
    declared = [c for dim in named.dims for c in dim.cuts]
    if declared and [dim.cuts for dim in named.dims] != cuts:
        raise LayoutError(
            f"the dims {text!r:.200} contradict the DTensor's own placements; name its dims only"
        )
    return replace(
        named,
        dims=tuple(Dim(dim.names, cut) for dim, cut in zip(dims, cuts, strict=True)),
        partial=tuple(partial),
        replicated=frozenset(),
        data=frozenset(),  # what a placement calls replicated is, whatever the axis is called
        mesh=mesh,
        shape=shape,
        is_named=bool(named.dims),
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
                raise _unreadable(text, f"{placement} names no dim of it")
            place = 0
            while factor > 1 and place < len(cuts[dim]) and factor % cuts[dim][place][1] == 0:
                factor //= cuts[dim][place][1]
                place += 1
            if factor != 1:
                raise LayoutError(
                    f"the placement {placement} of {text!r:.200} is not one after whole cuts by "
                    "the mesh; redistribute it to Shard or Replicate before the tap"
                )
            cuts[dim].insert(place, (Cut(axis, rule="chunk"), size))
        elif reduction := _PARTIAL.fullmatch(placement):
            if reduction[1] not in _REDUCTIONS:
                raise LayoutError(
                    f"the placement {placement} of {text!r:.200} cannot be reduced here; "
                    "redistribute it to Replicate before the tap"
                )
            partial.insert(0, (axis, reduction[1]))
        elif placement != "Replicate()":
            raise LayoutError(
                f"the placement {placement} of {text!r:.200} is not known; "
                "redistribute it to Shard or Replicate before the tap"
            )
    return [tuple(cut for cut, _ in line) for line in cuts], partial
