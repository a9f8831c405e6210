"""What could be tapped in a program: each module of its models, as they are called.

`graft taps` runs a program with `GRAFT_SURVEY` set: every module of every model gets a hook, and a
table that is asked for fires its taps, which are noted and go nowhere else.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..filters import Filter
from ..job import Job
from ..mailbox import SURVEY, SurveyedModule, SurveyedTensor, write_report
from ..taps import sessions
from ..taps.call import Call as Tap
from .bindings import ROOT
from .hooks import Hook
from .members import Call
from .tree import is_identity, named

log = logging.getLogger(__name__)
_MOST_TENSORS = 8


class Survey:
    """The modules of this process, and the session that sees what a table taps of them."""

    grafts = False
    order = 0
    is_unsettled = False
    folders: tuple[Path | None, ...] = ()
    overwrites: Job | None = None

    def __init__(self) -> None:
        self.ignored: set[Any] = set()
        self._modules: dict[int, list[SurveyedModule]] = {}
        self._found: list[SurveyedModule] = []
        self._roots = 0
        self._is_closed = False

    def on_root(self, root: torch.nn.Module, called: Any) -> None:
        """Watch every module of a root."""
        names = named(root)
        label = type(names[""]).__name__
        number, self._roots = self._roots, self._roots + 1
        for name, module in names.items():
            known = self._modules.setdefault(id(module), [])
            if any(one["name"] == name for one in known):
                continue
            one: SurveyedModule = {
                "model": label,
                "root": number,
                "name": name,
                "class": type(module).__name__,
                "calls": 0,
                "input": [],
                "output": [],
                "taps": [],
                "is_identity": is_identity(module),
            }
            known.append(one)
            self._found.append(one)
            if len(known) == 1:
                hook = _Hook(module, known)
                with suppress(RuntimeError):  # TorchScript's modules take none
                    module.register_forward_hook(hook, with_kwargs=True)

    def on_tap(self, call: Tap) -> None:
        """Note a tap that a table makes, at its module."""
        module = call.site.partition(" (")[0]
        name = "" if module == "the root" else module
        named_so = [one for one in self._found if one["name"] == name]
        number = call.tags.get(ROOT, 0)
        one = named_so[number if number < len(named_so) else 0] if named_so else None
        text = " ".join([call.name, *(f"{tag}={value}" for tag, value in call.tags.items())])
        if one is not None and text not in one["taps"]:
            one["taps"].append(text)

    def on_switch(self, filter: Filter | None, missed: bool) -> None:
        """Nobody switches it: it has no folder."""

    def took(self, sequence: int) -> None:
        """Nobody switches it."""

    def on_step(self) -> None:
        """An iteration ends, which is nothing here."""

    def lost(self, call: Tap, reason: str) -> None:
        """A tap that could not be noted is left out."""

    def close(self) -> None:
        """Report; called again at exit."""
        if self._is_closed:
            return
        self._is_closed = True
        sessions.deactivate(self)
        seen = [one for one in self._found if one["calls"] or one["name"] == ""]
        never = len(self._found) - len(seen)
        write_report({"session": SURVEY, "pid": os.getpid(), "modules": seen, "never": never})


class _Hook(Hook):
    """What torch calls after a module's forward."""

    def __init__(self, module: torch.nn.Module, known: list[SurveyedModule]) -> None:
        super().__init__(module, (), ())
        self._known = known

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: Any = None, output: Any = None
    ) -> None:
        """Note a call of the module."""
        if self.module() is not module:
            return
        for one in self._known:
            one["calls"] += 1
        if self._known[0]["calls"] == 1:
            call = Call(module, args, kwargs or {}, output)
            try:
                for one in self._known:
                    one["input"] = _described(call, "input")
                    one["output"] = _described(call, "output")
            except Exception:  # of containers of the job's own
                log.debug("at a module", exc_info=True)


def _described(call: Call, side: str) -> list[SurveyedTensor]:
    found = list(call.all(side).items())
    return [
        {
            "place": ".".join((side, *members)),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        for members, tensor in found[:_MOST_TENSORS]
    ]


def begin_survey() -> Survey:
    """Return a survey that listens until the process ends."""
    survey = Survey()
    sessions.activate(survey)
    sessions.close_at_exit(survey)
    return survey
