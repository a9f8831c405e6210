"""Taps as operators, which a compiled program runs like any other.

1. `seen` fires a tap that nothing is grafted onto, `grafted` one that may be: that returns what
   takes the tensor's place. Both are ordered effects: the compiler runs them once and in their
   place, also where nobody uses the tensor, and saves what they return for a backward that repeats
   a forward.
2. `gradient` brings the gradient of what `tap` returned, and returns what takes its place. Which
   firing it is of, it knows by that one's ticket.
3. `enter` and `leave` are the blocks around taps, `stepped` the end of an iteration, `pinged` a
   hook that does something. `lost` tells of a tap that stands where no operator can.

What was constant of a tap as its program was traced comes as `about`, JSON; whole numbers and
floats, which may be others from call to call, come beside it, and so do the ids of rows. What has
no tensor is given any, since the compiler would run it as it traces it.
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import torch

from . import firing, sessions
from .around import ROWS, TAGS
from .checkpoints import is_in_backward
from .effects import OUTSIDE_GRAPHS, let_be_an_effect
from .firing import fire_step, offer
from .gradients import Heard
from .rows import Ids
from .sources import sources

_NAMESPACE = "tensorgraft"
_TAP = "(Tensor x, Tensor[] ids, str about, SymInt[] ints, float[] floats)"
_MOST_TICKETS = 1 << 16
_COMPILED = "a compiled program"
MOVED = (
    "the compiler runs it in another place than it stands, before or behind other taps, steps or "
    "blocks, so which record is its own cannot be told; compile with the backend aot_eager"
)


class Place(TypedDict):
    """Where something stands.

    Attributes:
        number: tells it from what else is in the program, in order.
        program: tells the program from others.
        ordered: whether it runs as it stands, also if again and again, or not at all.
        lowering: `effects.LOWERING`, so that no program is taken from a cache of another.
    """

    number: int
    program: str
    ordered: bool
    lowering: int


class Facts(Place):
    """What is constant of tags, in `about`.

    Attributes:
        tags: what is constant of them, see `whole`.
        inside: the numbers of the program's blocks that it is in.
    """

    tags: Any
    inside: list[int]


class TapFacts(Facts):
    """What is constant of a tap: what `fire` is given, and whose dims the ids of rows are.

    Attributes:
        extras: what is constant of them, see `whole`.
        source: the number of a module's row, None of a tap in the code.
        is_unheard: whether its gradient is asked for where the program can bring none.
        shared: the dims along which its elements are one in memory.
    """

    name: str
    dims: str | None
    extras: Any
    grad: bool
    site: str
    forward: bool
    is_unheard: bool
    source: str | None
    shared: list[int]
    rows: list[list[str]]


class BlockFacts(Facts):
    """What is constant of a block, of `tags` or of `rows`, and whose dims those are."""

    what: str
    rows: list[list[str]]


class Loss(TypedDict):
    """A tap that no operator can be put in the program for, and why."""

    name: str
    site: str
    why: str


@functools.lru_cache(maxsize=1 << 14)
def _read(about: str) -> Any:
    return json.loads(about)


def _fire(
    x: torch.Tensor,
    ids: Sequence[torch.Tensor],
    about: str,
    ints: Sequence[int],
    floats: Sequence[float],
) -> Heard:
    heard = Heard()
    if not sessions.active:
        return heard
    facts: TapFacts = _read(about)
    numbers = iter(ints), iter(floats)
    tags, extras = whole(facts["tags"], *numbers), whole(facts["extras"], *numbers)
    if not (_is_in_turn(facts) and _is_in_its_blocks(facts)):
        firing.lose(facts["name"], facts["site"], MOVED)
        return heard
    heard.is_unheard = facts["is_unheard"]
    source = facts["source"]
    if source is not None:
        row = sources.get(source)
        if row is None:
            return heard  # its table is taken for the model no more
        tags = {**row.tap_tags(), **tags}
    if facts["shared"] and x.numel():
        shape = x.shape
        for dim in facts["shared"]:
            x = x.narrow(dim, 0, 1)
        x = x.expand(shape)  # as the job has it, where nothing can be written to
    given = tuple(
        Ids(tuple(names), one, at_tap=True) for names, one in zip(facts["rows"], ids, strict=True)
    )
    offer(
        facts["name"], x, facts["dims"], extras, facts["grad"], tags, facts["site"],
        facts["forward"], given, heard,
    )  # fmt: skip
    return heard


_turns: dict[tuple[int, str], int] = {}


def _is_in_turn(facts: Place) -> bool:
    """Whether a tap, block or step runs where it stands: its number follows the one before.

    What a checkpoint repeats in a backward has its numbers again.
    """
    if facts["ordered"] or is_in_backward():
        return True
    key = threading.get_ident(), facts["program"]
    number, before = facts["number"], _turns.get(key, -1)
    if len(_turns) > _MOST_TICKETS:
        _turns.clear()
    _turns[key] = number
    return number in (0, before + 1)


def _is_in_its_blocks(facts: Facts) -> bool:
    """Leave what programs entered that raised; return whether the blocks of a tap are around it."""
    around: set[int] = set()
    for stack in (TAGS, ROWS):
        stack.leave_while(
            lambda owner: (
                type(owner) is dict
                and (owner["program"] != facts["program"] or owner["number"] not in facts["inside"])
            )
        )
        around.update(one["number"] for one in stack.owners() if type(one) is dict)
    return around.issuperset(facts["inside"])


def _seen(x: torch.Tensor, *rest: Any) -> None:
    _fire(x, *rest)


def _seen_for_gradient(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _ticket(_fire(x, *rest))


def _grafted(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found = x.clone()  # an operator returns no argument
    return found, _ticket(_fire(found, *rest))


_tickets: dict[int, Heard] = {}
_next_ticket = itertools.count()


def _ticket(heard: Heard) -> torch.Tensor:
    """Return what a firing is known by in a backward."""
    number = next(_next_ticket)
    if heard.callbacks:
        while len(_tickets) >= _MOST_TICKETS:
            _tickets.pop(next(iter(_tickets)), None)
        _tickets[number] = heard
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def _gradient(grad: torch.Tensor, ticket: torch.Tensor) -> torch.Tensor:
    found = grad.clone()  # as above
    heard = _tickets.get(int(ticket))
    return found if heard is None else heard.replaced(found)


def _enter(
    x: torch.Tensor,
    ids: Sequence[torch.Tensor],
    about: str,
    ints: Sequence[int],
    floats: Sequence[float],
) -> None:
    facts: BlockFacts = _read(about)
    firing.has_programs = True
    owner = facts  # the same one of equal text
    if not _is_in_turn(facts):
        firing.lose(facts["what"], _COMPILED, MOVED)
    _is_in_its_blocks(facts)
    if facts["what"] == "rows":
        given = zip(facts["rows"], ids, strict=True)
        ROWS.enter(tuple(Ids(tuple(names), one) for names, one in given), owner)
    else:
        TAGS.enter(whole(facts["tags"], iter(ints), iter(floats)), owner)


def _leave(x: torch.Tensor, what: str) -> None:
    (ROWS if what == "rows" else TAGS).leave_one()


def _lost(x: torch.Tensor, about: str) -> None:
    facts: Loss = _read(about)
    firing.lose(facts["name"], facts["site"], facts["why"])


def _pinged(x: torch.Tensor, number: str) -> None:
    hook = sources.get(number)
    if hook is not None and hook.ping is not None:
        hook.ping()


def _stepped(x: torch.Tensor, about: str) -> None:
    if not _is_in_turn(_read(about)):
        firing.lose("step()", _COMPILED, MOVED)
    fire_step()


def whole(constant: Any, ints: Iterator[int], floats: Iterator[float]) -> Any:
    """Return a plain value of which what is constant and the numbers came apart.

    Args:
        constant: the value as JSON, with `["int"]` and `["float"]` for numbers, `["list", ...]` for
            a list, and `["dtype", name]` and `["device", name]`.
        ints: the whole numbers, in order.
        floats: the floats, in order.
    """
    if isinstance(constant, dict):
        return {key: whole(one, ints, floats) for key, one in constant.items()}
    if not isinstance(constant, list):
        return constant
    kind, *rest = constant
    if kind == "int":
        return next(ints)
    if kind == "float":
        return next(floats)
    if kind == "list":
        return [whole(one, ints, floats) for one in rest]
    name = rest[0]
    return torch.device(name) if kind == "device" else getattr(torch, name.removeprefix("torch."))


def _nothing(*args: Any) -> None: ...


def _like(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _a_ticket(*args: Any) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def _both(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), _a_ticket()


_OPERATORS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    (f"seen{_TAP} -> ()", _seen, _nothing),
    (f"seen_for_gradient{_TAP} -> Tensor", _seen_for_gradient, _a_ticket),
    (f"grafted{_TAP} -> (Tensor, Tensor)", _grafted, _both),
    (f"enter{_TAP} -> ()", _enter, _nothing),
    ("leave(Tensor x, str what) -> ()", _leave, _nothing),
    ("stepped(Tensor x, str about) -> ()", _stepped, _nothing),
    ("lost(Tensor x, str about) -> ()", _lost, _nothing),
    ("pinged(Tensor x, str number) -> ()", _pinged, _nothing),
    ("gradient(Tensor grad, Tensor ticket) -> Tensor", _gradient, _like),
)


def _defined() -> torch.library.Library:
    made = torch.library.Library(_NAMESPACE, "DEF")
    for schema, function, fake in _OPERATORS:
        name = schema.partition("(")[0]
        made.define(schema, tags=OUTSIDE_GRAPHS)
        made.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=made)
        if name != "gradient":  # which is where the gradient flows
            let_be_an_effect(getattr(torch.ops.tensorgraft, name).default)
    return made


_library = _defined()  # which lasts as long as this is kept
seen = torch.ops.tensorgraft.seen.default
seen_for_gradient = torch.ops.tensorgraft.seen_for_gradient.default
grafted = torch.ops.tensorgraft.grafted.default
enter = torch.ops.tensorgraft.enter.default
leave = torch.ops.tensorgraft.leave.default
stepped = torch.ops.tensorgraft.stepped.default
lost = torch.ops.tensorgraft.lost.default
pinged = torch.ops.tensorgraft.pinged.default
gradient = torch.ops.tensorgraft.gradient.default
