"""What stands at a tap: a tensor, or a value or extras that become JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CaptureError

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
