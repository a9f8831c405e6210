"""What is known beside an id: which token it ends with, and where in its sequence that stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_NAME = "_graft_known"


@dataclass(frozen=True)
class Known:
    """The facts of a tensor of ids, element by element.

    Attributes:
        positions: of each token in its sequence, from 0, padding not counted; int64, of the shape
            of the ids, -1 where they are.
        tokens: the tokens as they were given, int64, of the same shape, -1 at padding.
    """

    positions: torch.Tensor
    tokens: torch.Tensor


def known_of(ids: torch.Tensor) -> Known | None:
    """Return what is known of ids that `token_rows` returned; None of any other tensor.

    It belongs to the very tensor, as it was returned: a view, a copy or a part of it has none, nor
    has one that was written to since.
    """
    found, version = getattr(ids, _NAME, None) or (None, None)
    return found if isinstance(found, Known) and version == _version(ids) else None


def with_known(ids: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return these ids, and remember with them what they stand for; see `Known`."""
    setattr(ids, _NAME, (Known(positions, tokens), _version(ids)))
    return ids


def _version(ids: torch.Tensor) -> int | None:
    """Return what changes when a tensor is written to; None where nothing tells."""
    try:
        return ids._version
    except RuntimeError:  # made in inference mode
        return None
