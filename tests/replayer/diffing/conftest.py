"""Fixtures of the tests of diffs."""

from __future__ import annotations

import pytest
from diffs import X

from recorder import tap


@pytest.fixture(scope="module")
def apart(recorded, tmp_path_factory):
    """Two recordings that differ in all of `x`."""
    folder = tmp_path_factory.mktemp("apart")
    return tuple(
        recorded(folder / name, lambda rank, t=t: tap("x", t))
        for name, t in (("A", X), ("B", X + 1))
    )
