"""The records that hold the rows of one name and tags, and which of these rows each holds.

1. `Records.of` reads the ids of each record, and sees which of its other dims it holds a part of.
2. Records that hold the same part (`Held`) share one array of `Places`. Layers whose records have
   the same ids share it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from recorder.errors import BadRows, DamagedRecording
from recorder.format.schema import ManifestRow
from recorder.layouts.dims import Dims
from recorder.layouts.parse import layout_of
from recorder.layouts.rowed import rowed
from recorder.tokens.taken import real

from ..log import SEQ_BITS
from .held import Held, Record, Source, held_by
from .places import Found, Keys, Places, real_rows
from .where import Where

_MOST_SHARED = 32


class Records:
    """The records of one name and tags.

    Attributes:
        every: the records, in the order in which they count.
        parts: what they hold of their rows; the numbers in the records.
        keys: what makes ids integers, for each group.
        pairs: for each group, its number among the receiver's.
        places: for each part, and for some of them together, the places of its rows.
        where: where their payloads lie.
        steps: the step of each, int64.
        bare: those that have no row at all, but padding: their numbers in the log.
        alone: the dims of groups that the receiver has not.
        damaged: why ids of further records could not be read, which are left out.
    """

    def __init__(
        self,
        every: Sequence[Record],
        parts: Sequence[Held],
        places: Sequence[Places],
        keys: Sequence[Keys],
        pairs: Sequence[int],
        alone: Sequence[str] = (),
        damaged: Sequence[DamagedRecording] = (),
    ) -> None:
        self.every, self.parts, self.places = every, parts, list(places)
        self.keys, self.pairs = keys, pairs
        self.alone, self.damaged = alone, damaged
        self.bare = sorted(
            one.logged
            for one in every
            if one.logged is not None
            and not all(bool(real(group.ids).any()) for group in one.groups)
        )
        self.checked: dict[int, torch.Tensor] = {}
        self.where = Where(every)
        self.steps = torch.tensor(
            [one.row["step"] for one in every], dtype=torch.int64, device="cpu"
        )
        self._merged: dict[tuple[int, ...], int] = {}

    def first(self, part: int) -> Record:
        """Return the first record of a part."""
        return next(one for one in self.every if one.part == part)

    def find(self, parts: tuple[int, ...], keys: torch.Tensor) -> Found:
        """Return the places of keys in a part, or in parts that hold the same of their rows."""
        number = self._together(parts)
        return Found(number, *self.places[number].find(keys))

    def _together(self, parts: tuple[int, ...]) -> int:
        if len(parts) == 1:
            return parts[0]
        number = self._merged.get(parts)
        if number is None:  # two threads may both make it, and either number will do
            self.places.append(Places.merged([self.places[part] for part in parts]))
            number = self._merged[parts] = len(self.places) - 1
        return number

    def having(self, found: Iterable[Found]) -> list[Record]:
        """Return the records at some places, in the order in which they count."""
        has = torch.zeros(len(self.every), dtype=torch.bool, device="cpu")
        for one in found:
            at = one.first.repeat_interleave(one.times)
            before = (one.times.cumsum(0) - one.times).repeat_interleave(one.times)
            at += torch.arange(len(at), device="cpu") - before
            has[self.places[one.number].record[at].to(torch.int64)] = True
        return [self.every[i] for i in has.nonzero().flatten().tolist()]

    @classmethod
    def of(
        cls,
        source: Source,
        rows: Sequence[ManifestRow],
        choose: Callable[[list[tuple[str, ...]]], list[tuple[int, int]]],
        shared: dict[object, tuple[list[Places], list[Keys]]],
        *,
        latest: Mapping[int, int] | None = None,
        check: bool = True,
        is_lenient: bool = False,
    ) -> Records:
        """Return what records hold of some groups of rows.

        Args:
            source: what they are read from.
            rows: their manifest rows, in the order in which they count.
            choose: of the names of the records' groups of rows, which belong to the other side's:
                their numbers here and there, as `paired` has them.
            shared: places of other records, and to be added to.
            latest: the latest attempt of each rank, the others' records being those of no tap that
                could be asked for by its key; None where that does not matter.
            check: whether to hold ids against their digest.
            is_lenient: whether records whose ids cannot be read are left out, as long as there are
                others.

        Raises:
            LayoutError: they do not say what they hold.
            BadRows: they have rows along other dims than one another.
            DamagedRecording: ids are not there.
        """
        layouts: dict[tuple[str, str], Dims] = {}
        numbers: dict[Held, int] = {}
        found: list[Record] = []
        pairs: list[tuple[int, int]] | None = None
        names: list[tuple[str, ...]] = []
        damaged: list[DamagedRecording] = []
        for row in rows:
            try:
                ids = source.ids(row, check=check)
            except DamagedRecording as err:
                damaged.append(DamagedRecording(err.path, err.fact))  # which holds no frames
                if not is_lenient or len(damaged) == len(rows):
                    raise
                continue
            text = row["dims"] or "", row["kind"]
            dims = layouts.get(text)
            if dims is None:
                dims = layouts[text] = layout_of(*text)
            shape = tuple(row["shape"] or ())
            groups = rowed(dims, shape, ids)
            if pairs is None:
                names = [group.names for group in groups]
                pairs = choose(names)
            own = [group.names for group in groups]
            is_one = len(own) == len(names) == 1  # may be called otherwise, if that pairs it alike
            if own != names and not (is_one and choose(own) == pairs):
                raise BadRows(
                    f"some records of {row['name']} have rows along "
                    f"{' and '.join(map(' '.join, names))} and others along "
                    f"{' and '.join(group.label for group in groups)}",
                    "give all of them rows along the same dims",
                )
            chosen = tuple(groups[i] for i, _ in pairs)
            mesh = source.mesh_of(row)
            part = held_by(dims, chosen, shape, row["rank"], mesh, source.world_size)
            number = numbers.setdefault(part, len(numbers))
            is_latest = (latest or {}).get(row["rank"]) == row["attempt"]
            logged = row["rank"] << SEQ_BITS | row["seq"] if is_latest else None
            found.append(Record(row, chosen, number, logged))
        about = tuple((one.row["rows"], one.row["dims"], one.part) for one in found)
        known = shared.get((about, tuple(pairs or ())))
        if known is None:
            while len(shared) >= _MOST_SHARED:
                shared.pop(next(iter(shared)))
            known = shared[about, tuple(pairs or ())] = _placed(found, len(numbers))
        places, keys = known
        of_pairs = [i for i, _ in pairs or ()]
        alone = [" ".join(one) for i, one in enumerate(names) if i not in of_pairs]
        of_receiver = [j for _, j in pairs or ()]
        return cls(found, list(numbers), places, keys, of_receiver, alone, damaged)


def _placed(found: Sequence[Record], parts: int) -> tuple[list[Places], list[Keys]]:
    """Return where the rows of records are, for each part, and what makes their ids integers."""
    keys, kept = [], []
    for g in range(len(found[0].groups)):
        rows = [real_rows(one.groups[g].ids) for one in found]
        ids = [one.groups[g].ids[at] for one, at in zip(found, rows, strict=True)]
        several = {one.shape[1:] for one in ids if len(one)}
        if len(several) > 1:
            raise BadRows(
                "records' rows are told apart by more numbers in some than in others",
                "give all of them the same ids",
            )
        # Of ids of which there are none nobody knows how many numbers each would be.
        shape = (0, *next(iter(several), ids[0].shape[1:]))
        ids = [one if len(one) else one.reshape(shape) for one in ids]
        keys.append(Keys(torch.cat(ids)))
        if g == 0:
            kept = [(keys[0].of(own), at) for own, at in zip(ids, rows, strict=True)]
    places = []
    for part in range(parts):
        numbers = [i for i, one in enumerate(found) if one.part == part]
        places.append(Places([kept[i][0] for i in numbers], [kept[i][1] for i in numbers], numbers))
    return places, keys
