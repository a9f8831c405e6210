"""`--rename`: what the baseline calls one way, the target calls another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from recorder.errors import UsageError
from recorder.tags import RESERVED, TagValue

_PLACE = re.compile(r"\{(\w*)\}")
_FORM = "'h.{layer}.attn=layers.{layer}.self_attn'"


@dataclass(frozen=True)
class Template:
    """A name with places in braces, at each of which stands one part between dots, or of one.

    Attributes:
        text: as typed.
        places: the names of its places, in order.
    """

    text: str
    places: tuple[str, ...]
    _pattern: re.Pattern[str]

    @classmethod
    def parse(cls, text: str, whole: str) -> Template:
        """Read one side of a renaming.

        Raises:
            UsageError: it is empty, or has braces that are no places.
        """
        places = tuple(_PLACE.findall(text))
        rest = _PLACE.sub("", text)
        if not text or "{" in rest or "}" in rest or not all(p.isidentifier() for p in places):
            raise UsageError(
                f"--rename {whole!r} cannot be read at {text!r}: a side is a name, with places in "
                f"braces where it varies, as in {_FORM}"
            )
        if len(set(places)) < len(places) or set(places) & (RESERVED | {"name"}):
            raise UsageError(
                f"--rename {whole!r}: a place in {text!r} stands twice, or has a reserved name"
            )
        parts = _PLACE.split(text)
        pattern = "".join(
            f"(?P<{part}>[^.]+?)" if i % 2 else re.escape(part) for i, part in enumerate(parts)
        )
        return cls(text, places, re.compile(pattern, re.DOTALL))

    def read(self, name: str) -> dict[str, str] | None:
        """Return what stands at the places in a name, None where it does not fit."""
        found = self._pattern.fullmatch(name)
        return found.groupdict() if found else None

    def fits(self, names: Iterable[str]) -> bool:
        """Whether it fits any of some names."""
        return any(self._pattern.fullmatch(name) for name in names)

    def write(self, values: Mapping[str, object]) -> str:
        """Return the name with values at its places."""
        return _PLACE.sub(lambda place: str(values[place[1]]), self.text)


@dataclass(frozen=True)
class Rename:
    """What the baseline calls `a` and the target `b`.

    A place that stands on one side only is a tag on the other.
    """

    text: str
    a: Template
    b: Template

    @classmethod
    def parse(cls, text: str) -> Rename:
        """Read `A=B`.

        Raises:
            UsageError: there is not one `=`, or a side cannot be read.
        """
        sides = text.split("=")
        if len(sides) != 2:
            raise UsageError(
                f"--rename {text!r} should be A's name for it, =, and B's, as in {_FORM}"
            )
        return cls(text, *(Template.parse(side.strip(), text) for side in sides))

    @property
    def literal(self) -> int:
        """How much of the target's name it says: of two that fit, the one that says more holds."""
        return len(_PLACE.sub("", self.b.text))

    def reversed(self) -> Rename:
        """Return it for sides the other way round."""
        return Rename(self.text, self.b, self.a)

    def apply(self, name: str, tags: dict[str, TagValue]) -> tuple[str, dict[str, TagValue]] | None:
        """Return a target's name and tags as the baseline has them, None where it does not fit."""
        found = self.b.read(name)
        if found is None:
            return None
        values: dict[str, TagValue] = {place: _value(text) for place, text in found.items()}
        if any(place in tags and tags[place] != value for place, value in values.items()):
            return None  # the name says one thing and a tag another
        rest = dict(tags)
        for place in self.a.places:
            if place not in values:
                if place not in rest:
                    return None
                values[place] = rest.pop(place)
        extra = {place: values[place] for place in values if place not in self.a.places}
        texts = {**values, **found}  # as it was written: 03 stays 03
        return self.a.write(texts), {**rest, **extra}


def _value(text: str) -> TagValue:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def parsed(given: str | Sequence[str | Rename]) -> tuple[Rename, ...]:
    """Read several renamings, or a text that has `;` between them.

    Raises:
        UsageError: one cannot be read.
    """
    several = given.split(";") if isinstance(given, str) else given
    return tuple(
        one if isinstance(one, Rename) else Rename.parse(one.strip()) for one in several if one
    )


def renamed(
    renames: Sequence[Rename], name: str, tags: dict[str, TagValue]
) -> tuple[str, dict[str, TagValue]]:
    """Return a target's name and tags as the baseline has them, by the most specific renaming.

    That is the one of which most of the name is no place. A renamed tap is not renamed again.

    Raises:
        UsageError: two say as much, and not the same.
    """
    fitting = [(one, to) for one in renames if (to := one.apply(name, tags)) is not None]
    if not fitting:
        return name, tags
    most = max(one.literal for one, _ in fitting)
    best = [(one, to) for one, to in fitting if one.literal == most]
    first, to = best[0]
    for other, another in best[1:]:
        if another != to:
            raise UsageError(
                f"--rename {first.text!r} and {other.text!r} both fit {name!r}, to {to[0]!r} and "
                f"{another[0]!r}; say more of the name in one of them"
            )
    return to


def oriented_to(renames: Sequence[Rename], names: Iterable[str]) -> tuple[Rename, ...]:
    """Return renamings the right way round, as far as the baseline's names alone tell."""
    known = sorted(set(names))
    return tuple(
        one.reversed() if not one.a.fits(known) and one.b.fits(known) else one for one in renames
    )


def oriented(
    renames: Sequence[Rename], a_names: Iterable[str], b_names: Iterable[str]
) -> tuple[list[Rename], list[str]]:
    """Return the renamings with their sides the right way round, and what to say of them.

    Args:
        renames: as typed.
        a_names: the names of the baseline's taps.
        b_names: the target's.
    """
    a_names, b_names = sorted(set(a_names)), sorted(set(b_names))
    kept, notes = [], []
    for rename in renames:
        swapped = rename.a.fits(b_names) and rename.b.fits(a_names)
        if not rename.b.fits(b_names) and swapped:
            rename = rename.reversed()
            notes.append(f"--rename {rename.text!r} was taken the other way round: it is A=B")
        kept.append(rename)
        for side, template, names in (("B", rename.b, b_names), ("A", rename.a, a_names)):
            if not template.fits(names):
                some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
                notes.append(
                    f"--rename {rename.text!r}: {template.text!r} fits no tap of {side}; "
                    f"{side} has {some or 'none'}"
                )
    return kept, notes
