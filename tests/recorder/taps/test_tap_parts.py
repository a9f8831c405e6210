"""One line of the user's code for several tensors one behind the other: a tap for each."""

from __future__ import annotations

import pytest
import torch

from recorder import Recorder, Recording, context, declare_mesh, tap

DIMS = "s {q: h | k: g | v: g} # h=4"


@pytest.fixture(autouse=True)
def undeclared():
    yield
    declare_mesh()


def test_each_part_is_a_tap_with_the_tags_of_the_call_and_nothing_has_the_name(run):
    x = torch.arange(24.0).view(3, 8)
    with Recorder(run), context(phase="prefill"):
        assert tap("qkv", x, dims=DIMS, extras={"scale": 2}, layer=1) is x
        tap("qkv", x + 1, dims=DIMS, layer=1)
    rows = Recording.open(run).rows().sort("seq")
    assert rows["name"].to_list() == ["q", "k", "v"] * 2
    assert set(rows["tags"]) == {'{"layer":1,"phase":"prefill"}'}
    assert rows["dims"].to_list()[:3] == ["s h # h=4", "s g", "s g"]
    assert rows["occurrence"].to_list() == [0] * 3 + [1] * 3
    assert rows["extras"].to_list()[:3] == ['{"scale":2}'] * 3
    back = Recording.open(run)
    assert torch.equal(back.load(0, "v", layer=1, phase="prefill"), x[:, 6:])


def test_a_callable_is_called_once_and_only_if_a_part_is_wanted(run, tmp_path):
    called = []

    def make():
        called.append(1)
        return torch.zeros(3, 8)

    with Recorder(tmp_path / "none", filter='name == "x"'):
        tap("qkv", make, dims=DIMS)
    assert called == []
    with Recorder(run, filter='name in ("q", "v")'):
        tap("qkv", make, dims=DIMS)
    assert called == [1]
    assert Recording.open(run).rows()["name"].to_list() == ["q", "v"]


def test_a_callable_that_fails_is_called_once(run, capsys):
    called = []

    def make():
        called.append(1)
        raise RuntimeError("no cache")

    with Recorder(run):
        tap("qkv", make, dims=DIMS)
    assert called == [1]
    assert "its callable raised RuntimeError: no cache" in capsys.readouterr().err


def test_a_filter_that_ignores_a_tap_of_the_same_name_does_not_ignore_the_parts(run):
    with Recorder(run, filter='name == "q"'):
        for _ in range(2):
            tap("qkv", torch.zeros(1), layer=1)
            tap("qkv", torch.zeros(3, 8), dims=DIMS, layer=1)
    assert Recording.open(run).rows()["name"].to_list() == ["q", "q"]


@pytest.mark.parametrize(
    ("value", "dims", "said"),
    [
        (torch.zeros(3, 4), DIMS, "has 4 here, which is not what its parts make with h=4"),
        (torch.zeros(3, 8), "s {q: h | k: g}", "the size of g is not known"),
        (3.5, DIMS, "it is a float, and only a tensor has parts"),
        (torch.zeros(3, 8), "s {q: h | k", "the brace at '{q: h | k' is not closed"),
    ],
)
def test_what_does_not_fit_is_said_once_with_the_call_site_and_skipped(
    run, capsys, value, dims, said
):
    with Recorder(run):
        for _ in range(2):
            tap("qkv", value, dims=dims)
        tap("other", torch.zeros(1))
    err = capsys.readouterr().err
    assert err.count("is not recorded") == err.count(said) == 1
    assert "'qkv' at " in err and "test_tap_parts.py:" in err
    assert Recording.open(run).rows()["name"].to_list() == ["other"]


def test_the_mesh_of_the_rank_decides_where_sizes_of_the_whole_are_declared(run):
    declare_mesh(tp=(1, 2))
    with Recorder(run, rank=1, world_size=2):
        tap("qkv", torch.arange(8.0), dims="{q: h[tp] | k: g} # h=12")
    assert Recording.open(run).load(1, "k").tolist() == [6, 7]
