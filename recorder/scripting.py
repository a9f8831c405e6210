"""Functions of tensors that run without the interpreter, where torch can compile them.

A background thread that calls torch op by op has to get the interpreter back after each op, and a
job busy with Python lets go of it every 5 ms at best; compiled, a whole function is one call.
Beside such a job, statistics of 16 MiB took 67 times as long op by op; a diff of bfloat16, which
has the interpreter for itself, 1.35 times.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def scripted(function: F) -> F:
    """Return the function compiled by TorchScript; itself where that is not to be had.

    TorchScript is deprecated, and nothing here depends on it but speed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.jit.script(function)
            compiled.__wrapped__ = function
            return compiled  # type: ignore[no-any-return]
    except Exception:  # it is gone, or its source is, as in a frozen application
        return function


def compiles() -> bool:
    """Whether `scripted` compiles here."""
    return scripted(_itself) is not _itself


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x
