"""What sglang's dumper says of a tensor, as a tap says it: names, tags, dims.

Of a dump that happens now (`dumper`) and of one that was written to a file, so that the two meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..tags import PART, RECOMPUTE, RESERVED

GRADIENT = "grad__"
"""What stands before the name of a tensor whose gradient is dumped."""
STATUS = "recompute_status"
"""Its tag for activation checkpointing, which every dump has but those of gradients."""
REPEATED, NOT_REPEATED = "recompute", "disabled"
"""What that is in a second forward, and where there is no such thing."""


def tags_of(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """Return the tags of a dump as those of a tap, and which were called otherwise for that.

    Args:
        given: its tags but the name, those of the context included. `recompute_status` is none of
            a tap; where it says that a forward is repeated, the tap has `recompute`.
    """
    tags = {}
    renamed = []
    for tag, value in given.items():
        if tag == STATUS:
            if value == REPEATED:
                tags[RECOMPUTE] = True
        elif tag in RESERVED or tag == PART:
            tags[f"{tag}_"] = value
            renamed.append(tag)
        else:
            tags[tag] = value
    return tags, renamed


def dims_of_gradient(facts: Mapping[str, Any]) -> str | None:
    """Return the layout of a gradient that is dumped, as the `dims` of a tap of nothing else."""
    dims = facts.get("dims")
    return f"# grad: {dims}" if dims else None


def dims_of(facts: Mapping[str, Any] | None) -> str | None:
    """Return the layout of a dump and of its gradient as a tap's `dims`; None where it has none.

    Args:
        facts: what goes with the dump beside its tags: `dims`, and `dims_grad` where the gradient
            is laid out otherwise.
    """
    dims, of_gradient = ((facts or {}).get(one) for one in ("dims", "dims_grad"))
    if not dims:  # then nothing could be said of the value
        return None
    return dims if of_gradient in (None, "", dims) else f"{dims} # grad: {of_gradient}"
