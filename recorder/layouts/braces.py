"""Read the text of a layout of which one dim holds several tensors; `parts` finds where they lie.

    part dim  = parts | "(" { FACTOR "*" } parts { "*" NAME } ")" [ cuts ]
    parts     = "{" NAME ":" dim { "|" NAME ":" dim } "}"

A FACTOR is a NAME, the first of them with its cuts if the dim is cut there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .dtensor import DTENSOR
from .parse import parse_dims, parted, unreadable

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_BEHIND = re.compile(r"\s*(?:\[([^\[\]]*)\])?(?=\s|$)")
_SHARD = re.compile(r"Shard[(]dim=([0-9]{1,15})")
_FACT = re.compile(r"(\w+)(?:=([0-9]{1,15})|:padded|:fill=\S+)")


@dataclass(frozen=True)
class Braced:
    """A layout with parts, read.

    Attributes:
        text: as written.
        label: the dim with parts, as written.
        before: the dims before it.
        after: those behind it.
        dim: how many stand before it.
        ndim: how many there are in all.
        outer: what stands before the parts in it, as a dim of its own; "" where nothing does.
        parts: name -> dim.
        inner: what stands behind the parts in it, likewise.
        facts: what stands behind the `#`.
        placed: what a DTensor says of itself, else "".
    """

    text: str
    label: str
    before: str
    after: str
    dim: int
    ndim: int
    outer: str
    parts: tuple[tuple[str, str], ...]
    inner: str
    facts: tuple[str, ...]
    placed: str

    def layout(self, part: str, more: Mapping[str, int], shape: Sequence[int]) -> str:
        """Return a part's layout.

        Args:
            part: its own dim.
            more: sizes to declare.
            shape: of a DTensor, the sizes of what becomes of the dim with parts.
        """
        dims = self.plain(part)
        names = set(parse_dims(dims).names)
        facts = [fact for fact in self.facts if _named(fact) in {*names, ""}]
        facts += [f"{name}={size}" for name, size in more.items()]
        text = f"{dims} # {' '.join(facts)}" if facts else dims
        return f"{text} # {self._replaced(shape)}" if self.placed else text

    def plain(self, part: str) -> str:
        """Return a part's dims, without what is said of them."""
        return " ".join(filter(None, (self.before, self.outer, part, self.inner, self.after)))

    def _replaced(self, shape: Sequence[int]) -> str:
        """Return what a DTensor says of itself with other dims in the place of the one."""
        found = DTENSOR.search(self.placed)
        assert found is not None
        sizes = [size.strip() for size in found[1].split(",")]
        sizes[self.dim : self.dim + 1] = map(str, shape)

        def moved(match: re.Match[str]) -> str:
            i = int(match[1])
            return f"Shard(dim={i + (len(shape) - 1) * (i > self.dim)}"

        return f"DTensor [{', '.join(sizes)}]{_SHARD.sub(moved, found[2])}"


def _named(fact: str) -> str:
    """Return the name of the dim that a fact is about, "" where it is about an axis."""
    found = _FACT.fullmatch(fact)
    return "" if found is None else found[1]


@functools.lru_cache(maxsize=1024)
def read(text: str) -> Braced:
    """Read a layout with parts.

    Raises:
        LayoutError: it cannot be read; names the place.
    """
    declared, grad = parted(text)
    if grad is not None:
        raise unreadable(
            text,
            "the gradient of what has parts has the same; if not, tap them one by one",
        )
    named, _, facts = declared.partition("#")
    at, end = named.find("{"), named.find("}")
    if at < 0:
        raise unreadable(text, "it has no parts")
    if end < at:
        raise unreadable(text, f"the brace at {named[at:]!r:.60} is not closed")
    if "{" in named[at + 1 : end]:
        raise unreadable(text, f"the parts {named[at : end + 1]!r:.60} have parts themselves")
    if "{" in named[end:] or "}" in named[end + 1 :]:
        raise unreadable(text, f"{named[end + 1 :].strip()!r:.60}: one dim can have parts, no more")
    before, outer, behind, cuts, after = _around(text, named[:at], named[end + 1 :])
    parts: dict[str, str] = {}
    for part in named[at + 1 : end].split("|"):
        name, colon, dim = (piece.strip() for piece in part.partition(":"))
        if not colon or not _NAME.fullmatch(name) or not dim:
            raise unreadable(text, f"{part.strip()!r:.60} is not a part such as 'q: (heads*d)'")
        if name in parts:
            raise unreadable(text, f"the part {name!r} stands in it twice")
        parts[name] = dim
        _check_part(text, dim, is_factor=bool(outer))
    if cuts is not None and not outer:
        raise unreadable(
            text,
            f"the cut [{cuts}] goes through the parts; write it in each part that it cuts, as in "
            "'{q: h[tp] | k: g[tp]}'",
        )
    if cuts is not None and "[" in outer[0]:
        raise unreadable(text, f"it is cut at {outer[0]!r} and by [{cuts}]; write its cuts once")
    count = len(parse_dims(before).dims)
    found = Braced(
        text=text,
        label=named[len(before) : len(named) - len(after)].strip(),
        before=before.strip(),
        after=after.strip(),
        dim=count,
        ndim=count + 1 + len(parse_dims(after).dims),
        outer=_fused(outer) + (f"[{cuts}]" if cuts is not None else ""),
        parts=tuple(parts.items()),
        inner=_fused(behind),
        facts=tuple(facts.split()),
        placed=text[len(declared) :].strip(" #"),
    )
    names = {name for dim in parts.values() for name in parse_dims(found.plain(dim)).names}
    for fact in found.facts:
        if _named(fact) not in {*names, ""}:
            raise unreadable(text, f"{_named(fact)!r} after the # is not one of its dims")
    return found


def _around(
    text: str, before: str, after: str
) -> tuple[str, list[str], list[str], str | None, str]:
    """Return what stands around braces: dims, factors, factors, the cuts of the dim, dims."""
    outer: list[str] = []
    behind: list[str] = []
    is_fused = before.rfind("(") > before.rfind(")")
    if is_fused:
        before, _, inside = before.rpartition("(")
        inside_after, closed, after = after.partition(")")
        if not closed:
            raise unreadable(text, "the parenthesis around its parts is not closed")
        outer = [factor.strip() for factor in inside.split("*")]
        behind = [factor.strip() for factor in inside_after.split("*")]
        if outer.pop() or behind.pop(0) or not all(outer + behind) or not outer + behind:
            raise unreadable(
                text, "what is fused with its parts is not written as in '(g*{q: r | k: 1}*d)'"
            )
        if any("[" in factor for factor in behind):
            raise unreadable(text, f"{behind[0]!r} is cut behind the parts, which cuts them all")
    rest = _BEHIND.match(after)
    if (before and not before[-1].isspace()) or rest is None:
        raise unreadable(text, "its parts are neither a dim nor a factor of one")
    return before, outer, behind, rest[1], after[rest.end() :]


def _fused(factors: Sequence[str]) -> str:
    return f"({'*'.join(factors)})" if len(factors) > 1 else "".join(factors)


def _check_part(text: str, dim: str, *, is_factor: bool) -> None:
    found = parse_dims(dim)
    if len(found.dims) != 1:
        raise unreadable(text, f"the part {dim!r:.60} is of {len(found.dims)} dims, expected 1")
    if found.cut_axes and is_factor:
        raise unreadable(
            text,
            f"the part {dim!r:.60} is cut, and is not the outermost of its dim; a cut of all the "
            "dim stands at its first factor or behind it",
        )
