"""Hear of a tensor's gradient, for each tap of it, in as many parts as it comes in.

An activation belongs to one graph, so each tap of it gets its own hook. A parameter outlives its
graphs: which backward a gradient comes from cannot be told, so the taps of one name wait in line,
first in, first out, and whoever makes several wait at a time is told so.

Two backwards of one tensor (an auxiliary loss, a loss a micro-batch) bring its gradient in parts,
none of which is the gradient: each is told its number.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

Callback = Callable[[torch.Tensor, int], "torch.Tensor | None"]

_MOST_WAITING = 4096
SEVERAL = (
    "several taps of one parameter wait for a gradient and get them first in, first out; "
    "tap it once a backward, or tap activations, where each backward finds its own"
)
NEVER = (
    "its gradient never came in the step of the tap, and is left out; "
    "tap parameters with grad=True only where backward() follows"
)
RETURNED = (
    "its gradient never came: in a compiled program it is that of what tap returns; go on with "
    "that, as in h = tap('h', h, grad=True)"
)
UNHEARD = (
    "in a compiled program a gradient is that of what tap returns, which has none under no_grad; "
    "tap it outside of no_grad()"
)


class _Line:
    """The taps of one parameter and name that wait for a gradient, and the last that got one."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callback, Callable[[str], None]]] = deque()
        self.latest: Callback | None = None
        self.parts = 0
        self.hook: Any = None

    def arrived(self, grad: torch.Tensor) -> torch.Tensor | None:
        if self.waiting:
            self.latest, tell = self.waiting.popleft()
            self.parts = 0
            if self.waiting:
                tell(SEVERAL)
        if self.latest is None:
            return None
        self.parts += 1
        return self.latest(grad, self.parts - 1)

    def remove(self) -> None:
        self.latest = None
        if self.hook is not None:
            self.hook.remove()
            self.hook = None


class Heard:
    """One firing of a compiled program's tap, whose gradient the program brings itself.

    Attributes:
        callbacks: those of the sessions that want it.
        parts: in how many backwards it came.
        is_unheard: whether it cannot come, since the tap is where gradients are off.
    """

    arrived = 0  # of all of them, how many came

    def __init__(self) -> None:
        self.callbacks: list[Callback] = []
        self.parts = 0
        self.is_unheard = False
        self._before = Heard.arrived

    @property
    def is_due(self) -> bool:
        """Whether there was a backward since the tap, as far as such gradients tell."""
        return Heard.arrived > self._before

    def replaced(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient that takes the place of one."""
        number, self.parts = self.parts, self.parts + 1
        Heard.arrived += 1
        for callback in self.callbacks:
            found = callback(gradient, number)
            gradient = gradient if found is None else found
        return gradient


class GradientTaps:
    """Registers gradient hooks for one session."""

    def __init__(self) -> None:
        # By identity: tensors compare by their elements. (torch.utils.weak would bring half of
        # torch's compiler into a job that needs none of it.)
        self._lines: dict[int, tuple[weakref.ref[torch.Tensor], dict[str, _Line]]] = {}
        self._compiled: list[tuple[Heard, Callable[[str], None]]] = []
        self._compiled_before: list[tuple[Heard, Callable[[str], None]]] = []

    def watch(
        self, tensor: torch.Tensor, name: str, callback: Callback, tell: Callable[[str], None]
    ) -> None:
        """Call `callback` with the tensor's gradient; what it returns replaces it.

        Args:
            tensor: the tapped tensor; one that needs no gradient gets none, and nothing is called.
            name: the tap's name.
            callback: called for each backward that reaches the tensor, with the number of the part,
                from 0.
            tell: called with a clause where the gradient cannot be told apart, or never came.
        """
        if not tensor.requires_grad:
            return
        if not tensor.is_leaf:
            tensor.register_hook(_counting(callback))
        elif torch.is_grad_enabled():  # else no backward follows, as in an evaluation
            line = self._lines_of(tensor).setdefault(name, _Line())
            line.waiting.append((callback, tell))
            if line.hook is None:
                line.hook = tensor.register_hook(line.arrived)

    def watch_compiled(self, heard: Heard, callback: Callback, tell: Callable[[str], None]) -> None:
        """As `watch`, of a tap in a compiled program."""
        if heard.is_unheard:
            tell(UNHEARD)
            return
        heard.callbacks.append(callback)
        self._compiled.append((heard, tell))

    def _end_compiled(self) -> None:
        # A program may end several steps before its backward.
        waiting = [one for one in self._compiled_before if not (one[0].parts or one[0].is_due)]
        self._tell([one for one in self._compiled_before if one[0].is_due])
        self._compiled_before = [*waiting[-_MOST_WAITING:], *self._compiled]
        self._compiled = []

    def _tell(self, compiled: list[tuple[Heard, Callable[[str], None]]]) -> None:
        for heard, tell in compiled:
            if not heard.parts:
                tell(RETURNED)

    def next_step(self) -> None:
        """Let no tap wait for a gradient of the next step."""
        self._end_compiled()
        for _, lines in list(self._lines.values()):
            for line in lines.values():
                for _, tell in line.waiting:
                    tell(NEVER)
                line.waiting.clear()
                line.remove()

    def close(self) -> None:
        """Let go of the parameters."""
        self._tell([*self._compiled_before, *self._compiled])
        for _, lines in list(self._lines.values()):
            for line in lines.values():
                line.waiting.clear()
                line.remove()

    def _lines_of(self, tensor: torch.Tensor) -> dict[str, _Line]:
        key = id(tensor)
        found = self._lines.get(key)
        if found is None or found[0]() is not tensor:
            gone = weakref.ref(tensor, lambda _: self._lines.pop(key, None))
            found = self._lines[key] = (gone, {})
        return found[1]


def _counting(callback: Callback) -> Callable[[torch.Tensor], torch.Tensor | None]:
    numbers = itertools.count()

    def hook(grad: torch.Tensor) -> torch.Tensor | None:
        return callback(grad, next(numbers))

    return hook
