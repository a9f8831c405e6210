"""Ids of a server's steps: those of the whole prefix, however it came about."""

from __future__ import annotations

import random
import threading

import pytest
import token_oracle as oracle
import torch

from recorder import TokenBook, token_rows
from recorder.errors import UsageError
from recorder.tokens.known import known_of

SALTS = [None, None, 3, -1, "lora"]


class Server:
    """A server whose requests come, wait, go back and end as a random number generator says.

    It knows of each request its salt, the tokens it will have, and how many of them it had.
    """

    def __init__(self, rng, state):
        self.rng, self.state = rng, state
        self.can_go_back = isinstance(state, TokenBook)
        self.requests = {}
        self.prefixes = [self.some(rng.randrange(1, 20)) for _ in range(3)]

    def some(self, n):
        return [self.rng.randrange(4) for _ in range(n)]

    def arrive(self):
        """A request comes, under an id that may have been another's; it may begin in the cache."""
        rng = self.rng
        name = rng.choice([rng.randrange(6), f"req-{rng.randrange(6)}"])
        if name in self.requests:
            return
        prefix, salt = rng.choice([[], *self.prefixes]), rng.choice(SALTS)
        tokens = [*prefix, *self.some(rng.randrange(1, 90))]
        had = 0
        if prefix and rng.random() < 0.6:
            had = rng.randrange(1, len(prefix) + 1)
            if self.can_go_back and rng.random() < 0.5:
                self.state.begin(name, tokens=tokens[:had], salt=salt)
            else:
                token_rows(tokens[:had], requests=[name] * had, state=self.state, salt=salt)
        self.requests[name] = [salt, tokens, had]

    def end(self):
        for name, (_, tokens, had) in list(self.requests.items()):
            if had == len(tokens) or self.rng.random() < 0.01:
                del self.requests[name]
                if name in self.state:
                    del self.state[name]

    def step(self):
        """Some tokens of some requests: [(request, its tokens, from which position, to which)]."""
        rng, chunks = self.rng, []
        has_places = rng.random() < 0.5
        for name in rng.sample(list(self.requests), rng.randrange(len(self.requests) + 1)):
            one = self.requests[name]
            salt, tokens, had = one
            if has_places and self.can_go_back and had and rng.random() < 0.25:
                had = rng.choice([0, rng.randrange(had)])
                one[1] = tokens = [*tokens[:had], *self.some(len(tokens) - had)]
            until = min(len(tokens), had + rng.choice([1, 1, 1, 4, 70]))
            chunks.append((name, salt, tokens, had, until))
            one[2] = until
        return chunks, has_places

    def rows(self, chunks):
        """The chunks' tokens as rows (request, salt, position, token, id), interleaved at times."""
        lists = [
            [
                (name, salt, i, tokens[i], one)
                for i, one in enumerate(oracle.ids(tokens[:until], salt))
                if i >= had
            ]
            for name, salt, tokens, had, until in chunks
        ]
        if self.rng.random() < 0.5:
            return lists, [row for one in lists for row in one]
        left, rows = [list(one) for one in lists if one], []
        while left:
            one = self.rng.choice(left)
            rows.append(one.pop(0))
            left = [other for other in left if other]
        return None, rows


def ask(rng, server, chunks, has_places):
    """Take a step in one of the forms that there are; return its ids and those of the oracle."""
    lists, rows = server.rows(chunks)
    pads = rng.randrange(3) if has_places else 0
    more = {"state": server.state}
    expected = [row[4] for row in rows]
    if lists is not None and rng.random() < 0.5:
        ends = [0]
        for one in lists:
            ends.append(ends[-1] + len(one))
        more["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
        more["requests"] = [chunk[0] for chunk in chunks]
        more["salt"] = [chunk[1] for chunk in chunks]
        rows = [*rows, *[(None, None, -1, 0, -1)] * pads]
        expected += [-1] * pads
    else:
        for _ in range(pads):
            at = rng.randrange(len(rows) + 1)
            rows.insert(at, (rng.choice([None, "pad", 0]), rng.choice(SALTS), -1, 0, -1))
            expected.insert(at, -1)
        more["requests"] = [row[0] for row in rows]
        more["salt"] = [row[1] for row in rows]
        if all(type(one) is int for one in more["requests"]) and rng.random() < 0.5:
            more["requests"] = torch.tensor(more["requests"], dtype=torch.int64)
    if has_places:
        more["positions"] = torch.tensor([row[2] for row in rows], dtype=torch.int64)
    elif pads or rng.random() < 0.2:
        more["attention_mask"] = [row[4] != -1 for row in rows]
    tokens = torch.tensor([row[3] for row in rows], dtype=rng.choice([torch.int32, torch.int64]))
    if all(salt is None for salt in more["salt"]):
        del more["salt"]
    found = token_rows(tokens, **more)
    known = known_of(found)
    assert known.positions.tolist() == [row[2] for row in rows]
    real = found >= 0
    assert known.tokens[real].tolist() == tokens[real].tolist()
    assert (known.tokens[~real] == -1).all()
    return found.tolist(), expected


@pytest.mark.parametrize("make", [TokenBook, dict])
@pytest.mark.parametrize("seed", range(6))
def test_a_server_s_schedule_has_the_ids_of_whole_prefixes(seed, make):
    print("seed", seed)
    rng = random.Random(seed)
    server = Server(rng, make())
    for _ in range(150):
        while len(server.requests) < 3 or rng.random() < 0.3:
            server.arrive()
        chunks, has_places = server.step()
        found, expected = ask(rng, server, chunks, has_places)
        assert found == expected
        for name, (salt, tokens, had) in server.requests.items():
            if name in server.state:
                total, count = server.state[name]
                assert count == had
                assert not had or oracle.mix(total) >> 1 == expect(tokens, had, salt)
        server.end()
    assert len(server.state) <= len(server.requests)


def expect(tokens, had, salt):
    return oracle.ids(tokens[:had], salt)[-1]


@pytest.mark.parametrize("seed", range(6))
def test_steps_of_one_token_a_request(seed):
    """The steps that a server takes most, which are planned once; requests come, go and change."""
    print("seed", seed)
    rng = random.Random(seed)
    book, had, salt_of = TokenBook(), {}, {}
    names = []
    for step in range(250):
        if rng.random() < 0.08 or not names:
            name = f"r{step}"
            names.append(name)
            salt_of[name] = rng.choice(SALTS)
            had[name] = [rng.randrange(9) for _ in range(rng.choice([0, 3, 62, 63, 64, 65]))]
            book.begin(name, tokens=had[name], salt=salt_of[name])
        if rng.random() < 0.04:
            rng.shuffle(names)
        if rng.random() < 0.04 and len(names) > 1:
            book.forget(names.pop())
        if rng.random() < 0.04:  # goes back, as after tokens that were not accepted
            name = rng.choice(names)
            cut = rng.randrange(len(had[name]) + 1)
            had[name] = [*had[name][:cut], 5]
            token_rows([5], requests=[name], state=book, positions=[cut])
        new = [rng.randrange(9) for _ in names]
        for name, token in zip(names, new, strict=True):
            had[name].append(token)
        more = {}
        if rng.random() < 0.5:
            places = torch.tensor([len(had[name]) - 1 for name in names])
            more["positions"] = places.to(rng.choice([torch.int32, torch.int64]))
        if rng.random() < 0.5:
            more["salt"] = [salt_of[name] for name in names]
        tokens = torch.tensor(new, dtype=rng.choice([torch.int32, torch.int64, torch.int16]))
        asked = rng.choice([names, tuple(names)])
        found = token_rows(tokens, requests=asked, state=book, **more)
        tokens.zero_()
        assert found.tolist() == [expect(had[one], len(had[one]), salt_of[one]) for one in names]
        assert known_of(found).tokens.tolist() == new
        assert known_of(found).positions.tolist() == [len(had[one]) - 1 for one in names]


def test_batches_and_steps_have_the_same_ids():
    prompt, rest = [5, 6, 7, 8], [1, 2]
    whole = token_rows([prompt + rest])[0].tolist()
    book = TokenBook()
    steps = token_rows(prompt[:3], requests=["a"] * 3, state=book).tolist()
    for token in prompt[3:] + rest:
        steps += token_rows([token], requests=["a"], state=book).tolist()
    assert steps == whole
    assert token_rows([prompt + rest], requests=["b"] * 6, state=book).tolist() == [whole]


def test_what_an_earlier_step_said_stays_as_it_was():
    book = TokenBook()
    first = token_rows(torch.tensor([1, 2]), requests=["a", "b"], state=book)
    before = first.tolist(), known_of(first).positions.tolist(), known_of(first).tokens.tolist()
    for _ in range(100):
        token_rows(torch.tensor([1, 2]), requests=["a", "b"], state=book)
    assert before == (
        first.tolist(),
        known_of(first).positions.tolist(),
        known_of(first).tokens.tolist(),
    )


def test_a_book_is_a_mapping():
    book = TokenBook()
    book.begin("a", tokens=[1, 2])
    book.begin(7)
    assert "a" in book and "b" not in book and 7 in book and len(book) == 2
    assert list(book) == ["a", 7] and book[7] == (0, 0) and book["a"][1] == 2
    assert oracle.mix(book["a"][0]) >> 1 == oracle.ids([1, 2])[-1]
    assert book.pop("a")[1] == 2 and book.pop("a", None) is None and book.pop("a", 4) == 4
    book.forget("a")
    for action in (book.pop, book.__getitem__, book.__delitem__):
        with pytest.raises(KeyError):
            action("a")
    del book[7]
    assert len(book) == 0
    book.begin("a")
    book.clear()
    assert "a" not in book and list(book) == []


def test_a_request_that_begins_again_has_nothing_of_the_one_before():
    book = TokenBook()
    book.begin("a", tokens=[9] * 200, salt="x")
    book.begin("a", tokens=[1])
    assert token_rows([2], requests=["a"], state=book).tolist() == oracle.ids([1, 2])[1:]
    del book["a"]
    assert token_rows([2], requests=["a"], state=book).tolist() == oracle.ids([2])


def test_from_position_0_a_request_keeps_its_salt_unless_it_is_given_another():
    book = TokenBook()
    book.begin("a", tokens=[1, 2], salt="x")
    ids = token_rows([1, 2], requests=["a"] * 2, state=book, positions=[0, 1])
    assert ids.tolist() == oracle.ids([1, 2], "x")
    ids = token_rows([1, 2], requests=["a"] * 2, state=book, positions=[0, 1], salt="y")
    assert ids.tolist() == oracle.ids([1, 2], "y")
    assert token_rows([3], requests=["a"], state=book).tolist() == oracle.ids([1, 2, 3], "y")[2:]


def test_memory_is_used_again():
    book = TokenBook()
    for i in range(300):
        book.begin(i, tokens=[1] * 50)
        if i >= 3:
            del book[i - 3]
    assert len(book._memory.sums) <= 1024 and len(book._memory.base) == 64


def test_many_requests_at_once():
    book, many = TokenBook(), range(1000)
    for length in range(1, 4):
        found = token_rows([4] * 1000, requests=list(many), state=book)
        assert set(found.tolist()) == {oracle.ids([4] * length)[-1]}
    assert len(book) == 1000


@pytest.mark.parametrize("begins_inside", [False, True])
@pytest.mark.parametrize("form", ["plain", "places", "chunk"])
def test_a_book_of_inference_mode_goes_on_outside_it(begins_inside, form):
    """And the other way round, and grows in both."""
    had = []
    with torch.inference_mode(begins_inside):
        book = TokenBook()
    for inside in (begins_inside, not begins_inside, begins_inside):
        with torch.inference_mode(inside):
            for step in range(70):
                new = [step % 7] * (30 if form == "chunk" else 1)
                places = torch.tensor([len(had)]) if form == "places" else None
                had += new
                found = token_rows(
                    torch.tensor(new), requests=["a"] * len(new), state=book, positions=places
                )
            assert found[-1] == oracle.ids(had)[-1]


def test_each_account_of_padding_counts():
    more = {"attention_mask": [1, 0, 1, 1, 1], "positions": [0, 1, -1, 1, 2], "cu_seqlens": [0, 4]}
    book = TokenBook()
    found = token_rows([1, 2, 3, 4, 5], requests=["a"], state=book, **more)
    assert found.tolist() == [oracle.ids([1])[0], -1, -1, oracle.ids([1, 4])[1], -1]
    assert book["a"][1] == 2
    more["attention_mask"] = [0] * 5
    assert token_rows([1] * 5, requests=["a"], state=book, **more).tolist() == [-1] * 5


def test_a_dict_begins_anew_at_position_0():
    state = {}
    token_rows([1, 2], requests=["a"] * 2, state=state)
    found = token_rows([1, 3], requests=["a"] * 2, state=state, positions=[0, 1], salt="x")
    assert found.tolist() == oracle.ids([1, 3], "x") and state["a"][1] == 2


def test_threads_share_a_book():
    book, failed = TokenBook(), []

    def serve(number):
        had = []
        for i in range(150):
            had.append(i % 5)
            found = token_rows(torch.tensor([i % 5]), requests=[number], state=book)
            if found.item() != oracle.ids(had)[-1]:
                failed.append((number, i))
            if i % 50 == 49:
                del book[number]
                had = []

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert failed == [] and len(book) == 0


def test_a_step_that_is_refused_changes_nothing():
    book = TokenBook()
    book.begin("a", tokens=[1, 2, 3], salt=1)
    book.begin("b", tokens=[1])
    before = {name: book[name] for name in book}
    plain = {"a": (5, 2)}
    for state, more in [
        (book, {"requests": ["new", "b"], "positions": [0, 2]}),
        (book, {"requests": ["new", "b"], "positions": [1, 1]}),
        (book, {"requests": ["b", "a"], "salt": [None, 2]}),
        (book, {"requests": ["b", None]}),
        (book, {"requests": ["b", "b"], "positions": [1, 3]}),
        (plain, {"requests": ["new", "a"], "positions": [0, 3]}),
        (plain, {"requests": ["new", "a"], "positions": [0, 1]}),
    ]:
        with pytest.raises(UsageError):
            token_rows(torch.tensor([4, 4]), state=state, **more)
    assert {name: book[name] for name in book} == before
    assert plain == {"a": (5, 2)}
    with pytest.raises(UsageError):
        book.begin("a", tokens=[1.5])
    assert book["a"] == before["a"]
