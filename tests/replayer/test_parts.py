"""Two backwards of one tensor: each part is recorded, and none is taken for the whole."""

from __future__ import annotations

import pytest
import torch
from tapping import outcomes

from recorder import context, step, tap
from recorder.errors import ReplayError
from replayer.log import WITHOUT_EFFECT

SUM, EACH, THRICE = "sum", "each", "thrice"
FACTORS = {SUM: (11.0,), EACH: (1.0, 10.0), THRICE: (1.0, 7.0, 3.0)}


def job(how, scale=1.0, leaf=False, batches=1):
    """A job of so many backwards; the gradients that come of it are in `got`."""

    def run(rank):
        for batch in range(batches):
            w = torch.ones(2, requires_grad=True)
            h = tap("h", w if leaf else w * 1, grad=True, batch=batch)
            for factor in FACTORS[how]:
                (h * (factor * scale)).sum().backward(retain_graph=True)
            run.got.append(w.grad.tolist())
        step()

    run.got = []
    return run


def gradients(recording):
    rows = recording.rows().filter(kind="grad")
    return [recording.read(row).tolist() for row in rows.iter_rows(named=True)]


@pytest.mark.parametrize("leaf", [False, True])
def test_each_part_is_recorded_and_says_which_it_is(record, leaf):
    run = record(job(THRICE, leaf=leaf))
    assert gradients(run) == [[1, 1], [7, 7], [3, 3]]
    rows = run.rows().filter(kind="grad")
    assert rows["tags"].to_list() == [
        '{"batch":0}',
        '{"batch":0,"grad_part":1}',
        '{"batch":0,"grad_part":2}',
    ]
    assert rows["occurrence"].to_list() == [0, 0, 0]
    assert run.load(0, "h", kind="grad", batch=0, grad_part=2).tolist() == [3, 3]


@pytest.mark.parametrize("match_on", [None, "name,batch", "name", "order"])
@pytest.mark.parametrize("leaf", [False, True])
def test_parts_are_grafted_from_parts(record, replay, leaf, match_on):
    base = job(EACH, leaf=leaf, batches=2)
    record(base)
    target = job(EACH, scale=100.0, leaf=leaf, batches=2)
    (session,) = replay(target, match_on=match_on, filter='kind == "grad"', strict=True)
    assert target.got == base.got and set(outcomes(session)) == {"grafted"}


@pytest.mark.parametrize("match_on", [None, "name,batch"])
@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize(("base", "target"), [(SUM, EACH), (SUM, THRICE), (EACH, THRICE)])
def test_what_was_recorded_in_fewer_parts_is_no_graft(
    record, replay, base, target, leaf, match_on, capsys
):
    record(job(base, leaf=leaf))
    run = job(target, scale=100.0, leaf=leaf)
    (session,) = replay(run, match_on=match_on, filter='kind == "grad"')
    log = session.log()
    assert set(log["outcome"]) == {"error"}
    assert all("in more backwards here than where it was recorded" in m for m in log["message"])
    # The whole was given to the first, before a second could be known of.
    assert run.got[0][0] in (11.0, 11.0 + 300.0)
    assert session.problems()[0].startswith(f"{log.height} grafts failed, the first: h")
    assert capsys.readouterr().err.count("was not grafted: its gradient comes in more") == 1


def test_once_it_is_known_the_parts_keep_their_own_values(record, replay):
    record(job(SUM, batches=3))
    run = job(EACH, scale=100.0, batches=3)
    (session,) = replay(run, filter='kind == "grad"')
    assert outcomes(session) == ["error"] * 6
    assert run.got == [[11.0, 11.0], [1100.0, 1100.0], [1100.0, 1100.0]]
    messages = session.log()["message"].to_list()
    assert "this one zeros, which is right in the sum alone" in messages[1]
    assert all(
        "so no part of it is the record's; call backward as often" in m for m in messages[2:]
    )


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("ends", [True, False])
def test_a_part_is_not_taken_for_the_whole_either(record, replay, leaf, ends, capsys):
    def whole(rank):
        w = torch.ones(2, requires_grad=True)
        h = tap("h", w if leaf else w * 1, grad=True, batch=0)
        (h * 5).sum().backward()
        if ends:
            step()

    record(job(EACH, leaf=leaf))
    (session,) = replay(whole, filter='kind == "grad"')
    (row,) = session.log().iter_rows(named=True)
    assert row["outcome"] == "error" and "comes in fewer backwards here" in row["message"]
    assert session.problems() and "fewer backwards" in capsys.readouterr().err


def test_one_backward_that_keeps_its_graph_is_whole(record, replay):
    def keeps(rank):
        w = torch.ones(2, requires_grad=True)
        h = tap("h", w * 1, grad=True, batch=0)
        (h * 5).sum().backward(retain_graph=True)
        keeps.got = w.grad.tolist()

    record(job(SUM))
    (session,) = replay(keeps, strict=True)
    assert keeps.got == [11.0, 11.0] and outcomes(session) == ["grafted"] * 2


def test_a_parameter_tapped_once_for_several_micro_batches_has_a_part_of_each(record, replay):
    w = torch.nn.Parameter(torch.ones(2))

    def accumulate(scale):
        def run(rank):
            w.grad = None
            for number in range(2):
                tap("w", w, grad=True)
                for batch in range(3):
                    (w * (batch + 1 + number) * scale).sum().backward()
                step()
            (w * 99).sum().backward()  # nobody tapped it in this step
            run.got = w.grad.tolist()

        return run

    base = accumulate(1.0)
    run = record(base)
    assert gradients(run) == [[1, 1], [2, 2], [3, 3], [2, 2], [3, 3], [4, 4]]
    target = accumulate(50.0)
    replay(target, filter='kind == "grad"', strict=True)
    assert target.got == base.got


def test_nothing_of_a_parameter_is_heard_once_a_session_is_over(record):
    w = torch.nn.Parameter(torch.ones(2))
    record(lambda rank: [tap("w", w, grad=True), (w * 2).sum().backward()])
    assert not w._backward_hooks


def test_an_error_can_be_raised(record, replay, capsys):
    record(job(SUM))
    with pytest.raises(ReplayError, match="in more backwards here"):
        replay(job(EACH), on_missing="raise", on_error="raise")


def test_the_tag_of_parts_is_not_the_job_s(record, capsys):
    with context(grad_part=1):
        assert record(lambda rank: tap("h", torch.ones(1))).rows().height == 0
    assert "the tag 'grad_part' has a meaning of its own" in capsys.readouterr().err


def test_a_dropped_activation_with_a_gradient_is_without_effect_too(record, replay):
    def run(rank):
        x = torch.ones(2, requires_grad=True)
        tap("h", x * 2, grad=True)

    record(run)
    (session,) = replay(run)
    assert outcomes(session) == [WITHOUT_EFFECT]
