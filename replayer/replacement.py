"""Make the tensor that replaces a tapped one: match -> load -> transform -> check.

1. `Replacements.find` names the records that belong to the tap.
2. Without a transform, `Relayout` cuts them as both sides' layouts say; else `_load` brings the
   sender slice to the target's device.
3. The transform makes the replacement from copies, so that its failure harms nothing.
4. `graft.check_replacement` refuses what is no faithful one; `_measured` says what it changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from recorder.bits import dtype_name
from recorder.capture import dims_text
from recorder.errors import GraftError, LayoutError, TransformError, is_from_the_job
from recorder.format.rows import row_at
from recorder.format.schema import ManifestRow
from recorder.layouts.rowed import rowed
from recorder.logical import layout_of
from recorder.mesh import PIPELINE, FrozenMesh, MeshWatch, frozen
from recorder.ranks import Rank
from recorder.recording import Recording
from recorder.sizes import count
from recorder.tags import canonical, key_tags, label
from recorder.taps.call import Call
from recorder.taps.rows import Ids, check_meant
from recorder.taps.selection import Selected
from recorder.taps.values import encode_value

from . import graft, routing, transforms
from .casts import is_unsupported, of_scaled
from .log import OwnRow, joined
from .match import Match, Matcher
from .measuring.choice import is_choice
from .measuring.compare import Difference, difference
from .own import Own
from .relayout import Declared, Relayout
from .rowing.aligned import Aligned, Made
from .rowing.match import RowMatcher
from .transforms import GraftInput, Transform

if TYPE_CHECKING:
    from recorder.layouts.plan import Plan

    from .settings import ReplaySettings


_NEEDED = (
    # of a manifest row, to read its tensor and to tell a transform about it
    "rank",
    "attempt",
    "seq",
    "step",
    "name",
    "occurrence",
    "tags",
    "kind",
    "dtype",
    "shape",
    "dims",
    "extras",
    "rows",
    "nbytes",
    "digest",
    "shard",
    "tensor",
)


_ROWS_HERE = (
    "the target says which row is which, and the baseline's records of this name do not: taken by "
    "their key, row for row as they stand"
)
_ROWS_THERE = (
    "the baseline says which row is which, and the target does not: taken by its key, row for row "
    "as they stand"
)


@dataclass(frozen=True)
class Replacement:
    """What is to be written over a tapped tensor.

    Attributes:
        tensor: of the target's shape, dtype and device.
        note: what to know of how it was made, "" where there is nothing.
        figures: how the target differs from it; None where that is not asked for, or not known.
        own: where it differs, and how; {} likewise.
        rows: where its rows come from, if they were matched one by one.
        numel: how many of its elements were recorded, where not all were.
    """

    tensor: torch.Tensor
    note: str
    figures: Difference | None
    own: OwnRow = field(default_factory=OwnRow)
    rows: Made | None = None
    numel: int | None = None


@dataclass
class Replacements:
    """Makes replacements for one receiver rank.

    Attributes:
        recording: the baseline's.
        matcher: finds the records of a tap, by numbers of rows of its frame.
        transform: makes a replacement; None for what both sides' layouts say, else identity by
            rank; an error where it did not load.
        rank: the receiver.
        settings: whether to measure what a replacement changes and to check digests, and what to
            do with replicas that differ.
        warn: hears of tags that contradict each other, of what layouts leave to guess, and of
            dtypes that go with a scale; and which of these it is.
    """

    recording: Recording
    matcher: Matcher
    transform: Transform | TransformError | None
    rank: Rank
    settings: ReplaySettings
    warn: Callable[[Selected, str, str], None]

    def __post_init__(self) -> None:
        self._frame = self.matcher.frame
        self._seqs = self._frame["seq"]
        self._needed = self._frame.select(_NEEDED)
        self._plans: dict[Any, Plan] = {}
        self._own = Own(self._frame)
        self._meshes = MeshWatch()
        self._row_matcher = RowMatcher(
            self.recording,
            self.matcher,
            check=self.settings.check,
            is_last=self.settings.replicas == "last",
        )
        self._numbered_anew: set[str] = set()  # names whose layers a later stage numbers from 0

    def find(self, selected: Selected, kind: str) -> Match:
        """Return the records that belong to a tap.

        Raises:
            MissingRecord: there is none; names the nearest and what differs.
        """
        match = self.matcher.find(selected, kind)
        if match.warning:
            self.warn(selected, match.warning, "order")
        return match

    def senders(self, match: Match) -> list[int | None]:
        """Return for each sender rank the `seq` of its record, None where it has none."""
        return [
            self._seqs[match.rows[sender]] if sender in match.rows else None
            for sender in range(self.recording.world_size)
        ]

    def make(
        self,
        call: Call,
        selected: Selected,
        target: torch.Tensor,
        kind: str,
        placements: str,
        mesh: FrozenMesh | None,
        match: Match,
    ) -> Replacement:
        """Return the tensor to write over `target`: its shape, dtype and device.

        Args:
            call: the tap.
            selected: its key.
            target: the tensor to be replaced, a DTensor's local part.
            kind: `tensor` or `grad`.
            placements: a DTensor's, as text.
            mesh: where the rank stood at the tap.
            match: the records that belong to it.

        Raises:
            ReplayError: the transform failed, or the result is not faithful.
            LayoutError: the two sides' layouts contradict each other, or do not say enough.
            DamagedRecording: a record cannot be read.
        """
        if isinstance(self.transform, TransformError):
            raise self.transform
        rows = {sender: self._row(match.rows[sender]) for sender in sorted(match.rows)}
        declared = Declared(dims_text(call.dims, placements), call.extras, mesh, kind)
        with torch.no_grad():
            relayout = self._relayout(target, declared, list(rows.values()))
            made: Any = None
            assumed = ""
            if self.transform is not None:
                received = self._load(rows, target.device)
                g = self._input(selected, target, declared, received, rows, relayout)
                made = _apply(self.transform, g)
            else:
                made, assumed = self._untransformed(relayout, rows, target)
                if relayout.guesses:
                    self.warn(selected, relayout.guesses, "guess")
            scaled = "" if self.transform is not None else self._scaled(selected, target, rows)
            new, cast_note = graft.check_replacement(made, target)
            figures, unmeasured = _measured(target, new) if self.settings.metrics else (None, "")
            routed = ""
            if is_choice(target):
                routed = self._said_of_choices(selected, target, new, kind)
            own = OwnRow()
            if self.settings.own_error:
                own, why = self._own_of(target, new, declared, list(rows.values()))
                unmeasured = joined(unmeasured, why)
        stages = self._of_other_stage(selected, mesh, rows)
        if stages:
            self.warn(selected, stages, "stages")
        one_sided = _ROWS_THERE if any(row["rows"] for row in rows.values()) else ""
        if one_sided:
            self.warn(selected, one_sided, "rows")
        note = joined(
            match.warning, assumed, one_sided, stages, cast_note, scaled, routed, unmeasured
        )
        return Replacement(new, note, figures, own)

    def aligned(
        self,
        call: Call,
        selected: Selected,
        target: torch.Tensor,
        kind: str,
        placements: str,
        mesh: FrozenMesh | None,
        ids: Sequence[Ids],
    ) -> Aligned | None:
        """Return the rows of a tap beside the baseline's; None where not both sides have ids.

        Args:
            call: the tap.
            selected: its key.
            target: the tensor to be replaced, a DTensor's local part.
            kind: `tensor` or `grad`.
            placements: a DTensor's, as text.
            mesh: where the rank stood at the tap.
            ids: those that hold for it.

        Raises:
            LayoutError: the ids cannot be read, or are not as many as its rows.
            ReplayError: taps are matched by order.
            DamagedRecording: the baseline's ids are not there.
        """
        if not ids:
            return None
        dims = layout_of(dims_text(call.dims, placements), kind)
        if not self._row_matcher.has_any:
            with suppress(LayoutError):  # ids that nobody needs are no error
                if rowed(dims, target.shape, [one.taken() for one in ids]):
                    self.warn(selected, _ROWS_HERE, "rows")
            return None
        groups = rowed(dims, target.shape, [one.taken() for one in ids])
        check_meant(ids, [group.names for group in groups], call.dims)
        if not groups:
            return None
        records = self._row_matcher.find(selected, kind, [group.names for group in groups])
        if records is None:
            self.warn(selected, _ROWS_HERE, "rows")
            return None
        return Aligned(
            self.recording,
            records,
            groups,
            dims,
            target,
            mesh,
            self.rank,
            replicas=self.settings.replicas,
            check=self.settings.check,
        )

    def of_rows(
        self, call: Call, selected: Selected, target: torch.Tensor, kind: str, aligned: Aligned
    ) -> Replacement:
        """Return the tensor to write over `target`, whose rows are matched one by one.

        Raises:
            MissingRecord: none of them was recorded.
            ReplayError: as `make`, as all that follow.
            LayoutError: see there.
            DamagedRecording: see there.
        """
        if isinstance(self.transform, TransformError):
            raise self.transform
        with torch.no_grad():
            own = aligned.own
            if self.transform is None:
                made = aligned.make()
                here = own.index_select(0, made.cells.to(own.device))
                new, note = graft.check_replacement(made.rows.to(target.device), here)
                new = aligned.with_padding(new, here)
                if aligned.guesses:
                    self.warn(selected, aligned.guesses, "guess")
            else:
                made, received = aligned.received()
                here = own.index_select(0, made.cells.to(own.device))
                g = self._input_of_rows(call, selected, target, kind, received)
                whole, note = graft.check_replacement(_apply(self.transform, g), target)
                new = aligned.front(whole).index_select(0, made.cells.to(own.device))
            figures, unmeasured = _measured(here, new) if self.settings.metrics else (None, "")
            said = ""
            if is_choice(target) and len(made.cells):
                said = self._said_of_choices(selected, here, new, kind, aligned)
            row = OwnRow()
            if self.settings.own_error and len(made.cells):
                row, why = self._own_of_rows(here, new, aligned.first, call.dims, kind)
                unmeasured = joined(unmeasured, why)
            tensor = aligned.put(new, made.cells)
        lost = f"{count(made.missing, 'row')} not found" if made.missing else ""
        message = joined(made.note, lost, note, said, unmeasured)
        return Replacement(tensor, message, figures, row, made, new.numel())

    def _said_of_choices(
        self,
        selected: Selected,
        here: torch.Tensor,
        new: torch.Tensor,
        kind: str,
        aligned: Aligned | None = None,
    ) -> str:
        """Return a note on choices that are grafted; what it is about is never worth a graft."""
        known, ids = None, torch.empty(0, dtype=torch.int64, device="cpu")
        if aligned is not None and len(aligned.groups) == 1:
            group = aligned.groups[0]
            known = None if group.known is None else group.known[aligned.cells]
            ids = group.ids[aligned.cells]

        def near() -> Iterator[tuple[str, torch.Tensor]]:
            if aligned is not None:
                yield from self._near(selected, here.device, kind, aligned)

        try:
            said, aloud = routing.said_of(here, new, known, ids, near)
        except Exception as err:
            if is_from_the_job(err):
                raise
            return f"its choices are not judged: {type(err).__name__}: {err}"
        if aloud:
            self.warn(selected, aloud, "routing")
        return said

    def _near(
        self, selected: Selected, device: torch.device, kind: str, aligned: Aligned
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what was recorded for the same rows under tags that are off by one."""
        for tags in routing.neighbours(selected.tags):
            key = selected.key._replace(tags=key_tags(tags))
            other = selected._replace(key=key, tags=tags, text=canonical(tags))
            names = [group.names for group in aligned.groups]
            try:
                records = self._row_matcher.find(other, kind, names, fires=False)
                if records is None:
                    continue
                made = aligned.of_others(records)
            except GraftError:
                continue
            if torch.equal(made.cells, aligned.cells):
                yield label(key.name, key.tags), made.rows.to(device)

    def _input_of_rows(
        self,
        call: Call,
        selected: Selected,
        target: torch.Tensor,
        kind: str,
        received: Sequence[tuple[ManifestRow, torch.Tensor]],
    ) -> GraftInput:
        tensors: list[torch.Tensor | None] = [None] * self.recording.world_size
        extras: list[Any] = [None] * self.recording.world_size
        for row, tensor in received:
            if tensors[row["rank"]] is not None:
                raise TransformError(
                    f"rank {row['rank']} recorded several parts of these rows, and a transform "
                    "gets one of each rank; declare dims on both sides and name none"
                )
            tensors[row["rank"]] = tensor.to(target.device)
            extras[row["rank"]] = json.loads(row["extras"] or "{}")
        return GraftInput(
            target=target,
            tags={**selected.tags, "name": selected.key.name},
            received_list=tensors,
            received_extras_list=extras,
            key=selected.key._replace(kind=kind),
            rank=self.rank.rank,
            world_size=self.rank.world_size,
            sender_world_size=self.recording.world_size,
            dims=call.dims,
            sender_dims=received[0][0]["dims"] or "" if received else "",
            is_rowed=True,
        )

    def _untransformed(
        self, relayout: Relayout, rows: dict[int, ManifestRow], target: torch.Tensor
    ) -> tuple[torch.Tensor, str]:
        """Return what both sides' layouts make of records, or identity, and what was assumed."""
        if relayout.decides:
            return relayout.block()
        if (one := relayout.same_for_all()) is not None:
            tensor = self.recording.read(one, check=self.settings.check)
            return tensor.to(target.device), relayout.guesses
        received = self._load(rows, target.device)
        here = self.rank
        made = transforms.identity(received, here.rank, here.world_size, target, relayout.lacking)
        return made, ""

    def _own_of(
        self,
        target: torch.Tensor,
        new: torch.Tensor,
        declared: Declared,
        rows: list[ManifestRow],
    ) -> tuple[OwnRow, str]:
        """Return what is logged of the target's own error, or why it is not known."""

        def other(numbers: Sequence[int]) -> torch.Tensor:
            given = {row["rank"]: row for row in map(self._row, numbers)}
            relayout = self._relayout(target, declared, list(given.values()))
            return self._untransformed(relayout, given, target)[0]

        try:
            made = self._own.columns(
                target,
                new,
                rows[0],
                declared.dims,
                other if self.transform is None else None,
                is_gradient=declared.kind == "grad",
            )
        except Exception as err:
            if is_from_the_job(err):
                raise
            return OwnRow(), f"its own error is not measured: {type(err).__name__}: {err}"
        return made, ""

    def _own_of_rows(
        self, here: torch.Tensor, new: torch.Tensor, record: ManifestRow, dims: str, kind: str
    ) -> tuple[OwnRow, str]:
        """As `_own_of`, of rows that are matched one by one."""
        try:
            made = self._own.columns(here, new, record, dims, None, is_gradient=kind == "grad")
        except Exception as err:
            if is_from_the_job(err):
                raise
            return OwnRow(), f"its own error is not measured: {type(err).__name__}: {err}"
        return made, ""

    def _of_other_stage(
        self, selected: Selected, mesh: FrozenMesh | None, rows: dict[int, ManifestRow]
    ) -> str:
        """Say that a later stage of a pipeline takes the first layer, which is another stage's.

        Then each stage numbers its layers from 0, and several take the same records.
        """
        stage, stages = dict(mesh or ()).get(PIPELINE, (0, 1))
        layers = {
            tag: value
            for tag, value in selected.tags.items()
            if tag.lower().startswith("layer") and type(value) is int
        }
        if stage == 0 or not layers:
            return ""
        places = {dict(self.recording.mesh_of(row) or ()).get(PIPELINE) for row in rows.values()}
        if (stage, stages) in places:
            return ""
        tag, layer = next(iter(layers.items()))
        if layer == 0:
            self._numbered_anew.add(selected.key.name)
        if selected.key.name not in self._numbered_anew:
            return ""
        return (
            f"stage {stage} of {stages} took {tag}={layer}, and so does stage 0: if each stage "
            f"numbers its layers from 0, tag the global one, {tag}=recorder.global_layer(i)"
        )

    def _scaled(
        self, selected: Selected, target: torch.Tensor, rows: dict[int, ManifestRow]
    ) -> str:
        """Return a warning, said once too, where one side has a dtype that goes with a scale."""
        record = getattr(torch, next(iter(rows.values()))["dtype"], None)
        warning = of_scaled(target.dtype, "the target")
        if not warning and isinstance(record, torch.dtype):
            warning = of_scaled(record, "the record")
        if warning:
            self.warn(selected, warning, "scale")
        return warning

    def mesh(self, selected: Selected) -> FrozenMesh | None:
        """Return where the receiver stands now."""
        return frozen(self._meshes.current(selected.key.step))

    def _relayout(
        self, target: torch.Tensor, declared: Declared, rows: list[ManifestRow]
    ) -> Relayout:
        return Relayout(
            self.recording,
            rows,
            target,
            declared,
            self.rank,
            replicas=self.settings.replicas,
            check=self.settings.check,
            plans=self._plans,
        )

    def _row(self, number: int) -> ManifestRow:
        # As `row_at`, but to ask a frame for its columns takes as long as to read one.
        return cast(ManifestRow, dict(zip(_NEEDED, self._needed.row(number), strict=True)))

    def compare(self, value: Any, match: Match) -> tuple[bool, str]:
        """Return whether a value equals the recorded one, and say so."""
        rank = self.rank.rank
        sender = rank if rank in match.rows else min(match.rows)
        recorded = row_at(self._frame, match.rows[sender])["value"]
        here = encode_value(value)
        verdict = "equal" if recorded == here else f"recorded {recorded}, here {here}"
        if sender != rank:
            verdict += f" (rank {sender}'s; rank {rank} recorded none)"
        return recorded == here, joined(match.warning, verdict)

    def _load(
        self, rows: dict[int, ManifestRow], device: torch.device
    ) -> list[torch.Tensor | None]:
        """Return the sender slice on the receiver's device, from the manifest rows of senders."""
        return [
            self.recording.read(rows[sender], check=self.settings.check).to(device)
            if sender in rows
            else None
            for sender in range(self.recording.world_size)
        ]

    def _input(
        self,
        selected: Selected,
        target: torch.Tensor,
        declared: Declared,
        received: list[torch.Tensor | None],
        rows: dict[int, ManifestRow],
        relayout: Relayout,
    ) -> GraftInput:
        return GraftInput(
            target=target,
            relayout=relayout,
            tags={**selected.tags, "name": selected.key.name},
            received_list=received,
            received_extras_list=[
                json.loads(rows[sender]["extras"] or "{}") if sender in rows else None
                for sender in range(self.recording.world_size)
            ],
            key=selected.key._replace(kind=declared.kind),
            rank=self.rank.rank,
            world_size=self.rank.world_size,
            sender_world_size=self.recording.world_size,
            dims=declared.dims,
            sender_dims=next((row["dims"] for row in rows.values() if row["dims"]), ""),
        )


def _apply(transform: Transform, g: GraftInput) -> Any:
    try:
        return transform(g)
    except Exception as err:
        raise TransformError(
            f"the transform {transform.name} raised {type(err).__name__}: {err}"
        ) from err
    finally:
        g.done()


def _measured(target: torch.Tensor, new: torch.Tensor) -> tuple[Difference | None, str]:
    """Return how a target differs from what replaces it, or why it is not known.

    A figure is never worth a graft.
    """
    try:
        return difference(target, new), ""
    except Exception as err:
        if is_unsupported(err):
            a, b = dtype_name(target.dtype), dtype_name(new.dtype)
            return None, f"not measured: torch cannot compare {a} with {b} on {new.device.type}"
        return None, f"not measured: {err}"
