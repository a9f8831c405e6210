"""Runs: which indices of a whole dim a rank holds, as (start, length) pairs in the rank's order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..errors import LayoutError

Runs = list[tuple[int, int]]
PADDING = -1
"""The start of a run that stands for no index of the whole: a rank's padding."""


class Piece(NamedTuple):
    """Indices that two ranks have in common: where they lie in each, and how many."""

    into: int
    out_of: int
    length: int


def length(runs: Runs) -> int:
    """Return how many indices runs have, padding included."""
    return sum(n for _, n in runs)


def merged(runs: Iterable[tuple[int, int]]) -> Runs:
    """Return runs with neighbours that continue one another made one, and empty ones left out."""
    found: Runs = []
    for start, n in runs:
        if n == 0:
            continue
        if found:
            before, m = found[-1]
            is_padding = PADDING in (start, before)
            if start == before if is_padding else start == before + m:
                found[-1] = (before, m + n)
                continue
        found.append((start, n))
    return found


def sliced(runs: Runs, at: int, n: int) -> Runs:
    """Return the indices at positions `at` to `at + n` of runs; fewer where they end before."""
    found: Runs = []
    for start, size in runs:
        skip = min(at, size)
        take = min(size - skip, n)
        if take > 0:
            found.append((start if start == PADDING else start + skip, take))
            n -= take
        at -= skip
    return found


def chunk(n: int, parts: int, k: int) -> tuple[int, int]:
    """Return start and length of part `k` as `torch.chunk` cuts: equal parts, the last shorter."""
    size = -(-n // parts)
    start = min(k * size, n)
    return start, min(size, n - start)


def split(n: int, parts: int, k: int) -> tuple[int, int]:
    """Return start and length of part `k` as `torch.tensor_split` cuts: the first ones longer."""
    size, longer = divmod(n, parts)
    return k * size + min(k, longer), size + (k < longer)


RULES = {"chunk": chunk, "split": split}
"""How a dim is cut that an axis does not divide."""


def zigzag(n: int, parts: int, k: int, rule: str) -> Runs:
    """Return the positions of rank `k` that holds chunks k and 2 parts - 1 - k of 2 parts."""
    return [RULES[rule](n, 2 * parts, i) for i in (k, 2 * parts - 1 - k)]


def behind(total: int, size: int) -> list[tuple[int, int, int]]:
    """Return the segments of `total` indices, of which all behind the first `size` are padding."""
    found = [(0, min(size, total), 0), (size, total - size, PADDING)]
    return [segment for segment in found if segment[1] > 0]


def located(runs: Runs, segments: Sequence[tuple[int, int, int]]) -> Runs:
    """Return runs with each index replaced by what segments say it is in another numbering.

    Args:
        runs: indices in the first numbering.
        segments: (first index, how many, the first's number or `PADDING`), sorted and without gaps.
    """
    starts = [start for start, _, _ in segments]
    found: list[tuple[int, int]] = []
    for start, n in runs:
        while n > 0:
            if start == PADDING:
                found.append((PADDING, n))
                break
            i = bisect_right(starts, start) - 1
            first, size, there = segments[i] if i >= 0 else (0, 0, 0)
            take = min(n, first + size - start)
            if take <= 0:
                raise LayoutError(f"index {start} is behind the last of a dim", "mend its sizes")
            found.append((there if there == PADDING else there + start - first, take))
            start, n = start + take, n - take
    return merged(found)


def common(into: Runs, out_of: Runs) -> list[Piece]:
    """Return the indices that two ranks have in common; padding is common to nobody."""
    there: list[tuple[int, int, int]] = []
    at = 0
    for start, n in out_of:
        if start != PADDING:
            there.append((start, n, at))
        at += n
    there.sort()
    starts = [start for start, _, _ in there]
    found: list[Piece] = []
    at = 0
    for start, n in into:
        if start != PADDING:
            i = max(0, bisect_right(starts, start) - 1)
            while i < len(there) and there[i][0] < start + n:
                first, size, position = there[i]
                low, high = max(start, first), min(start + n, first + size)
                if low < high:
                    piece = Piece(at + low - start, position + low - first, high - low)
                    if found and _continues(found[-1], piece):
                        before = found.pop()
                        piece = Piece(before.into, before.out_of, before.length + piece.length)
                    found.append(piece)
                i += 1
        at += n
    return found


def _continues(before: Piece, piece: Piece) -> bool:
    return (
        before.into + before.length == piece.into and before.out_of + before.length == piece.out_of
    )


def missing(into: Runs, pieces: Iterable[Piece]) -> Runs:
    """Return which indices of runs no piece gives, padding left aside."""
    given = sorted((piece.into, piece.into + piece.length) for piece in pieces)
    found: list[tuple[int, int]] = []
    at, i = 0, 0
    for start, n in into:
        position, end = at, at + n
        at = end
        if start == PADDING:
            continue
        while position < end:
            while i < len(given) and given[i][1] <= position:
                i += 1
            if i < len(given) and given[i][0] <= position:
                position = min(end, given[i][1])
                continue
            until = min(end, given[i][0]) if i < len(given) else end
            found.append((start + position - (end - n), until - position))
            position = until
    return merged(found)
