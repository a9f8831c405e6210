"""What the page of a diff shows: its rows, and of the worst tensors a closer look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
import torch

from recorder.bits import has_statistics
from recorder.commands.tables import shape_text
from recorder.format.rows import parse_tags
from recorder.recording import Recording
from recorder.tags import label

from ..diffing.columns import OUTCOMES, DiffRow, rows_of
from ..diffing.diff import Diff, worst_first
from ..measuring.by import measure_rows
from ..measuring.elements import as_numbers
from ..pairing.tensors import Two
from .lines import findings, rows_by, shape_of_error
from .output import written
from .page import render

MOST_ROWS = 20_000
DETAILS = 12
CELLS = 512
BARS = 48
_SAMPLE = 1 << 22
_PLAIN = (
    "name", "step", "rank", "occurrence", "kind", "outcome", "numel", "changed", "mismatched",
    "max_abs", "mean_abs", "rel_diff", "cosine", "p50", "p99", "p999", "max_ulp", "bias",
    "times_floor", "ranks_differ", "message", "reordered", "grafted",
)  # fmt: skip


_MADE = ("label", "layer", "dtype", "shape", "nan", "inf", "where")


PageData = dict[str, Any]
"""What goes to the page, as JSON; `page.js` says what it reads of it."""


def write_page(diff: Diff, path: Path) -> None:
    """Write the page to a file; see `output.written`."""
    text = render(page_data(diff))
    written(path, lambda spare: spare.write_text(text, encoding="utf-8"))


def page_data(diff: Diff) -> PageData:
    """Return all that the page shows, ready for JSON."""
    table = diff.pairs.with_row_index("_at")
    left_out = max(0, table.height - MOST_ROWS)
    if left_out:  # equal ones go first
        kept = table.sort(pl.col("outcome") == "equal", maintain_order=True).head(MOST_ROWS)
        table = kept.sort("_at")
    places = {at: i for i, at in enumerate(table["_at"].to_list())}
    rows = [_row(row) for row in rows_of(table)]
    names = list(rows[0]) if rows else [*_PLAIN, *_MADE]
    worst = dict(zip(worst_first(table)["_at"].to_list(), range(table.height), strict=True))
    firsts = dict(zip(table["first"].to_list(), range(table.height), strict=True))
    return {
        "version": metadata.version("tensorgraft"),
        "a": _about(diff.a),
        "b": _about(diff.b),
        "floor": list(diff.floors),
        "rules": diff.rules.words(),
        "lines": [*findings(diff), *diff.notes, *filter(None, [diff.why_nothing])],
        "counts": {**diff.counts(), "reordered": int(diff.pairs["reordered"].sum() or 0)},
        "first": {how: firsts.get(how, firsts.get("both")) for how in ("bitwise", "tolerance")},
        "outcomes": list(OUTCOMES),
        "rows": {
            **{name: [row[name] for row in rows] for name in names},
            "worst": [worst[at] for at in table["_at"].to_list()],
        },
        "left_out": left_out,
        "details": [{"row": places[at], **detail} for at, detail in _details(diff) if at in places],
    }


def _about(run: Recording) -> PageData:
    return {
        "path": str(run.path),
        "ranks": run.world_size,
        "records": run.latest().height,
        "command": " ".join(map(str, run.meta.get("command") or [])),
    }


def _row(row: DiffRow) -> PageData:
    tags = {} if row["tags"] is None else parse_tags(row["tags"])
    layer = tags.get("layer")
    shapes = [shape for shape in (row["shape_a"], row["shape_b"]) if shape is not None]
    dtypes = [dtype for dtype in (row["dtype_a"], row["dtype_b"]) if dtype is not None]
    known: Mapping[str, Any] = row
    made = {name: _plain(known[name]) for name in _PLAIN}
    return {
        **made,
        "label": label(row["name"], tags),
        "layer": layer if isinstance(layer, int) and not isinstance(layer, bool) else None,
        "dtype": " / ".join(dict.fromkeys(dtypes)),
        "shape": " / ".join(dict.fromkeys(map(shape_text, shapes))),
        "nan": (row["nan_a"] or 0) + (row["nan_b"] or 0),
        "inf": (row["inf_a"] or 0) + (row["inf_b"] or 0),
        "where": _where(row),
        "message": "; ".join(filter(None, [shape_of_error(row), row["message"]])),
        "ranks_differ": row["ranks_differ"] or [],
    }


def _where(row: DiffRow) -> str:
    if row["max_abs_a"] is None:
        return ""
    at = f"{row['max_abs_at']}: " if row["max_abs_at"] is not None else ""
    return f"{at}{row['max_abs_a']:.6g} in A, {row['max_abs_b']:.6g} in B"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _details(diff: Diff) -> Iterator[tuple[int, PageData]]:
    """Yield the places of the worst rows that were measured, with a closer look at each."""
    detail = diff.table.filter(pl.col("by").is_not_null())
    at = diff.pairs.with_row_index("_at").select("_at", "pair", "ranks_a", "ranks_b")
    shown = 0
    for row in rows_of(diff.worst().filter(pl.col("changed") > 0)):
        two = diff.tensors(row)
        if two is None:
            continue
        yield (
            rows_by(at, row)["_at"][0],
            {
                "strip": _strip(two, row),
                "histogram": _histogram(two),
                "by": _by(rows_by(detail, row)),
            },
        )
        shown += 1
        if shown == DETAILS:
            return


def _strip(two: Two, row: DiffRow) -> PageData | None:
    """Return the difference position by position; several to a cell where there are many."""
    dims = _positions(two)
    if not (dims and two.a.numel() and has_statistics(two.a.dtype) and has_statistics(two.b.dtype)):
        return None
    rest = [i for i in range(two.a.dim()) if i not in dims]
    size = math.prod(two.a.shape[i] for i in dims)
    one, other = (t.permute([*dims, *rest]).reshape(size, -1) for t in (two.a, two.b))
    each = -(-size // CELLS)
    cells = [
        measure_rows(one[i : i + each], other[i : i + each], (), row["rtol"], row["atol"])
        for i in range(0, size, each)
    ]
    return {
        "what": " ".join(two.dim_names[i] for i in dims),
        "size": size,
        "per_cell": each,
        **{name: [cell[name][0] for cell in cells] for name in ("max_abs", "rel_diff")},
    }


def _positions(two: Two) -> tuple[int, ...]:
    """Return the dims that tell tokens apart: `t`, or `b` and `s`; else all but the last."""
    named = tuple(i for i, name in enumerate(two.dim_names) if name in ("t", "b", "s"))
    if named:
        return named
    return tuple(range(max(1, two.a.dim() - 1))) if two.a.dim() else ()


def _histogram(two: Two) -> PageData | None:
    """Return how the values of both sides are spread, over one scale."""
    found = []
    for tensor in (two.a, two.b):
        if not has_statistics(tensor.dtype) or tensor.is_complex():
            return None
        flat = tensor.reshape(-1)
        values = as_numbers(flat[:: -(-flat.numel() // _SAMPLE) or 1]).to(torch.float64)
        found.append(values[values.isfinite()])
    if not all(values.numel() for values in found):
        return None
    low = min(float(values.min()) for values in found)
    high = max(float(values.max()) for values in found)
    if not (math.isfinite(high - low) and high > low):
        return None
    counts = [torch.histc(values, BARS, low, high).to(torch.int64).tolist() for values in found]
    return {"low": low, "high": high, "a": counts[0], "b": counts[1]}


def _by(rows: pl.DataFrame) -> PageData | None:
    if not rows.height:
        return None
    most = rows.sort("rel_diff", descending=True, nulls_last=True).head(CELLS).sort("index")
    names = ("index", "max_abs", "rel_diff", "outcome")
    return {
        "dim": rows["by"][0],
        "rows": [{name: _plain(row[name]) for name in names} for row in most.iter_rows(named=True)],
    }
