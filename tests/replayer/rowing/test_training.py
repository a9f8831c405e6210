"""Gradients, and forwards that a backward repeats: rows are those of the first forward."""

from __future__ import annotations

import pytest
import torch
from checkpointing import frames, reentrant
from rowed.oracle import Oracle, same
from rowed.requests import REQUESTS
from rowed.trainers import APART, trainer
from rowed.views import PADDED

from recorder import Recorder, Recording
from replayer import Replayer

KINDS = {"frames": frames, "reentrant": reentrant}


def recorded(run, schedule):
    """Record a trainer; return an oracle of its taps and gradients, and what these saw."""
    fired, _ = schedule.run(lambda rank, world: Recorder(run, rank=rank, world_size=world))
    return Oracle(fired), gradients_of(fired), fired


def gradients_of(fired):
    """Return the gradient that came to each row first: (name, tags, id) -> row."""
    found: dict = {}
    for one in fired:
        for before, _ in one.gradients:
            for number, row_id in enumerate(one.ids):
                if row_id is not None:
                    found.setdefault((one.name, one.tags, row_id), before[number])
    return found


def replayed(run, schedule, **options):
    fired, (session,) = schedule.run(lambda rank, world: Replayer(run, metrics=False, **options))
    return fired, session


def check_gradients(gradients, fired):
    """Hold what went on backward against what the baseline's taps saw; return how many rows."""
    total = 0
    for one in fired:
        for before, after in one.gradients:
            for number, row_id in enumerate(one.ids):
                if row_id is None:
                    assert bool((after[number] == PADDED).all())
                    continue
                expected = gradients.get((one.name, one.tags, row_id))
                assert same(after[number], before[number] if expected is None else expected)
                total += expected is not None
    return total


@pytest.mark.parametrize("packs", [(False, True), (True, False), (True, True)])
def test_gradients_of_a_padded_and_a_packed_trainer_meet(run, packs):
    oracle, gradients, _ = recorded(run, trainer(packs[0]))
    fired, session = replayed(run, trainer(packs[1], APART[::-1], micro=2), strict=True)
    for one in fired:
        assert oracle.check(one)[1] == 0
    assert check_gradients(gradients, fired) > 1000
    log = session.log()
    assert set(log["kind"]) == {"tensor", "grad"} and set(log["outcome"]) == {"grafted"}
    assert log["rows_missing"].sum() == 0


def test_gradients_that_were_not_recorded_stay_as_they_are(run):
    _, gradients, _ = recorded(run, trainer(sequences=APART[:2]))
    fired, session = replayed(run, trainer(True))
    assert check_gradients(gradients, fired) > 500
    assert session.log().filter(kind="grad")["rows_missing"].sum() > 0


def test_the_gradients_of_a_prefix_that_two_sequences_share_are_not_the_same(run):
    recorded(run, trainer(sequences=REQUESTS[:2]))
    fired, session = replayed(run, trainer(True, REQUESTS[:2]))
    rows = session.log().filter(kind="grad", name="hidden")
    assert set(rows["outcome"]) == {"error"}
    for message in rows["message"]:
        assert "which is no rounding" in message
        assert "if the ids leave something out, add it with salt" in message
    assert all(same(*pair) for one in fired if one.name == "hidden" for pair in one.gradients)


def test_with_a_salt_for_each_sequence_they_are_told_apart(run):
    _, gradients, _ = recorded(run, trainer(sequences=REQUESTS[:2], salts=[1, 2]))
    fired, session = replayed(
        run, trainer(True, REQUESTS[1::-1], salts=[2, 1]), filter='kind == "grad"', strict=True
    )
    assert check_gradients(gradients, fired) > 500
    assert set(session.log()["outcome"]) == {"grafted"}


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_forward_that_is_repeated_outside_its_block_has_the_rows_it_had_inside(
    run, kind, last_first
):
    oracle, gradients, _ = recorded(run, trainer())
    target = trainer(True, micro=2, checkpoint=kind, last_first=last_first)
    fired, session = replayed(run, target)
    log = session.log()
    assert set(log["outcome"]) == {"grafted"} and log["rows_missing"].sum() == 0
    repeated = log.filter(log["tags"].str.contains("recompute") & (log["kind"] == "tensor"))
    assert len(repeated) == 2 * 2 * 8 and log["rows_found"].null_count() == 0
    for one in fired:
        assert oracle.check(one)[1] == 0
    assert check_gradients(gradients, fired) > 1000


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_checkpointed_baseline_has_its_rows_once_for_both_forwards(run, kind):
    schedule = trainer(micro=2, checkpoint=kind)
    oracle, gradients, _ = recorded(run, schedule)
    recording = Recording.open(run)
    rows = recording.rows()
    taps = rows.filter(rows["kind"].is_in(["tensor", "grad"]))
    assert taps["rows"].null_count() == 0
    for name in ("attn_q", "expert_in"):
        of_tap = taps.filter(name=name, kind="tensor")
        firsts = of_tap.filter(~of_tap["tags"].str.contains("recompute"))
        seconds = of_tap.filter(of_tap["tags"].str.contains("recompute"))
        by = ["tags", "occurrence", "rows"]
        assert firsts.sort(by)["rows"].to_list() == seconds.sort(by)["rows"].to_list()
    ids = {row["rows"]: recording.ids(row) for row in taps.iter_rows(named=True)}
    tokens = [one.ids[one.ids != -1].numel() for taken in ids.values() for one in taken]
    assert all(tokens), "ids were read after their memory was used for others"
    again, _ = replayed(run, trainer(True), strict=True)
    for one in again:
        assert oracle.check(one)[1] == 0
    assert check_gradients(gradients, again) > 1000


def test_values_after_a_graft_of_rows_are_what_autograd_goes_on_with(run):
    _, _, base = recorded(run, trainer())

    def off(received_list, target):
        return received_list[0] * 0

    fired, _ = replayed(run, trainer(), transform=off, filter='name == "hidden" and layer == 0')
    weights = [one for one in fired if one.name == "hidden" and one.tags == '{"layer": 0}']
    assert not any(rows.any() for one in weights for rows in one.after[_real(one)])
    assert torch.equal(base[0].before[_real(base[0])], fired[0].before[_real(fired[0])])
    assert not same(base[-1].before[_real(base[-1])], fired[-1].before[_real(fired[-1])])


def _real(fired):
    return torch.tensor([one is not None for one in fired.ids])
