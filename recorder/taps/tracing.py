"""A tap as the compiler traces it: operators in its graph, and no break.

`traced` runs under Dynamo, so it is made of what that follows: it takes apart what stands at a tap
into a constant, and numbers that may change. What it cannot put in an operator breaks the graph as
any function that is not to be traced (`tap.fire`): values that are no tensors, subclasses of
tensors, tags that are no plain values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UsageError
from ..tags import TagValue
from . import operators, sessions
from .effects import (
    blocks_in_program,
    name_of_program,
    number_in_program,
    traced_site,
    version_preserved,
)
from .firing import fire
from .operators import (
    BlockFacts,
    TapFacts,
    enter,
    gradient,
    grafted,
    leave,
    seen,
    seen_for_gradient,
)
from .rows import Ids

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7


def traced(
    name: str,
    value: Any,
    dims: str | None,
    extras: Mapping[str, Any] | None,
    grad: bool,
    tags: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
    source: str | None = None,
    site: str = "",
    forward: bool = True,
) -> Any:
    """Put a tap in the graph; return its value.

    Args:
        name: as all up to `given`, what `tap` is given.
        value: see `tap`.
        dims: see `tap`.
        extras: see `tap`.
        grad: see `tap`.
        tags: see `tap`.
        given: the `rows` of `tap`.
        source: the number of a module's row, in `operators.sources`.
        site: what to call the place in messages; "" for the caller's.
        forward: whether the value itself is meant, and not its gradient alone.
    """
    if callable(value):
        value = value()
    if is_exporting():
        return value  # what is exported runs where nothing of this is
    ids = Ids.given(given, at_tap=True) if given else ()
    is_known = type(name) is str and _is_plain(tags) and _is_plain(extras)
    if not (is_known and is_traceable(value)):
        fire(name, value, dims, extras, grad, tags, site, forward, given)
        return value
    ints, floats, words = _apart(tags)
    asks_for_gradient = bool(grad) and value.requires_grad
    wants_gradient = asks_for_gradient and torch.is_grad_enabled()
    # A leaf is one in an evaluation, and eager code waits for no gradient of it either.
    is_unheard = asks_for_gradient and not wants_gradient and not value.is_leaf
    about = _about(
        _real(name),
        _real(dims),
        _real(extras),
        wants_gradient or is_unheard,
        _real(words),
        tuple(ints),
        tuple(floats),
        tuple(one.names for one in ids),
        _real(source),
        _real(site),
        bool(forward),
        is_unheard,
    )
    rest = [_tensor(one.of) for one in ids], about, [*ints.values()], [*floats.values()]
    if sessions.listening == "graft" and forward:
        new, ticket = grafted(value.detach(), *rest)
        value.data.copy_(new)  # its graph stays what it is
    elif wants_gradient:
        ticket = seen_for_gradient(value.detach(), *rest)
    else:
        seen(value.detach(), *rest)
    return _heard(value, ticket) if wants_gradient else value


def is_traceable(value: Any) -> bool:
    """Whether something can be given to an operator as it is: what a subclass holds cannot."""
    return type(value) is torch.Tensor or type(value) is torch.nn.Parameter


def entered(what: str, added: Any) -> None:
    """Put the beginning of a block in the graph.

    Args:
        what: `tags` or `rows`.
        added: what the block adds.
    """
    if is_exporting():
        return
    nothing = torch.zeros(0)
    if what == "rows":
        names = tuple(one.names for one in added)
        enter(
            nothing, [_tensor(one.of) for one in added], _block("rows", {}, (), (), names), [], []
        )
        return
    if not _is_plain(added):
        raise UsageError("a context in a compiled program has tags that are no plain values")
    ints, floats, words = _apart(added)
    about = _block("tags", _real(words), tuple(ints), tuple(floats), ())
    enter(nothing, [], about, [*ints.values()], [*floats.values()])


def left(what: str) -> None:
    """Put the end of a block in the graph."""
    # Without a tensor, it would be run as it is traced.
    if not is_exporting():
        _left()
        leave(torch.zeros(0), what)


def stepped() -> None:
    """Put the end of an iteration in the graph."""
    if not is_exporting():
        operators.stepped(torch.zeros(0), _place())


def _apart(tags: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, float], dict[str, TagValue]]:
    """Return tags that may be others from call to call, and those that are constant."""
    ints = {tag: one for tag, one in tags.items() if type(one) is int}
    floats = {tag: one for tag, one in tags.items() if type(one) is float}
    words = {tag: one for tag, one in tags.items() if type(one) not in (int, float)}
    return ints, floats, words


def _tensor(ids: Any) -> torch.Tensor:
    return torch.as_tensor(ids() if callable(ids) else ids)


def _is_plain(value: Any) -> bool:
    """Whether something is made of constants."""
    kind = type(value)
    if kind is dict:
        return all(_is_plain(one) for pair in value.items() for one in pair)
    if kind is list or kind is tuple:
        return all(_is_plain(one) for one in value)
    return kind in (str, int, float, bool, type(None))


def _real(value: Any) -> Any:
    """Return a plain value as one that Dynamo has looked at, which constants have to be."""
    kind = type(value)
    if kind is dict:
        return {_real(key): _real(one) for key, one in value.items()}
    if kind is list or kind is tuple:
        return [_real(one) for one in value]
    if kind is str:
        return "".join((value,))
    return bool(value) if kind is bool else value


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _about(
    name: str,
    dims: str | None,
    extras: Mapping[str, Any] | None,
    grad: bool,
    tags: Mapping[str, Any],
    ints: tuple[str, ...],
    floats: tuple[str, ...],
    rows: tuple[tuple[str, ...], ...],
    source: str | None,
    site: str,
    forward: bool,
    is_unheard: bool,
) -> str:
    """Return what is constant of a tap, as JSON; called as it is traced."""
    facts = TapFacts(
        name=name,
        dims=dims,
        extras=extras,
        grad=grad,
        tags=dict(tags),
        ints=list(ints),
        floats=list(floats),
        rows=[list(one) for one in rows],
        source=source,
        site=site or traced_site(),
        forward=forward,
        is_unheard=is_unheard,
        number=number_in_program(),
        program=name_of_program(),
        inside=blocks_in_program(),
    )
    return json.dumps(facts)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _block(
    what: str,
    tags: Mapping[str, Any],
    ints: tuple[str, ...],
    floats: tuple[str, ...],
    rows: tuple[tuple[str, ...], ...],
) -> str:
    """Return what is constant of a block, as JSON; called as it is traced."""
    number = number_in_program()
    facts = BlockFacts(
        what=what,
        tags=dict(tags),
        ints=list(ints),
        floats=list(floats),
        rows=[list(one) for one in rows],
        number=number,
        program=name_of_program(),
        inside=blocks_in_program(),
    )
    about = json.dumps(facts)
    blocks_in_program().append(number)
    return about


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _left() -> None:
    """Note that the innermost block ends, as it is traced."""
    if around := blocks_in_program():
        around.pop()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _place() -> str:
    return json.dumps(operators.Place(number=number_in_program(), program=name_of_program()))


def _heard(value: torch.Tensor, ticket: torch.Tensor) -> torch.Tensor:
    """Have a value's gradient heard from here on; return what to go on with."""
    new: torch.Tensor = _Heard.apply(value, ticket)  # type: ignore[no-untyped-call, unused-ignore]
    if value.is_leaf or value._base is not None:  # which must not, or hears what is not its own
        return new
    # In place, since the job may go on with it by another name, or write to it. What is saved of it
    # for the backward still holds the same.
    with version_preserved(value):
        value.copy_(new)
    return value


class _Heard(torch.autograd.Function):
    """What a tap returns where its gradient is wanted: the value, whose gradient comes by here."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, ticket: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ticket)
        return value.view_as(value)  # its memory, which torch lets nobody write to by this name

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (ticket,) = ctx.saved_tensors
        return gradient(grads[0], ticket), None
