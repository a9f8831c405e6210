"""The hooks that make modules taps: a row of a table at a module is a `Binding`, and fires there.

1. A module with bindings gets one hook before its forward and one after, as its rows need.
2. Of a module that stands in several places, `Places` says which of them a call comes from.
3. A hook takes each row's value out of the call, and fires the tap as a hand-written one would.
4. What does not fit is said once, and left alone: the job goes on.

A hook acts on its own module alone: a deep copy of a model has hooks that do nothing.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import FrameType
from typing import Any, TypeVar

import torch

from ..bits import never_compiled
from ..diagnostics import say
from ..errors import ReplayError, is_from_the_job
from ..tags import TagValue
from ..taps import sessions
from ..taps.tap import fire, outside_dynamo
from .members import Absent, Call
from .table import Row

log = logging.getLogger(__name__)
ROOT = "root"
"""The tag that tells a second model in a process, and those after it, from the first."""
_DEEPEST = 80  # frames from a call to the module that it is made for

T = TypeVar("T")


def innermost(
    at: Mapping[int, tuple[weakref.ref[Any], T]], frame: FrameType | None
) -> tuple[T, FrameType] | None:
    """Return what is held of the innermost module on the stack that anything is held of.

    With it the frame that it is at.

    Args:
        at: a module's id -> it, and what is held of it.
        frame: where to begin.
    """
    for _ in range(_DEEPEST):
        if frame is None:
            return None
        code = frame.f_code
        # Of no other frames: to look at a frame's locals lets those of older Pythons keep what
        # they are until it ends.
        if code.co_argcount and code.co_varnames[0] == "self":
            module = frame.f_locals.get("self")
            found = at.get(id(module))
            if found is not None and found[0]() is module:
                return found[1], frame
        frame = frame.f_back
    return None


class Places:
    """Where a module that stands in several places is called: servers share one rope by all layers.

    Each place is told by the modules that hold it there and nowhere else. What no module tells
    apart, such as a layer that stands in a list twice, counts as its first place, called again.

    Args:
        names: the module's qualified names.
        modules: all modules of the root by name.
        base: the name of the model that it is called in, "" for the root.
    """

    def __init__(self, names: Sequence[str], modules: Mapping[str, Any], base: str) -> None:
        self._base = f"{base}." if base else ""
        above = {
            name: {id(modules[one]): modules[one] for one in _above(name) if one in modules}
            for name in names
        }
        self._at: dict[int, tuple[weakref.ref[Any], str]] = {}
        for name, holders in above.items():
            for key, holder in holders.items():
                sharing = [one for one in names if key in above[one]]
                # A call that comes from a module above several places, and from none between, is
                # that of the place right below it.
                first = min(sharing, key=lambda one: len(above[one]))
                self._at[key] = weakref.ref(holder), first if len(sharing) > 1 else name

    def here(self, frame: FrameType | None) -> str | None:
        """Return the place that a call comes from, by its name in the model; None for another's."""
        found = innermost(self._at, frame)
        if found is None or not found[0].startswith(self._base):
            return None
        return found[0][len(self._base) :]


def _above(name: str) -> list[str]:
    """Return the names of the modules that hold one, the innermost first, the root as ""."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


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
        "dims",
        "fired",
        "misfit",
        "model",
        "module",
        "names",
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
            if not self.row.taps and not self.row.dims and not place.members:
                self._fire_each(call)  # the path names the tap, and so it can the members
            elif not err.is_quiet:
                self._tell(str(err))
            elif not self.misfit:
                self.misfit = str(err)
            return
        dims = self.dims[number] if len(self.dims) > 1 else "".join(self.dims[:1])
        self._fire(self.names[number], value, dims)

    def _fire(self, name: str, value: Any, dims: str) -> None:
        self.fired += 1
        place = self.row.path.place
        fire(
            name, value, dims or None, self.row.extras, self.row.grad or place.is_gradient,
            self.tags, self.site, forward=not place.is_gradient,
        )  # fmt: skip

    def _fire_each(self, call: Call) -> None:
        side = self.row.path.place.side
        found = call.all(side)
        if not found and not self.misfit:
            self.misfit = f"its {side} has no tensor"
        for members, tensor in found.items():
            ending = f":{side}.{'.'.join(members)}"
            self._fire(self.names[0].removesuffix(f":{side}") + ending, tensor, "")

    def _tell(self, reason: str) -> None:
        if not self.misfit:
            self.misfit = reason
            if sessions.active:
                say(f"{self.row.where}: {self.module or 'the root'} is not tapped: {reason}")


class Turns:
    """How often a function was called in one run of a module, in each thread.

    A run begins with the module's call, or, where its forward is called by hand, in another frame.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def begin(self) -> None:
        """Note that a run begins."""
        self._local.run = None

    def next(self, frame: FrameType, most: int) -> int:
        """Return the number of a call, from 0.

        Args:
            frame: that of the module's forward from which it comes.
            most: how many there are in a run.
        """
        run, turn, place = getattr(self._local, "run", None), 0, frame.f_lasti
        # A frame that begins anew may have the place in memory of the one before. In one run calls
        # come from further and further down, or from one place in a loop.
        if run is not None and run[0] == id(frame):
            is_further = place > run[2] or (place == run[2] and run[1] + 1 < most)
            turn = run[1] + 1 if is_further else 0
        self._local.run = (id(frame), turn, place)
        return turn


class Shared:
    """Which of several models that hold a module runs: a call of it is that model's alone.

    Args:
        model: the model that a hook is for.
        rivals: all models that have taps at the module, the first found first; it grows.
    """

    def __init__(self, model: Any, rivals: list[weakref.ref[Any]]) -> None:
        self._model = weakref.ref(model)
        self._rivals = rivals

    def is_running(self, frame: FrameType | None) -> bool:
        """Whether the innermost of them on the stack is this hook's; of none, the first counts."""
        if len(self._rivals) < 2:
            return True
        alive = [(ref, model) for ref in self._rivals if (model := ref()) is not None]
        found = innermost({id(model): (ref, model) for ref, model in alive}, frame)
        running = found[0] if found is not None else alive[0][1]
        return running is self._model()


class Hook:
    """What torch calls around a module's forward.

    Attributes:
        also: called before the taps, whether or not anything records, as a hook is.
    """

    __name__ = "graft_tap"  # torch.jit asks a hook for it

    def __init__(
        self,
        module: Any,
        bindings: Sequence[Binding],
        turns: Sequence[Turns],
        places: Places | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.is_detached = False
        self.shared = shared
        self.module = weakref.ref(module)
        self.bindings = bindings
        self.turns = turns
        self.places = places
        self.also: Callable[..., None] | None = None

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: Any = None, output: Any = None
    ) -> None:
        """Fire the taps of a call."""
        if self.is_detached:  # torch may have listed it before
            return
        if sessions.active or self.also is not None:
            _called(self, module, args, kwargs, output)

    def __reduce__(self) -> Any:
        # A model that is copied or saved takes none of this along, and a hook cannot be left out:
        # it becomes a call that takes anything and does nothing, wherever it is loaded.
        return getattr, (nullcontext(), "__exit__")


def is_traced() -> bool:
    """Whether torch.jit traces what runs: it would see what a tap does, and keep it."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call, unused-ignore]


def is_dead(hook: Any) -> bool:
    """Whether something is what a hook becomes in a copy of its model."""
    return getattr(hook, "__func__", None) is nullcontext.__exit__


def _called(*call: Any) -> None:
    outside_dynamo(_fire_all)(*call)


never_compiled(_called)  # of which the compiler does not ask an object's `__call__`


def _fire_all(
    hook: Hook, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> None:
    """Fire the taps of a call of a hook's own module."""
    if hook.module() is not module:
        return
    if hook.also is not None:
        hook.also(module, args, kwargs, output)
    if not sessions.active:
        return
    if is_traced():
        for binding in hook.bindings:
            binding.misfit = binding.misfit or "it ran while torch.jit traced it, which sees all"
        return
    for turns in hook.turns:
        turns.begin()
    if hook.shared is not None and not hook.shared.is_running(sys._getframe(1)):
        return
    call = Call(module, args, kwargs, output)
    here = None if hook.places is None else hook.places.here(sys._getframe(1))
    for binding in hook.bindings:
        if hook.places is None or binding.module == here:
            guarded(binding, call)


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
