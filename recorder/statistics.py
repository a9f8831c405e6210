"""Statistics of a payload, gathered chunk by chunk.

`min`, `max`, `mean`, `std` and `l2` are over the finite elements, in float64; `nan_count` and
`inf_count` count the others. `std` is torch's default, the sample standard deviation. Chunks are
combined by the update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances" (1979). A complex tensor has only `l2` and the counts.
"""

from __future__ import annotations

import math

import torch

_CHUNK = 1 << 17  # elements; as float64 they still fit a core's cache


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


def workspace() -> torch.Tensor:
    """Return memory for `Statistics` to work in."""
    return torch.empty(_CHUNK, dtype=torch.float64, device="cpu")


class Statistics:
    """Running statistics of one payload."""

    def __init__(self, dtype: torch.dtype, wide: torch.Tensor) -> None:
        """Begin; `wide` is memory to work in, as `workspace` makes it, for one at a time."""
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

    def add(self, raw: torch.Tensor) -> None:
        """Take in bytes of the payload, a whole number of elements, as a tensor of uint8."""
        flat = raw if self._aligned(raw) else raw.clone()
        values = flat.view(self._dtype)
        if self._dtype.is_complex:
            values = torch.view_as_real(values).flatten()
        for chunk in values.split(_CHUNK):
            self._add_chunk(chunk)

    def _aligned(self, raw: torch.Tensor) -> bool:
        return int(raw.storage_offset()) % self._dtype.itemsize == 0

    def _add_chunk(self, chunk: torch.Tensor) -> None:
        if chunk.numel() == 0:
            return
        if chunk.dtype.itemsize == 1 and chunk.dtype.is_floating_point:
            chunk = chunk.to(torch.float32)  # 8-bit floats convert to few dtypes directly
        x = self._wide[: chunk.numel()].copy_(chunk)  # reused: fresh memory costs page faults
        low, high = (float(v) for v in torch.aminmax(chunk if chunk.dtype in _ORDERED else x))
        if not (math.isfinite(low) and math.isfinite(high)):
            self._nan += int(x.isnan().sum())
            self._inf += int(x.isinf().sum())
            x = x[x.isfinite()]
            if x.numel() == 0:
                return
            low, high = (float(v) for v in torch.aminmax(x))
        n = x.numel()
        mean = float(x.sum()) / n
        apart = x.sub_(mean)
        m2 = float(torch.dot(apart, apart))
        self.count_in(n, low, high, mean, m2)

    def count_in(self, n: int, low: float, high: float, mean: float, m2: float) -> None:
        """Combine with `n` more finite elements; `m2` is the sum of their squares around `mean`."""
        self._min, self._max = min(self._min, low), max(self._max, high)
        total, delta = self._count + n, mean - self._mean
        self._m2 += m2 + delta * delta * self._count * n / total
        self._mean += delta * n / total
        self._squares += m2 + mean * mean * n
        self._count = total

    def result(self) -> dict[str, float | int | None]:
        """Return the statistics by column name; None where they are not defined."""
        some = self._count > 0
        full = some and self._known

        def finite(value: float) -> float | None:
            return value if math.isfinite(value) else None  # squares of huge values overflow

        return {
            "min": self._min if full else None,
            "max": self._max if full else None,
            "mean": finite(self._mean) if full else None,
            "std": finite(math.sqrt(self._m2 / (self._count - 1)))
            if full and self._count > 1
            else None,
            "l2": finite(math.sqrt(self._squares)) if some else None,
            "nan_count": self._nan,
            "inf_count": self._inf,
        }


MANY = _CHUNK // 2
"""The most elements of one payload that `of_many` takes."""


def of_many(
    raw: torch.Tensor, dtype: torch.dtype, wide: torch.Tensor
) -> list[dict[str, float | int | None]]:
    """Return the statistics of many small payloads at once, as `Statistics` gives them.

    Args:
        raw: their bytes, a row each, of shape [payloads, bytes]; rows may be strided.
        dtype: the dtype of all of them.
        wide: memory to work in, as `workspace` makes it.
    """
    values = raw.view(dtype)
    n = values.shape[1]
    each = max(1, _CHUNK // n)
    found: list[dict[str, float | int | None]] = []
    for rows in values.split(each):
        x = wide[: rows.numel()].view(rows.shape).copy_(rows)
        low, high = (v.tolist() for v in torch.aminmax(x, dim=1))
        means = x.mean(dim=1)
        x.sub_(means[:, None])
        m2s = torch.einsum("ij,ij->i", x, x).tolist()
        for i, mean in enumerate(means.tolist()):
            if math.isfinite(low[i]) and math.isfinite(high[i]):
                one = Statistics(dtype, wide)
                one.count_in(n, low[i], high[i], mean, m2s[i])
                found.append(one.result())
            else:
                found.append({})  # to be gathered once `wide` is free again
    for i, result in enumerate(found):
        if not result:
            one = Statistics(dtype, wide)
            one.add(raw[i])
            found[i] = one.result()
    return found


def has_statistics(dtype: torch.dtype) -> bool:
    """Whether torch can compute with this dtype; with sub-byte and other odd ones it cannot."""
    name = str(dtype).removeprefix("torch.")
    return not name.startswith(("bits", "float4", "quint", "qint", "bcomplex")) and name not in {
        f"{sign}int{width}" for sign in ("", "u") for width in range(1, 8)
    }
