"""Caches of batches, in whatever order they are filled, cut, chosen from, copied and reset."""

from __future__ import annotations

import copy
import random

import pytest
import token_oracle as oracle
import torch
from following import followed, needs_transformers, tiny

pytestmark = needs_transformers
PAD = None


class Held:
    """A cache, and what each of its rows holds: tokens, or PAD."""

    def __init__(self, rng, model, kind):
        import transformers

        self.rng, self.kind = rng, kind
        if kind == "static":
            self.cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        else:
            self.cache = transformers.DynamicCache(config=model.config)
        self.rows = [[] for _ in range(rng.randrange(1, 4))]
        self.befores = []

    @property
    def length(self):
        return len(self.rows[0])

    def chunk(self):
        """Tokens for each row: a prompt padded on the left, or some more, some of them padding."""
        rng = self.rng
        if not self.length:
            width = rng.randrange(1, 7)
            fills = [rng.randrange(width) if rng.random() < 0.5 else 0 for _ in self.rows]
            return [
                [PAD] * fill + [rng.randrange(1, 9) for _ in range(width - fill)] for fill in fills
            ]  # fmt: skip
        width = rng.choice([1, 1, 1, 2, 4])
        is_padded = rng.random() < 0.2
        return [
            [PAD if is_padded and rng.random() < 0.4 else rng.randrange(1, 9) for _ in range(width)]
            for _ in self.rows
        ]

    def arguments(self, chunk):
        """What the model is called with, in one of the forms that there are."""
        rng = self.rng
        given = {
            "input_ids": torch.tensor([[one or 0 for one in row] for row in chunk]),
            "cache": self.cache,
        }
        whole = [row + more for row, more in zip(self.rows, chunk, strict=True)]
        real = torch.tensor([[one is not PAD for one in row] for row in whole])
        form = rng.choice(["int", "bool", "seen", "none"])
        if form == "none" and not bool(real.all()):
            form = "int"
        if form == "int":
            given["attention_mask"] = real.long()
        elif form == "bool":
            given["attention_mask"] = real
        elif form == "seen":
            begin, size = self.length, real.shape[1]
            ahead = torch.ones(size, size, dtype=torch.bool).triu(1)
            seen = (real[:, None, None, :] & ~ahead)[:, :, begin:]
            if self.kind == "static":
                seen = torch.nn.functional.pad(seen, (0, 64 - size))
            given["attention_mask"] = seen
        if rng.random() < 0.6:
            places = (real.long().cumsum(1) - 1).clamp_min(0)[:, self.length :]
            given["position_ids"] = places
        return given

    def expected(self, chunk):
        found = []
        for row, more in zip(self.rows, chunk, strict=True):
            ids = iter(oracle.ids([one for one in row + more if one is not PAD]))
            every = [next(ids) if one is not PAD else -1 for one in row + more]
            found.append(every[len(row) :])
        return found

    def change(self):
        """Do something else to the cache."""
        rng, cache = self.rng, self.cache
        what = rng.choice(["crop", "reorder", "select", "repeat", "copy", "reset"])
        if what == "crop" and self.length > 1:
            off = rng.randrange(1, self.length)
            cache.crop(-off)
            self.rows = [row[:-off] for row in self.rows]
        elif what == "reorder" and self.length:
            order = [rng.randrange(len(self.rows)) for _ in self.rows]
            cache.reorder_cache(torch.tensor(order))
            self.rows = [list(self.rows[i]) for i in order]
        elif what == "reset":
            cache.reset()
            self.rows = [[] for _ in self.rows]
        elif self.kind == "static" or not self.length:
            return
        elif what == "select":
            order = [rng.randrange(len(self.rows)) for _ in range(rng.randrange(1, 4))]
            cache.batch_select_indices(torch.tensor(order))
            self.rows = [list(self.rows[i]) for i in order]
        elif what == "repeat" and len(self.rows) < 4:
            cache.batch_repeat_interleave(2)
            self.rows = [list(row) for row in self.rows for _ in range(2)]
        elif what == "copy":
            self.befores.append(cache)  # whose past the copy has, as long as it is there
            self.cache = copy.deepcopy(cache)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("seed", range(4))
def test_ids_are_those_of_the_oracle_whatever_is_done_to_caches(tmp_path, mode, seed):
    rng = random.Random(seed)
    model = tiny(num_hidden_layers=1)
    count = 0
    with mode(), followed(tmp_path, model, at=model.model.norm) as seen:
        every = [Held(rng, model, kind) for kind in ("dynamic", "static", "dynamic")]
        for _ in range(150):
            held = rng.choice(every)
            if held.length > 50:
                held.cache.reset()
                held.rows = [[] for _ in held.rows]
            if rng.random() < 0.3:
                held.change()
                continue
            chunk = held.chunk()
            if not held.length and held.kind == "static":
                held.rows = held.rows[:1] * len(held.rows)
            expected = held.expected(chunk)
            seen.clear()
            model(**held.arguments(chunk))
            assert seen[0]["b s"] == expected, (held.kind, held.rows, chunk)
            held.rows = [row + more for row, more in zip(held.rows, chunk, strict=True)]
            count += 1
    assert count > 80
