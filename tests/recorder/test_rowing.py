"""Ids of rows in a recording: which hold at a tap, that they are kept once, and found again."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from checkpointing import frames, reentrant
from typed import graft

from recorder import Recorder, Recording, rows, step, tap, token_rows
from recorder.errors import DamagedRecording, UnsupportedVersion, UsageError
from recorder.taps.around import from_here_on
from recorder.taps.rows import Ids
from recorder.verify import Checker
from recorder.writing import store as store_module
from replayer import Replayer

MIB = 1 << 20


def t(n, width=1):
    """A tensor of so many rows."""
    return torch.arange(float(n * width)).reshape(n, width)


def ids_of(recording, **where):
    """Return for each record of tensors or gradients its ids, by the names of their dims."""
    frame = recording.rows()
    frame = frame.filter(frame["kind"].is_in(["tensor", "grad"]))
    found = []
    for row in (frame.filter(**where) if where else frame).iter_rows(named=True):
        found.append({" ".join(one.names): one.ids.tolist() for one in recording.ids(row)})
    return found


class TestWhichHold:
    def test_those_around_and_before_them_those_at_the_tap(self, record):
        def job(rank):
            tap("a", t(2), dims="t h")
            with rows(t=[0, 1], n=[5, 6, 7]):
                tap("b", t(2), dims="t h")
                tap("c", t(2), dims="t h", rows={"t": [2, 3]})
                tap("d", torch.ones(2, 3), dims="t n", rows={"t": [2, 3]})
                with rows(t=[4, 5]):
                    tap("e", torch.ones(2, 3), dims="t n")
                tap("f", t(2), dims="t h")
            tap("g", t(2), dims="t h")

        assert ids_of(record(job)) == [
            {},
            {"t": [0, 1]},
            {"t": [2, 3]},
            {"n": [5, 6, 7], "t": [2, 3]},
            {"n": [5, 6, 7], "t": [4, 5]},
            {"t": [0, 1]},
            {},
        ]

    def test_of_dims_that_have_their_ids_together_all_give_way(self, record):
        def job(rank):
            with rows({"b s": [[0, 1], [2, 3]]}):
                tap("x", torch.ones(2, 2, 1), dims="b s h")
                with rows(s=[8, 9]):
                    tap("x", torch.ones(2, 2, 1), dims="b s h")

        assert ids_of(record(job)) == [{"b s": [[0, 1], [2, 3]]}, {"s": [8, 9]}]

    def test_a_dim_that_a_tap_does_not_have_is_not_meant_for_it(self, record):
        def job(rank):
            with rows({"b s": [[0, 1]], "e": [3]}):
                tap("x", torch.ones(1, 4), dims="b h")
                tap("x", torch.ones(4, 1), dims="h e")
                tap("x", torch.ones(4))

        assert ids_of(record(job)) == [{}, {"e": [3]}, {}]

    def test_fused_dims_and_dims_in_another_order_share_one_record(self, record):
        ids = torch.tensor([[0, 1, 2], [3, 4, 5]])

        def job(rank):
            with rows({"b s": ids}):
                tap("x", torch.ones(2, 3, 1), dims="b s h")
                tap("x", torch.ones(1, 3, 2), dims="h s b")
                tap("x", torch.ones(6, 1), dims="(s*b) h")
            tap("x", torch.ones(6), dims="(b*s)", rows={"(s*b)": ids.T})

        recording = record(job)
        assert ids_of(recording) == [{"b s": ids.tolist()}] * 4
        assert len(recording.rows().filter(kind="rows")) == 1

    def test_a_decorator_gives_them_to_functions_coroutines_and_generators(self, record):
        @rows(t=[1, 2])
        def function():
            tap("function", t(2), dims="t h")

        @rows(t=[3, 4])
        async def coroutine():
            await asyncio.sleep(0)
            tap("coroutine", t(2), dims="t h")

        @rows(t=[5, 6])
        def generator():
            tap("generator", t(2), dims="t h")
            yield
            tap("generator", t(2), dims="t h")

        def job(rank):
            function()
            asyncio.run(coroutine())
            for _ in generator():
                tap("between", t(2), dims="t h")

        recording = record(job)
        names = recording.rows().filter(kind="tensor")["name"].to_list()
        assert names == ["function", "coroutine", "generator", "between", "generator"]
        expected = [{"t": [1, 2]}, {"t": [3, 4]}, {"t": [5, 6]}, {}, {"t": [5, 6]}]
        assert ids_of(recording) == expected

    def test_a_decorator_reads_its_ids_anew_at_each_call(self, record):
        ids = torch.tensor([0, 1])

        @rows(t=lambda: ids * 2)
        def function():
            tap("x", t(2), dims="t h")

        def job(rank):
            for _ in range(2):
                function()
                ids.add_(10)

        assert ids_of(record(job)) == [{"t": [0, 2]}, {"t": [20, 22]}]

    def test_a_thread_starts_without(self, record):
        def job(rank):
            def other():
                tap("there", t(2), dims="t h")
                with rows(t=[7, 8]):
                    tap("inside", t(2), dims="t h")

            with rows(t=[0, 1]):
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
                tap("here", t(2), dims="t h")

        assert ids_of(record(job)) == [{}, {"t": [7, 8]}, {"t": [0, 1]}]

    def test_threads_that_record_at_once_each_have_their_own(self, record):
        def job(rank):
            def other(number):
                for i in range(30):
                    with rows(t=[number, i]):
                        tap("x", torch.tensor([[float(number)], [float(i)]]), dims="t h", n=number)

            threads = [threading.Thread(target=other, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        recording = record(job)
        for row in recording.rows().filter(kind="tensor").iter_rows(named=True):
            (taken,) = recording.ids(row)
            assert taken.ids.tolist() == recording.read(row).flatten().tolist()

    def test_parts_of_a_tap_have_those_of_its_dims(self, record):
        def job(rank):
            with rows(t=[4, 5]):
                tap("x", torch.ones(2, 4), dims="t {q: h | k: h}")

        recording = record(job)
        assert [*recording.latest()["name"]] == ["q", "k"]
        assert ids_of(recording) == [{"t": [4, 5]}] * 2

    def test_blocks_that_are_left_out_of_order_are_told_of(self, record, capsys):
        def job(rank):
            outer, inner = rows(t=[0, 1]), rows(t=[2, 3])
            outer.__enter__()
            inner.__enter__()
            outer.__exit__(None, None, None)
            tap("x", t(2), dims="t h")

        assert ids_of(record(job)) == [{}]
        err = capsys.readouterr().err
        assert "rows are left at " in err and "taps in between have each other's rows" in err

    def test_names_are_checked_where_the_block_is_made(self):
        with pytest.raises(UsageError, match="rows names no dim; write rows"):
            rows()
        with pytest.raises(UsageError, match="rows names the dim 's' twice; give its ids once"):
            rows({"b s": [[0]]}, s=[0])
        with pytest.raises(
            UsageError, match="rows names the dims '2t'; expected the name of a dim"
        ):
            rows({"2t": [0]})


class TestOfNoTap:
    """Blocks whose dims none of the taps inside has, as where a name is mistyped."""

    def play(self, record, run, capsys, job, **options):
        """Return what a recording, and a replay onto the same job, say of blocks."""
        record(job, **options)
        said = [capsys.readouterr().err.splitlines()]
        with Replayer(run, **options):
            job(0)
        said.append(capsys.readouterr().err.splitlines())
        found = [[line for line in lines if "are of no tap" in line] for lines in said]
        assert len(found[0]) == len(found[1])
        return found[0] + found[1]

    def test_a_mistyped_dim_is_told_once_at_the_end(self, record, run, capsys):
        def job(rank):
            for _ in range(3):
                with rows(tt=[0, 1]):
                    tap("x", t(2), dims="t h")
                    tap("y", t(2))

        found = self.play(record, run, capsys, job)
        assert len(found) == 2
        for line in found:
            assert "rows along tt are of no tap: none of those inside has such dims, the f" in line
            assert "first 'x' at " in line
            assert line.endswith(", whose dims are 't h'; name the same dims in both")

    def test_so_is_a_block_around_taps_that_declare_none(self, record, run, capsys):
        @rows({"b s": [[0, 1]], "t": [0, 1]})
        def job(rank):
            tap("x", t(2))

        found = self.play(record, run, capsys, job)
        assert len(found) == 2
        for line in found:
            assert "rows along b s or t are of no tap" in line
            assert line.endswith(", which declares no dims; name the same dims in both")

    def test_an_outer_block_that_no_tap_of_the_inner_has_the_dims_of(self, record, run, capsys):
        def job(rank):
            with rows(tt=[0, 1]), rows(t=[0, 1]):
                tap("x", t(2), dims="t h")

        assert len(self.play(record, run, capsys, job)) == 2

    @pytest.mark.parametrize(
        "case", ["one has it", "fused", "parts", "several", "none", "values", "inner", "unselected"]
    )
    def test_blocks_that_are_meant_for_a_tap_or_have_none_are_not(self, record, run, capsys, case):
        def job(rank):
            if case == "one has it":
                with rows(t=[0, 1]):
                    tap("w", t(2))
                    tap("x", t(2), dims="t h")
            elif case == "fused":
                with rows({"b s": [[0, 1]]}):
                    tap("x", t(2), dims="(s*b)[cp] h")
            elif case == "parts":
                with rows(t=[0, 1]):
                    tap("x", torch.ones(2, 4), dims="t {q: h | k: h}")
            elif case == "several":  # of which a tap has some
                with rows(t=[0, 1], n=[5]):
                    tap("x", t(2), dims="t h")
            elif case == "none":
                with rows(tt=[0, 1]):
                    pass
                tap("x", t(2))
            elif case == "values":
                with rows(tt=[0, 1]):
                    tap("lr", 0.1)
            elif case == "inner":  # of the same dim: the outer's reach nobody, and are of one
                with rows(t=[0, 1]), rows(t=[2, 3]):
                    tap("x", t(2), dims="t h")
            else:
                with rows(t=[0, 1]):
                    tap("w", t(2))
                    tap("x", t(2), dims="t h")
                with rows(tt=[0, 1]):
                    tap("x", t(2), dims="t h")

        options = {"filter": 'name == "w"'} if case == "unselected" else {}
        assert self.play(record, run, capsys, job, **options) == []

    def test_ids_of_a_hook_are_for_whoever_has_the_dims(self, record, capsys):
        def job(rank):
            from_here_on(Ids.given({"n": [0, 1]}))
            tap("x", t(2), dims="t h")
            from_here_on(())

        record(job)
        assert capsys.readouterr().err == ""


class TestSnapshot:
    """Ids are those that held at the tap, whatever the job does to them afterwards."""

    def test_a_tensor_that_is_written_to_between_two_taps(self, record):
        ids = torch.tensor([0, 1])

        def job(rank):
            with rows(t=ids):
                for _ in range(3):
                    tap("x", t(2), dims="t h")
                    ids.add_(2)

        assert ids_of(record(job)) == [{"t": [0, 1]}, {"t": [2, 3]}, {"t": [4, 5]}]

    @pytest.mark.parametrize("kind", ["list", "numpy", "inference", "callable"])
    def test_what_does_not_tell_that_it_is_written_to(self, record, kind):
        def job(rank):
            with torch.inference_mode(kind == "inference"):
                ids = torch.tensor([0, 1])
                given = {"list": [0, 1], "numpy": np.array([0, 1]), "callable": lambda: ids}
                given = given.get(kind, ids)
                with rows(t=given):
                    tap("x", t(2), dims="t h")
                    if kind in ("list", "numpy"):
                        given[:] = [2, 3]
                    else:
                        ids.add_(2)
                    tap("x", t(2), dims="t h")

        assert ids_of(record(job)) == [{"t": [0, 1]}, {"t": [2, 3]}]

    @pytest.mark.parametrize("kind", ["data", "numpy"])
    def test_a_write_that_torch_does_not_count_is_seen_by_the_next_block(self, record, kind):
        """As recorder/README.md says."""
        ids = torch.tensor([0, 1])

        def job(rank):
            block = rows(t=ids)
            with block:
                tap("x", t(2), dims="t h")
                if kind == "data":
                    ids.data.add_(2)
                else:
                    np.add(ids.numpy(), 2, out=ids.numpy())
                tap("x", t(2), dims="t h")
            with block:
                tap("x", t(2), dims="t h")

        assert ids_of(record(job)) == [{"t": [0, 1]}, {"t": [0, 1]}, {"t": [2, 3]}]

    def test_a_gradient_has_those_of_its_forward(self, record):
        ids = torch.tensor([0, 1])

        def job(rank):
            x = t(2).requires_grad_()
            with rows(t=ids):
                y = tap("x", x * 2, dims="t h", grad=True)
            ids.fill_(9)
            y.sum().backward()

        assert ids_of(record(job), kind="grad") == [{"t": [0, 1]}]

    @pytest.mark.parametrize("kind", [frames, reentrant])
    def test_a_forward_that_is_repeated_has_those_of_its_first(self, record, kind):
        ids = torch.tensor([0, 1])

        def layer(x):
            return tap("x", x * 2, dims="t h").sigmoid() * 3

        def job(rank):
            outs = []
            for i in range(2):
                ids.copy_(torch.tensor([2 * i, 2 * i + 1]))
                with rows(t=ids):
                    outs.append(kind(layer, t(2).requires_grad_()).sum())
            ids.fill_(9)
            for out in outs[::-1]:
                out.backward()

        recording = record(job)
        taps = recording.rows().filter(kind="tensor")
        seconds = taps.filter(taps["tags"].str.contains("recompute"))
        for part in (taps, seconds):
            for row in part.iter_rows(named=True):
                (taken,) = recording.ids(row)
                assert taken.ids[0] == 2 * row["occurrence"]
        assert len(seconds) == (2 if kind is reentrant else len(seconds))

    @pytest.mark.parametrize("filter", ["recompute == True", "recompute == True and step == 0"])
    @pytest.mark.parametrize("kind", [frames, reentrant])
    def test_a_repeated_forward_has_them_where_a_filter_wants_it_alone(
        self, record, run, kind, filter
    ):
        """Once the block is left, and though its first was not wanted."""

        def layer(x):
            return tap("x", x * 2, dims="t h").sigmoid() * 3

        def job(rank):
            outs = []
            for i in range(2):
                with rows(t=[2 * i, 2 * i + 1]):
                    outs.append(kind(layer, t(2).requires_grad_()).sum())
            for out in outs[::-1]:
                out.backward()

        recording = record(job, filter=filter)
        assert ids_of(recording) == [{"t": [2, 3]}, {"t": [0, 1]}]
        with Replayer(run, filter=filter) as session:
            job(0)
        assert session.log()["rows_found"].to_list() == [2, 2]


class TestCallables:
    def test_are_called_once_for_all_taps_of_their_block(self, record):
        calls = []

        def ids():
            calls.append(1)
            return [0, 1]

        def job(rank):
            with rows(t=ids):
                for i in range(5):
                    tap("x", t(2), dims="t h", layer=i)

        assert ids_of(record(job)) == [{"t": [0, 1]}] * 5 and len(calls) == 1

    def test_are_not_called_where_no_tap_wants_to_know(self, record):
        def ids():
            raise AssertionError("nobody asked")

        with rows(t=ids):
            tap("x", t(2), dims="t h")  # nothing is active

        def job(rank):
            with rows(t=ids):
                tap("x", t(2), dims="t h")  # not selected
            tap("y", t(2), dims="t h")

        assert ids_of(record(job, filter='name == "y"')) == [{}]

    def test_that_raise_cost_a_tap_its_rows_and_nothing_else(self, record, capsys):
        def ids():
            raise ValueError("no batch yet")

        def job(rank):
            with rows(t=ids):
                tap("x", t(2), dims="t h")

        recording = record(job)
        assert torch.equal(recording.load(0, "x"), t(2)) and ids_of(recording) == [{}]
        said = "the callable of the ids of rows along t raised ValueError: no batch yet"
        assert f"is recorded without its rows: {said}" in capsys.readouterr().err
        with Replayer(recording.path) as session:
            job(0)
        assert said not in session.log()["message"][0]  # the baseline has no rows to go by


class TestRefused:
    @pytest.mark.parametrize(
        ("ids", "said"),
        [
            ([0, 1, 2], "its rows along t have 3 ids, and the tensor 2 places there"),
            ([0.0, 1.0], "are torch.float32, expected integers; recorder.token_rows makes them"),
            (
                torch.ones(2, 1, 1, dtype=torch.int64),
                "have the shape [2, 1, 1]; give one dim for each name",
            ),
            (torch.ones(2, 65, dtype=torch.int64), "are of 65 numbers each; give 1 to 64"),
            ("ab", "cannot be read"),
            (None, "cannot be read"),
        ],
    )
    def test_ids_that_do_not_fit_are_told_and_the_tensor_is_recorded_without(
        self, record, capsys, ids, said
    ):
        recording = record(lambda rank: tap("x", t(2), dims="t h", rows={"t": ids}))
        row = recording.rows().row(0, named=True)
        assert row["rows"] is None and torch.equal(recording.read(row), t(2))
        err = capsys.readouterr().err
        assert "is recorded without its rows: " in err and said in err and err.count("\n") == 1

    def test_dims_that_the_tap_does_not_have_are_told_where_it_was_given_them(self, record, capsys):
        def job(rank):
            tap("x", t(2), dims="t h", rows={"n": [0, 1]})
            tap("y", t(2), rows={"t": [0, 1]})

        assert ids_of(record(job)) == [{}, {}]
        err = capsys.readouterr().err
        assert "it was given rows along n, and its dims are 't h'; name the dims" in err
        assert "it was given rows along t, and it declares no dims" in err

    def test_what_names_no_dim_costs_the_tap(self, record, capsys):
        recording = record(lambda rank: tap("x", t(2), dims="t h", rows={"t t": [0, 1]}))
        assert recording.rows().is_empty()
        assert "rows names the dim 't' twice; give its ids once" in capsys.readouterr().err


class TestRecord:
    def job(self, rank):
        ids = torch.tensor([5, 6, -1, 7])
        for number in range(3):
            with rows(t=ids + 10 * (number == 2)):
                for layer in range(4):
                    tap("x", t(4, 2), dims="t h", layer=layer)
                    tap("y", t(4, 2).T, dims="h t", layer=layer)
            step()

    def test_ids_are_kept_once_for_all_that_share_them(self, record):
        recording = record(self.job)
        frame = recording.rows()
        held = frame.filter(kind="rows")
        assert (
            held["digest"].to_list()
            == frame["rows"].drop_nulls().unique(maintain_order=True).to_list()
        )
        assert len(held) == 2 and set(held["dims"]) == {"t"} and held["rows"].null_count() == 2
        assert frame.filter(kind="tensor")["rows"].null_count() == 0
        assert torch.equal(
            recording.read(held.row(0, named=True)).flatten()[:4], torch.tensor([5, 6, -1, 7])
        )

    def test_the_column_is_read_without_this_package(self, record, run):
        record(self.job)
        frame = pl.scan_parquet(run / "rank-*" / "*.parquet").collect()
        assert frame.schema["rows"] == pl.String and frame["rows"].n_unique() == 3
        assert json.loads((run / "recording.json").read_text())["format_version"] == 1.1

    def test_they_are_no_taps(self, record):
        recording = record(self.job)
        assert set(recording.latest()["kind"]) == {"tensor"}
        assert len(recording.latest()) == 24
        assert "rows" in recording.manifest().columns

    def test_several_groups_are_one_record(self, record):
        def job(rank):
            given = {"t": [[1, 2], [3, 4], [-1, 0]], "e": [0, 1], "b s": [[5], [6]]}
            tap("x", torch.ones(3, 2), dims="t e", rows={n: given[n] for n in ("t", "e")})
            with rows(given):
                tap("y", torch.ones(2, 3, 2, 1), dims="b t e s")

        recording = record(job)
        assert ids_of(recording) == [
            {"e": [0, 1], "t": [[1, 2], [3, 4], [-1, 0]]},
            {"b s": [[5], [6]], "e": [0, 1], "t": [[1, 2], [3, 4], [-1, 0]]},
        ]
        assert len(recording.rows().filter(kind="rows")) == 2

    def test_the_same_numbers_along_other_dims_are_another(self, record):
        def job(rank):
            tap("a", torch.ones(4, 1), dims="t h", rows={"t": [0, 1, 2, 3]})
            tap("b", torch.ones(4, 1), dims="e h", rows={"e": [0, 1, 2, 3]})
            tap("c", torch.ones(2, 1), dims="t h", rows={"t": [[0, 1], [2, 3]]})
            tap("d", torch.ones(2, 2), dims="b s", rows={"b s": [[0, 1], [2, 3]]})
            tap("e", torch.ones(4, 4), dims="t e", rows={"e": [0, 1, 2, 3]})

        recording = record(job)
        four, two = [0, 1, 2, 3], [[0, 1], [2, 3]]
        assert ids_of(recording) == [
            {"t": four},
            {"e": four},
            {"t": two},
            {"b s": two},
            {"e": four},
        ]

    def test_each_rank_reads_its_own(self, record):
        def job(rank):
            name = "te"[rank]
            tap("x", torch.ones(3, 3), dims="t e", rows={name: [0, 1, 2]})

        assert ids_of(record(job, 2)) == [{"t": [0, 1, 2]}, {"e": [0, 1, 2]}]

    def test_what_tokens_they_are_is_kept_beside_them(self, record):
        def job(rank):
            ids = token_rows([[4, 5, 6], [7, 8, 0]], attention_mask=[[1, 1, 1], [1, 1, 0]])
            with rows({"b s": ids}):
                tap("x", torch.ones(2, 3, 1), dims="b s h")
                tap("y", torch.ones(3, 2, 1), dims="s b h")

        recording = record(job)
        assert len(recording.rows().filter(kind="tokens")) == 1
        row = recording.rows().row(0, named=True)
        known = recording.known(row, ("b", "s"))
        assert known.tolist() == [[0, 4], [1, 5], [2, 6], [0, 7], [1, 8], [-1, -1]]

    @pytest.mark.parametrize("level", ["stats", "digests"])
    def test_at_other_levels_the_digests_tell_that_ids_are_the_same(self, run, level):
        with Recorder(run, level=level):
            self.job(0)
        frame = Recording.open(run).rows()
        assert set(frame.filter(kind="rows")["digest"]) == set(frame["rows"].drop_nulls())
        assert all(not rank.problems for rank in Checker(run).ranks())
        with Replayer(run) as session:
            x = t(4, 2)
            tap("x", x, dims="t h", rows={"t": [5, 6, -1, 7]}, layer=0)
        assert f"was recorded with --level {level}" in session.log()["message"][0]

    def test_a_ring_has_the_ids_of_the_steps_that_it_keeps(self, run):
        with Recorder(run, keep_last=2):
            for number in range(6):
                with rows(t=[1, 2]):
                    tap("x", t(2), dims="t h")
                tap("y", t(2), dims="t h", rows={"t": [number, number + 1]})
                step()
        recording = Recording.open(run)
        kept = sorted({*recording.rows().filter(kind="tensor")["step"]})
        assert kept == [4, 5]
        assert ids_of(recording, name="x") == [{"t": [1, 2]}] * 2
        assert ids_of(recording, name="y") == [{"t": [4, 5]}, {"t": [5, 6]}]

    def test_no_tensor_is_there_without_its_ids_where_taps_are_dropped(
        self, run, monkeypatch, capsys
    ):
        gate, real = threading.Event(), store_module.Store.add

        def add(self, payload, data, **where):
            gate.wait(30)
            real(self, payload, data, **where)

        monkeypatch.setattr(store_module.Store, "add", add)
        with Recorder(run, staging=4 * MIB, when_full="drop"):
            for i in range(16):
                with rows(t=torch.arange(MIB // 16) + i):
                    tap("x", torch.full((MIB // 16, 4), float(i)), dims="t h", i=i)
            gate.set()
        recording = Recording.open(run)
        taps = recording.rows().filter(kind="tensor")
        assert 0 < len(taps) < 16 and taps["rows"].null_count() == 0
        for row in taps.iter_rows(named=True):
            (taken,) = recording.ids(row)
            assert taken.ids[0] == json.loads(row["tags"])["i"]


class TestCommands:
    @pytest.fixture
    def recorded(self, run):
        with Recorder(run):
            for number in range(2):
                with rows(t=token_rows([4, 5, 6])):
                    tap("x", t(3, 2), dims="t h")
                tap(
                    "w",
                    torch.ones(2, 2),
                    dims="n e",
                    rows={"n": [[1, number], [3, 4]], "e": [0, 1]},
                )
                step()
        return run

    def test_all_commands_count_what_was_tapped(self, recorded, tmp_path):
        done = graft("verify", recorded, "--repair", tmp_path / "whole")
        assert done.exit_code == 0 and "whole" in done.stdout
        assert done.stdout.count("4 records and 4 of ids of rows, ") == 2
        assert f"{tmp_path / 'whole'}: 4 records written" in done.stdout
        checked = json.loads(graft("verify", recorded, "--json").stdout)["ranks"]
        assert [(one["records"], one["ids"]) for one in checked] == [(4, 4)]
        nbytes = 2 * (3 * 2 + 2 * 2) * 4
        listed = graft("ls", recorded).stdout.splitlines()[0]
        assert listed.endswith(f"1 rank, 4 records and 4 of ids of rows, {nbytes} B tapped")
        some = graft("ls", recorded, "--filter", 'name == "x"').stdout.splitlines()[0]
        assert ", 2 records, 48 B tapped" in some
        compared = graft("diff", recorded, recorded).stdout.splitlines()[:2]
        assert all(line.endswith("1 rank, 4 records") for line in compared)

    def test_what_record_says_is_what_was_tapped_too(self, shell):
        job = shell.write(
            "job.py",
            """
            import torch
            from recorder import rows, step, tap, token_rows

            for _ in range(2):
                with rows(t=token_rows([4, 5, 6])):
                    tap("x", torch.ones(3, 2), dims="t h")
                step()
            """,
        )
        done = shell(shell.graft, "record", "-o", "run", "--", shell.python, job)
        assert done.returncode == 0 and "run: 2 records from 1 rank, " in done.stderr

    def test_ls_and_show_name_their_kind(self, recorded):
        listed = json.loads(graft("ls", recorded, "--json").stdout)
        kinds = {(one["name"], one["kind"]): one["records"] for one in listed}
        assert kinds["rows", "rows"] == 3 and kinds["rows", "tokens"] == 1
        shown = graft("show", recorded)
        assert shown.exit_code == 0 and "rows (rows)" in shown.stdout
        assert "rows (tokens)" in shown.stdout

    def test_what_repair_keeps_has_its_rows(self, recorded, tmp_path):
        done = graft("verify", recorded, "--repair", tmp_path / "whole")
        assert done.exit_code == 0, done.stderr
        before, after = Recording.open(recorded), Recording.open(tmp_path / "whole")
        assert ids_of(before) == ids_of(after)
        row = after.rows().row(0, named=True)
        assert after.known(row, ("t",)).tolist() == [[0, 4], [1, 5], [2, 6]]

    def test_damaged_ids_are_named_and_cost_the_taps_that_have_them(self, recorded, tmp_path):
        """The others are grafted; what repair keeps has none of them."""
        recording = Recording.open(recorded)
        row = recording.rows().filter(kind="rows").row(0, named=True)
        path, place = recording.place_of(row)
        data = bytearray(path.read_bytes())
        data[place.offset + 1] ^= 255
        path.write_bytes(data)
        checked = graft("verify", recorded)
        assert checked.exit_code == 1 and "rows" in checked.stdout + checked.stderr
        damaged = Recording.open(recorded)
        with pytest.raises(DamagedRecording, match="do not have the digest that was recorded"):
            damaged.ids(damaged.rows().filter(name="x").row(0, named=True))
        x, w = torch.full((3, 2), -9.0), torch.full((2, 2), -9.0)
        with Replayer(recorded) as session:
            tap("x", x, dims="t h", rows={"t": token_rows([4, 5, 6])})
            tap("w", w, dims="n e", rows={"n": [[3, 4], [1, 0]], "e": [0, 1]})
        assert session.log()["outcome"].to_list() == ["error", "grafted"]
        assert "do not have the digest that was recorded" in session.log()["message"][0]
        assert bool((x == -9).all()) and bool((w == 1).all())

    def test_records_whose_ids_are_damaged_are_left_out_and_the_others_taken(self, run, capsys):
        with Recorder(run):
            for ids in ([0, 1], [2, 3], [1, 4]):
                tap("x", torch.tensor(ids)[:, None].float(), dims="t h", rows={"t": ids})
        recording = Recording.open(run)
        row = recording.rows().filter(kind="rows").row(0, named=True)
        path, place = recording.place_of(row)
        data = bytearray(path.read_bytes())
        data[place.offset + 1] ^= 255
        path.write_bytes(data)

        def target():
            for x, ids in zip(xs, ([0, 1, 2, 3], [4, 3], [0]), strict=True):
                tap("x", x, dims="t h", rows={"t": ids})

        xs = [torch.full((n, 1), -9.0) for n in (4, 2, 1)]
        with Replayer(run) as session:
            target()
        assert [x.flatten().tolist() for x in xs] == [[-9, 1, 2, 3], [4, 3], [-9]]
        log, said = session.log(), "1 record left out, whose ids are damaged"
        assert log["outcome"].to_list() == ["grafted", "grafted", "error"]
        assert log["rows_missing"].to_list() == [1, 0, None]
        assert log["message"].to_list()[:2] == [f"1 row not found; {said}", said]
        assert "do not have the digest that was recorded" in log["message"][2]
        err = capsys.readouterr().err
        assert err.count(f"tap x: {said}: ") == 1 and str(path) in err
        assert any(
            one.startswith(
                "--strict: rows of 2 taps may have been in records that are damaged, the first: x "
            )
            for one in session.problems(True)
        )
        received = []
        with Replayer(run, transform=lambda g: received.append(g.received_list[0]) or g.target):
            target()
        assert [one.flatten().tolist() for one in received] == [[0, 1, 2, 3], [4, 3]]

    def test_diff_of_a_recording_with_itself_is_equal(self, recorded):
        done = graft("diff", recorded, recorded)
        assert done.exit_code == 0 and "2 equal bit for bit" in done.stdout

    def test_ids_that_are_not_there_are_missed_by_name(self, recorded):
        recording = Recording.open(recorded)
        frame = recording.rows()
        recording._rows = frame.filter(frame["kind"] != "rows")
        row = recording.rows().filter(name="x").row(0, named=True)
        with pytest.raises(DamagedRecording, match="the ids of the rows of x step=0 are not there"):
            recording.ids(row)


class TestVersions:
    def test_a_recording_of_the_first_version_has_no_rows_and_replays_as_before(self):
        old = Path(__file__).parent.parent / "data" / "recording-v1"
        recording = Recording.open(old)
        frame = recording.rows()
        assert frame["rows"].null_count() == len(frame) and "rows" in recording.manifest().columns
        assert recording.ids(frame.row(0, named=True)) == ()
        x = torch.zeros(2, 3, dtype=torch.bfloat16)
        with Replayer(old, rank=0, world_size=2) as session, rows(b=[0, 1]):
            tap("attn_q", x, dims="b h[tp]", layer=0)
        row = session.log().row(0, named=True)
        assert (row["outcome"], row["rows_found"], row["rows_missing"]) == ("grafted", None, None)
        assert bool((x == recording.load(0, "attn_q", layer=0)).all())

    def test_another_version_is_refused_by_name(self, record, run):
        record(lambda rank: tap("x", t(2), dims="t h", rows={"t": [0, 1]}))
        about = run / "recording.json"
        about.write_text(
            about.read_text().replace('"format_version": 1.1', '"format_version": 1.2')
        )
        with pytest.raises(UnsupportedVersion, match="1.2"):
            Recording.open(run)
