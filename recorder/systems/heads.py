"""The ids of what a model's head gets: of the last tokens only, where a call says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..tokens.known import known_of, with_known
from .calls import Arguments

Ids = Callable[[], torch.Tensor]


def NOTHING() -> torch.Tensor:  # a mark, and never called
    """Stand for a head that gets tokens of all rows in one, which is no batch."""
    raise NotImplementedError


def kept(ids: Ids, given: Arguments) -> Ids | None:
    """Return what returns the ids of the tokens that a head gets; None for all, or `NOTHING`.

    Args:
        ids: returns those of all tokens, [rows, tokens].
        given: what the model is called with.
    """
    which = given.get("logits_to_keep", given.get("num_logits_to_keep", 0))
    if isinstance(which, int):
        return None if which == 0 else lambda: _part(ids(), (slice(None), slice(-which, None)))
    if not isinstance(which, torch.Tensor):
        return None
    at = which.detach().clone()
    if at.dim() == 2 and at.dtype == torch.bool:
        return NOTHING
    if at.dim() == 2:
        rows = torch.arange(len(at), device="cpu")[:, None]
        return lambda: _part(ids(), (rows, at.cpu().to(torch.int64)))
    return lambda: _part(ids(), (slice(None), at.cpu()))


def _part(ids: torch.Tensor, at: Any) -> torch.Tensor:
    """Return some of the ids, with what is known of them."""
    known, part = known_of(ids), ids[at].contiguous()
    if known is None:
        return part
    return with_known(part, known.positions[at].contiguous(), known.tokens[at].contiguous())
