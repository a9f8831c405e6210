"""Replaying, many ranks in one process: what is grafted, what is not, and what the log says."""

from __future__ import annotations

import pytest
import torch
from tapping import outcomes, tapper

from recorder import step, tap
from recorder.errors import RecordingError, ReplayError, TransformError, UsageError
from replayer import GraftInput, Replayer
from replayer.log import COLUMNS


def test_identity_by_rank(record, replay):
    record(tapper(lambda rank: torch.full((2, 3), rank + 1.0)), 2)
    target = tapper(lambda rank: torch.zeros(2, 3))
    sessions = replay(target, 2)
    assert [t.mean().item() for t in target.got] == [1, 2]
    log = sessions[1].log()
    assert log.columns == list(COLUMNS)
    row = log.row(0, named=True)
    assert row["outcome"] == "grafted" and row["n_senders"] == 2 and row["rank"] == 1
    assert (row["rel_diff"], row["max_abs"], row["mean_abs"]) == (1.0, 2.0, 2.0)
    assert (row["changed"], row["numel"]) == (6, 6) and row["seconds"] > 0


def test_four_senders_to_two_receivers_with_either_signature(record, replay):
    whole = torch.arange(32.0).view(2, 16)
    record(tapper(lambda rank: whole.chunk(4, 1)[rank].clone()), 4)
    zeros = lambda rank: torch.zeros(2, 8)  # noqa: E731

    def one(g: GraftInput):
        assert (g.sender_world_size, g.world_size, len(g.received_list)) == (4, 2, 4)
        return torch.cat(g.received_list, 1).chunk(g.world_size, 1)[g.rank]

    target = tapper(zeros)
    replay(target, 2, transform=one)
    assert torch.equal(torch.cat(target.got, 1), whole)

    def two(received_list, target):
        return torch.cat(received_list, 1)[:, : target.shape[1]]

    target = tapper(zeros)
    replay(target, 2, transform=two)
    assert torch.equal(target.got[1], whole[:, :8])


def test_two_senders_to_four_receivers_and_senders_of_different_shapes(record, replay):
    record(tapper(lambda rank: torch.arange(3.0 + 2 * rank)), 2)  # 3 and 5 elements
    target = tapper(lambda rank: torch.full((2,), -1.0))
    replay(target, 4, transform=lambda g: torch.cat(g.received_list).chunk(4)[g.rank])
    assert torch.cat(target.got).tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_senders_that_have_nothing_are_none_and_extras_arrive(record, replay):
    def baseline(rank):
        if rank != 1:
            tap("x", torch.full((2,), float(rank)), dims="t", extras={"from": rank})

    record(baseline, 3)
    seen = []

    def transform(g):
        seen.append(g)
        return next(t for t in g.received_list if t is not None)

    def job(rank):
        tap("x", torch.zeros(2), dims="t h", layer=None)

    replay(lambda rank: tap("x", torch.zeros(2), dims="t h"), 1, transform=transform)
    (g,) = seen
    assert [None if t is None else t[0].item() for t in g.received_list] == [0, None, 2]
    assert g.received_extras_list == [{"from": 0}, None, {"from": 2}]
    assert (g.dims, g.sender_dims, g.tags, g.key.name) == ("t h", "t", {"name": "x"}, "x")


def test_steps_and_occurrences_are_matched_by_key(record, replay):
    def job(fill):
        def run(rank):
            for s in range(3):
                for k in range(2):
                    t = torch.full((2,), fill(s, k))
                    tap("x", t)
                    run.got.append(t[0].item())
                step()

        run.got = []
        return run

    record(job(lambda s, k: 10.0 * s + k))
    target = job(lambda s, k: -1.0)
    replay(target)
    assert target.got == [0, 1, 10, 11, 20, 21]


def test_a_step_offset_takes_from_later_steps(record, replay):
    def baseline(rank):
        for s in range(4):
            tap("x", torch.full((1,), float(s)))
            step()

    record(baseline)
    got = []

    def target(rank):
        for _ in range(2):
            t = torch.zeros(1)
            tap("x", t)
            got.append(t.item())
            step()

    replay(target, step_offset=2)
    assert got == [2, 3]


def test_one_extra_call_on_the_sender_shifts_nothing(record, replay):
    def baseline(rank):
        for layer in range(3):
            if layer == 1:
                tap("extra", torch.full((1,), 99.0))
            tap("x", torch.full((1,), float(layer)), layer=layer)

    record(baseline)
    got = []

    def target(rank):
        for layer in range(3):
            t = torch.full((1,), -1.0)
            tap("x", t, layer=layer)
            got.append(t.item())

    replay(target)
    assert got == [0, 1, 2]


def test_unequal_worlds_without_a_transform(record, replay, capsys):
    record(tapper(torch.ones(2)), 4)
    target = tapper(torch.zeros(2))
    sessions = replay(target, 2)
    assert [t.sum().item() for t in target.got] == [0, 0]
    row = sessions[0].log().row(0, named=True)
    assert row["outcome"] == "error"
    assert (
        "there are 4 senders and 2 receivers; neither tap declares dims: say how it is cut at the "
        "taps of both sides, and record it again, as in dims='a', or name a transform with "
        "--transform" in row["message"]
    )
    err = capsys.readouterr().err
    assert "[graft rank=0 step=0] tap x step=0 occurrence=0 was not grafted: " in err


def _raises_after_writing(g):
    g.target.fill_(7)
    g.received_list[0].fill_(7)
    raise ValueError("half-way")


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (_raises_after_writing, "raised ValueError: half-way"),
        (lambda g: None, "returned None, expected a tensor"),
        (lambda g: 3.0, "returned a float"),
        (lambda g: torch.zeros(5), "shapes differ"),
        (lambda g: torch.zeros(1), "shapes differ"),
        (lambda g: torch.zeros(2, device="meta"), "on meta, the target is on cpu"),
        (lambda g: g.received_list[0].to_sparse(), "its layout is sparse"),
        (lambda g: g.nothing, "raised AttributeError"),
    ],
)
def test_a_failing_transform_leaves_the_target_exactly_as_it_was(
    record, replay, transform, message
):
    record(tapper(torch.ones(2)))
    target = tapper(torch.tensor([1.5, -0.0]))
    (session,) = replay(target, transform=transform)
    assert target.got[0].tolist() == [1.5, -0.0]
    assert outcomes(session) == ["error"]
    assert message in session.log()["message"][0]
    target = tapper(torch.zeros(2))
    replay(target)
    assert target.got[0].sum() == 2  # nor was the recording harmed


def test_a_transform_may_write_into_what_it_receives(record, replay):
    record(lambda rank: [tap("x", torch.ones(2)), tap("x", torch.ones(2))])  # stored once

    def transform(g):
        g.target.fill_(5)
        return g.received_list[0].add_(1)

    got = []

    def target(rank):
        for _ in range(2):
            t = torch.zeros(2)
            tap("x", t)
            got.append(t[0].item())

    replay(target, transform=transform)
    assert got == [2, 2]


def test_a_target_that_overlaps_itself_is_refused(record, replay):
    record(tapper(torch.ones(3, 2)))
    base = torch.zeros(1, 2)
    (session,) = replay(lambda rank: tap("x", base.expand(3, 2)))
    assert base.sum() == 0 and "overlap in memory" in session.log()["message"][0]


def test_on_error_raise_stops_the_job(record, run):
    record(tapper(torch.ones(2)))
    with (
        pytest.raises(
            ReplayError, match="tap x step=0 occurrence=0 was not grafted: shapes differ"
        ),
        Replayer(run, transform=lambda g: torch.zeros(3), on_error="raise"),
    ):
        tap("x", torch.zeros(2))


def test_what_the_recording_lacks_names_the_nearest_and_what_differs(record, replay, run, capsys):
    def baseline(rank):
        for layer in range(2):
            tap("attn_out", torch.ones(1), layer=layer)

    record(baseline)

    def target(rank):
        tap("attn_out", torch.zeros(1), layer=7)
        tap("atn_out", torch.zeros(1), layer=0)
        used = torch.zeros(1)
        tap("attn_out", used, layer=1)
        tap("attn_out", torch.zeros(1), layer=1)
        tap("zzz", torch.zeros(1))
        step()
        tap("attn_out", torch.zeros(1), layer=0)

    (session,) = replay(target)
    assert outcomes(session) == ["missing", "missing", "grafted", "missing", "missing", "missing"]
    m = session.log()["message"].to_list()
    assert "nearest: attn_out layer=" in m[0] and "asked 7" in m[0]
    assert "the name differs" in m[1]
    assert "already replayed: it was recorded 1 time in step 0, and this is time 2" in m[3]
    assert "names recorded: attn_out" in m[4]
    assert "step is 0, asked 1" in m[5]
    assert len(capsys.readouterr().err.splitlines()) == 3  # one a name, the rest in the log
    with (
        pytest.raises(ReplayError, match="nothing recorded under"),
        Replayer(run, on_missing="raise"),
    ):
        tap("attn_out", torch.zeros(1), layer=7)


def test_strict_tells_what_was_missed_and_what_was_never_used(record, run):
    record(lambda rank: [tap("a", torch.ones(1), layer=i) for i in range(3)])
    used = torch.zeros(1)
    with (
        pytest.raises(ReplayError, match="2 selected records of 3 never used, such as a layer=1"),
        Replayer(run, strict=True),
    ):
        tap("a", used, layer=0)
    with Replayer(run, strict=True, filter="layer == 0"):
        tap("a", used, layer=0)
    with (
        pytest.raises(ReplayError, match="1 selected tap had no record, the first: b"),
        Replayer(run, strict=True, filter='name == "b" or layer == 0'),
    ):
        tap("a", used, layer=0)
        tap("b", torch.zeros(1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_error": "explode"}, UsageError, "on_error is 'explode'; choose one of skip, raise"),
        ({"on_missing": ""}, UsageError, "on_missing is ''"),
        ({"match_on": "name,,layer"}, UsageError, "names an empty tag"),
        ({"match_on": "order,name"}, UsageError, "order stands alone"),
        ({"match_on": "name,name"}, UsageError, "names a tag twice"),
        ({"match_on": "name,recompute"}, UsageError, "cannot use 'recompute'"),
        ({"match_on": "name=n"}, UsageError, "'name=n': `name` and `step` are called so on both"),
        ({"record": "True"}, UsageError, "record needs a folder"),
        ({"step_offset": 1.5}, UsageError, "give a whole number"),
        ({"transform": "no.such.fn"}, TransformError, "cannot be imported"),
        ({"filter": "layer <"}, UsageError, "not a Python expression"),
    ],
)
def test_options_are_checked_by_explicit_errors(record, run, options, error, message):
    record(tapper(torch.ones(1)))
    with pytest.raises(error, match=message):
        Replayer(run, **options)


def test_there_must_be_a_recording(tmp_path):
    with pytest.raises(RecordingError, match="is not a recording"):
        Replayer(tmp_path)


def test_a_damaged_tensor_fails_that_graft_and_leaves_the_others_alone(record, replay, run):
    record(
        lambda rank: (
            [tap("a", torch.ones(2), i=i) for i in range(1)] + [tap("b", torch.full((2,), 2.0))]
        )
    )
    shard = next(run.rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    got = []

    def target(rank):
        for name, tags in (("a", {"i": 0}), ("b", {})):
            t = torch.zeros(2)
            tap(name, t, **tags)
            got.append(t[0].item())

    (session,) = replay(target)
    assert outcomes(session) == ["grafted", "error"] and got == [1, 0]
    assert "do not have the digest" in session.log()["message"][1]
