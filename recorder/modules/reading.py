"""The hooks that read a model's calls, and let the ids that come of it hold while it runs.

1. `ReadModel` reads a call, which becomes a `Run` whose ids hold until `after` hears of its end. A
   model inside another that is given the very same is part of that one's run.
2. `Head` narrows the ids to what the model's head is given; `before_logits` has those of a server's
   last tokens hold once more, where their logits are made after the call.
3. `Within` sees a forward that the job calls by hand, of which the model's own hooks do not hear.

Nothing of it acts inside a backward: what is repeated there has the ids of its first forward. Nor
where a CUDA graph is captured, which reading anything would spoil.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..bits import plainly
from ..errors import is_from_the_job
from ..systems import choose, missed
from ..systems.calls import Arguments, NoRows, arguments, plainly_made
from ..systems.heads import NOTHING
from ..systems.servers import LAST
from ..taps import sessions
from ..taps.checkpoints import is_in_backward
from ..taps.rows import Ids
from . import runs
from .attached import Attached
from .hooks import Turns, innermost, is_traced
from .runs import Run
from .tree import every

log = logging.getLogger(__name__)
_NAMES = ("input_ids", "attention_mask", "past_key_values", "cache", "positions")


class Follower(Protocol):
    """Who follows rows.

    Attributes:
        models: the classes of models that were called, and whose calls are read.
        is_ended: whether it follows no more.
    """

    models: dict[str, None]
    is_ended: bool

    def by_function(self, module: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Ids, ...]:
        """Return the ids that a function gives for a call."""

    def tell(self, label: str, reason: str) -> None:
        """Say once why a model's rows have no ids."""


class ReadModel:
    """A model whose calls are read.

    Attributes:
        module: the model.
        system: whose it is; "" where a function reads it.
    """

    def __init__(self, follower: Follower, module: Any, system: str) -> None:
        self.module, self.system = weakref.ref(module), system
        self._follower = follower
        self._in: dict[int, tuple[weakref.ref[Any], bool]] = {}

    def attach(self, found: Attached) -> None:
        """Hook it."""
        module = self.module()
        if module is None:
            return
        found.around(module, self.before, after)
        head = choose.head_of(module) if self.system == "transformers" else None
        if head is not None and head is not module:
            found.around(head, Head(self.module).before, None)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """Read a call as it begins."""
        if is_in_backward() or is_traced():
            return
        if not sessions.active:
            missed.note()
            return
        if _is_captured():  # to read anything would spoil the graph
            missed.note()
            Run(module, (), (), self._follower).begin()
            return
        run, call = runs.current(), arguments(module, args, kwargs)
        given = _given(call, args)
        if run is not None and run.module() is module and run.is_given(given, self):
            run.holders += 1  # another session's hook has begun it
            run.readers.append(self)
        elif self.system:
            with plainly():
                self.read(module, call, given)
        elif runs.around(self._is_in) is None:
            self.ask(module, args, kwargs, given)

    def ask(
        self,
        module: Any,
        args: tuple[Any, ...],
        kwargs: Any,
        given: tuple[Any, ...],
        by_hand: bool = False,
    ) -> None:
        """Make a run of a call that a function reads."""
        self._follower.models[type(module).__name__] = None
        ids = self._follower.by_function(module, args, kwargs)
        run = Run(module, ids, given, self._follower, stays=True, by_hand=by_hand)
        run.readers.append(self)
        run.begin()

    def read(
        self, module: Any, call: Arguments, given: tuple[Any, ...], by_hand: bool = False
    ) -> None:
        """Make a run of a call, unless it is part of the one that runs."""
        outer = runs.around(self._is_in)
        self._follower.models[type(module).__name__] = None
        if outer is not None and (outer.is_given(given) or _is_embedded(outer, call)):
            inner = Run(module, outer.ids, given, self._follower, by_hand=by_hand)
            inner.shape, inner.kept, inner.after = outer.shape, outer.kept, outer.after
            inner.ended = outer.ended if outer.by_hand else None
            inner.readers.append(self)
            inner.begin()
            return
        run = Run(module, (), given, self._follower, by_hand=by_hand)
        run.readers.append(self)
        try:
            begun = choose.reader(self.system)(module, call, self._tell)
            run.ids = Ids.given({dims: plainly_made(of) for dims, of in begun.rows.items()})
            run.shape, run.kept, run.ended = begun.shape, begun.kept, begun.ended
            run.after = tuple(one for one in run.ids if one.names == (LAST,))
        except NoRows as err:
            if not err.is_quiet and outer is None:
                self._tell(str(err))
        except Exception as err:
            if is_from_the_job(err):
                raise
            log.debug("at a call", exc_info=True)
            missed.note()
            self._tell(f"{type(err).__name__}: {err}")
        run.begin()

    def _tell(self, reason: str) -> None:
        module = self.module()
        self._follower.tell("a model" if module is None else type(module).__name__, reason)

    def _is_in(self, model: Any) -> bool:
        """Whether it is one of the modules that a model holds, and not that itself."""
        known = self._in.get(id(model))
        if known is None or known[0]() is not model:
            module = self.module()
            is_in = module is not model and any(one is module for one in every(model))
            known = self._in[id(model)] = weakref.ref(model), is_in
        return known[1]


def _is_captured() -> bool:
    """Whether a CUDA graph is being captured here."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _given(call: Arguments, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what tells a call from others: its tokens, and what says how they lie."""
    if "input_ids" in call:
        return tuple(map(call.get, _NAMES))
    return (*args, *call.values())


def _is_embedded(outer: Run, call: Arguments) -> bool:
    """Whether a call is given embeddings of what the model around it is given."""
    embeddings = call.get("inputs_embeds")
    return (
        "input_ids" not in call
        and isinstance(embeddings, torch.Tensor)
        and outer.shape == tuple(embeddings.shape[:-1])
    )


def after(module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
    """Hear that a call has ended."""
    if is_in_backward() or is_traced():
        return
    run = runs.current()
    while run is not None and run.module() is not module:
        run = run.outer
    if run is not None and not run.by_hand:
        with plainly():
            run.end(output)


class Head:
    """What a model's head gets: of its last tokens only, where the call says so."""

    def __init__(self, model: weakref.ref[Any]) -> None:
        self._model = model

    def before(self, module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """Let the ids of what it gets hold from here to the end of the model's run."""
        run = runs.current()
        while run is not None and run.module() is not self._model():
            run = run.outer
        if run is None or run.kept is None or is_in_backward():
            return
        kept, run.kept = run.kept, None
        run.ids = () if kept is NOTHING else (Ids(run.ids[0].names, plainly_made(kept)),)


def before_logits(module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
    """Let the ids of the latest step hold once more, where its logits are made after it."""
    run = runs.latest()
    if run is None or run.is_running or is_in_backward():
        return
    ids, run.after = run.after, ()
    if ids:
        Run(module, ids, (), run.follower).begin()


class Within:
    """Sees that a model's forward is called by hand, as a module in it is called."""

    def __init__(self, models: list[ReadModel]) -> None:
        self._models = models
        self._turns = Turns()

    def before(self, module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """Read the call of the forward around, once, from where it runs."""
        if is_in_backward() or is_traced() or not sessions.active or _is_captured():
            return
        alive = [(one, there) for one in self._models if (there := one.module()) is not None]
        at = {id(there): (one.module, one) for one, there in alive}
        found = innermost(at, sys._getframe(1))
        if found is None:
            return
        model, frame = found
        above = frame.f_back
        is_called = above is not None and above.f_code.co_name in ("_call_impl", "inner")
        if is_called or self._turns.next(frame, 1) != 0:
            return
        held: Any = model.module()
        if held is None:
            return
        run = runs.current()
        if run is not None and run.by_hand and run.module() is held:
            run.holders = 0  # it ended, and is called again
        kwargs = _locals_of(frame)
        call = arguments(held, (), kwargs)
        given = _given(call, ())
        with plainly():
            if model.system:
                model.read(held, call, given, by_hand=True)
            else:
                model.ask(held, (), kwargs, given, by_hand=True)


def _locals_of(frame: Any) -> Mapping[str, Any]:
    """Return what a function was called with, by name, as far as it has not changed that."""
    code, held = frame.f_code, frame.f_locals
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    found = {name: held[name] for name in names if name in held}
    if code.co_flags & 0x08:  # it takes more by name
        rest = code.co_varnames[
            code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)
        ]
        found.update(held.get(rest, {}))
    return found
