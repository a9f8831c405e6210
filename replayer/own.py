"""What a replay logs beside a graft for `graft localize`: the error that is the segment's own.

While all that matches is grafted, what the target computed at a tap comes from the baseline's own
inputs. `Own.columns` measures how far off it is (`own_error`); of indices and other integers it
says which rows hold another set (`choice`). Of what is far off it also asks whether it is
another record of the run, such as the layer's or the step's before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from recorder.bits import as_bits, bytes_of, dtype_name
from recorder.format.rows import parse_tags, rows_of
from recorder.format.schema import ManifestRow
from recorder.tags import TagValue, label

from .log import WEIGHT, OwnRow
from .measuring.choice import choice
from .measuring.look import Look
from .measuring.measures import units
from .measuring.own import OwnError, most_rounding, own_error
from .measuring.profile import as_row

if TYPE_CHECKING:
    import polars as pl

_STALE_FROM = 0.1  # relative error
_MOST_STALE, _MOST_CANDIDATES = 32, 8  # taps that are compared with other records; by how many
_MOST_BYTES, _CHUNK = 32 << 20, 1 << 18
_SCORES, _SCORES_BYTES = 3, 16 << 20  # grafted tensors that indices may have been chosen by


@dataclass
class Own:
    """Measures what one receiver computed by itself.

    Attributes:
        frame: the baseline's manifest rows.
    """

    frame: pl.DataFrame
    _scores: list[torch.Tensor] = field(default_factory=list)
    _compared: int = 0

    def columns(
        self,
        target: torch.Tensor,
        new: torch.Tensor,
        record: ManifestRow,
        dims: str,
        other: Callable[[Sequence[int]], torch.Tensor] | None,
        *,
        is_gradient: bool,
    ) -> OwnRow:
        """Return what is to be logged of a graft.

        Args:
            target: the target's own tensor.
            new: what replaces it, of the same shape and dtype.
            record: the manifest row of one of its records.
            dims: the target's, as declared; "" where none are.
            other: makes what would replace it, were its records those of these rows of the frame;
                None where nothing but the transform knows.
            is_gradient: whether it is one.
        """
        row: OwnRow = {
            "dtype": dtype_name(target.dtype),
            "sender_dtype": record["dtype"] or "",
            "shape": list(target.shape),
            "dims": dims,
            "role": WEIGHT if _is_parameter(target) else None,
            "digest": _digest(target),
        }
        if not (target.dtype.is_floating_point or target.dtype.is_complex):
            made = choice(new, target, self._scores)
            return {**row, "error": made.error, "look": _json(made.look)}
        eps, unit = units(target.dtype, getattr(torch, record["dtype"] or "", target.dtype))
        found = own_error(new, target, eps, unit, is_gradient=is_gradient)
        look = found.look
        if other is not None and self._is_to_compare(found, target):
            self._compared += 1
            if stale := self._stale(target, record, other, most_rounding(eps)):
                look["stale"] = stale
        if not is_gradient and new.numel() * new.itemsize <= _SCORES_BYTES:
            self._scores = [new, *self._scores[: _SCORES - 1]]
        return {
            **row,
            **as_row(found.profile),
            "size": found.size,
            "odd": found.odd,
            "scale": found.scale,
            "cosine": found.cosine,
            "look": _json(look),
        }

    def _is_to_compare(self, found: OwnError, target: torch.Tensor) -> bool:
        is_large = target.numel() * target.itemsize > _MOST_BYTES
        is_far = found.profile.whole > _STALE_FROM or found.profile.row > _STALE_FROM
        return is_far and not is_large and self._compared < _MOST_STALE

    def _stale(
        self,
        target: torch.Tensor,
        record: ManifestRow,
        other: Callable[[Sequence[int]], torch.Tensor],
        most: float,
    ) -> str:
        """Return which other record a target is, "" where it is none."""
        for rows, name in self._near(record):
            try:
                candidate = other(rows)
            except Exception:
                continue
            if candidate.shape != target.shape:
                continue
            if _is_the_same(candidate, target, 2 * most):
                return name
        return ""

    def _near(self, record: ManifestRow) -> list[tuple[list[int], str]]:
        """Return the rows and the names of records that one could be taken for, nearest first."""
        import polars as pl

        step = record["step"]
        frame = self.frame.with_row_index("row")
        alike = frame.filter(
            pl.col("kind") == record["kind"],
            pl.col("step").is_between(step - 1, step + 1),
            pl.col("dtype") == record["dtype"],
        )
        here = alike.filter(pl.col("rank") == record["rank"])
        tags, found = parse_tags(record["tags"]), []
        for row in rows_of(here.select("seq", "step", "name", "occurrence", "tags", "shape")):
            if row["shape"] != record["shape"] or row["seq"] == record["seq"]:
                continue
            far = _distance(record, tags, row)
            if far is not None:
                found.append((far, row))
        found.sort(key=lambda one: one[0])
        near = []
        for _, row in found[:_MOST_CANDIDATES]:
            same = alike.filter(
                pl.col("step") == row["step"],
                pl.col("name") == row["name"],
                pl.col("occurrence") == row["occurrence"],
                pl.col("tags") == row["tags"],
            )
            about = f"{label(row['name'], row['tags'])} step={row['step']}"
            if row["occurrence"] or record["occurrence"]:
                about += f" occurrence={row['occurrence']}"
            near.append((same["row"].to_list(), about))
        return near


def _is_the_same(one: torch.Tensor, other: torch.Tensor, most: float) -> bool:
    """Whether two tensors of one shape are off by at most so much of their size."""
    size = off = 0.0
    for a, b in zip(*(t.detach().reshape(-1).split(_CHUNK) for t in (one, other)), strict=True):
        if a.is_complex():
            a, b = (torch.view_as_real(t.to(torch.complex128)) for t in (a, b))
        # An infinity on both sides, such as a mask's, says nothing of the rest.
        a, b = (t.to(torch.float64).nan_to_num(0.0, 0.0, 0.0) for t in (a, b))
        size, off = size + float(a.square().sum()), off + float((b - a).square().sum())
        if size and off > 4 * most**2 * size:
            return False
    return size > 0 and off <= most**2 * size


def _distance(record: ManifestRow, tags: Mapping[str, TagValue], row: ManifestRow) -> float | None:
    """Return how far a record is from another that it could be taken for; None beyond that."""
    steps = abs(row["step"] - record["step"])
    times = abs(row["occurrence"] - record["occurrence"])
    if row["name"] != record["name"]:
        is_beside = not steps and not times and row["tags"] == record["tags"]
        return 10 + abs(row["seq"] - record["seq"]) if is_beside else None
    others = parse_tags(row["tags"])
    if others.keys() != tags.keys():
        return None
    total = steps + times
    for tag, value in tags.items():
        other = others[tag]
        if value == other:
            continue
        if not (type(value) is int and type(other) is int):
            return None
        total += abs(value - other)
    return float(total) if total <= 2 else None


def _is_parameter(target: torch.Tensor) -> bool:
    is_one = isinstance(target, torch.nn.Parameter)  # frozen ones and those of integers too
    return is_one or (target.requires_grad and target.is_leaf)


def _digest(tensor: torch.Tensor) -> str:
    import xxhash

    raw = as_bits(tensor.detach()).cpu().contiguous()
    return xxhash.xxh3_128_hexdigest(bytes_of(raw))


def _json(look: Look) -> str | None:
    return json.dumps(look) if look else None
