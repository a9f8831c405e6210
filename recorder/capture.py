"""What of a tapped tensor is to be copied, or why it cannot be captured faithfully.

1. `capture` knows at once the tensors whose memory holds their elements in order: the small ones,
   and those on a GPU.
2. Of all others it takes the local part (`local_part`), and views that as integers
   (`bits.as_bits`), so that no copy on the way can change a NaN's payload.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch

from .bits import as_bits, check_capturing, is_plain
from .mesh import axis_name

FEW = 1 << 20
"""The most bytes that are copied on the spot, without a tensor operation."""

# Of these, a contiguous tensor is surely copied as bytes; `as_bits` makes that sure of all others.
_COPIED_AS_THEY_ARE = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
}


class Snapshot(NamedTuple):
    """What is to be copied of a tensor before the job goes on.

    Attributes:
        local: the tensor on this rank, of any shape and strides.
        bits: its elements viewed as integers, of its shape and strides, or itself where it can be
            copied as it is; None where they are the few bytes from `local.data_ptr()` on.
        placements: a DTensor's mesh and placements as text, else "".
    """

    local: torch.Tensor
    bits: torch.Tensor | None
    placements: str = ""


def capture(tensor: torch.Tensor) -> Snapshot:
    """Return what is to be copied of a tensor; call it inside `bits.plainly`.

    Raises:
        CaptureError: it cannot be captured faithfully; the reason, as one clause.
    """
    if is_plain(tensor) and tensor.nbytes <= FEW:
        return Snapshot(tensor, None)
    if is_plain(tensor, "cuda") and tensor.dtype in _COPIED_AS_THEY_ARE:
        check_capturing(tensor)
        return Snapshot(tensor, tensor.detach() if tensor.requires_grad else tensor)
    local, placements = local_part(tensor)
    return Snapshot(local, as_bits(local), placements)


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Return the tensor on this rank, and a DTensor's mesh and placements as text, else ""."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then it is no DTensor
    if module is None or not isinstance(tensor, module.DTensor):
        return _waited(tensor), ""
    with torch.no_grad():
        local = _waited(tensor.to_local())
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or [str(i) for i in range(mesh.ndim)]
    at = mesh.get_coordinate()
    places = [""] * mesh.ndim if at is None else [f"{k}/" for k in at]
    axes = " ".join(
        f"{axis_name(name)}:{place}{size}={placement!r}"
        for name, place, size, placement in zip(
            names, places, mesh.shape, tensor.placements, strict=True
        )
    )
    return local, f"DTensor {list(tensor.shape)} {axes}"


def dims_text(declared: str, placements: str) -> str:
    """Return a tap's layout: what was declared, and what a DTensor says of itself."""
    return f"{declared} # {placements}" if declared and placements else declared or placements


def _waited(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor once the functional collective that computes it, if any, has ended."""
    if type(tensor).__name__ != "AsyncCollectiveTensor":
        return tensor
    return tensor.wait()  # type: ignore[no-any-return, attr-defined]
