"""The transform that both sides' layouts are enough for: sharded, to logical, to sharded.

1. `Relayout.decides` says whether both sides declare a layout, and not just the same.
2. `Relayout.block` is what is grafted where no transform is named; `logical` and `to_local` are the
   two halves of it, for transforms of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recorder.errors import LayoutError, TransformError
from recorder.format.schema import ManifestRow
from recorder.layouts.assemble import assemble, keep_padding
from recorder.layouts.blocks import Block
from recorder.layouts.dims import TOKENS
from recorder.layouts.lengths import counts_tokens, lengths_in, padding_side
from recorder.layouts.parse import gradient_dims
from recorder.layouts.plan import Plan, plan, whole
from recorder.logical import Recorded, block_of, layout_of, open_axes, with_gradient
from recorder.mesh import FrozenMesh
from recorder.ranks import Rank
from recorder.recording import Recording
from recorder.taps.values import encode_extras

from .graft import check_replacement
from .log import joined


@dataclass(frozen=True)
class Declared:
    """What the target's tap says of its tensor: layout, extras, where the rank stands, its kind."""

    dims: str
    extras: Mapping[str, Any] | None
    mesh: FrozenMesh | None
    kind: str


class Relayout:
    """Makes one receiver's block of one key.

    Args:
        recording: the senders'.
        rows: the manifest rows of those that have the key, by rank.
        target: the receiver's tensor.
        declared: what its tap says.
        rank: the receiver.
        replicas: what to do with senders that should hold the same block and do not.
        check: whether to hold what is read against its digest.
        plans: plans made before, and to be added to.

    Attributes:
        guesses: what of the note on the latest `block` only a declaration can make certain.
    """

    def __init__(
        self,
        recording: Recording,
        rows: Sequence[ManifestRow],
        target: torch.Tensor,
        declared: Declared,
        rank: Rank,
        *,
        replicas: str,
        check: bool,
        plans: dict[Any, Plan],
    ) -> None:
        self._recording = recording
        self._rows = rows
        self._target = target
        self._declared = declared
        self._rank = rank
        self._replicas, self._check, self._plans = replicas, check, plans
        self.guesses = ""

    @property
    def decides(self) -> bool:
        """Whether both sides declare a layout, and it is not one that identity by rank follows.

        Two jobs of as many ranks whose ranks declare the same, and neither of them where they
        stand, have the same blocks on the same ranks, if all are alike and have no padding; or if
        nothing is cut, so that a rank with another shape had data of its own.
        """
        receiver = self._declared
        if not (receiver.dims and all(row["dims"] for row in self._rows)):
            return False
        if self._is_padded() or self._is_contradicted():
            return True
        senders = [row for row in self._rows if row["rank"] == self._rank.rank]
        return not (
            receiver.mesh is None
            and self._recording.world_size == self._rank.world_size
            and len(senders) == 1
            and senders[0]["dims"] == receiver.dims
            and self._is_alike(senders[0])
            and all(self._recording.mesh_of(row) is None for row in self._rows)
        )

    def _is_alike(self, sender: ManifestRow) -> bool:
        """Whether the shapes let the block of the sender at this rank be the target's."""
        shapes = {tuple(row["shape"] or ()) for row in self._rows}
        target = tuple(self._target.shape)
        if shapes == {target}:
            return True
        is_cut = bool(layout_of(self._declared.dims, self._declared.kind).axes)
        return not is_cut and tuple(sender["shape"] or ()) == target

    def _is_padded(self) -> bool:
        """Whether the target's tap says anything of padding, or of sequences' lengths."""
        try:
            dims = layout_of(self._declared.dims, self._declared.kind)
        except LayoutError:
            return True  # and says so
        counts = TOKENS in dims.names
        lengths = counts and any((row["extras"] or "{}") != "{}" for row in self._rows)
        return bool(dims.sizes or dims.padded or lengths or (counts and self._declared.extras))

    def _is_contradicted(self) -> bool:
        """Whether both taps tell of sequences, and not of the same."""
        try:
            dims = layout_of(self._declared.dims, self._declared.kind)
            texts = {self._receiver().extras, *(row["extras"] or "" for row in self._rows)}
            told = [
                (lengths_in(text, dims), padding_side(text))
                for text in texts
                if counts_tokens(dims)
            ]
        except LayoutError:
            return True  # and says so
        lengths = {one.real for one, _ in told if one is not None}
        return len(lengths) > 1 or len({side for _, side in told if side}) > 1

    def block(self) -> tuple[torch.Tensor, str]:
        """Return the receiver's block, and a note on what was taken for granted.

        It is on the target's device, and of its dtype where it has padding.

        Raises:
            LayoutError: the layouts contradict each other, or do not say enough.
            ReplicasDiffer: senders that should hold the same block do not.
            GraftRefused: padding is to be kept, and a cast to the target's dtype would lose.
        """
        senders, receiver = self._senders(), self._receiver()
        self._check_gradient(senders, receiver)
        plan = senders.plan(receiver, self._rank.world_size)
        made, cast = self._finished(senders.block(receiver, plan), plan)
        self.guesses = plan.guesses
        return made, joined(plan.note, senders.note, cast)

    def _check_gradient(self, senders: Recorded, receiver: Block) -> None:
        """Refuse a gradient that several ranks hold, where each may hold the whole or a summand.

        Their values are alike, and that says nothing of it. Where the senders were several as
        well, and all had the same, it was the whole there.
        """
        declared = self._declared
        is_said = receiver.dims.mesh is not None or gradient_dims(declared.dims)
        if declared.kind != "grad" or is_said:
            return
        axes = open_axes(receiver, self._rank.world_size)
        if receiver.mesh is None and not receiver.dims.axes and self._rank.world_size > 1:
            axes = ["tp"]  # or what it may be called
        for axis in axes:
            sizes = {
                self._recording.world_size if block.mesh is None else dict(block.mesh)[axis][1]
                for block in senders.blocks
                if block.mesh is None or axis in dict(block.mesh)
            }
            if sizes and min(sizes) > 1 and axis not in senders.blocks[0].dims.axes:
                continue
            plain = receiver.dims.text.partition("#")[0].strip()
            raise LayoutError(
                f"of the gradient of {plain!r:.200}, ranks along {axis} may each hold the whole or "
                "a summand, and the dims do not say which",
                f"say it at $receiver's tap: {f'{plain} # grad: {plain}'!r} or "
                f"{with_gradient(receiver.dims, axis)!r}",
            )

    def logical(self) -> torch.Tensor:
        """See `GraftInput.logical`."""
        return self._senders().logical().to(self._target.device)

    def to_local(self, logical: torch.Tensor) -> torch.Tensor:
        """See `GraftInput.to_local`."""
        if not isinstance(logical, torch.Tensor):
            raise TransformError(f"g.to_local got a {type(logical).__name__}, expected a tensor")
        blocks, receiver = self._senders().blocks, self._receiver()
        one = whole(blocks, self._recording.world_size, logical.shape)
        found = plan([one], 1, receiver, self._rank.world_size)
        values = logical.detach().to("cpu")
        made = assemble(found, [one], receiver, lambda rank, share: values, lambda rank: "")
        return self._finished(made, found)[0]

    def _finished(self, made: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, str]:
        """Return a block on the target's device, with its padding, and a note about a cast."""
        made = made.to(self._target.device)
        if not plan.has_padding:
            return made, ""
        made, note = check_replacement(made, self._target)
        return keep_padding(plan, self._target.shape, made, self._target), note

    def _senders(self) -> Recorded:
        return Recorded(
            self._recording,
            self._rows,
            replicas=self._replicas,
            check=self._check,
            plans=self._plans,
        )

    def _receiver(self) -> Block:
        receiver = self._declared
        if not receiver.dims:
            raise LayoutError(
                "the target's tap declares no dims",
                "declare its layout, as in tap(..., dims='b s h[tp]')",
            )
        extras = encode_extras(receiver.extras)[0] if receiver.extras else ""
        dims = layout_of(receiver.dims, receiver.kind)
        return block_of(self._rank.rank, dims, self._target.shape, receiver.mesh, extras)
