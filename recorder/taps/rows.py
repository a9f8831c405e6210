"""Ids of rows as they are given: for the names of one dim, or of several that have them together.

Nothing is looked at before a session asks: then `Ids.taken` copies them to the host, once for all
taps that share them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import LayoutError, UsageError
from ..tokens.taken import Taken

_MOST_NUMBERS = 64  # that make one id


class Ids:
    """The ids along one dim, or along several together.

    Attributes:
        names: of the dims, in the order of the ids' own.
        of: the ids, or a callable that returns them.
    """

    __slots__ = ("_taken", "_version", "names", "of")

    def __init__(self, names: tuple[str, ...], of: Any) -> None:
        self.names = names
        self.of = of
        self._taken: Taken | None = None
        self._version = -1

    @classmethod
    def given(cls, mapping: Mapping[str, Any]) -> tuple[Ids, ...]:
        """Return what `rows` was given.

        Raises:
            UsageError: no dims are named, or one twice.
        """
        found = tuple(cls(_names(key), value) for key, value in mapping.items())
        every = [name for one in found for name in one.names]
        if not found:
            raise UsageError("rows names no dim; write rows(t=ids) or rows({'b s': ids})")
        if len({*every}) < len(every):
            twice = next(name for name in every if every.count(name) > 1)
            raise UsageError(f"rows names the dim {twice!r} twice; give its ids once")
        return found

    def taken(self) -> Taken:
        """Return the ids, as they are when first asked for, or since they were last written to.

        Raises:
            LayoutError: they are no integers, or not one dim for each name.
        """
        version = _version(self.of)
        if self._taken is None or version != self._version:
            of = self.of() if callable(self.of) else self.of
            self._taken, self._version = _taken(self.names, of), version
        return self._taken

    def kept(self) -> Ids:
        """Return these ids as they are now, whatever the job does to them.

        Raises:
            LayoutError: as `taken`.
        """
        found = Ids(self.names, None)
        found._taken, found._version = self.taken(), _version(None)
        return found


def over(outer: tuple[Ids, ...], new: tuple[Ids, ...]) -> tuple[Ids, ...]:
    """Return what holds where `new` stands inside `outer`: a dim's innermost ids."""
    named = {name for one in new for name in one.names}
    return (*(one for one in outer if named.isdisjoint(one.names)), *new)


def _names(key: Any) -> tuple[str, ...]:
    """Return the dims that a key names: `t`, `b s`, or `(b*s)`."""
    words = re.split(r"[\s*]+", key.strip().strip("()").strip()) if isinstance(key, str) else []
    if not words or not all(word.isidentifier() for word in words):
        raise UsageError(
            f"rows names the dims {key!r:.80}; expected the name of a dim, as in rows(t=ids), or "
            "of several that have their ids together, as in rows({'b s': ids})"
        )
    return tuple(words)


def _version(given: Any) -> int:
    """Return what changes when a tensor is written to."""
    try:
        return int(given._version)
    except (AttributeError, RuntimeError):  # no tensor, or one made in inference mode
        return 0


def _taken(names: tuple[str, ...], given: Any) -> Taken:
    import torch

    from ..bits import plainly
    from ..capture import local_part
    from ..tokens.known import known_of

    label = " ".join(names)
    with plainly(), torch.no_grad():
        try:
            if isinstance(given, torch.Tensor):
                ids = local_part(given)[0].detach()
            else:
                ids = torch.as_tensor(given, device="cpu")
        except Exception as err:
            raise LayoutError(f"the ids of rows along {label} cannot be read: {err}") from None
        is_whole = not (ids.dtype.is_floating_point or ids.dtype.is_complex)
        if ids.numel() and (not is_whole or ids.dtype == torch.bool):
            raise LayoutError(
                f"the ids of rows along {label} are {ids.dtype}, expected integers; "
                "recorder.token_rows makes them from tokens"
            )
        if ids.dim() not in (len(names), len(names) + 1):
            raise LayoutError(
                f"the ids of rows along {label} have the shape {list(ids.shape)}, expected one dim "
                "for each name, and one more where several numbers are an id"
            )
        if ids.dim() > len(names) and not 1 <= ids.shape[-1] <= _MOST_NUMBERS:
            raise LayoutError(
                f"the ids of rows along {label} are of {ids.shape[-1]} numbers each, expected 1 to "
                f"{_MOST_NUMBERS}"
            )
        if ids.dim() > len(names) and ids.shape[-1] == 1:
            ids = ids.squeeze(-1)
        known = known_of(given) if isinstance(given, torch.Tensor) else None
        facts = None
        if known is not None and known.positions.shape == ids.shape:
            facts = torch.stack([known.positions.cpu(), known.tokens.cpu()], -1)
        order = sorted(range(len(names)), key=lambda i: names[i])
        rest = list(range(len(names), ids.dim()))
        copy = torch.empty([ids.shape[i] for i in (*order, *rest)], dtype=torch.int64, device="cpu")
        copy.copy_(ids.permute([*order, *rest]))
        if facts is not None:
            facts = facts.permute([*order, len(names)]).reshape(-1, 2).to(torch.int64)
        return Taken(tuple(names[i] for i in order), copy, facts)
