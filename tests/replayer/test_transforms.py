"""How a transform is found and called."""

from __future__ import annotations

import sys

import pytest
import torch

from recorder.errors import TransformError
from recorder.tags import Key
from replayer.transforms import GraftInput, Transform, identity, load


def g(**changes):
    facts = {
        "tags": {"name": "x"},
        "received_list": [torch.ones(1)],
        "received_extras_list": [{}],
        "target": torch.zeros(1),
        "key": Key("x", "{}", 0, 0),
        "rank": 0,
        "world_size": 1,
        "sender_world_size": 1,
    }
    return GraftInput(**{**facts, **changes})


class Callable:
    def __call__(self, received_list, target):
        return ("two", received_list, target)


@pytest.mark.parametrize(
    ("function", "one"),
    [
        (lambda g: g, True),
        (lambda received_list, target: 1, False),
        (lambda a, b: 1, False),
        (lambda g, scale=2: g, True),
        (lambda received_list, target=None: 1, False),
        (lambda a, b, c=1: 1, False),
        (lambda *args: args, True),
        (lambda g, *, dim=0: g, True),
        (Callable(), False),
    ],
)
def test_one_or_two_arguments_is_decided_from_the_signature(function, one):
    assert Transform(function)._one is one


@pytest.mark.parametrize("function", [lambda: 1, lambda a, b, c: 1, lambda g, *, must: 1, 5])
def test_any_other_signature_is_refused(function):
    with pytest.raises(TransformError, match="takes neither one argument|expected a function"):
        Transform(function)


def test_both_signatures_are_called_as_declared():
    given = g()
    assert Transform(lambda g: g)(given) is given
    assert Transform(Callable())(given) == ("two", given.received_list, given.target)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nodots", "is not a path such as pkg.mod.fn"),
        ("a..b", "is not a path such as pkg.mod.fn"),
        ("no.such.module.fn", "cannot be imported: ModuleNotFoundError"),
        ("replayer.demo.model.normd", "has no 'normd'; it has .*normed"),
        ("replayer.demo.model.LAYERS", "is a int, expected a function"),
    ],
)
def test_a_path_that_does_not_load_says_what_to_check(path, message):
    with pytest.raises(TransformError, match=message):
        load(path)


def test_a_module_of_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_transforms_here.py").write_text("def keep(g):\n    return g.target\n")
    monkeypatch.chdir(tmp_path)
    assert load("my_transforms_here.keep").name == "my_transforms_here.keep"


def test_a_module_may_change_the_path_and_import_its_neighbours_later(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_it.py").write_text("value = 1\n")
    (tmp_path / "changes_the_path.py").write_text(
        "import sys\nsys.path.append('/nowhere')\n"
        "def keep(g):\n    import neighbour_of_it\n    return neighbour_of_it.value\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p not in ("", ".")])
    assert load("changes_the_path.keep")(g()) == 1
    assert "/nowhere" in sys.path


def test_a_module_that_fails_on_import_says_how(tmp_path, monkeypatch):
    (tmp_path / "broken_transforms.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TransformError, match="ZeroDivisionError"):
        load("broken_transforms.keep")


def test_identity_says_exactly_what_failed_and_how_to_name_a_transform():
    one = torch.ones(2)
    assert identity([one, None], 0, 2, one) is one
    with pytest.raises(TransformError, match="there are 4 senders and 2 receivers; name a"):
        identity([one] * 4, 0, 2, one)
    with pytest.raises(TransformError, match=r"the record has \[2\], the target \[3\]; name a tr"):
        identity([one], 0, 1, torch.ones(3))
    with pytest.raises(TransformError, match="sender rank 1, and only rank 0 recorded this key"):
        identity([one, None], 1, 2, one)
