"""What is said of a graft in the log, put together."""

from __future__ import annotations


def joined(*texts: str | None) -> str:
    """Return notes as one."""
    return "; ".join(text for text in texts if text)
