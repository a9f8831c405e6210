"""Ids of whole batches: padded, packed, or neither; all on the tokens' device."""

from __future__ import annotations

import torch

from ..errors import UsageError
from .hashing import named, numbered
from .inputs import Salt, beside, first_of, lengths_of, mask_of, seeds_of
from .known import with_known
from .memory import listed
from .sums import at_places, run_on


def padded(tokens: torch.Tensor, mask: object, salt: Salt | None) -> torch.Tensor:
    """Return the ids of one sequence a row.

    Args:
        tokens: integers, [s] or [b, s].
        mask: `attention_mask`, of the same shape; None where nothing is padding.
        salt: for all rows, or one for each.

    Raises:
        UsageError: the mask or the salt does not belong to these tokens.
    """
    rows = tokens.view(1, -1) if tokens.dim() == 1 else tokens
    seeds = seeds_of(salt, len(rows), "row of input_ids")
    own = copied(rows)
    if mask is None:
        numbers = torch.arange(1, rows.shape[1] + 1, device=rows.device)
        sums, positions = numbered(own, numbers), (numbers - 1).expand(rows.shape).contiguous()
    else:
        real = mask_of(mask, tokens).reshape(rows.shape).to(torch.int64)
        numbers = real.cumsum(1)  # of booleans it takes six times as long
        sums, positions = numbered(own, numbers).mul_(real), numbers.sub_(1)
    sums.cumsum_(1)
    if seeds is not None:
        sums += _column(seeds, rows.device)
    ids = named(sums)
    if mask is not None:
        absent = real.sub_(1)  # -1 at padding, else 0
        for one in (ids, positions, own):
            one.bitwise_or_(absent)
    shape = tokens.shape
    return with_known(ids.view(shape), positions.view(shape), own.view(shape))


def packed(tokens: torch.Tensor, bounds: object, salt: Salt | None) -> torch.Tensor:
    """Return the ids of sequences that lie one behind the other.

    Args:
        tokens: integers, [t] or [1, t].
        bounds: `cu_seqlens`, [sequences + 1]; the host waits for it where an accelerator has it.
        salt: for all sequences, or one for each.

    Raises:
        UsageError: the bounds or the salt do not belong to these tokens.
    """
    flat = flattened(tokens, "cu_seqlens")
    lengths = lengths_of(bounds, len(flat))
    seeds = seeds_of(salt, len(lengths), "sequence of cu_seqlens")
    own = copied(flat[: int(lengths.sum())])
    return _run_on(tokens, own, lengths.to(flat.device, non_blocking=True), seeds, None)


def positioned(
    tokens: torch.Tensor, positions: object, mask: object, salt: Salt | None
) -> torch.Tensor:
    """Return the ids of sequences that begin wherever the position is 0.

    Args:
        tokens: integers, [t] or [b, s]; each row begins anew.
        positions: `position_ids`, of the same shape: 0, 1, 2, ... in each sequence, padding left
            out. The host looks at them, and waits for that where an accelerator has them.
        mask: `attention_mask`, of the same shape; None where nothing is padding.
        salt: for all sequences, or one for each, in their order.

    Raises:
        UsageError: the positions are others, or the mask or the salt does not belong to them.
    """
    places = beside(positions, "position_ids", tokens).to(tokens.device, torch.int64).reshape(-1)
    own, kept, width = copied(tokens.reshape(-1)), None, tokens.shape[-1]
    rows = torch.arange(0, len(own), max(width, 1), device=own.device)
    if mask is not None:
        kept = mask_of(mask, tokens).reshape(-1).nonzero().view(-1)
        own, places = own.index_select(0, kept), places.index_select(0, kept)
        rows = torch.searchsorted(kept, rows)
        rows = rows[rows < len(own)]
    starts = places == 0
    firsts = starts.nonzero().view(-1)
    lengths = torch.cat([firsts, firsts.new_full((1,), len(own))]).diff()
    seeds = seeds_of(salt, len(firsts), "sequence of position_ids")
    # Each is 0, or one more than that in front of it, which in a row's first place it cannot be.
    after = places.roll(1).add_(1).index_fill_(0, rows, 0)
    wrong = (places != after).logical_and_(starts.logical_not())
    first = first_of(wrong)
    if first is not None:
        place = first if kept is None else int(kept[first])
        raise UsageError(_misplaced(first, place, places, after, width, tokens.dim()))
    return _run_on(tokens, own, lengths, seeds, kept)


def _misplaced(
    index: int, place: int, positions: torch.Tensor, after: torch.Tensor, width: int, dims: int
) -> str:
    """Say which position is neither 0 nor the next one."""
    where = place if dims == 1 else list(divmod(place, width))
    due = int(after[index])
    expected = f"0 or {due}" if due else "0"
    return (
        f"position_ids is {int(positions[index])} at {where}, where a sequence goes on only with "
        f"{expected}; give attention_mask if there is padding, or cu_seqlens instead"
    )


def _run_on(
    tokens: torch.Tensor,
    own: torch.Tensor,
    lengths: torch.Tensor,
    seeds: list[int | None] | int | None,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    """Return the ids of tokens that are kept of a batch, in its shape."""
    column = _column(seeds, own.device).view(-1) if isinstance(seeds, list) else seeds
    numbers, sums = run_on(own, lengths, None, column)
    size, shape = tokens.numel(), tokens.shape
    ids, positions, ends = (
        at_places(one, kept, size).view(shape) for one in (named(sums), numbers.sub_(1), own)
    )
    return with_known(ids, positions, ends)


def _column(seeds: list[int | None] | int, device: torch.device) -> torch.Tensor:
    """Return the seeds as they are added to rows: [sequences or 1, 1], int64."""
    every = [one or 0 for one in seeds] if isinstance(seeds, list) else [seeds]
    made = listed(every).view(-1, 1)
    return made.to(device, non_blocking=True)


def copied(tokens: torch.Tensor) -> torch.Tensor:
    """Return tokens as int64 in memory of their own: the caller's may change later."""
    return tokens.to(torch.int64, copy=True, memory_format=torch.contiguous_format)


def flattened(tokens: torch.Tensor, of: str) -> torch.Tensor:
    """Return packed tokens as [t].

    Raises:
        UsageError: they have rows, which `of` does not go with.
    """
    if tokens.dim() == 2 and len(tokens) != 1:
        raise UsageError(
            f"input_ids has shape {list(tokens.shape)} and {of} is for packed ones; give [tokens] "
            "or [1, tokens]"
        )
    return tokens.reshape(-1)
