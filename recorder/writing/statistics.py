"""Statistics of payloads, gathered in few, long steps that leave the interpreter to the job.

`min`, `max`, `mean`, `std` and `l2` are over the finite elements, in float64; `nan_count` and
`inf_count` count the others. `std` is torch's default, the sample standard deviation. Chunks are
combined by the update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances" (1979). A complex tensor has only `l2` and the counts.
"""

from __future__ import annotations

import math

import torch

from ..scripting import scripted

CHUNK = 1 << 19
"""The most elements whose moments are one."""
AT_ONCE = (1 << 15) - 64
"""The most elements worked on at once: as float64 they fit a core's second-level cache, and are too
few for torch to take more threads, which are the job's. So does `dot`, of however few."""

# aminmax takes these as they are, and then needs not read twice as many bytes.
_ORDERED = {
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
}
_CANCELLED = 1e-6  # of the squares; what is left of 53 bits below that is too little


def _moments(values: torch.Tensor, wide: torch.Tensor, step: int, ordered: bool) -> torch.Tensor:
    found = []
    for chunk in values.split(wide.numel()):
        lows = []
        highs = []
        sums = []
        norms = []
        for part in chunk.split(step):
            x = wide.narrow(0, 0, part.numel())
            x.copy_(part)
            if ordered:
                low, high = torch.aminmax(part)
            else:
                low, high = torch.aminmax(x)
            lows.append(low)
            highs.append(high)
            sums.append(x.sum())
            norms.append(torch.linalg.vector_norm(x, 2.0))
        found.append(torch.stack(lows).amin().double())
        found.append(torch.stack(highs).amax().double())
        found.append(torch.stack(sums).sum())
        found.append(torch.stack(norms).square_().sum())
    return torch.stack(found).view(-1, 4).t()


def _moments_of_rows(rows: torch.Tensor, wide: torch.Tensor, ordered: bool) -> torch.Tensor:
    x = wide.narrow(0, 0, rows.numel()).view(rows.shape)
    x.copy_(rows)
    y = rows if ordered else x
    low, high = torch.amin(y, dim=1), torch.amax(y, dim=1)
    sums = x.sum(dim=1)
    squares = torch.linalg.vector_norm(x, 2.0, dim=1).square()
    return torch.stack([low.double(), high.double(), sums, squares])


_moments = scripted(_moments)
_moments_of_rows = scripted(_moments_of_rows)


def workspace() -> torch.Tensor:
    """Return memory to work in."""
    return torch.empty(CHUNK, dtype=torch.float64, device="cpu")


class Statistics:
    """Running statistics of one payload.

    Args:
        dtype: of its elements.
        wide: memory to work in, as `workspace` makes it, for one at a time.
    """

    def __init__(self, dtype: torch.dtype, wide: torch.Tensor) -> None:
        self._dtype = dtype
        self._wide = wide
        self._known = not dtype.is_complex
        self._count = 0
        self._mean = 0.0
        self._m2 = 0.0
        self._squares = 0.0
        self._min = math.inf
        self._max = -math.inf
        self._nan = 0
        self._inf = 0
        self._scale = 1.0  # of mean, m2 and squares: those of huge and tiny values leave float64
        self._top = 0.0

    def add(self, raw: torch.Tensor) -> None:
        """Take in bytes of the payload, a whole number of elements, as a tensor of uint8."""
        if raw.numel() == 0:
            return
        aligned = int(raw.storage_offset()) % self._dtype.itemsize == 0
        values = (raw if aligned else raw.clone()).view(self._dtype)
        if self._dtype.is_complex:
            values = torch.view_as_real(values).flatten()
        values = _convertible(values)
        chunks = values.split(CHUNK)
        moments = _moments(values, self._wide, AT_ONCE, values.dtype in _ORDERED)
        for chunk, low, high, total, squares in zip(chunks, *moments.tolist(), strict=True):
            n = chunk.numel()
            top = max(abs(low), abs(high))
            if not math.isfinite(top):
                self._add_finite(chunk)
            elif not _is_ordinary(top) or _is_cancelled(n, total, squares):
                self._add_centred(self._wide[:n].copy_(chunk), low, high)
            else:
                mean = total / n
                self._combine(n, low, high, mean, squares - total * mean)

    def _add_finite(self, chunk: torch.Tensor) -> None:
        """Count what is not finite in a chunk, and take in the rest."""
        x = self._wide[: chunk.numel()].copy_(chunk)
        self._nan += int(x.isnan().sum())
        self._inf += int(x.isinf().sum())
        x = x[x.isfinite()]
        if x.numel():
            low, high = (float(v) for v in torch.aminmax(x))
            self._add_centred(x, low, high)

    def _add_centred(self, x: torch.Tensor, low: float, high: float) -> None:
        """Take in float64 values by their distances from their mean; changes them."""
        n = x.numel()
        scale = 1.0
        top = max(abs(low), abs(high))
        if not _is_ordinary(top):
            scale = _scale_of(top)
            x.mul_(scale)
        mean = float(x.sum()) / n
        x.sub_(mean)
        self._combine(n, low, high, mean, float(torch.dot(x, x)), scale)

    def _combine(
        self, n: int, low: float, high: float, mean: float, m2: float, scale: float = 1.0
    ) -> None:
        self._min, self._max = min(self._min, low), max(self._max, high)
        top = max(abs(low), abs(high))
        if top > self._top:
            self._top = top
            self._rescale(1.0 if _is_ordinary(top) else _scale_of(top))
        factor = self._scale / scale
        mean, m2 = mean * factor, m2 * factor * factor
        total, delta = self._count + n, mean - self._mean
        self._m2 += m2 + delta * delta * self._count * n / total
        self._mean += delta * n / total
        self._squares += m2 + mean * mean * n
        self._count = total

    def _rescale(self, scale: float) -> None:
        factor, self._scale = scale / self._scale, scale
        if factor != 1.0 and self._count:
            self._mean *= factor
            self._m2 *= factor * factor
            self._squares *= factor * factor

    def result(self) -> dict[str, float | int | None]:
        """Return the statistics by column name; None where they are not defined."""
        some, scale = self._count > 0, self._scale
        deviation = _deviation(self._m2, self._count)
        full = some and self._known
        return {
            "min": self._min if full else None,
            "max": self._max if full else None,
            "mean": _finite(self._mean / scale) if full else None,
            "std": _finite(deviation / scale) if full and deviation is not None else None,
            "l2": _finite(math.sqrt(self._squares) / scale) if some else None,
            "nan_count": self._nan,
            "inf_count": self._inf,
        }


def of_many(
    raw: torch.Tensor, dtype: torch.dtype, wide: torch.Tensor
) -> list[dict[str, float | int | None]]:
    """Return the statistics of many payloads of one size at once, as `Statistics` gives them.

    Args:
        raw: their bytes, a row each, of shape [payloads, bytes]; rows may be strided. No more than
            `AT_ONCE` elements.
        dtype: the dtype of all of them; not complex.
        wide: memory to work in, as `workspace` makes it.
    """
    values = _convertible(raw.view(dtype))
    n = values.shape[1]
    moments = _moments_of_rows(values, wide, values.dtype in _ORDERED)
    found: list[dict[str, float | int | None]] = []
    for i, (low, high, total, squares) in enumerate(zip(*moments.tolist(), strict=True)):
        if not _is_ordinary(max(abs(low), abs(high))) or _is_cancelled(n, total, squares):
            one = Statistics(dtype, wide)
            one.add(raw[i])
            found.append(one.result())
            continue
        mean = total / n
        found.append(
            {
                "min": low,
                "max": high,
                "mean": mean,
                "std": _deviation(squares - total * mean, n),
                "l2": _finite(math.sqrt(squares)),
                "nan_count": 0,
                "inf_count": 0,
            }
        )
    return found


def _is_ordinary(top: float) -> bool:
    """Whether squares of values up to `top` stay well inside float64."""
    return top == 0.0 or 1e-140 < top < 1e140


def _is_cancelled(n: int, total: float, squares: float) -> bool:
    """Whether too few digits of the deviation are left in the difference of two sums."""
    return bool(squares) and not n * squares - total * total > _CANCELLED * n * squares


def _scale_of(top: float) -> float:
    """Return the power of two that brings `top` near 1."""
    return math.ldexp(1.0, max(-1000, min(1000, -math.frexp(top)[1])))


def _convertible(values: torch.Tensor) -> torch.Tensor:
    """Return 8-bit floats as float32: they convert to few dtypes directly."""
    if values.dtype.itemsize == 1 and values.dtype.is_floating_point:
        return values.to(torch.float32)
    return values


def _deviation(m2: float, count: int) -> float | None:
    return _finite(math.sqrt(max(m2, 0.0) / (count - 1))) if count > 1 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # squares of huge values overflow
