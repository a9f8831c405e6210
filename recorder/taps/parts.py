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
from ..layouts.parts import names_of, parts_of
from ..mesh import Mesh, current_mesh
from .call import UNKNOWN, Call
from .checkpoints import Place


class _Whole:
    """What the parts of one tap have in common: its tensor, looked at once."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._found: tuple[torch.Tensor, Mesh | None] | None = None
        self._error: Exception | None = None

    def look(self) -> tuple[torch.Tensor, Mesh | None]:
        """Return the tensor, and where the rank stands.

        Raises:
            LayoutError: it is no tensor.
        """
        if self._error is not None:
            raise self._error
        if self._found is None:
            try:
                value = self.call.value()
            except Exception as err:
                self._error = err
                raise
            if not isinstance(value, torch.Tensor):
                raise LayoutError(f"it is a {type(value).__name__}, and only a tensor has parts")
            self._found = value, current_mesh()
        return self._found


class PartCall(Call):
    """A part of what stands at a tap, as a tap of its own.

    Its `dims` are those of what was looked at last: of the value, or of a gradient, which a DTensor
    may have placed otherwise.
    """

    __slots__ = ("_declared", "_mesh", "_number", "_of", "_whole")

    def __init__(self, of: _Whole, number: int, name: str) -> None:
        call = of.call
        about = (name, *call.about[1:])
        super().__init__(
            name, call.given, call.dims, call.extras, call.grad, call.tags, about, call._site,
            call.forward,
        )  # fmt: skip
        self.rows, self.inside = call.rows, call.inside
        self.heard, self.run, self.step = call.heard, call.run, call.step
        self.trouble, self.own_rows = call.trouble, call.own_rows
        self._of: _Whole | None = of
        self._number = number
        self._whole = call.shown
        self._declared = call.dims
        self._mesh: Mesh | None = None

    def value(self) -> torch.Tensor:
        """Return the view of the part.

        Raises:
            LayoutError: the dims do not fit the tensor.
        """
        if self._value is UNKNOWN and self._of is not None:
            whole, self._mesh = self._of.look()
            self._value = self.within(whole)
        return self._value  # type: ignore[no-any-return]

    def whole(self) -> Any:
        """See `Call`."""
        assert self._of is not None
        return self._of.call.value()

    def within(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `Call`.

        Raises:
            LayoutError: the dims do not fit it.
        """
        local, placements = local_part(gradient)
        dims = dims_text(self._declared, placements)
        part = parts_of(dims, local.shape, mesh=self._mesh)[self._number]
        self.dims = part.dims
        with torch.no_grad():
            return part.view(local)

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
