"""A baseline replayed onto itself: what changes, and whose fault that is."""

from __future__ import annotations

import pytest
import torch
from layered import job

from recorder import Recorder, Recording, tap
from replayer import check, localize
from replayer.showing.trials import check_lines


def test_every_bit_as_recorded(base, tmp_path):
    found = check(base(steps=2), job(steps=2), out=tmp_path / "check")
    assert found.status == 0 and not found.changed and found.taps == 24
    first, following = check_lines(found)
    assert first == (
        "unchanged: 24 taps of the baseline replayed onto itself, every bit as recorded"
    )
    assert following.endswith(f"--floor {tmp_path / 'check'} -- TARGET")
    assert Recording.open(tmp_path / "check").rows().height == 24
    wrong = job({("up", 1): lambda x: 2 * x}, steps=2)
    assert localize(found.run, wrong, floor=[tmp_path / "check"]).was_checked


def test_a_job_that_differs_from_itself_is_told_where_and_how_often(base):
    calls = []

    def noisy(x):
        calls.append(0)
        return x * (1 + 1e-6 * (len(calls) % 2))

    wrong = {("up", 3): noisy, ("down", 4): lambda x: x * torch.rand(x.shape)}
    found = check(base(), job(wrong), repeat=4)
    assert found.status == 1
    first = found.changed[0]
    assert (first.place.name, first.place.tag_values, first.repeats) == ("up", {"layer": 3}, 2)
    line, why = check_lines(found)
    assert line.startswith("changed: 2 of 12 taps, first up layer=3 step=0 on rank 0: 768 elements")
    assert "in 2 of 4 replays" in line and "not deterministic" in why
    assert "first at up layer=3" in why


def test_a_job_that_repeats_itself_but_is_another_is_told_so(base):
    found = check(base(), job({("up", 3): lambda x: 1.5 * x}))
    assert found.status == 1 and found.changed[0].place.label == "up layer=3"
    assert "repeats itself, but is not the one that was recorded" in found.why
    assert "first at up layer=3 step=0 on rank 0" in found.why


def test_a_job_that_grafts_change_is_told_so(run):
    """What is tapped first shares its memory with what is tapped later."""

    def shared():
        x = torch.arange(8.0)
        tap("a", x)
        x.add_(1)
        tap("b", x.clone() * 2)
        y = torch.arange(8.0)
        tap("c", y if not hasattr(shared, "grafted") else y + 1)

    with Recorder(run):
        shared()
    calls = []

    def target():
        calls.append(0)
        shared.grafted = len(calls) == 1
        if not shared.grafted:
            del shared.grafted
        shared()

    found = check(run, target)
    assert found.status == 1 and "grafting changes it" in found.why
    assert found.changed[0].place.name == "c"


def test_another_job_is_no_check(base):
    right = base()
    found = check(right, lambda: [tap("x", torch.zeros(2, 12, 32)) for _ in range(1)])
    assert found.status == 3 and "11 records never used" in found.problems[0]
    nothing = check(right, lambda: None)
    assert nothing.status == 3 and nothing.problems and not check_lines(nothing)


def test_a_value_that_differs_is_a_change(run):

    def target(value):
        tap("v", value)
        return tap("x", torch.ones(2)).sum()

    with Recorder(run):
        target(1)
    found = check(run, lambda: target(2))
    assert found.status == 1 and "v step=0 on rank 0: another value" in check_lines(found)[0]


def test_another_number_of_ranks_is_another_job(run):
    for rank in range(2):
        with Recorder(run, rank=rank, world_size=2):
            tap("x", torch.ones(4), dims="h")
    found = check(run, lambda: [tap("x", 2 * torch.ones(4), dims="h")][0].sum())
    assert found.status == 3
    assert (
        "was made by 2 ranks, and COMMAND ran 1; give the command that made it"
        in (found.problems[0])
    )


def test_a_job_that_names_its_taps_otherwise_is_matched_as_the_replay_was(run):
    with Recorder(run):
        kept = [tap("x", torch.ones(4), layer=i) for i in range(3)]

    def other():
        return [tap(f"m.{i}.x", torch.full((4,), 1.0 + (i == 2))) for i in range(3)]

    found = check(run, other, rename="x=m.{layer}.x")
    assert found.status == 1 and len(kept) == 3
    assert "repeats itself" in found.why and "first at m.2.x step=0" in found.why


@pytest.mark.processes
def test_ranks_that_tap_nothing_are_ranks_all_the_same(shell, run):
    shell.write(
        "job.py",
        """
        import torch, torch.distributed as dist
        from recorder import tap

        dist.init_process_group("gloo")
        if dist.get_rank() == 0:
            x = tap("x", torch.ones(3))
        """,
    )
    job = shell.torchrun(2, "job.py")
    assert shell(shell.graft, "record", "-o", run, "--", job).returncode == 0
    done = shell(shell.graft, "check", run, "--", job)
    assert done.returncode == 0, done.stderr
