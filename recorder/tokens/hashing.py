"""The hash that an id is, on the integers of torch; its definition stands in this room's README.

1. `numbered` makes a term of each token and its place in its sequence.
2. Terms add up, mod 2^64: the sum over a prefix and its length are all that is to be kept of it.
3. `named` makes an id of each sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import xxhash

_WORD = 1 << 64
_STEP = 0x9E3779B97F4A7C15  # splitmix64's increment: 2^64 / the golden ratio, odd
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # its multipliers
_INT_SALT = 0x53414C542D494E54  # b"SALT-INT"
_STR_SALT = 0x53414C542D535452  # b"SALT-STR"

_PIECE = 16_384
"""How many elements are mixed at once on a CPU, so that they stay in its cache."""


def signed(word: int) -> int:
    """Return the int64 that has the bits of an integer mod 2^64."""
    word %= _WORD
    return word - _WORD if word >> 63 else word


def _constant(word: int) -> torch.Tensor:
    """Return a constant as operations take it fastest: a tensor without dims, of any device's."""
    with torch.inference_mode(False):
        return torch.tensor(signed(word), dtype=torch.int64, device="cpu")


# Integers have a sign in torch, and a shift to the right repeats it: the mask takes it off.
_SHIFTS = tuple((_constant(by), _constant((1 << (64 - by)) - 1)) for by in (30, 27, 31))
_BY_FIRST, _BY_SECOND = _constant(_FIRST), _constant(_SECOND)
_BY_STEP = signed(_STEP)
ONE, _NO_SIGN = _constant(1), _constant((1 << 63) - 1)


def mix(word: int) -> int:
    """Return splitmix64's finalizer of an integer mod 2^64 (Steele, Lea, Flood 2014)."""
    word = (word ^ (word >> 30)) * _FIRST % _WORD
    word = (word ^ (word >> 27)) * _SECOND % _WORD
    return word ^ (word >> 31)


def seed(salt: int | str) -> int:
    """Return the sum of a sequence's empty prefix, as int64; without a salt it is 0."""
    if isinstance(salt, str):
        digest = xxhash.xxh3_64_intdigest(salt.encode("utf-8", "surrogatepass"))
        return signed(mix(digest ^ _STR_SALT))
    return signed(mix(salt % _WORD ^ _INT_SALT))


def numbered(
    tokens: torch.Tensor, numbers: torch.Tensor, spare: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the term of each token: a new tensor, int64, contiguous.

    Args:
        tokens: int64, of any shape.
        numbers: which token of its sequence each is, from 1; int64, of a shape that broadcasts.
        spare: int64 of the result's shape, whose elements are lost; None to make one.
    """
    found = torch.add(tokens, numbers, alpha=_BY_STEP).contiguous()
    _in_pieces(_mix_, found, spare)
    return found


def named(sums: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
    """Turn the sum of each prefix into its id, in place: int64, at least 0; contiguous."""
    _in_pieces(_mix_and_halve_, sums, spare)
    return sums


def before(ids: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the two ids that a prefix can have without its last token; the hash goes backwards.

    An id has lost one bit of the sum that it is made of, so one of the two is that of the prefix,
    and the other is nothing's but by chance. Of a prefix of one token neither means anything.

    Args:
        ids: [n], int64.
        tokens: [n], the last token of each.
        positions: [n], that token's place in its sequence, from 0.

    Returns:
        [2, n], int64.
    """
    terms = numbered(tokens, positions + 1)
    found = torch.stack([ids * 2, ids * 2 + 1])
    _unmix_(found)
    return named((found - terms).contiguous())


def previous(ids: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return for each id which of them is its prefix without the last token; -1 where none is.

    Args:
        ids: [n], int64.
        tokens: [n], the last token of each.
        positions: [n], that token's place in its sequence, from 0; below 0 where nobody said.

    Returns:
        [n], int64.
    """
    ordered, at = ids.sort()
    found = torch.full_like(ids, -1)
    if not len(ids):
        return found
    for candidate in before(ids, tokens.contiguous(), positions.contiguous()):
        there = torch.searchsorted(ordered, candidate).clamp_(max=len(ids) - 1)
        has = (ordered[there] == candidate) & (positions > 0)
        found[has] = at[there[has]]
    return found


def _unmix_(of: torch.Tensor) -> None:
    """Undo `_mix_`, in place."""
    for by, factor in ((31, _SECOND), (27, _FIRST), (30, 1)):
        once = (of >> by) & ((1 << (64 - by)) - 1)
        twice = (of >> 2 * by) & ((1 << (64 - 2 * by)) - 1)
        of.bitwise_xor_(once).bitwise_xor_(twice).mul_(signed(pow(factor, -1, _WORD)))


def _in_pieces(
    work: Callable[[torch.Tensor, torch.Tensor], None],
    of: torch.Tensor,
    spare: torch.Tensor | None,
) -> None:
    if not of.is_cpu or of.numel() <= _PIECE:
        work(of, torch.empty_like(of) if spare is None else spare)
        return
    flat = of.view(-1)
    spare = torch.empty_like(flat[:_PIECE])
    for piece in flat.split(_PIECE):
        work(piece, spare[: len(piece)])


def _mix_(of: torch.Tensor, spare: torch.Tensor) -> None:
    """Mix in place, by operations that are no more than these: each costs a microsecond."""
    (by_30, low_34), (by_27, low_37), (by_31, low_33) = _SHIFTS
    torch.bitwise_right_shift(of, by_30, out=spare)
    of.bitwise_xor_(spare.bitwise_and_(low_34)).mul_(_BY_FIRST)
    torch.bitwise_right_shift(of, by_27, out=spare)
    of.bitwise_xor_(spare.bitwise_and_(low_37)).mul_(_BY_SECOND)
    torch.bitwise_right_shift(of, by_31, out=spare)
    of.bitwise_xor_(spare.bitwise_and_(low_33))


def _mix_and_halve_(of: torch.Tensor, spare: torch.Tensor) -> None:
    _mix_(of, spare)
    of.bitwise_right_shift_(ONE).bitwise_and_(_NO_SIGN)
