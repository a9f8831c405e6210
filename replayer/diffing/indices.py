"""Rows for each index of a dim: a head, an expert, a token."""

from __future__ import annotations

import re
from collections.abc import Sequence

from recorder.layouts.dims import TOKENS

from ..measuring.by import measure_rows
from ..measuring.measures import Measures
from ..pairing.tensors import Two
from .columns import DiffRow, row_of

MOST_INDICES = 1 << 20
"""Of a dim, that get rows of their own."""


def dims_called(name: str, dim_names: Sequence[str]) -> int | None:
    """Return which dim a name means: its label, or its number, from the end where below 0."""
    if name in dim_names:
        return list(dim_names).index(name)
    if name in ("b", "s") and TOKENS in dim_names:  # what they became without their padding
        return list(dim_names).index(TOKENS)
    if re.fullmatch("-?[0-9]{1,3}", name) and -len(dim_names) <= int(name) < len(dim_names):
        return int(name) % len(dim_names)
    return None


def rows_of_index(two: Two, name: str, found: Measures, whole: DiffRow) -> list[DiffRow]:
    """Return a row for each index of the dim that a name means, none where it means none."""
    dim = dims_called(name, two.dim_names)
    if dim is None or two.a.shape[dim] > MOST_INDICES:
        return []
    figures = measure_rows(two.a, two.b, (dim,), found.rtol, found.atol)
    size = two.a.shape[dim]
    numel = two.a.numel() // max(1, size)
    rows = []
    for i in range(size if figures else 0):
        about: DiffRow = {
            "by": name if name.lstrip("-").isdecimal() else two.dim_names[dim],
            "index": i,
            "numel": numel,
            "rtol": found.rtol,
            "atol": found.atol,
            "bitwise": not figures["changed"][i],
            "ranks_a": whole["ranks_a"],
            "ranks_b": whole["ranks_b"],
            "dim_names": whole["dim_names"],
            "shape_a": whole["shape_a"],
        }
        rows.append(row_of({key: values[i] for key, values in figures.items()}, about))
    return rows
