"""The transform that both sides' layouts are enough for: sharded, to logical, to sharded.

1. `Relayout.is_declared` says whether both sides declare a layout.
2. `Relayout.block` is what is grafted where no transform is named; `logical` and `to_local` are the
   two halves of it, for transforms of one's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from recorder.capture import encode_extras
from recorder.errors import LayoutError
from recorder.format.recording import Recording
from recorder.layouts.assemble import assemble
from recorder.layouts.blocks import Block, lengths_of
from recorder.layouts.dims import parse_dims
from recorder.layouts.mesh import FrozenMesh
from recorder.layouts.plan import plan
from recorder.layouts.recorded import Recorded, counts_tokens
from recorder.ranks import Rank

from .notes import joined

if TYPE_CHECKING:
    from recorder.layouts.plan import Plan


@dataclass(frozen=True)
class Declared:
    """What the target's tap says of its tensor: layout, extras, and where the rank stands."""

    dims: str
    extras: Mapping[str, Any] | None
    mesh: FrozenMesh


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
    """

    def __init__(
        self,
        recording: Recording,
        rows: Sequence[dict[str, Any]],
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
        self._options: dict[str, Any] = {"replicas": replicas, "check": check, "plans": plans}

    @property
    def is_declared(self) -> bool:
        """Whether both sides declare a layout that says more than that they are the same.

        Two jobs of as many ranks that declare the same dims, and neither of them where its ranks
        stand, have the same blocks on the same ranks: that is identity by rank.
        """
        ours = self._declared
        if not (ours.dims and all(row["dims"] for row in self._rows)):
            return False
        mine = [row for row in self._rows if row["rank"] == self._rank.rank]
        return not (
            ours.mesh is None
            and self._recording.world_size == self._rank.world_size
            and len(mine) == 1
            and list(self._target.shape) == mine[0]["shape"]
            and all(
                row["dims"] == ours.dims and self._recording.mesh_of(row) is None
                for row in self._rows
            )
            and "DTensor [" not in ours.dims
        )

    def block(self, facts: dict[str, Any]) -> torch.Tensor:
        """Return the receiver's block, on its device.

        Args:
            facts: log columns; a note is added where something was taken for granted.

        Raises:
            LayoutError: the layouts contradict each other, or do not say enough.
            ReplicasDiffer: senders that should hold the same block do not.
        """
        senders, receiver = self._senders(), self._receiver()
        found = senders.block(receiver, self._rank.world_size, self._target)
        note = senders.plan(receiver, self._rank.world_size).note
        facts["message"] = joined(facts.get("message"), note, senders.note)
        return found.to(self._target.device)

    def logical(self) -> torch.Tensor:
        """See `GraftInput.logical`."""
        return self._senders().logical().to(self._target.device)

    def to_local(self, logical: torch.Tensor) -> torch.Tensor:
        """See `GraftInput.to_local`."""
        whole = Block(0, self._senders().blocks[0].dims.whole(), tuple(logical.shape), ())
        receiver = self._receiver()
        return assemble(
            plan([whole], 1, receiver, self._rank.world_size),
            [whole],
            receiver,
            lambda rank, share: logical.detach().to("cpu"),
            lambda rank: "",
            target=self._target,
        ).to(self._target.device)

    def _senders(self) -> Recorded:
        return Recorded(self._recording, self._rows, **self._options)

    def _receiver(self) -> Block:
        ours = self._declared
        if not ours.dims:
            raise LayoutError(
                "the target's tap declares no dims; declare its layout, as in "
                "tap(..., dims='b s h[tp]')"
            )
        dims = parse_dims(ours.dims)
        lengths = None
        if ours.extras and counts_tokens(dims.names):
            lengths = lengths_of(json.loads(encode_extras(ours.extras)[0] or "{}"))
        return Block(self._rank.rank, dims, tuple(self._target.shape), ours.mesh, lengths)
