"""Say which token each row is as a model is called: `--rows` of a session, at the models it finds.

1. `Following.attach` hooks the models below a root whose calls can be read (`choose.models_in`),
   their heads, and what makes a server's logits.
2. `_Model` reads a call, which becomes a `Run` whose ids hold until `_after` hears of its end. A
   model inside another that is given the very same is part of that one's run.
3. A call that says nothing has no ids, which is said once.

Nothing of it acts inside a backward: what is repeated there has the ids of its first forward.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..bits import plainly
from ..diagnostics import say
from ..errors import UsageError, is_from_the_job
from ..imported import imported
from ..mailbox import write_report
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

Function = Callable[..., Any]
_users = 0


class Following:
    """What one request wants to know of rows.

    Args:
        rows: a system, `auto`, a function's path, or a function of (module, args, kwargs).
        session: which session's environment asks for it, "" for none.

    Attributes:
        models: the classes of models that were called, and whose calls are read.
        is_ended: whether it follows no more.
    """

    def __init__(self, rows: str | Function, session: str = "") -> None:
        global _users
        _users += 1
        self.models: dict[str, None] = {}
        self._rows, self._session = rows, session
        self._function: Function | None = None if isinstance(rows, str) else rows
        self._told: set[str] = set()
        self.is_ended = self._is_failed = False

    @property
    def has_function(self) -> bool:
        """Whether a function says which row is which."""
        return self._rows not in (choose.AUTO, *choose.SYSTEMS)

    def load(self) -> None:
        """Import the function, if there is one.

        Raises:
            UsageError: it cannot be imported, or is none.
        """
        if not self.has_function or self._function is not None:
            return
        found = imported(str(self._rows), "rows")
        if not callable(found):
            raise UsageError(f"rows {self._rows!r} is no function of (module, args, kwargs)")
        self._function = found

    def attach(self, found: Attached, modules: Mapping[str, Any], called: Any) -> bool:
        """Follow the models of a root; return whether there is any.

        Args:
            found: takes the hooks away again.
            modules: the root's by name, itself as "".
            called: the module that is called first, None where none is.
        """
        system = choose.AUTO if self.has_function else str(self._rows)
        models = choose.models_in(modules, system)
        if self.has_function:
            models = [(one, "") for one, _ in models]
            others = [modules[""], found.base()]
            models += [(one, "") for one in others if one is not None]
            at = {id(one): (weakref.ref(one), None) for one, _ in models}
            if called is not None and innermost(at, sys._getframe(1)) is None:
                models.append((called, ""))  # what holds it, is not called
        seen: dict[int, _Model] = {}
        for one, its_system in models:
            if id(one) not in seen:
                seen[id(one)] = _Model(self, one, its_system)
        if not seen:
            return False
        for model in seen.values():
            model.attach(found)
        if any(model.system in ("vllm", "sglang") for model in seen.values()):
            for one in choose.logits_in(modules):
                found.around(one, _before_logits, _after)
        outer = [model for key, model in seen.items() if key != id(called)]
        if called is not None and called is not modules[""] and outer:
            # A job that calls the model's forward itself: no hook of the model hears of that.
            found.around(called, _Within(outer).before, None)
        return True

    def end(self) -> None:
        """Leave torch and the systems as they were, once nobody follows rows."""
        global _users
        if not self.is_ended:
            self.is_ended = True
            _users -= 1
            if not _users:
                choose.leave()

    def by_function(self, module: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Ids, ...]:
        """Return the ids that the function gives for a call."""
        if self._is_failed:
            return ()
        try:
            self.load()
        except UsageError as err:
            self._is_failed = True
            say(f"no row is told from another: {err}")
            if self._session:
                write_report({"session": self._session, "state": "refused", "reason": str(err)})
            return ()
        assert self._function is not None  # it is loaded
        try:
            given = self._function(module, args, dict(kwargs or {}))
            return Ids.given(given) if given else ()
        except Exception as err:  # of the job's function, whatever it is
            self.tell(type(module).__name__, f"its function raised {type(err).__name__}: {err}")
            return ()

    def tell(self, label: str, reason: str) -> None:
        """Say once why a model's rows have no ids."""
        if (key := f"{label}: {reason}") not in self._told and len(self._told) < 20:
            self._told.add(key)
            say(f"rows of {label} are not told apart: {reason}")


class _Model:
    """A model whose calls are read.

    Attributes:
        module: the model.
        system: whose it is; "" where a function reads it.
    """

    def __init__(self, following: Following, module: Any, system: str) -> None:
        self.module, self.system = weakref.ref(module), system
        self._following = following
        self._in: dict[int, tuple[weakref.ref[Any], bool]] = {}

    def attach(self, found: Attached) -> None:
        """Hook it."""
        module = self.module()
        if module is None:
            return
        found.around(module, self.before, _after)
        head = choose.head_of(module) if self.system == "transformers" else None
        if head is not None and head is not module:
            found.around(head, _Head(self.module).before, None)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """Read a call as it begins."""
        if is_in_backward() or is_traced():
            return
        if not sessions.active:
            missed.note()
            return
        run, call = runs.current(), arguments(module, args, kwargs)
        given = _given(call, args)
        if run is not None and run.module() is module and run.is_given(given):
            run.holders += 1  # another session's hook has begun it
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
        self._following.models[type(module).__name__] = None
        ids = self._following.by_function(module, args, kwargs)
        Run(module, ids, given, self._following, stays=True, by_hand=by_hand).begin()

    def read(
        self, module: Any, call: Arguments, given: tuple[Any, ...], by_hand: bool = False
    ) -> None:
        """Make a run of a call, unless it is part of the one that runs."""
        outer = runs.around(self._is_in)
        self._following.models[type(module).__name__] = None
        if outer is not None and (outer.is_given(given) or _is_embedded(outer, call)):
            inner = Run(module, outer.ids, given, self._following, by_hand=by_hand)
            inner.shape, inner.kept, inner.after = outer.shape, outer.kept, outer.after
            inner.ended = outer.ended if outer.by_hand else None
            inner.begin()
            return
        run = Run(module, (), given, self._following, by_hand=by_hand)
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
        self._following.tell("a model" if module is None else type(module).__name__, reason)

    def _is_in(self, model: Any) -> bool:
        """Whether it is one of the modules that a model holds, and not that itself."""
        known = self._in.get(id(model))
        if known is None or known[0]() is not model:
            module = self.module()
            is_in = module is not model and any(one is module for one in every(model))
            known = self._in[id(model)] = weakref.ref(model), is_in
        return known[1]


_NAMES = ("input_ids", "attention_mask", "past_key_values", "cache", "positions")


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


def _after(module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
    """Hear that a call has ended."""
    if is_in_backward() or is_traced():
        return
    run = runs.current()
    while run is not None and run.module() is not module:
        run = run.outer
    if run is not None and not run.by_hand:
        with plainly():
            run.end(output)


class _Head:
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


def _before_logits(module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
    """Let the ids of the latest step hold once more, where its logits are made after it."""
    run = runs.latest()
    if run is None or run.is_running or is_in_backward():
        return
    ids, run.after = run.after, ()
    if ids:
        Run(module, ids, (), run.follower).begin()


class _Within:
    """Sees that a model's forward is called by hand, as a module in it is called."""

    def __init__(self, models: list[_Model]) -> None:
        self._models = models
        self._turns = Turns()

    def before(self, module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """Read the call of the forward around, once, from where it runs."""
        if is_in_backward() or not sessions.active:
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
