"""Tags and keys: what a tap is called, and how often.

A key is the tags, the step and the occurrence. `recompute`, the tag of activation checkpointing's
second forward, is kept in a record's tags but is no part of its key: both firings count on their
own and so get the same occurrence.
"""

from __future__ import annotations

import enum
import json
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, Union

from .errors import BadTag

TagValue = Union[str, int, float, bool, None, list["TagValue"]]

RECOMPUTE = "recompute"
PART = "grad_part"
"""The tag of a gradient that came in parts, from its second on: which one this is, from 0."""

RESERVED = frozenset({"step", "rank", "occurrence", "seq", "kind"})
"""Names that the key or the recorder gives; a tag of that name would be ambiguous."""

OF_TAP = frozenset({"name", "value", "dims", "extras", "grad", "rows"})
"""What `tap` takes beside tags: no tap could be given a tag of that name, so no block adds one."""


class Key(NamedTuple):
    """What identifies a record on one rank.

    Attributes:
        name: the tap's name.
        tags: canonical JSON of its other tags, `recompute` left out.
        step: iterations before it.
        occurrence: how often the same tags were tapped before it in this step.
        kind: `tensor`, `grad` or `value`.
    """

    name: str
    tags: str
    step: int
    occurrence: int
    kind: str = "tensor"

    def __str__(self) -> str:
        kind = "" if self.kind == "tensor" else f" ({self.kind})"
        return f"{label(self.name, self.tags)} step={self.step} occurrence={self.occurrence}{kind}"


def reserved(name: str) -> BadTag:
    """Return the error of a tag that is given by others than the tap."""
    return BadTag(f"the tag {name!r} has a meaning of its own; call it something else")


def clean(name: str, value: object) -> TagValue:
    """Return `value` as a plain tag value; raise `BadTag` if it cannot be one."""
    if name in _known and type(value) is int and -(1 << 63) <= value < 1 << 63:
        return value
    made = _clean(name, value)
    if type(name) is str and len(_known) < _MOST_KNOWN:
        _known.add(name)
    return made


_known: set[str] = set()
"""Names that tags may have, so that the commonest tag, a number, is looked at once."""
_MOST_KNOWN = 1024


def _clean(name: str, value: object) -> TagValue:
    if name in RESERVED:
        raise reserved(name)
    text("the name of a tag", name)
    try:
        return _plain(name, value)
    except RecursionError:
        raise BadTag(f"the tag {name!r} is nested too deeply") from None


def _plain(name: object, value: object) -> TagValue:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(f"the tag {name!r}", value)
    if isinstance(value, int):
        return _small(name, int(value))
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise BadTag(f"the tag {name}={value!r} is not a finite number")
        return float(value) + 0.0  # -0.0 is the same key as 0.0
    if isinstance(value, (tuple, list)):
        return [_plain(name, item) for item in value]
    if isinstance(value, enum.Enum):
        return _plain(name, value.value)
    if type(value).__name__ == "dtype" or type(value).__module__ == "numpy.dtypes":
        return text(f"the tag {name!r}", str(value).removeprefix("torch."))
    held = _held(value)
    if held is not value:
        return _plain(name, held)
    try:
        whole = operator.index(value)  # type: ignore[arg-type]
    except Exception:
        raise BadTag(
            f"the tag {name!r} is a {type(value).__name__}; "
            "tags are strings, numbers, booleans, None or lists of these"
        ) from None
    return _small(name, whole)


def _held(value: Any) -> object:
    """Return what a number of numpy or a tensor without dims holds; others as they are."""
    try:
        held = value.item() if value.ndim == 0 else value
    except Exception:  # whatever a foreign type may raise
        return value
    return held if isinstance(held, (bool, int, float, str)) else value


def _small(name: object, value: int) -> int:
    if not -(1 << 63) <= value < 1 << 63:
        raise BadTag(f"the tag {name!r} is an integer of more than 64 bits")
    return value


def text(what: str, value: str) -> str:
    """Return a plain string; raise `BadTag` where it cannot be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadTag(f"{what} is {value!r}, which is not valid Unicode text") from None
    return str.__str__(value)


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode
_quote = json.encoder.encode_basestring


def canonical(tags: Mapping[str, TagValue]) -> str:
    """Return tags as JSON with sorted keys and no spaces, so that equal tags are equal text."""
    parts = []
    for name in sorted(tags):
        value = tags[name]
        if type(value) is int:
            parts.append(f"{_quote(name)}:{value}")
        elif type(value) is str:
            parts.append(f"{_quote(name)}:{_quote(value)}")
        else:
            return _encode(tags)  # four times as slow
    return f"{{{','.join(parts)}}}"


def is_recompute(tags: Mapping[str, TagValue]) -> bool:
    """Whether the tags mark a second forward; absent, None and False all mean the first."""
    return bool(tags.get(RECOMPUTE))


def key_tags(tags: Mapping[str, TagValue]) -> str:
    """Return the canonical JSON of the tags that count for the key."""
    if RECOMPUTE in tags:
        tags = {k: v for k, v in tags.items() if k != RECOMPUTE}
    return canonical(tags)


def label(name: str, tags: str | Mapping[str, TagValue]) -> str:
    """Return a tap's name and tags as people write them: `attn_out layer=3`; long ones are cut."""
    items = json.loads(tags) if isinstance(tags, str) else tags
    return " ".join([cut(name), *(f"{cut(k)}={cut(str(v))}" for k, v in items.items())])


def cut(text: str) -> str:
    """Return a text as it is printed: what is long ends in three dots."""
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."


_LONG = 100  # characters of a name or a tag's value that are printed
MOST_TAG_BYTES = 64 << 10
"""Of a record's name, and of its tags as JSON."""
