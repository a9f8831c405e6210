"""Replaying training jobs, checkpointed and compiled ones."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from tapping import fills, outcomes, tapper
from torch.utils.checkpoint import checkpoint

from recorder import Recording, context, step, tap
from recorder.errors import ReplayError
from replayer import Replayer
from replayer.log import read_log


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


def test_a_transform_is_told_whether_it_makes_a_gradient(record, replay):
    kinds = []

    def transform(g):
        kinds.append(g.key.kind)
        return g.received_list[g.rank]

    def job(rank):
        w = torch.ones(2, requires_grad=True)
        tap("h", w * 1.0, grad=True).sum().backward()

    record(job)
    replay(job, transform=transform)
    assert kinds == ["tensor", "grad"]


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
    used = torch.zeros(2)
    (session,) = replay(lambda rank: tap("x", lambda: used))
    row = session.log().row(0, named=True)
    assert row["outcome"] == "grafted"
    assert row["message"] == "what was grafted is the result of the tap's callable"


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


@pytest.mark.thorough
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
def test_on_cuda_tensors(record, replay):
    target = tapper(torch.zeros(3, device="cuda"))
    record(tapper(torch.ones(3, device="cuda")))
    (session,) = replay(target)
    assert outcomes(session) == ["grafted"] and target.got[0].sum().item() == 3
