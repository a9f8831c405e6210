"""Paths of taps without edits: which modules of a program, and what of each.

    path     = [ modules ] [ ">" FUNCTION ] [ ":" place ]
    modules  = part { "." part }, below the root
    part     = NAME | "**" | any mixture of characters, "*" and "{" TAG [ "+" N | "-" N ] "}"
    place    = ( "output" | "input" | "grad_output" | "grad_input" ) { "." MEMBER } | PARAMETER

`*` stands for any characters between two dots, `**` for any number of parts, and a path that begins
with `*.` fits at any depth. `{layer}` is one part or a piece of one, and becomes a tag; with
`{layer+1}` the number there is one more than the tag. Without modules it is the root itself.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from .errors import UsageError
from .tags import RESERVED, TagValue

_CAPTURE = re.compile(r"\{([^{}]*)\}")
_TAG = re.compile(r"([A-Za-z_]\w*)\s*(?:([+-])\s*([0-9]{1,6}))?")
_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_MEMBER = re.compile(r"\w+(?:\.\w+)*")
_ANY = r"[^.]+"
_SIDES = ("output", "input", "grad_output", "grad_input")
_FORM = "'model.layers.{layer}.mlp:output'"


@dataclass(frozen=True)
class Place:
    """What of a module's call is meant.

    Attributes:
        side: `output`, `input` or `parameter`.
        members: the way from there into tuples, dicts and dataclasses; a parameter's name.
        is_gradient: whether its gradient is meant.
    """

    side: str = "output"
    members: tuple[str, ...] = ()
    is_gradient: bool = False

    def __str__(self) -> str:
        gradient = "grad_" if self.is_gradient else ""
        first = () if self.side == "parameter" else (gradient + self.side,)
        return ".".join((*first, *self.members))


@dataclass(frozen=True)
class Path:
    """A path as typed, parsed.

    Attributes:
        text: as typed.
        modules: what stands before `>` and `:`.
        function: what gives the value while the module runs, as it can be imported, or as the
            file that defines the module's class calls it; "" for the module itself.
        place: what of it.
        tags: the names of the tags that stand in braces, each with what its number is more by.
    """

    text: str
    modules: str
    function: str
    place: Place
    tags: tuple[tuple[str, int], ...]
    _pattern: re.Pattern[str]

    @property
    def first(self) -> str:
        """The first part where that is a plain name, else ""."""
        part = self.modules.partition(".")[0]
        return part if part.isidentifier() else ""

    @property
    def is_anywhere(self) -> bool:
        """Whether it fits at any depth."""
        return self.modules.startswith(("*.", "**"))

    def fits(self, name: str) -> dict[str, TagValue] | None:
        """Return the tags in a module's qualified name; None where the path does not fit it."""
        found = self._pattern.fullmatch(name)
        return None if found is None else self._tags(found)

    def holder(self, name: str, tag: str) -> str:
        """Return the name of the module whose number or name a tag is, of one that fits."""
        found = self._pattern.fullmatch(name)
        end = len(name) if found is None else found.end(tag)
        dot = name.find(".", end)
        return name if dot < 0 else name[:dot]

    def fits_below(self, name: str) -> str | None:
        """Return what comes before the path in a qualified name; None where it does not fit."""
        found = self._below.fullmatch(name)
        return None if found is None or self._tags(found) is None else found["graft_base"] or ""

    def without(self, first: str) -> Path:
        """Return the path below its first part, where that is this one."""
        if not first or not self.modules.startswith(first + "."):
            return self
        return parse_path(self.text.replace(f"{first}.", "", 1))

    def called(self, name: str) -> str:
        """Return what the tap of a module is called by default: its name without the tags."""
        value = replace(self.place, is_gradient=False)  # the kind of its record says that it is one
        place = "" if str(value) == "output" else f":{value}"
        if self.tags:
            name = ".".join(filter(None, (_CAPTURE.sub("", p) for p in self.modules.split("."))))
            name = name.replace("*", "").strip(".")
        function = f">{self.function.rpartition('.')[2]}" if self.function else ""
        return f"{name}{function}{place}".lstrip(":")

    def _tags(self, found: re.Match[str]) -> dict[str, TagValue] | None:
        tags: dict[str, TagValue] = {}
        for tag, more in self.tags:
            text = found[tag]
            if not text.isascii() or not text.isdigit():
                if more:
                    return None
                tags[tag] = text
            elif int(text) < more:
                return None  # the module before the first
            else:
                tags[tag] = int(text) - more
        return tags

    @functools.cached_property
    def _below(self) -> re.Pattern[str]:
        return re.compile(rf"(?:(?P<graft_base>.+?)\.)?{self._pattern.pattern}", re.DOTALL)


def parse_path(text: str) -> Path:
    """Read a path.

    Raises:
        UsageError: it cannot be read; names the place.
    """
    head, _, place = (piece.strip() for piece in text.partition(":"))
    modules, arrow, function = (piece.strip() for piece in head.partition(">"))
    if not text.strip():
        raise _unreadable(text, "it is empty")
    if arrow and not _FUNCTION.fullmatch(function):
        raise _unreadable(
            text,
            f"{function!r:.80} is no function, such as rope of the file that defines the "
            "module's class, or package.file.rope",
        )
    tags: list[tuple[str, int]] = []
    parts = [_part(text, part, tags) for part in modules.split(".")] if modules else []
    pattern = ""
    if parts[:1] == [_ANY] and len(parts) > 1:
        parts[0] = "**"
    for number, part in enumerate(parts):
        if part == "**":
            pattern += r"(?:[^.]+\.)*" if number < len(parts) - 1 else r"[^.]+(?:\.[^.]+)*"
            continue
        pattern += part + (r"\." if number < len(parts) - 1 else "")
    return Path(
        text, modules, function, _place(text, place), tuple(tags), re.compile(pattern, re.DOTALL)
    )


def _part(text: str, part: str, tags: list[tuple[str, int]]) -> str:
    """Return the expression for what stands between two dots."""
    if not part:
        raise _unreadable(text, "two dots stand one behind the other, or one at an end")
    if part == "**":
        return part
    found = ""
    for i, piece in enumerate(_CAPTURE.split(part)):
        if i % 2 == 0:
            if odd := sorted({*piece} & {*"{}[]()| \t"}):
                raise _unreadable(text, f"{odd[0]!r} stands in {part!r:.60}")
            found += r"[^.]*".join(map(re.escape, piece.split("*")))
            continue
        tag = _TAG.fullmatch(piece)
        if tag is None:
            raise _unreadable(text, f"'{{{piece:.60}}}' names no tag, as '{{layer}}' does")
        if tag[1] in RESERVED | {"name"} or tag[1] in dict(tags):
            raise _unreadable(text, f"the tag {tag[1]!r} is given twice, or has another meaning")
        tags.append((tag[1], int(f"{tag[2]}{tag[3]}") if tag[2] else 0))
        found += f"(?P<{tag[1]}>[^.]+?)"
    return _ANY if part == "*" else found


def _place(text: str, place: str) -> Place:
    if not place:
        if ":" in text:
            raise _unreadable(text, "nothing stands behind the colon")
        return Place()
    side, *members = place.split(".")
    if not _MEMBER.fullmatch(place):
        raise _unreadable(
            text, f"{place!r:.60} is not output, input, one of their gradients or members, or a "
            "parameter's name"
        )  # fmt: skip
    if side in _SIDES:
        return Place(side.removeprefix("grad_"), tuple(members), side.startswith("grad_"))
    return Place("parameter", tuple(place.split(".")))


def _unreadable(text: str, fact: str) -> UsageError:
    return UsageError(f"the path {text!r:.120} cannot be read: {fact}; write it as in {_FORM}")
