"""A recorded job whose target can be made wrong."""

from __future__ import annotations

import pytest
from layered import job

from recorder import Recorder


@pytest.fixture
def base(run):
    """Record the right job, of some steps; return its folder."""

    def base(steps: int = 1, **options):
        with Recorder(run):
            job(steps=steps, **options)()
        return run

    return base
