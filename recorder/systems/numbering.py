"""The sums and ids of a batch's tokens, each row going on from what its cache holds.

Of a few tokens, as in a step of a generation, Python's integers take a third of the time that a
tensor's operations do; `one_by_one` and `all_at_once` give the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..tokens.hashing import mix, named, numbered, signed
from ..tokens.memory import listed
from .past import NUMBERS, REAL, SUMS

FEW = 96
"""How many tokens are few."""

_STEP = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Numbered:
    """A batch of tokens; all tensors int64 on the CPU, [rows, tokens].

    Attributes:
        tokens: the tokens.
        own: 1 where no padding is, 0 where it is; a row with other numbers is not known.
        places: where the job says that they stand; None where it does not.
        begin: how many columns the cache holds.
        ends: the last sum and number of each row there; None where it holds nothing.
        known: which rows are known to go on from there, [rows].
    """

    tokens: torch.Tensor
    own: torch.Tensor
    places: torch.Tensor | None
    begin: int
    ends: tuple[list[int], list[int]] | None
    known: list[bool]


@dataclass(frozen=True)
class Found:
    """What came of it.

    Attributes:
        columns: for the cache: see `Past.held`.
        ends: the last sums and numbers.
        ids: -1 at padding and in rows that are not known; so the next two.
        positions: of each token in its sequence.
        tokens: the tokens.
        is_new_unknown: whether a row is not known that was known before.
    """

    columns: torch.Tensor
    ends: tuple[list[int], list[int]] | None
    ids: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    is_new_unknown: bool

    def named(self, sums: torch.Tensor) -> Found:
        """Return it with other ids: those of these sums."""
        return replace(self, ids=named(sums.clone()).masked_fill_(self.ids < 0, -1))


def one_by_one(batch: Numbered) -> Found:
    """Compute with Python's integers."""
    rows, count = batch.tokens.shape
    tokens, own = batch.tokens.tolist(), batch.own.tolist()
    places = None if batch.places is None else batch.places.tolist()
    sums, numbers = batch.ends or ([0] * rows, [0] * rows)
    flat: list[list[int]] = [[], [], [], [], []]  # sums, numbers, ids, positions, tokens
    all_sums, all_numbers, ids, positions, shown = flat
    ends: tuple[list[int], list[int]] = ([], [])
    is_new_unknown = False
    for row in range(rows):
        total, number, was_known = sums[row] & _WORD, numbers[row], numbers[row] >= 0
        known = was_known and batch.known[row]
        number = max(number, 0)
        of_tokens = of_columns = True
        begin, first = len(ids), number
        for i, (token, real) in enumerate(zip(tokens[row], own[row], strict=True)):
            if real == 1:
                number += 1
                total = (total + mix((token + number * _STEP) & _WORD)) & _WORD
                if places is not None:
                    of_tokens = of_tokens and places[row][i] == number - 1
                    of_columns = of_columns and places[row][i] == batch.begin + i
                ids.append(mix(total) >> 1)
                positions.append(number - 1)
                shown.append(token)
            else:
                known = known and real == 0
                for one in (ids, positions, shown):
                    one.append(-1)
            all_sums.append(signed(total))
            all_numbers.append(number)
        known = known and (of_tokens or of_columns)
        if not known:
            is_new_unknown = is_new_unknown or (was_known and number > first)
            for one in (all_numbers, ids, positions, shown):
                one[begin:] = [-1] * count
        ends[0].append(all_sums[-1] if count else sums[row])
        ends[1].append(all_numbers[-1] if count else numbers[row])
    shape = (rows, count)
    columns = torch.stack(
        [listed(all_sums).view(shape), listed(all_numbers).view(shape), batch.own]
    )
    found = [listed(one).view(shape) for one in (ids, positions, shown)]
    return Found(columns, ends, found[0], found[1], found[2], is_new_unknown)


def all_at_once(batch: Numbered) -> Found:
    """Compute with tensors."""
    tokens, own = batch.tokens, batch.own
    known = torch.tensor(batch.known, dtype=torch.bool, device="cpu")
    real = own == 1
    known &= (real | (own == 0)).all(1)
    numbers = real.to(torch.int64).cumsum(1)
    was_known = torch.ones_like(known)
    if batch.ends is not None:
        sums, begins = (listed(one)[:, None] for one in batch.ends)
        was_known = begins[:, 0] >= 0
        known &= was_known
        numbers += begins.clamp_min(0)
    if batch.places is not None:
        due = torch.arange(batch.begin, batch.begin + tokens.shape[1], device="cpu")
        of_tokens = ((batch.places == numbers - 1) | ~real).all(1)
        known &= of_tokens | ((batch.places == due) | ~real).all(1)
    totals = (numbered(tokens, numbers) * real).cumsum(1)
    if batch.ends is not None:
        totals += sums
    absent = ~(real & known[:, None])
    columns = torch.stack([totals, torch.where(known[:, None], numbers, -1), own])
    return Found(
        columns,
        None,
        named(totals.clone()).masked_fill_(absent, -1),
        (numbers - 1).masked_fill_(absent, -1),
        tokens.masked_fill(absent, -1),
        bool((was_known & ~known & real.any(1)).any()),
    )


assert (SUMS, NUMBERS, REAL) == (0, 1, 2)  # the order of `columns`
