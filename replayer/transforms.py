"""Transforms: what turns a sender slice into the tensor to write.

1. `load` turns `pkg.mod.fn` into a function.
2. `Transform` decides once, from the signature, how to call it: `(g)` or `(received_list, target)`.
3. One that was written for sglang's dumper is given what that says of a dump (`GraftInput.dumped`).
4. `identity` is the one that is used where none is named and no layouts are declared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from recorder.errors import TransformError, UsageError
from recorder.imported import imported, is_path
from recorder.sizes import count
from recorder.tags import RECOMPUTE, Key
from recorder.taps.dumped import NOT_REPEATED, REPEATED, STATUS

if TYPE_CHECKING:
    from .relayout import Relayout

Function = Callable[..., Any]
_DUMPER_S = "GraftTransformInput"
"""What sglang's dumper calls the argument of a transform, and what is a parameter of its there."""
_GIVEN = "graft_input"
HOW = "name a transform with --transform pkg.mod.fn (or Replayer(transform=...))"


class GraftInput:
    """What a transform with one argument receives. All of it is the transform's own.

    Attributes:
        tags: the tap's tags, `name` included.
        received_list: the sender slice: one tensor per sender rank, in rank order, on the
            receiver's device; None where that rank has none.
        received_extras_list: each sender's extras, {} where it gave none, None where it has none.
        key: the tap's key on the receiver.
        rank: the receiver's rank.
        world_size: the number of receivers.
        sender_world_size: the number of senders.
        dims: the receiver's declared layout, "" where it has none.
        sender_dims: the senders' declared layout, "" where they have none.
    """

    def __init__(
        self,
        tags: dict[str, Any],
        received_list: list[torch.Tensor | None],
        received_extras_list: list[dict[str, Any] | None],
        target: torch.Tensor,
        key: Key,
        rank: int,
        world_size: int,
        sender_world_size: int,
        dims: str = "",
        sender_dims: str = "",
        *,
        relayout: Relayout | None = None,
        is_rowed: bool = False,
    ) -> None:
        self.tags = tags
        self.received_list = received_list
        self.received_extras_list = received_extras_list
        self.key = key
        self.rank = rank
        self.world_size = world_size
        self.sender_world_size = sender_world_size
        self.dims = dims
        self.sender_dims = sender_dims
        self._given: torch.Tensor | None = target
        self._target: torch.Tensor | None = None
        self._relayout = relayout
        self._is_rowed = is_rowed

    @property
    def target(self) -> torch.Tensor:
        """A copy of the receiver's tensor, made when it is first asked for; of a DTensor's its
        local part.
        """
        if self._target is None:
            if self._given is None:
                raise AttributeError(
                    "g.target is gone once the transform has returned; copy it there"
                )
            with torch.no_grad():
                self._target = self._given.detach().clone()
        return self._target

    def logical(self) -> torch.Tensor:
        """Return the whole tensor that the senders' blocks are parts of, on the receiver's device.

        Its dims are in the order of the senders' declaration; padding is left out where that says
        the size without it, or the sequences' lengths do.

        Raises:
            LayoutError: the senders declare no layout, or it does not say enough.
        """
        return self._layouts().logical()

    def to_local(self, logical: torch.Tensor) -> torch.Tensor:
        """Return the receiver's block of a whole tensor, whose dims are as those of `logical`.

        Raises:
            LayoutError: one side declares no layout, or the two contradict each other.
        """
        return self._layouts().to_local(logical)

    def _layouts(self) -> Relayout:
        if self._is_rowed and self._given is not None:
            raise TransformError(
                "of a tap whose rows are matched one by one there is no whole: g.received_list has "
                "the rows as they stand in g.target"
            )
        if self._relayout is None:
            raise TransformError(
                "g.logical and g.to_local are there in a replay, until the transform has returned"
            )
        return self._relayout

    def dumped(self) -> GraftInput:
        """Say of the tap what sglang's dumper says too, and return this.

        The tags then tell whether activation checkpointing repeats the forward, and a sender that
        gave no extras has None.
        """
        status = REPEATED if self.tags.get(RECOMPUTE) else NOT_REPEATED
        self.tags = {**self.tags, STATUS: status}
        self.received_extras_list = [extras or None for extras in self.received_extras_list]
        return self

    def done(self) -> None:
        """Let go of the receiver's tensor: it is about to change."""
        self._given = self._relayout = None


class Transform:
    """A function to transform with, and how it wants to be called.

    Raises:
        TransformError: its signature takes neither one nor two arguments.
    """

    def __init__(self, function: Function, name: str | None = None) -> None:
        if not callable(function):
            raise TransformError(
                f"the transform is a {type(function).__name__}, expected a function of (g) or of "
                "(received_list, target)"
            )
        self.function = function
        self.name = name or getattr(function, "__qualname__", type(function).__name__)
        self._is_of_dumper = False
        self._one = self._takes_one()

    def __call__(self, g: GraftInput) -> Any:
        """Return what the function returns, unchecked."""
        g = g.dumped() if self._is_of_dumper else g
        return self.function(g) if self._one else self.function(g.received_list, g.target)

    def _takes_one(self) -> bool:
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # some builtins have none
            return True
        positional = [
            p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        self._is_of_dumper = bool(positional) and _is_of_dumper(positional[0])
        required = [p for p in positional if p.default is p.empty]
        has_rest = any(p.kind == p.VAR_POSITIONAL for p in parameters)
        keyword = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.default is p.empty]
        if not keyword:
            if len(required) == 2:
                return False
            if len(required) == 1 or (not required and positional):
                # Two positional of which one has a default could mean either: names decide.
                return [p.name for p in positional[:2]] != ["received_list", "target"]
            if has_rest and not required:
                return True
        raise TransformError(
            f"the transform {self.name}{inspect.signature(self.function)} takes neither one "
            "argument (g) nor two (received_list, target)"
        )


def _is_of_dumper(parameter: inspect.Parameter) -> bool:
    """Whether a function's first parameter is what sglang's dumper gives to transforms."""
    annotation = parameter.annotation
    called = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return parameter.name == _GIVEN or called.rpartition(".")[2].strip("'\" ") == _DUMPER_S


def check_path(path: str) -> None:
    """Refuse what is no dotted path.

    Raises:
        UsageError: it is none.
    """
    if not is_path(path):
        raise UsageError(f"transform {path!r} is not a path such as pkg.mod.fn")


def load(path: str) -> Transform:
    """Return the transform that a dotted path names; see `imported`.

    Raises:
        TransformError: it cannot be imported, or is no such function.
    """
    try:
        return Transform(imported(path, "transform"), path)
    except UsageError as err:
        raise TransformError(str(err)) from err


def identity(
    received: Sequence[torch.Tensor | None],
    rank: int,
    world_size: int,
    target: torch.Tensor,
    lacking: Callable[[], str] = str,
) -> torch.Tensor:
    """Return the tensor of the sender with the receiver's rank.

    Args:
        received: the sender slice.
        rank: the receiver's rank.
        world_size: the number of receivers.
        target: the receiver's tensor.
        lacking: returns what to declare so that layouts decide, "" where nothing is lacking.

    Raises:
        TransformError: there are not as many senders as receivers, that sender has none, or the
            shapes differ; says which.
    """
    if len(received) != world_size:
        advice = lacking()
        how = f"{advice}, or {HOW}" if advice else HOW
        raise TransformError(
            "identity by rank needs as many senders as receivers, and there "
            f"{'is' if len(received) == 1 else 'are'} {count(len(received), 'sender')} and "
            f"{count(world_size, 'receiver')}; {how}"
        )
    own = received[rank]
    if own is None:
        have = [sender for sender, tensor in enumerate(received) if tensor is not None]
        raise TransformError(
            f"identity by rank needs a record of sender rank {rank}, and only rank "
            f"{', '.join(map(str, have))} recorded this key; {HOW}"
        )
    if own.shape != target.shape:
        raise TransformError(
            f"identity by rank needs equal shapes, and the record has {list(own.shape)}, "
            f"the target {list(target.shape)}; {HOW}"
        )
    return own
