"""A row of a table at a module: the tap that it stands for, and how it went.

A `Binding` takes its value out of a call of the module, and fires the tap as a hand-written one
would. What does not fit is said once, and left alone: the job goes on.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..bits import never_compiled
from ..diagnostics import say
from ..errors import ReplayError, is_from_the_job
from ..tags import TagValue
from ..taps import sessions
from ..taps.firing import fire, outside_dynamo
from ..taps.sources import sources
from .members import Absent, Call
from .table import Row

log = logging.getLogger(__name__)
numbers = itertools.count()
"""Of bindings and of hooks, as compiled programs know them."""
ROOT = "root"
"""The tag that tells a second model in a process, and those after it, from the first."""


class Model:
    """A model that a table is taken for: the first that is called is 0, and has no tag of it.

    Args:
        begin: called as its first tap is to fire; gives it its number.
        name: its name below the root.
    """

    def __init__(self, begin: Callable[[], int], name: str) -> None:
        self.name = name
        self.bindings: list[Binding] = []
        self._begin: Callable[[], int] | None = begin

    def begin(self) -> None:
        """Give it its number, once."""
        if self._begin is None:
            return
        number, self._begin = self._begin(), None
        for one in self.bindings if number else ():
            one.tags = {**one.tags, ROOT: number}


class Binding:
    """A row at one module.

    Attributes:
        number: by which a compiled program knows it.
        row: the row.
        model: the model that the module is in.
        module: its qualified name.
        names: what its taps are called, in turn.
        dims: the layout of each, "" for none.
        tags: their tags.
        ran: how often the module, or the function in it, was called.
        fired: how often it gave a tap.
        misfit: why it did not fit at first, "" where it did.
    """

    __slots__ = (
        "__weakref__",
        "dims",
        "fired",
        "misfit",
        "model",
        "module",
        "names",
        "number",
        "ran",
        "row",
        "tags",
    )

    def __init__(
        self,
        row: Row,
        model: Model,
        module: str,
        names: tuple[str, ...],
        dims: tuple[str, ...],
        tags: Mapping[str, TagValue],
    ) -> None:
        self.row, self.model, self.module = row, model, module
        self.names, self.dims, self.tags = names, dims, tags
        self.ran = self.fired = 0
        self.misfit = ""
        self.number = str(next(numbers))  # which, unlike an integer, is constant to it
        sources[self.number] = self

    def tap_tags(self) -> Mapping[str, TagValue]:
        """Count a call that a compiled program makes, and return the tags of its tap."""
        if not self.ran:
            self.model.begin()
        self.ran += 1
        self.fired += 1
        return self.tags

    @property
    def site(self) -> str:
        """Where it stands, for messages."""
        name = f"{self.model.name}.{self.module}".strip(".")
        return f"{name or 'the root'} ({self.row.where})"

    def fire(self, call: Call, turn: int = 0) -> None:
        """Fire the tap of one call, the `turn`-th of a function; a misfit is kept as `misfit`."""
        if not self.ran:
            self.model.begin()
        self.ran += 1
        number = turn if len(self.names) > 1 else 0
        if number >= len(self.names):
            return  # a function that is called more often than the row has names
        place = self.row.path.place
        try:
            value = call.value(place)
        except Absent as err:
            if self.is_named_by_path:
                self._fire_each(call)
            else:
                self.keep_misfit(err)
            return
        dims = self.dims[number] if len(self.dims) > 1 else "".join(self.dims[:1])
        self._fire(self.names[number], value, dims)

    def fire_value(self, name: str, value: Any, dims: str) -> None:
        """Fire the tap of what no operator takes; a compiled program breaks its graph for it."""
        outside_dynamo(self._fire_beside)(name, value, dims)

    def _fire_beside(self, name: str, value: Any, dims: str) -> None:
        self.ran += 1
        if self.ran == 1:
            self.model.begin()
        self._fire(name, value, dims)

    def _fire(self, name: str, value: Any, dims: str) -> None:
        self.fired += 1
        place = self.row.path.place
        fire(
            name, value, dims or None, self.row.extras, self.row.grad or place.is_gradient,
            self.tags, self.site, forward=not place.is_gradient,
        )  # fmt: skip

    @property
    def is_named_by_path(self) -> bool:
        """Whether the path names the tap, and so it can each of several tensors."""
        return not self.row.taps and not self.row.dims and not self.row.path.place.members

    def each(self, call: Call) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors of a call, each with the name of its tap."""
        side = self.row.path.place.side
        name = self.names[0].removesuffix(f":{side}")
        found = call.all(side).items()
        return [(f"{name}:{side}.{'.'.join(members)}", tensor) for members, tensor in found]

    def keep_misfit(self, err: Absent) -> None:
        """Keep why it does not fit, and say it where that is always so."""
        if not err.is_quiet:
            self._tell(str(err))
        elif not self.misfit:
            self.misfit = str(err)

    def _fire_each(self, call: Call) -> None:
        found = self.each(call)
        if not found and not self.misfit:
            self.misfit = f"its {self.row.path.place.side} has no tensor"
        for name, tensor in found:
            self._fire(name, tensor, "")

    def _tell(self, reason: str) -> None:
        if not self.misfit:
            self.misfit = reason
            if sessions.active:
                say(f"{self.row.where}: {self.module or 'the root'} is not tapped: {reason}")


never_compiled(Binding.fire_value)


def guarded(binding: Binding, call: Call, turn: int = 0) -> None:
    """Fire a binding; an error of its own never reaches the job."""
    try:
        binding.fire(call, turn)
    except ReplayError:
        raise  # asked for: --on-error raise
    except Exception as err:
        if is_from_the_job(err):
            raise
        log.debug("at a module", exc_info=True)
        if not binding.misfit:
            binding.misfit = f"{type(err).__name__}: {err}"
            say(f"{binding.row.where}: {binding.module} is not tapped: {binding.misfit}")
