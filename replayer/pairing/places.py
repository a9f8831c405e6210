"""Which ranks had data of their own, and which of the other side's belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from recorder.errors import LayoutError
from recorder.format.schema import ManifestRow
from recorder.layouts.blocks import coordinates
from recorder.layouts.cutting import Places
from recorder.logical import Recorded
from recorder.mesh import PIPELINE
from recorder.recording import Recording

SEVERAL_STAGES = "recorded by several stages; if each numbers its layers from 0, tag the global one"


def of_same_data(
    a: Recording, rows_a: Sequence[ManifestRow], b: Recording, rows_b: Sequence[ManifestRow]
) -> Iterator[tuple[list[ManifestRow], list[ManifestRow], str]]:
    """Split both sides by the ranks' places on the axes over which they had data of their own.

    An axis of one size on both sides, but for a pipeline's, has the same data at the same place: a
    part is empty where nobody stood there. Else, where one side's ranks are all at one place, that
    side has what each of the other's parts is compared with. Ranks that had no data are left out.
    """
    a_places, b_places = _places(a, rows_a), _places(b, rows_b)
    axes = sorted({axis for places in (*a_places, *b_places) for axis in places})
    sizes = {
        axis: [{p[axis][1] if axis in p else 1 for p in places} for places in (a_places, b_places)]
        for axis in axes
    }
    fixed = [axis for axis in axes if axis != PIPELINE and sizes[axis][0] == sizes[axis][1]]
    free = [axis for axis in axes if axis not in fixed]
    parts_a, parts_b = _grouped(rows_a, a_places, fixed), _grouped(rows_b, b_places, fixed)
    busy = [_busy(parts) for parts in (parts_a, parts_b)]
    if len(busy[0]) == len(busy[1]) == 1 and {*busy[0]} != {*busy[1]}:
        # One rank of a server has all the tokens, and another in the other job.
        ((there, one),), ((here, other),) = busy[0].items(), busy[1].items()
        yield one[0], other[0], f"{_where(fixed, there)} of A, {_where(fixed, here)} of B"
        return
    for at in sorted({*parts_a, *parts_b}):
        inner_a = _busy_or_all(_grouped(*parts_a.get(at, ([], [])), free))
        inner_b = _busy_or_all(_grouped(*parts_b.get(at, ([], [])), free))
        if len(inner_a) > 1 and len(inner_b) > 1 and {*inner_a} != {*inner_b}:
            raise LayoutError(
                f"ranks had data of their own over {' and '.join(free)}, and stood at other places "
                "in A than in B; compare the same places with --filter, or, if they hold the same, "
                f"declare '# {free[0]}:replicated' at the taps"
            )
        one_each = len(inner_a) > 1 and len(inner_b) > 1
        for here, part_a in (inner_a or {(): ([], [])}).items():
            for there, part_b in (inner_b or {(): ([], [])}).items():
                if not one_each or here == there:
                    place = here if len(inner_a) > 1 else there or here
                    where = _where([*fixed, *free], (*at, *place))
                    if PIPELINE in free and len(inner_a) != len(inner_b):
                        where += f" ({SEVERAL_STAGES})"
                    yield part_a[0], part_b[0], where


def _where(axes: Sequence[str], at: tuple[int, ...]) -> str:
    return " ".join(f"{axis}={k}" for axis, k in zip(axes, at, strict=True))


Part = tuple[list[ManifestRow], list[Places]]


def _grouped(
    rows: Sequence[ManifestRow], places: Sequence[Places], axes: Sequence[str]
) -> dict[tuple[int, ...], Part]:
    """Return rows and their places by coordinates on some axes."""
    found: dict[tuple[int, ...], Part] = {}
    for row, place in zip(rows, places, strict=True):
        part = found.setdefault(tuple(place.get(axis, (0, 1))[0] for axis in axes), ([], []))
        part[0].append(row)
        part[1].append(place)
    return found


def _busy(parts: dict[tuple[int, ...], Part]) -> dict[tuple[int, ...], Part]:
    """Return the parts of ranks that had data: an empty tensor is that of a rank without any."""
    return {
        at: part
        for at, part in parts.items()
        if any(0 not in (row["shape"] or ()) for row in part[0])
    }


def _busy_or_all(parts: dict[tuple[int, ...], Part]) -> dict[tuple[int, ...], Part]:
    return _busy(parts) or parts


def _places(recording: Recording, rows: Sequence[ManifestRow]) -> list[Places]:
    """Return where each row's rank stands on axes over which ranks have data of their own."""
    if not all(row["dims"] for row in rows):
        return [{} for _ in rows]
    found: list[Places] = []
    for block in Recorded(recording, rows).blocks:
        axes = block.dims.data - set(block.dims.axes)
        places = coordinates(block, recording.world_size)
        found.append({axis: at for axis, at in places.items() if axis in axes and at[1] > 1})
    return found
