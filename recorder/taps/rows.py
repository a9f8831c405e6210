"""Ids of rows as they are given: for the names of one dim, or of several that have them together.

Nothing is looked at before a session asks: then `Ids.taken` copies them to the host, once for all
taps that share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import BadRows, UsageError
from ..tokens.taken import Taken

_MOST_NUMBERS = 64  # that make one id
_KEPT = object()
"""Stands for ids that nobody can write to."""


class Ids:
    """The ids along one dim, or along several together.

    Attributes:
        names: of the dims, in the order of the ids' own.
        of: the ids, or a callable that returns them, which is called once.
        at_tap: whether they were given at the tap itself, for dims that it has to have.
        block: the dims of all ids that were given with them to one block; () at a tap.
    """

    __slots__ = ("_given", "_taken", "_version", "at_tap", "block", "names", "of")

    def __init__(
        self,
        names: tuple[str, ...],
        of: Any,
        *,
        at_tap: bool = False,
        block: tuple[tuple[str, ...], ...] = (),
    ) -> None:
        self.names = names
        self.of = of
        self.at_tap = at_tap
        self.block = block
        self._given: Any = None
        self._taken: Taken | None = None
        self._version: int | None = -1

    @classmethod
    def given(cls, mapping: Mapping[str, Any], *, at_tap: bool = False) -> tuple[Ids, ...]:
        """Return what `rows`, or a tap, was given.

        Raises:
            UsageError: no dims are named, or one twice.
        """
        if not isinstance(mapping, Mapping):
            raise UsageError(
                f"rows is a {type(mapping).__name__}, expected dims and their ids, as in "
                "rows={'t': ids}"
            )
        found = tuple(cls(_names(key), value, at_tap=at_tap) for key, value in mapping.items())
        every = [name for one in found for name in one.names]
        if not found:
            raise UsageError("rows names no dim; write rows(t=ids) or rows({'b s': ids})")
        if len({*every}) < len(every):
            twice = next(name for name in every if every.count(name) > 1)
            raise UsageError(f"rows names the dim {twice!r} twice; give its ids once")
        return found

    @classmethod
    def of_taken(cls, taken: Taken, *, at_tap: bool = False) -> Ids:
        """Return ids that are known."""
        made = cls(taken.names, None, at_tap=at_tap)
        made._taken, made._given, made._version = taken, _KEPT, _version(_KEPT)
        return made

    def taken(self) -> Taken:
        """Return the ids, as they are when first asked for, or since they were last written to.

        Raises:
            BadRows: they are no integers, or not one dim for each name, or the callable failed.
        """
        if self._given is None:
            self._given = self._called() if callable(self.of) else self.of
        version = _version(self._given)
        if self._taken is None or version is None or version != self._version:
            taken = _taken(self.names, self._given)
            if self._taken is None or not self._taken.equals(taken):
                self._taken = taken
            self._version = version
        return self._taken

    def _called(self) -> Any:
        try:
            return self.of()
        except Exception as err:
            label = " ".join(self.names)
            fact = (
                f"the callable of the ids of rows along {label} raised {type(err).__name__}: {err}"
            )
            raise BadRows(fact, "give ids, or a callable that returns them there") from err

    def kept(self) -> Ids:
        """Return these ids as they are now, whatever the job does to them.

        Raises:
            BadRows: as `taken`.
        """
        return Ids.of_taken(self.taken(), at_tap=self.at_tap)


def check_meant(ids: Iterable[Ids], names: Iterable[tuple[str, ...]], dims: str) -> None:
    """Refuse ids that a tap was given for dims that it does not have.

    Args:
        ids: those that hold for it.
        names: for each of these that its dims have, the names in alphabetical order.
        dims: its layout as declared.

    Raises:
        BadRows: there are such.
    """
    known = {*names}
    for one in ids:
        if one.at_tap and tuple(sorted(one.names)) not in known:
            named = f"its dims are {dims!r:.200}" if dims else "it declares no dims"
            raise BadRows(
                f"it was given rows along {' '.join(one.names)}, and {named}",
                "name the dims that have these rows in both",
            )


def over(outer: tuple[Ids, ...], new: tuple[Ids, ...]) -> tuple[Ids, ...]:
    """Return what holds where `new` stands inside `outer`: a dim's innermost ids."""
    named = {name for one in new for name in one.names}
    return (*(one for one in outer if named.isdisjoint(one.names)), *new)


def _names(key: Any) -> tuple[str, ...]:
    """Return the dims that a key names: `t`, `b s`, or `(b*s)`."""
    # In words that the compiler follows, where a block is in what it traces.
    words = key.strip().strip("()").replace("*", " ").split() if isinstance(key, str) else []
    if not words or not all(word.isidentifier() for word in words):
        raise UsageError(
            f"rows names the dims {key!r:.80}; expected the name of a dim, as in rows(t=ids), or "
            "of several that have their ids together, as in rows({'b s': ids})"
        )
    return tuple(words)


def as_they_are(ids: tuple[Ids, ...]) -> tuple[Ids, ...]:
    """Return ids as they are now, for what comes to them later; as given where that cannot be."""
    try:
        return tuple(one.kept() for one in ids)
    except BadRows:  # which whoever takes them will say
        return ids


def _version(given: Any) -> int | None:
    """Return what changes when ids are written to; None where nothing tells."""
    if given is _KEPT:
        return 0
    try:
        return int(given._version)
    except (AttributeError, RuntimeError):  # a list, or a tensor made in inference mode
        return None


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
            raise BadRows(
                f"the ids of rows along {label} cannot be read: {err}", "give a tensor of integers"
            ) from None
        is_whole = not (ids.dtype.is_floating_point or ids.dtype.is_complex)
        if ids.numel() and (not is_whole or ids.dtype == torch.bool):
            raise BadRows(
                f"the ids of rows along {label} are {ids.dtype}, expected integers",
                "recorder.token_rows makes them from tokens",
            )
        if ids.dim() not in (len(names), len(names) + 1):
            raise BadRows(
                f"the ids of rows along {label} have the shape {list(ids.shape)}",
                "give one dim for each name, and one more where several numbers are an id",
            )
        if ids.dim() > len(names) and not 1 <= ids.shape[-1] <= _MOST_NUMBERS:
            raise BadRows(
                f"the ids of rows along {label} are of {ids.shape[-1]} numbers each",
                f"give 1 to {_MOST_NUMBERS}",
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
