"""Diffs of one decoder run in many ways: nothing where all is well, else the token that is off."""

from __future__ import annotations

import functools

import pytest
from rowed import views
from rowed.ids import prefix_ids
from rowed.requests import REQUESTS
from rowed.schedules import SCHEDULES

from recorder import Recorder
from recorder import tap as plain_tap
from recorder.taps.around import rows_around
from replayer import diff

AGREEING = [name for name, schedule in SCHEDULES.items() if schedule.agrees]
PAIRS = [(a, b) for a in AGREEING for b in AGREEING]
REQUEST, DECODE_STEP = 2, 3


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Return the recording of a schedule, made once; clean, or with a fault at one token."""

    @functools.cache
    def recording(name, token=None, layer=1):
        folder = tmp_path_factory.mktemp(name) / "run"

        def tap(name, tensor, *, rows=None, **options):
            if name == "attn_out" and options.get("layer") == layer and token is not None:
                ids = rows_around()[0].taken().ids if rows is None else next(iter(rows.values()))
                at = (ids.flatten() == token).nonzero().flatten()
                tensor = tensor.clone()
                tensor.flatten(0, ids.dim() - 1)[at] *= 1.01
            return plain_tap(name, tensor, rows=rows, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(views, "tap", tap)
            SCHEDULES[name].run(
                lambda rank, world: Recorder(folder, rank=rank, world_size=world), salt=0
            )
        return folder

    return recording


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=[f"{a} and {b}" for a, b in PAIRS])
def test_clean_pairs_have_nothing_beyond_tolerance(recordings, a, b):
    found = diff(recordings(a), recordings(b))
    bad = found.worst().filter(~found.worst()["outcome"].is_in(["close", "equal"]))
    assert found.status == 0, bad.select("name", "tags", "outcome", "message").rows()
    assert {*found.pairs["how"]} == {"rows"}
    logits = found.pairs["name"] == "logits"  # a server asks for those of few tokens
    alone = found.pairs.filter(~logits).select("rows_a", "rows_b").fill_null(0)
    assert alone.max().rows() == [(0, 0)]


@pytest.mark.parametrize("faulty", ["right", "packed", "server", "context", "data"])
@pytest.mark.parametrize("other", ["server", "right"])
def test_a_fault_at_one_decoded_token_is_named_with_that_token(recordings, faulty, other):
    prompt = len(REQUESTS[REQUEST]) - 4
    one = prefix_ids(REQUESTS[REQUEST], 0)[prompt + DECODE_STEP]
    for a, b, side in (
        (recordings(other), recordings(faulty, one), "at_b"),
        (recordings(faulty, one), recordings(other), "at_a"),
    ):
        found = diff(a, b)
        assert found.status == 1
        row = found.first("tolerance")
        assert (row["name"], row["tags"]) == ("attn_out", '{"layer":1}')
        assert row["row"] == [one]
        assert row[side] is not None
        assert found.counts()["differs"] == 1
