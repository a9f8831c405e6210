"""Which records of two recordings belong together, and in which order."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from recorder import context, step, tap
from recorder.errors import UsageError
from recorder.filters import Filter
from replayer.match import MatchOn
from replayer.pairing.pairs import pair
from replayer.rename import Rename


@pytest.fixture
def two(tmp_path, recorded):
    """Record two jobs, the second as B."""

    def two(a, b, worlds=(1, 1), **options):
        return tuple(
            recorded(tmp_path / name, job, world, **options)
            for name, job, world in (("A", a, worlds[0]), ("B", b, worlds[1]))
        )

    return two


def states(pairs) -> dict[str, int]:
    return dict(pairs.table["state"].value_counts().iter_rows())


def met(pairs) -> list[tuple[str, str]]:
    """The names of both sides of each pair, "" where there is none."""
    found = []
    for a, b in pairs.table.select("a", "b").iter_rows():
        sides = ((pairs.a.frame, a), (pairs.b.frame, b))
        found.append(tuple("" if i is None else frame["name_0"][i] for frame, i in sides))
    return found


def taps(*names, value=1.0):
    def job(rank):
        for name in names:
            tap(name, torch.full((2,), value))

    return job


def test_equal_keys_meet_and_equal_bytes_are_equal_without_reading(two):
    a, b = two(taps("x", "y"), taps("x", "y"))
    for shard in a.path.rglob("*.safetensors"):
        shard.unlink()
    assert states(pair(a, b)) == {"equal": 2}


def test_other_bytes_are_for_the_tensors_to_say(two):
    assert states(pair(*two(taps("x"), taps("x", value=2.0)))) == {"todo": 1}


def test_what_one_side_lacks_is_reported_from_both_sides(two):
    pairs = pair(*two(taps("x", "gone", "y"), taps("x", "y", "new")))
    assert met(pairs) == [("x", "x"), ("gone", ""), ("y", "y"), ("", "new")]
    assert pairs.table["state"].to_list() == ["equal", "only_a", "equal", "only_b"]


def test_an_extra_call_shifts_no_other_pair(two):
    def extra(rank):
        tap("x", torch.zeros(2))
        tap("extra", torch.zeros(2))
        tap("y", torch.ones(2))

    pairs = pair(*two(lambda rank: (tap("x", torch.zeros(2)), tap("y", torch.ones(2))), extra))
    assert met(pairs) == [("x", "x"), ("", "extra"), ("y", "y")]
    assert states(pairs) == {"equal": 2, "only_b": 1}


def test_what_moved_in_the_order_is_marked_and_nothing_else(two):
    pairs = pair(*two(taps("a", "b", "c", "d"), taps("b", "c", "d", "a")))
    moved = pairs.table.filter("reordered")
    assert [pairs.a.frame["name"][i] for i in moved["a"]] == ["a"]


def test_steps_can_lie_apart(two):
    def late(rank):
        step()
        step()
        tap("x", torch.ones(2))

    def early(rank):
        tap("x", torch.ones(2))

    a, b = two(late, early)
    assert states(pair(a, b)) == {"only_a": 1, "only_b": 1}
    assert states(pair(a, b, step_offset=2)) == {"equal": 1}


@pytest.mark.parametrize(
    ("rename", "name_b", "tags_b"),
    [
        ("h.{layer}.attn=layers.{layer}.self_attn", "layers.3.self_attn", {}),
        ("layers.{layer}.self_attn=h.{layer}.attn", "layers.3.self_attn", {}),
        ("h.{layer}.attn=attn", "attn", {"layer": 3}),
        ("h.3.attn=self_attention", "self_attention", {}),
    ],
)
def test_a_renaming_makes_names_meet(tmp_path, rename, name_b, tags_b, recorded):
    a = recorded(tmp_path / "A", lambda rank: tap("h.3.attn", torch.ones(2)))
    b = recorded(tmp_path / "B", lambda rank: tap(name_b, torch.ones(2), **tags_b))
    assert states(pair(a, b)) == {"only_a": 1, "only_b": 1}
    assert states(pair(a, b, renames=[Rename.parse(rename)])) == {"equal": 1}


def test_a_place_in_b_s_name_alone_is_a_tag_in_a(tmp_path, recorded):
    a = recorded(tmp_path / "A", lambda rank: tap("attn", torch.ones(2), layer=3))
    b = recorded(tmp_path / "B", lambda rank: tap("layers.3.attn", torch.ones(2)))
    assert states(pair(a, b, renames=[Rename.parse("attn=layers.{layer}.attn")])) == {"equal": 1}


def test_a_filter_speaks_in_the_baseline_s_names(tmp_path, recorded):
    a = recorded(tmp_path / "A", taps("attn", "mlp"))
    b = recorded(tmp_path / "B", taps("self_attn", "mlp"))
    chosen = Filter.parse('name == "attn"')
    pairs = pair(a, b, filter=chosen, renames=[Rename.parse("attn=self_attn")])
    assert met(pairs) == [("attn", "self_attn")]


def test_a_renaming_that_fits_nothing_is_said(two):
    pairs = pair(*two(taps("x"), taps("x")), renames=[Rename.parse("y=z")])
    assert "'z' fits no tap of B; B has x" in pairs.notes[0]


def test_a_renaming_that_makes_two_taps_one_is_refused(two):
    a, b = two(taps("attn"), taps("attn", "self_attn"))
    with pytest.raises(UsageError, match="attn and self_attn of B would have one key"):
        pair(a, b, renames=[Rename.parse("attn=self_attn")])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "A's name for it, =, and B's"),
        ("a=b=c", "A's name for it, =, and B's"),
        ("=b", "cannot be read at ''"),
        ("a{=b", "cannot be read at 'a{'"),
        ("a{x}{x}=b", "stands twice"),
        ("a{step}=b", "reserved name"),
    ],
)
def test_a_renaming_that_cannot_be_read_says_where(text, words):
    with pytest.raises(UsageError) as caught:
        Rename.parse(text)
    assert words in str(caught.value)


def test_only_the_tags_named_count_and_occurrences_are_counted_over_them(two):
    def tagged(rank):
        for phase in ("prefill", "decode"):
            with context(phase=phase):
                tap("x", torch.full((2,), len(phase) * 1.0), layer=1)

    def plain(rank):
        tap("x", torch.full((2,), 7.0), layer=1)
        tap("x", torch.full((2,), 6.0), layer=1)

    pairs = pair(*two(tagged, plain), match_on=MatchOn.parse("name,layer"))
    assert states(pairs) == {"equal": 2}


def test_matching_by_order_pairs_the_kth_with_the_kth_and_warns(two):
    pairs = pair(*two(taps("x", "y"), taps("x", "z")), match_on=MatchOn.parse("order"))
    assert met(pairs) == [("x", "x"), ("y", "z")]
    assert "the first: y with z" in pairs.notes[0]


@pytest.mark.parametrize("seconds", [(True, True), (True, False), (False, True)])
def test_a_second_forward_meets_the_second_or_else_the_first(tmp_path, seconds, recorded):
    def job(has_second):
        def run(rank):
            tap("x", torch.ones(2))
            if has_second:
                tap("x", torch.ones(2), recompute=True)

        return run

    a, b = (recorded(tmp_path / n, job(s)) for n, s in zip("AB", seconds, strict=True))
    assert states(pair(a, b)) == {"equal": 2}


@pytest.mark.parametrize("match_on", [None, "name", "order"])
def test_second_forwards_meet_as_their_firsts_do(tmp_path, recorded, match_on):
    def job(order):
        def run(rank):
            def layer(x):
                return tap("h", x * x).exp()

            losses = []
            for batch in range(3):
                x = torch.full((2,), float(batch), requires_grad=True)
                losses.append(checkpoint(layer, x, use_reentrant=False).sum())
            for batch in order:
                losses[batch].backward()

        return run

    a, b = recorded(tmp_path / "A", job((0, 1, 2))), recorded(tmp_path / "B", job((2, 0, 1)))
    assert states(pair(a, b, match_on=MatchOn.parse(match_on))) == {"equal": 6}


def test_ranks_meet_ranks_where_no_layout_is_declared(two):
    def job(rank):
        tap("x", torch.full((2,), float(rank)))

    pairs = pair(*two(job, job, worlds=(2, 2)))
    assert states(pairs) == {"equal": 2}
    assert pairs.table["how"].to_list() == ["rank", "rank"]


def test_a_dead_rank_is_missed_rank_by_rank(two):
    def dies(rank):
        if rank == 0:
            tap("x", torch.ones(2))

    pairs = pair(*two(taps("x"), dies, worlds=(2, 2)))
    assert states(pairs) == {"equal": 1, "only_a": 1}


def test_one_rank_is_held_against_each_of_the_other_side_s(two):
    pairs = pair(*two(taps("x"), taps("x"), worlds=(1, 3)))
    assert states(pairs) == {"equal": 3}


def test_shapes_that_differ_for_want_of_a_layout_are_told_from_those_that_just_differ(two):
    def job(n):
        return lambda rank: tap("x", torch.ones(n))

    assert states(pair(*two(job(2), job(3)))) == {"shape": 1}


def test_the_pairs_are_in_the_baseline_s_execution_order(two):
    def job(rank):
        for _ in range(2):
            for layer in range(2):
                tap("q", torch.ones(1), layer=layer)
                tap("hidden", torch.ones(1), layer=layer)
            step()

    pairs = pair(*two(job, job, worlds=(2, 2)))
    names = pairs.a.frame.select("name", "tags", "step")[pairs.table["a"]]
    expected = [
        (name, f'{{"layer":{layer}}}', s)
        for s in range(2)
        for layer in range(2)
        for name in ("q", "hidden")
        for _ in range(2)
    ]
    assert list(names.iter_rows()) == expected


def test_stages_of_a_pipeline_are_ordered_by_the_clock(tmp_path, recorded):
    def job(rank):
        for layer in (2 * rank, 2 * rank + 1):
            tap("hidden", torch.ones(1), layer=layer)

    a = recorded(tmp_path / "A", job, 2)
    pairs = pair(a, a)
    order = [pairs.a.frame["tags"][i] for i in pairs.table["a"]]
    assert order == [f'{{"layer":{i}}}' for i in range(4)]


def test_layouts_are_equal_where_all_ranks_hold_the_same_at_the_same_place(tmp_path, recorded):
    def job(rank):
        tap("x", torch.full((2,), float(rank)), dims="h[tp]")

    def mesh(rank):
        return {"tp": (rank, 2)}

    a, b = (recorded(tmp_path / name, job, 2, mesh) for name in "AB")
    assert states(pair(a, b)) == {"equal": 1}
    swapped = recorded(tmp_path / "C", job, 2, lambda rank: {"tp": (1 - rank, 2)})
    assert states(pair(a, swapped)) == {"todo": 1}


def test_replicas_of_any_number_are_equal_without_reading(tmp_path, recorded):
    def job(rank):
        tap("x", torch.ones(2), dims="h")

    a, b = (recorded(tmp_path / name, job, world) for name, world in (("A", 4), ("B", 2)))
    assert states(pair(a, b)) == {"equal": 1}
