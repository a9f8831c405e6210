"""Of pairs of what routers chose: how many rows chose others, by what margin, and what looks amiss.

The margin is by the baseline's scores, where a tap beside the choice has them: of the same tags, a
number for each index that may be chosen.
"""

from __future__ import annotations

import math

import torch

from recorder.sizes import count

from ..measuring.choice import by_row, is_choice, margins, nothing_chosen, other_rows
from .columns import DiffRow

TIE = 0.02
"""Of the greatest score of a row, by which choices of 16 bits may differ."""


def fitting(shape: list[int] | None, of_choice: list[int] | None) -> bool:
    """Whether a tensor of some shape may hold the scores of a choice, row by row."""
    if not shape or not of_choice or len(of_choice) < 2:
        return False
    return math.prod(shape[:-1]) == math.prod(of_choice[:-1]) and shape[-1] > of_choice[-1]


def flips(a: torch.Tensor, b: torch.Tensor, scores: torch.Tensor | None) -> DiffRow:
    """Return what is known of two choices, {} where they are none.

    Args:
        a: the baseline's.
        b: the target's.
        scores: the baseline's, a row for each of theirs; None where they are not known.
    """
    if not (is_choice(a) and is_choice(b)):
        return {}
    x, y = by_row(a), by_row(b)
    other = other_rows(x, y)
    found: DiffRow = {"flips": int(other.sum())}
    if scores is not None and found["flips"] and _are_of(x, y, scores.shape[-1]):
        own = by_row(scores)[other]
        by = margins(own, x[other], y[other])
        size = own.to(torch.float64).abs().amax(1)
        found["ties"] = int((by <= TIE * size).sum())
        found["margin"], found["margin_typical"] = float(by.max()), float(by.median())
    said = []
    for name, one in (("A", x), ("B", y)):
        none = nothing_chosen(one)
        if bool(none.any()):
            index = int(one[none][0, 0])
            said.append(
                f"in {name} {count(int(none.sum()), 'row')} of {len(one)} have index {index} in "
                f"all {one.shape[1]} places: nothing was chosen there, as where a server returns "
                "zeros for a prompt"
            )
    if said:
        found["message"] = "; ".join(said)
    return found


def _are_of(x: torch.Tensor, y: torch.Tensor, size: int) -> bool:
    """Whether two choices are of so many indices."""
    return all(int(t.min()) >= 0 and int(t.max()) < size for t in (x, y))
