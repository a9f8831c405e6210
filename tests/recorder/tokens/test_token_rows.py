"""Ids of whole batches: equal for equal prefixes, however they are padded or packed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import token_oracle as oracle
import torch

from recorder import TokenBook, token_rows
from recorder.tokens import hashing
from recorder.tokens.known import known_of

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]


GOLDEN = {
    None: [1234695956061461586, 3085707578154778301, 6612347473635482088],
    0: [7187310090982815242, 505869808956947990, 5074961009312254099],
    -3: [1778737474312950538, 5286187163856961905, 8460487612231839999],
    "adapter-7": [5387503235070881242, 1745403231658780920, 6474110413948028150],
}


def sequences(rng, most=12):
    """Random sequences of few tokens, so that prefixes are shared, and of any int64."""
    vocabulary = rng.choice([range(2), range(50_000), [-(2**63), -1, 0, 2**63 - 1]])
    counts = [rng.choice([0, 1, 2, rng.randrange(most)]) for _ in range(rng.randrange(1, 7))]
    return [[rng.choice(vocabulary) for _ in range(n)] for n in counts]


def salts(rng, many):
    """A salt as it is given, and that of each sequence."""
    one = [rng.choice([None, 0, 7, -1, 2**70, "", "lora", "ü"]) for _ in range(many)]
    if rng.random() < 0.3:
        one = [one[0]] * many if many else [None]
        return one[0], one[:many]
    return one, one


def packed(lists):
    return [token for one in lists for token in one]


def bounds(lists):
    found = [0]
    for one in lists:
        found.append(found[-1] + len(one))
    return found


def rows_of(rng, lists):
    """The sequences as rows, with padding anywhere, and its mask."""
    width = max(map(len, lists)) + rng.randrange(4)
    rows, masks = [], []
    for one in lists:
        side = rng.choice(["left", "right", "holes"])
        spare = width - len(one)
        at = {"left": range(spare, width), "right": range(len(one))}.get(side)
        at = sorted(rng.sample(range(width), len(one))) if at is None else at
        row, mask = [rng.randrange(9) for _ in range(width)], [0] * width
        for i, token in zip(at, one, strict=True):
            row[i], mask[i] = token, 1
        rows.append(row)
        masks.append(mask)
    return rows, masks


def test_golden_values():
    """These never change: recordings hold them."""
    for salt, expected in GOLDEN.items():
        assert token_rows([15496, 11, 995], salt=salt).tolist() == expected
        assert oracle.ids([15496, 11, 995], salt) == expected
    assert token_rows([0]).tolist() == [2598789274482403935]


def test_the_readme_s_example_is_the_golden_one():
    text = Path(hashing.__file__).with_name("README.md").read_text()
    assert all(str(one) in text for salt in (None, 0, "adapter-7") for one in GOLDEN[salt])
    total = 0
    for i, token in enumerate([15496, 11, 995]):
        term = oracle.mix((token + (i + 1) * 0x9E3779B97F4A7C15) % 2**64)
        total = (total + term) % 2**64
        assert f"| {i} | {token} | {term:#x} | {total:#x} | {GOLDEN[None][i]} |" in text


def test_the_oracle_mixes_as_splitmix64():
    """The first outputs of splitmix64 from 0, as its reference implementation prints them."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [oracle.mix(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(1, 5)] == known
    assert oracle.ids([0, 0])[1] == oracle.mix((known[0] + known[1]) % 2**64) >> 1


@pytest.mark.parametrize("seed", range(8))
def test_padded_and_packed_batches_have_the_ids_of_the_definition(seed):
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(60):
        lists = sequences(rng)
        salt, each = salts(rng, len(lists))
        expected = [oracle.ids(one, s) for one, s in zip(lists, each, strict=True)]

        rows, masks = rows_of(rng, lists)
        mask = torch.tensor(masks, dtype=rng.choice([torch.bool, *INTEGERS]))
        tokens = torch.tensor(rows, dtype=torch.int64)
        found = token_rows(tokens, attention_mask=mask, salt=salt)
        assert found.dtype == torch.int64 and found.shape == tokens.shape
        real = torch.tensor(masks, dtype=torch.bool)
        assert found[real].tolist() == packed(expected)
        assert (found[~real] == -1).all()
        known = known_of(found)
        assert known.tokens[real].tolist() == packed(lists)
        assert known.positions[real].tolist() == [i for one in lists for i in range(len(one))]
        assert (known.tokens[~real] == -1).all() and (known.positions[~real] == -1).all()

        extra = rng.randrange(3)
        flat = torch.tensor([*packed(lists), *[5] * extra], dtype=torch.int64)
        shape = rng.choice([(-1,), (1, -1)])
        cu = torch.tensor(bounds(lists), dtype=rng.choice([torch.int32, torch.int64]))
        found = token_rows(flat.view(shape), cu_seqlens=cu, salt=salt)
        assert found.view(-1).tolist() == [*packed(expected), *[-1] * extra]
        assert known_of(found).tokens.view(-1).tolist() == [*packed(lists), *[-1] * extra]

        full = [(one, ids, s) for one, ids, s in zip(lists, expected, each, strict=True) if one]
        flat = torch.tensor(packed([one for one, _, _ in full]), dtype=torch.int64)
        pos = torch.tensor([i for one, _, _ in full for i in range(len(one))], dtype=torch.int64)
        salt = [s for _, _, s in full] if isinstance(salt, list) else salt
        found = token_rows(flat.view(shape), position_ids=pos.view(shape), salt=salt)
        assert found.view(-1).tolist() == packed([ids for _, ids, _ in full])
        assert known_of(found).positions.view(-1).tolist() == pos.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_positions_of_rows_with_padding(seed):
    """Each row holds several sequences, and padding between any of their tokens."""
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(60):
        lists = [[one for one in sequences(rng, 5) if one] for _ in range(rng.randrange(1, 4))]
        rows, masks = rows_of(rng, [packed(row) for row in lists])
        mask = torch.tensor(masks, dtype=torch.bool)
        pos = torch.randint(-3, 3, mask.shape)
        inside = [i for row in lists for one in row for i in range(len(one))]
        pos[mask] = torch.tensor(inside, dtype=torch.int64)
        salt, each = salts(rng, sum(map(len, lists)))
        found = token_rows(rows, position_ids=pos, attention_mask=mask, salt=salt)
        every = [one for row in lists for one in row]
        expected = [oracle.ids(one, s) for one, s in zip(every, each, strict=True)]
        assert found[mask].tolist() == packed(expected)
        assert (found[~mask] == -1).all()


@pytest.mark.parametrize("shape", [(40_000,), (3, 20_000), (20_000, 3), (16_384,), (16_385,)])
def test_what_is_mixed_in_pieces(shape):
    tokens = torch.randint(-(2**63), 2**63 - 1, shape)
    found = token_rows(tokens)
    for row, ids in zip(tokens.view(-1, shape[-1]), found.view(-1, shape[-1]), strict=True):
        assert ids[-2:].tolist() == oracle.ids(row.tolist())[-2:]
    assert found.min() >= 0


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.uint32, torch.uint64])
def test_any_dtype_of_integers_and_lists(dtype):
    tokens = [3, 0, 127]
    assert token_rows(torch.tensor(tokens, dtype=dtype)).tolist() == oracle.ids(tokens)
    assert token_rows([tokens, tokens]).tolist() == [oracle.ids(tokens)] * 2


def test_memory_laid_out_otherwise():
    tokens = torch.arange(12).view(3, 4).t()
    assert not tokens.is_contiguous()
    assert token_rows(tokens).tolist() == [oracle.ids(row) for row in tokens.tolist()]
    every_other = torch.arange(12)[::2]
    expected = [*oracle.ids([0, 2]), *oracle.ids([4, 6, 8]), -1]
    assert token_rows(every_other, cu_seqlens=[0, 2, 5]).tolist() == expected
    one_row = torch.arange(3).expand(2, 3)
    mask = torch.ones(3, 2, dtype=torch.bool).t()
    assert token_rows(one_row, attention_mask=mask).tolist() == [oracle.ids(range(3))] * 2


@pytest.mark.parametrize(
    ("tokens", "more"),
    [
        ([], {}),
        ([[], []], {}),
        ([], {"cu_seqlens": [0]}),
        ([[]], {"cu_seqlens": [0, 0, 0]}),
        ([], {"position_ids": []}),
        ([], {"attention_mask": []}),
        ([[], []], {"attention_mask": [[], []], "salt": ["a", "b"]}),
        ([[], []], {"position_ids": [[], []], "salt": 3}),
        (torch.empty(0, 5, dtype=torch.int64), {}),
        (torch.empty(0, 5, dtype=torch.int64), {"position_ids": torch.empty(0, 5).long()}),
    ],
)
def test_no_tokens(tokens, more):
    shape = torch.tensor(tokens).shape if isinstance(tokens, list) else tokens.shape
    found = token_rows(tokens, **more)
    assert found.shape == shape and found.dtype == torch.int64
    assert known_of(found).positions.shape == known_of(found).tokens.shape == shape


def test_all_is_padding():
    pads = torch.zeros(2, 3, dtype=torch.int64)
    assert token_rows(pads, attention_mask=pads).tolist() == [[-1] * 3] * 2
    assert token_rows(pads, attention_mask=pads, position_ids=pads + 5).tolist() == [[-1] * 3] * 2
    assert token_rows(pads[0], cu_seqlens=[0, 0]).tolist() == [-1] * 3


def test_salts_tell_sequences_apart():
    """Without one, with integers, with strings, and with a string that looks like an integer."""
    every = [None, 0, 1, -1, "", "0", "1", "lora"]
    found = token_rows([[5]] * len(every), salt=every).view(-1).tolist()
    assert len(set(found)) == len(every)
    assert found == [oracle.ids([5], salt)[0] for salt in every]
    assert token_rows([[5]] * 2, salt=torch.tensor([0, 1])).view(-1).tolist() == found[1:3]


def test_ids_are_not_negative_and_depend_on_each_token_and_its_place():
    ids = token_rows(torch.randint(0, 50_000, (200, 50)))
    assert ids.min() >= 0
    assert len({*token_rows([[1, 2], [2, 1], [1, 1], [2, 2], [0, 3]])[:, 1].tolist()}) == 5
    assert token_rows([0, 0, 0, 0]).unique().numel() == 4


def test_what_is_known_belongs_to_one_tensor_and_to_the_tokens_of_then():
    tokens = torch.tensor([4, 5, 6])
    ids = token_rows(tokens)
    tokens.zero_()
    assert known_of(ids).tokens.tolist() == [4, 5, 6]
    assert known_of(ids).positions.tolist() == [0, 1, 2]
    assert known_of(ids[:2]) is None and known_of(ids.clone()) is None
    assert known_of(tokens) is None


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"attention_mask": torch.tensor([0, 1, 1]) > 0},
        {"attention_mask": torch.tensor([0, 1, 1])},
        {"cu_seqlens": torch.tensor([0, 1, 2]), "salt": torch.tensor([3, 4])},
        {"position_ids": torch.tensor([0, 1, 0])},
        {"position_ids": torch.tensor([5, 0, 1]), "attention_mask": torch.tensor([0, 1, 1]) > 0},
        {"requests": torch.tensor([1, 2, 1]), "positions": torch.tensor([0, -1, 1])},
        {"requests": torch.tensor([1, 2, 3]), "positions": torch.tensor([0, 0, 0])},
        {
            "requests": torch.tensor([1, 1]),
            "cu_seqlens": torch.tensor([0, 1, 2]),
            "attention_mask": torch.tensor([1, 1, 1]) > 0,
            "positions": torch.tensor([0, 1, 2]),
        },
    ],
)
def test_what_is_given_stays_as_it_is(more):
    given = {"input_ids": torch.tensor([7, 8, 9]), **more}
    before = {name: one.clone() for name, one in given.items()}
    state = {"state": TokenBook()} if "requests" in more else {}
    for _ in range(2):
        found = token_rows(**given, **state)
    assert all(torch.equal(one, before[name]) for name, one in given.items())
    for one in (found, known_of(found).tokens, known_of(found).positions):
        one.zero_()
    assert all(torch.equal(one, before[name]) for name, one in given.items())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_ids_of_any_mode_are_used_outside_it(mode):
    with mode():
        inside = torch.tensor([1, 2, 3])
        first = token_rows(inside)
    expected = oracle.ids([1, 2, 3])
    assert first.tolist() == token_rows(inside, cu_seqlens=[0, 3]).tolist() == expected
    scores = torch.ones(3, requires_grad=True)
    (scores * (first >= 0)).sum().backward()
    assert scores.grad.tolist() == [1, 1, 1]


def test_the_job_s_modes_change_nothing():
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = [oracle.ids(row) for row in tokens.tolist()]
    with torch.device("meta"):
        assert token_rows(tokens).tolist() == expected
        assert token_rows([[1, 2, 3], [4, 5, 6]], salt=[None, None]).tolist() == expected
        flat = token_rows(tokens.view(-1), cu_seqlens=[0, 3, 6]).tolist()
        assert flat == packed(expected)
        pos = [[0, 1, 2], [0, 1, 2]]
        assert token_rows(tokens, position_ids=pos).tolist() == expected
    torch.use_deterministic_algorithms(True)
    try:
        assert token_rows(tokens, attention_mask=tokens > 0).tolist() == expected
        assert token_rows([1, 2, 3, 9], cu_seqlens=[0, 3]).tolist() == [*expected[0], -1]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.thorough
def test_a_compiled_function_calls_it_as_it_is():
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def forward(tokens):
        return token_rows(tokens * 1), tokens + 1

    @torch.compile(backend="eager")
    def step(tokens, requests, positions):
        return token_rows(tokens * 1, requests=requests, state=book, positions=positions)

    tokens, book = torch.tensor([1, 2, 3]), TokenBook()
    ids, more = forward(tokens)
    assert ids.tolist() == oracle.ids([1, 2, 3]) and more.tolist() == [2, 3, 4]
    assert known_of(ids).tokens.tolist() == [1, 2, 3]
    for i in range(20):
        new = torch.tensor([1])
        assert step(new, ["a"], None)[0] == oracle.ids([1] * (2 * i + 1))[-1]
        assert step(new, ["a"], torch.tensor([2 * i + 1]))[0] == oracle.ids([1] * (2 * i + 2))[-1]
    torch._dynamo.reset()
