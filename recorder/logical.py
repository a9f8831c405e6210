"""The records of one key on all ranks as blocks of one tensor: planned once, read when needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from .errors import DamagedRecording, LayoutError, ReplicasDiffer, UsageError
from .format.payload import parse_dtype
from .format.schema import ManifestRow
from .layouts.assemble import assemble, check_replicas
from .layouts.blocks import Block, coordinates
from .layouts.dims import TOKENS, Dims
from .layouts.lengths import counts_sequences
from .layouts.parse import gradient_dims, layout_of
from .layouts.plan import Plan, plan, whole
from .mesh import PIPELINE, FrozenMesh
from .tags import label

_MOST_PLANS = 256
_MOST_PIECES = 20_000  # a plan of more is not worth its memory
_READ_WHOLE = 1 << 20  # bytes; less than this is read, and checked, in one go


def with_gradient(dims: Dims, axis: str) -> str:
    """Return a layout as it is written where its gradient is partial over an axis."""
    words = [
        dim.label + (f"[{','.join(map(str, dim.cuts))}]" * bool(dim.cuts)) for dim in dims.dims
    ]
    named = next((i for i, dim in enumerate(dims.dims) if dim.names), None)
    if named is not None:
        cuts = [*map(str, dims.dims[named].cuts), f"{axis}:partial"]
        words[named] = f"{dims.dims[named].label}[{','.join(cuts)}]"
    return f"{dims.text.partition('#')[0].strip()} # grad: {' '.join(words)}"


def open_axes(block: Block, world_size: int) -> list[str]:
    """Return the axes along which ranks hold the same, as far as a layout says.

    An axis may be another's second name, as sequence parallelism's is tensor parallelism's: where
    there are more places on all axes than ranks, one that is cut stands for those at its place.
    """
    known = {**dict(block.mesh or ()), **(block.dims.mesh or {})}
    has_data = bool({"b", TOKENS} & {*block.dims.names})  # else they are replicas along dp too
    over = {*block.dims.axes, PIPELINE, *(block.dims.data if has_data else ())}
    if math.prod(n for _, n in known.values()) > world_size:
        cut = {known[axis] for axis in block.dims.axes if axis in known}
        over |= {axis for axis, place in known.items() if place in cut}
    return sorted(axis for axis, (_, n) in known.items() if n > 1 and axis not in over)


def block_of(
    rank: int, dims: Dims, shape: Sequence[int], mesh: FrozenMesh | None, extras: str | None
) -> Block:
    """Return what is known of one rank's tensor; extras that say nothing of it are left out."""
    may_say = counts_sequences(dims) or not dims.is_named  # the other side may name them
    return Block(rank, dims, tuple(shape), mesh, (extras or "") if may_say else "")


class Source(Protocol):
    """What records are read from: a `Recording`."""

    @property
    def world_size(self) -> int:
        """The number of ranks of the job that was recorded."""

    def mesh_of(self, row: ManifestRow) -> FrozenMesh | None:
        """Return where the rank of a manifest row stood; None where nobody said."""

    def read(self, row: ManifestRow, *, check: bool = True) -> torch.Tensor:
        """Return the tensor of a manifest row."""


class Recorded:
    """Records of one key.

    Args:
        recording: the recording.
        rows: their manifest rows, by rank.
        at: axis -> coordinate: leave out ranks that stand elsewhere.
        replicas: what to do with ranks that should hold the same and do not, see `assemble`.
        check: whether to hold what is read whole against its digest.
        in_part: whether to leave out of that a large tensor of which little is needed.
        plans: plans made before, and to be added to.
        dims: the layout of records that declare none.

    Raises:
        LayoutError: a layout that was declared cannot be read, or none was.
        DamagedRecording: a row contradicts itself.
        UsageError: `replicas` is no choice, or no rank stands where `at` says.
    """

    def __init__(
        self,
        recording: Source,
        rows: Sequence[ManifestRow],
        *,
        at: Mapping[str, int] | None = None,
        replicas: str = "error",
        check: bool = True,
        in_part: bool = True,
        plans: dict[Any, Plan] | None = None,
        dims: Dims | None = None,
    ) -> None:
        self._dims = dims
        self._is_in_part = in_part
        self._recording = recording
        self._rows = {row["rank"]: row for row in rows}
        self._replicas = check_replicas(replicas)
        self._check = check
        self._plans: dict[Any, Plan] = {} if plans is None else plans
        self._in_part: list[int] = []
        self.blocks = [self._block(row) for row in rows]
        if at:
            self._keep(at)

    def _block(self, row: ManifestRow) -> Block:
        if not row["dims"] and self._dims is None:
            raise LayoutError(
                f"{label(row['name'], row['tags'])} was recorded on rank {row['rank']} without "
                "dims",
                "declare its layout at the tap, as in tap(..., dims='b s h[tp]')",
            )
        nbytes = math.prod(row["shape"] or ()) * parse_dtype(row["dtype"], "the manifest").itemsize
        if nbytes != row["nbytes"]:
            raise DamagedRecording(
                "the manifest",
                f"{label(row['name'], row['tags'])} of {nbytes} bytes is said to have "
                f"{row['nbytes']}",
            )
        dims = layout_of(row["dims"], row["kind"]) if row["dims"] else self._dims
        assert dims is not None
        mesh = self._recording.mesh_of(row)
        return block_of(row["rank"], dims, row["shape"] or (), mesh, row["extras"])

    def _keep(self, at: Mapping[str, int]) -> None:
        places = [coordinates(block, self._recording.world_size) for block in self.blocks]
        for axis in at:
            if not any(axis in one for one in places):
                known = ", ".join(sorted({axis for one in places for axis in one})) or "none"
                raise UsageError(f"no rank stands on an axis {axis!r}; the axes are {known}")
        self.blocks = [
            block
            for block, one in zip(self.blocks, places, strict=True)
            if all(axis in one and one[axis][0] == k for axis, k in at.items())
        ]
        if not self.blocks:
            raise UsageError(f"no rank that recorded it stands at {dict(at)}")

    @property
    def world_size(self) -> int:
        """How many ranks recorded."""
        return self._recording.world_size

    @property
    def note(self) -> str:
        """What to know of how the latest block was read, "" where there is nothing."""
        if not self._in_part:
            return ""
        ranks = ", ".join(map(str, self._in_part[:8])) + (", ..." * (len(self._in_part) > 8))
        return f"read in part, without their digests: sender rank {ranks}"

    def logical(self) -> torch.Tensor:
        """Return the whole tensor; see `Recording.load_logical`."""
        receiver = whole(self.blocks, self.world_size)
        return self.block(receiver, self.plan(receiver, 1, as_it_stands=True))

    def block(self, receiver: Block, plan: Plan) -> torch.Tensor:
        """Return a receiver's block, on the CPU, its padding zero.

        Args:
            receiver: what is known of it.
            plan: what to copy for it.
        """
        self._in_part = []
        try:
            return assemble(
                plan,
                self.blocks,
                receiver,
                self._read,
                lambda rank: f"{self._rows[rank]['dtype']} {self._rows[rank]['digest']}",
                self._replicas,
            )
        except ReplicasDiffer as err:
            if len({dict(block.mesh or ()).get(PIPELINE) for block in self.blocks}) > 1:
                raise ReplicasDiffer(
                    f"several stages of the pipeline recorded it; {err.fact}",
                    "if each numbers its layers from 0, tag the global one at the tap: "
                    "layer=recorder.global_layer(i)",
                ) from None
            if not self.is_open_gradient:
                raise
            raise ReplicasDiffer(
                err.fact,
                "if each holds a summand of the gradient, say so at the tap, as in "
                f"dims={self.as_summands()!r}",
            ) from None

    @property
    def is_open_gradient(self) -> bool:
        """Whether these are gradients of which nobody says how they are laid out."""
        first = self._rows[self.blocks[0].rank]
        said = self.blocks[0].dims.mesh is not None or gradient_dims(first["dims"] or "")
        return first["kind"] == "grad" and not said

    def as_summands(self) -> str:
        """Return the layout as written where each rank holds a summand of the gradient."""
        block = self.blocks[0]
        return with_gradient(block.dims, next(iter(open_axes(block, self.world_size)), "tp"))

    def plan(self, receiver: Block, world_size: int, *, as_it_stands: bool = False) -> Plan:
        """Return what to copy for a receiver.

        Args:
            receiver: what is known of it.
            world_size: how many ranks its job has.
            as_it_stands: whether batches are copied index by index, wherever padding stands.
        """
        key = (*map(_key, (receiver, *self.blocks)), world_size, as_it_stands)
        found = self._plans.get(key)
        if found is None:
            found = plan(
                self.blocks, self.world_size, receiver, world_size, as_it_stands=as_it_stands
            )
            if found.pieces <= _MOST_PIECES:
                while len(self._plans) >= _MOST_PLANS:
                    self._plans.pop(next(iter(self._plans)), None)
                self._plans[key] = found
        return found

    def _read(self, rank: int, share: float) -> torch.Tensor:
        """Return a rank's tensor; where little of a large one is needed, the rest is not read."""
        row = self._rows[rank]
        in_part = self._is_in_part and share < 0.5 and row["nbytes"] >= _READ_WHOLE
        if in_part and self._check:
            self._in_part.append(rank)
        return self._recording.read(row, check=self._check and not in_part)


def _key(block: Block) -> tuple[Any, ...]:
    """Return what a plan depends on of a block; its text says all of a layout but for gradients."""
    dims = block.dims
    return block.rank, dims.text, dims.partial, block.shape, block.mesh, block.extras
