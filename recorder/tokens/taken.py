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

    def equals(self, other: Taken) -> bool:
        """Whether they are the same ids, of which the same is known."""
        a, b = self.known, other.known
        return bool(
            self.names == other.names
            and self.ids.shape == other.ids.shape
            and (self.ids == other.ids).all()
            and (a is b or (a is not None and b is not None and bool((a == b).all())))
        )


def real(ids: torch.Tensor) -> torch.Tensor:
    """Return which rows are no padding: bool, one for each of [rows] or [rows, numbers]."""
    is_real = ids != PADDING
    return is_real if ids.dim() == 1 else is_real.all(-1)
