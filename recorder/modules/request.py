"""What one session, or the environment, wants tapped, and what became of it in this process.

1. `Request.on_root` gives a root the taps that are wanted of it (`attached.tapped`).
2. `_Stepping` ends a step where the first model is called again.
3. `Request.report` says what the tables found and what they did not.
"""

from __future__ import annotations

import difflib
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..diagnostics import say
from ..mailbox import TAPS, ModelReport, RowReport, write_report
from ..settings import TapSettings
from ..taps.checkpoints import is_in_backward
from ..taps.tap import step
from . import table
from .attached import Attached, Rivals, tapped
from .following import Following
from .hooks import Turns, innermost
from .table import Row, Table
from .tree import every, named

_MOST_NAMES = 20_000


class _Stepping:
    """Ends a step as a model is called again."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = weakref.ref(model)
        self._is_begun = False
        self._run = Turns()

    def called(self) -> None:
        """Hear that the model is called."""
        if is_in_backward():
            return  # repeated in a backward
        if self._is_begun:
            step()
        self._is_begun = True

    def called_within(self) -> None:
        """Hear that a module of it is called, perhaps in a forward that the job calls by hand."""
        model = self.model()
        found = None if model is None else innermost(
            {id(model): (self.model, None)}, sys._getframe(1)
        )  # fmt: skip
        if found is None:
            return  # by itself, as to warm it up
        frame = found[1]
        above = frame.f_back
        is_called = above is not None and above.f_code.co_name in ("_call_impl", "inner")
        if not is_called and self._run.next(frame, 1) == 0:
            self.called()


class Request:
    """What one session, or the environment, wants tapped.

    Args:
        settings: the patterns, the table, where a step ends, and what says which row is which.
        session: which session's environment asks for it, "" for none.

    Raises:
        UsageError: a table cannot be read.
    """

    def __init__(self, settings: TapSettings, session: str = "") -> None:
        self.settings = settings
        self.patterns = tuple(Row.of_pattern(path) for path in settings.modules)
        self.tables: tuple[Table, ...] = table.load(settings.taps) if settings.taps else ()
        self.users = 1
        self.attached: dict[int, Attached] = {}
        self.others: Counter[str] = Counter()
        self.unfollowed: dict[str, None] = {}
        self._past: dict[Row, RowReport] = {}
        self._models: dict[str, None] = {}
        self._names: dict[str, None] = {}
        self._numbers: list[tuple[weakref.ref[torch.nn.Module], int]] = []
        self.is_environment_s = self.is_reported = False
        self._steps: list[Any] = []
        self._stepping: _Stepping | None = None
        self._rivals: Rivals = {}
        rows = settings.rows
        self.following = None if rows is None else Following(rows, session)

    def on_root(self, root: Any, called: Any) -> Attached | None:
        """Tap a root; None where nothing of it is wanted."""
        is_told = self._take_away(root)

        def begun(model: weakref.ref[torch.nn.Module]) -> int:
            if not found.is_told:  # not before it runs: a job may hold models that it never calls
                found.is_told = True
                self._tell(found)
            return self._number(model)

        found = tapped(root, self.patterns, self.tables, begun, self._rivals)
        found.is_told = is_told
        if len(self._names) < _MOST_NAMES:
            self._names.update(dict.fromkeys(found.names))
        is_followed = self.following is not None and self._follow(found, root, called)
        if not found.bindings:
            if not is_followed:
                self.others[found.label] += 1
            if not (is_followed or any(counts[0] for counts in found.found.values())):
                return None
        else:
            self._models[found.label] = None
        self.attached[id(root)] = found
        if self.is_environment_s:  # of a process that is killed this has to do
            write_report({"session": TAPS, "pid": os.getpid(), "taps": self.report()})
        if self.settings.step_on == "root":
            self._step_on(found, called)
        return found

    def _follow(self, found: Attached, root: Any, called: Any) -> bool:
        """Have the rows of a root's models followed; return whether it has any."""
        assert self.following is not None  # asked for
        if self.following.attach(found, named(root), called):
            return True
        if called is root or root._modules:  # not each activation that somebody has made
            self.unfollowed[found.label] = None
        return False

    def _number(self, model: weakref.ref[torch.nn.Module]) -> int:
        """Return the number of a model: how many others that are there fired a tap before it."""
        self._numbers = [(one, number) for one, number in self._numbers if one() is not None]
        for one, number in self._numbers:
            if one() is model():
                return number
        taken = {number for _, number in self._numbers}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        self._numbers.append((model, number))
        return number

    def _take_away(self, root: Any) -> bool:
        """Take the taps away that are in a root already, since it has new modules or is new.

        Returns whether something was said of any. Those of models that are gone are let go of too.
        """
        inside = {id(one) for one in every(root)}
        is_told = False
        for key, one in list(self.attached.items()):
            if key in inside or not one.is_alive:
                is_told = is_told or (one.is_alive and one.is_told)
                del self.attached[key]
                one.detach()
                self._past = _counted([one], self._past)
        return is_told

    def watch_steps(self) -> None:
        """End a step where an optimizer has, if that is wanted."""
        if self.settings.step_on != "optimizer":
            return
        from torch.optim.optimizer import register_optimizer_step_post_hook

        first: list[weakref.ref[Any]] = []

        def stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
            if not first or first[0]() is None:
                first[:] = [weakref.ref(optimizer)]
            if first[0]() is optimizer:
                step()

        self._steps.append(register_optimizer_step_post_hook(stepped))

    def detach(self) -> None:
        """Take every hook away."""
        for one in self.attached.values():
            one.detach()
        for handle in self._steps:
            handle.remove()
        self._steps = []
        if self.following is not None:
            self.following.end()

    def _step_on(self, found: Attached, called: Any) -> None:
        """End a step as the first model is called again."""
        model = found.base()
        if model is None:
            return
        if self._stepping is None or self._stepping.model() is None:
            self._stepping = _Stepping(model)
        elif all(one is not self._stepping.model() for one in every(model)):
            return  # another model's calls are the steps
        stepping = self._stepping
        model = stepping.model() or model
        found.on_call(model, stepping.called)
        if called is not None and called is not model:
            # A job that calls the model's forward itself: no hook of the model hears of that.
            found.on_call(called, stepping.called_within)

    def _tell(self, found: Attached) -> None:
        for section, fitting in found.sections if self.settings.taps == table.AUTO else ():
            if section.name != "--modules":
                rows = f"{fitting} of {len(section.rows)} rows fit"
                say(f"taps of {found.label}: {section.name}, {rows}")
        for note in found.notes:
            say(note)

    def report(self) -> ModelReport:
        """Return what was found and what was not."""
        attached = list(self.attached.values())
        if self.settings.taps == table.AUTO:  # of models that the program never called, nothing
            ran = [one for one in attached if any(b.ran for b in one.bindings)]
            attached = ran or ([] if self._past else attached)
        rows = _counted(attached, self._past)
        wanted = list(self.patterns)
        if len(self.tables) == 1 and len(self.tables[0].sections) == 1:
            wanted += self.tables[0].sections[0].rows
        for row in wanted:
            rows.setdefault(row, _report_of(row))
        for row, report in rows.items():
            if not report["found"]:
                report["closest"] = _closest(row.path.modules, list(self._names))
        return {
            "rows": list(rows.values()),
            "models": list(self._models),
            "others": sorted(self.others, key=lambda name: -self.others[name])[:8],
            "followed": list(self.following.models) if self.following is not None else [],
            "unfollowed": list(self.unfollowed)[:8],
            "is_compiled": "torch._dynamo.eval_frame" in sys.modules,
        }


def _report_of(row: Row) -> RowReport:
    return {
        "path": row.path.text,
        "where": row.where,
        "optional": row.is_optional,
        "found": 0,
        "identities": 0,
        "ran": 0,
        "fired": 0,
        "misfit": "",
        "closest": [],
    }


def _counted(attached: Iterable[Attached], so_far: Mapping[Row, RowReport]) -> dict[Row, RowReport]:
    """Return what became of each row, counted together with what was known before."""
    rows = {row: report.copy() for row, report in so_far.items()}
    for one in attached:
        for row, (found, identities) in one.found.items():
            report = rows.setdefault(row, _report_of(row))
            report["found"] += found
            report["identities"] += identities
        for row, binding in one.bound:
            report = rows[row]
            report["ran"] += bool(binding.ran)
            report["fired"] += bool(binding.fired)
            report["misfit"] = report["misfit"] or binding.misfit
    return rows


def _closest(path: str, names: Sequence[str]) -> list[str]:
    """Return the names of modules that are nearest to a path, alike ones once."""
    plain: dict[str, str] = {}
    for name in names:
        parts = ["{layer}" if part.isdigit() else part for part in name.split(".")]
        plain.setdefault(".".join(parts), name)
    close = difflib.get_close_matches(path, [name for name in plain if name], 3, cutoff=0.5)
    return [plain[name] for name in close]
