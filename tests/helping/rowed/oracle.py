"""What a row has to be after a replay, from what the baseline tapped, in plain dictionaries."""

from __future__ import annotations

import torch

from .views import PADDED


class Oracle:
    """The rows that a baseline tapped: (name, tags, id) -> tensor-parallel rank -> the first one.

    Args:
        fired: what all ranks' taps saw.
    """

    def __init__(self, fired):
        self.rows: dict = {}
        for one in sorted(fired, key=lambda one: (one.step, one.occurrence, one.rank)):
            for number, row_id in enumerate(one.ids):
                if row_id is None:
                    continue
                parts = self.rows.setdefault((one.name, one.tags, row_id), {})
                parts.setdefault(one.place[0], (one.before[number], one.cut, one.place[1]))

    def row(self, fired, row_id):
        """Return what a row of a target's tap has to be; None where the baseline lacks it."""
        parts = self.rows.get((fired.name, fired.tags, row_id))
        if parts is None:
            return None
        _, cut, n = parts[0]
        if len(parts) < n:
            return None
        k, own = fired.place
        rows = [parts[i][0] for i in range(n)]
        if cut == fired.cut == "sum" and n == own:
            return rows[k]
        if cut == "sum":
            whole = sum(row.double() for row in rows).to(rows[0].dtype) if n > 1 else rows[0]
        else:
            whole = rows[0] if n == 1 else torch.cat(rows, cut)
        if fired.cut == "sum":
            return whole if k == 0 else torch.zeros_like(whole)
        return whole if fired.cut is None else whole.chunk(own, fired.cut)[k]

    def check(self, fired):
        """Hold a target's tap against this; return how many rows were found, and how many not."""
        found = missing = 0
        for number, row_id in enumerate(fired.ids):
            after, before = fired.after[number], fired.before[number]
            if row_id is None:
                assert torch.equal(after, torch.full_like(after, PADDED)), "padding was touched"
                continue
            expected = self.row(fired, row_id)
            found, missing = found + (expected is not None), missing + (expected is None)
            assert same(after, before if expected is None else expected), (
                f"{fired.name} {fired.tags} step={fired.step} occurrence={fired.occurrence} "
                f"rank={fired.rank} row {number}"
            )
        return found, missing


def same(a, b):
    """Whether two tensors have the same bits."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    views = [one.contiguous().view(kinds[one.element_size()]) for one in (a, b)]
    return a.dtype == b.dtype and torch.equal(*views)
