"""Which rank this is."""

from __future__ import annotations

import pytest

from recorder.errors import UsageError
from recorder.ranks import Rank, current_rank


def test_in_order_graft_variables_launcher_variables_default():
    launcher = {"RANK": "1", "WORLD_SIZE": "2"}
    both = {**launcher, "GRAFT_RANK": "3", "GRAFT_WORLD_SIZE": "4"}
    assert current_rank(both) == Rank(3, 4, "GRAFT_RANK and GRAFT_WORLD_SIZE")
    assert current_rank(launcher) == Rank(1, 2, "RANK and WORLD_SIZE")
    assert current_rank({}) == Rank(0, 1, "default")
    assert current_rank({"WORLD_SIZE": "1"}) == Rank(0, 1, "default")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"GRAFT_RANK": "1"}, "GRAFT_RANK is set but GRAFT_WORLD_SIZE is not"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a number from 0 up"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "give rank 2 of a world of 2"),
    ],
)
def test_what_makes_no_sense_is_said(environ, message):
    with pytest.raises(UsageError, match=message):
        current_rank(environ)
