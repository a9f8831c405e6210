"""What `doctor` says of a replay, without starting one."""

from __future__ import annotations

import torch
from typed import graft

from recorder import tap
from replayer.commands.doctor import examine


def detail(run, **variables):
    """What a tap would do under a replay of `run`."""
    (tap,) = examine({"GRAFT_REPLAY": str(run), **variables})["taps"]
    assert tap["does"] == "replay"
    return tap["detail"]


def test_layouts_decide_where_the_recorded_taps_declare_some(record, run):
    record(lambda rank: tap("q", torch.ones(2, 3), dims="b h[tp]"), world_size=2)
    assert "by the dims of both sides" in detail(run) and "else identity by rank" in detail(run)


def test_identity_decides_where_no_recorded_tap_declares_dims(record, run):
    record(lambda rank: tap("q", torch.ones(2, 3)))
    assert "identity by rank, since no recorded tap declares dims" in detail(run)


def test_a_transform_decides_where_one_is_named(record, run):
    record(lambda rank: tap("q", torch.ones(2, 3), dims="b h[tp]"))
    assert "transform math.hypot" in detail(run, GRAFT_REPLAY_TRANSFORM="math.hypot")


def test_how_figures_are_made_is_said(monkeypatch):
    def gone(function):
        raise RuntimeError("removed")

    assert "figures    compiled by TorchScript" in graft("doctor").stdout
    monkeypatch.setattr(torch.jit, "script", gone)
    assert "figures    op by op" in graft("doctor").stdout


def test_whether_modules_can_be_tapped_without_edits_is_said():
    assert examine({})["modules"]["open"]
    closed = examine({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})["modules"]
    assert not closed["open"] and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in closed["why"]
    wrong = examine({"GRAFT_RECORD": "run", "GRAFT_RECORD_TAPS": "no-table"})["modules"]
    assert not wrong["open"] and "there is no tap table 'no-table'" in wrong["why"]
