"""m senders to n receivers without a transform: what users write transforms for today."""

from __future__ import annotations

import pytest
import torch

from recorder import Recorder, Recording, declare_mesh, tap
from recorder.errors import LayoutError, ReplicasDiffer
from replayer import Replayer

NAN = float("nan")


@pytest.fixture(autouse=True)
def undeclared():
    yield
    declare_mesh()


def record(run, blocks, dims, meshes=None, extras=None, name="x", **options):
    """Record one block a rank; None for a rank that records nothing."""
    for rank, block in enumerate(blocks):
        if meshes is not None:
            declare_mesh(**meshes[rank])
        with Recorder(run, rank=rank, world_size=len(blocks), **options):
            if block is not None:
                tap(name, block, dims=dims, extras=extras)
            else:
                tap("other", torch.zeros(1))
    declare_mesh()
    return Recording.open(run)


def replay(run, targets, dims, meshes=None, extras=None, name="x", outcome="grafted", **options):
    """Graft each rank's target in place; return the messages."""
    messages = []
    for rank, target in enumerate(targets):
        if target is None:
            continue
        if meshes is not None:
            declare_mesh(**meshes[rank])
        with Replayer(run, rank=rank, world_size=len(targets), **options) as session:
            tap(name, target, dims=dims, extras=extras)
        row = session.log().row(0, named=True)
        assert row["outcome"] == outcome, row["message"]
        messages.append(row["message"])
    declare_mesh()
    return messages


def over(**axes):
    """Meshes of ranks along axes given as axis=size, the last one fastest."""
    meshes = [{}]
    for axis, size in axes.items():
        meshes = [{**mesh, axis: (k, size)} for mesh in meshes for k in range(size)]
    return meshes


def test_tokens_sharded_over_8_to_all_of_them_on_one_rank_of_8_and_back(run, tmp_path):
    whole = torch.randn(16, 5)
    record(run, [t[:, None].contiguous() for t in whole.chunk(8)], "t[sp] 1 h", over(sp=8))
    target = torch.zeros(16, 5)
    replay(run, [target, *[None] * 7], "t h", over(tp=8))
    assert torch.equal(target, whole)
    record(tmp_path / "back", [whole, *[None] * 7], "t h", over(tp=8))
    targets = [torch.zeros(2, 1, 5) for _ in range(8)]
    replay(tmp_path / "back", targets, "t[sp] 1 h", over(sp=8))
    assert torch.equal(torch.cat(targets)[:, 0], whole)


def test_heads_over_8_with_a_leading_batch_of_1(run):
    whole = torch.randn(1, 6, 16, 4)
    record(run, whole.chunk(8, 2), "b t heads[tp] d", over(tp=8))
    target = torch.zeros(6, 16, 4)
    replay(run, [target], "t heads d")
    assert torch.equal(target, whole[0])
    target = torch.zeros(6, 1, 8, 4)
    replay(run, [torch.zeros_like(target), target], "t 1 heads[tp] d", over(tp=2))
    assert torch.equal(target[:, 0], whole[0, :, 8:])


def test_replicated_keys_and_values(run):
    """8 query heads' ranks share 2 key heads: 4 ranks hold the same one."""
    whole = torch.randn(3, 2, 4)
    meshes = [{"kv": (rank // 4, 2), "tp": (rank, 8)} for rank in range(8)]
    blocks = [whole[:, rank // 4 : rank // 4 + 1].contiguous() for rank in range(8)]
    record(run, blocks, "s heads[kv] d # tp:replicated", meshes)
    target = torch.zeros(3, 2, 4)
    replay(run, [target], "s heads d")
    assert torch.equal(target, whole)


def test_zigzag_context_parallel_4_to_tensor_parallel_2(run):
    whole = torch.randn(2, 16, 6)
    chunks = whole.chunk(8, 1)
    blocks = [torch.cat([chunks[k], chunks[7 - k]], 1) for k in range(4)]
    record(run, blocks, "b s[cp:zigzag] h", over(cp=4))
    targets = [torch.zeros(2, 16, 3) for _ in range(2)]
    replay(run, targets, "b s h[tp]", over(tp=2))
    assert torch.equal(torch.cat(targets, 2), whole)


def test_routing_maps_of_bool(run):
    whole = torch.rand(12, 8) > 0.5
    record(run, whole.chunk(4, 1), "t e[ep]", over(ep=4))
    targets = [torch.zeros(6, 8, dtype=torch.bool) for _ in range(2)]
    replay(run, targets, "t[sp] e", over(sp=2))
    assert torch.equal(torch.cat(targets), whole)


@pytest.mark.parametrize(
    ("facts", "padding"), [("# v=10", [7.0, 7.0]), ("# v=10 v:fill=-inf", [float("-inf")] * 2)]
)
def test_logits_whose_vocabulary_is_padded_on_the_target(run, facts, padding):
    whole = torch.randn(3, 10)
    record(run, [whole], "t v")
    targets = [torch.full((3, 4), 7.0) for _ in range(3)]
    replay(run, targets, f"t v[tp] {facts}", over(tp=3))
    made = torch.cat(targets, 1)
    assert torch.equal(made[:, :10], whole)
    assert made[0, 10:].tolist() == padding


def test_logits_whose_vocabulary_is_padded_on_the_senders(run):
    whole = torch.randn(3, 10)
    padded = torch.cat([whole, torch.full((3, 2), NAN)], 1)
    back = record(run, padded.chunk(4, 1), "t v[tp] # v=10", over(tp=4))
    target = torch.zeros(3, 10)
    replay(run, [target], "t v")
    assert torch.equal(target, whole)
    assert torch.equal(back.load_logical("x"), whole)


def test_a_longer_sender_is_cut_only_where_a_layout_says_padding(run):
    record(run, [torch.randn(3, 6) for _ in range(2)], "t v[tp]", over(tp=2))
    (message,) = replay(run, [torch.zeros(3, 10)], "t v", outcome="error")
    assert "dim v: the senders have 12 in all, and the target's block has 10" in message
    assert "# v=SIZE" in message


def test_dims_in_another_order_fused_and_split(run):
    whole = torch.randn(5, 2, 8, 3)  # t b heads d
    blocks = [block.reshape(5, 2, 6) for block in whole.chunk(4, 2)]
    record(run, blocks, "t b (heads*d)[tp]", over(tp=4))
    targets = [torch.zeros(2, 5, 4, 3) for _ in range(2)]
    replay(run, targets, "b t heads[tp] d", over(tp=2))
    assert torch.equal(torch.cat(targets, 2), whole.transpose(0, 1))


def test_several_axes_on_one_dim(run):
    whole = torch.randn(16, 3)
    chunks = whole.chunk(4)
    halves = [torch.cat([chunks[0], chunks[3]]), torch.cat([chunks[1], chunks[2]])]
    blocks = [half.chunk(2)[k].contiguous() for half in halves for k in range(2)]
    record(run, blocks, "s[cp:zigzag,sp] h", over(cp=2, sp=2))
    target = torch.zeros(16, 3)
    replay(run, [target], "s h")
    assert torch.equal(target, whole)


def test_partial_sums_are_added(run):
    parts = [torch.randn(4, 3) for _ in range(3)]
    back = record(run, parts, "t h[tp:partial]", over(tp=3))
    target = torch.zeros(4, 3)
    replay(run, [target], "t h")
    expected = (parts[0].double() + parts[1].double() + parts[2].double()).float()
    assert torch.equal(target, expected)
    assert torch.equal(back.load_logical("x"), expected)
    # Between jobs that cut the sum alike, each rank gets its own part.
    targets = [torch.zeros(4, 3) for _ in range(3)]
    replay(run, targets, "t h[tp:partial]", over(tp=3))
    assert all(torch.equal(a, b) for a, b in zip(targets, parts, strict=True))
    # Else one holds all of it, and the others nothing.
    targets = [torch.ones(4, 3) for _ in range(2)]
    replay(run, targets, "t h[tp:partial]", over(tp=2))
    assert torch.equal(targets[0], expected) and not targets[1].any()


def test_a_partial_sum_without_all_its_parts_is_refused(run):
    record(run, [torch.ones(2), None, torch.ones(2)], "h[tp:partial]", over(tp=3))
    (message,) = replay(run, [torch.zeros(2)], "h", outcome="error")
    assert "only those of sender rank 0, 2 were recorded" in message


def test_flattened_tokens_with_their_lengths(run):
    """Two sequences of 8 and 4, each in 2 x 2 chunks over context parallelism, and 4 of padding."""
    tokens = torch.randn(16, 3)
    first, second, tail = tokens.split([8, 4, 4])
    blocks = []
    for k in range(2):
        parts = [s.chunk(4)[i] for s in (first, second) for i in (k, 3 - k)]
        blocks.append(torch.cat([*parts, tail.chunk(2)[k]]))
    extras = {"seq_lens": torch.tensor([8, 4])}
    back = record(run, blocks, "t[cp:zigzag] h", over(cp=2), extras)
    target = torch.zeros(12, 3)
    replay(run, [target], "t h")
    assert torch.equal(target, tokens[:12])
    assert torch.equal(back.load_logical("x"), tokens[:12])
    target = torch.full((2, 8, 3), 7.0)
    replay(run, [target], "b s h")
    assert torch.equal(target[0], first) and torch.equal(target[1, :4], second)
    assert (target[1, 4:] == 7).all(), "the padding keeps its values"


def test_batch_and_sequence_to_flattened_tokens(run):
    whole = torch.randn(2, 6, 4)
    record(run, whole.chunk(2, 2), "b s h[tp]", over(tp=2), {"seq_lens": [6, 2]})
    target = torch.zeros(8, 4)
    replay(run, [target], "t h")
    assert torch.equal(target, torch.cat([whole[0], whole[1, :2]]))


def test_replicas_that_differ_are_named_unless_told_otherwise(run):
    whole = torch.randn(4)
    other = whole.clone()
    other[2] += 0.5
    back = record(run, [whole, whole, other], "h", [{"tp": (rank, 3)} for rank in range(3)])
    target = torch.full((4,), 9.0)
    (message,) = replay(run, [target], "h", outcome="error")
    assert "sender ranks 0 and 2 should hold the same block" in message
    assert (
        "in 1 of 4 elements, at most by 0.5" in message
        and "--replicas first, last or mean" in message
    )
    assert (target == 9).all()
    replay(run, [target], "h", replicas="first")
    assert torch.equal(target, whole)
    replay(run, [target], "h", replicas="mean")
    assert torch.allclose(target, (2 * whole + other) / 3)
    with pytest.raises(ReplicasDiffer):
        back.load_logical("x")
    assert torch.equal(back.load_logical("x", replicas="first"), whole)


def test_replicas_that_differ_only_where_nothing_is_taken_are_fine(run, tmp_path):
    meshes = [{"tp": (rank, 2)} for rank in range(2)]
    record(run, [torch.tensor([1.0, 0.0, 9.0]), torch.tensor([1.0, -0.0, 8.0])], "h # h=2", meshes)
    target = torch.full((2,), 5.0)
    replay(run, [target], "h")
    assert target.tolist() == [1, 0]
    big = 2**53
    record(tmp_path / "b", [torch.tensor([big]), torch.tensor([big + 1])], "h", meshes)
    (message,) = replay(tmp_path / "b", [torch.tensor([0])], "h", outcome="error")
    assert "differ in 1 of 1 elements" in message
    record(tmp_path / "c", [torch.zeros(1), torch.zeros(1, dtype=torch.int32)], "h", meshes)
    (message,) = replay(tmp_path / "c", [torch.zeros(1)], "h", outcome="error")
    assert "are of torch.float32 and torch.int32" in message


def test_a_dead_data_parallel_rank_is_not_replaced_by_another(run):
    record(run, [torch.ones(2), torch.ones(2), None, None], "h[tp]", over(dp=2, tp=2))
    targets = [torch.zeros(2) for _ in range(4)]
    replay(run, targets[:2] + [None] * 2, "h[tp]", over(dp=2, tp=2))
    messages = replay(run, [None] * 2 + targets[2:], "h[tp]", over(dp=2, tp=2), outcome="error")
    assert "no sender at dp=1 recorded it" in messages[0] and not targets[2].any()


@pytest.mark.parametrize("dims", ["v # v=10", "v # v=10 v:fill=0", "v[tp] # v=10"])
def test_the_same_dims_on_both_sides_do_not_bring_padding_over(run, dims):
    padded = torch.cat([torch.arange(10.0), torch.full((2,), 99.0)])
    blocks = list(padded.chunk(2)) if "[" in dims else [padded]
    record(run, blocks, dims)
    targets = [torch.full_like(block, -7) for block in blocks]
    replay(run, targets, dims)
    made = torch.cat(targets)
    assert torch.equal(made[:10], padded[:10])
    assert made[10:].tolist() == ([0, 0] if "fill" in dims else [-7, -7])


def test_contradicting_lengths_are_refused_even_between_like_jobs(run):
    record(run, [torch.ones(8)], "t", extras={"seq_lens": [3, 5]})
    (message,) = replay(run, [torch.zeros(8)], "t", None, {"seq_lens": [1, 7]}, outcome="error")
    assert "have the lengths [3, 5], the target's [1, 7]" in message


def test_a_gradient_belongs_to_the_mesh_of_its_tap(run):
    for rank in range(2):
        with Recorder(run, rank=rank, world_size=2):
            a = torch.ones(2, requires_grad=True)
            declare_mesh(tp=(rank, 2))
            x = tap("x", a * 1, dims="h[tp]", grad=True)
            declare_mesh(tp=(1 - rank, 2))
            tap("y", torch.full((2,), float(rank)), dims="h[tp]")
            (x * (torch.tensor([1.0, 2.0]) + 2 * rank)).sum().backward()
            tap("z", torch.full((2,), float(rank)), dims="h[tp]")
    back = Recording.open(run)
    assert back.load_logical("x", kind="grad").tolist() == [1, 2, 3, 4]
    assert back.load_logical("y").tolist() == back.load_logical("z").tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.float8_e4m3fn])
def test_a_fill_that_is_no_value_of_the_target_is_refused(run, dtype):
    record(run, [torch.ones(2).to(dtype)], "v")
    target = torch.ones(3).to(dtype)
    fill = {torch.int64: "0.5", torch.bool: "0.5", torch.float16: "1e30"}.get(dtype, "-inf")
    (message,) = replay(run, [target], f"v # v=2 v:fill={fill}", outcome="error")
    assert f"the fill {float(fill)} is not a value of {dtype}" in message
    replay(run, [target], "v # v=2 v:fill=0")
    assert target[2].float() == 0


def test_data_parallel_ranks_get_their_own(run):
    data = [torch.randn(2, 8) for _ in range(2)]
    blocks = [d.chunk(2, 1)[k].contiguous() for d in data for k in range(2)]
    back = record(run, blocks, "b h[tp]", over(dp=2, tp=2))
    targets = [torch.zeros(2, 2) for _ in range(8)]
    replay(run, targets, "b h[tp]", over(dp=2, tp=4))
    assert torch.equal(torch.cat(targets[:4], 1), data[0])
    assert torch.equal(torch.cat(targets[4:], 1), data[1])
    assert torch.equal(back.load_logical("x", at={"dp": 1}), data[1])
    (message,) = replay(run, [torch.zeros(2, 8)], "b h", outcome="error")
    assert "should hold the same block, and differ" in message


def test_blocks_that_nobody_recorded_are_named_where_they_are_needed(run):
    whole = torch.randn(8)
    chunks = list(whole.chunk(4))
    record(run, [chunks[0], chunks[1], None, chunks[3]], "h[tp]", over(tp=4))
    targets = [torch.zeros(4), torch.zeros(4)]
    replay(run, [targets[0], None], "h[tp]", over(tp=2))
    assert torch.equal(targets[0], whole[:4])
    (message,) = replay(run, [None, targets[1]], "h[tp]", over(tp=2), outcome="error")
    assert "dim h[tp]: no sender recorded index 4 and 1 more" in message
    assert "sender rank 2 recorded none" in message


@pytest.mark.parametrize(
    ("ours", "theirs", "shape", "said"),
    [
        (
            "t h[tp]",
            "t h",
            (4, 9),
            "dim h: the senders have 8 in all, and the target's block has 9",
        ),
        ("t h[tp]", "t d", (4, 8), "dim h is only in the sender's dims"),
        ("t h[tp]", "t h[", (4, 8), "'h[' is not a dim"),
        ("t h[tp]", "t h d", (4, 8), "name 3, and its tensor has the shape [4, 8]"),
        ("t h[tp,cp]", "t h", (4, 8), "declare_mesh(tp=(rank, size), cp=(rank, size))"),
        ("t h[tp]", "t 1", (4, 8), "say 1 where its tensor has 8"),
        ("t h[tp] # h=7", "t h # h=8", (4, 8), "declared to have 7 without padding by the senders"),
    ],
)
def test_layouts_that_contradict_each_other(run, ours, theirs, shape, said):
    record(run, list(torch.randn(4, 8).chunk(2, 1)), ours)
    (message,) = replay(run, [torch.zeros(shape)], theirs, outcome="error")
    assert said in message


def test_without_a_mesh_one_axis_is_that_of_all_ranks_and_that_is_said(run):
    whole = torch.randn(4, 8)
    record(run, whole.chunk(4, 1), "t h[tp]")
    targets = [torch.zeros(4, 4) for _ in range(2)]
    messages = replay(run, targets, "t h[tp]")
    assert torch.equal(torch.cat(targets, 1), whole)
    assert "tp was taken to be over all 4 of the senders' ranks" in messages[0]


def test_the_same_dims_on_as_many_ranks_are_identity(run):
    """Whatever the mesh is that nobody declared: rank for rank the blocks are the same."""
    blocks = [torch.full((2, 2), float(rank)) for rank in range(4)]
    record(run, blocks, "t[cp] h[tp]")
    targets = [torch.zeros(2, 2) for _ in range(4)]
    replay(run, targets, "t[cp] h[tp]")
    assert all(torch.equal(a, b) for a, b in zip(targets, blocks, strict=True))


def test_uneven_blocks_whose_place_is_not_certain_are_asked_about(run):
    whole = torch.randn(5)
    record(run, whole.tensor_split(4), "h[tp]", over(tp=4))
    targets = [part.clone().zero_() for part in whole.tensor_split(4)]
    (message,) = replay(run, [None, None, targets[2], None], "h[tp]", over(tp=4), outcome="error")
    assert "can begin at 4, as torch.chunk cuts, or at 3, as torch.tensor_split" in message
    replay(run, targets, "h[tp:split]", over(tp=4))
    assert torch.equal(torch.cat(targets), whole)


def test_a_transform_gets_both_halves(run):
    whole = torch.randn(4, 8)
    record(run, whole.chunk(4, 1), "t h[tp]", over(tp=4))
    targets = [torch.zeros(8, 2) for _ in range(2)]

    def flipped(g):
        assert torch.equal(g.logical(), whole)
        return g.to_local(g.logical().flip(0))

    replay(run, targets, "h t[sp]", over(sp=2), transform=flipped)
    assert torch.equal(torch.cat(targets, 1), whole.flip(0).t())


@pytest.mark.parametrize("senders", [2, 4])
def test_a_receiver_alone_has_the_whole_and_need_not_say_so(run, senders):
    whole = torch.randn(4, 8)
    record(run, whole.chunk(senders, 1), "t h[tp]")
    target = torch.zeros(4, 8)
    replay(run, [target], "")
    assert torch.equal(target, whole)
    (message,) = replay(run, [torch.zeros(4, 6)], "", outcome="error")
    assert "are parts of [4, 8], and the target, which declares no dims, has [4, 6]" in message
    (message,) = replay(run, [torch.zeros(32)], "", outcome="error")
    assert "the dims 't h[tp]' name 2, and the target of the one rank" in message


def test_a_receiver_that_declares_no_dims_is_held_to_its_extras_all_the_same(run):
    whole = torch.randn(6, 4)
    record(run, whole.chunk(2, 1), "t h[tp]", extras={"seq_lens": [2, 4]})
    target = torch.zeros(6, 4)
    (message,) = replay(run, [target], "", extras={"seq_lens": [4, 2]}, outcome="error")
    assert "sequences have the lengths [2, 4]" in message and not target.any()
    replay(run, [target], "", extras={"seq_lens": [2, 4]})
    assert torch.equal(target, whole)


@pytest.mark.parametrize("dims", ["t h[tp]", "h[tp] t"])
def test_a_sender_alone_has_the_whole_and_need_not_say_so(run, dims):
    whole = torch.randn(4, 8)
    record(run, [whole], "")
    along = dims.split().index("h[tp]")
    targets = [torch.zeros_like(part) for part in whole.chunk(2, along)]
    replay(run, targets, dims)
    assert torch.equal(torch.cat(targets, along), whole)
    wrong = [torch.zeros(4, 3), torch.zeros(4, 3)]
    assert all("[4, 3]" in m or "8" in m for m in replay(run, wrong, "t h[tp]", outcome="error"))
    (message, _) = replay(run, [torch.zeros(8)] * 2, "h[tp]", outcome="error")
    assert "the dims 'h[tp]' name 1, and the record of the one rank" in message


def test_what_one_rank_holds_is_that_of_ranks_that_hold_as_much(run, capsys):
    whole = torch.randn(4, 8)
    record(run, [whole], "")
    targets = [torch.zeros(4, 8) for _ in range(2)]
    messages = replay(run, targets, "")
    assert all(torch.equal(target, whole) for target in targets)
    assert all("was taken to be that of all 2 ranks" in message for message in messages)
    assert capsys.readouterr().err.count("was taken to be that of all 2 ranks") == 2  # one a rank
    record(run, [whole, whole], "", overwrite=True)
    target = torch.zeros(4, 8)
    assert replay(run, [target], "") == [""] and torch.equal(target, whole)


@pytest.mark.parametrize(
    ("senders", "sender_dims", "receivers", "receiver_dims", "said"),
    [
        (1, "", 2, "", "neither tap declares dims: say how it is cut at the target's tap, as a "
         "single sender has the whole, as in dims='b s h[tp] d'"),
        (2, "", 1, "", "neither tap declares dims: say how it is cut at the baseline's tap"),
        (4, "", 2, "", "neither tap declares dims: say how it is cut at the taps of both sides"),
        (4, "b s h[tp] e", 2, "", "the target's tap declares no dims: say how it is cut there, as "
         "in dims='b s h[tp] e'"),
        (4, "", 2, "b s h[tp] e", "the baseline's tap declares no dims: say how it is cut there, "
         "and record it again, as in dims='b s h[tp] e'"),
        (2, "", 1, "b s h e", "the baseline's tap declares no dims"),
    ],
)  # fmt: skip
def test_where_blocks_are_not_known_it_says_what_to_declare_where(
    run, senders, sender_dims, receivers, receiver_dims, said
):
    whole = torch.randn(2, 3, 4, 5)
    record(run, whole.chunk(senders, 2), sender_dims)
    targets = [torch.zeros_like(part) for part in whole.chunk(receivers, 2)]
    for message in replay(run, targets, receiver_dims, outcome="error"):
        assert "identity by rank needs as many senders as receivers" in message
        assert said in message and "or name a transform with --transform" in message
    assert not any(target.any() for target in targets)


def test_one_cause_is_said_once_a_rank(run, capsys):
    for rank in range(2):
        with Recorder(run, rank=rank, world_size=2):
            for i in range(20):
                tap(f"x{i}", torch.ones(3, 2 + i))
    with Replayer(run):
        for i in range(20):
            tap(f"x{i}", torch.ones(3, 4 + 2 * i))
    assert capsys.readouterr().err.count("was not grafted") == 1


def test_dims_that_forgot_a_cut_are_told_so_before_padding_is_thought_of(run):
    whole = torch.randn(4, 8)
    record(run, [whole], "t h")
    for message in replay(run, [torch.zeros(4, 4)] * 2, "t h", outcome="error"):
        assert "if 2 ranks hold a part each, write h[tp] at the target's tap" in message
        assert message.index("h[tp]") < message.index("if one is padded")
    record(run, whole.chunk(2, 1), "t h", overwrite=True)
    (message,) = replay(run, [torch.zeros(4, 8)], "t h", outcome="error")
    assert "if 2 ranks hold a part each, write h[tp] where they are recorded" in message
    (message,) = replay(run, [torch.zeros(4, 7)], "t h", outcome="error")
    assert "[tp]" not in message and "if one is padded" in message


def test_of_many_taps_without_a_record_a_few_name_the_nearest(run, capsys):
    with Recorder(run):
        tap("x", torch.ones(2))
    with Replayer(run) as session:
        for i in range(20):
            tap(f"x{i}", torch.ones(2))
    told = capsys.readouterr().err
    assert told.count("nothing recorded under") == 3
    assert told.count("more taps have no record, and are counted at the end") == 1
    assert session.summary().outcomes == {"missing": 20}


def test_gradients_follow_the_layout_too(run):
    for rank in range(2):
        declare_mesh(tp=(rank, 2))
        with Recorder(run, rank=rank, world_size=2):
            x = torch.ones(2, 2, requires_grad=True)
            h = tap("h", x * 1, dims="t h[tp]", grad=True)
            (h * (rank + 2)).sum().backward()
    declare_mesh(tp=(0, 1))
    with Replayer(run, filter="kind == 'grad'"):
        x = torch.ones(2, 4, requires_grad=True)
        tap("h", x * 1, dims="t h[tp]", grad=True).sum().backward()
    assert x.grad.tolist() == [[2, 2, 3, 3]] * 2


def test_a_cast_between_floating_types_is_noted_as_ever(run):
    record(run, list(torch.randn(4, 8).chunk(2, 1)), "t h[tp]", over(tp=2))
    (message,) = replay(run, [torch.zeros(4, 8, dtype=torch.bfloat16)], "t h")
    assert "cast from float32 to bfloat16" in message


@pytest.mark.thorough
def test_only_what_overlaps_is_read(run, monkeypatch):
    """64 ranks' blocks to one rank of 64: one is read; cut across, a 64th of each."""
    whole = torch.randn(64, 64 * 4096)
    record(run, whole.chunk(64), "t[sp] h", over(sp=64))
    read = []
    real = Recording.read

    def counted(self, row, *, check=True):
        read.append((row["rank"], check))
        return real(self, row, check=check)

    monkeypatch.setattr(Recording, "read", counted)
    target = torch.zeros(1, 64 * 4096)
    replay(run, [None] * 5 + [target] + [None] * 58, "t[sp] h", over(sp=64))
    assert torch.equal(target, whole[5:6]) and read == [(5, True)]
    read.clear()
    target = torch.zeros(64, 4096)
    (message,) = replay(run, [None] * 5 + [target] + [None] * 58, "t h[tp]", over(tp=64))
    assert torch.equal(target, whole[:, 5 * 4096 : 6 * 4096])
    assert read == [(rank, False) for rank in range(64)], "so little that no digest can be had"
    assert "read in part, without their digests: sender rank 0, 1, 2" in message


def test_a_damaged_block_fails_the_grafts_that_need_it(run):
    record(run, list(torch.randn(8).chunk(4)), "h[tp]", over(tp=4))
    (shard,) = run.glob("rank-00003/*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    targets = [torch.zeros(4), torch.zeros(4)]
    replay(run, [targets[0], None], "h[tp]", over(tp=2))
    (message,) = replay(run, [None, targets[1]], "h[tp]", over(tp=2), outcome="error")
    assert "do not have the digest" in message and not targets[1].any()


def test_no_layout_was_declared(run):
    back = record(run, [torch.ones(2)], None)
    with pytest.raises(LayoutError, match="recorded on rank 0 without dims"):
        back.load_logical("x")


@pytest.mark.parametrize("dims", ["s h", None])
def test_senders_whose_axis_no_mesh_declared_are_told_so(run, dims):
    record(run, [torch.zeros(2, 3) for _ in range(2)], "s[sp] h", over(tp=2))
    (message,) = replay(run, [torch.zeros(4, 3)], dims, outcome="error")
    assert "no axis sp is declared on the senders' ranks here" in message
    assert "declare_mesh(sp=(rank, size))" in message and "SIZE" not in message


def test_a_target_whose_axis_no_mesh_declares_is_told_so(run):
    record(run, [torch.zeros(4, 3)], "s h")
    messages = replay(
        run, [torch.zeros(2, 3) for _ in range(2)], "s[sp] h", over(tp=2), outcome="error"
    )
    assert all("no axis sp is declared on the target's ranks here" in m for m in messages)
