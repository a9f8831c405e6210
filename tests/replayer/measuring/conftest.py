"""Small chunks, and one thread of torch, for tests of measures."""

from __future__ import annotations

import pytest
import torch

from replayer.measuring import chunks, measures, quantiles


@pytest.fixture(autouse=True)
def one_thread():
    """Torch's own threads, which so small tensors have no use for, wait long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch):
    """Chunks, segments and limits such that a hundred elements go through all there is."""
    monkeypatch.setattr(chunks, "CHUNK", 8)
    monkeypatch.setattr(quantiles, "CHUNK", 8)
    monkeypatch.setattr(measures, "SEGMENT", 24)
    monkeypatch.setattr(measures, "_SUM_CHUNK", 10)
    monkeypatch.setattr(quantiles, "_SORTED", 0)
