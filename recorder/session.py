"""The recording session of one rank: tap -> selection -> capture -> writer.

1. `on_tap` asks the `Selection` whether the tap is wanted, and under which key.
2. The first tap that is wanted claims this rank's place in the recording (`claim`).
3. `_record` takes a snapshot and hands it to the `Writer`; a gradient follows when it comes.
4. `close` waits for the writer and writes down how the recording ended.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .bits import never_compiled, plainly
from .capture import capture, dims_text
from .diagnostics import Warnings, say
from .errors import CaptureError, GraftError, LayoutError, UsageError, is_from_the_job
from .filling import NOT_GATHERED
from .filters import Filter
from .format.claims import ClaimData
from .format.disk import ACCESS
from .format.schema import Description, ManifestRow
from .job import Job
from .layouts.parse import layout_of
from .mailbox import write_report
from .mesh import Mesh
from .modules.request import Request
from .modules.watch import begin
from .modules.watch import end as end_taps
from .paths import Path as ModulePath
from .progress import Progress, Publisher
from .provenance import command_line
from .ranks import Rank, RankWatch
from .rowing import RowRecords
from .settings import RecordSettings
from .sizes import count, format_duration, format_size
from .tags import text
from .taps import firing, graphs
from .taps.call import Call
from .taps.firsts import RowsOfFirsts
from .taps.gradients import GradientTaps
from .taps.inside import Blocks
from .taps.rows import Ids, as_they_are
from .taps.selection import Selected, Selection, about_note, part_of
from .taps.sessions import activate, end, ended, is_parked
from .taps.values import classify, encode_extras, encode_value
from .writing.claim import Claim, check_free, claim_rank, held_too_long
from .writing.leftovers import stored_bytes
from .writing.standing import Standing
from .writing.store import Limits
from .writing.writer import Writer

_MOST_INTERRUPTS = 20
"""That a close is begun again after; a disk that hangs takes no heed of any."""


never_compiled(firing.fire, firing.fire_step)


class Recorder:
    """Records every tap of this process while it is open.

    ```python
    with Recorder("runs/base", filter="layer < 4"):
        train()
    ```

    Args:
        path: the recording's folder; made if need be.
        modules: as all that follow, an option of `graft record`: `RecordSettings` says what each
            does. Sizes are numbers of bytes or text such as `20GB`.
        rank: this rank; by default as `ranks.current_rank` finds it. With `world_size`.
        world_size: the number of ranks.

    Raises:
        UsageError: an argument that cannot be used.
        RecordingExists: on entering, where this rank's place in the folder is taken.
        RecordingError: on entering, where the folder cannot be used.
    """

    order = 0
    grafts = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        modules: str | Sequence[str | ModulePath] = (),
        taps: str | None = None,
        step_on: str = "step",
        rows: Callable[..., Any] | str | None = None,
        filter: Filter | str | None = None,
        level: str = "tensors",
        max_bytes: int | str | None = None,
        min_free: int | str | None = None,
        keep_last: int | None = None,
        fsync: str = "off",
        access: str = "private",
        overwrite: bool = False,
        staging: int | str = RecordSettings.staging,
        when_full: str = "hold",
        max_hold: float | str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.settings = RecordSettings.given(locals())
        self.path = Path(os.path.abspath(path))
        self.state = "new"
        self.reason = ""
        self._ranks = RankWatch(rank, world_size)
        self._job = Job.from_environment()
        self._rows_of_firsts = RowsOfFirsts()
        self._selection = Selection(self.settings.filter, self._rows_of_firsts.keep)
        self.ignored = self._selection.ignored
        self._warnings = Warnings()
        self._gradients = GradientTaps()
        self._lock = threading.RLock()
        self._closing = threading.RLock()
        self._claim: Claim | None = None
        self._standing = Standing(self._once)
        self._writer: Writer | None = None
        self._rows: RowRecords | None = None
        self._blocks = Blocks()
        self._claiming = self._starting = False
        self._closed = self._is_interrupted = False
        self._lazy = False
        self._pid = os.getpid()
        self._skipped = 0
        self._tapped: Request | None = None
        self._taken = 0
        self._told = 0
        self.folders: tuple[Path | None, ...] = (self.path,)
        self.overwrites = self._job if overwrite else None
        self.keeps_filter = False

    @property
    def rank(self) -> int:
        """The rank recorded under."""
        return self._rank.rank

    def __enter__(self) -> Recorder:
        tapped = begin(self.settings)
        try:
            self.start()
        except BaseException:
            end_taps(tapped)
            raise
        self._tapped = tapped
        activate(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        finally:
            end_taps(self._tapped)
        if error is None and self.state == "failed":
            self._say(f"the recording in {self.path} is not to be trusted: {self.reason}")

    def start(self, *, lazily: bool = False) -> Recorder:
        """Begin; nothing is written before the first tap.

        Args:
            lazily: do not look at the folder either, so that a process without taps leaves no
                trace. For what the environment asks for, which reaches helper processes too; a
                place that is taken then shows at the first tap that is wanted.
        """
        if self.state != "new":
            raise UsageError("this Recorder was used before; make a new one")
        if not lazily and not self.settings.overwrite:
            check_free(self.path, self._rank.rank, self._rank.world_size, self._job)
        if not lazily:
            self._selection.begin()
        graphs.watch()
        self._lazy = lazily
        self.state = "running"
        return self

    def on_step(self) -> None:
        """End an iteration."""
        self._gradients.next_step()
        self._selection.next_step()
        self._rows_of_firsts.next_step()
        is_empty, self._told = self._selection.selected == self._told, self._selection.selected
        if self._writer is not None and not (is_empty and is_parked(self)):
            self._writer.end_step(self._selection.step)

    def on_switch(self, filter: Filter | None, missed: bool) -> None:
        """Take another filter, None for that of the settings."""
        is_own = filter is None or self.keeps_filter
        self._selection.switch(self.settings.filter if is_own else filter, missed)

    def took(self, sequence: int) -> None:
        """Note that what `graft ctl` asked for holds."""
        with self._lock:
            self._taken = sequence
            if self._claim is not None and self.state == "running" and not self._claiming:
                with suppress(OSError):
                    self._claim.update({"control": sequence})

    def lost(self, call: Call, reason: str) -> None:
        """Say that a tap could not be recorded for a reason nobody foresaw."""
        self._warn(call, reason)

    @property
    def is_unsettled(self) -> bool:
        """Whether a process group that comes up may change the rank."""
        return self._ranks.is_unsettled

    def on_tap(self, call: Call) -> None:
        """Record a tap if it is wanted."""
        if self.state != "running" or not (self._rank.is_final or self._confirm_rank()):
            return
        selected = self._selection.select_or_warn(call, self._rank.rank, self._once)
        if call.inside and selected is None:
            self._blocks.see(call, is_taken=False)
        if selected is None or not self._ensure_writer():
            return
        if selected.trouble:
            self._warn(call, selected.trouble)
            return
        if selected.note:
            self._once(
                about_note(call, selected), f"tap {call.shown} at {call.site}: {selected.note}"
            )
        try:
            value = call.value()
        except LayoutError as err:  # once for all its parts
            self._skipped += 1
            reason = f"is not recorded: {err}"
            self._once((call.site, reason), f"tap {call.shown} at {call.site} {reason}")
            return
        except Exception as err:
            if not call.is_made_here:
                raise
            self._warn(call, f"its callable raised {type(err).__name__}: {err}")
            return
        kind = classify(value)
        if kind == "tensor":
            if call.inside:
                self._blocks.see(call, is_taken=True)
            ids = self._rows_of_firsts.of(call, selected)
            if selected.forward:
                self._record(call, selected, value, "tensor", ids)
            if selected.grad:
                self._watch_gradient(call, selected, ids)
        elif kind == "value":
            if selected.forward:
                self._record_value(call, selected, value)
        else:
            self._warn(
                call,
                f"{kind}; tap a tensor, a callable returning one, "
                "or a number, a string or a flat list of these",
            )

    def close(self) -> None:
        """Wait until everything is written, and write down how it ended; twice is fine.

        An interrupt meanwhile leaves out what waits to be written, and is raised once it is closed.
        """
        if os.getpid() != self._pid:
            return  # a forked child's exit is not ours
        end(self)
        try:
            with self._closing:  # a signal may close this too: whoever comes second waits
                interrupt = self._close_through_interrupts()
        finally:
            ended(self)
        if interrupt is not None:
            raise interrupt

    def _close_through_interrupts(self) -> BaseException | None:
        """Close, beginning again where an interrupt came; return the first."""
        first: BaseException | None = None
        for _ in range(_MOST_INTERRUPTS):
            try:
                self._close()
                break
            except Exception:
                raise
            except BaseException as err:  # Ctrl-C, or what a signal's handler raises
                first = first or err
                self._is_interrupted = True
                if self._writer is not None:
                    self._writer.cut_short()
        return first

    def _close(self) -> None:
        with self._lock:
            if self._closed or self.state in ("new", "refused"):
                return
            # A rank that tapped was there, whatever was selected; so was one asked for by name.
            if self.state == "running" and (self._selection.names_seen or not self._lazy):
                self._ensure_claim()
        self._gradients.close()
        if self._writer is not None:
            self._writer.close()  # its last writes can still fail
        with self._lock:
            if self.state == "running":
                self.state = "complete"
        self._settle()
        self._closed = True  # now: what an interrupt leaves undone, the next call does
        dropped = self.progress().dropped
        if dropped and "GRAFT_REPORTS" not in os.environ:
            why = (
                held_too_long(dropped, self._max_hold)
                if self._max_hold is not None
                else (f"{count(dropped, 'tap')} dropped: nothing more could be staged")
            )
            self._say(why)
        bare = 0 if self._writer is None else self._writer.without_statistics
        if bare:
            self._say(f"{count(bare, 'record')} {NOT_GATHERED.format(run=self.path)}")
        for said in self._blocks.told():
            self._once((said,), said)
        nothing = self._selection.why_nothing()
        if nothing is not None and "GRAFT_REPORTS" not in os.environ:
            self._say(nothing)

    def _settle(self) -> None:
        """Write down how the recording ended, for readers and for the wrapper."""
        facts: ClaimData = {
            "state": self.state,
            "reason": self.reason,
            "ended_ns": time.time_ns(),
            "steps": self._selection.step,
            "rows": self._writer.rows_written if self._writer else 0,
            "has_ids": self._rows is not None and self._rows.has_any,
            "bytes": self._writer.bytes_written if self._writer else 0,
            "dropped": self.progress().dropped,
        }
        if self._claim is not None:
            try:
                self._claim.update(facts)
                if self.state != "complete":
                    self._claim.note_end()
            except OSError as err:
                self.state = facts["state"] = "failed"
                self.reason = facts["reason"] = f"writing failed: {err.strerror or err}"
                self._say(f"{self.reason}; the recording in {self.path} ends early")
        write_report(
            {
                "session": RecordSettings.PREFIX,
                "rank": self._rank.rank,
                "world_size": self._rank.world_size,
                "state": facts["state"],
                "reason": facts["reason"],
                "selected": self._selection.selected,
                "refused": self._selection.refused + self._skipped,
                "repeats": self._selection.repeats(),
                "names_seen": sorted(self._selection.names_seen),
                "tags_seen": sorted(self._selection.tags_seen),
            }
        )

    def _confirm_rank(self) -> bool:
        """Whether the rank still stands; the process group may have come up meanwhile."""
        wrong = self._ranks.contradiction(committed=self._claim is not None)
        if wrong is not None:
            self._end("failed", wrong)
        return wrong is None

    @property
    def _max_hold(self) -> float | None:
        """Seconds for which a step may be held; None where they are not limited."""
        return self.settings.max_hold if self.settings.when_full == "hold" else None

    @property
    def _rank(self) -> Rank:
        return self._ranks.current

    def _ensure_claim(self) -> bool:
        """Claim the rank's place unless that is done; return whether it is ours."""
        with self._lock:
            if self._claim is not None or self.state != "running" or self._claiming:
                return self._claim is not None  # also to a handler's tap while the first claims
            self._claiming = True
            try:
                if self._claim is not None:  # a handler's tap came just before the mark
                    return True
                options = self.settings.described()
                del options["overwrite"]
                about = Description(command=command_line(), options=options)
                self._claim = claim_rank(
                    self.path,
                    self._rank,
                    self._job,
                    about=about,
                    overwrite=self.settings.overwrite,
                    own=not self._lazy,
                    access=ACCESS[self.settings.access],
                    keep_last=self.settings.keep_last,
                    max_hold=self._max_hold,
                    control=self._taken,
                )
            except (GraftError, OSError) as err:
                self.state, self.reason = "refused", str(err)
                self._say(f"this rank is not recorded: {err}")
                self._settle()
            finally:
                self._claiming = False
            return self._claim is not None

    def _ensure_writer(self) -> bool:
        """Start the writer unless that is done; return whether there is one."""
        if self._writer is not None:
            return True
        with self._lock:
            if (
                self._writer is None
                and self.state == "running"
                and not self._starting
                and self._ensure_claim()
                and self._claim is not None
            ):
                self._starting = True
                try:
                    if self._writer is None:  # else a handler's tap came just before the mark
                        self._start_writer(self._claim)
                finally:
                    self._starting = False
            return self._writer is not None

    def _start_writer(self, claim: Claim) -> None:
        share = self.settings.max_bytes
        if share is not None:  # of which earlier attempts have had their part
            share = max(0, share // self._rank.world_size - stored_bytes(claim.folder))
        try:
            self._writer = Writer(
                claim.folder,
                claim.attempt,
                Limits(
                    keeps_payloads=self.settings.level == "tensors",
                    max_bytes=share,
                    min_free=self.settings.min_free,
                    keep_last=self.settings.keep_last,
                    fsync=self.settings.fsync,
                    access=ACCESS[self.settings.access],
                ),
                statistics=self.settings.level != "digests",
                budget=self.settings.staging,
                when_full=self.settings.when_full,
                max_hold=self._max_hold,
                on_stop=self._end,
                on_full=self._tell_full,
                on_progress=Publisher(self._rank.rank, self._say).publish,
            )
            self._rows = RowRecords(
                self._rank.rank,
                self._writer.submit,
                self._selection.next_seq,
                is_ring=self.settings.keep_last is not None,
            )
        except (OSError, MemoryError, RuntimeError, OverflowError) as err:
            room = format_size(self.settings.staging)
            reason = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
            self._end("failed", f"{room} of staging memory: {reason}; give less with --staging")

    def progress(self) -> Progress:
        """Return how far the recording is: bytes taken, bytes that wait, taps dropped."""
        return Progress() if self._writer is None else self._writer.progress()

    def _tell_full(self, progress: Progress) -> None:
        """Say once that the job taps faster than can be written, and what to do about it."""
        tapped = format_size(
            (progress.staged + progress.dropped_bytes) / max(progress.seconds - progress.held, 1e-3)
        )
        written = format_size(progress.written / max(progress.seconds, 1e-3))
        rates = (
            f"the job taps {tapped}/s and {written}/s are written, so what waits fills the staging "
            f"memory ({format_size(self.settings.staging)}) or is half a second old"
        )
        advice = "record less with --filter or --level stats, or give more room with --staging"
        if self._max_hold is not None:
            self._say(
                f"{rates}: taps hold the job, for {format_duration(self._max_hold)} a step at most "
                f"(--max-hold), and are dropped and counted then; {advice}"
            )
        elif self.settings.when_full == "hold":
            self._say(
                f"{rates}: taps hold the job until there is room; {advice}, "
                "or leave out what comes too fast with --when-full drop"
            )
        else:
            self._say(f"{rates}: taps are dropped and counted; {advice}")

    def _end(self, state: str, reason: str) -> None:
        """Stop recording early; may be called from the writer's thread."""
        with self._lock:
            if self.state != "running":
                return
            self.state, self.reason = state, reason
        verb = "stopped" if state == "stopped" else "ended early"
        goes_on = "" if self._is_interrupted else ", the job goes on"
        self._say(f"recording {verb}{goes_on}: {reason}")

    def _record(
        self,
        call: Call,
        selected: Selected,
        value: torch.Tensor,
        kind: str,
        ids: tuple[Ids, ...],
        mesh: Mesh | None = None,
    ) -> None:
        try:
            if self._writer is None:
                return
            with plainly():
                snapshot = capture(value)
                row = self._row(call, selected, kind)
                if snapshot.placements:
                    row["dims"] = dims_text(row.get("dims") or "", snapshot.placements)
                if "dims" in row:
                    self._note_layout(call, row, snapshot.local.dim(), mesh)
                if not ids or self._has_noted(call, ids, row, snapshot.local.shape):
                    self._writer.submit(row, snapshot)
        except CaptureError as err:
            self._warn(call, str(err))

    def _has_noted(
        self, call: Call, ids: tuple[Ids, ...], row: ManifestRow, shape: Sequence[int]
    ) -> bool:
        """Record the ids of a tap's rows; return whether it may be recorded itself."""
        assert self._rows is not None  # with the writer
        try:
            digest = self._rows.note(ids, row, shape)
        except LayoutError as err:
            self._warn(call, str(err), "is recorded without its rows")
            return True
        if digest:
            row["rows"] = digest
        return digest != ""

    def _record_value(self, call: Call, selected: Selected, value: Any) -> None:
        try:
            row = self._row(call, selected, "value")
            row["value"] = encode_value(value)
        except (CaptureError, ValueError) as err:  # an integer of thousands of digits
            self._warn(call, str(err))
            return
        if self._writer is not None:
            self._writer.submit_value(row)

    def _watch_gradient(self, call: Call, selected: Selected, ids: tuple[Ids, ...]) -> None:
        # Of the tap: backward() may come when another was declared.
        mesh = self._standing.current(self._selection.step)
        ids = as_they_are(ids)

        def arrived(grad: torch.Tensor, part: int) -> None:
            if self.state != "running":
                return
            try:
                self._record(call, part_of(selected, part), call.within(grad), "grad", ids, mesh)
            except Exception as err:  # backward() is the job's
                if is_from_the_job(err):
                    raise
                self.lost(call, f"{type(err).__name__}: {err}")

        call.hear_gradient(
            self._gradients,
            arrived,
            lambda reason: self._warn(call, reason, "asks for a gradient"),
        )

    def _row(self, call: Call, selected: Selected, kind: str) -> ManifestRow:
        extras, lost = encode_extras(call.extras)
        for fact in lost:
            self._warn(call, fact, what="is recorded without one of its extras")
        row: ManifestRow = {
            "rank": self._rank.rank,
            "seq": self._selection.next_seq() if kind == "grad" else selected.seq,
            "step": selected.key.step,
            "name": selected.key.name,
            "occurrence": selected.key.occurrence,
            "tags": selected.text,
            "kind": kind,
            "time_ns": time.time_ns(),
        }
        if call.dims:
            row["dims"] = _dims(call)
        if extras:
            row["extras"] = extras
        return row

    def _note_layout(self, call: Call, row: ManifestRow, ndim: int, mesh: Mesh | None) -> None:
        """Write down where the rank stands, and say at once what no replay could make sense of."""
        try:
            named = len(layout_of(row["dims"] or "", row["kind"]).dims)
            if named == ndim:
                wrong = ""
            else:
                wrong = f"its dims {row['dims']!r:.200} name {named} dims, and it has {ndim}"
        except LayoutError as err:
            wrong = str(err)
        if wrong:
            where = f"tap {call.shown} at {call.site}"
            what = f"{where} is recorded, but cannot be cut or put together: {wrong}"
            self._once((where, wrong), what)
        here = mesh if row["kind"] == "grad" else self._standing.current(self._selection.step)
        if self._standing.is_noted(here):
            return
        with self._lock:
            if self._claim is None or self.state != "running":
                return
            try:
                self._standing.note(self._claim, row["seq"], here)
            except OSError as err:
                self._end("failed", f"writing failed: {err.strerror or err}")

    def _warn(self, call: Call, reason: str, what: str = "is not recorded") -> None:
        self._skipped += 1
        self._once(
            (call.shown, call.site, reason), f"tap {call.shown} at {call.site} {what}: {reason}"
        )

    def _once(self, about: tuple[str, ...], message: str) -> None:
        self._warnings.once(about, message, self._where())

    def _where(self) -> str:
        return f"rank={self._rank.rank} step={self._selection.step}"

    def _say(self, message: str) -> None:
        say(message, self._where())


def _dims(call: Call) -> str:
    if not isinstance(call.dims, str):
        raise CaptureError(f"its dims are a {type(call.dims).__name__}, expected a string")
    return text("its dims", call.dims)


def from_environment(environ: Mapping[str, str]) -> list[Recorder]:
    """Return the recorder that `GRAFT_RECORD` and its companions ask for, started.

    Raises:
        GraftError: a variable cannot be used, or the folder is taken.
    """
    settings = RecordSettings.from_variables(environ)
    return [Recorder(environ["GRAFT_RECORD"], **vars(settings)).start(lazily=True)]
