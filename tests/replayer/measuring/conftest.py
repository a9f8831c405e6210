"""Small chunks, and one thread of torch, for tests of measures."""

from __future__ import annotations

import pytest

from replayer.measuring import chunks, measures, quantiles


@pytest.fixture(autouse=True)
def alone(one_thread):
    """All tests of measures are about small tensors."""


@pytest.fixture
def small(monkeypatch):
    """Chunks, segments and limits such that a hundred elements go through all there is."""
    monkeypatch.setattr(chunks, "CHUNK", 8)
    monkeypatch.setattr(quantiles, "CHUNK", 8)
    monkeypatch.setattr(measures, "SEGMENT", 24)
    monkeypatch.setattr(measures, "_SUM_CHUNK", 10)
    monkeypatch.setattr(quantiles, "_SORTED", 0)
