"""The checks before `copy_`, and the `copy_`: values change, the graph does not.

A graft is refused where the copy would not be faithful: another shape (no silent broadcast),
another device, a cast that loses, target memory that overlaps itself.
"""

from __future__ import annotations

from typing import Any

import torch

from recorder.bits import as_bits, check, has_statistics, is_capturing
from recorder.errors import CaptureError, GraftRefused, TransformError

from .casts import cast


def check_target(target: torch.Tensor) -> None:
    """Refuse a target that cannot be overwritten faithfully.

    Raises:
        GraftRefused: the reason and what to do.
    """
    if is_capturing(target):
        raise GraftRefused(
            "a CUDA graph is being captured, and the copy would be replayed with it; "
            "tap outside the captured region, or run this job without CUDA graphs"
        )
    try:
        check(target)
    except CaptureError as err:
        raise GraftRefused(f"the target cannot be overwritten: {err}") from None
    if overlaps_itself(target):
        raise GraftRefused(
            "the target's elements overlap in memory (an expanded or overlapping view), so writing "
            "one changes others; tap a tensor with memory of its own, such as its contiguous()"
        )


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor share memory."""
    sizes = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    if tensor.numel() == 0 or not sizes:
        return False
    if any(stride == 0 for _, stride in sizes):
        return True
    reach = 0
    for size, stride in sorted(sizes, key=lambda item: item[1]):
        if stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return False
    # Strides that interleave may still not collide; then only the offsets themselves can tell.
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in sizes:
        offsets = offsets[..., None] + torch.arange(size, device="cpu") * stride
    return bool(offsets.unique().numel() < offsets.numel())


def check_replacement(new: Any, target: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Refuse a replacement that is no faithful one for `target`.

    Args:
        new: what the transform returned.
        target: the receiver's tensor.

    Returns:
        The replacement, of the target's dtype, and a note about a cast, or "".

    Raises:
        TransformError: no tensor, or on another device.
        GraftRefused: another shape, or a cast that loses.
    """
    if not isinstance(new, torch.Tensor):
        raise TransformError(
            f"the transform returned {'None' if new is None else f'a {type(new).__name__}'}, "
            "expected a tensor of the target's shape"
        )
    if new.device != target.device:
        raise TransformError(
            f"the transform returned a tensor on {new.device}, the target is on {target.device}; "
            "return it there"
        )
    try:
        check(new)
    except CaptureError as err:
        raise TransformError(
            f"the transform returned a tensor that cannot be read: {err}"
        ) from None
    if new.shape != target.shape:
        raise GraftRefused(
            f"shapes differ: the replacement has {list(new.shape)}, the target "
            f"{list(target.shape)}; nothing is broadcast, make the transform return that shape"
        )
    new = new.detach()
    if new.dtype == target.dtype:
        return new, ""
    return cast(new, target.dtype)


def overwrite(target: torch.Tensor, new: torch.Tensor) -> None:
    """Copy `new` over `target`: same shape, dtype and device, checked before.

    The values change where they stand; autograd's graph and version counters do not, so that
    `backward` goes on with the new values.
    """
    if target.numel() == 0:
        return
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        if not has_statistics(target.dtype):  # torch cannot copy it but as bits
            target, new = as_bits(target), as_bits(new)
        # `.data` shares memory but not the version counter; an alias of the target is copied
        # first, since overlapping memory has no defined order of copying.
        target.data.copy_(new.clone() if shares_memory(new, target) else new)


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
