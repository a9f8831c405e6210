"""Two tensors to compare, and which ranks hold which part of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from recorder.errors import LayoutError, ShapesDiffer
from recorder.format.schema import ManifestRow
from recorder.layouts.agreeing import check_taps
from recorder.layouts.parse import layout_of
from recorder.layouts.plan import Plan
from recorder.recording import Recording

_BOTH = {"senders": "A's ranks", "receiver": "B"}


@contextmanager
def of_both() -> Iterator[None]:
    """Have errors about senders and a receiver speak of A and B."""
    try:
        yield
    except LayoutError as err:
        raise err.of("", _BOTH) from None


@dataclass
class Two:
    """Two tensors to compare.

    Attributes:
        a: the baseline's, on the CPU.
        b: the target's, of the same shape.
        dim_names: what each dim is called; a number where nobody says.
        ranks_a: the ranks that were read of the baseline.
        ranks_b: of the target.
        note: what to know of them, "" where there is nothing.
        plan: how the target's were put together, None where they were not.
        alike: each of the target's ranks that were read -> the ranks that hold the same.
    """

    a: torch.Tensor
    b: torch.Tensor
    dim_names: tuple[str, ...]
    ranks_a: tuple[int, ...]
    ranks_b: tuple[int, ...]
    note: str = ""
    plan: Plan | None = field(default=None, repr=False)
    alike: Mapping[int, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def rank_at(self, index: Sequence[int] | None) -> int:
        """Return the target's rank that holds an element; its first where there is none."""
        if index is None or self.plan is None:
            return self.ranks_b[0]
        places = []
        for pair in self.plan.pairs:
            at = 0
            for j in pair.receivers:
                at = at * self.a.shape[j] + index[j]
            places.append(at)
        for move in self.plan.moves:
            if all(
                any(piece.into <= at < piece.into + piece.length for piece in pieces)
                for at, pieces in zip(places, move.pieces, strict=True)
            ):
                return move.ranks[0][0]
        return self.ranks_b[0]

    def parts(self) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Yield what each of the target's ranks holds: the ranks, and both sides' elements."""
        if self.plan is None or len(self.plan.moves) < 2:
            held = {r for rank in self.ranks_b for r in self.alike.get(rank, (rank,))}
            yield sorted(held), self.a, self.b
            return
        order = [j for pair in self.plan.pairs for j in pair.receivers]
        rest = [j for j in range(self.a.dim()) if j not in order]
        sizes = [math.prod(self.a.shape[j] for j in pair.receivers) for pair in self.plan.pairs]
        grouped = [t.permute([*order, *rest]).reshape(sizes) for t in (self.a, self.b)]
        for move in self.plan.moves:
            one, other = grouped
            for dim, pieces in enumerate(move.pieces):
                if len(pieces) == 1 and pieces[0].length == sizes[dim]:
                    continue
                index = torch.cat(
                    [torch.arange(p.into, p.into + p.length, device="cpu") for p in pieces]
                )
                one, other = one.index_select(dim, index), other.index_select(dim, index)
            held = {
                r for ranks in move.ranks for rank in ranks for r in self.alike.get(rank, (rank,))
            }
            yield sorted(held), one, other


def by_rank(
    a: Recording, row_a: ManifestRow, b: Recording, row_b: ManifestRow, *, check: bool = True
) -> Two:
    """Read one record of each side.

    Raises:
        DamagedRecording: the bytes are not there, or not those that were written.
        ShapesDiffer: the shapes are unequal.
        LayoutError: their taps contradict each other on the sequences in them.
    """
    sides = [(row["extras"] or "", row["dims"], row["kind"]) for row in (row_a, row_b)]
    if any(extras for extras, _, _ in sides):
        told = [(text, layout_of(dims, kind) if dims else None) for text, dims, kind in sides]
        with of_both():
            check_taps(*told)
    one, other = a.read(row_a, check=check), b.read(row_b, check=check)
    if one.shape != other.shape:
        raise ShapesDiffer(f"shapes {list(one.shape)} and {list(other.shape)} are not equal")
    return Two(one, other, _numbers(one), (row_a["rank"],), (row_b["rank"],))


def _numbers(tensor: torch.Tensor) -> tuple[str, ...]:
    return tuple(map(str, range(tensor.dim())))
