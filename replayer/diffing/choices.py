"""Of pairs of what routers chose: how many rows chose others, by what margin, and what looks amiss.

The margin is by the baseline's scores, where a tap beside the choice has them: of the same tags, a
number for each index that may be chosen.
"""

from __future__ import annotations

import math

import torch

from recorder.sizes import count

from ..measuring.choice import by_row, choice, is_choice, nothing_chosen
from .columns import DiffRow


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
    x, y = by_row(a).to(torch.int64), by_row(b).to(torch.int64)
    given = [] if scores is None else [by_row(scores)]
    look = choice(x, y, given).look.get("choice", {})
    found: DiffRow = {"flips": look.get("other", 0)}
    if "margins" in look:
        found["ties"] = look["ties"]
        found["margin_typical"], found["margin"] = look["margins"]
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
