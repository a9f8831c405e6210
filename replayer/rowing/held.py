"""What a record holds of its rows: which of them, and which part of their other dims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from recorder.errors import BadRows
from recorder.format.schema import ManifestRow
from recorder.format.shard import Place
from recorder.layouts.blocks import Block, coordinates
from recorder.layouts.dims import Dim, Dims
from recorder.layouts.rowed import Rowed
from recorder.mesh import FrozenMesh
from recorder.tokens.taken import Taken


class Source(Protocol):
    """What records are read from: a `Recording`."""

    @property
    def world_size(self) -> int:
        """The number of ranks of the job that was recorded."""

    def mesh_of(self, row: ManifestRow) -> FrozenMesh | None:
        """Return where the rank of a manifest row stood; None where nobody said."""

    def ids(self, row: ManifestRow, *, check: bool = True) -> tuple[Taken, ...]:
        """Return the ids of a record's rows."""

    def read(self, row: ManifestRow, *, check: bool = True) -> torch.Tensor:
        """Return the tensor of a manifest row."""

    def place_of(self, row: ManifestRow) -> tuple[Path, Place]:
        """Return the shard of a row's payload, and where in it that lies."""

    def read_runs(self, path: Path, into: memoryview, runs: Iterable[tuple[int, int, int]]) -> None:
        """Read runs of a shard's bytes into memory."""


@dataclass(frozen=True)
class Held:
    """What some records hold of a row.

    Attributes:
        dims: the layout with one dim for each group of rows in front.
        mesh: where their ranks stand on the axes over which parts differ.
        shape: the sizes of the other dims.
        alone: the axis that was taken to be that of all ranks, since nobody declared a mesh, and
            how many these are; ("", 0) where somebody did.
    """

    dims: Dims = field(hash=False)
    mesh: FrozenMesh
    shape: tuple[int, ...]
    alone: tuple[str, int] = field(default=("", 0), compare=False)

    @property
    def world_size(self) -> int:
        """How many parts there may be."""
        total = 1
        for _, (_, size) in self.mesh:
            total *= size
        return total

    def with_sums(self) -> Held:
        """Return what the rank holds that holds the sums of partial results."""
        axes = {axis for axis, _ in self.dims.partial}
        places = ((axis, (0 if axis in axes else at, n)) for axis, (at, n) in self.mesh)
        return replace(self, mesh=tuple(places))

    def block(self, rank: int, sizes: Sequence[int]) -> Block:
        """Return it as the block of a rank, of so many rows along each group."""
        return Block(rank, self.dims, (*sizes, *self.shape), self.mesh)


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        row: its manifest row.
        groups: its rows along each group.
        part: the number of its part.
        logged: its number in the log's `rows_from`; None where it is of an earlier attempt.
    """

    row: ManifestRow
    groups: tuple[Rowed, ...]
    part: int
    logged: int | None


def held_by(
    dims: Dims,
    groups: Sequence[Rowed],
    shape: Sequence[int],
    rank: int,
    mesh: FrozenMesh | None,
    world_size: int,
) -> Held:
    """Return which part of its rows a rank holds.

    Cuts of the dims that have rows need not be known, since the ids say more.

    Args:
        dims: its layout.
        groups: its rows.
        shape: its sizes.
        rank: the rank.
        mesh: where it stands.
        world_size: how many ranks its job has.

    Raises:
        LayoutError: nobody says where it stands.
    """
    front = {i for group in groups for i in group.at}
    named = {name for group in groups for name in group.names}
    rest = tuple(dim for i, dim in enumerate(dims.dims) if i not in front)
    sizes = tuple(n for i, n in enumerate(shape) if i not in front)
    own = replace(
        dims,
        dims=rest,
        sizes={name: n for name, n in dims.sizes.items() if name not in named},
        padded=dims.padded - named,
        fills={name: fill for name, fill in dims.fills.items() if name not in named},
    )
    axes = dict.fromkeys(own.axes)
    is_unsaid = mesh is None and dims.mesh is None
    places = coordinates(Block(rank, own, sizes, mesh), world_size) if axes else {}
    return Held(
        replace(
            own,
            text=" ".join(map(str, rest)),  # the same however the dims of rows are written
            dims=(*(Dim((f"rows {g}",)) for g in range(len(groups))), *rest),
            mesh=None,
            shape=None,
            aliases={},
            replicated=frozenset(),  # as all axes are here that cut none of the other dims
            data=frozenset(),
        ),
        tuple(sorted((axis, places[axis]) for axis in axes)),
        sizes,
        (next(iter(axes)), world_size) if axes and is_unsaid and world_size > 1 else ("", 0),
    )


def paired(
    senders: Sequence[tuple[str, ...]],
    receivers: Sequence[tuple[str, ...]],
    sides: tuple[str, str] = ("the baseline", "the target"),
) -> list[tuple[int, int]]:
    """Return which groups of rows belong together, by their names: one on each side do in any case.

    Args:
        senders: the names of one side's groups.
        receivers: the names of the other's.
        sides: what messages call them.

    Raises:
        BadRows: there are several, and none has a name of the other side's.
    """
    if len(senders) == len(receivers) == 1:
        return [(0, 0)]
    known = {names: i for i, names in enumerate(senders)}
    found = [(known[names], j) for j, names in enumerate(receivers) if names in known]
    if not found:
        of_senders, of_receivers = (
            " and ".join(" ".join(names) for names in side) for side in (senders, receivers)
        )
        raise BadRows(
            f"{sides[0]} has rows along {of_senders}, and {sides[1]} along {of_receivers}",
            "call those that belong together the same on both sides",
        )
    return found


def rest_of(record: Record) -> list[int]:
    """Return the sizes of a record's dims that have no rows."""
    front = {i for group in record.groups for i in group.at}
    return [n for i, n in enumerate(record.row["shape"] or []) if i not in front]
