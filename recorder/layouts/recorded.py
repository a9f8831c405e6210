"""The records of one key on all ranks as blocks of one tensor: planned once, read when needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import LayoutError, UsageError
from ..tags import label
from .assemble import REPLICAS, assemble
from .blocks import Block, lengths_of
from .dims import TOKENS, parse_dims
from .plan import Plan, plan, whole

if TYPE_CHECKING:
    from ..format.recording import Recording

_MOST_PLANS = 4_096
_READ_WHOLE = 1 << 20  # bytes; less than this is read, and checked, in one go


class Recorded:
    """Records of one key.

    Args:
        recording: the recording.
        rows: their manifest rows, by rank.
        at: axis -> coordinate: leave out ranks that stand elsewhere.
        replicas: what to do with ranks that should hold the same and do not, see `assemble`.
        check: whether to hold what is read whole against its digest.
        plans: plans made before, and to be added to.

    Raises:
        LayoutError: a layout that was declared cannot be read, or none was.
        UsageError: `replicas` is none of the choices.
    """

    def __init__(
        self,
        recording: Recording,
        rows: Sequence[dict[str, Any]],
        *,
        at: Mapping[str, int] | None = None,
        replicas: str = "error",
        check: bool = True,
        plans: dict[Any, Plan] | None = None,
    ) -> None:
        if replicas not in REPLICAS:
            raise UsageError(f"replicas is {replicas!r}; choose one of {', '.join(REPLICAS)}")
        self._recording = recording
        self._rows = {row["rank"]: row for row in rows}
        self._replicas = replicas
        self._check = check
        self._plans = {} if plans is None else plans
        self.in_part: list[int] = []
        self.blocks = [self._block(row) for row in rows]
        for axis, k in (at or {}).items():
            self.blocks = [b for b in self.blocks if dict(b.mesh or ()).get(axis, (k, 1))[0] == k]
        if not self.blocks:
            raise LayoutError(f"no rank that recorded it stands at {dict(at or {})}")

    def _block(self, row: dict[str, Any]) -> Block:
        if not row["dims"]:
            raise LayoutError(
                f"{label(row['name'], row['tags'])} was recorded on rank {row['rank']} without "
                "dims; declare its layout at the tap, as in tap(..., dims='b s h[tp]')"
            )
        dims = parse_dims(row["dims"])
        extras = row["extras"]
        return Block(
            row["rank"],
            dims,
            tuple(row["shape"] or ()),
            self._recording.mesh_of(row),
            lengths_of(json.loads(extras)) if extras and counts_tokens(dims.names) else None,
        )

    @property
    def note(self) -> str:
        """What to know of how the latest block was read, "" where there is nothing."""
        if not self.in_part:
            return ""
        ranks = ", ".join(map(str, self.in_part[:8])) + (", ..." if len(self.in_part) > 8 else "")
        return f"read in part, without their digests: sender rank {ranks}"

    def logical(self) -> torch.Tensor:
        """Return the whole tensor; see `Recording.load_logical`."""
        return self.block(whole(self.blocks, self._recording.world_size), 1)

    def block(
        self, receiver: Block, world_size: int, target: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return a receiver's block, on the CPU.

        Args:
            receiver: what is known of it.
            world_size: how many ranks its job has.
            target: what it holds now, for its padding.
        """
        self.in_part = []
        return assemble(
            self.plan(receiver, world_size),
            self.blocks,
            receiver,
            self._read,
            lambda rank: str(self._rows[rank]["digest"]),
            target=target,
            replicas=self._replicas,
        )

    def plan(self, receiver: Block, world_size: int) -> Plan:
        """Return what to copy for a receiver."""
        key = (
            tuple((b.rank, b.dims.text, b.shape, b.mesh, b.lengths) for b in self.blocks),
            (receiver.rank, receiver.dims.text, receiver.shape, receiver.mesh, receiver.lengths),
            world_size,
        )
        found = self._plans.get(key)
        if found is None:
            found = plan(self.blocks, self._recording.world_size, receiver, world_size)
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = found
        return found

    def _read(self, rank: int, share: float) -> torch.Tensor:
        """Return a rank's tensor; where little of a large one is needed, the rest is not read."""
        row = self._rows[rank]
        in_part = share < 0.5 and row["nbytes"] >= _READ_WHOLE
        if in_part:
            self.in_part.append(rank)
        return self._recording.read(row, check=self._check and not in_part)


def counts_tokens(names: Sequence[str]) -> bool:
    """Whether a layout with these names needs to know the sequences' lengths."""
    return TOKENS in names or {"b", "s"} <= set(names)
