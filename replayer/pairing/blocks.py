"""All ranks' blocks of a key, put together to one tensor on each side.

1. `by_layout` does so once for each part of the data that ranks had of their own (`of_same_data`).
2. `_receiver` finds the dims for both: A's, or B's where only these fit; padding is left out.
3. `variants` are the choices among replicas, where ranks that should hold the same do not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from recorder.errors import BlocksMissing, LayoutError, ShapesDiffer
from recorder.format.schema import ManifestRow
from recorder.layouts.agreeing import Told, check_same, check_sides, told_by, told_in
from recorder.layouts.blocks import Block
from recorder.layouts.dims import BATCH, SEQUENCE, TOKENS, Dim, Dims
from recorder.layouts.plan import Plan, whole
from recorder.logical import Recorded
from recorder.recording import Recording

from .places import of_same_data
from .tensors import Two, of_both

_BATCHED = {BATCH, SEQUENCE}


_MOST_VARIANTS = 64


SIDES = {"senders": "the ranks", "sender": "rank", "rank": "rank", "receiver": "the other side"}
"""What layouts speak of in a diff, where nothing is sent."""


@dataclass(frozen=True)
class _Variant:
    """One choice among replicas: the ranks to read, and what is in them."""

    ranks: tuple[int, ...]
    digests: tuple[str, ...]
    others: frozenset[int] = frozenset()
    """The ranks that hold a block of another choice, and are left out of this one."""
    alike: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Each rank that is read -> the ranks that hold the same in its place."""


class _Blocks:
    """One side's records of a key, at one part of the data.

    Its `LayoutError`s begin with the side's name.
    """

    def __init__(
        self,
        name: str,
        recording: Recording,
        rows: Sequence[ManifestRow],
        check: bool,
        plans: dict[Any, Plan],
        dims: Dims | None = None,
    ) -> None:
        self.name, self.recording, self.rows = name, recording, tuple(rows)
        self.is_declared = dims is not None or all(row["dims"] for row in rows)
        options = {"check": check, "in_part": False, "plans": plans, "dims": dims}
        self._options: dict[str, Any] = options
        self._recorded = self._of(self.rows) if self.is_declared else None

    def _of(self, rows: Sequence[ManifestRow]) -> Recorded:
        with self._worded():
            return Recorded(self.recording, rows, **self._options)

    @contextmanager
    def _worded(self) -> Iterator[None]:
        """Have layouts' errors speak of this side, and not of senders, targets and transforms."""
        try:
            yield
        except BlocksMissing as err:
            told = err.of(self.name, SIDES)
            raise LayoutError(told.fact, f"{told.advice}; leave none out with --filter") from None
        except LayoutError as err:
            raise err.of(self.name, SIDES) from None

    def as_declared_by(self, other: _Blocks) -> _Blocks:
        """Return the one tensor of a job of one rank in the other side's dims, of which it is the
        whole, where a tap says anything of sequences: then padding is told from tokens.
        """
        if self.is_declared or not other.is_declared:
            return self
        (row,), dims = self.rows, other.dims
        shape = tuple(row["shape"] or ())
        if len(dims.dims) != len(shape):
            return self
        with self._worded():
            if told_in(row["extras"] or "", dims) == other.told() == Told():
                return self
        options = (self._options["check"], self._options["plans"], dims.whole(shape))
        return _Blocks(self.name, self.recording, self.rows, *options)

    @property
    def recorded(self) -> Recorded:
        """All of them as blocks of one tensor."""
        assert self._recorded is not None
        return self._recorded

    @property
    def dims(self) -> Dims:
        """Their layout."""
        return self.recorded.blocks[0].dims

    def whole(self) -> Block:
        """Return the tensor's block of a job of one rank."""
        with self._worded():
            return whole(self.recorded.blocks, self.recording.world_size)

    def told(self) -> Told:
        """Return what its extras say of sequences."""
        with self._worded():
            return told_by(self.recorded.blocks, self.dims)

    def plan(self, receiver: Block) -> Plan:
        """Return how they are put together."""
        with self._worded():
            return self.recorded.plan(receiver, 1, as_it_stands=True)

    def read(self) -> torch.Tensor:
        """Return the tensor of the one record there is."""
        (row,) = self.rows
        return self.recording.read(row, check=self._options["check"])

    def variants(self, receiver: Block) -> list[_Variant]:
        """Return a choice among replicas for each of them, just one where all are the same."""
        rows = {row["rank"]: row for row in self.rows}
        held = [ranks for move in self.plan(receiver).moves for ranks in move.ranks]
        if not held:
            return [_Variant(tuple(rows), ())]
        found = []
        for k in range(max(map(len, held))):
            chosen = tuple(rows[ranks[min(k, len(ranks) - 1)]] for ranks in held)
            one = tuple(dict.fromkeys(row["rank"] for row in chosen))
            others = frozenset(rank for ranks in held for rank in ranks).difference(one)
            alike = {
                row["rank"]: tuple(r for r in ranks if rows[r]["digest"] == row["digest"])
                for row, ranks in zip(chosen, held, strict=True)
            }
            digests = tuple(f"{row['dtype']} {row['digest']}" for row in chosen)
            found.append(_Variant(one, digests, others, alike))
        return found if len({one.digests for one in found}) > 1 else found[:1]

    def tensor(self, variant: _Variant, receiver: Block) -> tuple[torch.Tensor, Plan]:
        """Return what a choice among replicas is put together to, and how."""
        with self._worded():
            # Blocks that give nothing, empty ones or all padding, tell where the others begin.
            recorded = self._of([row for row in self.rows if row["rank"] not in variant.others])
            plan = recorded.plan(receiver, 1, as_it_stands=True)
            return recorded.block(receiver, plan), plan


def by_layout(
    a: Recording,
    rows_a: Sequence[ManifestRow],
    b: Recording,
    rows_b: Sequence[ManifestRow],
    *,
    check: bool,
    plans: tuple[dict[Any, Plan], dict[Any, Plan]],
) -> Iterator[Two | LayoutError]:
    """Put together what all ranks recorded of a key, on both sides.

    Args:
        a: the baseline.
        rows_a: its rows of the key, by rank.
        b: the target.
        rows_b: its rows.
        check: hold what is read against its digest.
        plans: plans made before for either side, and to be added to.

    Yields:
        Two tensors, or why there are none of this part of the data.

    Raises:
        DamagedRecording: bytes are not there, or not those that were written.
    """
    try:
        parts = list(of_same_data(a, rows_a, b, rows_b))
    except LayoutError as err:
        yield err
        return
    for part_a, part_b, at in parts:
        all_of_it = len(part_a) == len(rows_a) and len(part_b) == len(rows_b)
        where = at if len(parts) > 1 or not all_of_it else ""
        if not part_a or not part_b:
            side = "A" if part_b else "B"
            yield LayoutError(f"no rank of {side} at {at} recorded it")
            continue
        try:
            yield from _twos(
                _Blocks("A", a, part_a, check, plans[0]),
                _Blocks("B", b, part_b, check, plans[1]),
                where,
            )
        except LayoutError as err:
            yield err.of(where)


def replicas_apart(
    a: Recording,
    rows_a: Sequence[ManifestRow],
    b: Recording,
    rows_b: Sequence[ManifestRow],
    *,
    check: bool,
    plans: dict[Any, Plan],
) -> Iterator[Two]:
    """Put together, of the baseline's replicas that are not the same, one against each other.

    Replicas are ranks that should hold the same: as their dims have it, and but for axes over which
    they had data of their own. Both tensors are the baseline's.

    Args:
        a: the baseline.
        rows_a: its rows of the key, by rank.
        b: the target, which tells which ranks had data of their own.
        rows_b: its rows.
        check: hold what is read against its digest.
        plans: plans made before for the baseline, and to be added to.

    Raises:
        DamagedRecording: bytes are not there, or not those that were written.
    """
    if len({row["digest"] for row in rows_a}) < 2 or not all(row["dims"] for row in rows_a):
        return
    with suppress(LayoutError):  # where blocks cannot be put together, the pair says so
        for part, _, _ in of_same_data(a, rows_a, b, rows_b):
            if len(part) < 2:
                continue
            blocks = _Blocks("A", a, part, check, plans)
            receiver = blocks.whole()
            first, *others = blocks.variants(receiver)
            dim_names = tuple(dim.label for dim in receiver.dims.dims)
            for other in others[:_MOST_VARIANTS]:
                x, y = (blocks.tensor(one, receiver)[0] for one in (first, other))
                yield Two(x, y, dim_names, first.ranks, other.ranks)


def _twos(a: _Blocks, b: _Blocks, where: str) -> Iterator[Two]:
    a, b = a.as_declared_by(b), b.as_declared_by(a)
    if not (a.is_declared and b.is_declared):
        yield from _one_sided(a, b, where)
        return
    receiver, note = _receiver(a, b)
    choices = a.variants(receiver), b.variants(receiver)
    combined = _combined(*choices)
    for one, other in combined[:_MOST_VARIANTS]:
        x, how = a.tensor(one, receiver)
        y, plan = b.tensor(other, receiver)
        taken = [f"{side}: {_of_side(p.note)}" for side, p in (("A", how), ("B", plan)) if p.note]
        said = [where, note, *taken, *_replica_notes(choices, one, other)]
        for side, all_of_it in zip((a, b), choices, strict=True):
            if len(all_of_it) > 1 and side.recorded.is_open_gradient:
                said.append(
                    f"if each rank of {side.name} holds a summand of this gradient, say so at the "
                    f"tap, as in dims={side.recorded.as_summands()!r}"
                )
        dim_names = tuple(dim.label for dim in receiver.dims.dims)
        yield Two(
            x, y, dim_names, one.ranks, other.ranks, "; ".join(filter(None, said)), plan,
            other.alike,
        )  # fmt: skip
    _check_all(combined)


def _of_side(note: str) -> str:
    """Return a plan's note as a diff has it, where nothing is sent."""
    return note.replace("the senders' ranks", "its ranks")


def _check_all(combined: Sequence[Any]) -> None:
    if len(combined) > _MOST_VARIANTS:
        raise LayoutError(
            f"ranks that should hold the same hold {len(combined)} different tensors, of which "
            f"{_MOST_VARIANTS} were compared; if they hold other data, name the axis that tells "
            "them apart in recorder.declare_mesh, and in the dims"
        )


def _one_sided(a: _Blocks, b: _Blocks, where: str) -> Iterator[Two]:
    """Compare a layout with the tensor of a job of one rank, which declares none."""
    declared, plain = (a, b) if a.is_declared else (b, a)
    receiver = declared.whole()
    (row,) = plain.rows
    tensor = plain.read()
    if tuple(tensor.shape) != receiver.shape:
        raise ShapesDiffer(
            f"{declared.name}'s blocks are parts of {list(receiver.shape)}, and {plain.name} has "
            f"{list(tensor.shape)}; declare the dims on both sides"
        )
    choices = declared.variants(receiver)
    distinct = list({variant.digests: variant for variant in reversed(choices)}.values())[::-1]
    for variant in distinct[:_MOST_VARIANTS]:
        made, plan = declared.tensor(variant, receiver)
        two = (made, tensor) if declared is a else (tensor, made)
        ranks = (variant.ranks, (row["rank"],))
        said = [where]
        if len(choices) > 1:
            said.append(_replica_note(declared.name, variant))
        dim_names = tuple(dim.label for dim in receiver.dims.dims)
        ranks_a, ranks_b = ranks if declared is a else ranks[::-1]
        yield Two(
            *two, dim_names, ranks_a, ranks_b, "; ".join(filter(None, said)),
            plan if declared is b else None, variant.alike if declared is b else {},
        )  # fmt: skip
    _check_all(distinct)


def _receiver(a: _Blocks, b: _Blocks) -> tuple[Block, str]:
    """Return the block that both sides' are made into, and a note.

    It has the baseline's dims. Where sequences are padded, it has flattened tokens instead of batch
    and sequence, which leaves the padding out.
    """
    whole_a, whole_b = a.whole(), b.whole()
    told = a.told(), b.told()
    with of_both():
        check_same(*told)
    if TOKENS in a.dims.names:
        return whole_a, ""
    if TOKENS in b.dims.names and set(a.dims.names) >= _BATCHED:
        return whole_b, ""
    if SEQUENCE in a.dims.names and SEQUENCE in b.dims.names:
        lengths = told[0].lengths or told[1].lengths
        real = lengths.real if lengths is not None else ()
        totals = [_tokens(block, real) for block in (whole_a, whole_b)]
        spare = [n - sum(real) for n in totals if n is not None]
        if len(spare) < 2 or (all(spare) and not all(side.side for side in told)):
            with of_both():
                check_sides(*told)
        if len(spare) == 2 and any(spare):
            left_out = " and ".join(
                f"{n} of {total} in {side}"
                for side, n, total in zip("AB", spare, totals, strict=True)
            )
            return _flattened(whole_a, real), f"tokens of padding left out: {left_out}"
    fitting = _fitting(a, b, whole_a, whole_b)
    return (
        fitting,
        "" if fitting is whole_a else f"indices are in B's dims, {whole_b.dims.text!r:.80}",
    )


def _fitting(a: _Blocks, b: _Blocks, whole_a: Block, whole_b: Block) -> Block:
    """Return the whole of A, or of B where only that fits both: declared sizes cut padding off."""
    problem: LayoutError | None = None
    for block in (whole_a, whole_b):
        try:
            if not any(side.plan(block).has_padding for side in (a, b)):
                return block
            problem = problem or ShapesDiffer("a side has padding that the other side has not")
        except LayoutError as err:
            problem = problem or err
    assert problem is not None
    if whole_a.dims.names == whole_b.dims.names and whole_a.shape != whole_b.shape:
        raise ShapesDiffer(
            f"logical shapes {list(whole_a.shape)} in A and {list(whole_b.shape)} in B "
            f"are not equal{_perhaps_cut(a, whole_a, b, whole_b)}"
        ) from None
    raise problem


def _perhaps_cut(a: _Blocks, whole_a: Block, b: _Blocks, whole_b: Block) -> str:
    """Return what to declare where one side's size times its ranks is the other's."""
    for dim, x, y in zip(whole_a.dims.dims, whole_a.shape, whole_b.shape, strict=True):
        for side, small, large in ((a, x, y), (b, y, x)):
            ranks = side.recording.world_size
            if ranks > 1 and small < large == small * ranks:
                return (
                    f"; if {side.name}'s {ranks} ranks hold a part each, write {dim.label}[tp] at "
                    "its tap"
                )
    return ""


def _tokens(block: Block, real: Sequence[int]) -> int | None:
    """Return how many tokens a whole has, padding included, if it can be the sequences'; else None.

    Sequences without a batch stand one behind the other.
    """
    sizes = {
        dim.names: size
        for dim, size in zip(block.dims.dims, block.shape, strict=True)
        if _BATCHED & {*dim.names}
    }
    if sorted(name for names in sizes for name in names) not in ([BATCH, SEQUENCE], [SEQUENCE]):
        return None
    total = math.prod(sizes.values())
    if not real or (BATCH not in block.dims.names and len(real) > 1):
        return total if real and sum(real) <= total else None
    batch = sizes.get((BATCH,), len(real))
    fits = batch == len(real) and total % batch == 0 and max(real) <= total // batch
    return total if fits else None


def _flattened(block: Block, real: Sequence[int]) -> Block:
    """Return a whole block with flattened tokens in place of batch and sequence."""
    dims: list[Dim] = []
    shape: list[int] = []
    for dim, size in zip(block.dims.dims, block.shape, strict=True):
        if not set(dim.names) & _BATCHED:
            dims.append(dim)
            shape.append(size)
        elif Dim((TOKENS,)) not in dims:
            dims.append(Dim((TOKENS,)))
            shape.append(sum(real))
    sizes = {name: n for name, n in block.dims.sizes.items() if name not in _BATCHED}
    made = replace(block.dims, text=f"tokens of {block.dims.text}", dims=tuple(dims), sizes=sizes)
    extras = json.dumps({"seq_lens": list(real)})
    return Block(0, made, tuple(shape), (), extras)


def _combined(of_a: list[_Variant], of_b: list[_Variant]) -> list[tuple[_Variant, _Variant]]:
    """Pair the choices among replicas: k with k where there are as many, else each with the first.

    Of those with the same contents one is kept.
    """
    if len(of_a) == len(of_b):
        pairs = list(zip(of_a, of_b, strict=True))
    else:
        pairs = [(of_a[0], other) for other in of_b] + [(one, of_b[0]) for one in of_a[1:]]
    return list(
        {(one.digests, other.digests): (one, other) for one, other in reversed(pairs)}.values()
    )[::-1]


def _replica_notes(
    choices: tuple[list[_Variant], list[_Variant]], one: _Variant, other: _Variant
) -> list[str]:
    return [
        _replica_note(name, variant)
        for name, all_of_it, variant in (("A", choices[0], one), ("B", choices[1], other))
        if len(all_of_it) > 1
    ]


def _replica_note(name: str, variant: _Variant) -> str:
    ranks = ", ".join(map(str, variant.ranks[:8])) + (", ..." * (len(variant.ranks) > 8))
    return f"{name}'s replicas differ among themselves: this is rank {ranks}"
