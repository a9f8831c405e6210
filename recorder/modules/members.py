"""The way from a module's call to a value in it: into tuples, dicts and dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..paths import Place

_MOST = 12  # names in a message
_parameters: dict[Any, tuple[str, ...]] = {}


class Absent(Exception):
    """What a place names is not there; the reason as one clause.

    Attributes:
        reason: as one clause.
        is_quiet: whether that may be so from call to call, as where a norm gives one tensor or two.
    """

    def __init__(self, reason: str, is_quiet: bool = False) -> None:
        # No more than this: the compiler follows it.
        self.reason, self.is_quiet = reason, is_quiet

    def __str__(self) -> str:
        return self.reason


class Call:
    """One call of a module, or of a function in it.

    Attributes:
        args: by position.
        kwargs: by name.
        output: what came of it; None while it runs.
    """

    __slots__ = ("_signature_of", "args", "kwargs", "output")

    def __init__(
        self, signature_of: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        self._signature_of = signature_of
        self.args, self.kwargs, self.output = args, kwargs, output

    def value(self, place: Place) -> Any:
        """Return the tensor, or the plain value, that a place names.

        Raises:
            Absent: there is none.
        """
        if place.side == "parameter":
            return _attribute(self._signature_of, place.members)
        found, members = self.output, place.members
        if place.side == "input":
            found, members = self._input(members)
        where = str(place)
        for number, member in enumerate(members):
            found = _member(found, member, where, is_first=number == 0)
        return found if _is_one(found) else _only_one(found, where)

    def all(self, side: str) -> dict[tuple[str, ...], torch.Tensor]:
        """Return every tensor of an output or input, by the members that lead to it."""
        found: dict[tuple[str, ...], torch.Tensor] = {}
        if side == "output":
            _gather(self.output, (), found)
        for name, one in (*enumerate(self.args), *self.kwargs.items()) if side == "input" else ():
            _gather(one, (str(name),), found)
        return found

    def _input(self, members: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
        """Return what an input's place begins at, and what is left of its members."""
        if not members:
            if self.args and isinstance(self.args[0], torch.Tensor):
                return self.args[0], ()
            tensors = {n: v for n, v in self.kwargs.items() if isinstance(v, torch.Tensor)}
            if not self.args and len(tensors) == 1:
                return next(iter(tensors.values())), ()
            names = [*(str(i) for i in range(len(self.args))), *self.kwargs]
            raise Absent(
                f"it is called with {_named(names)}; say which, as in {_say('input', names)}"
            )
        first, rest = members[0], members[1:]
        if first in self.kwargs:
            return self.kwargs[first], rest
        taken = parameters_of(self._signature_of)
        if first.isdigit():
            position = int(first)
            if position < len(self.args):
                return self.args[position], rest
            if position < len(taken) and taken[position] in self.kwargs:
                return self.kwargs[taken[position]], rest
        elif first in taken and taken.index(first) < len(self.args):
            return self.args[taken.index(first)], rest
        known = [*(str(i) for i in range(len(self.args))), *self.kwargs]
        raise Absent(f"it is called with {_named(known)}, and not with {first!r}")


def _attribute(module: Any, members: tuple[str, ...]) -> Any:
    holder = module
    for member in members[:-1]:
        holder = holder._modules.get(member)
        if holder is None:
            raise Absent(f"it has no module {member!r}")
    # Not by getattr: what is computed as it is asked for, such as a spectral norm's weight, may
    # change by that, and a graft would go to what is computed and not to what is kept.
    found = {**holder._parameters, **holder._buffers}.get(members[-1])
    if found is None:
        names = [name for name, _ in module.named_parameters()]
        known = f"its parameters are {_named(names)}" if names else "it has no parameters"
        raise Absent(f"it has no {'.'.join(members)!r}; {known}")
    return found


def _member(value: Any, member: str, where: str, *, is_first: bool) -> Any:
    """Return a member of a container; of a bare tensor, 0 is the tensor and all others absent."""
    if isinstance(value, torch.Tensor):
        if member == "0" and is_first:
            return value
        raise Absent(f"it gives one tensor, which has no {member!r}", is_quiet=member.isdigit())
    if isinstance(value, Mapping):
        for key in value:
            if str(key) == member:
                return value[key]
        if member.isdigit() and int(member) < len(value):
            return list(value.values())[int(member)]
        raise Absent(f"{where}: there is {_named(list(map(str, value)))}, and no {member!r}")
    if isinstance(value, (tuple, list)):
        if member.isdigit():
            if int(member) < len(value):
                return value[int(member)]
            raise Absent(f"{where}: there are {len(value)}, from 0, and no {member!r}")
        if member not in getattr(value, "_fields", ()):
            raise Absent(f"{where}: it is a {type(value).__name__} of {len(value)}; give a number")
        return getattr(value, member)
    if value is None:
        raise Absent(f"{where}: it gives nothing", is_quiet=True)
    names = [one.name for one in dataclasses.fields(value)] if _is_data(value) else []
    if names and member.isdigit() and int(member) < len(names):
        member = names[int(member)]
    try:
        return getattr(value, member)
    except AttributeError:
        known = f" with {_named(names)}" if names else ""
        raise Absent(
            f"{where}: it is a {type(value).__name__}{known}, without {member!r}"
        ) from None


def _only_one(value: Any, where: str) -> Any:
    """Return the one tensor of a container.

    Raises:
        Absent: there is none, or several.
    """
    found: dict[tuple[str, ...], torch.Tensor] = {}
    _gather(value, (), found)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        names = [".".join((where, *members)) for members in found]
        raise Absent(f"it gives {len(found)} tensors; say which, as in {_say('', names)}")
    if value is None:
        raise Absent(f"{where}: it gives nothing", is_quiet=True)
    raise Absent(f"{where}: it is a {type(value).__name__} without a tensor")


def _gather(value: Any, way: tuple[str, ...], found: dict[tuple[str, ...], torch.Tensor]) -> None:
    """Collect the tensors in nested containers, each object once."""
    if isinstance(value, torch.Tensor):
        if all(value is not other for other in found.values()):
            found[way] = value
    elif len(way) < 4:
        if isinstance(value, Mapping):
            items: list[tuple[Any, Any]] = list(value.items())
        elif isinstance(value, (tuple, list)):
            items = list(enumerate(value))
        elif _is_data(value):
            items = [
                (one.name, getattr(value, one.name, None)) for one in dataclasses.fields(value)
            ]
        else:
            return
        for name, one in items:
            _gather(one, (*way, str(name)), found)


def _is_one(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, bool, int, float, str))


def _is_data(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def parameters_of(of: Any) -> tuple[str, ...]:
    """Return the names of what a module's forward takes, or a function; none where nobody knows.

    Not every compiler follows the first look; the next is one into a dictionary.
    """
    is_module = isinstance(of, torch.nn.Module)
    key = type(of) if is_module else of
    if key not in _parameters:
        try:
            _parameters[key] = tuple(inspect.signature(of.forward if is_module else of).parameters)
        except (TypeError, ValueError):
            _parameters[key] = ()
    return _parameters[key]


def _named(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = f", ... ({len(names)})" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more


def _say(side: str, names: list[str]) -> str:
    return (
        " or ".join(f":{'.'.join(filter(None, (side, name)))}" for name in names[:2]) or ":input.0"
    )
