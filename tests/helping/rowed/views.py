"""What one rank has of a batch, and its taps: each leaves what it saw, before and after.

All that a rank holds is cut here out of the whole layer, as its place among the ranks says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from recorder import tap

PADDED = 7777
"""What stands in rows of padding."""


@dataclass
class Fired:
    """One firing of a tap.

    Attributes:
        name: of the tap.
        tags: its others, as JSON.
        step: as all up to `place`, of its key.
        ids: for each row what it stands for, a tuple; None for padding.
        before: the tensor as it was, [rows, ...].
        tensor: the tapped one.
        cut: which of the dims behind those of rows tensor parallelism cuts, `sum` for a partial
            one, None where all ranks hold it whole.
        place: (rank, size) among the tensor-parallel ranks, (0, 1) of what they do not cut.
        many: how many dims of rows there are.
        gradients: those that came to it, [rows, ...]: as they were, and as they went on.
    """

    name: str
    tags: str
    step: int
    occurrence: int
    rank: int
    ids: list
    before: torch.Tensor
    tensor: torch.Tensor
    cut: Any = None
    place: tuple = (0, 1)
    many: int = 1
    gradients: list = field(default_factory=list)

    @property
    def after(self):
        """The tensor's rows now."""
        return rows_of(self.tensor, self.many)


def rows_of(tensor, many):
    return tensor.detach().flatten(0, many - 1)


@dataclass
class Log:
    """What one rank's taps saw."""

    rank: int = 0
    step: int = 0
    fired: list = field(default_factory=list)
    counts: dict = field(default_factory=dict)

    def next_step(self):
        self.step += 1
        self.counts = {}

    def tap(
        self, name, tensor, dims, ids, rows, cut=None, place=(0, 1), many=1, grad=False, **tags
    ):
        """Tap a tensor whose first `many` dims are rows, padding marked as such."""
        is_padding = [one is None for one in ids]
        if any(is_padding):
            with torch.no_grad():
                tensor.data.flatten(0, many - 1)[torch.tensor(is_padding)] = PADDED
        text = json.dumps(tags)
        occurrence = self.counts.get((name, text), 0)
        self.counts[name, text] = occurrence + 1
        before = rows_of(tensor, many).clone()
        seen: list = []
        hooked = grad and tensor.requires_grad
        if hooked:
            tensor.register_hook(lambda grad: self._came(grad, seen, is_padding, many))
        tap(name, tensor, dims=dims, rows=rows, grad=grad and tensor.is_floating_point(), **tags)
        if hooked:
            tensor.register_hook(lambda grad: seen[-1].append(rows_of(grad, many).clone()))
        self.fired.append(
            Fired(
                name, text, self.step, occurrence, self.rank, ids, before, tensor, cut, place, many,
                seen,
            )
        )  # fmt: skip
        return tensor

    def _came(self, grad, seen, is_padding, many):
        """Mark the padding of a gradient before the tap's own hook sees it."""
        grad = grad.clone()
        grad.flatten(0, many - 1)[torch.tensor(is_padding)] = PADDED
        seen.append([rows_of(grad, many).clone()])
        return grad


class View:
    """What a rank has of one batch.

    Args:
        log: its taps'.
        ids: the id of each row of the batch, -1 for padding.
        shape: of the rows: (t,), or (b, s).
        lead: the names of these dims, with what cuts them.
        index: which rows of the batch it has, [*shape]; None for all.
        tp: its place among tensor-parallel ranks.
        experts: those it has; None for all.
        with_logits: the rows whose logits are asked for; None for all.
        grads: whether gradients are tapped too.
        at_taps: whether the ids stand at each tap, and not around all.
    """

    def __init__(
        self, log, ids, shape, lead, index=None, tp=(0, 1), experts=None, with_logits=None,
        grads=False, at_taps=True,
    ):  # fmt: skip
        self.log, self.ids, self.shape, self.lead = log, ids, tuple(shape), lead
        self.index, self.tp, self.own_experts = index, tp, experts
        self.with_logits, self.grads, self.at_taps = with_logits, grads, at_taps

    @property
    def local_ids(self):
        """The ids of the rows that this rank has, of the shape of these."""
        return self.local(torch.tensor(self.ids, dtype=torch.int64))

    @property
    def names(self):
        return " ".join(word.partition("[")[0] for word in self.lead.split())

    def local(self, x):
        """Return this rank's rows of [rows, ...]."""
        x = x if self.index is None else x[self.index.flatten()]
        return x.reshape(*self.shape, *x.shape[1:])

    def back(self, local, x):
        """Return what goes on of a batch whose rows were tapped."""
        return local.reshape(x.shape) if self.index is None else x

    def tokens(self, name, x, rest, cut=None, sequence_parallel=False, **tags):
        """Tap what has a row for each token: [rows, *rest]."""
        local, ids, lead = self.local(x), self.local_ids, self.lead
        words, place = rest.split(), (0, 1)
        n = self.tp[1]
        if n > 1 and cut is not None:
            place = self.tp
            words[cut] += "[tp]"
            local = local.chunk(n, len(self.shape) + cut)[self.tp[0]].clone()
        elif n > 1 and sequence_parallel:
            local, ids = (one.chunk(n, -2 + i)[self.tp[0]] for i, one in ((0, local), (1, ids)))
            local = local.clone()
            lead = lead.replace("zigzag]", "zigzag,tp]")
        tapped = self._tap(
            name,
            local,
            f"{lead} {' '.join(words)}",
            ids,
            cut if place[1] > 1 else None,
            place,
            tags,
        )
        return self.back(tapped, x) if local.shape == (*self.shape, *x.shape[1:]) else x

    def summed(self, name, x, weight, **tags):
        """Tap x @ weight.T, of which each tensor-parallel rank has a summand."""
        whole = x @ weight.T
        k, n = self.tp
        if n == 1:
            dims = f"{self.lead} h"
            local = self._tap(name, self.local(whole), dims, self.local_ids, None, (0, 1), tags)
            return self.back(local, whole)
        part = x.chunk(n, 1)[k] @ weight.chunk(n, 1)[k].T
        dims = f"{self.lead} h[tp:partial]"
        self._tap(name, self.local(part).clone(), dims, self.local_ids, "sum", self.tp, tags)
        return whole

    def logits(self, x):
        if self.with_logits is None:
            return self.tokens("logits", x, "v", cut=0)
        at = torch.tensor(self.with_logits, dtype=torch.int64)
        ids = torch.tensor(self.ids, dtype=torch.int64)[at]
        self.log.tap("logits", x[at], "r v", _real(ids), {"r": ids})
        return x

    def sorted(self, name, x, rows, experts, **tags):
        """Tap what has a row for each token of each expert: [n, ...]."""
        mine = None if self.index is None else {*self.index.flatten().tolist()}
        own = [
            i
            for i, (row, expert) in enumerate(zip(rows, experts, strict=True))
            if (self.own_experts is None and (mine is None or row in mine))
            or (self.own_experts is not None and expert in self.own_experts)
        ]
        ids = torch.tensor(
            [[self.ids[rows[i]], experts[i]] for i in own], dtype=torch.int64
        ).reshape(-1, 2)
        real = [None if one == -1 else (one, expert) for one, expert in ids.tolist()]
        is_all = len(own) == len(rows)
        local = x if is_all else x[own]
        self.log.tap(name, local, "n h", real, {"n": ids}, grad=self.grads, **tags)
        return x

    def _tap(self, name, local, dims, ids, cut, place, tags):
        rows = {self.names: ids} if self.at_taps else None
        many = len(self.shape)
        return self.log.tap(
            name, local, dims, _real(ids), rows, cut, place, many, self.grads, **tags
        )


def _real(ids):
    return [None if one == -1 else (one,) for one in ids.flatten().tolist()]
