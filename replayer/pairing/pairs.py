"""Two manifests to pairs of records, without reading a tensor.

1. `_counted` renames each side's names and tags, and says what counts of them; `_numbered` selects
   the rows and numbers that; `_keyed` makes one number of a whole key, equal for equal keys.
2. `pair` puts rows of one key together: rank by rank, or all ranks' blocks of a key at once where
   both sides declare a layout, and says of each pair what the manifests alone decide.
3. Where both sides say which row is which, all records of a name and tags are one pair (`marked`).
4. `order.in_order` puts the pairs in the baseline's execution order and finds what was reordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from recorder.errors import DamagedRecording, UsageError
from recorder.filters import Filter
from recorder.format.index import Grouping
from recorder.format.rows import matching, parse_tags
from recorder.recording import Recording
from recorder.sizes import count
from recorder.tags import canonical, is_recompute, key_tags, label

from ..match import MatchOn
from ..rename import Rename, oriented, renamed
from .marked import marked
from .order import in_order

if TYPE_CHECKING:
    from recorder.mesh import FrozenMesh

RANK = "rank"
"""A pair is one rank's record against another's."""
LAYOUT = "layout"
"""A pair is one tensor against another, each of all ranks' blocks."""
ROWS = "rows"
"""A pair is the rows that both sides have of one name and tags, of whatever step or batch."""
OF_SEVERAL = (LAYOUT, ROWS)
"""How pairs of several records are compared."""

EQUAL, TODO, SHAPE, UNALIGNED, ONLY_A, ONLY_B, VALUE = (
    "equal",
    "todo",
    "shape",
    "unaligned",
    "only_a",
    "only_b",
    "value",
)
"""What the manifests say of a pair; `todo` is for the tensors to say."""


@dataclass(frozen=True)
class Side:
    """One recording's rows that take part.

    Attributes:
        recording: the recording.
        frame: its rows by rank and seq, under the names that both sides share, with `key`; `name_0`
            and `tags_0` are its own.
    """

    recording: Recording
    frame: pl.DataFrame

    @property
    def world_size(self) -> int:
        """The number of ranks of its job."""
        return self.recording.world_size


@dataclass(frozen=True)
class Pairs:
    """What belongs together.

    Attributes:
        a: the baseline.
        b: the target.
        table: a row a pair, in execution order: `a` and `b` (row numbers in the sides' frames, the
            first of them where all ranks' are compared, null where a side has none), `key`, `how`
            (`rank` or `layout`), `state`, `order`, `reordered`.
        notes: what to say of how they were matched.
        step_offset: the target's step s belongs to the baseline's s + step_offset.
        alike: the ranks that stand at the same place in both jobs.
        seen: how many rows each side had before the filter.
        skipped: what most ranks of a side recorded and not all, where the other side cannot tell.
    """

    a: Side
    b: Side
    table: pl.DataFrame
    notes: tuple[str, ...]
    step_offset: int
    alike: list[int]
    seen: tuple[int, int]
    skipped: tuple[str, ...]


def pair(
    a: Recording,
    b: Recording,
    *,
    filter: Filter | None = None,
    match_on: MatchOn | None = None,
    step_offset: int = 0,
    renames: Sequence[Rename] = (),
) -> Pairs:
    """Match the latest attempts of two recordings.

    Args:
        a: the baseline.
        b: the target.
        filter: which records take part, in the baseline's names and steps.
        match_on: what counts; by default the whole key.
        step_offset: the target's step s belongs to the baseline's s + step_offset.
        renames: what the target calls otherwise.

    Raises:
        UsageError: renamed taps of one side cannot be told apart any more.
        DamagedRecording: a manifest does not hold what it should.
    """
    match_on = match_on or MatchOn()
    frames = [a.latest(), b.latest().with_columns(pl.col("step") + step_offset)]
    names = [frame["name"].unique().to_list() for frame in frames]
    kept, notes = oriented(renames, *names)
    keys = [
        _counted(frame, side, match_on, group)
        for frame, side, group in zip(
            frames, ([], kept), (match_on.group, match_on.group_of_target), strict=True
        )
    ]
    of_group = ["group_name", "group_tags"]
    groups = pl.concat(one.select(of_group) for one in keys).unique(maintain_order=True)
    groups = groups.with_columns(group=pl.int_range(pl.len()))
    sides = [
        _numbered(frame, one.join(groups, on=of_group, how="left"), filter, match_on, bool(side))
        for frame, one, side in zip(frames, keys, ([], kept), strict=True)
    ]
    keyed = _keyed(*marked(sides[0], sides[1], match_on))
    left, right = Side(a, keyed[0]), Side(b, keyed[1])
    alike = _standing_alike(left, right)
    table = in_order(
        _paired(left, right, alike), left.frame, right.frame, a.world_size == b.world_size
    )
    if match_on.order or (match_on.tags is not None and "name" not in match_on.tags):
        notes += _contradictions(table, left, right)
    skipped = [] if a.world_size == b.world_size else [*_skipped("A", left), *_skipped("B", right)]
    seen = frames[0].height, frames[1].height
    return Pairs(left, right, table, tuple(notes), step_offset, alike, seen, tuple(skipped))


def _counted(
    frame: pl.DataFrame, renames: Sequence[Rename], match_on: MatchOn, group_of: Grouping
) -> pl.DataFrame:
    """Return what there is to know of each name and tags of a side's rows.

    It has `name_0` and `tags_0`, which were recorded; `key_0`, the tags that count for the key;
    `name` and `tags` as the baseline has them; `group_name` and `group_tags`, what counts for a
    match; `firing`, 1 of a second forward; and `own`, a number.
    """
    names = frame.select(name_0="name", tags_0="tags").unique(maintain_order=True)
    by = ["name_0", "tags_0"] if renames else ["tags_0"]
    known = names.select(by).unique(maintain_order=True)  # many names have the same tags
    rows: list[tuple[Any, ...]] = []
    for *name, text in known.iter_rows():
        tags = parse_tags(text)
        new = renamed(renames, name[0] if name else "", tags)
        rows.append(
            (
                key_tags(tags),
                new[0] if name else None,
                canonical(new[1]),
                group_of(*new)[1],
                int(is_recompute(tags)),
            )
        )
    schema = {
        "key_0": pl.String, "name": pl.String, "tags": pl.String, "group_tags": pl.String,
        "firing": pl.Int64,
    }  # fmt: skip
    known = known.hstack(pl.DataFrame(rows, schema=schema, orient="row"))
    return (
        names.join(known, on=by, how="left", maintain_order="left")
        .with_columns(name=pl.coalesce("name", "name_0"), own=pl.int_range(pl.len()))
        .with_columns(group_name="name" if match_on.use_name else pl.lit(""))
    )


def _numbered(
    frame: pl.DataFrame,
    keys: pl.DataFrame,
    filter: Filter | None,
    match_on: MatchOn,
    is_renamed: bool,
) -> pl.DataFrame:
    """Return a side's rows that the filter selects, with what counts of their key as numbers.

    Args:
        frame: all of them.
        keys: of `_counted`, with `group`, the number of what counts of it for a match.
        filter: which take part.
        match_on: what counts.
        is_renamed: whether some have another name in the baseline.
    """
    columns = ["name_0", "tags_0", "key_0", "name", "tags", "group", "firing", "own"]
    frame = frame.rename({"name": "name_0", "tags": "tags_0"}).join(
        keys.select(columns), on=["name_0", "tags_0"], how="left", maintain_order="left"
    )
    if filter is not None:
        frame = frame.filter(matching(frame, filter))
    step = pl.col("step") if match_on.use_step else pl.lit(0, pl.Int64)
    frame = frame.with_columns(match_step=step, match_occurrence=pl.col("occurrence"))
    if not match_on.whole:
        within = ["rank", "kind", "firing", "group", "match_step"]
        frame = frame.with_columns(
            match_occurrence=pl.int_range(pl.len(), dtype=pl.Int32).over(within)
        )
        frame = _as_first(frame)
    elif is_renamed:
        _check_distinct(frame)
    return frame


def _as_first(frame: pl.DataFrame) -> pl.DataFrame:
    """Count second forwards as their firsts are: a backward takes them in an order of its own."""
    if not (frame["firing"] > 0).any():
        return frame
    by = ["rank", "kind", "name_0", "key_0", "step", "occurrence"]
    firsts = frame.filter(pl.col("firing") == 0).select(*by, counted="match_occurrence")
    firsts = firsts.unique(by, maintain_order=True)
    of_first = pl.when(pl.col("firing") == 1).then(pl.col("counted"))
    return (
        frame.join(firsts, on=by, how="left", maintain_order="left")
        .with_columns(match_occurrence=pl.coalesce(of_first, "match_occurrence"))
        .drop("counted")
    )


def _check_distinct(frame: pl.DataFrame) -> None:
    """Refuse renamings after which two taps have one key."""
    by = ["rank", "kind", "group", "step", "occurrence", "firing"]
    twice = frame.filter(pl.struct(by).is_duplicated()).unique(
        ["name_0", "tags_0"], maintain_order=True
    )
    if twice.height:
        some = [label(*row) for row in twice.select("name_0", "tags_0").head(2).iter_rows()]
        raise UsageError(
            f"with --rename, {' and '.join(some)} of B would have one key; rename so that they "
            "stay apart, or leave one of them out with --filter"
        )


def _keyed(left: pl.DataFrame, right: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Give both sides' rows `key`, one integer for what counts of their key.

    A second forward (`recompute`) is compared with the other side's second, or, where that has but
    one, against that one, as a replay would use it.
    """
    frames = [left, right]
    kinds = pl.concat([f["kind"].unique() for f in frames]).unique().sort()
    steps = pl.concat([f["match_step"].unique() for f in frames]).unique().sort()
    occurrences = pl.concat([f["match_occurrence"].unique() for f in frames]).unique().sort()
    groups = max([0, *(g for f in frames for g in [f["group"].max()] if isinstance(g, int))]) + 1
    if len(kinds) * len(steps) * len(occurrences) * groups >= 1 << 61:
        raise DamagedRecording("the manifest", "it has more keys than can be counted")
    done = []
    for frame in frames:
        code = pl.col("group")
        for name, known in (
            ("kind", kinds), ("match_step", steps), ("match_occurrence", occurrences)
        ):  # fmt: skip
            at = (
                known.search_sorted(frame[name]) if frame.height else pl.Series([], dtype=pl.UInt32)
            )
            code = code * len(known) + pl.Series(at, dtype=pl.Int64)
        done.append(frame.with_columns(key=code * 2))
    if any((frame["firing"] > 0).any() for frame in frames):
        done = _with_firings(*done)
    return done[0], done[1]


def _with_firings(left: pl.DataFrame, right: pl.DataFrame) -> list[pl.DataFrame]:
    done = []
    for frame in (left, right):
        firsts = frame.filter(pl.col("firing") == 0)["key"].unique()
        second = (pl.col("firing") == 1) & pl.col("key").is_in(firsts.implode())
        done.append(frame.with_columns(key=pl.col("key") + second.cast(pl.Int64)))
    for i in (0, 1):
        one, other = done[i], done[1 - i]
        wanted = other.filter(pl.col("key") % 2 == 1)["key"].unique()
        missing = wanted.filter(~wanted.is_in(one["key"].implode()))
        again = one.filter((pl.col("key") + 1).is_in(missing.implode()))
        done[i] = pl.concat([one, again.with_columns(key=pl.col("key") + 1)])
    return done


_HELD = (
    "key", "rank", "kind", "digest", "value", "dtype", "shape", "dims", "extras", "own", "rows",
    "by_rows",
)  # fmt: skip


def _paired(a: Side, b: Side, alike: list[int]) -> pl.DataFrame:
    """Return the pairs, in no order."""
    left, right = (
        side.frame.with_row_index(name).select(name, *_HELD) for name, side in (("a", a), ("b", b))
    )
    keys = _keys(left, right, a.world_size, b.world_size)
    left, right = (
        frame.join(keys.select("key", "how", "one"), on="key", how="left")
        for frame in (left, right)
    )
    same = a.world_size == b.world_size
    parts = [
        _by_rank(left, right).with_columns(
            state=_state(pl.lit(SHAPE if same else UNALIGNED, pl.String))
        ),
        _by_layout(keys, left, right, alike, same),
        _by_rows(keys, left, right),
    ]
    return pl.concat(part.select("key", "a", "b", "how", "state") for part in parts)


def _keys(left: pl.DataFrame, right: pl.DataFrame, a_world: int, b_world: int) -> pl.DataFrame:
    """Return each key with `how` it is compared, and `one`, the side that has one tensor for all.

    Where nobody declares a layout and the worlds differ, ranks of one side that all recorded the
    same stand for one another. Taps that only matching brings together are no blocks of one tensor.
    """
    same = (
        pl.struct("digest", "value", "dtype", "shape") if a_world != b_world else pl.col("digest")
    )
    each = [
        frame.group_by("key").agg(
            pl.col(name).min(),
            (pl.col("dims").fill_null("").ne("").all() & (pl.col("own").n_unique() == 1)).alias(
                f"{name}_dims"
            ),
            (same.n_unique() == 1).alias(f"{name}_one"),
            pl.col("by_rows").any().alias(f"{name}_rows"),
            pl.col("kind").first().alias(f"{name}_kind"),
        )
        for name, frame in (("a", left), ("b", right))
    ]
    keys = each[0].join(each[1], on="key", how="full", coalesce=True)
    is_value = pl.coalesce("a_kind", "b_kind") == "value"
    # A job of one rank has the whole tensor, whether it says so or not.
    a_whole = pl.col("a_dims").fill_null(True) | (a_world == 1)
    b_whole = pl.col("b_dims").fill_null(True) | (b_world == 1)
    declared = pl.col("a_dims").fill_null(False) | pl.col("b_dims").fill_null(False)
    by_rows = pl.col("a_rows").fill_null(False) | pl.col("b_rows").fill_null(False)
    how = (
        pl.when(by_rows)
        .then(pl.lit(ROWS))
        .when(a_whole & b_whole & declared & ~is_value)
        .then(pl.lit(LAYOUT))
        .otherwise(pl.lit(RANK))
    )
    both = pl.col("a").is_not_null() & pl.col("b").is_not_null()
    one = (
        pl.when(~both | (a_world == b_world))
        .then(None)
        .when("a_one")
        .then(pl.lit("a"))
        .when("b_one")
        .then(pl.lit("b"))
    )
    return keys.with_columns(how=how, one=one)


def _by_rows(keys: pl.DataFrame, left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    """Return a pair a key of those that are compared row by row, equal where all records are."""
    keys = keys.filter(pl.col("how") == ROWS)
    about = ["key", "rank", "rows", "digest", "dims", "dtype", "shape"]
    one, other = (
        frame.filter(pl.col("how") == ROWS).group_by(about).len() for frame in (left, right)
    )
    met = one.join(other, on=[*about, "len"], how="full", coalesce=False, suffix="_b")
    alone = pl.col("key").is_null() | pl.col("key_b").is_null()
    same = met.group_by(pl.coalesce("key", "key_b").alias("key")).agg(same=(~alone).all())
    return keys.join(same, on="key", how="left").select(
        "key",
        "a",
        "b",
        "how",
        state=pl.when("same").then(pl.lit(EQUAL)).otherwise(pl.lit(TODO)),
    )


def _by_rank(left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    left, right = (frame.filter(pl.col("how") == RANK) for frame in (left, right))
    plain = left.filter(pl.col("one").is_null()).join(
        right.filter(pl.col("one").is_null()),
        on=["key", "rank"],
        how="full",
        coalesce=True,
        suffix="_b",
    )
    first = (frame.unique("key", keep="first", maintain_order=True) for frame in (left, right))
    a_first, b_first = first
    one_a = a_first.filter(pl.col("one") == "a").join(right, on="key", suffix="_b")
    one_b = left.filter(pl.col("one") == "b").join(b_first, on="key", suffix="_b")
    columns = ["key", "a", "b", *(c + s for c in _HELD[2:9] for s in ("", "_b"))]
    return pl.concat(part.select(columns) for part in (plain, one_a, one_b)).with_columns(
        how=pl.lit(RANK)
    )


def _alike() -> pl.Expr:
    """Whether two joined rows have the same bytes as the same tensor."""
    return (
        (pl.col("digest") == pl.col("digest_b"))
        & pl.col("dtype").eq_missing(pl.col("dtype_b"))
        & pl.col("shape").eq_missing(pl.col("shape_b"))
    ).fill_null(False)


_LENGTHS = "seq_lens|cu_seqlens|attention_mask"


def _of_others() -> pl.Expr:
    """Whether two joined rows may be of other sequences: both taps say of which, in other words."""
    both = pl.col("extras").str.contains(_LENGTHS) & pl.col("extras_b").str.contains(_LENGTHS)
    return (both & pl.col("extras").ne_missing(pl.col("extras_b"))).fill_null(False)


def _state(unequal: pl.Expr) -> pl.Expr:
    return (
        pl.when(pl.col("b").is_null())
        .then(pl.lit(ONLY_A))
        .when(pl.col("a").is_null())
        .then(pl.lit(ONLY_B))
        .when((pl.col("kind") == "value") & (pl.col("value") == pl.col("value_b")))
        .then(pl.lit(EQUAL))
        .when(pl.col("kind") == "value")
        .then(pl.lit(VALUE))
        .when(_alike() & ~_of_others())
        .then(pl.lit(EQUAL))
        .when(pl.col("shape").ne_missing(pl.col("shape_b")))
        .then(unequal)
        .otherwise(pl.lit(TODO))
    )


UNDIVIDED = r"^[\w\s()*]+$"  # dims that nothing cuts: every rank has the whole


def _by_layout(
    keys: pl.DataFrame,
    left: pl.DataFrame,
    right: pl.DataFrame,
    alike: list[int],
    same_world: bool,
) -> pl.DataFrame:
    """Return a pair a key, equal where all ranks hold the same, or one thing all of them.

    And one for each rank that recorded the key on one side alone, where both have as many ranks.
    """
    keys = keys.filter(pl.col("how") == LAYOUT)
    left, right = (frame.filter(pl.col("how") == LAYOUT) for frame in (left, right))
    met = left.join(right, on=["key", "rank"], how="full", coalesce=True, suffix="_b")
    standing = pl.col("rank").is_in(alike) & pl.col("dims").eq_missing(pl.col("dims_b"))
    same = _alike() & standing & pl.col("extras").eq_missing(pl.col("extras_b"))
    by_rank = met.group_by("key").agg(same=same.all())
    first = left.unique("key", keep="first").join(
        right.unique("key", keep="first"), on="key", suffix="_b"
    )
    plain = (
        pl.col("dims").str.contains(UNDIVIDED)
        & (pl.col("dims") == pl.col("dims_b"))
        & pl.col("extras").eq_missing(pl.col("extras_b"))
    )
    replicas = first.select("key", replicas=(_alike() & plain).fill_null(False))
    found = keys.join(by_rank, on="key", how="left").join(replicas, on="key", how="left")
    one_each = pl.col("a_one") & pl.col("b_one") & pl.col("replicas")
    whole = found.with_columns(
        state=pl.when(pl.col("b").is_null())
        .then(pl.lit(ONLY_A))
        .when(pl.col("a").is_null())
        .then(pl.lit(ONLY_B))
        .when(pl.col("same").fill_null(False) | one_each.fill_null(False))
        .then(pl.lit(EQUAL))
        .otherwise(pl.lit(TODO))
    )
    columns = ["key", "a", "b", "how", "state"]
    alone = pl.col("a").is_null() | pl.col("b").is_null()
    both = whole.filter(~alone)["key"]
    missing = met.filter(alone & pl.col("key").is_in(both.implode()) & pl.lit(same_world)).select(
        "key",
        "a",
        "b",
        how=pl.lit(RANK),
        state=pl.when(pl.col("b").is_null()).then(pl.lit(ONLY_A)).otherwise(pl.lit(ONLY_B)),
    )
    return pl.concat([whole.select(columns), missing.select(columns)])


def _standing_alike(a: Side, b: Side) -> list[int]:
    """Return the ranks that stand at the same place in both jobs, all the time."""
    if a.world_size != b.world_size:
        return []
    places = [_places(side) for side in (a, b)]
    return [rank for rank in places[0] if places[0][rank] == places[1].get(rank, -1)]


def _places(side: Side) -> dict[int, list[tuple[int, FrozenMesh | None]]]:
    pairs = side.frame.select("rank", "attempt").unique().sort("rank").iter_rows()
    return {rank: side.recording.meshes(rank, attempt) for rank, attempt in pairs}


def _skipped(name: str, side: Side) -> list[str]:
    """Say what most ranks of a side recorded and some did not.

    Fewer than most may be a stage of a pipeline, which is no fault.
    """
    ranks = side.frame["rank"].unique()
    by_key = (
        side.frame.filter(~pl.col("by_rows"))
        .group_by("key")
        .agg(
            pl.col("rank").unique(),
            pl.col("name").first(),
            pl.col("tags").first(),
            pl.col("seq").min(),
        )
    )
    n = pl.col("rank").list.len()
    some = by_key.filter((n < len(ranks)) & (n * 2 > len(ranks))).sort("seq")
    if not some.height:
        return []
    first = some.row(0, named=True)
    missing = sorted({*ranks} - {*first["rank"]})
    return [
        f"{count(some.height, 'key')} recorded by most ranks of {name} and not by all, such as "
        f"{label(first['name'], first['tags'])}, not by rank {', '.join(map(str, missing[:8]))}"
    ]


def _contradictions(table: pl.DataFrame, a: Side, b: Side) -> list[str]:
    """Say where pairs by order are of taps whose names or tags differ."""
    rows = table.drop_nulls(["a", "b"])
    names = [side.frame.select("name", "tags")[rows[which]] for which, side in (("a", a), ("b", b))]
    pairs = names[0].hstack(names[1].rename({"name": "name_b", "tags": "tags_b"}))
    counted = pairs.group_by(pl.all(), maintain_order=True).len()
    wrong = [row for row in counted.iter_rows() if _contradict(*row[:4])]
    if not wrong:
        return []
    name, tags, name_b, tags_b, _ = wrong[0]
    many = count(sum(row[4] for row in wrong), "pair")
    return [
        f"of the pairs by --match-on, {many} of {rows.height} have "
        f"names or tags that contradict each other, the first: {label(name, tags)} with "
        f"{label(name_b, tags_b)}; check that both sides tap the same places, or match on tags"
    ]


def _contradict(name: str, tags: str, name_b: str, tags_b: str) -> bool:
    """Whether two taps have other names, or another value of a tag that both carry."""
    a_tags, b_tags = parse_tags(tags), parse_tags(tags_b)
    return name != name_b or any(
        a_tags[tag] != b_tags[tag] for tag in a_tags.keys() & b_tags.keys()
    )
