"""What a model is called with, by name, and what is known of its rows as a call begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Say = Callable[[str], None]
"""Says once why some rows have no ids."""
Arguments = Mapping[str, Any]
"""What a model is called with: the names of its forward's parameters, and what each is given."""

_names: dict[type, tuple[str, ...]] = {}


class NoRows(Exception):
    """A call does not say which token each of its rows is; the reason, and what to do about it.

    Attributes:
        is_quiet: whether that is as it should be, as of a call that only warms up.
    """

    def __init__(self, reason: str, is_quiet: bool = False) -> None:
        super().__init__(reason)
        self.is_quiet = is_quiet


@dataclass(frozen=True)
class Begun:
    """What is known of a call's rows.

    Attributes:
        rows: the names of dims -> what returns the ids along them; see `taps.rows.Ids`.
        kept: returns the ids of what the model's head gets, of the last tokens only as a rule; None
            where that is all.
        shape: that of the tokens.
        ended: is given the model's output once it has returned.
    """

    rows: Mapping[str, Callable[[], torch.Tensor]]
    kept: Callable[[], torch.Tensor] | None = None
    shape: tuple[int, ...] = ()
    ended: Callable[[Any], None] | None = None


def plainly_made(make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return what makes the same outside of inference mode, whose tensors count no changes."""

    def made() -> torch.Tensor:
        with torch.inference_mode(False):
            return make()

    return made


def parameters_of(module: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of a module's forward's parameters, in their order."""
    kind = type(module)
    if kind not in _names:
        try:
            _names[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]
        except (TypeError, ValueError):
            _names[kind] = ()
    return _names[kind]


def arguments(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Arguments:
    """Return what a module is called with by name; what is None is left out."""
    found = dict(zip(parameters_of(module), args, strict=False))
    found.update(kwargs)
    return {name: value for name, value in found.items() if value is not None}


def tokens_of(given: Arguments) -> torch.Tensor:
    """Return the tokens of a call.

    Raises:
        NoRows: there are none, or the call says more than they do.
    """
    tokens = given.get("input_ids")
    if given.get("inputs_embeds") is not None or not isinstance(tokens, torch.Tensor):
        raise NoRows(
            "it is given embeddings and no tokens; say which row is which by a function, as in "
            "--rows PKG.MOD.FN, or with recorder.rows around the call"
        )
    if type(tokens) not in (torch.Tensor, torch.nn.Parameter) or tokens.is_meta:
        raise NoRows(f"its tokens are a {type(tokens).__name__}, which cannot be read here")
    return tokens


def whole(value: Any) -> int | None:
    """Return a number that a cache or a batch has as an integer or as a tensor of one element."""
    if isinstance(value, torch.Tensor):
        return int(value) if value.numel() == 1 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def on_host(value: Any) -> torch.Tensor:
    """Return integers, of a tensor or a list, as int64 on the CPU."""
    found = value if isinstance(value, torch.Tensor) else torch.tensor(value, device="cpu")
    return found.detach().to("cpu", torch.int64)
