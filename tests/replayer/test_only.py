"""A replay of some taps alone: those that it passes over are counted all the same."""

from __future__ import annotations

import pytest
import torch

from recorder import Recorder, tap
from recorder.errors import UsageError
from replayer import Replayer
from replayer.only import Tap, write


def train(factor):
    """Return the two parts' gradients, of two taps that only their order tells apart."""
    parts = [torch.full((3,), 1.0, requires_grad=True) for _ in range(2)]
    taps = [tap("w", part * 1.0, grad=True, micro=i) for i, part in enumerate(parts)]
    sum((i + 1) * factor * one.sum() for i, one in enumerate(taps)).backward()
    return [float(part.grad[0]) for part in parts]


@pytest.mark.parametrize("match_on", [None, "name", "order"])
def test_only_the_gradients_that_are_named_are_grafted(run, tmp_path, match_on):
    with Recorder(run):
        train(1.0)
    write(tmp_path / "only.json", [Tap("w", '{"micro":0}', "grad")])
    with Replayer(run, only=str(tmp_path / "only.json"), match_on=match_on) as replay:
        assert train(10.0) == [1.0, 20.0]
    log = replay.log()
    assert log.select("kind", "tags", "outcome").rows() == [("grad", '{"micro":0}', "grafted")]


def test_a_file_that_names_no_taps_is_refused(run, tmp_path):
    with Recorder(run):
        train(1.0)
    (tmp_path / "only.json").write_text("[1, 2]")
    with pytest.raises(UsageError, match="as graft bisect writes it"):
        Replayer(run, only=str(tmp_path / "only.json"))
