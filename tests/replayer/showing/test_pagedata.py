"""What the page of a diff is given, and the page that it becomes."""

from __future__ import annotations

import json

import pytest
import torch
from pages import COLUMNS, labels

from recorder import tap
from replayer.showing import pagedata
from replayer.showing.pagedata import page_data

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def faults(*sizes):
    """A job of one tap a size, which is how far off it is."""

    def job(rank):
        for layer, size in enumerate(sizes):
            tap("x", X * (1 + size), layer=layer)

    return job


def test_has_exactly_the_columns_of_the_page(held):
    data = page_data(held(faults(0, 0, 0), faults(0, 0.5)))
    assert sorted(data["rows"]) == sorted([*COLUMNS, "worst"])
    assert {len(values) for values in data["rows"].values()} == {3}
    assert data["rows"]["outcome"] == ["equal", "differs", "only_a"]


def test_has_the_same_columns_where_there_is_no_pair(held):
    data = page_data(held(lambda rank: None, lambda rank: None))
    assert sorted(data["rows"]) == sorted([*COLUMNS, "worst"])
    assert set(map(len, data["rows"].values())) == {0}
    assert data["first"] == {"bitwise": None, "tolerance": None}
    assert any("nothing matched" in line for line in data["lines"])


def test_the_worst_come_in_the_terminal_s_order(held):
    nan = X.clone()
    nan[0, 0] = torch.nan

    def job(*tensors):
        def taps(rank):
            for layer, tensor in enumerate(tensors):
                tap("x", tensor, layer=layer)

        return taps

    found = held(
        job(X, X, X, X[:2], X, X),
        job(X, X * 1.5, X * (1 + 1e-6), X[:3], nan, X * 9),
    )
    rows = page_data(found)["rows"]
    order = sorted(range(len(rows["worst"])), key=rows["worst"].__getitem__)
    unequal = [rows["layer"][i] for i in order if rows["outcome"][i] != "equal"]
    assert unequal == [1, 4, 5, 3, 2]  # the first divergence, NaN, then by size and outcome
    assert unequal == [json.loads(tags)["layer"] for tags in found.worst()["tags"]]
    assert rows["outcome"][order[-1]] == "equal"


def test_a_closer_look_is_had_at_no_more_than_so_many_of_the_worst(held, monkeypatch):
    monkeypatch.setattr(pagedata, "DETAILS", 3)
    data = page_data(held(faults(0, 0, 0, 0, 0, 0), faults(0, 0.1, 0.2, 0.9, 0, 0.5)))
    layers = [data["rows"]["layer"][detail["row"]] for detail in data["details"]]
    assert layers == [1, 3, 5]  # the first divergence, then from the worst on
    assert all(detail["strip"] and detail["histogram"] for detail in data["details"])


def test_rows_beyond_what_a_page_holds_are_the_equal_ones_and_counted(held, monkeypatch):
    monkeypatch.setattr(pagedata, "MOST_ROWS", 2)
    data = page_data(held(faults(0, 0, 0, 0), faults(0, 0.1, 0, 0.9)))
    assert (data["rows"]["layer"], data["left_out"]) == ([1, 3], 2)
    assert data["first"] == {"bitwise": 0, "tolerance": 0}
    assert data["counts"]["equal"] == 2
    assert [detail["row"] for detail in data["details"]] == [0, 1]


def test_can_be_written_as_json_whatever_the_elements(held):
    y = X.clone()
    y[0, :3] = torch.tensor([float("nan"), float("inf"), -3e38])
    data = page_data(held(X, y, by="0"))
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (data["rows"]["nan"], data["rows"]["inf"]) == ([1], [1])


@pytest.mark.timeout(60)
def test_a_real_diff_is_shown_in_a_browser(show, held):
    found = held(faults(0, 0, 0), faults(0, 0.5, 1e-9), by="1")
    page = show(page_data(found))
    assert "first divergence beyond tolerance: x layer=1" in page.content()
    assert set(labels(page)) == {"x layer=0", "x layer=1", "x layer=2"}
