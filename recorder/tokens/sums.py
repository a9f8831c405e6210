"""The sums of prefixes, for chunks of sequences that lie one behind the other."""

from __future__ import annotations

import torch

from .hashing import numbered


def run_on(
    tokens: torch.Tensor,
    counts: torch.Tensor,
    lengths: torch.Tensor | None = None,
    seeds: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of each token in its sequence, from 1, and the sum of its prefix.

    All is done on the tokens' device, and the host waits for nothing. The sum of a prefix is that
    of all tokens so far without those in front of its chunk, so one running total serves all.

    Args:
        tokens: [t], int64.
        counts: how many of them each chunk has, [chunks], int64, together t.
        lengths: how many tokens of its sequence precede each chunk, [chunks]; None for none.
        seeds: the sum of these, [chunks] or one for all; None for 0.

    Returns:
        Two new tensors of int64, [t].
    """
    device, total = tokens.device, len(tokens)
    numbers = torch.arange(1, total + 1, device=device)
    if not total:
        return numbers, tokens.clone()
    firsts = counts.cumsum(0) - counts
    which = torch.repeat_interleave(counts, output_size=total)
    numbers += (-firsts if lengths is None else lengths - firsts).index_select(0, which)
    terms = numbered(tokens, numbers)
    sums = terms.cumsum(0)
    at = firsts.clamp_(max=total - 1)  # an empty chunk at the end has no first token
    starts = terms.index_select(0, at) - sums.index_select(0, at)
    if seeds is not None:
        starts += seeds
    return numbers, sums.add_(starts.index_select(0, which))


def at_places(values: torch.Tensor, places: torch.Tensor | None, size: int) -> torch.Tensor:
    """Return values at their places among so many, [size], with -1 at all others.

    Args:
        values: [n], int64.
        places: [n], where each goes; None where they go to the first n.
        size: how many there are in all.
    """
    if len(values) == size and places is None:
        return values
    found = torch.full((size,), -1, dtype=torch.int64, device=values.device)
    if places is None:
        found[: len(values)] = values
        return found
    return found.index_copy_(0, places, values)
