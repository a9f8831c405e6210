"""Casts to the target's dtype: what is refused, and what one between floating types does to range.

1. `cast` refuses what is no value of the target's dtype; of integers, what would not survive.
2. Between floating types values are rounded, which is noted. Those that leave the range of the
   target's dtype are counted (`_lost`): rounding is no word for 1e6 that becomes infinite, is
   clipped to 448, or for 1e-9 that becomes zero.
3. More than `MOST_LOST` of them, and the cast is refused.
"""

from __future__ import annotations

import math

import torch

from recorder.bits import dtype_name, why_not_by_value
from recorder.errors import GraftRefused
from recorder.sizes import count

MOST_LOST = 0.01
"""The share of elements that may leave the target's range."""

_CHUNK = 1 << 20


def cast(new: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, str]:
    """Return a tensor in another dtype, and a note.

    Raises:
        GraftRefused: the cast would lose; says what, and what to do.
    """
    try:
        return _cast(new, dtype)
    except RuntimeError as err:  # a NotImplementedError is one too
        if not is_unsupported(err):
            raise
        raise GraftRefused(
            f"torch cannot cast {dtype_name(new.dtype)} to {dtype_name(dtype)} on "
            f"{new.device.type}; make the transform return {dtype_name(dtype)}"
        ) from err


def is_unsupported(err: Exception) -> bool:
    """Whether torch says that it has no such operation for a dtype."""
    words = str(err)
    return isinstance(err, RuntimeError) and (
        "not implemented for" in words or "not supported" in words or "Promotion for" in words
    )


def _cast(new: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, str]:
    note = f"cast from {dtype_name(new.dtype)} to {dtype_name(dtype)}"
    if why := why_not_by_value(new.dtype, dtype):
        raise GraftRefused(why)
    floats = new.dtype.is_floating_point and dtype.is_floating_point
    complexes = new.dtype.is_complex and dtype.is_complex
    widened = new.dtype.is_floating_point and dtype.is_complex
    if floats or complexes or widened:
        return _between_floats(new, dtype, note)
    integral = not (new.dtype.is_floating_point or new.dtype.is_complex)
    if integral:  # between integers and booleans, and to floats: only where every value survives
        _refuse_scales(dtype, note)
        there = new.to(dtype)
        if bool((there.to(new.dtype) == new).all()) and _same_sign(new, there):
            return there, note
    raise GraftRefused(
        f"a {note} would lose values; make the transform return {dtype_name(dtype)}, "
        "rounding as you mean it"
    )


def of_scaled(dtype: torch.dtype, whose: str) -> str:
    """Return a warning where a tensor of this dtype hardly goes without a scale, else "".

    Args:
        dtype: of the tensor.
        whose: what the tensor is, such as `the target`.
    """
    if not (dtype.is_floating_point and dtype.itemsize == 1):
        return ""
    return (
        f"{whose} is {dtype_name(dtype)}, to which a scale may belong that a graft knows nothing "
        "of; tap what it means (value * scale), or name a transform that applies the scale"
    )


def _between_floats(new: torch.Tensor, dtype: torch.dtype, note: str) -> tuple[torch.Tensor, str]:
    _refuse_scales(dtype, note)
    there = new.to(dtype)
    lost = {} if _holds(dtype, new.dtype) else _lost(new, there)
    if not lost:
        return there, note
    of = new.numel()
    facts = ", ".join(f"{number} {what}" for what, number in lost.items())
    total = sum(lost.values())
    if total > MOST_LOST * of:
        raise GraftRefused(
            f"a {note} takes {total} of {count(of, 'element')} out of its range ({facts}), more "
            f"than {MOST_LOST:.0%}; make the transform return {dtype_name(dtype)}, scaled and "
            "rounded as you mean it"
        )
    return (
        there,
        f"{note}, which takes {total} of {count(of, 'element')} out of its range ({facts})",
    )


def _refuse_scales(dtype: torch.dtype, note: str) -> None:
    if dtype.is_floating_point and torch.finfo(dtype).min >= 0:
        raise GraftRefused(
            f"a {note} would lose sign, zero and digits: {dtype_name(dtype)} has powers of two "
            f"alone, as scales are; make the transform return {dtype_name(dtype)}"
        )


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of one floating type is inside the range of another."""
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.max >= b.max and a.smallest_normal * a.eps <= b.smallest_normal * b.eps


def _lost(old: torch.Tensor, new: torch.Tensor) -> dict[str, int]:
    """Count the elements that a cast between floating types took out of range, by what became."""
    info = torch.finfo(new.dtype)
    ulp = 2.0 ** math.floor(math.log2(info.max)) * info.eps
    wide = torch.float64 if old.dtype.itemsize >= 8 else torch.float32
    found: dict[str, int] = {}
    old, new = _flat(old), _flat(new)
    if new.numel() > old.numel():  # the real part
        new = new[::2]
    for one, other in zip(old.split(_CHUNK), new.split(_CHUNK), strict=True):
        x, y = one.to(wide), other.to(wide)
        finite = x.isfinite()
        facts = {
            "became infinite": finite & y.isinf(),
            "became NaN": ~x.isnan() & y.isnan(),
            f"clipped to {info.max:g}": y.isfinite() & (x.abs() > info.max + ulp / 2),
            "became zero": (x != 0) & (y == 0),
        }
        sums = torch.stack([fact.sum() for fact in facts.values()]).tolist()
        for what, number in zip(facts, sums, strict=True):
            if number:
                found[what] = found.get(what, 0) + number
    return found


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return plain.reshape(-1)


def _same_sign(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether a round trip was not two wrap-arounds, as from int64 -1 to uint64 and back."""
    if old.dtype == torch.bool or new.dtype == torch.bool:
        return True
    if new.dtype.is_floating_point or new.dtype.is_complex:
        return True  # nothing wraps around there
    if not old.dtype.is_signed:
        return not new.dtype.is_signed or bool((new >= 0).all())
    return new.dtype.is_signed or bool((old >= 0).all())
