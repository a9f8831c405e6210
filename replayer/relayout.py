"""The transform that both sides' layouts are enough for: sharded, to logical, to sharded.

1. `Relayout.decides` says whether both sides declare a layout, and not just the same. A job of one
   rank holds whole tensors, and need declare none.
2. `Relayout.same_for_all` is the sender whose tensor stands for those of all, where none is cut.
3. `Relayout.block` is what is grafted where no transform is named; `logical` and `to_local` are the
   two halves of it, for transforms of one's own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from recorder.errors import LayoutError, TransformError
from recorder.format.schema import ManifestRow
from recorder.layouts.agreeing import Told, check_taps, told_in
from recorder.layouts.assemble import assemble, keep_padding
from recorder.layouts.blocks import Block
from recorder.layouts.dims import TOKENS, Dims
from recorder.layouts.parse import gradient_dims, layout_of
from recorder.layouts.plan import Plan, plan, undeclared, whole
from recorder.logical import Recorded, block_of, open_axes, with_gradient
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
        """Whether both sides' layouts are known, and not ones that identity by rank follows.

        Two jobs of as many ranks whose ranks declare the same, and neither of them where they
        stand, have the same blocks on the same ranks, if all are alike and have no padding; or if
        nothing is cut, so that a rank with another shape had data of its own. Taps that contradict
        each other are decided too: `block` refuses them.
        """
        if self._has_whole_sender or self._is_whole_receiver:
            return True
        if self._is_undecided():
            return self._is_contradicted()
        if self._is_padded() or not self._is_same_by_rank():
            return True
        return self._says_of_sequences()

    def _is_undecided(self) -> bool:
        """Whether identity by rank is all there is: no layout, or ranks on axes of no mesh."""
        receiver = self._declared
        if not (receiver.dims and self._are_declared):
            return True
        if self._is_padded() or not self._is_same_by_rank():
            return False
        return len({*layout_of(receiver.dims, receiver.kind).axes}) > 1

    def _is_same_by_rank(self) -> bool:
        """Whether the sender at the target's rank has its block, as far as layouts tell."""
        receiver, senders = self._declared, self._at_rank
        return (
            receiver.mesh is None
            and self._recording.world_size == self._rank.world_size
            and len(senders) == 1
            and senders[0]["dims"] == receiver.dims
            and self._is_alike(senders[0])
            and all(self._recording.mesh_of(row) is None for row in self._rows)
        )

    @property
    def _at_rank(self) -> list[ManifestRow]:
        return [row for row in self._rows if row["rank"] == self._rank.rank]

    @property
    def _giving(self) -> Sequence[ManifestRow]:
        """The rows that may have the target's data: where nothing is cut, that of its own rank."""
        receiver = self._declared
        if not (receiver.dims and self._are_declared) or not self._is_same_by_rank():
            return self._rows
        dims = layout_of(receiver.dims, receiver.kind)
        return self._rows if dims.axes or TOKENS in dims.names else self._at_rank

    @property
    def _are_declared(self) -> bool:
        return all(row["dims"] for row in self._rows)

    @property
    def _has_whole_sender(self) -> bool:
        """Whether the only sender declares nothing and several receivers do: it has the whole."""
        one = self._recording.world_size == 1 < self._rank.world_size
        return one and not self._are_declared and bool(self._declared.dims)

    @property
    def _is_whole_receiver(self) -> bool:
        """Whether the only receiver declares nothing and several senders do: it has the whole."""
        one = self._rank.world_size == 1 < self._recording.world_size
        return one and self._are_declared and not self._declared.dims

    def same_for_all(self) -> ManifestRow | None:
        """Return the record that all receivers take, None where there is none.

        Without layouts, where one side has one rank, and all senders hold one and the same tensor
        of the target's shape. Of gradients each may be a summand.
        """
        declared, rows = self._declared, self._rows
        worlds = self._recording.world_size, self._rank.world_size
        if declared.kind == "grad" or worlds[0] == worlds[1] or 1 not in worlds:
            return None
        held = {(row["digest"], row["dtype"], tuple(row["shape"] or ())) for row in rows}
        if len(held) > 1 or len(rows) < self._recording.world_size:
            return None
        if tuple(rows[0]["shape"] or ()) != tuple(self._target.shape):
            return None
        known = [dims for dims in (declared.dims, *(row["dims"] for row in rows)) if dims]
        if any(layout_of(dims, declared.kind).axes for dims in known):
            return None
        if worlds[1] > 1:
            self.guesses = (
                "no dims say how it is cut, and the one sender's tensor was taken to be that of "
                f"all {worlds[1]} ranks; where ranks have data of their own, declare dims, and the "
                "axis that tells them apart in recorder.declare_mesh"
            )
        return rows[0]

    def lacking(self) -> str:
        """Return what to declare so that the blocks are known, "" where nothing is lacking."""
        senders, receivers = self._recording.world_size, self._rank.world_size
        if self._declared.dims and self._are_declared:
            return ""
        shapes = [list(self._rows[0]["shape"] or ()), list(self._target.shape)]
        sender_dims = next((row["dims"] for row in self._rows if row["dims"]), "")
        known = self._declared.dims or sender_dims or _guessed(*shapes)
        if self._declared.dims:
            fact, where = "the baseline's tap declares no dims", "there, and record it again"
        elif self._are_declared:
            fact, where = "the target's tap declares no dims", "there"
        else:
            fact = "neither tap declares dims"
            if senders == 1:
                where = "at the target's tap, as a single sender has the whole"
            elif receivers == 1:
                where = "at the baseline's tap, and record it again"
            else:
                where = "at the taps of both sides, and record it again"
        return f"{fact}: say how it is cut {where}, as in dims={known!r}"

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

    def _says_of_sequences(self) -> bool:
        """Whether a tap says anything of sequences in a batch, so that tokens are told apart."""
        try:
            dims = layout_of(self._declared.dims, self._declared.kind)
            texts = {self._extras, *(row["extras"] or "" for row in self._giving)}
            return any(told_in(text, dims) != Told() for text in texts)
        except LayoutError:
            return True  # and says so

    def _is_contradicted(self) -> bool:
        try:
            self._check_sequences()
        except LayoutError:
            return True
        return False

    def _check_sequences(self) -> None:
        """Refuse taps that contradict each other on their sequences, whatever they declare.

        Raises:
            LayoutError: they do.
        """
        kind, declared, rows = self._declared.kind, self._declared.dims, self._rows
        if self._recording.world_size == self._rank.world_size:
            rows = self._at_rank  # others may have data of their own
        for row in rows:
            if row["extras"] or self._extras:
                one, other = (layout_of(d, kind) if d else None for d in (row["dims"], declared))
                check_taps((row["extras"] or "", one), (self._extras, other))

    @functools.cached_property
    def _extras(self) -> str:
        """What the target's tap says, as JSON."""
        return encode_extras(self._declared.extras)[0] if self._declared.extras else ""

    def block(self) -> tuple[torch.Tensor, str]:
        """Return the receiver's block, and a note on what was taken for granted.

        It is on the target's device, and of its dtype where it has padding.

        Raises:
            LayoutError: the layouts contradict each other, or do not say enough.
            ReplicasDiffer: senders that should hold the same block do not.
            GraftRefused: padding is to be kept, and a cast to the target's dtype would lose.
        """
        if not (self._has_whole_sender or self._is_whole_receiver) and self._is_undecided():
            self._check_sequences()
        senders, receiver = self._senders(self._giving), self._receiver()
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
        if not one.extras and one.shape == whole(blocks, self._recording.world_size).shape:
            # Padding is where the senders have it.
            one = replace(one, extras=next((b.extras for b in blocks if b.extras), ""))
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

    def _senders(self, rows: Sequence[ManifestRow] | None = None) -> Recorded:
        dims = None
        if self._has_whole_sender:
            declared = self._declared
            shape = tuple(self._rows[0]["shape"] or ())
            dims = layout_of(declared.dims, declared.kind)
            self._check_number(dims, shape, "the record")
            dims = dims.whole(shape)
        return Recorded(
            self._recording,
            self._rows if rows is None else rows,
            dims=dims,
            replicas=self._replicas,
            check=self._check,
            plans=self._plans,
        )

    @staticmethod
    def _check_number(dims: Dims, shape: tuple[int, ...], whose: str) -> None:
        if len(dims.dims) != len(shape):
            raise LayoutError(
                f"the dims {dims.text!r:.200} name {len(dims.dims)}, and {whose} of the one rank, "
                f"which declares none, has the shape {list(shape)}",
                "declare its dims too",
            )

    def _receiver(self) -> Block:
        receiver = self._declared
        if self._is_whole_receiver:
            shape = tuple(self._target.shape)
            blocks = self._senders().blocks
            self._check_number(blocks[0].dims, shape, "the target")
            found = whole(blocks, self._recording.world_size)
            if found.shape != shape:
                world = self._recording.world_size
                advice = undeclared(blocks[0], range(len(shape)), world, "$senders'")
                raise LayoutError(
                    f"the senders' blocks are parts of {list(found.shape)}, and the target, which "
                    f"declares no dims, has {list(shape)}",
                    f"{advice}, else mend the dims at the baseline's tap"
                    if advice
                    else "declare its dims, or mend those at the baseline's tap",
                )
            known = block_of(self._rank.rank, found.dims, shape, receiver.mesh, self._extras)
            return known if known.extras else replace(found, rank=self._rank.rank)
        if not receiver.dims:
            raise LayoutError(
                "the target's tap declares no dims",
                "declare its layout, as in tap(..., dims='b s h[tp]')",
            )
        dims = layout_of(receiver.dims, receiver.kind)
        return block_of(self._rank.rank, dims, self._target.shape, receiver.mesh, self._extras)


def _guessed(sender: Sequence[int], receiver: Sequence[int]) -> str:
    """Return dims as they may be, those cut whose sizes differ."""
    if len(sender) != len(receiver):
        return "b s h[tp]"
    names = {3: "bsd", 4: "bshd"}.get(len(sender), "abcdefghijklmnopqrstuvwxyz")
    return " ".join(
        name + "[tp]" * (one != other)
        for name, one, other in zip(names, sender, receiver, strict=False)
    )
