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
from . import operators, sessions
from .effects import (
    LOWERING,
    blocks_in_program,
    is_as_it_stands,
    is_known,
    is_strictly_exported,
    name_of_program,
    number_in_program,
    put_in_program,
    traced_site,
    unfit_place,
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

_WIDE = 1 << 63
_LISTS = (list, tuple, torch.Size)
_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)
_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7


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
    is_named = type(name) is str
    if _is_refused(_real(name) if is_named else "", _real(site)):
        return value
    ids = Ids.given(given, at_tap=True) if given else ()
    if not (is_named and _is_plain(tags) and _is_plain(extras) and is_traceable(value)):
        fire(name, value, dims, extras, grad, tags, site, forward, given)
        return value
    ints: list[int] = []
    floats: list[float] = []
    own, more = _apart(tags, ints, floats), _apart(extras, ints, floats)
    shared = _shared(value)
    asks_for_gradient = bool(grad) and value.requires_grad
    wants_gradient = asks_for_gradient and torch.is_grad_enabled()
    # A leaf is one in an evaluation, and eager code waits for no gradient of it either.
    is_unheard = asks_for_gradient and not wants_gradient and not value.is_leaf
    about = _about(
        _real(name),
        _real(dims),
        more,
        wants_gradient or is_unheard,
        own,
        tuple(one.names for one in ids),
        _real(source),
        _real(site),
        bool(forward),
        shared,
        is_unheard,
    )
    rest = [_tensor(one.of) for one in ids], about, ints, floats
    if sessions.listening == "graft" and forward and not shared:
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
    if is_exporting() or _is_unfit():
        return
    nothing = torch.zeros(0)
    if what == "rows":
        names = tuple(one.names for one in added)
        enter(nothing, [_tensor(one.of) for one in added], _block("rows", {}, names), [], [])
        return
    if not _is_plain(added):
        raise UsageError("a context in a compiled program has tags that are no plain values")
    ints: list[int] = []
    floats: list[float] = []
    about = _block("tags", _apart(added, ints, floats), ())
    enter(nothing, [], about, ints, floats)


def left(what: str) -> None:
    """Put the end of a block in the graph."""
    # Without a tensor, it would be run as it is traced.
    if not (is_exporting() or _is_unfit()):
        _left()
        leave(torch.zeros(0), what)


def stepped() -> None:
    """Put the end of an iteration in the graph."""
    if not (is_exporting() or _is_refused("step()", "")):
        operators.stepped(torch.zeros(0), _place())


def _shared(value: torch.Tensor) -> tuple[int, ...]:
    """Return the dims along which a tensor's elements are one in memory."""
    found: list[int] = []
    if value.layout is not torch.strided:
        return ()
    for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if is_known(stride == 0) and not is_known(size == 1):
            found.append(dim)
    return tuple(found)


def _apart(value: Any, ints: list[int], floats: list[float]) -> Any:
    """Return what is constant of a plain value, as `operators.whole` reads it; put the rest aside.

    Args:
        value: the value.
        ints: gets the whole numbers in it, which may be others from call to call.
        floats: gets the floats.
    """
    kind = type(value)
    if kind is int and not is_known(value >= _WIDE) and not is_known(value < -_WIDE):
        ints.append(value)
        return ["int"]
    if kind is float:
        floats.append(value)
        return ["float"]
    if kind is dict:
        return {_real(key): _apart(one, ints, floats) for key, one in value.items()}
    if kind in _LISTS:
        return ["list", *[_apart(one, ints, floats) for one in value]]
    if kind is torch.dtype:
        return ["dtype", str(value)]
    if kind is torch.device:
        return ["device", str(value)]
    return _real(value)


def _tensor(ids: Any) -> torch.Tensor:
    return torch.as_tensor(ids() if callable(ids) else ids)


def _is_plain(value: Any) -> bool:
    """Whether something is made of constants."""
    kind = type(value)
    if kind is dict:
        return all(_is_plain(one) for pair in value.items() for one in pair)
    if kind in _LISTS:
        return all(_is_plain(one) for one in value)
    return kind in _PLAIN


def _real(value: Any) -> Any:
    """Return a text or a bool as one that Dynamo has looked at, which constants have to be."""
    kind = type(value)
    if kind is str:
        return "".join((value,))
    return bool(value) if kind is bool else value


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def is_exporting() -> bool:
    """Whether a program is exported; asked as it is traced.

    Dynamo of torch 2.7 to 2.11 takes torch's own for true in whatever it compiles, and before 2.8
    it is false in a strict export.
    """
    return bool(_exporting()) or is_strictly_exported()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _is_unfit() -> bool:
    """Whether no operator can stand where the compiler is."""
    return unfit_place() != ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _is_refused(name: str, site: str) -> bool:
    """Whether no operator can stand where the compiler is; the program then tells, each time."""
    why = unfit_place()
    if why:
        facts = operators.Loss(name=name, site=site or traced_site(), why=why)
        put_in_program(operators.lost, json.dumps(facts))
    return why != ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _about(
    name: str,
    dims: str | None,
    extras: Any,
    grad: bool,
    tags: Any,
    rows: tuple[tuple[str, ...], ...],
    source: str | None,
    site: str,
    forward: bool,
    shared: tuple[int, ...],
    is_unheard: bool,
) -> str:
    """Return what is constant of a tap, as JSON; called as it is traced."""
    facts = TapFacts(
        name=name,
        dims=dims,
        extras=extras,
        grad=grad,
        tags=tags,
        rows=[list(one) for one in rows],
        source=source,
        site=site or traced_site(),
        forward=forward,
        shared=list(shared),
        is_unheard=is_unheard,
        number=number_in_program(),
        program=name_of_program(),
        ordered=is_as_it_stands(),
        lowering=LOWERING,
        inside=blocks_in_program(),
    )
    return json.dumps(facts)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _block(
    what: str,
    tags: Any,
    rows: tuple[tuple[str, ...], ...],
) -> str:
    """Return what is constant of a block, as JSON; called as it is traced."""
    number = number_in_program()
    facts = BlockFacts(
        what=what,
        tags=tags,
        rows=[list(one) for one in rows],
        number=number,
        program=name_of_program(),
        ordered=is_as_it_stands(),
        lowering=LOWERING,
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
    place = operators.Place(
        number=number_in_program(),
        program=name_of_program(),
        ordered=is_as_it_stands(),
        lowering=LOWERING,
    )
    return json.dumps(place)


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
