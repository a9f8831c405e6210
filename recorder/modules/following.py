"""Say which token each row is as a model is called: `--rows` of a session, at the models it finds.

`Following.attach` hooks the models below a root whose calls can be read (`choose.models_in`), their
heads, and what makes a server's logits. What the hooks do is in `reading`. A call that says nothing
has no ids, which is said once.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from ..diagnostics import say
from ..errors import UsageError
from ..imported import imported
from ..mailbox import write_report
from ..systems import choose
from ..taps.rows import Ids
from .attached import Attached
from .hooks import innermost
from .reading import ReadModel, Within, after, before_logits

Function = Callable[..., Any]
_MOST_TOLD = 20
_active: set[Following] = set()
"""Those that have hooks somewhere."""


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
        seen: dict[int, ReadModel] = {}
        for one, its_system in models:
            if id(one) not in seen:
                seen[id(one)] = ReadModel(self, one, its_system)
        if not seen:
            return False
        _active.add(self)
        for model in seen.values():
            model.attach(found)
        if any(model.system in ("vllm", "sglang") for model in seen.values()):
            for one in choose.logits_in(modules):
                found.around(one, before_logits, after)
        outer = [model for key, model in seen.items() if key != id(called)]
        if called is not None and called is not modules[""] and outer:
            # A job that calls the model's forward itself: no hook of the model hears of that.
            found.around(called, Within(outer).before, None)
        return True

    def end(self) -> None:
        """Leave torch and the systems as they were, once nobody follows rows."""
        self.is_ended = True
        if self in _active:
            _active.remove(self)
            if not _active:
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
        about = re.sub(r"\d+", "#", f"{label}: {reason}")  # of each step another number
        if about not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(about)
            say(f"rows of {label} are not told apart: {reason}")
