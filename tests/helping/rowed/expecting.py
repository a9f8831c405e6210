"""What a replay has to make of a random tap, from lists of what its baseline tapped alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .oracle import same


@dataclass
class Expected:
    """What becomes of one tap.

    Attributes:
        outcome: as in the log.
        rows: of the target's tensor, None where its own stays.
        found: how many real rows were recorded.
        missing: how many were not.
        several: how many different rows were recorded several times.
    """

    outcome: str
    rows: list = field(default_factory=list)
    found: int = 0
    missing: int = 0
    several: int = 0


def expected(case, fired, *, match_on=None, replicas="error", kept=lambda one: True):
    """Return what becomes of a firing of the target.

    Args:
        case: its case.
        fired: the firing.
        match_on: the names that count, as in the option.
        replicas: as the option.
        kept: whether what the baseline tapped is still there.
    """
    named = (match_on or "").split(",")
    every = [one for one in case.fired if kept(one)]
    if "step" in named:
        every = [one for one in every if one.step == fired.step]
    if "occurrence" in named:
        count = "occurrence" if "step" in named else "number"
        every = [one for one in every if getattr(one, count) == getattr(fired, count)]
    every.sort(key=lambda one: (-one.attempt, one.step, one.occurrence, one.rank))
    nothing = [None] * len(fired.ids)
    if not every:
        return Expected("missing", nothing)
    real = [cell for cell in fired.ids if cell is not None]
    if not real:
        return Expected("grafted", nothing)
    sender, receiver = case.layouts
    n = sender.tp if sender.cut is not None else 1
    parts: dict = {}
    for one in every:
        places = parts.setdefault(one.k if n > 1 else 0, {})
        for cell, row in zip(one.ids, one.rows, strict=True):
            if cell is not None:
                places.setdefault(cell, []).append(row)
    needed, is_zero = _needed(sender, receiver, fired.k, n)
    if not {*needed} <= {*parts}:
        return Expected("error", nothing)
    there = {cell for cell in real if all(cell in parts[part] for part in needed)}
    if not there:
        return Expected("missing", nothing)
    several = [{cell for cell in there if len(parts[part][cell]) > 1} for part in needed]
    if any(several) and not _agree([parts[part] for part in needed], several, replicas):
        return Expected("error", nothing)
    made = {}
    for cell in there:
        rows = [_one(parts[part][cell], replicas) for part in needed]
        made[cell] = _joined(sender, receiver, fired.k, rows, needed, is_zero).to(case.dtypes[1])
    rows = [made.get(cell) for cell in fired.ids]
    found = sum(cell in made for cell in real)
    return Expected("grafted", rows, found, len(real) - found, max(map(len, several)))


def received(case, fired):
    """Return what a transform gets for a firing of the target: sender rank -> its part's rows.

    They stand where the target's rows do, between the senders' other dims; zeros where not all
    parts have one.
    """
    sender, receiver = case.layouts
    every = sorted(case.fired, key=lambda one: (one.step, one.occurrence, one.rank))
    is_cut = sender.cut is not None and sender.tp > 1
    parts: dict = {}
    for one in every:
        first, places = parts.setdefault(one.k if is_cut else 0, (one, {}))
        for cell, row in zip(one.ids, one.rows, strict=True):
            if cell is not None:
                places.setdefault(cell, row)
    sizes = [fired.tensor.shape[receiver.order.index(i)] for i in range(receiver.many)]
    rows = [i for i in receiver.order if i < receiver.many]
    rest = [i for i in sender.order if i >= sender.many]
    before = min(map(sender.order.index, range(sender.many)))
    made = {}
    for first, places in parts.values():
        there = [all(cell in own for _, own in parts.values()) for cell in fired.ids]
        whole = torch.zeros([n for _, n in sender.rest], dtype=case.dtypes[0])
        like = sender.part(whole, first.k)
        values = [
            places[cell] if has else torch.zeros_like(like)
            for cell, has in zip(fired.ids, there, strict=True)
        ]
        stacked = torch.stack(values) if values else like.new_empty(0, *like.shape)
        shape = [like.numel()] if sender.is_fused else like.shape
        stacked = stacked.reshape(*sizes, *shape)
        order = [receiver.many + i - sender.many for i in rest]
        made[first.rank] = stacked.permute([*order[:before], *rows, *order[before:]])
    return made


def _needed(sender, receiver, k, n):
    """Return the senders' parts that a receiver is made of, and whether it holds none of a sum.

    Then its peer holds all of it: a row is zero here just where it is found there.
    """
    if sender.cut == receiver.cut == "sum" and sender.tp == receiver.tp:
        return [k], False
    if receiver.cut == "sum":
        return [*range(n)], k > 0
    if sender.cut == receiver.cut and sender.cut is not None:
        m = receiver.tp
        return [i for i in range(n) if i * m < (k + 1) * n and k * n < (i + 1) * m], False
    return [*range(n)], False


def _agree(parts, several, replicas):
    """Whether rows that were recorded several times are no error."""
    for places, cells in zip(parts, several, strict=True):
        for cell in cells:
            rows = places[cell]
            dtype = rows[0].dtype
            is_float = dtype.is_floating_point or dtype.is_complex
            if replicas == "mean" and not is_float:
                return False
            if replicas == "error" and any(_is_beyond(rows[0], row) for row in rows[1:]):
                return False
    return True


def _is_beyond(a, b):
    """Whether two rows of a case are apart: by more than rounding they are so by their sign."""
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        return not same(a, b)
    wide = torch.complex128 if a.dtype.is_complex else torch.float64
    return bool(((a.to(wide) - b.to(wide)).abs().max() > 0.5 * a.to(wide).abs().max()).item())


def _one(rows, replicas):
    if replicas == "last":
        return rows[-1]
    if replicas == "mean" and len(rows) > 1:
        wide = torch.complex128 if rows[0].dtype.is_complex else torch.float64
        return (sum(row.to(wide) for row in rows) / len(rows)).to(rows[0].dtype)
    return rows[0]


def _joined(sender, receiver, k, rows, needed, is_zero):
    """Return a receiver's part of a row from the senders' parts that it needs."""
    if sender.cut == receiver.cut == "sum" and sender.tp == receiver.tp:
        return rows[0]
    if is_zero:
        whole = torch.zeros([n for _, n in receiver.rest], dtype=rows[0].dtype)
        return whole
    if sender.cut == "sum":
        whole = _summed(rows)
    elif sender.cut is None:
        whole = rows[0]
    else:
        whole = torch.cat(rows, sender.cut)
    if receiver.cut in (None, "sum"):
        return whole
    if receiver.cut != sender.cut:
        return whole.chunk(receiver.tp, receiver.cut)[k]
    # Of the same cut, only the parts that lie over the receiver's are here.
    size = receiver.rest[receiver.cut][1]
    start = k * size // receiver.tp - needed[0] * size // sender.tp
    return whole.narrow(receiver.cut, start, size // receiver.tp)


def _summed(rows):
    if len(rows) == 1:
        return rows[0]
    dtype = rows[0].dtype
    if dtype.is_complex:
        wide = torch.complex128
    elif dtype.is_floating_point:
        wide = torch.float32 if dtype.itemsize <= 2 else torch.float64
    else:
        wide = torch.int64
    return sum(row.to(wide) for row in rows).to(dtype)


def check(case, fired, row, what):
    """Hold a firing of the target, and its row of the log, against what is expected.

    Args:
        case: its case.
        fired: the firing.
        row: of the log.
        what: is expected.
    """
    layout = case.layouts[1]
    shown = f"case {case.number} of seed {case.seed} {case.layouts[0].text!r} onto {layout.text!r}"
    about = f"{shown} step={fired.step} rank={fired.rank}: {row['message']}"
    assert row["outcome"] == what.outcome, f"{about} (expected {what.outcome})"
    like = layout.part(torch.zeros([n for _, n in layout.rest], dtype=case.dtypes[1]), fired.k)
    after = layout.rows(fired.tensor, like)
    for number, (got, own, wanted) in enumerate(zip(after, fired.rows, what.rows, strict=True)):
        wanted = own if wanted is None else wanted.reshape(own.shape)
        assert same(got, wanted), f"row {number} of {about}: got {got}, expected {wanted}"
    if what.outcome == "grafted":
        assert (row["rows_found"], row["rows_missing"]) == (what.found, what.missing), about
        assert ("recorded several times" in row["message"]) == (what.several > 0), about
        if what.several:
            assert row["message"].startswith(f"{what.several} row"), about
