"""Stages of a pipeline: which layers they hold, and whose record they take."""

from __future__ import annotations

import pytest
import torch

from recorder import Recorder, Recording, declare_mesh, global_layer, tap
from recorder.errors import ReplicasDiffer, UsageError
from replayer import Replayer, diff


@pytest.fixture(autouse=True)
def undeclared():
    yield
    declare_mesh()


def layers(stage, stages, numbered, got=None):
    """4 layers, the i-th of which holds i; numbered through, or on each stage from 0."""
    each = 4 // stages
    declare_mesh(pp=(stage, stages), layer_offset=stage * each if numbered == "global" else None)
    for i in range(each):
        x = torch.full((2,), float(stage * each + i))
        if got is not None:
            x = torch.full((2,), -1.0)
        layer = global_layer(i) if numbered == "global" else i
        x = tap("h", x, dims="d", layer=layer)
        if got is not None:
            got.append(x[0].item())


def record(run, stages, numbered):
    for stage in range(stages):
        with Recorder(run, rank=stage, world_size=stages):
            layers(stage, stages, numbered)
    return Recording.open(run)


def replay(run, stages, numbered):
    got, messages = [], []
    for stage in range(stages):
        with Replayer(run, rank=stage, world_size=stages) as session:
            layers(stage, stages, numbered, got)
        messages.append(session.log()["message"].to_list())
    return got, messages


def test_a_stage_that_numbers_its_layers_from_0_is_told_so(run, capsys):
    record(run, 1, "global")
    got, messages = replay(run, 2, "local")
    assert got == [0, 1, 0, 1], "the second stage was given the first one's layers"
    assert messages[0] == ["", ""]
    told = (
        "stage 1 of 2 took layer={}, and so does stage 0: if each stage numbers its layers from "
        "0, tag the global one, layer=recorder.global_layer(i)"
    )
    assert messages[1] == [told.format(0), told.format(1)]
    err = capsys.readouterr().err
    assert err.count("tag the global one") == 1 and "tap h layer=0: stage 1 of 2" in err


@pytest.mark.parametrize(("senders", "receivers"), [(1, 2), (2, 4), (4, 2), (2, 1), (2, 2)])
def test_layers_that_are_numbered_through_find_their_own(run, senders, receivers):
    record(run, senders, "global")
    got, messages = replay(run, receivers, "global")
    assert got == [0, 1, 2, 3] and not any(map(any, messages))


def test_like_pipelines_need_no_global_number(run):
    record(run, 2, "local")
    got, messages = replay(run, 2, "local")
    assert got == [0, 1, 2, 3] and not any(map(any, messages))


def test_layers_of_several_senders_under_one_number_are_refused_with_the_way_out(run, tmp_path):
    back = record(run, 2, "local")
    with pytest.raises(ReplicasDiffer, match=r"several stages .* layer=recorder.global_layer\(i\)"):
        back.load_logical("h", layer=0)
    with Replayer(run) as session:
        layers(0, 1, "global", [])
    outcomes = session.log().select("outcome", "message").rows()
    assert outcomes[0][0] == "error" and "tag the global one at the tap" in outcomes[0][1]
    one = record(tmp_path / "one", 1, "global")
    found = diff(one.path, run)
    assert found.status == 1
    assert "recorded by several stages" in " ".join(filter(None, found.pairs["message"]))


def test_the_global_number_of_a_layer():
    assert global_layer(3) == 3, "without a mesh there is one stage"
    declare_mesh(pp=(2, 4), layer_offset=10)
    assert global_layer(3) == 13
    declare_mesh(pp=(2, 4))
    assert global_layer(1, of=8) == 5
    for of in (None, 9):
        with pytest.raises(UsageError, match="how many layers come before stage 2 of 4; declare"):
            global_layer(1, of)
    declare_mesh(pp=(0, 4))
    assert global_layer(1) == 1
    for wrong in (-1, 1.5, True, "3"):
        with pytest.raises(UsageError, match="layer_offset is"):
            declare_mesh(pp=(0, 2), layer_offset=wrong)
