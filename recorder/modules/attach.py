"""`recorder.attach`: tap one model in a program's own code."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch

from ..errors import UsageError
from ..settings import TapSettings
from .request import Request
from .told import lines


class attach:  # noqa: N801  # read as a verb, as `context` is
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

    Raises:
        UsageError: the table or a path cannot be read, or nothing of them fits the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        taps: str | None = None,
        modules: str | Sequence[str] = (),
    ) -> None:
        settings = TapSettings.given({"taps": taps, "modules": modules})
        if not isinstance(model, torch.nn.Module):
            raise UsageError(
                f"attach was given a {type(model).__name__}; give it a torch.nn.Module"
            )
        self._request = Request(settings)
        found = self._request.on_root(model, None)
        if found is None or not found.bindings:
            said = lines([self._request.report()], settings)
            raise UsageError("; ".join(said) or "attach was given neither taps nor modules")

    def detach(self) -> None:
        """Tap it no more."""
        self._request.detach()

    def __enter__(self) -> attach:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()
