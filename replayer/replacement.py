"""Make the tensor that replaces a tapped one: match -> load -> transform -> check.

1. `Replacements.find` names the records that belong to the tap.
2. Without a transform, `Relayout` cuts them as both sides' layouts say; else `_load` brings the
   sender slice to the target's device.
3. The transform makes the replacement from copies, so that its failure harms nothing.
4. `graft.check_replacement` refuses what is no faithful one; `measured` says what it changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from recorder.capture import dims_text
from recorder.errors import TransformError
from recorder.format.rows import row_at
from recorder.format.schema import ManifestRow
from recorder.mesh import PIPELINE, FrozenMesh, MeshWatch, frozen
from recorder.ranks import Rank
from recorder.recording import Recording
from recorder.taps.call import Call
from recorder.taps.rows import Ids
from recorder.taps.selection import Selected
from recorder.taps.values import encode_value

from . import graft, transforms
from .byrow import RowReplacements
from .casts import of_scaled
from .log import AS_THEY_STAND, OwnRow, joined
from .match import Match, Matcher
from .measuring.choice import is_choice
from .own import Own
from .relayout import Declared, Relayout
from .replaced import Replacement, applied, measured, own_measured
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


_ROWS_THERE = (
    "the baseline says which row is which, and the target does not: taken by its key, "
    f"{AS_THEY_STAND}"
)
_ROWS_HERE = (
    "the target says which row is which, and the baseline's records of this name do not: taken by "
    f"their key, {AS_THEY_STAND}"
)


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
        self.by_rows = RowReplacements(
            self.recording,
            self.matcher,
            self.transform,
            self.rank,
            self.settings,
            self.warn,
            self._own,
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
        ids: Sequence[Ids] = (),
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
            ids: those that hold for it.

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
                made = applied(self.transform, g)
            else:
                made, assumed = self._untransformed(relayout, rows, target)
                if relayout.guesses:
                    self.warn(selected, relayout.guesses, "guess")
            scaled = "" if self.transform is not None else self._scaled(selected, target, rows)
            new, cast_note = graft.check_replacement(made, target)
            figures, unmeasured = measured(target, new) if self.settings.metrics else (None, "")
            routed = ""
            if is_choice(target):
                routed = self.by_rows.said_of_choices(selected, target, new, kind)
            own = OwnRow()
            if self.settings.own_error:
                own, why = self._own_of(target, new, declared, list(rows.values()))
                unmeasured = joined(unmeasured, why)
        stages = self._of_other_stage(selected, mesh, rows)
        if stages:
            self.warn(selected, stages, "stages")
        one_sided = ""
        if any(row["rows"] for row in rows.values()):
            one_sided = _ROWS_THERE
        elif self.by_rows.looked_for(call, target, kind, placements, ids) is not None:
            one_sided = _ROWS_HERE
        if one_sided:
            self.warn(selected, one_sided, "rows")
        note = joined(
            match.warning, assumed, one_sided, stages, cast_note, scaled, routed, unmeasured
        )
        return Replacement(new, note, figures, own)

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

        return own_measured(
            lambda: self._own.columns(
                target,
                new,
                rows[0],
                declared.dims,
                other if self.transform is None else None,
                is_gradient=declared.kind == "grad",
            )
        )

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
                _extras(rows[sender]) if sender in rows else None
                for sender in range(self.recording.world_size)
            ],
            key=selected.key._replace(kind=declared.kind),
            rank=self.rank.rank,
            world_size=self.rank.world_size,
            sender_world_size=self.recording.world_size,
            dims=declared.dims,
            sender_dims=next((row["dims"] for row in rows.values() if row["dims"]), ""),
        )


def _extras(row: ManifestRow) -> dict[str, Any]:
    """Return the extras of a record; most have none, and need no decoder."""
    text = row["extras"]
    return json.loads(text) if text and text != "{}" else {}
