"""Elements of any dtype as numbers, and how far apart those of two tensors are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from recorder.bits import as_bits


def is_plain(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether float64 holds each element, and the squares of each, of both tensors."""
    return all(not t.dtype.is_complex and t.dtype.itemsize < 8 for t in (a, b))


class Apart(NamedTuple):
    """Of a chunk, in float64, elements not finite on both sides set to zero.

    Attributes:
        x: the baseline's, of shape [n] (complex: [2 n], real and imaginary parts).
        y: the target's.
        d: y - x.
        w: |y - x|, of shape [n].
        size: |x|, of shape [n].
        excluded: whether it is not finite on both sides, of shape [n].
    """

    x: torch.Tensor
    y: torch.Tensor
    d: torch.Tensor
    w: torch.Tensor
    size: torch.Tensor
    excluded: torch.Tensor


def apart(one: torch.Tensor, other: torch.Tensor) -> Apart:
    """Return what a chunk's figures are made of."""
    (x, *x_rest), (y, *y_rest) = widened(one), widened(other)
    d = y - x
    if x_rest or y_rest:
        d = d + (sum(y_rest) - sum(x_rest))
    if bool(d.sum().isfinite()):  # then each is, which takes longer to ask
        excluded = torch.zeros_like(d, dtype=torch.bool)
    else:
        excluded = ~(x.isfinite() & y.isfinite())
        x, y, d = (values.masked_fill(excluded, 0) for values in (x, y, d))
    w, size = d.abs(), x.abs()
    if d.is_complex():
        x, y, d = (torch.view_as_real(v.to(torch.complex128)).reshape(-1) for v in (x, y, d))
    return Apart(x, y, d, w, size, excluded)


def widened(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return what adds up to the tensor: itself in double precision, and what that rounds off.

    Only integers of 64 bits have the latter.
    """
    values = as_numbers(tensor)
    if values.is_complex():
        return [values.to(torch.complex128)]
    if values.dtype.is_floating_point or values.dtype.itemsize < 8:
        return [values.to(torch.float64)]
    top = 2.0**63 - 2.0**10 if values.dtype.is_signed else 2.0**64 - 2.0**11
    most = values.to(torch.float64).clamp(max=top)  # the nearest may be out of the dtype's range
    rest = as_bits(values) - as_bits(most.to(values.dtype))
    return [most, rest.to(torch.float64)]


def as_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Return elements that float64 can be made of: float8 and the halves of complex32 widened."""
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
        return tensor.to(torch.float32)
    return tensor.to(torch.complex64) if tensor.dtype == torch.complex32 else tensor


def unravelled(index: int, shape: Sequence[int]) -> list[int]:
    """Return the place of an element that is the `index`-th of a tensor of some shape."""
    found = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        found.append(at)
    return found[::-1]


def signed_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements viewed as integers whose sign is the elements'."""
    bits = as_bits(tensor)
    return bits.view(torch.int8) if bits.dtype == torch.uint8 else bits
