"""What replaces a tapped tensor, and what is measured of it, however it was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from recorder.bits import dtype_name
from recorder.errors import TransformError, is_from_the_job

from .casts import is_unsupported
from .log import OwnRow
from .measuring.compare import Difference, difference
from .rowing.aligned import Made
from .transforms import GraftInput, Transform


@dataclass(frozen=True)
class Replacement:
    """What is to be written over a tapped tensor.

    Attributes:
        tensor: of the target's shape, dtype and device.
        note: what to know of how it was made, "" where there is nothing.
        figures: how the target differs from it; None where that is not asked for, or not known.
        own: where it differs, and how; {} likewise.
        rows: where its rows come from, if they were matched one by one.
        numel: how many of its elements were recorded, where not all were.
        mask: which these are, bool in its shape, where it is for a CUDA graph.
    """

    tensor: torch.Tensor
    note: str
    figures: Difference | None
    own: OwnRow = field(default_factory=OwnRow)
    rows: Made | None = None
    numel: int | None = None
    mask: torch.Tensor | None = None


def applied(transform: Transform, g: GraftInput) -> Any:
    """Return what a transform makes, unchecked.

    Raises:
        TransformError: it failed.
    """
    try:
        return transform(g)
    except Exception as err:
        raise TransformError(
            f"the transform {transform.name} raised {type(err).__name__}: {err}"
        ) from err
    finally:
        g.done()


def measured(target: torch.Tensor, new: torch.Tensor) -> tuple[Difference | None, str]:
    """Return how a target differs from what replaces it, or why it is not known.

    A figure is never worth a graft.
    """
    try:
        return difference(target, new), ""
    except Exception as err:
        if is_unsupported(err):
            a, b = dtype_name(target.dtype), dtype_name(new.dtype)
            return None, f"not measured: torch cannot compare {a} with {b} on {new.device.type}"
        return None, f"not measured: {err}"


def own_measured(columns: Callable[[], OwnRow]) -> tuple[OwnRow, str]:
    """Return what is logged of the target's own error, or why it is not known."""
    try:
        return columns(), ""
    except Exception as err:
        if is_from_the_job(err):
            raise
        return OwnRow(), f"its own error is not measured: {type(err).__name__}: {err}"
