"""What is usual for siblings, without the one that is judged."""

from __future__ import annotations

import random
from statistics import median

import pytest

from replayer.finding.judging import _median_without


@pytest.mark.parametrize("seed", range(50))
def test_the_median_of_a_group_without_some_of_it(seed):
    draw = random.Random(seed)
    values = [float(draw.randrange(6)) for _ in range(draw.randrange(4, 30))]
    gone = draw.sample(values, draw.randrange(1, len(values) - 2))
    left = list(values)
    for value in gone:
        left.remove(value)
    assert _median_without(sorted(values), gone) == median(left)
