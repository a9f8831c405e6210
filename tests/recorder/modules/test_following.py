"""Rows that a function of the job's own tells apart, and what of its calls it is given."""

from __future__ import annotations

import threading

import pytest
import torch
from following import followed, recording
from torch import nn

from recorder import Recorder, Recording, attach, follow_rows, tap
from recorder.errors import UsageError
from recorder.modules import watch
from recorder.taps.around import rows_around
from replayer import Replayer


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.second(tap("h", self.first(x), dims="t h"))


class Outer(nn.Module):
    """What a server holds: its model is called with more than tensors."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x, *, batch=None):
        return self.inner(x)


calls = []


def of_batch(module, args, kwargs):
    """Rows as this job has them."""
    calls.append((type(module).__name__, len(args), sorted(kwargs)))
    batch = kwargs.get("batch")
    return None if batch is None else {"t": batch}


def raises(module, args, kwargs):
    raise KeyError("batch")


def wrong(module, args, kwargs):
    return {"t t": [1, 2]}


NOT_ONE = 3


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def path_of(name):
    return f"{__name__}.{name}"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this())


def _this():
    import types

    found = types.ModuleType(__name__)
    vars(found).update(globals())
    return found


X = torch.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize("how", ["path", "function"])
def test_a_function_is_asked_once_a_call_of_the_root(tmp_path, how):
    model = Outer()
    with Recorder(tmp_path / "r", rows=path_of("of_batch") if how == "path" else of_batch):
        model(X, batch=[7, 8, 9])
        model(X, batch=torch.tensor([1, 2, 3]))
        model(X)
    run = Recording.open(tmp_path / "r")
    found = [r for r in run.rows().iter_rows(named=True) if r["kind"] == "tensor"]
    assert [bool(r["rows"]) for r in found] == [True, True, False]
    assert [run.ids(r)[0].ids.tolist() for r in found[:2]] == [[7, 8, 9], [1, 2, 3]]
    assert calls == [("Outer", 1, ["batch"])] * 2 + [("Outer", 1, [])]
    assert run.meta["options"]["rows"].endswith("of_batch")


def test_what_a_function_says_holds_until_the_next_call(tmp_path):
    model = Outer()
    with recording(tmp_path), follow_rows(model, of_batch):
        model(X, batch=[7, 8, 9])
        assert [one.of for one in rows_around()] == [[7, 8, 9]]
        model(X)
        assert rows_around() == ()
        model(X, batch=[1, 2, 3])
        found = []
        other = threading.Thread(target=lambda: found.append(rows_around()))
        other.start()
        other.join()
        assert found == [()]
    with recording(tmp_path):
        assert rows_around() == ()  # nobody follows it any more


def test_rows_of_a_function_are_replayed(tmp_path):
    torch.manual_seed(0)
    model = Outer()
    with Recorder(tmp_path / "r", rows=of_batch):
        model(X, batch=[7, 8, 9])
    with Replayer(tmp_path / "r", rows=of_batch) as replay:
        model(X[[2, 0]], batch=[9, 7])
    row = replay.log().row(0, named=True)
    assert (row["outcome"], row["rows_found"], row["rows_missing"]) == ("grafted", 2, 0)
    assert row["rel_diff"] < 1e-12


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raises, "its function raised KeyError: 'batch'"),
        (wrong, "its function raised UsageError: rows names the dim 't' twice"),
    ],
)
def test_a_function_that_fails_is_said_once_and_gives_no_rows(tmp_path, capsys, function, said):
    model = Outer()
    with Recorder(tmp_path / "r", rows=function):
        for _ in range(3):
            model(X)
    assert capsys.readouterr().err.count(said) == 1
    frame = Recording.open(tmp_path / "r").rows()
    assert frame["rows"].to_list() == [None] * 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module.fn", "rows 'no_such_module.fn' cannot be imported: ModuleNotFoundError"),
        (path_of("of_btch"), "has no 'of_btch'; it has of_batch"),
        (path_of("NOT_ONE"), r"is no function of \(module, args, kwargs\)"),
    ],
)
def test_a_function_that_is_not_there_is_an_error(tmp_path, name, said):
    model = Outer()
    for begin in (
        lambda: Recorder(tmp_path / "r", rows=name).__enter__(),
        lambda: follow_rows(model, name),
        lambda: attach(model, modules=["inner"], rows=name),
    ):
        with pytest.raises(UsageError, match=said):
            begin()
    assert not watch._watch.requests and not model._forward_pre_hooks


def test_a_model_that_something_holds_that_is_never_called(tmp_path):
    holder = nn.Module()
    holder.policy, holder.reference = Outer(), Outer()
    with Recorder(tmp_path / "r", rows=of_batch):
        holder.policy(X, batch=[7, 8, 9])
    assert calls == [("Outer", 1, ["batch"])]


def test_a_forward_that_is_called_by_hand_is_a_call(tmp_path):
    model = Outer()
    with Recorder(tmp_path / "r", rows=of_batch):
        for batch in ([7, 8, 9], [1, 2, 3]):
            model.forward(X, batch=batch)
    run = Recording.open(tmp_path / "r")
    found = [r for r in run.rows().iter_rows(named=True) if r["kind"] == "tensor"]
    assert [run.ids(r)[0].ids.tolist() for r in found] == [[7, 8, 9], [1, 2, 3]]


def test_nothing_is_asked_while_nothing_records(tmp_path):
    model = Outer()
    with follow_rows(model, of_batch) as _:
        model(X, batch=[1, 2, 3])
    assert calls == []


def test_attach_takes_rows_too(tmp_path):
    model = Outer()
    table = tmp_path / "t.toml"
    table.write_text('[taps]\n"inner.second" = { tap = "out", dims = "t h" }\n')
    with Recorder(tmp_path / "r"), attach(model, taps=str(table), rows=of_batch):
        model(X, batch=[7, 8, 9])
    run = Recording.open(tmp_path / "r")
    found = {
        r["name"]: run.ids(r)[0].ids.tolist()
        for r in run.rows().iter_rows(named=True)
        if r["rows"] and r["kind"] == "tensor"
    }
    assert found == {"h": [7, 8, 9], "out": [7, 8, 9]}
    assert not model._forward_pre_hooks


def test_no_hook_is_there_where_nobody_asks(tmp_path):
    model = Outer()
    with Recorder(tmp_path / "r"):
        model(X)
        assert not model._forward_pre_hooks and not model._forward_hooks


def test_two_sessions_ask_of_one_call_once(tmp_path):
    model = Outer()
    other = Recorder(tmp_path / "b", rows=of_batch, step_on="root")
    own = followed(tmp_path, model, of_batch, at=model.inner.second)
    with Recorder(tmp_path / "a", rows=of_batch), other, own as seen:
        model(X, batch=[7, 8, 9])
    assert len(calls) == 1 and seen == [{"t": [7, 8, 9]}]
