"""What a tensor is as integers, so that no copy can change it.

Torch's private names of tensors are used in this file alone.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from .errors import CaptureError

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


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
    """Refuse a tensor whose elements cannot be read faithfully, or not now.

    Raises:
        CaptureError: the reason, as one clause.
    """
    check_kind(tensor)
    check_capturing(tensor)


def check_capturing(tensor: torch.Tensor) -> None:
    """Refuse a tensor that a CUDA graph is being captured from.

    Raises:
        CaptureError: the reason, as one clause.
    """
    if is_capturing(tensor):
        raise CaptureError(
            "a CUDA graph is being captured, and a copy made now would be replayed with it; "
            "tap outside the captured region, or run this job without CUDA graphs"
        )


def check_kind(tensor: torch.Tensor) -> None:
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


def is_lifted() -> bool:
    """Whether tensors are several at once here, as in torch.vmap, or dual numbers."""
    functorch = torch._C._functorch
    kinds = functorch.TransformType
    stack = functorch.get_interpreter_stack() or ()
    return any(one.key() not in (kinds.Grad, kinds.Functionalize) for one in stack)


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


def owns_memory(tensor: torch.Tensor) -> bool:
    """Whether nothing but this tensor is known to have its memory: no view, graph or array."""
    storage = tensor.untyped_storage()
    if not storage.resizable() or (tensor.is_cpu and storage.is_shared()):
        return False  # numpy's, a file's, another process's
    del storage
    return _owners(tensor) == _one_owner()


def _owners(tensor: torch.Tensor) -> tuple[int, int]:
    """Return how often its storage is referred to in Python, and in C++."""
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


@functools.cache
def _one_owner() -> tuple[int, int]:
    with plainly():
        return _owners(torch.empty(1, device="cpu"))


def is_plain(tensor: torch.Tensor, device: str = "cpu") -> bool:
    """Whether the bytes from `data_ptr` on are the tensor's elements, in order, on a device.

    For most tensors this is all there is to find out; the others are for `as_bits`. The keys
    that torch dispatches by say at once that it is strided, on that device, of no subclass, and not
    lazily conjugate or negative; to ask for each gives the interpreter away, which a busy thread
    keeps.
    """
    if (
        type(tensor) not in _PLAIN_TYPES
        or torch._C._dispatch_keys(tensor).raw_repr() not in _plain_keys(tensor, device)
        or not tensor.is_contiguous()
    ):
        return False
    nbytes = tensor.nbytes
    begin = tensor.storage_offset() * tensor.element_size()
    has_all = nbytes == 0 or tensor.untyped_storage().nbytes() >= begin + nbytes
    return has_all and (tensor.data_ptr() != 0 or nbytes == 0)


_plain: dict[str, frozenset[int]] = {}


def _plain_keys(tensor: torch.Tensor, kind: str) -> frozenset[int]:
    """Return the dispatch keys of plain tensors on devices of a kind, of which the tensor may be.

    They are those of inputs, of leaves, and of what is made in inference mode.
    """
    found = _plain.get(kind)
    if found is None:
        device = tensor.device
        if device.type != kind:
            return frozenset()
        # Of no elements, and on its very device: nothing is allocated, and no other one is touched.
        with plainly(), torch._C._DisableFuncTorch(), torch.inference_mode(mode=False):
            made = [torch.empty(0, device=device)]
            made.append(torch.empty(0, device=device, requires_grad=True))
            with torch.inference_mode():
                made.append(torch.empty(0, device=device))
        found = frozenset(torch._C._dispatch_keys(one).raw_repr() for one in made)
        _plain[kind] = found
    return found


def as_bits(tensor: torch.Tensor, *, in_graph: bool = False) -> torch.Tensor:
    """Return the tensor's elements, in its own order and strides, viewed as integers.

    Args:
        tensor: the tensor.
        in_graph: whether what is done with them may become part of a CUDA graph.

    Raises:
        CaptureError: it cannot be captured faithfully.
    """
    try:
        if is_plain(tensor) and tensor.element_size() in _BITS:
            return tensor.detach().view(_BITS[tensor.element_size()])
        (check_kind if in_graph else check)(tensor)
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


@functools.cache
def has_statistics(dtype: torch.dtype) -> bool:
    """Whether torch can compute with this dtype; with sub-byte and other odd ones it cannot."""
    name = str(dtype).removeprefix("torch.")
    return not name.startswith(("bits", "float4", "quint", "qint", "bcomplex")) and name not in {
        f"{sign}int{width}" for sign in ("", "u") for width in range(1, 8)
    }


@functools.cache
def why_not_by_value(one: torch.dtype, other: torch.dtype) -> str:
    """Return why elements of two dtypes are not to be compared or cast, "" where they are.

    Packed elements are no numbers to torch, and what one side has as bytes of 8 bits the other may
    have as floats of 8 bits: the number is then not the value.
    """
    if one == other:
        return ""
    for a, b in ((one, other), (other, one)):
        is_small = a.is_floating_point and a.itemsize == 1 and b in (torch.uint8, torch.int8)
        if is_small or not has_statistics(a):
            return (
                f"{dtype_name(one)} and {dtype_name(other)} are not each other's values: one may "
                "hold the other's bytes; tap bytes on both sides, as in x.view(torch.uint8), or "
                "what they mean"
            )
    return ""


def bytes_of(raw: torch.Tensor) -> memoryview:
    """Return a contiguous CPU tensor's bytes without copying; keep the tensor alive meanwhile."""
    nbytes = raw.numel() * raw.element_size()
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * nbytes).from_address(raw.data_ptr())).cast("B")


def never_compiled(*functions: Callable[..., Any]) -> None:
    """Let the compiler run these functions, and what they call, as they are.

    The mark `_torchdynamo_disable` keeps it from tracing into them, and not from compiling them for
    themselves. Up to torch 2.6 this holds of the functions alone.
    """
    frames = torch._C._dynamo.eval_frame
    for function in functions:
        code = function.__code__
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        if hasattr(frames, "set_code_exec_strategy"):
            skip = frames._FrameAction.SKIP
            frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
        elif hasattr(frames, "skip_code"):
            frames.skip_code(code)
