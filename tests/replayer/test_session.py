"""Replaying, many ranks in one process: what is grafted, what is not, and what the log says."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from recorder import Recording, context, step, tap
from recorder.errors import RecordingError, ReplayError, TransformError, UsageError
from replayer import GraftInput, Replayer
from replayer.log import COLUMNS, read_log


def tapper(value, name="x", **tags):
    """A job of one tap; it leaves the tapped tensors of each rank in `got`."""

    def job(rank):
        t = value(rank) if callable(value) else value.clone()
        tap(name, t, **tags)
        job.got.append(t)

    job.got = []
    return job


def outcomes(session):
    return session.log()["outcome"].to_list()


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


# Failures, as rule 2 has them --------------------------------------------------------------------


def test_unequal_worlds_without_a_transform(record, replay, capsys):
    record(tapper(torch.ones(2)), 4)
    target = tapper(torch.zeros(2))
    sessions = replay(target, 2)
    assert [t.sum().item() for t in target.got] == [0, 0]
    row = sessions[0].log().row(0, named=True)
    assert row["outcome"] == "error"
    assert (
        "there are 4 senders and 2 receivers; name a transform with --transform" in row["message"]
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
        tap("attn_out", torch.zeros(1), layer=1)
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
    with (
        pytest.raises(ReplayError, match="2 selected records of 3 never used, such as a layer=1"),
        Replayer(run, strict=True),
    ):
        tap("a", torch.zeros(1), layer=0)
    with Replayer(run, strict=True, filter="layer == 0"):
        tap("a", torch.zeros(1), layer=0)
    with (
        pytest.raises(ReplayError, match="1 selected tap had no record, the first: b"),
        Replayer(run, strict=True, filter='name == "b" or layer == 0'),
    ):
        tap("a", torch.zeros(1), layer=0)
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


# Matching on less than the whole key -------------------------------------------------------------


def fills(*taps):
    """A job of taps (name, tags, number); what the tensors hold afterwards is in `got`."""

    def job(rank):
        for name, tags, number in taps:
            t = torch.full((1,), float(number))
            tap(name, t, **tags)
            job.got.append(t.item())

    job.got = []
    return job


def test_match_on_names_the_tags_that_count(record, replay):
    record(fills(("a", {"layer": 0, "phase": "p"}, 1), ("a", {"layer": 1, "phase": "p"}, 2)))
    target = fills(("a", {"layer": 1, "mode": "m"}, 0), ("a", {"layer": 0, "mode": "m"}, 0))
    assert outcomes(replay(target)[0]) == ["missing", "missing"]
    target.got.clear()
    replay(target, match_on="name,layer")
    assert target.got == [2, 1]


def test_match_on_counts_the_occurrence_anew_on_both_sides(record, replay):
    record(fills(*[("a", {"layer": i}, 10 + i) for i in range(3)], ("b", {}, 5)))
    target = fills(
        ("b", {"x": 1}, 0),
        ("a", {"y": 1}, 0),
        ("a", {"y": 2}, 0),
        ("a", {"y": 3}, 0),
        ("a", {}, -1),
    )
    (session,) = replay(target, match_on="name")
    assert target.got == [5, 10, 11, 12, -1]
    assert (
        "already replayed: it was recorded 3 times, and this is time 4"
        in session.log()["message"][4]
    )


def test_step_counts_only_if_named(record, replay):
    def baseline(rank):
        for s in range(2):
            tap("a", torch.full((1,), float(s)))
            step()

    record(baseline)
    target = fills(("a", {}, -1), ("a", {}, -1))
    replay(target, match_on="name")
    assert target.got == [0, 1]
    target = fills(("a", {}, -1), ("a", {}, -1))
    (session,) = replay(target, match_on="name,step")
    assert target.got == [0, -1] and outcomes(session) == ["grafted", "missing"]


def test_order_pairs_by_position_and_warns_of_contradictions(record, replay, capsys):
    record(fills(("a", {"layer": 0}, 1), ("b", {"layer": 0}, 2), ("a", {"layer": 1}, 3)))
    target = fills(
        ("a", {"layer": 0}, 0), ("a", {"layer": 1}, 0), ("c", {"other": 1}, 0), ("a", {}, -1)
    )
    (session,) = replay(target, match_on="order")
    assert target.got == [1, 2, 3, -1]
    log = session.log()
    assert log["outcome"].to_list() == ["grafted"] * 3 + ["missing"]
    m = log["message"].to_list()
    assert m[0] == "" and "layer and name differ" in m[1] and "name differ" in m[2]
    assert "selected tap number 4, and the recording has only 3" in m[3]
    assert "paired by order with b layer=0" in capsys.readouterr().err


def test_order_counts_selected_taps_on_both_sides(record, replay):
    record(fills(("a", {}, 1), ("skip", {}, 2), ("a", {}, 3)))
    target = fills(("skip", {}, 0), ("a", {}, 0), ("a", {}, 0))
    replay(target, match_on="order", filter='name == "a"')
    assert target.got == [0, 1, 3]


@pytest.mark.parametrize("match_on", [None, "name,layer", "order"])
def test_both_firings_of_a_recomputed_tap_get_the_same_record(record, replay, match_on):
    def job(tagged, fill):
        def run(rank):
            for layer in range(2):
                run.add(layer, fill(layer))
            if tagged:
                with context(recompute=True):
                    for layer in (1, 0):  # backward goes the other way
                        run.add(layer, fill(layer))

        def add(layer, number):
            t = torch.full((1,), float(number))
            tap("x", t, layer=layer)
            run.got.append(t.item())

        run.add, run.got = add, []
        return run

    record(job(True, lambda layer: layer + 1))
    target = job(True, lambda layer: -1)
    replay(target, match_on=match_on)
    assert target.got == [1, 2, 2, 1]


# Training, checkpointing, compiling --------------------------------------------------------------


def test_training_goes_on_and_upstream_parameters_still_get_gradients(record, replay):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

    def model(seed):
        torch.manual_seed(seed)
        return torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)

    def train(layers):
        def job(rank):
            opt = torch.optim.SGD([p for m in layers for p in m.parameters()], lr=0.1)
            for _ in range(2):
                opt.zero_grad()
                h = torch.relu(layers[0](x))
                h = tap("h", h)
                layers[1](h).square().sum().backward()
                job.grads.append(layers[0].weight.grad.clone())
                opt.step()
                step()

        job.grads = []
        return job

    base = model(0)
    record(train(base))
    other = model(1)
    target = train(other)
    (session,) = replay(target)
    assert outcomes(session) == ["grafted"] * 2
    assert all(g.abs().sum() > 0 and g.isfinite().all() for g in target.grads)
    # The weight's gradient of the second layer is that of the baseline's activation.
    h = Recording.open(session.recording.path).load(0, "h")
    assert h.shape == (4, 8)


def test_activation_checkpointing_grafts_both_forwards(record, replay):
    w = torch.nn.Parameter(torch.ones(3))

    def job(rank):
        def block(t, recompute=[False]):  # noqa: B006  # remembers across the two forwards
            with context(recompute=recompute[0]):
                h = tap("h", t * 2)
            recompute[0] = True
            return h * h

        t = w * 1.0
        checkpoint(block, t, use_reentrant=False).sum().backward()

    record(job)
    w.data.fill_(5.0)
    w.grad = None
    (session,) = replay(job)
    assert outcomes(session) == ["grafted", "grafted"]
    # d(h*h)/dt = 2h * 2 with the grafted h = 2, not with the target's own h = 10.
    assert torch.equal(w.grad, torch.full((3,), 8.0))


def test_gradients_are_grafted_where_their_tap_asked_for_them(record, replay):
    def job(scale):
        w = torch.ones(2, requires_grad=True)
        h = tap("h", w * 1.0, grad=True)
        (h * scale).sum().backward()
        return w.grad

    record(lambda rank: job(3.0))
    got = []
    (session,) = replay(lambda rank: got.append(job(100.0)))
    assert torch.equal(got[0], torch.full((2,), 3.0))
    assert session.log()["kind"].to_list() == ["tensor", "grad"]
    got.clear()
    replay(lambda rank: got.append(job(100.0)), filter='kind == "tensor"')
    assert torch.equal(got[0], torch.full((2,), 100.0))


def test_a_grafted_gradient_stays_in_its_graph(record, replay):
    w = torch.nn.Parameter(torch.tensor([2.0]))

    def job(rank):
        w.grad = None
        x = torch.tensor([3.0], requires_grad=True)
        h = tap("h", x * w, grad=True)
        y = (h**3).sum()
        (gx,) = torch.autograd.grad(y, x, create_graph=True)
        ((gx**2).sum() + y).backward()
        job.grads.append(w.grad.clone())

    job.grads = []
    record(job)
    (session,) = replay(job)
    assert set(outcomes(session)) == {"grafted"}
    assert torch.equal(job.grads[0], job.grads[1])


def test_values_are_compared_not_grafted(record, replay):
    record(lambda rank: [tap("lr", 0.1), tap("n", 3)])
    (session,) = replay(lambda rank: [tap("lr", 0.1), tap("n", 4)])
    log = session.log()
    assert log["outcome"].to_list() == ["compared"] * 2
    assert log["message"].to_list() == ["equal", "recorded 3, here 4"]


def test_what_a_callable_made_is_grafted_and_that_is_noted(record, replay):
    record(lambda rank: tap("x", lambda: torch.ones(2)))
    (session,) = replay(lambda rank: tap("x", lambda: torch.zeros(2)))
    assert session.log().row(0, named=True)["message"] == (
        "what was grafted is the result of the tap's callable"
    )


def test_a_false_recompute_is_as_none_at_all(record, run, replay):
    def job(rank):
        for fill, tags in ((1, {}), (2, {"recompute": False}), (9, {"recompute": 1})):
            tap("x", torch.full((1,), float(fill)), **tags)

    record(job)
    got = []

    def target(rank):
        for tags in ({}, {"recompute": False}, {"recompute": 1}):
            t = torch.zeros(1)
            tap("x", t, **tags)
            got.append(t.item())

    replay(target, strict=True)
    assert got == [1, 2, 1]


def test_a_value_of_another_rank_is_said_to_be_one(record, replay):
    record(lambda rank: tap("lr", 0.1) if rank == 0 else None, 2)
    sessions = replay(lambda rank: tap("lr", 0.1), 2)
    messages = [session.log()["message"][0] for session in sessions]
    assert messages == ["equal", "equal (rank 0's; rank 1 recorded none)"]


def test_strict_counts_taps_that_could_not_be_judged(record, run):
    record(tapper(torch.ones(1)))
    with pytest.raises(ReplayError, match="1 tap could not be judged"), Replayer(run, strict=True):
        tap("x", torch.zeros(1))
        tap("y", torch.zeros(1), layer=object())


def test_a_replay_that_records_takes_the_group_s_rank_for_both(record, run, tmp_path, monkeypatch):
    from recorder import ranks

    record(tapper(lambda rank: torch.full((1,), rank + 1.0)), 2)
    t = torch.zeros(1)
    with Replayer(run, out=tmp_path / "out", record="True"):
        group = ranks.Rank(1, 2, "torch.distributed")
        monkeypatch.setattr(ranks, "from_group", lambda: group)
        tap("x", t)
    assert t.item() == 2 and Recording.open(tmp_path / "out").ranks == [1]


def test_metrics_can_be_left_out(record, replay):
    record(tapper(torch.ones(2)))
    (session,) = replay(tapper(torch.zeros(2)), metrics=False)
    row = session.log().row(0, named=True)
    assert (row["outcome"], row["numel"], row["rel_diff"], row["changed"]) == (
        "grafted",
        2,
        None,
        None,
    )


def test_dtypes_are_cast_between_floats_and_noted(record, replay):
    record(tapper(torch.full((2,), 1.5, dtype=torch.float32)))
    target = tapper(torch.zeros(2, dtype=torch.bfloat16))
    (session,) = replay(target)
    assert target.got[0].tolist() == [1.5, 1.5]
    assert session.log()["message"][0] == "cast from float32 to bfloat16"


def test_the_target_s_own_values_are_recorded_before_overwriting_and_go_back(
    record, replay, run, tmp_path
):
    """t2b, offline: what a replay recorded is the sender of the next one."""
    record(tapper(lambda rank: torch.full((4,), float(rank))), 2)
    own = tapper(lambda rank: torch.full((2,), 50.0 + rank))
    cut = lambda g: torch.cat(g.received_list).chunk(4)[g.rank]  # noqa: E731
    replay(own, 4, transform=cut, out=tmp_path / "out", record="True")
    assert torch.cat(own.got).tolist() == [0] * 4 + [1] * 4
    sent = Recording.open(tmp_path / "out")
    assert [sent.load(r, "x")[0].item() for r in range(4)] == [50, 51, 52, 53]
    back = tapper(lambda rank: torch.zeros(4))
    for rank in range(2):
        with Replayer(
            tmp_path / "out",
            rank=rank,
            world_size=2,
            transform=lambda g: torch.cat(g.received_list).chunk(2)[g.rank],
        ):
            back(rank)
    assert torch.cat(back.got).tolist() == [50, 50, 51, 51, 52, 52, 53, 53]
    log = pl.scan_parquet(tmp_path / "out" / "grafts" / "*.parquet").collect()
    assert log["outcome"].to_list() == ["grafted"] * 4
    assert read_log(tmp_path / "out").height == 4


def test_a_log_is_never_written_over(record, run, tmp_path, capsys):
    record(tapper(torch.ones(2)))
    for _ in range(2):
        with Replayer(run, out=tmp_path / "out") as session:
            tap("x", torch.zeros(2))
    assert session.reason != "" and "holds the replay log rank-00000-a0 already" in session.reason
    assert "this rank is not grafted" in capsys.readouterr().err


def test_a_filter_selects_what_is_grafted(record, replay, capsys):
    record(fills(("a", {"layer": 0}, 1), ("a", {"layer": 1}, 2), ("b", {}, 3)))
    target = fills(("a", {"layer": 0}, 0), ("a", {"layer": 1}, 0), ("b", {}, 0))
    (session,) = replay(target, filter="layer >= 1")
    assert target.got == [0, 2, 0] and session.log().height == 1
    replay(target, filter="lager >= 1")
    assert "no tap carried the tag 'lager', closest: layer" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # whatever the compiler has to say
def test_under_torch_compile_values_are_recorded_and_grafted_right(record, replay):
    def f(x):
        y = x.sin() * 2
        tap("y", y, layer=1)
        return y + 1

    compiled = torch.compile(f, backend="eager")
    x = torch.randn(5)
    assert torch.equal(compiled(x), f(x))  # compiled while nothing is active
    run = record(lambda rank: compiled(x))
    assert torch.equal(run.load(0, "y", layer=1), x.sin() * 2)
    got = []
    (session,) = replay(lambda rank: got.append(compiled(x + 1)))
    assert outcomes(session) == ["grafted"]
    assert torch.equal(got[0], x.sin() * 2 + 1)
    assert torch.equal(compiled(x + 1), (x + 1).sin() * 2 + 1)  # and nothing once it is over


@pytest.mark.filterwarnings("ignore")  # whatever the compiler has to say
def test_inactive_taps_and_contexts_stand_in_a_full_graph():
    def f(x):
        with context(phase="p"):
            tap("y", x, layer=1)
        step()
        return x + 1

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


def test_a_tap_inside_cuda_graph_capture_is_refused(record, replay, monkeypatch):
    from replayer import graft

    record(tapper(torch.ones(2)))
    monkeypatch.setattr(graft, "is_capturing", lambda tensor: True)
    target = tapper(torch.zeros(2))
    (session,) = replay(target)
    assert target.got[0].sum() == 0
    assert "a CUDA graph is being captured" in session.log()["message"][0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_tensors_and_inside_graph_capture(record, replay):
    target = tapper(torch.zeros(3, device="cuda"))
    record(tapper(torch.ones(3, device="cuda")))
    (session,) = replay(target)
    assert outcomes(session) == ["grafted"] and target.got[0].sum().item() == 3
    static = torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()

    def captured(rank):
        with torch.cuda.graph(graph):
            tap("x", static.mul(2))

    (session,) = replay(captured)
    assert "a CUDA graph is being captured" in session.log()["message"][0]
