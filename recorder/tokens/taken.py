"""Ids of rows as they were when a tap asked for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PADDING = -1
"""The id of a row that is none."""


@dataclass(frozen=True)
class Taken:
    """Ids as they were when a tap asked, or as they were recorded.

    Attributes:
        names: of the dims, in alphabetical order.
        ids: int64 on the CPU, one dim for each name, and one more where several numbers are an id.
        known: int64 [rows, 2], each id's position in its sequence and its token; None where nobody
            said.
    """

    names: tuple[str, ...]
    ids: torch.Tensor
    known: torch.Tensor | None = None


def real(ids: torch.Tensor) -> torch.Tensor:
    """Return which rows are no padding: bool, one for each of [rows] or [rows, numbers]."""
    is_real = ids != PADDING
    return is_real if ids.dim() == 1 else is_real.all(-1)
