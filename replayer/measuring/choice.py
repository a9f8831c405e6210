"""How far apart two tensors of indices are: what a router chose, or which tokens.

A row is an index of all dims but the last, and a choice of its numbers, in whatever order, where
they are few and no two the same; else, as with tokens, order counts. A row is a near tie where the
scores that it was chosen by are as good for either choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .look import Chosen, Look

_TIE = 0.02  # of the greatest score of a row, by which choices of 16 bits may differ
_NAMED = 8  # rows
_MOST_CHOSEN = 64  # of a row: experts, say
_PADDED, _SHIFTED = 0.6, 0.8  # of all numbers, that are equal at most in place; if shifted


@dataclass(frozen=True)
class Choice:
    """Of one graft of integers or booleans.

    Attributes:
        error: the share of rows that are another choice.
        look: how they are another choice, {} where all are equal.
    """

    error: float = 0.0
    look: Look = field(default_factory=Look)


def choice(x: torch.Tensor, y: torch.Tensor, scores: Sequence[torch.Tensor] = ()) -> Choice:
    """Return how far apart two choices are.

    Args:
        x: the baseline's, integers or booleans.
        y: the target's, of the same shape.
        scores: tensors that it may have been made by: the first counts that has a row for each of
            its rows, and a number for each index.
    """
    x, y = (t.detach().cpu() for t in (x, y))
    if not x.numel() or torch.equal(x, y):
        return Choice()
    shift = _shift(x, y)
    x, y = by_row(x), by_row(y)
    differ = (x != y).any(1)
    other = other_rows(x, y)
    rows, count = len(x), int(other.sum())
    look: Chosen = {
        "rows": rows,
        "other": count,
        "order": int(differ.sum()) - count,
        "first": other.nonzero().flatten()[:_NAMED].tolist(),
    }
    if any(none := [int(nothing_chosen(t).sum()) for t in (x, y)]):
        look["none"] = none
    if shift is not None:
        look["shift"] = shift
    if x.dtype != torch.bool and (stand := _standing(x, y)):
        look["stand"] = stand
    fitting = next((s for s in scores if _fits(s, x, y)), None)
    if fitting is not None and count:
        chosen = by_row(fitting.detach().cpu())[other]
        worst = margins(chosen, x[other], y[other])
        size = chosen.to(torch.float64).abs().amax(1)
        look["ties"] = int((worst <= _TIE * size).sum())
        look["margins"] = [float(worst.median()), float(worst.max())]
    return Choice(count / rows, {"choice": look})


def by_row(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor as its rows, [rows, numbers]: an index of all dims but the last is one."""
    return x.reshape(-1, x.shape[-1] if x.dim() > 1 else 1)


def other_rows(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return which rows [rows, numbers] of two choices are another choice: bool [rows]."""
    if not _are_sets(x):
        return (x != y).any(1)
    return (x.sort(1).values != y.sort(1).values).any(1)


def margins(scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return by how much the scores of two choices are apart, float64 [rows].

    Args:
        scores: [rows, all that there is to choose from].
        x: one choice, [rows, numbers].
        y: the other.
    """
    wide = scores.to(torch.float64)
    a, b = (wide.gather(1, t.long()) for t in (x, y))
    return (a.sort(1).values - b.sort(1).values).abs().amax(1)


def is_choice(x: torch.Tensor) -> bool:
    """Whether a tensor may hold what was chosen in each row: few integers, one beside the other."""
    is_whole = not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)
    return is_whole and x.dim() > 1 and 1 <= x.shape[-1] <= _MOST_CHOSEN


def nothing_chosen(x: torch.Tensor) -> torch.Tensor:
    """Return in which rows [rows, numbers] one index stands in all of several places."""
    if x.shape[1] < 2 or x.shape[1] > _MOST_CHOSEN or x.dtype == torch.bool:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return (x == x[:, :1]).all(1) & (x[:, 0] >= 0)


def _are_sets(x: torch.Tensor) -> bool:
    """Whether each row holds a few numbers, no two the same but for what marks a gap.

    A row that holds one number alone is one in which nothing was chosen.
    """
    if x.dtype == torch.bool or not 1 < x.shape[1] <= _MOST_CHOSEN:
        return False
    ordered = x[~nothing_chosen(x)].sort(1).values
    return not bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any())


def _shift(x: torch.Tensor, y: torch.Tensor) -> list[int] | None:
    """Return a dim of which each index is the baseline's next or last, and which: [dim, +-1].

    What is padded need not be.
    """
    if float((x == y).double().mean()) > _PADDED:
        return None
    for dim, size in enumerate(x.shape):
        if size < 4:
            continue
        for by in (1, -1):
            a = x.narrow(dim, max(by, 0), size - 1)
            b = y.narrow(dim, max(-by, 0), size - 1)
            if float((a == b).double().mean()) > _SHIFTED:
                return [dim, by]
    return None


def _standing(x: torch.Tensor, y: torch.Tensor) -> list[list[int]]:
    """Return which indices are always others, [] where one is not always the same."""
    pairs = torch.stack([x.reshape(-1), y.reshape(-1)], 1).long().unique(dim=0).tolist()
    is_one_to_one = len({a for a, _ in pairs}) == len(pairs) == len({b for _, b in pairs})
    return [pair for pair in pairs if pair[0] != pair[1]][:_NAMED] if is_one_to_one else []


def _fits(scores: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> bool:
    if scores.dim() < 1 or x.dtype == torch.bool or min(int(x.min()), int(y.min())) < 0:
        return False
    rows, numbers = by_row(scores).shape if scores.numel() else (0, 0)
    return rows == len(x) and numbers > max(int(x.max()), int(y.max()))
