"""Rows where they are odd: written otherwise, shared, in part, in groups, empty, or not meant."""

from __future__ import annotations

import pytest
import torch

from recorder import Recorder, Recording, declare_mesh, rows, step, tap
from recorder.errors import ReplayError
from replayer import Replayer


@pytest.fixture
def meet(run):
    """Record a job on some ranks, and replay onto another; return the sessions."""

    def meet(base, target, worlds=(1, 1), meshes=(None, None), **options):
        def on_all(job, side, session_of):
            sessions = []
            for rank in range(worlds[side]):
                declare_mesh(**(meshes[side](rank) if meshes[side] else {}))
                with session_of(rank, worlds[side]) as session:
                    job(rank)
                sessions.append(session)
            declare_mesh()
            return sessions

        if not run.exists():
            on_all(base, 0, lambda rank, world: Recorder(run, rank=rank, world_size=world))
        return on_all(
            target, 1, lambda rank, world: Replayer(run, rank=rank, world_size=world, **options)
        )

    return meet


def filled(*shape):
    """A target of rows that nothing recorded has."""
    return torch.full(shape, -9.0)


def tapped(name, tensor, dims, rows=None, **tags):
    """A job of one tap."""
    return lambda rank: tap(name, tensor, dims=dims, rows=rows, **tags)


def numbered(*shape):
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def only(session):
    """Return the only row of its log."""
    return session.log().row(0, named=True)


class TestTheSameRowWrittenOtherwise:
    def test_other_texts_of_the_dims_are_the_same_rows(self, meet):
        def base(rank):
            texts = ["t h", "t[cp] h", "t h # t=3", "t[sp:zigzag,cp] h # dp:replicated"]
            for i, text in enumerate(texts):
                ids = torch.arange(3) + 3 * i
                tap("x", numbered(3, 2) + 6 * i, dims=text, rows={"t": ids})
                step()

        x = filled(12, 2)
        (session,) = meet(base, tapped("x", x, "t h", {"t": range(12)}))
        assert torch.equal(x, numbered(12, 2))
        assert only(session)["rows_found"] == 12

    def test_rows_of_one_name_may_be_along_b_s_and_along_t(self, meet):
        def base(rank):
            tap("x", numbered(2, 2, 1), dims="b s h", rows={"b s": [[0, 1], [2, 3]]})
            tap("x", numbered(1, 3) + 4, dims="h n", rows={"n": [4, 5, 6]})

        x = filled(7, 1)
        meet(base, tapped("x", x, "t h", {"t": range(7)}), strict=True)
        assert torch.equal(x, numbered(7, 1))

    def test_of_several_groups_the_names_have_to_be_the_same_in_all_records(self, meet):
        def base(rank):
            tap("x", numbered(2, 2), dims="t e", rows={"t": [0, 1], "e": [0, 1]})
            tap("x", numbered(2, 2), dims="n e", rows={"n": [2, 3], "e": [0, 1]})

        x = filled(2, 2)
        (session,) = meet(base, tapped("x", x, "t e", {"t": [0, 1], "e": [0, 1]}))
        row = only(session)
        assert row["outcome"] == "error"
        assert (
            "some records of x have rows along e and t and others along e and n" in row["message"]
        )

    def test_layouts_that_contradict_each_other_are_named_by_where_they_were_recorded(self, meet):
        def base(rank):
            tap("x", numbered(3, 1), dims="t h[tp]", rows={"t": [0, 1, 2]})
            step()
            tap("x", numbered(3, 2), dims="t h", rows={"t": [3, 4, 5]})

        x = filled(6, 2)
        meshes = (lambda rank: {"tp": (rank, 2)}, None)
        (session,) = meet(base, tapped("x", x, "t h", {"t": range(6)}), (2, 1), meshes)
        message = only(session)["message"]
        assert "parts 0 and 2 declare different layouts, 'h[tp]' and 'h'" in message
        assert "part 2 is rank 0's at step 1" in message
        assert bool((x == -9).all())

    def test_the_same_ids_along_other_dims_are_others(self, meet, run):
        """Square tensors, of which one dim or the other has rows with the very same ids."""

        def base(rank):
            tap("a", numbered(3, 1), dims="e h", rows={"e": [0, 1, 2]})
            tap("x", numbered(3, 3), dims="t e", rows={"t": [0, 1, 2]})
            tap("y", numbered(2, 3, 1), dims="b s h", rows={"b s": [[0, 1, 2], [3, 4, 5]]})
            tap("y", numbered(3, 2, 1), dims="b s h", rows={"b s": [[0, 1], [2, 3], [4, 5]]})
            tap("z", numbered(4, 1), dims="t h", rows={"t": [0, 1, 2, 3]})
            tap("v", numbered(2, 1), dims="t h", rows={"t": [[0, 1], [2, 3]]})

        x, y, z, v = filled(3, 3), filled(6, 1), filled(4, 1), filled(2, 1)

        def target(rank):
            tap("x", x, dims="t e", rows={"t": [2, 1, 0]})
            tap("y", y, dims="t h", rows={"t": [5, 4, 3, 2, 1, 0]})
            tap("z", z, dims="t h", rows={"t": [3, 2, 1, 0]})
            tap("v", v, dims="t h", rows={"t": [[2, 3], [0, 1]]})

        meet(base, target)
        assert torch.equal(x, numbered(3, 3).flip(0)) and torch.equal(y, numbered(6, 1).flip(0))
        assert torch.equal(z, numbered(4, 1).flip(0)) and torch.equal(v, numbered(2, 1).flip(0))
        held = Recording.open(run).rows().filter(kind="rows")
        assert held["digest"].n_unique() == len(held) == 6


class TestSharedHeads:
    """Of heads that are fewer than ranks, each is held by several, whose rows are one."""

    def base(self, off):
        def base(rank):
            value = numbered(3, 1) + 10 * (rank // 2) + off * (rank % 2)
            tap("x", value, dims="t g[tp/2]", rows={"t": [0, 1, 2]})

        return base

    def play(self, meet, off, target_ids=(0, 1, 2), **options):
        x = filled(3, 2)
        meshes = (lambda rank: {"tp": (rank, 4)}, None)
        job = tapped("x", x, "t g", {"t": target_ids})
        (session,) = meet(self.base(off), job, (4, 1), meshes, **options)
        return x, only(session)

    def test_ranks_that_agree_are_taken_once(self, meet):
        x, row = self.play(meet, 0, strict=True)
        assert torch.equal(x, torch.cat([numbered(3, 1), numbered(3, 1) + 10], 1))
        assert "3 rows recorded several times: the first was taken" in row["message"]

    def test_ranks_that_do_not_are_an_error_that_names_both(self, meet):
        x, row = self.play(meet, 1)
        assert row["outcome"] == "error" and bool((x == -9).all())
        assert "was recorded at step=0 rank=0 row " in row["message"]
        assert "and at step=0 rank=1 row " in row["message"]

    def test_replicas_says_which_is_taken(self, meet):
        assert self.play(meet, 1, replicas="first")[0][0].tolist() == [0, 10]
        assert self.play(meet, 1, replicas="last")[0][0].tolist() == [1, 11]
        assert self.play(meet, 1, replicas="mean")[0][0].tolist() == [0.5, 10.5]

    def test_a_row_that_one_of_them_has_is_there(self, meet):
        def base(rank):
            if rank % 2 or rank < 2:  # the first of the second pair recorded nothing
                tap("x", numbered(3, 1) + 10 * (rank // 2), dims="t g[tp/2]", rows={"t": [0, 1, 2]})

        x = filled(3, 2)
        meshes = (lambda rank: {"tp": (rank, 4)}, None)
        meet(base, tapped("x", x, "t g", {"t": [2, 1, 0]}), (4, 1), meshes, strict=True)
        assert x[:, 1].tolist() == [12, 11, 10]


class TestParts:
    def test_rows_that_no_part_lacks_are_told_from_those_that_one_does(self, meet):
        def base(rank):
            ids = [0, 1, 2] if rank == 0 else [3, 4, 5]
            tap("x", numbered(3, 1), dims="t h[tp]", rows={"t": ids})

        x = filled(3, 2)
        meshes = (lambda rank: {"tp": (rank, 2)}, None)
        (session,) = meet(base, tapped("x", x, "t h", {"t": [0, 1, 2]}), (2, 1), meshes)
        row = only(session)
        assert row["outcome"] == "missing"
        assert "none of its 3 rows was recorded in all parts that it is made of" in row["message"]
        assert row["message"].endswith(
            "and only 1 of these have any: 3 rows recorded in some parts only: tp=1 (rank 1) lacks "
            "3; record all ranks"
        )

    @pytest.mark.parametrize("with_transform", [False, True])
    def test_rows_that_one_part_lacks_are_told_with_that_part(self, meet, with_transform):
        def base(rank):
            ids = [[0, 1, 2, 3], [0, 1, 3, 4], [5], [5]][rank]
            tap("x", numbered(len(ids), 1), dims="t[cp] h[tp]", rows={"t": ids})

        x = filled(6, 2)
        how = {"transform": lambda g: torch.cat(g.received_list[:2], 1)} if with_transform else {}
        meshes = (lambda rank: {"tp": (rank % 2, 2), "cp": (rank // 2, 2)}, None)
        job = tapped("x", x, "t h", {"t": [0, 2, 2, 4, 9, -1]})
        (session,) = meet(base, job, (4, 1), meshes, **how)
        row = only(session)
        assert (row["rows_found"], row["rows_missing"]) == (1, 4)
        assert row["message"] == (
            "3 rows recorded in some parts only: tp=0 (rank 0, 2) lacks 1 and tp=1 (rank 1, 3) "
            "lacks 2; 4 rows not found"
        )

    def test_combinations_that_one_part_lacks_are_told_too(self, meet):
        def base(rank):
            ids = {"t": [0, 1], "e": [[0, 1], [0, 2]][rank]}
            tap("x", numbered(2, 2, 1), dims="t e h[tp]", rows=ids)

        x = filled(2, 3, 2)
        meshes = (lambda rank: {"tp": (rank, 2)}, None)
        job = tapped("x", x, "t e h", {"t": [1, 7], "e": [0, 1, 2]})
        (session,) = meet(base, job, (2, 1), meshes)
        row = only(session)
        assert (row["rows_found"], row["rows_missing"]) == (1, 5)
        assert row["message"] == (
            "2 rows recorded in some parts only: tp=0 (rank 0) lacks 1 and tp=1 (rank 1) lacks 1; "
            "5 rows not found"
        )

    @pytest.mark.parametrize("is_there", [True, False])
    def test_a_rank_of_a_sum_is_zero_just_where_the_other_has_all_of_it(self, meet, is_there):
        def base(rank):
            ids = [0, 1] if rank == 0 or is_there else [0]
            tap("x", numbered(len(ids), 2), dims="t h[tp:partial]", rows={"t": ids})

        xs = [filled(2, 2) for _ in range(4)]
        meshes = (lambda rank: {"tp": (rank, 2)}, lambda rank: {"tp": (rank, 4)})

        def target(rank):
            tap("x", xs[rank], dims="t h[tp:partial]", rows={"t": [0, 1]})

        sessions = meet(base, target, (2, 4), meshes)
        assert [only(one)["rows_missing"] for one in sessions] == [0 if is_there else 1] * 4
        kept = [0, 0] if is_there else [-9, -9]
        assert all(one[0].tolist() == [0, 0] and one[1].tolist() == kept for one in xs[1:])
        assert xs[0][0].tolist() == [0, 2] and xs[0][1].tolist() == ([4, 6] if is_there else kept)

    def test_a_transform_gets_one_part_of_each_rank_or_an_error(self, meet):
        def base(rank):
            for place in range(2):
                declare_mesh(tp=(place, 2))
                tap("x", numbered(3, 1) + place, dims="t h[tp]", rows={"t": [0, 1, 2]})
                step()

        x = filled(3, 2)
        (session,) = meet(
            base, tapped("x", x, "t h", {"t": [0, 1, 2]}), transform=lambda g: g.target
        )
        message = only(session)["message"]
        assert "rank 0 recorded several parts of these rows, and a transform gets one of" in message
        meet(base, tapped("x", x, "t h", {"t": [0, 1, 2]}), strict=True)
        assert torch.equal(x, torch.cat([numbered(3, 1), numbered(3, 1) + 1], 1))


class TestOtherDims:
    """They are laid out as their dims say, padding and what is taken for granted included."""

    @pytest.mark.parametrize(("fact", "pad"), [("# h=3", -9), ("# h=3 h:fill=7", 7)])
    def test_padding_keeps_the_target_s_values_or_has_its_fill(self, meet, fact, pad):
        xs = [filled(3, 2), filled(3, 2)]

        def target(rank):
            tap("x", xs[rank], dims=f"t h[tp] {fact}", rows={"t": [1, 5, 0]})

        base = tapped("x", numbered(2, 3), "t h", {"t": [0, 1]})
        meet(base, target, (1, 2), (None, lambda rank: {"tp": (rank, 2)}))
        assert xs[0].tolist() == [[3, 4], [-9, -9], [0, 1]]
        assert xs[1].tolist() == [[5, pad], [-9, -9], [2, pad]]

    def test_padding_of_the_senders_is_left_out(self, meet):
        def base(rank):
            part = torch.tensor([[0, 1], [3, 4]] if rank == 0 else [[2, 99], [5, 99]]).float()
            tap("x", part, dims="t h[tp] # h=3", rows={"t": [0, 1]})

        x = filled(2, 3)
        meshes = (lambda rank: {"tp": (rank, 2)}, None)
        meet(base, tapped("x", x, "t h", {"t": [1, 0]}), (2, 1), meshes)
        assert torch.equal(x, numbered(2, 3).flip(0))

    def test_an_axis_that_nobody_declared_is_told_of(self, meet):
        x = filled(2, 2)
        base = tapped("x", numbered(2, 1), "t h[tp]", {"t": [0, 1]})
        (session,) = meet(base, tapped("x", x, "t h", {"t": [1, 0]}), (2, 1))
        said = "tp was taken to be over all 2 of the senders' ranks: no mesh was declared"
        assert only(session)["message"] == said and x.tolist() == [[1, 1], [0, 0]]


class TestSeveralTimes:
    def base(self, rank):
        for i in range(2):
            tap("x", numbered(2, 2) + i, dims="t h", rows={"t": [0, 1]})
        tap("x", numbered(2, 2) + 2, dims="t h", rows={"t": [0, 0]})

    def test_both_places_are_named_occurrence_included(self, meet):
        x = filled(2, 2)
        (session,) = meet(self.base, tapped("x", x, "t h", {"t": [1, 7]}))
        message = only(session)["message"]
        assert "at step=0 rank=0 row 1 and at step=0 rank=0 occurrence=1 row 1" in message
        assert "at most by 1, which is no rounding" in message
        assert "choose --replicas first, last or mean" in message

    def test_each_tap_that_takes_them_is_told(self, meet):
        """Also the next, after the first has compared what it could."""
        xs = [filled(2, 2) for _ in range(3)]

        def base(rank):
            tap("x", torch.ones(2, 2), dims="t h", rows={"t": [0, 0]})
            tap("x", torch.zeros(2, 2), dims="t h", rows={"t": [0, 1]})

        def target(rank):
            for x in xs:
                tap("x", x, dims="t h", rows={"t": [0, 1]})

        (session,) = meet(base, target)
        assert session.log()["outcome"].to_list() == ["error"] * 3
        assert all(bool((x == -9).all()) for x in xs)

    def test_rows_with_equal_bytes_are_not_even_read_twice(self, meet):
        def base(rank):
            for _ in range(3):
                tap("x", numbered(2, 2), dims="t h", rows={"t": [0, 1]})

        x = filled(2, 2)
        (session,) = meet(base, tapped("x", x, "t h", {"t": [1, 0]}))
        assert only(session)["message"] == "2 rows recorded several times: the first was taken"

    @pytest.mark.parametrize(
        ("replicas", "said"),
        [
            ("first", "the first was taken, others are off by 0.5 of the row at most"),
            ("last", "the last was taken, two of them are 0.5 of the row apart"),
            ("mean", "their mean was taken, two of them are 0.5 of the row apart"),
        ],
    )
    @pytest.mark.parametrize("with_transform", [False, True])
    def test_whichever_is_taken_how_far_they_are_apart_is_told(
        self, meet, replicas, said, with_transform
    ):
        def base(rank):
            for i in (1, 2):
                tap("x", torch.full((2, 2), float(i)), dims="t h", rows={"t": [0, 1]})

        x = filled(2, 2)
        how = {"transform": lambda received, target: received[0]} if with_transform else {}
        (session,) = meet(base, tapped("x", x, "t h", {"t": [1, 0]}), replicas=replicas, **how)
        assert only(session)["message"] == f"2 rows recorded several times: {said}"
        assert x[0, 0].item() == {"first": 1, "last": 2, "mean": 1.5}[replicas]

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
    def test_narrow_floats_are_held_against_each_other_too(self, meet, dtype):
        def base(rank):
            for i in (1, 1.5):
                tap("x", (numbered(2, 4) * i).to(dtype), dims="t h", rows={"t": [0, 1]})

        x = torch.zeros(2, 4).to(dtype)
        (session,) = meet(base, tapped("x", x, "t h", {"t": [1, 0]}))
        assert "which is no rounding" in only(session)["message"]

    def test_nan_in_one_of_them_is_no_rounding_and_in_both_it_is_the_same(self, meet):
        def base(rank):
            for i in range(2):
                x = numbered(2, 2)
                x[0, 0] = torch.nan
                x[1, 1] = torch.inf if i else 3
                tap("x", x, dims="t h", rows={"t": [0, 1]})

        x, y = filled(1, 2), filled(1, 2)

        def target(rank):
            tap("x", x, dims="t h", rows={"t": [0]})
            tap("x", y, dims="t h", rows={"t": [1]})

        (session,) = meet(base, target)
        assert session.log()["outcome"].to_list() == ["grafted", "error"]
        assert x[0, 0].isnan() and bool((y == -9).all())


class TestAnotherStep:
    """In 16 bits, what other weights make of a row may be as near as rounding is."""

    @staticmethod
    def trained(x, numbers=(0, 1, 2), dtype=torch.bfloat16, dims="t h", ids=None):
        ids = ids or {"t": [0, 1]}

        def fire(rank):
            for i in numbers:
                value = torch.full((2, 2), 1 + i / 128).to(dtype)
                tap("x", value if x is None else x[i], dims=dims, rows=ids)
                step()

        return fire

    said = (
        "2 rows taken from another step, though step 1 of the recording has them too, with other "
        "bits; if the weights or something else changed in between, match on the step too"
    )

    def test_a_row_of_another_step_than_the_tap_s_own_is_told_once(self, meet, capsys):
        x = torch.full((3, 2, 2), -9).bfloat16()
        (session,) = meet(self.trained(None), self.trained(x))
        assert bool((x == 1).all()) and set(session.log()["outcome"]) == {"grafted"}
        has = [self.said in message for message in session.log()["message"]]
        assert has == [False, True, False] and capsys.readouterr().err.count(self.said) == 1

    def test_so_is_one_of_several_dims(self, meet, capsys):
        x = torch.full((3, 2, 2), -9).bfloat16()
        how = {"dims": "t h", "ids": {"t": [0, 1], "h": [3, 4]}}
        meet(self.trained(None, **how), self.trained(x, **how))
        assert capsys.readouterr().err.count(self.said.replace("2 rows", "4 rows")) == 1

    def test_and_one_that_a_transform_gets(self, meet, capsys):
        x = torch.full((3, 2, 2), -9).bfloat16()
        meet(self.trained(None), self.trained(x), transform=lambda received, target: received[0])
        assert capsys.readouterr().err.count(self.said) == 1

    def test_the_offset_of_steps_says_which_is_its_own(self, meet, capsys):
        x = torch.full((3, 2, 2), -9).bfloat16()
        meet(self.trained(None), self.trained(x, numbers=(0,)), step_offset=1)
        assert self.said in capsys.readouterr().err

    @pytest.mark.parametrize(
        "options", [{"match_on": "name,step"}, {"replicas": "last"}, {"step_offset": 9}]
    )
    def test_who_says_what_is_meant_is_not_told(self, meet, capsys, options):
        x = torch.full((3, 2, 2), -9).bfloat16()
        meet(self.trained(None), self.trained(x), **options)
        assert capsys.readouterr().err == ""

    def test_nor_is_one_whose_own_step_has_the_same_bits_or_not_that_row(self, meet, capsys):
        def base(rank):
            for value, ids in ((1.0, [0, 1]), (1.0, [0, 9]), (1 + 1 / 128, [0, 1])):
                tap("x", torch.full((2, 2), value).bfloat16(), dims="t h", rows={"t": ids})
                step()

        x = torch.full((3, 2, 2), -9).bfloat16()
        (session,) = meet(base, self.trained(x, numbers=(0, 1)))
        assert capsys.readouterr().err == ""
        assert all("off by" in message for message in session.log()["message"])


class TestSeveralGroups:
    """Each combination of ids is a row; in one record the same id may come twice along a dim."""

    def play(self, meet, base, replicas="error", dtype=torch.float32):
        x = filled(2, 2).to(dtype)
        ids = {"t": [1, 0], "e": [0, 1]}
        (session,) = meet(base, tapped("x", x, "t e", ids), replicas=replicas)
        return x.tolist(), only(session)

    def twice_in_one(self, rank):
        tap("x", numbered(3, 2), dims="t e", rows={"t": [0, 1, 1], "e": [0, 1]})

    def twice_in_all(self, rank):
        for i in range(2):
            tap("x", numbered(2, 2) + 10 * i, dims="t e", rows={"t": [0, 1], "e": [0, 1]})

    def test_rows_of_one_record_that_differ_are_an_error(self, meet):
        x, row = self.play(meet, self.twice_in_one)
        assert row["outcome"] == "error" and x == [[-9, -9], [-9, -9]]
        assert "at step=0 rank=0 row 2" in row["message"]

    def test_the_one_that_was_asked_for_is_taken(self, meet):
        assert self.play(meet, self.twice_in_one, "first")[0] == [[2, 3], [0, 1]]
        assert self.play(meet, self.twice_in_one, "last")[0] == [[4, 5], [0, 1]]
        assert self.play(meet, self.twice_in_one, "mean")[0] == [[3, 4], [0, 1]]

    def test_of_several_records_too(self, meet):
        x, row = self.play(meet, self.twice_in_all)
        assert row["outcome"] == "error" and x == [[-9, -9], [-9, -9]]
        assert self.play(meet, self.twice_in_all, "first")[0] == [[2, 3], [0, 1]]
        assert self.play(meet, self.twice_in_all, "last")[0] == [[12, 13], [10, 11]]
        assert self.play(meet, self.twice_in_all, "mean")[0] == [[7, 8], [5, 6]]

    def test_they_pair_by_name_and_the_target_may_have_them_in_another_order(self, meet):
        def base(rank):
            tap("x", numbered(3, 2, 2), dims="t e h", rows={"t": [5, 6, 7], "e": [0, 1]})

        x = filled(2, 2, 3)
        job = tapped("x", x, "h e t", {"t": [7, -1, 5], "e": [1, 0]})
        (session,) = meet(base, job, strict=True)
        whole = numbered(3, 2, 2).flip(0, 1)
        assert torch.equal(x[:, :, 0], whole[0].T) and torch.equal(x[:, :, 2], whole[2].T)
        assert bool((x[:, :, 1] == -9).all()) and only(session)["rows_found"] == 4

    def test_groups_of_other_names_are_refused(self, meet):
        x = filled(2, 2)
        (session,) = meet(self.twice_in_one, tapped("x", x, "a b", {"a": [0, 1], "b": [0, 1]}))
        message = only(session)["message"]
        assert "the baseline has rows along e and t, and the target along a and b" in message


class TestNothing:
    """Blocks without rows, rows that are all padding, and dims of size 0."""

    def base(self, rank):
        none = torch.empty(0, dtype=torch.int64)
        tap("x", numbered(3, 2), dims="t h", rows={"t": [0, 1, 2]})
        tap("x", torch.empty(0, 2), dims="t h", rows={"t": none})
        tap("x", numbered(2, 2), dims="t h", rows={"t": [-1, -1]})
        tap("y", torch.empty(3, 0), dims="t h", rows={"t": [0, 1, 2]})
        tap("z", torch.empty(3, 2, 0), dims="t e h", rows={"t": [0, 1, 2], "e": [0, 1]})
        tap("k", numbered(2, 2), dims="t h", rows={"t": [[0, 1], [2, 3]]})
        tap("k", torch.empty(0, 2), dims="t h", rows={"t": []})

    def test_they_are_grafted_as_they_are_and_no_record_is_left_over(self, meet):
        x, k = filled(3, 2), filled(2, 2)

        def target(rank):
            tap("x", x, dims="t h", rows={"t": [2, 1, 0]})
            tap("y", torch.empty(3, 0), dims="t h", rows={"t": [2, 1, 0]})
            tap("z", torch.empty(3, 2, 0), dims="t e h", rows={"t": [2, 1, 0], "e": [1, 0]})
            tap("k", k, dims="t h", rows={"t": [[2, 3], [0, 1]]})

        (session,) = meet(self.base, target, strict=True)
        assert torch.equal(x, numbered(3, 2).flip(0)) and torch.equal(k, numbered(2, 2).flip(0))
        assert session.log()["rows_found"].to_list() == [3, 3, 6, 2]

    def test_so_are_targets_without_rows(self, meet):
        xs = [filled(2, 2), torch.empty(0, 2), torch.empty(0, 2)]

        one = filled(1, 2)

        def target(rank):
            tap("x", one, dims="t h", rows={"t": [0]})
            tap("x", xs[0], dims="t h", rows={"t": [-1, -1]})
            tap("x", xs[1], dims="t h", rows={"t": []})
            tap("k", xs[2], dims="t h", rows={"t": torch.empty(0, 2, dtype=torch.int64)})

        (session,) = meet(self.base, target)
        log = session.log()
        assert (
            log["message"].to_list()[1:] == ["all of its rows are padding"] + ["it has no rows"] * 2
        )
        assert log["rows_found"].to_list() == [1, 0, 0, 0] and bool((xs[0] == -9).all())
        assert session.problems() == []

    def test_a_replay_of_nothing_else_has_grafted_nothing(self, meet):
        x = filled(2, 2)

        def target(rank):
            tap("x", x, dims="t h", rows={"t": [-1, -1]})

        (session,) = meet(self.base, target)
        assert session.problems() == ["nothing was grafted: all rows of 1 tap are padding"]

    def test_nor_has_one_in_which_no_other_tap_found_its_rows(self, meet):
        def target(rank):
            tap("x", filled(2, 2), dims="t h", rows={"t": [-1, -1]})
            tap("x", filled(2, 2), dims="t h", rows={"t": [8, 9]})

        (session,) = meet(self.base, target)
        assert session.problems()[0].startswith("nothing was grafted: no selected tap has a record")

    def test_transforms_get_zeros(self, meet):
        seen = []

        def transform(received_list, target):
            seen.append(received_list[0].clone())
            return received_list[0]

        def target(rank):
            tap("x", filled(2, 2), dims="t h", rows={"t": [-1, -1]})
            tap("x", torch.empty(0, 2), dims="t h", rows={"t": []})
            tap("y", torch.empty(2, 0), dims="t h", rows={"t": [0, 1]})

        (session,) = meet(self.base, target, transform=transform)
        assert set(session.log()["outcome"]) == {"grafted"}
        assert [tuple(one.shape) for one in seen] == [(2, 2), (0, 2), (2, 0)]
        assert not seen[0].any()


class TestCounting:
    """A firing counts for --match-on whether its rows decide or not."""

    def base(self, rank):
        tap("x", torch.full((2, 1), 1.0), dims="t h", rows={"t": [0, 1]}, a=1)
        tap("x", torch.full((2, 1), 2.0), dims="t h", a=2)
        tap("x", torch.full((2, 1), 3.0), dims="t h", rows={"t": [2, 3]}, a=3)

    @pytest.mark.parametrize("match_on", ["name", "name,occurrence"])
    def test_taps_without_rows_take_the_records_of_their_own_number(self, meet, match_on):
        xs = [filled(2, 1) for _ in range(3)]

        def target(rank):
            for x, ids in zip(xs, ([0, 1], None, [2, 3]), strict=True):
                tap("x", x, dims="t h", rows={"t": ids} if ids else None)

        meet(self.base, target, match_on=match_on, strict=True)
        assert [x[0, 0].item() for x in xs] == [1, 2, 3]

    def test_occurrence_is_counted_anew_over_what_is_named(self, meet):
        def base(rank):
            for i in range(2):
                for number in range(2):
                    value = torch.full((2, 1), 10.0 * i + number)
                    tap("x", value, dims="t h", rows={"t": [0, 1]}, layer=0)
                step()

        xs = []

        def target(rank):
            for _ in range(2):
                for number in range(2):
                    xs.append(filled(2, 1))
                    tap("x", xs[-1], dims="t h", rows={"t": [1, 0]}, layer=0, micro_batch=number)
                step()

        meet(base, target, match_on="name,layer,step,occurrence", strict=True)
        assert [x[0, 0].item() for x in xs] == [0, 1, 10, 11]

    def test_order_says_nothing_of_rows(self, meet):
        x = filled(2, 1)
        (session,) = meet(self.base, tapped("x", x, "t h", {"t": [1, 0]}), match_on="order")
        message = only(session)["message"]
        assert "--match-on order pairs taps by their place, whatever rows they have" in message
        assert "match on tags, as in --match-on name,layer" in message


class TestNotMeant:
    def base(self, rank):
        tap("x", numbered(3, 2), dims="t h", rows={"t": [0, 1, 2]})

    @pytest.mark.parametrize(
        ("dims", "ids", "said"),
        [
            ("t h", {"n": [2, 1, 0]}, "it was given rows along n, and its dims are 't h'"),
            (
                "t h",
                {"t n": [[2], [1], [0]]},
                "it was given rows along t n, and its dims are 't h'",
            ),
            (None, {"t": [2, 1, 0]}, "it was given rows along t, and it declares no dims"),
            ("t h", {"t": [2, 1]}, "its rows along t have 2 ids, and the tensor 3 places there"),
            ("t h", {"h": [2, 1, 0]}, "its rows along h have 3 ids, and the tensor 2 places there"),
            ("t h", {"t": [2.0, 1.0, 0.0]}, "the ids of rows along t are torch.float32"),
            ("t h", {"t": [True, False, True]}, "the ids of rows along t are torch.bool"),
            ("t h", {"t": lambda: 1 // 0}, "the callable of the ids of rows along t raised Zero"),
            ("t h", {"t": 1}, "the ids of rows along t have the shape []"),
            ("t h", {"t": "abc"}, "the ids of rows along t cannot be read"),
            (
                "t h",
                {"t": [[0, 1], [1, 2], [2, 3]]},
                "are told apart by 1 number each, and the target's by 2",
            ),
        ],
    )
    def test_ids_that_do_not_fit_a_tap_are_an_error_and_nothing_is_grafted_by_place(
        self, meet, dims, ids, said
    ):
        x = filled(3, 2)
        (session,) = meet(self.base, tapped("x", x, dims, ids))
        row = only(session)
        assert row["outcome"] == "error" and said in row["message"]
        assert "; " in row["message"] and "transform" not in row["message"]
        assert bool((x == -9).all())

    def test_ids_around_of_dims_that_a_tap_does_not_have_are_not_for_it(self, meet):
        def base(rank):
            with rows(t=[0, 1, 2], b=[0]):
                tap("x", numbered(3, 2), dims="t h")
                tap("w", numbered(2, 2), dims="h d")
                tap("v", numbered(2, 2))

        xs = filled(3, 2), filled(2, 2), filled(2, 2)

        def target(rank):
            with rows(t=[2, 1, 0]):
                tap("x", xs[0], dims="t h")
                tap("w", xs[1], dims="h d")
                tap("v", xs[2])

        (session,) = meet(base, target, strict=True)
        assert torch.equal(xs[0], numbered(3, 2).flip(0))
        assert all(torch.equal(x, numbered(2, 2)) for x in xs[1:])
        assert session.log()["rows_found"].to_list() == [3, None, None]

    def test_where_only_one_side_says_which_row_is_which_the_layouts_decide(self, meet):
        x, y = filled(3, 2), filled(2, 2)

        def target(rank):
            tap("x", x, dims="t h")
            tap("x", y, dims="t h")

        (session,) = meet(self.base, target)
        assert torch.equal(x, numbered(3, 2)) and only(session)["rows_found"] is None

    @pytest.mark.parametrize("is_here", [False, True])
    def test_which_strict_does_not_trust(self, meet, capsys, is_here):
        def job(x, has_rows):
            def fire(rank):
                for _ in range(2):
                    tap("x", x, dims="t h", rows={"t": [0, 1, 2]} if has_rows else None)
                    step()

            return fire

        x = filled(3, 2)
        sides = (job(numbered(3, 2), not is_here), job(x, is_here))
        with pytest.raises(ReplayError) as err:
            meet(*sides, strict=True)
        said = (
            "the target says which row is which, and the baseline's records of this name do not: "
            "taken by their key, row for row as they stand"
            if is_here
            else "the baseline says which row is which, and the target does not: taken by its key, "
            "row for row as they stand"
        )
        assert str(err.value) == (
            "--strict: 2 taps matched where one side alone says which row is which, the first: x "
            f"step=0 occurrence=0 on rank 0: {said}"
        )
        assert capsys.readouterr().err.count(said) == 1
        (session,) = meet(*sides)
        assert torch.equal(x, numbered(3, 2)) and session.problems() == []

    @pytest.mark.parametrize("is_here", [False, True])
    def test_along_one_of_several_dims_too(self, meet, capsys, is_here):
        def job(x, ids):
            def fire(rank):
                for _ in range(2):
                    tap("x", x, dims="t e h", rows=ids)

            return fire

        both, one = {"t": [0, 1], "e": [0, 1, 2]}, {"t": [1, 0]}
        x = filled(2, 3, 1)
        given = (one, both) if is_here else (both, one)
        (session,) = meet(job(numbered(2, 3, 1), given[0]), job(x, given[1]))
        assert torch.equal(x, numbered(2, 3, 1).flip(0))
        sides = ("the target", "the baseline") if is_here else ("the baseline", "the target")
        said = (
            f"{sides[0]} says which row is which along e, and {sides[1]} does not: taken along it "
            "row for row as they stand"
        )
        assert all(said in message for message in session.log()["message"])
        assert capsys.readouterr().err.count(said) == 1
        assert session.problems(True)[0].startswith("--strict: 2 taps matched where one side alone")

    def test_a_tap_without_a_record_is_not_said_to_be_of_one_side(self, meet, capsys):
        (session,) = meet(self.base, tapped("y", filled(3, 2), "t h", {"t": [0, 1, 2]}))
        assert only(session)["outcome"] == "missing"
        assert "which row is which" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("match_on", "found"), [(None, [0, 3]), ("name", [-9, 3]), ("name,step", [-9, 3])]
)
def test_a_filter_by_step_is_of_the_target_s_and_with_match_on_of_the_records_too(
    meet, match_on, found
):
    """As replayer/README.md says."""

    def base(rank):
        for i in range(3):
            tap("x", numbered(2, 1) + 2 * i, dims="t h", rows={"t": [2 * i, 2 * i + 1]})
            step()

    xs = [filled(2, 1) for _ in range(3)]

    def target(rank):
        for x in xs:
            tap("x", x, dims="t h", rows={"t": [0, 3]})
            step()

    meet(base, target, filter="step == 1", match_on=match_on)
    assert [x.flatten().tolist() for x in xs] == [[-9, -9], found, [-9, -9]]


def test_a_tap_of_which_no_row_was_found_counts_them_all_as_missing(meet):
    def base(rank):
        tap("x", numbered(2, 2), dims="t h", rows={"t": [0, 1]})

    x = filled(3, 2)

    def target(rank):
        tap("x", filled(3, 2), dims="t h", rows={"t": [7, -1, 8]})
        tap("y", filled(3, 2), dims="t h", rows={"t": [0, 1, 2]})
        tap("z", filled(3, 2), dims="t h")
        tap("x", x, dims="t h", rows={"t": [0, 1, 2]})

    (session,) = meet(base, target)
    log = session.log()
    assert log["outcome"].to_list() == ["missing"] * 3 + ["grafted"]
    assert log["rows_found"].to_list() == [0, 0, None, 2]
    assert log["rows_missing"].to_list() == [2, 3, None, 1]
    assert session.summary().rows == (2, 1, 1)  # what is missing is told of by itself


def test_in_process_a_rank_of_several_does_not_judge_what_others_take(meet):
    def base(rank):
        tap("x", numbered(2, 2) + 4 * rank, dims="t[dp] h", rows={"t": [2 * rank, 2 * rank + 1]})

    xs = filled(2, 2), filled(2, 2)

    def target(rank):
        tap("x", xs[rank], dims="t[dp] h", rows={"t": [[0, 2], [1, 3]][rank]})

    meet(base, target, (2, 2), strict=True)
    assert torch.equal(torch.stack(xs, 1).reshape(4, 2), numbered(4, 2)[[0, 1, 2, 3]])


def test_strict_names_rows_that_were_not_found_and_records_that_no_row_was_taken_of(meet):
    def base(rank):
        for i in range(3):
            tap("x", numbered(2, 2), dims="t h", rows={"t": [2 * i, 2 * i + 1]})

    job = tapped("x", filled(3, 2), "t h", {"t": [0, 2, 9]})
    with pytest.raises(ReplayError) as err:
        meet(base, job, strict=True)
    assert "--strict: 1 row of 1 tap had no record, the first: x step=0 on rank 0" in str(err.value)
    assert "--strict: 1 selected record of 3 never used, such as x" in str(err.value)


def test_records_of_an_earlier_attempt_are_taken_and_none_of_the_latest_counts_as_used_for_it(
    run, monkeypatch
):
    """A record's number is that of its attempt: the same one of another is something else."""
    monkeypatch.setenv("GRAFT_JOB", "one")
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with Recorder(run):
            ids = [0, 1] if attempt == 0 else [2, 3]
            tap("x", numbered(2, 2) + 4 * attempt, dims="t h", rows={"t": ids})
    x = filled(2, 2)
    with (
        pytest.raises(ReplayError, match="1 selected record of 1 never used"),
        Replayer(run, strict=True) as session,
    ):
        tap("x", x, dims="t h", rows={"t": [1, 0]})
    assert torch.equal(x, numbered(2, 2).flip(0))
    row = only(session)
    assert row["rows_from"] == [] and row["senders"] == [None]


@pytest.mark.parametrize("replicas", ["first", "last"])
def test_of_several_attempts_the_latest_is_taken_whichever_row_is(run, monkeypatch, replicas):
    monkeypatch.setenv("GRAFT_JOB", "one")
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with Recorder(run):
            for time in range(2):
                tap("x", filled(1, 2) + 10 * attempt + time, dims="t h", rows={"t": [7]})
    x = filled(1, 2)
    with Replayer(run, replicas=replicas) as session:
        tap("x", x, dims="t h", rows={"t": [7]})
    assert only(session)["outcome"] == "grafted"
    assert torch.equal(x, filled(1, 2) + 10 + (replicas == "last"))
