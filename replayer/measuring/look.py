"""What a closer look at a graft's error shows: the log keeps it as JSON, and faults are told by it.

`OwnError` and `Choice` make it. Numbers are short, and lists name a few indices of many.
"""

from __future__ import annotations

from typing import TypedDict


class Place(TypedDict):
    """Of a dim, the few indices that are wrong while the others are not.

    `at` names the first of them; `count` of `size` are wrong, the last of them is `last`; they are
    off by `error` in the median, all indices by `usual`. `own` and `lines` have a few elements of
    each that is named: the target's, and the baseline's; of the same places on all ranks.
    """

    at: list[int]
    last: int
    count: int
    size: int
    error: float
    usual: float
    own: list[list[float]]
    lines: list[list[float]]


class Moved(TypedDict):
    """Of a dim, the wrong indices that are other indices of the baseline.

    `found` of the `wrong` ones are; the first are `at`, and are the baseline's `of`. They `swap`
    where the same indices are at other places; `shift` is how far each comes from, if all as far.
    """

    at: list[int]
    of: list[int]
    found: int
    wrong: int
    swap: bool
    shift: int | None


class Spread(TypedDict):
    """Of columns or rows: the worst of `size`, `at`; how far it and the `usual` one are off.

    `share` is what the worst hundredth has of the squared error.
    """

    at: int
    size: int
    worst: float
    usual: float
    share: float


class Samples(TypedDict):
    """The `own` elements and the `base`line's, where some rows and columns cross, row by row.

    They are at the same places on all ranks, so that ranks can be held against one another.
    """

    own: list[list[float]]
    base: list[list[float]]


class Zeros(TypedDict):
    """Elements that are zero where the baseline's are not, their `share` of these.

    All others are `scale` times the baseline's, which takes `explained` of their squared error.
    """

    share: float
    scale: float
    explained: float


class Chosen(TypedDict, total=False):
    """Of indices: how many of the `rows` are an `other` choice, the `first` of them.

    `ties` of them are near ties by the scores, if those are known, by which the choices are apart
    by `margins`: in the median, and at most; in so many more the same choice comes in another
    `order`. In `none` rows of the baseline and of the target one index stands in all places, so
    that nothing was chosen: [baseline's, target's]. `shift` is [dim, k] where each index of a dim
    is the baseline's k from it. `stand` has, of indices, [one, other] where the other always stands
    for the one.
    """

    rows: int
    other: int
    first: list[int]
    ties: int
    margins: list[float]
    none: list[int]
    order: int
    shift: list[int]
    stand: list[list[int]]


class Look(TypedDict, total=False):
    """All of it; what shows nothing is not there.

    `shares` of the squared error that one explanation takes: `bias` one vector added to each row,
    `offset` one number to each row, `row`, `column` or a dim's number a factor for each of its
    indices; `factors` the least and the greatest of those that are wrong. `places` and `moved` by
    the dim's number. `fits` is a format that has bits enough for each of the target's values, and
    not of the baseline's. `stale` names another record that the target's values are.
    """

    shares: dict[str, float]
    factors: dict[str, list[float]]
    places: dict[str, Place]
    moved: dict[str, Moved]
    columns: Spread
    rows: Spread
    zeros: Zeros
    samples: Samples
    fits: str
    stale: str
    choice: Chosen
