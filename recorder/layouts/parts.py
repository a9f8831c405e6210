"""Layouts in which one dim holds several tensors one behind the other; not read yet."""

from __future__ import annotations

from ..errors import LayoutError


def has_parts(text: str) -> bool:
    """Whether a layout holds several tensors in one dim, written in braces."""
    return "{" in text.partition("#")[0]


def parse(text: str) -> None:
    """Refuse a layout with parts.

    Raises:
        LayoutError: always.
    """
    raise LayoutError(f"the dims {text!r:.200} have parts, which are not read yet")
