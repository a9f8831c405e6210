"""Read the text of a layout, once: `"b s[cp:zigzag,sp] h[tp] d # ep:replicated"`.

    layout    = { dim } [ "#" { fact } ] [ "#" "grad:" layout ]
    dim       = "1" | NAME [ cuts ] | "(" NAME [ cuts ] { "*" NAME } ")" [ cuts ]
    cuts      = "[" cut { "," cut } "]", the outermost first
    cut       = AXIS [ "/" NUMBER ] [ ":" qualifier { "+" qualifier } ]
    qualifier = "natural" | "sharded" | "zigzag" | "partial" | "chunk" | "split" | "repeat"
    fact      = AXIS ":replicated" | "dp:=" AXIS | NAME "=" SIZE | NAME ":padded"
                | NAME ":fill=" NUMBER

The grammar up to `partial` and `dp:=` is the one of sglang's dump comparator
(`sglang/srt/debug_utils/comparator/dims_spec`). `chunk` and `split` say how a dim that an axis does
not divide is cut: as `torch.chunk` does, or as `torch.tensor_split`; with `zigzag`, so are the 2n
chunks. `AXIS/NUMBER` says how many neighbours along the axis hold the same block; `repeat`, that as
many do as it takes where the size of the dim's outermost name is smaller than the axis, see
`repeats`. A cut at the outermost name of a fused dim is one of the dim. `NAME=SIZE` is the size
without padding. Behind `grad:` stands the layout of the gradient, where it is another. What a
DTensor says of itself stands behind all this, see `dtensor`. A dim that holds several tensors,
`{NAME: dim | NAME: dim}`, is taken apart before this reads what is left of it, see `parts`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import replace

from ..errors import LayoutError
from .dims import Cut, Dim, Dims
from .dtensor import DTENSOR, with_placements

_NAME = re.compile(r"[A-Za-z_]\w*")
_FACTOR = re.compile(r"([A-Za-z_]\w*)\s*(?:\[([^\[\]]*)\])?")
_DIM = re.compile(r"\s*(?:(1)|([A-Za-z_]\w*)|\(([^()]*)\))(?:\[([^\[\]]*)\])?(?=\s|$)")
_RULES = {"chunk", "split"}
_QUALIFIERS = ("natural", "sharded", "zigzag", "partial", "chunk", "split", "repeat")
_GRAD = re.compile(r"#\s*grad\s*:")
_MOST_DIMS = 64
_LONGEST = 4_000  # characters


@functools.lru_cache(maxsize=4096)
def parse_dims(text: str) -> Dims:
    """Read a layout.

    Raises:
        LayoutError: it cannot be read; names the place.
    """
    if len(text) > _LONGEST:
        raise unreadable(text, f"it has {len(text)} characters, expected at most {_LONGEST}")
    placed = DTENSOR.search(text)
    declared, grad = parted(text)
    if grad is not None:
        if _GRAD.search(grad):
            raise unreadable(text, "it has the layout of a gradient twice")
        parse_dims(grad)
    named, _, facts = declared.partition("#")
    found = _with_facts(text, _named(text, named), facts)
    for what, words in (("dim", found.names), ("axis", found.axes)):
        twice = sorted({word for word in words if words.count(word) > 1})
        if twice and what == "dim":
            raise unreadable(text, f"the dim {twice[0]!r} stands in it twice")
        if twice:
            raise unreadable(text, f"the axis {twice[0]!r} cuts twice; an axis cuts one dim")
    both = sorted(set(found.axes) & found.replicated)
    if both:
        raise unreadable(text, f"the axis {both[0]!r} both cuts and is replicated")
    return found if placed is None else with_placements(text, found, placed)


def gradient_dims(text: str) -> str:
    """Return the layout of a gradient where it is declared apart from its value's, else "".

    What a DTensor says stands behind either: it is then that of the gradient.
    """
    _, grad = parted(text)
    placed = DTENSOR.search(text)
    return f"{grad} # {text[placed.start() :]}" if grad and placed is not None else grad or ""


def layout_of(dims: str, kind: str) -> Dims:
    """Return the layout of a record or a tap.

    Args:
        dims: as declared.
        kind: `tensor` or `grad`. Where nothing is said of the gradient, it is laid out as its
            value; but the gradient of a summand is that of the sum: nothing is partial about it. A
            DTensor's gradient says so itself.

    Raises:
        LayoutError: it cannot be read.
    """
    if kind != "grad":
        return parse_dims(dims)
    if declared := gradient_dims(dims):
        return parse_dims(declared)
    found = parse_dims(dims)
    return replace(found, partial=()) if found.mesh is None else found


def parted(text: str) -> tuple[str, str | None]:
    """Return what is declared of a value and of its gradient; None where nothing is of that."""
    placed = DTENSOR.search(text)
    declared = text if placed is None else text[: placed.start()].rstrip().removesuffix("#")
    found = _GRAD.search(declared)
    if found is None:
        return declared, None
    return declared[: found.start()], declared[found.end() :].strip()


def unreadable(text: str, fact: str) -> LayoutError:
    """Return the refusal of a layout that cannot be read."""
    return LayoutError(
        f"the dims {text!r:.200} cannot be read: {fact}",
        "write them as in 'b s[cp:zigzag,sp] h[tp] d'",
    )


def _named(text: str, named: str) -> Dims:
    """Read what stands before the `#`."""
    dims: list[Dim] = []
    partial: dict[str, str] = {}
    at = 0
    while named[at:].strip():
        match = _DIM.match(named, at)
        if match is None:
            raise unreadable(text, f"{named[at:].split()[0]!r:.60} is not a dim")
        if len(dims) == _MOST_DIMS:
            raise unreadable(text, f"it has more than {_MOST_DIMS} dims")
        at = match.end()
        one, name, fused, cuts = match.groups()
        if one and cuts is not None:
            raise unreadable(text, "a dim of size 1 cannot be cut")
        names: tuple[str, ...] = () if one else (name,)
        if fused is not None:
            names, inner = _factors(text, fused)
            if inner is not None and cuts is not None:
                raise unreadable(text, f"'({fused})[{cuts}]' is cut twice; write its cuts once")
            cuts = cuts if inner is None else inner
        held = []
        for cut, is_partial in _cuts(text, cuts):
            if is_partial:
                partial[cut.axis] = "sum"  # on each dim of the tensor, it means the same
            else:
                held.append(cut)
        if len(held) > 1 and any(cut.repeat for cut in held):
            raise unreadable(text, "an axis that repeats blocks cuts its dim alone")
        dims.append(Dim(names, tuple(held)))
    return Dims(text, tuple(dims), tuple(partial.items()))


def _factors(text: str, fused: str) -> tuple[tuple[str, ...], str | None]:
    """Return the names in a fused dim, and the cuts at the outermost, None where there are none."""
    found = [_FACTOR.fullmatch(factor.strip()) for factor in fused.split("*")]
    if len(found) < 2 or any(factor is None for factor in found):
        raise unreadable(text, f"'({fused})' is not a fused dim such as '(heads*head_dim)'")
    (first, *others) = [factor.groups() for factor in found if factor is not None]
    for name, cuts in others:
        if cuts is not None:
            raise unreadable(
                text,
                f"{name!r} is cut inside '({fused})', where only the outermost, {first[0]!r}, can "
                "be, since a cut of a fused dim is one of all of it",
            )
    return (first[0], *(name for name, _ in others)), first[1]


def _cuts(text: str, cuts: str | None) -> Iterator[tuple[Cut, bool]]:
    """Yield each axis in brackets, and whether ranks along it hold partial results."""
    for part in cuts.split(",") if cuts is not None else ():
        place, _, rest = (piece.strip() for piece in part.partition(":"))
        axis, slash, shared = (piece.strip() for piece in place.partition("/"))
        qualifiers = [word.strip() for word in rest.split("+") if word.strip()]
        if not _NAME.fullmatch(axis):
            raise unreadable(text, f"{part.strip()!r:.60} names no axis")
        if slash and not re.fullmatch(r"[1-9][0-9]{0,8}", shared):
            raise unreadable(
                text, f"{place!r:.60} does not say how many ranks share a block, as in 'tp/2'"
            )
        share = int(shared) if slash else 1
        odd = [word for word in qualifiers if word not in _QUALIFIERS]
        if odd:
            raise unreadable(text, f"{odd[0]!r:.60} is not one of {', '.join(_QUALIFIERS)}")
        said = {word for word in qualifiers if word not in ("natural", "sharded")}
        rules = said & _RULES
        if (
            len(rules) > 1
            or (said & {"partial", "repeat"} and (len(said) > 1 or share > 1))
            or ({"zigzag", "natural"} <= set(qualifiers))
        ):
            raise unreadable(text, f"{part.strip()!r:.60} contradicts itself")
        rule = next(iter(rules), "")
        yield Cut(axis, "zigzag" in said, rule, share, "repeat" in said), "partial" in said


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
        elif match := re.fullmatch(r"(\w+)=([0-9]{1,15})", fact):
            sizes[match[1]] = int(match[2])
        elif match := re.fullmatch(r"(\w+):padded", fact):
            padded.add(match[1])
        elif match := re.fullmatch(r"(\w+):fill=(\S+)", fact):
            try:
                fills[match[1]] = float(match[2])
            except ValueError:
                raise unreadable(text, f"{match[2]!r:.60} is not a number to fill with") from None
            padded.add(match[1])
        else:
            raise unreadable(
                text,
                f"{fact!r:.60} after the # is not one of AXIS:replicated, dp:=AXIS, DIM=SIZE, "
                "DIM:padded, DIM:fill=NUMBER, with nothing but spaces between two of them",
            )
    unknown = sorted({*padded, *sizes} - set(found.names))
    if unknown:
        raise unreadable(text, f"{unknown[0]!r} after the # is not one of its dims")
    return replace(
        found,
        replicated=frozenset(replicated),
        data=frozenset(data - replicated),
        sizes=sizes,
        padded=frozenset(padded),
        fills=fills,
    )
