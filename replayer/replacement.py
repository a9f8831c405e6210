"""Make the tensor that replaces a tapped one: match -> load -> transform -> check.

1. `Matcher.find` names the records that belong to the tap.
2. Without a transform `Relayout` cuts them as both sides' layouts say; else `_load` brings the
   sender slice to the target's device.
3. The transform makes the replacement from copies, so that its failure harms nothing.
4. `graft.check_replacement` refuses what is no faithful one; `_measure` says what it changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from recorder.call import Call
from recorder.capture import dims_text, encode_value
from recorder.errors import TransformError
from recorder.format.recording import Recording
from recorder.layouts.mesh import FrozenMesh, MeshWatch, frozen
from recorder.ranks import Rank
from recorder.selection import Selected

from . import graft, transforms
from .compare import difference
from .log import joined
from .match import Match, Matcher
from .relayout import Declared, Relayout
from .transforms import GraftInput, Transform

if TYPE_CHECKING:
    import polars as pl

    from recorder.layouts.plan import Plan


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
    "nbytes",
    "digest",
    "shard",
    "tensor",
)


@dataclass
class Replacements:
    """Makes replacements for one receiver rank.

    Attributes:
        recording: the baseline's.
        frame: its manifest rows, which `matcher` numbers.
        matcher: finds the records of a tap.
        transform: makes a replacement; None for what both sides' layouts say, else identity by
            rank; an error where it did not load.
        rank: the receiver.
        metrics: whether to measure what a replacement changes.
        check: whether to hold recorded tensors against their digests.
        replicas: what to do with senders that should hold the same block and do not.
        warn: hears of tags that contradict each other.
    """

    recording: Recording
    frame: pl.DataFrame
    matcher: Matcher
    transform: Transform | TransformError | None
    rank: Rank
    metrics: bool
    check: bool
    replicas: str
    warn: Callable[[Selected, str], None]

    def __post_init__(self) -> None:
        self._seqs = self.frame["seq"]
        self._needed = self.frame.select(_NEEDED)
        self._plans: dict[Any, Plan] = {}
        self._meshes = MeshWatch()

    def make(
        self,
        call: Call,
        selected: Selected,
        target: torch.Tensor,
        kind: str,
        placements: str,
        mesh: FrozenMesh | None,
        facts: dict[str, Any],
    ) -> torch.Tensor:
        """Return the tensor to write over `target`: its shape, dtype and device.

        Args:
            call: the tap.
            selected: its key.
            target: the tensor to be replaced, a DTensor's local part.
            kind: `tensor` or `grad`.
            placements: a DTensor's, as text.
            mesh: where the rank stood at the tap.
            facts: log columns, added to as they become known.

        Raises:
            ReplayError: there is no record, the transform failed, or the result is not faithful.
            LayoutError: the two sides' layouts contradict each other, or do not say enough.
            DamagedRecording: a record cannot be read.
        """
        match = self._match(selected, kind, facts)
        if isinstance(self.transform, TransformError):
            raise self.transform
        rows = {sender: self._row(match.rows[sender]) for sender in sorted(match.rows)}
        declared = Declared(dims_text(call.dims, placements), call.extras, mesh, kind)
        with torch.no_grad():
            relayout = self._relayout(target, declared, list(rows.values()))
            made: Any = None
            if self.transform is not None:
                received = self._load(rows, target.device)
                g = self._input(selected, target, declared.dims, received, rows, relayout)
                made = _apply(self.transform, g)
            elif relayout.decides:
                made = relayout.block(facts)
            else:
                received = self._load(rows, target.device)
                made = transforms.identity(received, self.rank.rank, self.rank.world_size, target)
            new, note = graft.check_replacement(made, target)
            if note:
                facts["message"] = joined(facts.get("message"), note)
            facts["numel"] = target.numel()
            if self.metrics:
                _measure(target, new, facts)
        return new

    def mesh(self, selected: Selected) -> FrozenMesh | None:
        """Return where the receiver stands now."""
        return frozen(self._meshes.current(selected.key.step))

    def _relayout(
        self, target: torch.Tensor, declared: Declared, rows: list[dict[str, Any]]
    ) -> Relayout:
        return Relayout(
            self.recording,
            rows,
            target,
            declared,
            self.rank,
            replicas=self.replicas,
            check=self.check,
            plans=self._plans,
        )

    def _row(self, number: int) -> dict[str, Any]:
        return dict(zip(_NEEDED, self._needed.row(number), strict=True))

    def compare(self, selected: Selected, value: Any, facts: dict[str, Any]) -> None:
        """Note whether a value equals the recorded one.

        Raises:
            MissingRecord: there is none.
        """
        match = self._match(selected, "value", facts)
        rank = self.rank.rank
        sender = rank if rank in match.rows else min(match.rows)
        recorded = self.frame.row(match.rows[sender], named=True)["value"]
        ours = encode_value(value)
        verdict = "equal" if recorded == ours else f"recorded {recorded}, here {ours}"
        if sender != rank:
            verdict += f" (rank {sender}'s; rank {rank} recorded none)"
        facts["message"] = joined(facts.get("message"), verdict)

    def _match(self, selected: Selected, kind: str, facts: dict[str, Any]) -> Match:
        match = self.matcher.find(selected, kind)
        facts["n_senders"] = len(match.rows)
        facts["senders"] = [
            self._seqs[match.rows[sender]] if sender in match.rows else None
            for sender in range(self.recording.world_size)
        ]
        if match.warning:
            facts["message"] = match.warning
            self.warn(selected, match.warning)
        return match

    def _load(
        self, rows: dict[int, dict[str, Any]], device: torch.device
    ) -> list[torch.Tensor | None]:
        """Return the sender slice on the receiver's device, from the manifest rows of senders."""
        return [
            self.recording.read(rows[sender], check=self.check).to(device)
            if sender in rows
            else None
            for sender in range(self.recording.world_size)
        ]

    def _input(
        self,
        selected: Selected,
        target: torch.Tensor,
        dims: str,
        received: list[torch.Tensor | None],
        rows: dict[int, dict[str, Any]],
        relayout: Relayout,
    ) -> GraftInput:
        return GraftInput.on(
            target,
            relayout,
            tags={**selected.tags, "name": selected.key.name},
            received_list=received,
            received_extras_list=[
                json.loads(rows[sender]["extras"] or "{}") if sender in rows else None
                for sender in range(self.recording.world_size)
            ],
            key=selected.key,
            rank=self.rank.rank,
            world_size=self.rank.world_size,
            sender_world_size=self.recording.world_size,
            dims=dims,
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


def _measure(target: torch.Tensor, new: torch.Tensor, facts: dict[str, Any]) -> None:
    """Note how a target differs from what replaces it; a figure is never worth a graft."""
    try:
        facts.update(vars(difference(target, new)))
    except Exception as err:
        facts["message"] = joined(facts.get("message"), f"not measured: {err}")
