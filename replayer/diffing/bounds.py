"""What statistics alone prove of two tensors that are not at hand.

The greatest elements of two tensors are no further apart than some two elements are, and so are the
smallest, the means, and the norms by the root of how many there are (the triangle inequality). Each
is a lower bound of max_abs, and where that is beyond what tolerance gives the largest element, some
element is beyond tolerance.
"""

from __future__ import annotations

import math

import polars as pl
import torch

from recorder.bits import why_not_by_value

from ..measuring.measures import tolerances
from ..rules import allowance

_SLACK = 1e-9  # of the figures compared: they were rounded themselves


def proven(pairs: pl.DataFrame, rtol: float | None, atol: float | None) -> pl.DataFrame:
    """Return what the statistics of records say.

    Args:
        pairs: for each pair of records `shape`, `dtype`, `dtype_b` and the manifest's statistics,
            those of the target with `_b`.
        rtol: relative tolerance; None for torch's for the pair of dtypes.
        atol: absolute tolerance, likewise.

    Returns:
        `at_least`, a lower bound of max_abs, and `beyond`, whether an element is beyond tolerance
        for certain; null and false where there are no statistics.
    """
    kinds = pairs.select("dtype", "dtype_b").unique(maintain_order=True)
    dtypes = [(_dtype(a), _dtype(b)) for a, b in kinds.iter_rows()]
    usual = [tolerances(*pair) for pair in dtypes]
    table = kinds.with_columns(
        pl.Series("rtol", [r if rtol is None else rtol for r, _ in usual], pl.Float64),
        pl.Series("atol", [a if atol is None else atol for _, a in usual], pl.Float64),
        pl.Series("each", [allowance(r).element for r, _ in usual], pl.Float64),
        pl.Series("by_value", [not why_not_by_value(*pair) for pair in dtypes], pl.Boolean),
    )
    joined = pairs.join(
        table, on=["dtype", "dtype_b"], how="left", nulls_equal=True, maintain_order="left"
    )
    joined = joined.with_columns(n=numel_of(joined["shape"]).cast(pl.Float64))
    n = pl.col("n")
    size = pl.max_horizontal(pl.col("min").abs(), pl.col("max").abs())
    root = n.sqrt()
    apart = [
        (pl.col(name) - pl.col(f"{name}_b")).abs() / (root if name == "l2" else 1.0)
        for name in ("min", "max", "mean", "l2")
    ]
    rms = pl.col("l2") / root
    finite = (
        (pl.col("nan_count") == 0)
        & (pl.col("inf_count") == 0)
        & (pl.col("nan_count_b") == 0)
        & (pl.col("inf_count_b") == 0)
    ).fill_null(False)
    odd = (
        (pl.col("nan_count") != pl.col("nan_count_b"))
        | (pl.col("inf_count") != pl.col("inf_count_b"))
    ).fill_null(False)
    most = pl.max_horizontal(size, pl.col("min_b").abs(), pl.col("max_b").abs())
    least = (pl.max_horizontal(*apart) - _SLACK * most).clip(lower_bound=0.0)
    rounding = pl.col("each") * rms if rtol is None and atol is None else pl.lit(0.0)
    beyond = least > pl.col("atol") + pl.col("rtol") * size + rounding
    known = pl.col("by_value")
    return joined.select(
        at_least=pl.when(finite & known).then(least),
        beyond=((beyond.fill_null(False) & finite) | odd) & known,
    )


def numel_of(shapes: pl.Series) -> pl.Series:
    """Return how many elements tensors of some shapes have; 1 where there is no shape."""
    known = shapes.unique().alias("shape").to_frame()
    sizes = [math.prod(shape or ()) for shape in known["shape"].to_list()]
    capped = pl.Series("n", [min(size, (1 << 62)) for size in sizes], pl.Int64)
    table = known.with_columns(capped)
    frame = shapes.alias("shape").to_frame()
    return frame.join(table, on="shape", how="left", nulls_equal=True, maintain_order="left")["n"]


def _dtype(name: str | None) -> torch.dtype:
    found = getattr(torch, name or "", None)
    return found if isinstance(found, torch.dtype) else torch.uint8
