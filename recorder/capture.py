"""What can be recorded, and how it leaves the job: a snapshot, bit for bit.

1. `classify` says whether a tapped value is a tensor, a value row, or neither.
2. `local_part` takes the local tensor out of a DTensor, with its placements as text.
3. `is_plain` knows at once the tensors whose memory holds their elements in order.
4. `as_bits` refuses what cannot be captured faithfully and views the rest as integers, so that no
   copy on the way can change a NaN's payload; `pieces` splits what is too large for one copy.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from .errors import CaptureError
from .layouts.mesh import axis_name

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_MOST_JSON = 1 << 20
_EXTRAS_ELEMENTS = 65_536  # extras are facts, not payloads


def classify(value: Any) -> str:
    """Return `tensor`, `value`, or what is wrong with it as a clause starting with `it is`."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    if _is_scalar(value):
        return "value"
    if isinstance(value, (list, tuple)):
        odd = [type(item).__name__ for item in value if not _is_scalar(item)]
        return f"it is a {type(value).__name__} holding a {odd[0]}" if odd else "value"
    return f"it is a {type(value).__name__}"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def encode_value(value: Any) -> str:
    """Return a value row's JSON; floats that are not finite become NaN, Infinity, -Infinity.

    Raises:
        CaptureError: it is too long for a row.
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    if len(text) > _MOST_JSON:
        raise CaptureError("it is a value of more than a megabyte; tap it as a tensor")
    return text


def encode_extras(extras: Mapping[str, Any] | None) -> tuple[str, list[str]]:
    """Return extras as JSON, and a fact about each entry that had to be left out."""
    if not extras:
        return "", []
    if not isinstance(extras, Mapping):
        return "", [f"extras is a {type(extras).__name__}, expected a dict"]
    kept, lost = {}, []
    for name, value in extras.items():
        try:
            if hasattr(value, "tolist"):  # small tensors and arrays, such as sequence lengths
                if getattr(value, "numel", lambda: 0)() > _EXTRAS_ELEMENTS:
                    lost.append(f"extras[{name!r}] has too many elements; tap it instead")
                    continue
                value = value.tolist()
            json.dumps(value)
        except Exception:  # whatever a foreign type's tolist may raise
            lost.append(f"extras[{name!r}] is a {type(value).__name__}, which JSON cannot hold")
        else:
            kept[str(name)] = value
    text = json.dumps(kept, separators=(",", ":"))
    if len(text) > _MOST_JSON:
        return "", [*lost, "extras are of more than a megabyte; tap them as tensors"]
    return text, lost


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


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without the prefix: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured on the stream that computes this tensor."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


_AS_IT_IS: AbstractContextManager[Any] = nullcontext()


def plainly() -> AbstractContextManager[Any]:
    """Work on plain tensors even where the job has a mode on, such as FakeTensorMode."""
    dispatched = torch._C._len_torch_dispatch_stack()
    if torch._C._is_torch_function_mode_enabled():
        if not dispatched:
            return torch._C.DisableTorchFunction()
        both = ExitStack()
        both.enter_context(torch._C.DisableTorchFunction())
        both.enter_context(_undispatched())
        return both
    return _undispatched() if dispatched else _AS_IT_IS


def _undispatched() -> AbstractContextManager[Any]:
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def check(tensor: torch.Tensor) -> None:
    """Refuse a tensor whose elements cannot be read faithfully.

    Raises:
        CaptureError: the reason, as one clause.
    """
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise CaptureError(f"its layout is {layout}; tap its dense form or its parts")
    if tensor.is_quantized:
        raise CaptureError("it is quantized; tap its int_repr() and its scales")
    if tensor.is_nested:
        raise CaptureError("it is a nested tensor; tap its values() and offsets()")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise CaptureError("it is inside torch.func (vmap, grad); tap outside of it")
    if type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise CaptureError(
            f"it is a {type(tensor).__name__}, whose storage need not hold its elements; "
            "tap a plain tensor made from it"
        )
    if tensor.device.type == "meta":
        raise CaptureError("it is on the meta device and has no elements")
    if not has_memory(tensor):
        raise CaptureError(
            "its memory was freed, as FSDP frees parameters that are sharded; tap it earlier"
        )
    if is_capturing(tensor):
        raise CaptureError(
            "a CUDA graph is being captured, and a copy made now would be replayed with it; "
            "tap outside the captured region, or run this job without CUDA graphs"
        )


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a strided tensor's elements lie inside its storage."""
    if tensor.numel() == 0:
        return True
    end = tensor.storage_offset() + 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        end += (size - 1) * stride
    if tensor.untyped_storage().nbytes() < end * tensor.element_size():
        return False
    return tensor.device.type not in ("cpu", "cuda") or tensor.data_ptr() != 0


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the bytes from `data_ptr` on are the tensor's elements, in order, on the CPU.

    For most tensors this is all there is to find out; the others are for `as_bits`.
    """
    return (
        type(tensor) in _PLAIN_TYPES
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_neg() or tensor.is_quantized or tensor.is_nested)
        and not (tensor.dtype.is_complex and tensor.is_conj())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and has_memory(tensor)
    )


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's elements, in its own order and strides, viewed as integers.

    Raises:
        CaptureError: it cannot be captured faithfully.
    """
    try:
        check(tensor)
        plain = tensor.detach()
        if type(plain) is not torch.Tensor:
            plain = plain.as_subclass(torch.Tensor)
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        if plain.element_size() == 16:  # no integer is as wide as complex128
            plain = torch.view_as_real(plain)
        return plain.view(_BITS[plain.element_size()])
    except (RuntimeError, KeyError, TypeError, ValueError) as err:
        # Also what odd subclasses raise, such as parameters that are not initialised.
        raise CaptureError(f"it is a {type(tensor).__name__} that cannot be read ({err})") from None


def pieces(bits: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Split a tensor into parts of at most `limit` bytes whose contents follow one another."""
    if bits.numel() * bits.element_size() <= limit or bits.dim() == 0:
        yield bits
        return
    row = bits[0].numel() * bits.element_size()
    if row > limit:
        for part in bits:
            yield from pieces(part, limit)
        return
    rows = max(1, limit // max(1, row))
    for start in range(0, bits.shape[0], rows):
        yield bits[start : start + rows]
