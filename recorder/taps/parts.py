"""A tap whose dims name several tensors one behind the other: a tap for each, of a view of it.

1. `calls_of` makes a `PartCall` for each part, from the text of the dims alone.
2. The first whose value is wanted looks at the tensor, and all take their views of that.

A gradient comes to the tensor that the parts lie in, since a view of it is no part of what the job
goes on with; sessions watch `PartCall.whole` and look at their part of what comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..capture import dims_text, local_part
from ..errors import LayoutError
from ..layouts.parts import Part, names_of, parts_of
from ..mesh import current_mesh
from .call import UNKNOWN, Call
from .checkpoints import Place


class _Whole:
    """What the parts of one tap have in common: its tensor, looked at once."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._found: tuple[torch.Tensor, str, tuple[Part, ...]] | None = None
        self._error: Exception | None = None

    def look(self) -> tuple[torch.Tensor, str, tuple[Part, ...]]:
        """Return the tensor on this rank, what a DTensor says of itself, and the parts.

        Raises:
            LayoutError: the dims do not fit it.
        """
        if self._error is not None:
            raise self._error
        if self._found is None:
            try:
                self._found = self._look()
            except Exception as err:
                self._error = err
                raise
        return self._found

    def _look(self) -> tuple[torch.Tensor, str, tuple[Part, ...]]:
        value = self.call.value()
        if not isinstance(value, torch.Tensor):
            raise LayoutError(f"it is a {type(value).__name__}, and only a tensor has parts")
        local, placements = local_part(value)
        dims = dims_text(self.call.dims, placements)
        return local, placements, parts_of(dims, local.shape, mesh=current_mesh())


class PartCall(Call):
    """A part of what stands at a tap, as a tap of its own."""

    __slots__ = ("_number", "_of", "_part", "_placements", "_whole")

    def __init__(self, of: _Whole, number: int, name: str) -> None:
        call = of.call
        about = (name, *call.about[1:])
        super().__init__(
            name, call.given, call.dims, call.extras, call.grad, call.tags, about, call._site,
            call.forward,
        )  # fmt: skip
        self._of: _Whole | None = of
        self._number = number
        self._whole = call.shown
        self._part: Part | None = None
        self._placements = ""

    def value(self) -> torch.Tensor:
        """Return the view of the part; from here on `dims` are the part's.

        Raises:
            LayoutError: the dims do not fit the tensor.
        """
        if self._value is UNKNOWN and self._of is not None:
            local, self._placements, parts = self._of.look()
            self._part = parts[self._number]
            self.dims = self._part.dims
            self._value = self._view(local)
        return self._value  # type: ignore[no-any-return]

    def whole(self) -> Any:
        """See `Call`."""
        assert self._of is not None
        return self._of.call.value()

    def within(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `Call`.

        Raises:
            LayoutError: a DTensor's gradient that is placed otherwise than its value.
        """
        local, placements = local_part(gradient)
        if placements != self._placements:
            raise LayoutError(
                f"its gradient is a {placements or 'plain tensor'}, and it "
                f"{self._placements or 'none'}, so that its parts are not known",
                "tap its parts one by one",
            )
        return self._view(local)

    def _view(self, local: torch.Tensor) -> torch.Tensor:
        assert self._part is not None
        with torch.no_grad():
            return self._part.view(local)

    def place(self, look: Callable[[], Place | None]) -> Place | None:
        """See `Call`."""
        return super().place(look) if self._of is None else self._of.call.place(look)

    def forget(self) -> None:
        """See `Call`."""
        super().forget()
        self._of = None

    @property
    def shown(self) -> str:
        """See `Call`."""
        return f"{super().shown} of {self._whole}"


def calls_of(call: Call) -> list[Call]:
    """Return a call for each part of a tap whose dims have parts.

    Raises:
        LayoutError: the dims cannot be read.
    """
    of = _Whole(call)
    return [PartCall(of, number, name) for number, name in enumerate(names_of(call.dims))]
