"""Ranks that hold other data, or none: who is given what of whom."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch

from recorder import Recorder, Recording, declare_mesh, tap
from replayer import Replayer, diff

OUTCOMES = ("grafted", "error")
LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(autouse=True)
def undeclared():
    yield
    declare_mesh()


def record(run, blocks, dims, meshes, name="x", tags=None):
    for rank, (block, mesh) in enumerate(zip(blocks, meshes, strict=True)):
        declare_mesh(**mesh) if mesh else declare_mesh()
        with Recorder(run, rank=rank, world_size=len(blocks)):
            tap(name, block, dims=dims, **(tags or {}))
    return Recording.open(run)


def replay(run, targets, dims, meshes, name="x", tags=None):
    """Graft each rank's target in place; return outcomes and messages."""
    found = []
    for rank, (target, mesh) in enumerate(zip(targets, meshes, strict=True)):
        declare_mesh(**mesh) if mesh else declare_mesh()
        with Replayer(run, rank=rank, world_size=len(targets)) as session:
            tap(name, target, dims=dims, **(tags or {}))
        found.append(session.log().select("outcome", "message").row(0))
    return found


def over(**axes):
    meshes = [{}]
    for axis, size in axes.items():
        meshes = [{**mesh, axis: (k, size)} for mesh in meshes for k in range(size)]
    return meshes


@pytest.mark.parametrize("mesh", [{}, {"dp": (0, 1)}, {"tp": (0, 1)}])
def test_a_data_parallel_rank_that_nobody_sent_for_is_not_given_another_s(run, mesh, capsys):
    record(run, [torch.zeros(1, 3)], "b s", [mesh])
    targets = [torch.full((1, 3), -1.0) for _ in range(2)]
    found = replay(run, targets, "b s", over(dp=2))
    assert found[1][0] == "error" and (targets[1] == -1).all()
    assert found[1][1].startswith(
        "dp has size 1 at the senders and 2 at the target, and its ranks hold other data: nobody "
        "sent for dp=1; declare '# dp:replicated' at a tap if they hold the same, or nothing; else "
        "run both with one size of dp, or name a transform"
    )
    told = "and its ranks hold other data: what dp=0 sent was taken to be this rank's"
    assert found[0][0] == "grafted" and told in found[0][1]
    assert told in capsys.readouterr().err
    for dims in ("b s # dp:replicated",):
        assert [o for o, _ in replay(run, targets, dims, over(dp=2))] == ["grafted"] * 2
        assert (targets[1] == 0).all()


def test_what_the_senders_say_is_replicated_goes_to_all(run):
    record(run, [torch.ones(2)], "h # dp:replicated", [{}])
    targets = [torch.zeros(2) for _ in range(2)]
    assert replay(run, targets, "h", over(dp=2)) == [("grafted", "")] * 2
    assert (targets[1] == 1).all()


def test_a_weight_goes_to_all_data_parallel_ranks_and_that_is_said(run, capsys):
    record(run, [torch.ones(2)], "h", [{}])
    targets = [torch.zeros(2) for _ in range(2)]
    found = replay(run, targets, "h", over(dp=2))
    assert [o for o, _ in found] == ["grafted"] * 2 and (targets[1] == 1).all()
    assert "what dp=0 sent was taken to be this rank's" in found[1][1]
    assert "what dp=0 sent was taken to be this rank's" in capsys.readouterr().err


def test_replicas_in_fact_go_to_any_number_of_data_parallel_ranks(run):
    record(run, [torch.ones(2)] * 2, "h", over(dp=2))
    targets = [torch.zeros(2) for _ in range(3)]
    assert [o for o, _ in replay(run, targets, "h", over(dp=3))] == ["grafted"] * 3


BUSY, IDLE = torch.arange(12.0).view(3, 4), torch.zeros(0, 4)


@pytest.mark.parametrize("busy", [0, 1])
@pytest.mark.parametrize(("axis", "facts"), [("dp", ""), ("attn_dp", " # dp:=attn_dp")])
@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_without_a_token(run, tmp_path, busy, axis, facts, tp):
    """A server's ranks along dp have a batch of their own; one of two has none."""
    dims, meshes = f"t h[tp]{facts}", over(**{axis: 2, "tp": tp})
    blocks = [
        (BUSY if mesh[axis][0] == busy else IDLE).chunk(tp, 1)[mesh["tp"][0]].contiguous()
        for mesh in meshes
    ]
    back = record(run, blocks, dims, meshes)
    assert torch.equal(back.load_logical("x"), BUSY)
    # Onto as many: nothing is written where there is nothing.
    targets = [torch.full_like(block, -1) for block in blocks]
    assert [o for o, _ in replay(run, targets, dims, meshes)] == ["grafted"] * len(meshes)
    assert all(torch.equal(a, b) for a, b in zip(targets, blocks, strict=True))
    # Onto a job of one rank: the busy ones have all there is.
    target = torch.zeros(3, 4)
    assert replay(run, [target], "t h", [{}]) == [("grafted", "")]
    assert torch.equal(target, BUSY)
    one = record(tmp_path / "one", [BUSY], "t h", [{}])
    for a, b in ((back, one), (one, back), (back, back)):
        found = diff(a.path, b.path)
        assert found.status == 0, found.pairs.select("outcome", "message").rows()
    # From a job of one rank: the idle ones are left alone; for the others, only a tap can say.
    targets = [torch.full_like(block, -1) for block in blocks]
    outcomes = [o for o, _ in replay(tmp_path / "one", targets, dims, meshes)]
    assert [outcomes[k] for k, b in enumerate(blocks) if not b.numel()] == ["grafted"] * tp
    said = f"{dims} {axis}:replicated" if facts else f"{dims} # {axis}:replicated"
    assert [o for o, _ in replay(tmp_path / "one", targets, said, meshes)] == ["grafted"] * 2 * tp
    assert all(torch.equal(a, b) for a, b in zip(targets, blocks, strict=True))


def test_a_server_that_gave_its_tokens_to_another_rank(run, tmp_path):
    a = record(run, [BUSY, IDLE], "t h", over(dp=2))
    b = record(tmp_path / "b", [IDLE, BUSY], "t h", over(dp=2))
    found = diff(a.path, b.path)
    assert found.status == 0 and "dp=0 of A, dp=1 of B" in found.pairs["message"][0]


def test_ranks_without_a_token_where_nobody_says_where_they_stand(run):
    record(run, [BUSY, IDLE], "t h", [{}, {}])
    targets = [torch.zeros(3, 4), torch.zeros(0, 4)]
    assert [o for o, _ in replay(run, targets, "t h", [{}, {}])] == ["grafted"] * 2
    assert torch.equal(targets[0], BUSY)


def test_unequal_blocks_between_like_jobs_are_grafted_rank_by_rank(run, capsys):
    record(run, [BUSY, IDLE], "t[ep] h", over(ep=2))
    targets = [torch.zeros(3, 4), torch.zeros(0, 4)]
    found = replay(run, targets, "t[ep] h", over(ep=2))
    assert [o for o, _ in found] == ["grafted"] * 2 and torch.equal(targets[0], BUSY)
    assert "dim t[ep] has blocks of unequal sizes: taken rank by rank" in capsys.readouterr().err


def test_blocks_of_unequal_sizes_are_not_placed_on_another_number_of_ranks(run, tmp_path):
    """What fits a rule, by the number alone, need not be cut by it: sizes 0 1 2 and not 1 1 1."""
    record(run, [BUSY, IDLE], "t[ep] h", over(ep=2))
    one = record(tmp_path / "one", [BUSY], "t h", [{}])
    said = "its blocks are of unequal sizes"
    advice = (
        "if they are as large as data have it, such as the tokens of each expert, record on as "
        "many ranks, cut alike, and feed both the same input"
    )
    targets = [torch.full((n, 4), -1.0) for n in (0, 1, 2)]
    found = replay(run, targets, "t[ep] h", over(ep=3))
    assert found[0] == ("grafted", "") and [o for o, _ in found[1:]] == ["error"] * 2
    assert all(said in m and advice in m for _, m in found[1:])
    assert all((target == -1).all() for target in targets)
    (_, message), *_ = replay(one.path, targets[2:], "t[ep] h", [{"ep": (1, 4)}])
    assert said in message and (targets[2] == -1).all()
    # Of one rank's tokens a size alone tells where a block begins, and that is said.
    block = torch.full((1, 4), -1.0)
    ((outcome, message),) = replay(one.path, [block], "t[ep] h", [{"ep": (1, 3)}])
    assert (outcome, message) == (
        "grafted", "dim t[ep] was taken to be cut by a rule, and not by data"
    )  # fmt: skip


def test_a_rank_that_got_other_tokens_than_its_sender_is_told_how_many(run):
    record(run, [IDLE, BUSY], "t[ep] h", over(ep=2))
    targets = [torch.full((n, 4), -1.0) for n in (2, 1)]
    found = replay(run, targets, "t[ep] h", over(ep=2))
    assert [o for o, _ in found] == ["error"] * 2 and all((t == -1).all() for t in targets)
    assert (
        "the target's block has 2, one of 2 over ep, where the sender at its place has 0: its "
        "blocks are of unequal sizes" in found[0][1]
    )


def test_unequal_blocks_that_a_rule_cuts_at_the_target_as_it_says(run):
    whole = torch.arange(12.0).view(3, 4)
    record(run, [whole[:0], whole], "t[ep] h", over(ep=2))
    targets = [torch.full((n, 4), -1.0) for n in (2, 1)]
    found = replay(run, targets, "t[ep:chunk] h", over(ep=2))
    assert [o for o, _ in found] == ["grafted"] * 2
    assert torch.equal(torch.cat(targets), whole)


EMPTY_DIMS = ["t[ep] h", "h t[ep]", "n[ep] h", "t[ep] h[tp]", "b[dp] s h", "x[pp] h", "t[ep,tp] h"]


def sizes_with_empties(rng, ranks, total):
    sizes = [0] * ranks
    for _ in range(total):
        sizes[rng.randrange(ranks)] += 1
    if rng.random() < 0.3:
        sizes = [0] * ranks
        sizes[rng.randrange(ranks)] = total
    return sizes


def cut(whole, dims, sizes):
    """Return the blocks of ranks, the first axis cut as sizes have it, and another in two."""
    found = []
    for part in whole.split(sizes, dims.split().index(next(w for w in dims.split() if "[" in w))):
        halves = [part]
        if "tp" in dims:
            dim = 0 if "," in dims else 1
            halves = [*part.chunk(2, dim), *[part.narrow(dim, 0, 0)] * 2][:2]
            halves = [part, part] if not part.shape[dim] else halves
        found += [half.contiguous() for half in halves]
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("extent", ["short", pytest.param("long", marks=LONG)])
def test_blocks_of_any_sizes_are_blocks_like_any_other(tmp_path, extent):
    """Of one rank against those of several, of which some, or all, are empty."""
    first, count = (0, 8) if extent == "short" else (1_000, 500)
    print(f"seeds {first} to {first + count - 1}")
    for seed in range(first, first + count):
        rng = random.Random(seed)
        dims, total = rng.choice(EMPTY_DIMS), rng.choice((0, 1, 2, 3, 4, 5, 7))
        axis = re.search(r"\[(\w+)", dims)[1]
        ranks = rng.choice((2, 2, 3, 4))
        sizes = sizes_with_empties(rng, ranks, total)
        plain = re.sub(r"\[.*?\]", "", dims)
        shape = [{"h": 4, "s": 2}.get(name, total) for name in plain.split()]
        whole = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
        about = f"seed {seed}: {dims!r} {sizes}"
        meshes = over(**{axis: ranks, "tp": 2}) if "tp" in dims else over(**{axis: ranks})
        blocks = cut(whole, dims, sizes)
        one = record(tmp_path / f"{seed}-one", [whole], plain, [{}])
        some = record(tmp_path / f"{seed}-some", blocks, dims, meshes)
        for a, b in ((one, some), (some, one), (some, some)):
            assert diff(a.path, b.path).pairs["outcome"].to_list() == ["equal"], about
        assert torch.equal(some.load_logical("x"), whole), about
        targets = [torch.full_like(block, -1) for block in blocks]
        found = replay(some.path, targets, dims, meshes)
        assert [o for o, _ in found] == ["grafted"] * len(blocks), (about, found)
        assert all(torch.equal(a, b) for a, b in zip(targets, blocks, strict=True)), about
        target = torch.full_like(whole, -1)
        assert replay(some.path, [target], plain, [{}])[0][0] == "grafted", about
        assert torch.equal(target, whole), about
        if total:
            wrong = whole.clone()
            wrong.view(-1)[rng.randrange(wrong.numel())] += 100
            other = record(tmp_path / f"{seed}-wrong", cut(wrong, dims, sizes), dims, meshes)
            for a, b in ((one, other), (other, one), (some, other)):
                found = diff(a.path, b.path)
                assert found.status == 1, about
                assert found.pairs["outcome"].to_list() == ["differs"], about


def test_a_diff_counts_an_empty_block_among_the_recorded(run, tmp_path):
    whole = torch.arange(12.0)
    meshes = over(cp=2, sp=4)
    blocks = [part for half in whole.chunk(2) for part in (*half.chunk(4), whole[:0])]
    a = record(run, blocks, "d[cp:chunk,sp:chunk]", meshes)
    b = record(tmp_path / "b", [whole], "d", [{}])
    assert diff(a.path, b.path).status == diff(b.path, a.path).status == 0
    experts = record(tmp_path / "e", [BUSY, IDLE], "t[ep] h", over(ep=2))
    one = record(tmp_path / "f", [BUSY], "t h", [{}])
    assert diff(experts.path, one.path).status == diff(one.path, experts.path).status == 0


def test_a_diff_of_a_side_whose_last_block_is_padding_alone(run, tmp_path):
    whole = torch.arange(6.0)
    blocks = [*whole.chunk(3), torch.full((2,), 99.0)]
    a = record(run, blocks, "v[tp] # v=6", over(tp=4))
    b = record(tmp_path / "b", [whole], "v", [{}])
    assert diff(a.path, b.path).status == diff(b.path, a.path).status == 0
    assert torch.equal(a.load_logical("x"), whole)
    target = torch.zeros(6)
    assert replay(run, [target], "v", [{}]) == [("grafted", "")] and torch.equal(target, whole)
    targets = [torch.full((2,), -7.0) for _ in range(4)]
    assert [o for o, _ in replay(tmp_path / "b", targets, "v[tp] # v=6", over(tp=4))] == [
        "grafted"
    ] * 4
    assert torch.cat(targets).tolist() == [0, 1, 2, 3, 4, 5, -7, -7]


def test_a_last_block_of_padding_alone_need_not_be_recorded(run):
    whole = torch.arange(6.0)
    for rank in (0, 1, 2):
        declare_mesh(tp=(rank, 4))
        with Recorder(run, rank=rank, world_size=4):
            tap("x", whole.chunk(3)[rank], dims="v[tp] # v=6")
    target = torch.zeros(6)
    assert replay(run, [target], "v", [{}]) == [("grafted", "")] and torch.equal(target, whole)
    assert torch.equal(Recording.open(run).load_logical("x"), whole)
