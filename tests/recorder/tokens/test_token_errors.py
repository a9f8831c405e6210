"""What cannot be used is refused in a sentence that says what to give instead."""

from __future__ import annotations

import pytest
import torch

from recorder import TokenBook, token_rows
from recorder.errors import UsageError

TWO = torch.tensor([[1, 2, 3], [4, 5, 6]])


def book():
    """Request a has three tokens and a salt, request b one."""
    found = TokenBook()
    found.begin("a", tokens=[1, 2, 3], salt="x")
    found.begin("b", tokens=[1])
    return found


def step(requests, **more):
    return {"requests": requests, "state": book(), **more}


BATCHES = [
    (torch.ones(3), {}, "input_ids holds float32; give integers"),
    ([1.0, 2.0], {}, "input_ids holds float32; give integers"),
    (torch.ones(3, dtype=torch.bool), {}, "input_ids holds bool; give integers"),
    ("abc", {}, "input_ids is of type str; give a tensor or a list of integers"),
    (None, {}, "input_ids is of type NoneType; give a tensor"),
    ([[1, 2], [3]], {}, "input_ids is no tensor and no list of integers of one length each"),
    ([2**63], {}, "input_ids is no tensor and no list of integers"),
    (5, {}, "input_ids has shape []; give [tokens] or [batch, sequence]"),
    (TWO[None], {}, "input_ids has shape [1, 2, 3]; give [tokens] or [batch, sequence]"),
    (TWO.to_sparse(), {}, "input_ids is sparse or nested; give a plain tensor"),
    (TWO.to("meta"), {}, "input_ids is on the meta device and holds nothing"),
    (TWO, {"attention_mask": torch.ones(2, 3)}, "attention_mask holds float32; give integers or b"),
    (
        TWO,
        {"attention_mask": [1, 1, 1]},
        "attention_mask has shape [3] and input_ids [2, 3]; give both of the same tokens",
    ),
    (TWO, {"attention_mask": [[1, 1, 2]] * 2}, "attention_mask holds numbers other than 0 and 1"),
    (TWO, {"attention_mask": [[0, -1, 0]] * 2}, "attention_mask holds numbers other than 0 and 1"),
    (TWO[0], {"attention_mask": [1, 1, 1], "cu_seqlens": [0, 3]}, "of a padded and of a packed"),
    (TWO[0], {"position_ids": [0, 1, 2], "cu_seqlens": [0, 3]}, "both say where sequences begin"),
    (TWO, {"cu_seqlens": [0, 3, 6]}, "input_ids has shape [2, 3] and cu_seqlens is for packed"),
    (TWO[0], {"cu_seqlens": []}, "cu_seqlens has shape [0]; give one list of where each"),
    (TWO[0], {"cu_seqlens": [[0, 3]]}, "cu_seqlens has shape [1, 2]; give one list"),
    (TWO[0], {"cu_seqlens": [1, 3]}, "cu_seqlens begins with 1; let it begin with 0"),
    (TWO[0], {"cu_seqlens": [0, 2, 1, 3]}, "cu_seqlens goes back from 2 to 1; give the running"),
    (TWO[0], {"cu_seqlens": [0, 2, 4]}, "cu_seqlens ends at 4 and there are 3 tokens"),
    (TWO[0], {"cu_seqlens": [0.0, 3.0]}, "cu_seqlens holds float32; give integers"),
    (TWO[0], {"position_ids": [[0, 1, 2]]}, "position_ids has shape [1, 3] and input_ids [3]"),
    (TWO[0], {"position_ids": [1, 2, 3]}, "position_ids is 1 at 0, where a sequence goes on only"),
    (
        TWO[0],
        {"position_ids": [0, 1, 1]},
        "position_ids is 1 at 2, where a sequence goes on only",
    ),
    (TWO[0], {"position_ids": [0, 1, -1]}, "goes on only with 0 or 2; give attention_mask if the"),
    (
        TWO,
        {"position_ids": [[0, 1, 2], [3, 4, 5]]},
        "position_ids is 3 at [1, 0], where a",
    ),
    (
        TWO,
        {"position_ids": [[0, 0, 1], [9, 0, 3]], "attention_mask": [[1, 1, 1], [0, 1, 1]]},
        "position_ids is 3 at [1, 2], where a sequence goes on only with 0 or 1",
    ),
    (TWO, {"salt": [1]}, "salt has 1 entries and there are 2; give one for each row of input_ids"),
    (TWO, {"salt": 1.5}, "a salt is of type float; give integers or strings"),
    (TWO, {"salt": [1, True]}, "a salt is of type bool; give integers or strings"),
    (TWO, {"salt": b"x"}, "a salt is of type bytes; give integers or strings"),
    (TWO, {"salt": torch.ones(2)}, "salt holds float32; give integers"),
    (TWO[0], {"cu_seqlens": [0, 1, 3], "salt": [1]}, "give one for each sequence of cu_seqlens"),
    (TWO[0], {"position_ids": [0, 0, 1], "salt": ["x"]}, "one for each sequence of position_ids"),
]

STEPS = [
    (TWO[0], {"requests": ["a"] * 3}, "a step is missing state; make one TokenBook() and give it"),
    (TWO[0], {"state": TokenBook()}, "a step is missing requests; say which request each token"),
    (TWO[0], {"state": {}}, "a step is missing requests"),
    (TWO[0], {"positions": [0, 1, 2]}, "a step is missing requests"),
    (TWO[0], step("abc"), "requests is of type str; give a list with one id for each token of"),
    (TWO[0], step(3), "requests is of type int; give a list"),
    (
        TWO[0],
        step(["a"]),
        "requests has 1 ids and there are 3; give one for each token",
    ),
    (
        TWO[0],
        step(torch.ones(1, 3).long()),
        "requests has shape [1, 3]; give one id for",
    ),
    (TWO[0], step(torch.ones(3)), "requests holds float32; give integers"),
    (TWO[0], step(["a"], cu_seqlens=[0, 1, 3]), "give one for each sequence of cu_seqlens"),
    (
        TWO[0],
        step(["a", "b", None]),
        "a request's id is of type NoneType; give strings",
    ),
    (TWO[0], step(["a", "b", True]), "a request's id is of type bool; give strings or integers"),
    (TWO[0], step(["a", "b", ["c"]]), "a request's id is of type list; give strings"),
    (
        TWO[0],
        step([*torch.arange(3)]),
        "a request's id is of type Tensor; give strings",
    ),
    (TWO, step(["a"] * 6), "input_ids has shape [2, 3] and requests is for packed ones"),
    (TWO[0], step(["a"] * 3, position_ids=[3, 4, 5]), "in a step of requests give positions"),
    (TWO[0], step(["a"] * 3, positions=[3, 4]), "positions has shape [2] and input_ids [3]"),
    (TWO[0], step(["a"] * 3, positions=[3, -2, 4]), "positions holds -2; give -1 at padding"),
    (
        TWO[0],
        step(["a"] * 3, positions=[4, 5, 6]),
        "request 'a' has 3 tokens so far and goes on at position 4: what is before that was never "
        "seen; feed the cached prefix first, as in book.begin(request, tokens=prefix)",
    ),
    (TWO[0], step(["c"] * 3, positions=[2, 3, 4]), "request 'c' is new and goes on at position 2:"),
    (
        TWO[0],
        step(["a"] * 3, positions=[3, 5, 4]),
        "request 'a' has a token at position 5 where 4 comes next; give the tokens of a request in",
    ),
    (
        TWO[0],
        step(["a"] * 3, salt="y"),
        "request 'a' began with another salt; give that one",
    ),
    (TWO[0, :1], step(["a"], salt="y"), "request 'a' began with another salt"),
    (TWO[0], step(["c"] * 3, salt=["x", "x", 1]), "request 'c' has two salts in one step"),
    (
        TWO[0],
        step(["a"] * 3, salt=["x"]),
        "salt has 1 entries and there are 3; give one for",
    ),
    (TWO[0, :1], step(["a"], salt=["x", "x"]), "salt has 2 entries and there are 1"),
    (
        TWO[0],
        {"requests": ["a"] * 3, "state": []},
        "state is of type list; give a TokenBook or",
    ),
    (
        TWO[0],
        {"requests": ["a"] * 3, "state": {"a": (1, 5)}, "positions": [4, 5, 6]},
        "request 'a' goes back from position 5 to 4, and a dict has no sums of earlier positions; "
        "use a TokenBook as state",
    ),
    (
        TWO[0],
        {"requests": ["a"] * 3, "state": {"a": (1, 5)}, "positions": [6, 7, 8]},
        "request 'a' has 5 tokens so far and goes on at position 6",
    ),
    (
        TWO[0],
        {"requests": ["a"] * 3, "state": {"a": 7}},
        "state has 7 for request 'a'; give a dict that only token_rows fills, empty at first",
    ),
]


@pytest.mark.parametrize(("tokens", "more", "message"), [*BATCHES, *STEPS])
def test_the_message(tokens, more, message):
    with pytest.raises(UsageError) as caught:
        token_rows(tokens, **more)
    assert message in str(caught.value)
    assert str(caught.value).count(";") == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenBook().begin(None), "a request's id is of type NoneType; give strings or"),
        (
            lambda: TokenBook().begin("a", tokens=[[1]]),
            "tokens has shape [1, 1]; give those",
        ),
        (lambda: TokenBook().begin("a", tokens=[1.0]), "tokens holds float32; give integers"),
        (lambda: TokenBook().begin("a", salt=1.0), "a salt is of type float; give integers or str"),
    ],
)
def test_the_message_of_a_book(call, message):
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value)


def test_a_nested_tensor_and_a_subclass_are_refused():
    parts = [torch.arange(3), torch.arange(2)]
    with pytest.raises(UsageError, match="input_ids is a NestedTensor; give a plain tensor"):
        token_rows(torch.nested.nested_tensor(parts, layout=torch.jagged))

    class Special(torch.Tensor):
        pass

    with pytest.raises(UsageError, match="input_ids is a Special; give a plain tensor"):
        token_rows(TWO.as_subclass(Special))
