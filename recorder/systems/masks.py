"""Which tokens of a batch are no padding, as an attention mask of any of its forms says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .calls import NoRows


@dataclass(frozen=True)
class Real:
    """What a mask says.

    Attributes:
        columns: not 0 where no padding is, [rows, columns], those that a cache holds first.
        fits: of which rows each token sees all real ones up to itself and no others, bool [rows];
            None for all. Numbers beside 0 and 1, which may tell packed sequences apart, are left
            for whoever reads `columns`.
    """

    columns: torch.Tensor
    fits: torch.Tensor | None = None


def real_of(mask: Any, begin: int, tokens: torch.Tensor) -> Real | None:
    """Return what a mask says of a batch, as it is now; None where nothing is padding.

    Args:
        mask: `attention_mask`: [rows, columns], or [rows, 1, tokens, columns], bools, numbers, or
            what is added to scores; or such by kind of layer; or None.
        begin: how many columns a cache holds.
        tokens: of the call, [rows, tokens].

    Raises:
        NoRows: it is of another form.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    rows, count = tokens.shape
    size = begin + count
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4) or len(mask) != rows:
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise NoRows(
            f"its attention_mask is {shape}, which does not say what is padding; give "
            "[batch, sequence], or say which row is which by a function, as in --rows PKG.MOD.FN"
        )
    if mask.shape[-1] < size:
        raise NoRows(
            f"its attention_mask has {mask.shape[-1]} columns, and there are {size} with those in "
            "its cache; give one for all"
        )
    with torch.no_grad():
        if mask.dim() == 2:
            return Real(mask[:, :size].clone())
        if mask.shape[1] != 1 or mask.shape[2] != count:
            raise NoRows(
                f"its attention_mask is {list(mask.shape)}, which differs by head or by more "
                "tokens than there are; say which row is which by a function, as in "
                "--rows PKG.MOD.FN"
            )
        sees = mask[:, 0, :, :size]
        sees = sees if sees.dtype == torch.bool else sees == 0
        real = sees[:, -1].clone()
        ahead = torch.ones(count, size, dtype=torch.bool, device=mask.device).triu_(begin + 1)
        wrong = sees ^ (real[:, None, :] & ~ahead)
        fits = ~(wrong & real[:, begin:, None]).flatten(1).any(1)
        return Real(real, fits)
