"""Make the tensor that replaces a tapped one row by row: ids -> records -> rows -> transform.

1. `RowReplacements.aligned` puts a tap's rows beside the baseline's, where both sides have ids.
2. `RowReplacements.make` takes what was recorded of each, and says what is amiss with choices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from recorder.capture import dims_text
from recorder.errors import GraftError, LayoutError, TransformError, is_from_the_job
from recorder.format.schema import ManifestRow
from recorder.layouts.parse import layout_of
from recorder.layouts.rowed import rowed
from recorder.mesh import FrozenMesh
from recorder.ranks import Rank
from recorder.recording import Recording
from recorder.sizes import count
from recorder.tags import canonical, key_tags, label
from recorder.taps.call import Call
from recorder.taps.rows import Ids, check_meant
from recorder.taps.selection import Selected

from . import graft, routing
from .log import OwnRow, joined
from .match import Matcher
from .measuring.choice import is_choice
from .own import Own
from .replaced import Replacement, applied, measured, own_measured
from .rowing.aligned import Aligned
from .rowing.match import RowMatcher
from .rowing.places import real_rows
from .transforms import GraftInput, Transform

if TYPE_CHECKING:
    from .settings import ReplaySettings


_ELSEWHERE = (
    "taken from another step, though step {step} of the recording has them too, with other bits; "
    "if the weights or something else changed in between, match on the step too, as with "
    "--match-on name,step"
)


@dataclass
class RowReplacements:
    """Makes replacements for one receiver rank, of taps whose rows both sides tell.

    Attributes:
        recording: as all but the last, of `Replacements`.
        matcher: see there.
        transform: see there.
        rank: see there.
        settings: see there.
        warn: see there.
        own: measures what the receiver computed by itself.
    """

    recording: Recording
    matcher: Matcher
    transform: Transform | TransformError | None
    rank: Rank
    settings: ReplaySettings
    warn: Callable[[Selected, str, str], None]
    own: Own

    def __post_init__(self) -> None:
        self._row_matcher = RowMatcher(
            self.recording,
            self.matcher,
            check=self.settings.check,
            is_last=self.settings.replicas == "last",
        )
        self._told: set[str] = set()  # names of which rows are said to be of another step

    def aligned(
        self,
        call: Call,
        selected: Selected,
        target: torch.Tensor,
        kind: str,
        placements: str,
        mesh: FrozenMesh | None,
        ids: Sequence[Ids],
    ) -> Aligned | None:
        """Return the rows of a tap beside the baseline's; None where not both sides have ids.

        Args:
            call: the tap.
            selected: its key.
            target: the tensor to be replaced, a DTensor's local part.
            kind: `tensor` or `grad`.
            placements: a DTensor's, as text.
            mesh: where the rank stood at the tap.
            ids: those that hold for it.

        Raises:
            LayoutError: nobody says which part of its rows a rank holds.
            BadRows: the ids cannot be read, or are not as many as its rows.
            ReplayError: taps are matched by order.
            DamagedRecording: the baseline's ids are not there.
        """
        if not ids:
            return None
        if not self._row_matcher.has_any:
            return None
        dims = layout_of(dims_text(call.dims, placements), kind)
        groups = rowed(dims, target.shape, [one.taken() for one in ids])
        check_meant(ids, [group.names for group in groups], call.dims)
        if not groups:
            return None
        records = self._row_matcher.find(selected, kind, [group.names for group in groups])
        if records is None:
            return None
        return Aligned(
            self.recording,
            records,
            groups,
            dims,
            target,
            mesh,
            self.rank,
            replicas=self.settings.replicas,
            check=self.settings.check,
            step=self._own_step(selected),
        )

    def _own_step(self, selected: Selected) -> int | None:
        """Return the recorded step of a tap's own, where it may be told that rows are another's."""
        is_chosen = self.settings.replicas not in ("error", "first")
        if is_chosen or self.matcher.match_on.rows_use_step or selected.key.name in self._told:
            return None
        return selected.key.step + self.matcher.step_offset

    def looked_for(
        self, call: Call, target: torch.Tensor, kind: str, placements: str, ids: Sequence[Ids]
    ) -> int | None:
        """Return how many rows a tap has, padding left out; None where no ids tell them apart.

        Args:
            call: as all others, what `aligned` is given.
            target: see there.
            kind: see there.
            placements: see there.
            ids: see there.
        """
        if not ids:
            return None
        try:
            dims = layout_of(dims_text(call.dims, placements), kind)
            groups = rowed(dims, target.shape, [one.taken() for one in ids])
        except LayoutError:  # ids that nobody needs are no error
            return None
        return math.prod(len(real_rows(one.ids)) for one in groups) if groups else None

    def make(
        self, call: Call, selected: Selected, target: torch.Tensor, kind: str, aligned: Aligned
    ) -> Replacement:
        """Return the tensor to write over `target`, whose rows are matched one by one.

        Raises:
            MissingRecord: none of them was recorded.
            ReplayError: as `Replacements.make`, as all that follow.
            LayoutError: see there.
            DamagedRecording: see there.
        """
        if isinstance(self.transform, TransformError):
            raise self.transform
        with torch.no_grad():
            own = aligned.own
            if self.transform is None:
                made = aligned.make()
                here = own.index_select(0, made.cells.to(own.device))
                new, note = graft.check_replacement(made.rows.to(target.device), here)
                new = aligned.with_padding(new, here)
                if aligned.guesses:
                    self.warn(selected, aligned.guesses, "guess")
            else:
                made, received = aligned.received()
                here = own.index_select(0, made.cells.to(own.device))
                g = self._input_of_rows(call, selected, target, kind, received)
                whole, note = graft.check_replacement(applied(self.transform, g), target)
                new = aligned.front(whole).index_select(0, made.cells.to(own.device))
            figures, unmeasured = measured(here, new) if self.settings.metrics else (None, "")
            said = ""
            if is_choice(target) and len(made.cells):
                said = self.said_of_choices(selected, here, new, kind, aligned)
            row = OwnRow()
            if self.settings.own_error and len(made.cells):
                row, why = own_measured(
                    lambda: self.own.columns(
                        here, new, aligned.first, call.dims, None, is_gradient=kind == "grad"
                    )
                )
                unmeasured = joined(unmeasured, why)
            tensor = aligned.put(new, made.cells)
        elsewhere = ""
        if made.elsewhere:
            step = selected.key.step + self.matcher.step_offset
            elsewhere = f"{count(made.elsewhere, 'row')} {_ELSEWHERE.format(step=step)}"
            self._told.add(selected.key.name)
            self.warn(selected, elsewhere, "step")
        if aligned.damaged is not None:
            self.warn(selected, f"{aligned.left_out}: {aligned.damaged}", "damaged")
        if aligned.one_sided:
            self.warn(selected, aligned.one_sided, "rows of a dim")
        lost = f"{count(made.missing, 'row')} not found" if made.missing else ""
        said = joined(aligned.left_out, aligned.one_sided, note, said, unmeasured)
        message = joined(made.note, elsewhere, lost, said)
        mask = None if call.run is None else aligned.mask(made.cells)
        return Replacement(tensor, message, figures, row, made, new.numel(), mask)

    def said_of_choices(
        self,
        selected: Selected,
        here: torch.Tensor,
        new: torch.Tensor,
        kind: str,
        aligned: Aligned | None = None,
    ) -> str:
        """Return a note on choices that are grafted; what it is about is never worth a graft."""
        known, ids = None, torch.empty(0, dtype=torch.int64, device="cpu")
        if aligned is not None and len(aligned.groups) == 1:
            group = aligned.groups[0]
            known = None if group.known is None else group.known[aligned.cells]
            ids = group.ids[aligned.cells]

        def near() -> Iterator[tuple[str, torch.Tensor]]:
            if aligned is not None:
                yield from self._near(selected, here.device, kind, aligned)

        try:
            said, aloud = routing.said_of(here, new, known, ids, near)
        except Exception as err:
            if is_from_the_job(err):
                raise
            return f"its choices are not judged: {type(err).__name__}: {err}"
        if aloud:
            self.warn(selected, aloud, "routing")
        return said

    def _near(
        self, selected: Selected, device: torch.device, kind: str, aligned: Aligned
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what was recorded for the same rows under tags that are off by one."""
        for tags in routing.neighbours(selected.tags):
            key = selected.key._replace(tags=key_tags(tags))
            other = selected._replace(key=key, tags=tags, text=canonical(tags))
            names = [group.names for group in aligned.groups]
            try:
                records = self._row_matcher.find(other, kind, names, fires=False)
                if records is None:
                    continue
                made = aligned.of_others(records)
            except GraftError:
                continue
            if torch.equal(made.cells, aligned.cells):
                yield label(key.name, key.tags), made.rows.to(device)

    def _input_of_rows(
        self,
        call: Call,
        selected: Selected,
        target: torch.Tensor,
        kind: str,
        received: Sequence[tuple[ManifestRow, torch.Tensor]],
    ) -> GraftInput:
        tensors: list[torch.Tensor | None] = [None] * self.recording.world_size
        extras: list[Any] = [None] * self.recording.world_size
        for row, tensor in received:
            if tensors[row["rank"]] is not None:
                raise TransformError(
                    f"rank {row['rank']} recorded several parts of these rows, and a transform "
                    "gets one of each rank; declare dims on both sides and name none"
                )
            tensors[row["rank"]] = tensor.to(target.device)
            extras[row["rank"]] = json.loads(row["extras"] or "{}")
        return GraftInput(
            target=target,
            tags={**selected.tags, "name": selected.key.name},
            received_list=tensors,
            received_extras_list=extras,
            key=selected.key._replace(kind=kind),
            rank=self.rank.rank,
            world_size=self.rank.world_size,
            sender_world_size=self.recording.world_size,
            dims=call.dims,
            sender_dims=received[0][0]["dims"] or "" if received else "",
            is_rowed=True,
        )
