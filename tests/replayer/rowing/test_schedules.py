"""A decoder run in many ways: whatever one computes, a replay grafts onto the same rows of another.

What each row has to be is held against plain dictionaries of what the baseline's taps saw.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
from rowed.model import LAYERS
from rowed.oracle import Oracle, same
from rowed.requests import REQUESTS
from rowed.schedules import SCHEDULES, Server, packed, server
from rowed.views import Log, rows_of

from recorder import Recorder
from recorder.errors import ReplayError
from replayer import Replayer


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    """Return the recording of a schedule, and an oracle of it; each is made once."""

    @functools.cache
    def baseline(name, seed=0):
        folder = tmp_path_factory.mktemp(name) / "run"
        schedule = SCHEDULES[name] if not seed else server(seed)
        fired, _ = schedule.run(
            lambda rank, world: Recorder(folder, rank=rank, world_size=world), salt=0
        )
        return folder, Oracle(fired)

    return baseline


def replayed(folder, schedule, salt=0, names=None, **options):
    """Replay onto a schedule; return what its taps saw, and their rows of the log, in order.

    `names` are those of the taps to graft; what the others saw is left out.
    """
    options = {"metrics": False, **options}
    if names:
        options["filter"] = f"name in {names!r}"
    fired, sessions = schedule.run(
        lambda rank, world: Replayer(folder, rank=rank, world_size=world, **options), salt
    )
    logs = [row for session in sessions for row in session.log().iter_rows(named=True)]
    fired = [one for one in fired if not names or one.name in names]
    assert len(logs) == len(fired)
    return fired, logs, sessions


def checked(oracle, fired, logs):
    """Hold all taps against the oracle, and the log against both."""
    for one, row in zip(fired, logs, strict=True):
        found, missing = oracle.check(one)
        shown = {name: row[name] for name in ("name", "tags", "step", "rank", "outcome", "message")}
        if found or not missing:
            assert row["outcome"] == "grafted", shown
            assert (row["rows_found"], row["rows_missing"]) == (found, missing), shown
        else:
            assert row["outcome"] == "missing", shown
            assert row["message"].startswith("no row in common: none of its "), shown


PAIRS = [(a, b) for a in SCHEDULES for b in SCHEDULES]


@pytest.mark.parametrize(("baseline", "target"), PAIRS, ids=[f"{a} onto {b}" for a, b in PAIRS])
def test_every_row_gets_what_the_baseline_computed_for_its_prefix(baselines, baseline, target):
    folder, oracle = baselines(baseline)
    fired, logs, _ = replayed(folder, SCHEDULES[target])
    checked(oracle, fired, logs)
    assert sum(row["rows_found"] or 0 for row in logs) > 900


@pytest.mark.parametrize("seed", range(1, 4))
def test_servers_that_were_asked_in_another_order_meet(baselines, seed):
    folder, oracle = baselines("server", seed)
    for target in (server(seed + 10), SCHEDULES["packed"]):
        fired, logs, _ = replayed(folder, target)
        checked(oracle, fired, logs)


def test_a_server_computes_some_prefixes_twice_and_some_not_at_all():
    log = Log()
    one = Server(0, log, 0)
    with torch.no_grad():
        one.play()
    places = [row_id for fired in log.fired if fired.name == "attn_q" for row_id in fired.ids]
    real = [row_id for row_id in places if row_id is not None]
    requests = sum(len(tokens) for tokens in REQUESTS)
    assert len({*real}) < len(real) // LAYERS < requests < len(places)
    assert log.step > 10


def test_schedules_agree_within_rounding_where_no_expert_drops_tokens():
    oracles = {
        name: Oracle(schedule.run(lambda rank, world: nullcontext())[0])
        for name, schedule in SCHEDULES.items()
        if schedule.agrees
    }
    first = oracles.pop("right")
    for other in oracles.values():
        for key, parts in other.rows.items():
            for (a, cut, n), (b, _, m) in zip(
                first.rows[key].values(), parts.values(), strict=False
            ):
                if cut is None and n == m == 1:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestStrict:
    def test_nothing_is_amiss_where_all_rows_were_computed(self, baselines):
        folder, _ = baselines("server")
        names = ("attn_q", "attn_out", "expert_in", "expert_out", "hidden")
        _, logs, _ = replayed(folder, SCHEDULES["packed"], strict=True, names=names)
        assert {row["outcome"] for row in logs} == {"grafted"}
        assert sum(row["rows_missing"] for row in logs) == 0

    def test_rows_that_were_not_computed_are_an_error_at_the_end(self, baselines):
        folder, oracle = baselines("experts")
        with pytest.raises(
            ReplayError, match=r"--strict: \d+ rows of \d+ taps had no record"
        ) as err:
            replayed(folder, SCHEDULES["packed"], strict=True)
        first = next(one for one in played("packed") if lost(oracle, one))
        assert f"the first: {first.name} layer=0 step=0 on rank 0" in str(err.value)

    def test_records_of_which_no_row_was_asked_for_are_one_too(self, baselines):
        folder, _ = baselines("server")
        with pytest.raises(ReplayError, match=r"--strict: \d+ selected records of \d+ never used"):
            replayed(folder, packed(requests=REQUESTS[2:3]), strict=True, names=("hidden",))

    def test_a_rank_whose_experts_got_no_token_leaves_none_over(self, baselines):
        folder, _ = baselines("experts")
        fired, logs, _ = replayed(folder, SCHEDULES["experts"], strict=True, names=("expert_in",))
        assert any(not one.ids for one in fired)
        assert sum(row["rows_missing"] for row in logs) == 0


def played(name):
    return SCHEDULES[name].run(lambda rank, world: nullcontext())[0]


def lost(oracle, fired):
    return [one for one in fired.ids if one is not None and oracle.row(fired, one) is None]


@pytest.mark.parametrize("target", ["right", "experts", "context"])
def test_other_tokens_have_no_row_in_common_and_stay_as_they_are(baselines, target):
    folder, _ = baselines("packed")
    fired, logs, (session, *_) = replayed(folder, SCHEDULES[target], salt="another")
    for one, row in zip(fired, logs, strict=True):
        assert same(one.after, one.before)
        if any(row_id is not None for row_id in one.ids):
            assert row["outcome"] == "missing"
            assert "are these other tokens, or ids with another salt?" in row["message"]
    assert session.problems()[0].startswith("nothing was grafted: no selected tap has a record")


class TestTransforms:
    """What it gets are the rows as they stand in the target, and zeros where none was recorded."""

    def test_of_two_arguments(self, baselines):
        folder, oracle = baselines("server")
        seen = []

        def negated(received_list, target):
            (received,) = received_list
            seen.append((received.clone(), target.clone()))
            target.fill_(3)
            received *= -1
            return received

        fired, logs, _ = replayed(folder, SCHEDULES["left"], transform=negated)
        for one, row, (received, target) in zip(fired, logs, seen, strict=True):
            assert row["outcome"] == "grafted"
            assert same(rows_of(target, one.many), one.before)
            for number, row_id in enumerate(one.ids):
                expected = None if row_id is None else oracle.row(one, row_id)
                got = rows_of(received, one.many)[number]
                if expected is None:
                    assert not got.any() and same(one.after[number], one.before[number])
                else:
                    assert same(got, expected) and same(one.after[number], -expected)

    def test_of_one_argument_gets_each_part_from_the_rank_that_had_it(self, baselines):
        folder, oracle = baselines("context")
        parts = []

        def summed(g):
            there = [i for i, one in enumerate(g.received_list) if one is not None]
            parts.append((g.tags["name"], there, g.sender_dims, g.dims))
            received = [g.received_list[i] for i in there]
            if "[tp:partial]" in g.sender_dims:
                return sum(one.double() for one in received).float()
            return torch.cat(received, 1)  # behind t, where the senders have b s

        fired, _, _ = replayed(
            folder, SCHEDULES["packed"], transform=summed, names=("attn_q", "attn_out", "logits")
        )
        assert {(name, *there) for name, there, _, _ in parts} == {
            ("attn_q", 0, 1),
            ("attn_out", 0, 1),
            ("logits", 0, 1),
        }
        for one in fired:
            assert oracle.check(one)[1] == 0

    def test_that_wants_the_whole_is_told_that_there_is_none(self, baselines):
        folder, _ = baselines("packed")
        fired, logs, _ = replayed(
            folder, SCHEDULES["right"], transform=lambda g: g.logical(), names=("hidden",)
        )
        assert all("are matched one by one there is no whole" in row["message"] for row in logs)
        assert all(same(one.after, one.before) for one in fired)

    def test_that_fails_leaves_the_target_alone(self, baselines):
        folder, _ = baselines("packed")

        def failing(g):
            g.target.zero_()
            g.received_list[0].zero_()
            raise RuntimeError("no")

        fired, logs, _ = replayed(folder, SCHEDULES["right"], transform=failing)
        assert {row["outcome"] for row in logs} == {"error"}
        assert all(same(one.after, one.before) for one in fired)
