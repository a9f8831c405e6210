"""Random lengths, orders, sides of padding and layouts: each row is its own token's, or refused."""

from __future__ import annotations

import collections
import json
import random
import re

import pytest
import torch
from sequence_cases import JUNK, KEPT, random_case, random_mesh, value_of

from recorder import Recorder, declare_mesh, tap
from replayer import Replayer, diff

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]
GUESSED = re.compile("was taken to have|taken to be padded")  # of the size of a dim, and says so


class Jobs:
    """A baseline and a target, each over one mesh, that tap one tensor a case."""

    def __init__(self, folder, seed, count):
        self.folder, self.seed = folder, seed
        rng = random.Random(seed)
        self.meshes = [random_mesh(rng), random_mesh(rng)]
        self.is_declared = rng.random() < 0.7
        self.cases = [random_case(rng, self.meshes) for _ in range(count)]
        self.wrong = [
            rng.choice([(i, k) for i, n in enumerate(case.lengths) for k in range(n)])
            for case in self.cases
        ]

    def about(self, i, *more):
        return f"seed {self.seed}, {i}: {self.cases[i].about()} {more}"

    def ranks(self, side):
        """Yield the ranks of a side, each where it stands, and how many there are."""
        layout = self.cases[0].halves[side].layout
        for rank, at in enumerate(layout.ranks()):
            mesh = {axis: (k, self.meshes[side][axis]) for axis, k in at.items()}
            is_one = len(layout.ranks()) == 1 and not self.is_declared
            declare_mesh(**({} if is_one else mesh))
            yield rank, len(layout.ranks())
        declare_mesh()

    def taps(self, side, rank, padding, *, wrong=False, is_empty=False):
        """Tap each case's tensor, or one that holds no token yet; return them and their tokens."""
        found = []
        for i, case in enumerate(self.cases):
            half = case.halves[side]
            shape, tokens, values = half.blocks(padding, self.wrong[i] if wrong else None)[rank]
            tensor = torch.tensor(values, dtype=torch.float32).reshape(shape)
            if is_empty:
                tensor.fill_(KEPT)
            extras = half.layout.extras or None
            tap("x", tensor, dims=half.layout.text(), extras=extras, i=i)
            found.append((tensor, tokens))
        return found

    def record(self, name, side, padding, wrong=False):
        for rank, world in self.ranks(side):
            with Recorder(self.folder / name, rank=rank, world_size=world):
                self.taps(side, rank, padding, wrong=wrong)
        return self.folder / name

    def check_replay(self, base, counts):
        for rank, world in self.ranks(1):
            with Replayer(base, rank=rank, world_size=world) as session:
                held = self.taps(1, rank, KEPT, is_empty=True)
            log = session.log().sort("seq").select("outcome", "message").rows()
            for i, ((tensor, tokens), told) in enumerate(zip(held, log, strict=True)):
                what = self.came_to(self.cases[i], tensor.flatten().tolist(), tokens, *told)
                assert what, self.about(i, rank, told, tensor.tolist(), tokens)
                counts[what] += 1

    def came_to(self, case, got, tokens, outcome, message):
        """Return what came of one graft, "" where that must not be."""
        is_kept = all(x == KEPT for x, token in zip(got, tokens, strict=True) if token is None)
        if outcome != "grafted":
            return "refused" if outcome == "error" and all(x == KEPT for x in got) else ""
        if case.is_other and got:
            return ""
        if all(x == value_of(t) for x, t in zip(got, tokens, strict=True) if t is not None):
            # Where nobody says on which side, batches are copied as they stand, padding and all.
            may_fill = case.is_silent or not case.says_side or GUESSED.search(message)
            return "right" if is_kept or may_fill else ""
        return "silent, or guessed and said" if case.is_silent or GUESSED.search(message) else ""

    def check_diffs(self, base, counts):
        for name, wrong, good in (("same", False, "equal"), ("wrong", True, "differs")):
            found = diff(base, self.record(name, 1, KEPT, wrong))
            for row in found.pairs.iter_rows(named=True):
                i = json.loads(row["tags"])["i"]
                if not self.cases[i].is_silent:
                    told = (name, row["outcome"], row["message"])
                    assert row["outcome"] in (good, "error"), self.about(i, told)
                    assert row["outcome"] == "error" or not self.cases[i].is_other, self.about(i)
                    counts[f"diff: {row['outcome']}"] += 1
            assert found.status == 1 if wrong else found.status in (0, 1)


@pytest.mark.thorough
@pytest.mark.parametrize("extent", ["short", pytest.param("long", marks=LONG)])
def test_each_row_is_its_own_token_s_or_it_is_refused(tmp_path, extent):
    first, jobs, count = (0, 12, 16) if extent == "short" else (10_000, 600, 20)
    counts = collections.Counter()
    for seed in range(first, first + jobs):
        one = Jobs(tmp_path / str(seed), seed, count)
        base = one.record("base", 0, JUNK)
        one.check_replay(base, counts)
        one.check_diffs(base, counts)
    print(f"seeds {first} to {first + jobs - 1}:", *counts.most_common(), sep="\n")
    assert counts["right"] > 2 * jobs * count // 3 and counts["refused"]
    assert counts["diff: equal"] > jobs * count // 2 and counts["diff: differs"]
