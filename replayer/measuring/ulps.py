"""Distances in units in the last place, of any two dtypes."""

from __future__ import annotations

import torch

from recorder.bits import as_bits

from .elements import apart, as_numbers, signed_bits


def max_ulp(one: torch.Tensor, other: torch.Tensor, excluded: torch.Tensor | None = None) -> float:
    """Return the greatest distance in units in the last place, of the coarser dtype."""
    if one.dtype.is_complex or other.dtype.is_complex:
        parts = zip(_real_and_imaginary(one), _real_and_imaginary(other), strict=True)
        return max(max_ulp(x, y, excluded) for x, y in parts)
    floats = [t.dtype for t in (one, other) if t.dtype.is_floating_point]
    if floats:
        coarse = min(floats, key=_precision)
        one, other = _ordered(one, coarse), _ordered(other, coarse)
    steps = apart(one, other).w
    return float((steps if excluded is None else steps.masked_fill(excluded, 0.0)).max())


def _real_and_imaginary(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if tensor.is_complex():
        real, imaginary = torch.view_as_real(tensor).unbind(-1)
        return real, imaginary
    return tensor, torch.zeros_like(tensor)


_FRACTION = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


def _precision(dtype: torch.dtype) -> tuple[int, str]:
    """Return the bits of a fraction, for 8-bit floats as the name has it (finfo has it wrong)."""
    name = str(dtype)
    return _FRACTION.get(dtype) or int(name.split("m")[1][0]), name


def is_unsigned(dtype: torch.dtype) -> bool:
    """Whether it is the one float dtype without a sign, which not every torch has."""
    return str(dtype) == "torch.float8_e8m0fnu"


def _ordered(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return floats of some dtype as integers in their order, one step apart where they are.

    Both zeros are 0. Values of another dtype are rounded; beyond the range they are one step more
    than its ends.
    """
    beyond = torch.zeros((), dtype=torch.int64)
    if values.dtype != dtype:
        ends = torch.finfo(dtype)
        wide = as_numbers(values).to(torch.float64)
        beyond = (wide > ends.max).to(torch.int64) - (wide < ends.min).to(torch.int64)
        values = wide.clamp(ends.min, ends.max).to(dtype)
    if is_unsigned(dtype):
        return as_bits(values).to(torch.int64) + beyond
    bits = signed_bits(values)
    sign = bits >> (bits.dtype.itemsize * 8 - 1)
    magnitude = bits & torch.iinfo(bits.dtype).max
    return ((magnitude ^ sign) - sign).to(torch.int64) + beyond
