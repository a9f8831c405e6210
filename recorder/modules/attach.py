"""`recorder.attach`: tap one model in a program's own code; `follow_rows`: tell its rows apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch

from ..errors import UsageError
from ..settings import TapSettings
from .request import Request
from .told import lines

Rows = str | Callable[..., Any]
W = TypeVar("W", bound="_Wanted")


def _requested(model: object, settings: TapSettings, called: str) -> Request:
    """Return what is wanted of one model, in its place.

    Raises:
        UsageError: it is none, or what is wanted cannot be.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{called} was given a {type(model).__name__}; give it a torch.nn.Module")
    request = Request(settings)
    try:
        if request.following is not None:
            request.following.load()
        found = request.on_root(model, None)
        is_tapped = found is not None and bool(found.bindings)
        wants_taps = bool(settings.modules or settings.taps)
        is_unfollowed = request.following is not None and found is None
        if is_unfollowed or request.unfollowed or (wants_taps and not is_tapped):
            raise UsageError("; ".join(lines([request.report()], settings)))
    except BaseException:
        request.detach()
        raise
    return request


class _Wanted:
    """What is wanted of one model, and the way back; also a context manager."""

    def __init__(self, model: object, settings: TapSettings) -> None:
        self._request = _requested(model, settings, type(self).__name__)

    def detach(self) -> None:
        """Leave the model as it was."""
        self._request.detach()

    def __enter__(self: W) -> W:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


class follow_rows(_Wanted):  # noqa: N801  # as `attach`
    """Say which token each row of one model's tensors is, as `--rows` does for all of a process.

    ```python
    followed = follow_rows(model)             # or: with follow_rows(model, "vllm"): ...
    followed.detach()
    ```

    Taps in the model then have their rows, as if they stood in `with rows(...)`.

    Args:
        model: the root.
        system: what `--rows` takes, or a function of (module, args, kwargs) that returns ids by
            dims, as `rows` takes them, or None.

    Raises:
        UsageError: the system is not known, the function cannot be imported, or with `auto` the
            model is of no system that is recognised.
    """

    def __init__(self, model: torch.nn.Module, system: Rows = "auto") -> None:
        super().__init__(model, TapSettings.given({"rows": system}))


class attach(_Wanted):  # noqa: N801  # read as a verb, as `context` is
    """Tap one model of a program's own, as `--modules` and `--taps` do for all of a process.

    ```python
    taps = attach(model, taps="hf-llama")     # or: with attach(model, modules=["*.mlp"]): ...
    taps.detach()
    ```

    The taps do nothing while nothing records or replays, as hand-written ones.

    Args:
        model: the root that the paths are taken from.
        taps: a table, as `--taps` takes it.
        modules: paths of modules, as `--modules` takes them.
        rows: what says which row is which, as `--rows` takes it, or a function.

    Raises:
        UsageError: the table or a path cannot be read, or nothing of them fits the model; or the
            function cannot be imported, or the model is of no system that is recognised.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        taps: str | None = None,
        modules: str | Sequence[str] = (),
        rows: Rows | None = None,
    ) -> None:
        settings = TapSettings.given({"taps": taps, "modules": modules, "rows": rows})
        if not settings.wants_modules:
            raise UsageError("attach was given neither taps nor modules nor rows")
        super().__init__(model, settings)
