"""Replays that match on less than the whole key."""

from __future__ import annotations

import pytest
import torch
from tapping import fills, outcomes

from recorder import context, step, tap


def test_match_on_names_the_tags_that_count(record, replay):
    record(fills(("a", {"layer": 0, "phase": "p"}, 1), ("a", {"layer": 1, "phase": "p"}, 2)))
    target = fills(("a", {"layer": 1, "mode": "m"}, 0), ("a", {"layer": 0, "mode": "m"}, 0))
    assert outcomes(replay(target)[0]) == ["missing", "missing"]
    target.got.clear()
    replay(target, match_on="name,layer")
    assert target.got == [2, 1]


def test_match_on_counts_the_occurrence_anew_on_both_sides(record, replay):
    record(fills(*[("a", {"layer": i}, 10 + i) for i in range(3)], ("b", {}, 5)))
    target = fills(
        ("b", {"x": 1}, 0),
        ("a", {"y": 1}, 0),
        ("a", {"y": 2}, 0),
        ("a", {"y": 3}, 0),
        ("a", {}, -1),
    )
    (session,) = replay(target, match_on="name")
    assert target.got == [5, 10, 11, 12, -1]
    assert (
        "already replayed: it was recorded 3 times, and this is time 4"
        in session.log()["message"][4]
    )


def test_step_counts_only_if_named(record, replay):
    def baseline(rank):
        for s in range(2):
            tap("a", torch.full((1,), float(s)))
            step()

    record(baseline)
    target = fills(("a", {}, -1), ("a", {}, -1))
    replay(target, match_on="name")
    assert target.got == [0, 1]
    target = fills(("a", {}, -1), ("a", {}, -1))
    (session,) = replay(target, match_on="name,step")
    assert target.got == [0, -1] and outcomes(session) == ["grafted", "missing"]


def test_order_pairs_by_position_and_warns_of_contradictions(record, replay, capsys):
    record(fills(("a", {"layer": 0}, 1), ("b", {"layer": 0}, 2), ("a", {"layer": 1}, 3)))
    target = fills(
        ("a", {"layer": 0}, 0), ("a", {"layer": 1}, 0), ("c", {"other": 1}, 0), ("a", {}, -1)
    )
    (session,) = replay(target, match_on="order")
    assert target.got == [1, 2, 3, -1]
    log = session.log()
    assert log["outcome"].to_list() == ["grafted"] * 3 + ["missing"]
    m = log["message"].to_list()
    assert m[0] == "" and "layer and name differ" in m[1] and "name differ" in m[2]
    assert "selected tap number 4, and the recording has only 3" in m[3]
    assert "paired by order with b layer=0" in capsys.readouterr().err


def test_order_counts_selected_taps_on_both_sides(record, replay):
    record(fills(("a", {}, 1), ("skip", {}, 2), ("a", {}, 3)))
    target = fills(("skip", {}, 0), ("a", {}, 0), ("a", {}, 0))
    replay(target, match_on="order", filter='name == "a"')
    assert target.got == [0, 1, 3]


@pytest.mark.parametrize("match_on", [None, "name,layer", "order"])
def test_both_firings_of_a_recomputed_tap_get_the_same_record(record, replay, match_on):
    def job(tagged, fill):
        def run(rank):
            for layer in range(2):
                run.add(layer, fill(layer))
            if tagged:
                with context(recompute=True):
                    for layer in (1, 0):  # backward goes the other way
                        run.add(layer, fill(layer))

        def add(layer, number):
            t = torch.full((1,), float(number))
            tap("x", t, layer=layer)
            run.got.append(t.item())

        run.add, run.got = add, []
        return run

    record(job(True, lambda layer: layer + 1))
    target = job(True, lambda layer: -1)
    replay(target, match_on=match_on)
    assert target.got == [1, 2, 2, 1]


def test_a_filter_by_kind_counts_the_same_occurrences_as_none(record, replay):
    """A key is tapped as a number, then as a tensor, which is its second occurrence."""

    def job(scale, seen=None):
        for number in (1.0, 2.0):
            tap("x", number)
            x = tap("x", torch.full((2,), number * scale))
            if seen is not None:
                seen.append(x[0].item())

    seen = []
    record(lambda rank: job(1.0))
    (session,) = replay(lambda rank: job(100.0, seen), filter='kind == "tensor"')
    assert seen == [1.0, 2.0]
    assert session.log()["occurrence"].to_list() == [1, 3]


def advice(session):
    return [text.partition("match with --match-on ")[2] for text in session.log()["message"]]


def test_a_miss_for_a_tag_that_one_side_never_carries_says_how_to_match_once(record, replay):
    record(fills(*[("a", {"layer": i, "phase": "p"}, 1 + i) for i in range(3)]))
    target = fills(*[("a", {"layer": i}, 0) for i in range(3)])
    (session,) = replay(target)
    assert outcomes(session) == ["missing"] * 3
    assert advice(session) == ["name,layer,step", "", ""]
    assert "the target's taps carry no phase" in session.log()["message"][0]
    target.got.clear()
    replay(target, match_on="name,layer,step")
    assert target.got == [1, 2, 3]


def test_a_tag_that_only_the_target_carries_is_advised_too(record, replay):
    record(fills(("a", {"layer": 0}, 1)))
    target = fills(("a", {"layer": 0, "mode": "m"}, 0))
    (session,) = replay(target)
    assert advice(session) == ["name,layer,step"]
    assert "the recording's taps carry no mode" in session.log()["message"][0]


def test_a_tag_with_another_name_is_advised_as_a_mapping_that_matches(record, replay):
    record(fills(*[("a", {"layer": i}, 1 + i) for i in range(3)]))
    target = fills(*[("a", {"layer_id": i}, 0) for i in (2, 0, 1)])
    (session,) = replay(target)
    assert advice(session)[0] == "name,layer=layer_id,step"
    target.got.clear()
    replay(target, match_on="name,layer=layer_id,step")
    assert target.got == [3, 1, 2]


def test_a_tag_that_is_mapped_hides_the_target_s_own_of_that_name(record, replay):
    record(fills(("a", {"layer": 0}, 1), ("a", {"layer": 1}, 2)))
    target = fills(("a", {"layer": 7, "index": 1}, 0))
    replay(target, match_on="name,layer=index")
    assert target.got == [2]


@pytest.mark.parametrize(
    ("recorded", "asked", "said"),
    [
        (3, 3.0, "layer is 3, asked 3.0"),
        (3.0, 3, "layer is 3.0, asked 3"),
        (True, 1, "layer is True, asked 1"),
        (1, True, "layer is 1, asked True"),
    ],
)
def test_numbers_that_are_equal_and_not_the_same_tag_are_named_as_nearest(
    record, replay, recorded, asked, said
):
    record(fills(("a", {"layer": recorded}, 1)))
    (session,) = replay(fills(("a", {"layer": asked}, 0)))
    assert outcomes(session) == ["missing"] and said in session.log()["message"][0]


def test_a_tag_that_no_record_carries_does_not_match_everything(record, replay, capsys):
    record(lambda rank: [tap("h", torch.full((2,), 1.0 + i), layer=i) for i in range(3)])
    values = []

    def job(rank):
        for i in (2, 1, 0):
            values.append(tap("h", torch.zeros(2), layer=i)[0].item())

    (session,) = replay(job, match_on="name,layr")
    assert values == [0.0] * 3
    assert "--match-on names 'layr', which no tap carries; there are layer" in session.reason
    assert capsys.readouterr().err.count("this rank is not grafted: --match-on") == 1
