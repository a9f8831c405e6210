"""The replaying session of one rank: tap -> match -> load -> transform -> graft -> log.

1. `on_tap` asks the `Selection` whether the tap is wanted, and under which key.
2. `Replacements.make` finds the records that belong to it and makes the tensor to write.
3. `graft.overwrite` copies it over the target; a gradient is replaced instead.
4. Whatever came of it is one row of the log, each step's failure on its own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from recorder.bits import dtype_name, plainly
from recorder.capture import local_part
from recorder.diagnostics import call_site
from recorder.errors import (
    BadRows,
    GraftError,
    LayoutError,
    MissingRecord,
    ReplayError,
    ReplicasDiffer,
    TransformError,
    UsageError,
    is_from_the_job,
)
from recorder.filters import Filter
from recorder.format.listening import tell_listening
from recorder.format.schema import rank_folder
from recorder.job import Job
from recorder.mailbox import write_report
from recorder.mesh import FrozenMesh
from recorder.modules.request import Request
from recorder.modules.watch import begin, end
from recorder.paths import Path as ModulePath
from recorder.ranks import RankWatch
from recorder.recording import Recording
from recorder.session import Recorder
from recorder.tags import label
from recorder.taps import graphs
from recorder.taps.call import Call, Run
from recorder.taps.checkpoints import repeat_to_the_end
from recorder.taps.firsts import RowsOfFirsts
from recorder.taps.gradients import GradientTaps
from recorder.taps.inside import Blocks
from recorder.taps.rows import Ids, as_they_are
from recorder.taps.selection import Selected, Selection, about_note
from recorder.taps.sessions import activate, deactivate
from recorder.taps.signals import let_interrupts_through
from recorder.taps.values import classify

from . import graft, transforms, unkept
from .log import WITHOUT_EFFECT, LogRow, joined
from .match import Match, Matcher, MatchOn
from .only import Only
from .outcomes import Outcomes, named
from .parts import FEWER, MORE, ZEROS, Parts
from .rename import Rename
from .replaced import Replacement, measured
from .replacement import Replacements
from .settings import ReplaySettings
from .sharing import Sharing
from .summary import Summary, summarize
from .transforms import Transform

if TYPE_CHECKING:
    import polars as pl


class Replayer:
    """Overwrites tapped tensors with recorded ones while it is open.

    ```python
    with Replayer("runs/base", filter='name == "attn_out"', transform=fn) as replay:
        infer()
    replay.log()
    ```

    Args:
        path: the recording to replay.
        out: a folder for the replay's log; by default it is kept in memory only.
        filter: as all that follow, an option of `graft replay`: `ReplaySettings` says what each
            does. `transform` may be the function itself, or why there is none, for which every
            graft then fails.
        rank: this rank; by default as `ranks.current_rank` finds it. With `world_size`.
        world_size: the number of ranks.

    Raises:
        UsageError: an argument that cannot be used.
        TransformError: the transform cannot be imported or called.
        RecordingError: there is no recording to replay, or `out` holds a replay of this rank.
    """

    order = 1
    grafts = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        modules: str | Sequence[str | ModulePath] = (),
        taps: str | None = None,
        step_on: str = "step",
        rows: Callable[..., Any] | str | None = None,
        filter: Filter | str | None = None,
        transform: Callable[..., Any] | str | TransformError | None = None,
        only: str | None = None,
        out: str | os.PathLike[str] | None = None,
        record: Filter | str | None = None,
        match_on: str | None = None,
        rename: str | Sequence[str | Rename] = (),
        step_offset: int = 0,
        on_error: str = "skip",
        on_missing: str = "skip",
        strict: bool = False,
        check: bool = True,
        replicas: str = "error",
        metrics: bool = True,
        own_error: bool = False,
        overwrite: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.settings = ReplaySettings.given(locals())
        if self.settings.record is not None and out is None:
            raise UsageError("record needs a folder to record into; give out too")
        is_polars_new = "polars" not in sys.modules
        self.recording = Recording.open(path)
        self.out = None if out is None else Path(os.path.abspath(out))
        self._transform: Transform | TransformError | None = None
        if isinstance(transform, (Transform, TransformError)):
            self._transform = transform
        elif transform is not None:
            self._transform = (
                transforms.load(transform) if isinstance(transform, str) else Transform(transform)
            )
        self._ranks = RankWatch(rank, world_size)
        self._job = Job.from_environment()
        self._frame = self.recording.latest()
        if is_polars_new:
            let_interrupts_through()
        self._rows_of_firsts = RowsOfFirsts()
        self._selection = Selection(self.settings.filter, self._rows_of_firsts.keep)
        self.ignored = self._selection.ignored
        self._only = None if self.settings.only is None else Only(self.settings.only)
        self._gradients = GradientTaps()
        self._blocks = Blocks()
        self._tapped: Request | None = None
        self._made: Replacements | None = None
        self._outcomes = Outcomes(self.settings, self._ranks, self._selection, self._distrust)
        self._recorder: Recorder | None = None
        if record is not None and out is not None:
            self._recorder = Recorder(
                out, filter=record, overwrite=overwrite, rank=rank, world_size=world_size
            )
            self._recorder.keeps_filter = True  # that of `graft ctl` says what to graft
        self._lock = threading.RLock()
        self._watching = threading.local()
        self._sharing = Sharing()
        self._in_parts: list[Parts] = []
        self._surplus: dict[str, int] = {}
        self._lazy = False
        self._pid = os.getpid()
        self._taken = 0
        self.folders: tuple[Path | None, ...] = (self.out,)
        self.overwrites = self._job if overwrite else None
        self.state = "new"
        self.reason = ""

    def __enter__(self) -> Replayer:
        tapped = begin(self.settings)
        try:
            sessions = self.start()
        except BaseException:
            end(tapped)
            raise
        self._tapped = tapped
        for session in sessions:
            activate(session)
        return self

    def start(self, *, lazily: bool = False) -> list[Recorder | Replayer]:
        """Begin; return the sessions to activate: this, and one that records for `record`."""
        if self.state != "new":
            raise UsageError("this Replayer was used before; make a new one")
        if not lazily:
            self._selection.begin()
        graphs.watch()
        self._lazy = lazily
        self.state = "running"
        return [self] if self._recorder is None else [self._recorder.start(lazily=lazily), self]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        finally:
            end(self._tapped)
        if error is None and self.settings.strict:
            problems = self.problems()
            if problems:
                raise ReplayError("; ".join(problems))

    def log(self) -> pl.DataFrame:
        """Return the log: one row per tap that was looked at."""
        return self._outcomes.frame()

    def problems(self, strict: bool | None = None) -> list[str]:
        """Return why the replay on this rank is not to be trusted; empty where it is.

        Args:
            strict: whether anything missed or unused counts; by default as the settings have it.
        """
        is_strict = self.settings.strict if strict is None else strict
        found = self.summary().problems(is_strict, self._selection.refused)
        return [self.reason, *found] if self.reason else found

    def summary(self) -> Summary:
        """Return what the replay came to on this rank."""
        world, settings = self._ranks.current.world_size, self.settings
        records = self._frame
        if world > 1:  # whose rows the others may have
            records = records.filter(records["rows"].is_null())
        return summarize(self.log(), records, settings, world)

    def on_step(self) -> None:
        """End an iteration."""
        self._gradients.next_step()
        self._end_parts()
        self._sharing.next_step()
        self._selection.next_step()
        self._rows_of_firsts.next_step()
        if self._made is not None:
            self._made.matcher.next_step()

    def on_switch(self, filter: Filter | None, missed: bool) -> None:
        """Take another filter, None for that of the settings."""
        match_on = MatchOn.parse(self.settings.match_on)
        is_other = self._selection.switch(filter or self.settings.filter, missed)
        is_counted_on = is_other if match_on.use_step else is_other or missed
        if self._made is not None and not match_on.whole and is_counted_on:
            reason = (
                f"graft ctl switched it, and --match-on {self.settings.match_on} counts taps, so "
                "which record belongs to those that follow is not known; replay anew"
            )
            self._fail(reason)
            self._outcomes.say(f"replaying ended, the job goes on: {reason}")

    def took(self, sequence: int) -> None:
        """Note that what `graft ctl` asked for holds."""
        with self._lock:
            self._taken = sequence
            if self._made is not None:
                self._tell_listening()

    def _tell_listening(self) -> None:
        """Say beside the log that this rank listens; whoever calls has the lock."""
        if self.state == "running" and self.out is not None:
            rank = self._ranks.current.rank
            with contextlib.suppress(OSError):
                tell_listening(self.out, rank, self._job.attempt, self._taken)

    @property
    def is_unsettled(self) -> bool:
        """Whether a process group that comes up may change the rank."""
        return self._ranks.is_unsettled

    def on_tap(self, call: Call) -> None:
        """Graft a tap if it is wanted.

        Raises:
            ReplayError: it failed or had no record, and that was to be raised.
        """
        if self.state != "running" or not self._confirm_rank():
            return
        rank = self._ranks.current.rank
        selected = self._selection.select_or_warn(call, rank, self._outcomes.once)
        if call.inside and selected is None:
            self._blocks.see(call, is_taken=False)
        if selected is None or not self._ensure_log():
            return
        start = time.perf_counter()
        if selected.note:
            self._outcomes.once(
                about_note(call, selected), f"tap {call.shown} at {call.site}: {selected.note}"
            )
        if selected.trouble:
            self._outcomes.finish(selected, "tensor", start, ReplayError(selected.trouble))
            return
        try:
            value = call.value()
        except LayoutError as err:
            self._outcomes.finish(selected, "tensor", start, err)
            return
        except Exception as err:
            if not call.is_made_here:
                raise
            fact = f"its callable raised {type(err).__name__}: {err}"
            self._outcomes.finish(selected, "tensor", start, ReplayError(fact))
            return
        kind = classify(value)
        if kind == "tensor":
            if call.inside:
                self._blocks.see(call, is_taken=True)
            ids = self._rows_of_firsts.of(call, selected)
            if selected.forward:
                self._attempt(call, selected, value, "tensor", start, ids)
            if selected.grad:
                mesh = self._replacements.mesh(selected)  # backward() may come under another
                parts = Parts(selected)
                kept = as_they_are(ids)
                call.hear_gradient(
                    self._gradients,
                    lambda grad, part: self._on_gradient(call, parts, part, grad, mesh, kept),
                    lambda reason: self._tell(call, f"asks for a gradient: {reason}"),
                )
        elif kind == "value":
            if selected.forward:
                self._compare_value(selected, value, start)
        else:
            fact = f"{kind}; only tensors can be grafted"
            self._outcomes.finish(selected, "tensor", start, ReplayError(fact))

    def _is_passed_over(self, selected: Selected, kind: str) -> bool:
        """Whether a tap is none of those to graft; its record counts as used all the same."""
        if self._only is None or self._only.has(selected.key, kind):
            return False
        with contextlib.suppress(MissingRecord):
            self._replacements.matcher.find(selected, kind)
        return True

    def lost(self, call: Call, reason: str) -> None:
        """Say that a tap could not be handled for a reason nobody foresaw."""
        self._tell(call, f"was not grafted: {reason}")
        self.reason = self.reason or f"tap {call.shown} was not grafted: {reason}"

    def _tell(self, call: Call, what: str) -> None:
        self._outcomes.once((call.shown, what), f"tap {call.shown} at {call.site} {what}")

    def _distrust(self, reason: str) -> None:
        self.reason = reason

    def _fail(self, reason: str) -> None:
        """End the replay as one that is not to be trusted."""
        if self.state == "running":
            self.state, self.reason = "failed", reason

    def close(self) -> None:
        """Finish the log; twice is fine."""
        if os.getpid() != self._pid or self.state in ("new", "closed"):
            return
        deactivate(self)
        if self._recorder is not None:
            self._recorder.close()
        self._gradients.close()
        self._end_parts()
        with self._lock:
            state, self.state = self.state, "closed"
        if self.out is not None and self._made is not None:
            with contextlib.suppress(OSError):
                tell_listening(self.out, self._ranks.current.rank, self._job.attempt, None)
        try:
            self._outcomes.close()
        except OSError as err:
            state, self.reason = "failed", f"the log cannot be written: {err.strerror or err}"
            self._outcomes.say(self.reason)
        write_report(
            {
                "session": ReplaySettings.PREFIX,
                "rank": self._ranks.current.rank,
                "world_size": self._ranks.current.world_size,
                "state": "failed" if self.reason else "complete" if state == "running" else state,
                "reason": self.reason,
                "selected": self._selection.selected,
                "refused": self._selection.refused,
                "names_seen": sorted(self._selection.names_seen),
                "tags_seen": sorted(self._selection.tags_seen),
            }
        )
        for said in self._blocks.told():
            self._outcomes.once((said,), said)
        if "GRAFT_REPORTS" in os.environ:
            return  # the wrapper speaks for all ranks
        why = self._selection.why_nothing()
        if why is not None:
            self._outcomes.say(why)
        elif self._lazy:
            self._outcomes.say(f"replay: {self.summary().line()}")
            for problem in self.problems():
                self._outcomes.say(f"not to be trusted: {problem}")

    def _confirm_rank(self) -> bool:
        wrong = self._ranks.contradiction(committed=self._made is not None)
        if wrong is not None:
            self._fail(wrong)
            self._outcomes.say(f"replaying ended, the job goes on: {wrong}")
        return wrong is None

    def _ensure_log(self) -> bool:
        """Whether grafting can begin; the first call indexes the recording and opens the log."""
        if self._made is not None:
            return True
        with self._lock:
            if self._made is not None or self.state != "running":
                return self._made is not None
            rank, settings = self._ranks.current, self.settings
            try:
                self._outcomes.open(self.out, f"{rank_folder(rank.rank)}-a{self._job.attempt}")
                matcher = Matcher(
                    self._frame,
                    MatchOn.parse(settings.match_on),
                    self._selection.filter,
                    rank.rank,
                    settings.step_offset,
                    settings.rename,
                )
                self._made = Replacements(
                    self.recording,
                    matcher,
                    self._transform,
                    rank,
                    settings,
                    self._warn_of,
                )
                self._tell_listening()
            except (GraftError, OSError) as err:
                self._fail(str(err))
                self._outcomes.say(f"this rank is not grafted: {err}")
            return self._made is not None

    @property
    def _replacements(self) -> Replacements:
        assert self._made is not None  # `_ensure_log` made it
        return self._made

    def _warn_of(self, selected: Selected, warning: str, about: str) -> None:
        tap = label(selected.key.name, selected.tags)
        of = warning if about == "guess" else selected.key.name
        self._outcomes.once((about, of), f"tap {tap}: {warning}")

    def _attempt(
        self,
        call: Call,
        selected: Selected,
        value: torch.Tensor,
        kind: str,
        start: float,
        ids: tuple[Ids, ...],
    ) -> None:
        """Graft onto a tensor in place."""
        if self._is_passed_over(selected, kind):
            return
        tried = _Tried()
        tap, shared = named(selected), ""
        try:
            with plainly():
                target, placements = local_part(value)
                graft.check_target(target)
                mesh = self._replacements.mesh(selected)
                if call.run is not None and call.run.why:
                    raise ReplayError(call.run.why)
                made = self._make(tried, call, selected, target, kind, placements, mesh, ids)
                if call.run is None:
                    shared = self._sharing.overwrite(target, made.tensor, tap)
                else:  # memory of the tap's own, which its graph reads
                    graft.overwrite(target, made.tensor)
            repeat_to_the_end()
        except Exception as err:
            if is_from_the_job(err):
                raise
            tried.error = _worded(err)
        of_callable = "what was grafted is the result of the tap's callable"
        note = joined(
            selected.note,
            tried.made.note if tried.made else "",
            shared,
            of_callable if call.is_made_here else "",
        )
        if shared:
            self._outcomes.once((selected.key.name, "sharing"), f"tap {tap} was grafted: {shared}")
        row = self._finish(selected, kind, start, tried, note)
        if call.run is not None:
            self._settle(call.run, row, tried)
            return
        has_any = tried.made is not None and tried.made.numel != 0
        if tried.error is None and has_any and target.numel():
            self._watch_for_effect(call, row, value, target)

    def _settle(self, run: Run, row: LogRow, tried: _Tried) -> None:
        """Measure a graft in a CUDA graph once that has run: before, its values are not known."""
        run.is_grafted = tried.error is None
        made = tried.made
        run.mask = None if made is None else made.mask
        if tried.error is not None or made is None or made.figures is None:
            return

        def measure(held: torch.Tensor, new: torch.Tensor) -> None:
            with plainly():
                if made.mask is not None:
                    held, new = held[made.mask], new[made.mask]
                figures, unmeasured = measured(held, new)
            self._outcomes.measure(row, figures, unmeasured, [*made.own])

        run.after.append(measure)

    def _make(
        self,
        tried: _Tried,
        call: Call,
        selected: Selected,
        target: torch.Tensor,
        kind: str,
        placements: str,
        mesh: FrozenMesh | None,
        ids: tuple[Ids, ...],
    ) -> Replacement:
        """Make what replaces a tensor, row by row or as a whole; `tried` has how far it came.

        Raises:
            GraftError: see `Replacements.make` and `RowReplacements.make`.
        """
        made, by_rows = self._replacements, self._replacements.by_rows
        aligned = by_rows.aligned(call, selected, target, kind, placements, mesh, ids)
        if aligned is not None:
            tried.made = by_rows.make(call, selected, target, kind, aligned)
        else:
            tried.match = self._found(call, selected, target, kind, placements, ids)
            tried.made = made.make(call, selected, target, kind, placements, mesh, tried.match, ids)
        return tried.made

    def _found(
        self,
        call: Call,
        selected: Selected,
        target: torch.Tensor,
        kind: str,
        placements: str,
        ids: tuple[Ids, ...],
    ) -> Match:
        """Return the records of a tap; where there are none, the error knows what was tapped.

        Raises:
            MissingRecord: there are none.
        """
        try:
            return self._replacements.find(selected, kind)
        except MissingRecord as err:
            err.rows = self._replacements.by_rows.looked_for(call, target, kind, placements, ids)
            err.dtype, err.shape = dtype_name(target.dtype), list(target.shape)
            raise

    def _watch_for_effect(
        self, call: Call, row: LogRow, value: torch.Tensor, target: torch.Tensor
    ) -> None:
        """Note it in the row where the tensor is freed as soon as its tap has returned."""
        reason = unkept.OF_CALLABLE if call.is_made_here else unkept.FREED

        def freed() -> None:
            try:
                self._note_unkept(row, reason.format(site=call_site()))
            except Exception as err:  # wherever the job is, it goes on
                self.reason = self.reason or f"a graft without effect is not logged: {err}"

        # Kept until the thread's next graft: what is freed later says nothing.
        self._watching.latest = unkept.watch(call, value, target, freed)

    def _note_unkept(self, row: LogRow, reason: str) -> None:
        self._outcomes.amend(row, WITHOUT_EFFECT, reason)
        tap = f"{label(row['name'], row['tags'])} step={row['step']}"
        tap += f" occurrence={row['occurrence']}"
        self._outcomes.once(
            (row["name"], WITHOUT_EFFECT), f"tap {tap} was grafted without effect: {reason}"
        )

    def _on_gradient(
        self,
        call: Call,
        parts: Parts,
        number: int,
        grad: torch.Tensor,
        mesh: FrozenMesh | None,
        ids: tuple[Ids, ...],
    ) -> torch.Tensor | None:
        """Return the gradient that replaces one, or a part of one; None to keep it."""
        if self.state != "running":
            return None
        selected = parts.at(number)
        if self._is_passed_over(selected, "grad"):
            return None
        start = time.perf_counter()
        tried = _Tried()
        replaced: torch.Tensor | None = None
        try:
            copy = grad.clone()  # in its graph, for whoever differentiates twice
            self._check_parts(parts, number)
            with plainly():
                target, placements = local_part(call.within(copy))
                made = self._make(tried, call, selected, target, "grad", placements, mesh, ids)
                graft.overwrite(target, made.tensor)
            replaced = copy
        except Exception as err:
            if is_from_the_job(err):
                raise
            tried.error = _worded(err)
        if isinstance(tried.error, MissingRecord) and number > 0:
            tried.error, replaced = self._too_many(call, parts, number, grad)
        note = tried.made.note if tried.made is not None and tried.error is None else ""
        parts.rows.append(self._finish(selected, "grad", start, tried, note))
        return replaced

    def _check_parts(self, parts: Parts, number: int) -> None:
        """Refuse a part that is known to be one of more than were recorded.

        Raises:
            ReplayError: it is.
        """
        matcher = self._replacements.matcher
        surplus = self._surplus.get(parts.selected.key.name)
        if surplus is not None and not matcher.has(parts.at(surplus), "grad"):
            raise ReplayError(MORE)
        if number == 0 and matcher.has(parts.at(1), "grad"):
            with self._lock:
                self._in_parts.append(parts)

    def _too_many(
        self, call: Call, parts: Parts, number: int, grad: torch.Tensor
    ) -> tuple[GraftError, torch.Tensor | None]:
        """Return why a part has no record, and what is to replace it."""
        self._surplus.setdefault(parts.selected.key.name, number)
        grafted = parts.grafted
        if len(grafted) < number:
            return ReplayError(MORE), None
        for row in grafted:
            self._outcomes.amend(row, "error", MORE)
        replaced = grad.clone()
        with plainly():
            local_part(call.within(replaced))[0].zero_()
        return ReplayError(ZEROS), replaced

    def _end_parts(self) -> None:
        """Note where a part was taken for more than it is, once no other can come."""
        with self._lock:
            ended, self._in_parts = self._in_parts, []
        for parts in ended:
            if self._replacements.matcher.has(parts.at(len(parts.rows)), "grad"):
                for row in parts.grafted:
                    self._outcomes.amend(row, "error", FEWER)
                    tap = label(row["name"], row["tags"])
                    self._outcomes.once((row["name"], FEWER), f"tap {tap} was not grafted: {FEWER}")

    def _compare_value(self, selected: Selected, value: Any, start: float) -> None:
        """Compare a value with the recorded one; values have no memory to graft onto."""
        if self._is_passed_over(selected, "value"):
            return
        tried = _Tried()
        is_equal, verdict = False, ""
        try:
            tried.match = self._replacements.find(selected, "value")
            is_equal, verdict = self._replacements.compare(value, tried.match)
        except Exception as err:
            if is_from_the_job(err):
                raise
            tried.error = _worded(err)
        changed = int(not is_equal) if tried.error is None else None
        self._finish(selected, "value", start, tried, verdict, changed)

    def _finish(
        self,
        selected: Selected,
        kind: str,
        start: float,
        tried: _Tried,
        note: str,
        changed: int | None = None,
    ) -> LogRow:
        match, error = tried.match, tried.error
        senders = None
        if match is not None and error is None:
            senders = self._replacements.senders(match)
        return self._outcomes.finish(
            selected, kind, start, error, match, senders, tried.made, note, changed
        )


@dataclass
class _Tried:
    """How far a graft came.

    Attributes:
        match: the records, where it is not made row by row.
        made: what replaces the tensor.
        error: why it failed.
    """

    match: Match | None = None
    made: Replacement | None = None
    error: GraftError | None = None


def _worded(err: Exception) -> GraftError:
    """Return an error with what a replay can do about it; what torch raised keeps its own words."""
    if isinstance(err, ReplicasDiffer):
        return ReplayError(f"{err}; to go on all the same, choose --replicas first, last or mean")
    if isinstance(err, BadRows):  # no transform is asked before rows are known
        return ReplayError(str(err))
    if isinstance(err, LayoutError):
        link = ", or" if err.advice else ";"
        return ReplayError(f"{err}{link} name a transform with --transform")
    return err if isinstance(err, GraftError) else ReplayError(f"{type(err).__name__}: {err}")


def from_environment(environ: Mapping[str, str]) -> list[Recorder | Replayer]:
    """Return what `GRAFT_REPLAY` and its companions ask for, started: a replayer, and a recorder.

    A transform that cannot be imported does not stop the job: every graft then fails for that
    reason, and the replay ends with status 3.

    Raises:
        GraftError: a variable cannot be used, or the recording cannot be read.
    """
    settings = ReplaySettings.from_variables(environ)
    path, out = environ["GRAFT_REPLAY"], environ.get("GRAFT_REPLAY_OUT") or None
    options = vars(settings)
    if isinstance(settings.transform, str):
        try:
            options = {**options, "transform": transforms.load(settings.transform)}
        except TransformError as err:
            options = {**options, "transform": err}
    return Replayer(path, out=out, **options).start(lazily=True)
