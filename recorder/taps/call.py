"""One firing of a tap, and what listens to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..diagnostics import call_site
from ..filters import Filter
from ..job import Job
from ..tags import cut

if TYPE_CHECKING:
    import torch

    from .checkpoints import Place
    from .gradients import Callback, GradientTaps, Heard
    from .rows import Ids

UNKNOWN = object()
IN_GRAPH = "one that comes in a CUDA graph can be recorded, and not grafted"


class Run:
    """One run of a CUDA graph, around which each tap in it fires twice.

    Args:
        is_before: for grafts, which are made before it; else for all else, after it.
        why: why it cannot be grafted, "" where it can.

    Attributes:
        is_grafted: whether it is.
        mask: of which elements, bool in the tensor's shape; None for all.
        after: called after the run with what the graph computed, and with what was written over it.
    """

    def __init__(self, *, is_before: bool, why: str = "") -> None:
        self.is_before, self.why = is_before, why
        self.is_grafted = False
        self.mask: torch.Tensor | None = None
        self.after: list[Callable[[Any, Any], None]] = []


class Call:
    """One firing of a tap, as the sessions see it.

    Attributes:
        name: the tap's name.
        tags: its other tags, context included, as given.
        given: what stands at the tap: a value or a callable.
        dims: the declared layout, or "".
        extras: what the call attached, or None.
        grad: whether the gradient is wanted too.
        forward: whether the value itself is wanted, and not its gradient alone.
        about: equal for taps of equal name and tags: these, and the types of the tags, since 1,
            1.0 and True are equal but differ as JSON.
        rows: the ids that hold for its dims.
        heard: what hears the gradient of a compiled program's tap; None for all others.
        run: the run of a CUDA graph that the tap is in, None outside.
        inside: the ids of the blocks around it, whatever its dims.
        step: the step it belongs to where the program says so; None for the session's own.
        trouble: why the tags around it cannot be told, "" where they can.
        own_rows: in a forward that a checkpoint repeats, the ids that were given in there or at the
            tap; None elsewhere.
    """

    # Of most, so that a tap sets few.
    rows: tuple[Ids, ...] = ()
    heard: Heard | None = None
    inside: tuple[Ids, ...] = ()
    run: Run | None = None
    step: int | None = None
    trouble = ""
    own_rows: tuple[Ids, ...] | None = None
    _value: Any = UNKNOWN
    _place: Any = UNKNOWN

    def __init__(
        self,
        name: str,
        given: Any,
        dims: str | None = None,
        extras: Mapping[str, Any] | None = None,
        grad: bool = False,
        tags: Mapping[str, Any] | None = None,
        about: tuple[Any, ...] = (),
        site: str = "",
        forward: bool = True,
    ) -> None:
        self.name = name
        self.about = about
        self.dims = dims or ""
        self.extras = extras
        self.grad = grad
        self.tags: Mapping[str, Any] = tags or {}
        self.given = given
        self._site = site
        self.forward = forward

    def value(self) -> Any:
        """Return the tapped value; a callable is called here, once, whoever asks first."""
        if self._value is UNKNOWN:
            # Neither tensors nor the recordable scalars are callable.
            self._value = self.given() if callable(self.given) else self.given
        return self._value

    def whole(self) -> Any:
        """Return what stands at the tap; of what has parts it is the tensor that they lie in."""
        return self.value()

    def within(self, gradient: Any) -> Any:
        """Return what of a gradient of `whole` is this tap's."""
        return gradient

    def hear_gradient(
        self, taps: GradientTaps, arrived: Callback, tell: Callable[[str], None]
    ) -> None:
        """Have `arrived` called with the gradient of `whole`; see `GradientTaps.watch`."""
        if self.run is not None and self.run.is_before:
            tell(IN_GRAPH)
        elif self.heard is not None:
            taps.watch_compiled(self.heard, arrived, tell)
        else:
            taps.watch(self.whole(), self.name, arrived, tell)

    @property
    def is_made_here(self) -> bool:
        """Whether the value is made by the tap's callable, whose errors stay with the tap."""
        return callable(self.given)

    def place(self, look: Callable[[], Place | None]) -> Place | None:
        """Return where the tap fires as `look` sees it, once, whoever asks first."""
        if self._place is UNKNOWN:
            self._place = look()
        return self._place  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Let go of the value: a hook on a tensor that held it would keep it alive for good."""
        self.given = self._value = self._place = None
        self.rows = self.inside = ()
        self.own_rows = None

    @property
    def shown(self) -> str:
        """The name for messages, whatever was given as one."""
        is_text = isinstance(self.name, str)
        return repr(cut(self.name)) if is_text else f"a {type(self.name).__name__}"

    @property
    def site(self) -> str:
        """The call site, `file:line`, for warnings; right while the tap fires, then kept."""
        self._site = self._site or call_site()
        return self._site


class Session(Protocol):
    """Something that listens to taps."""

    order: int
    """The smaller sees a tap first: stand-ins -1, recorders 0, replayers 1."""
    grafts: bool
    """Whether it writes to what is tapped."""
    folders: tuple[Path | None, ...]
    """Where `graft ctl` reaches it; None where nothing does. It is off where all of them are."""
    overwrites: Job | None
    """The job that replaces what is in its folders; None where nothing is replaced."""
    ignored: set[Any]
    """What `Call.about` is of taps that need not be shown, while the rank is what it was."""

    @property
    def is_unsettled(self) -> bool:
        """Whether a process group that comes up may change the rank."""

    def on_tap(self, call: Call) -> None:
        """See a tap fire."""

    def on_step(self) -> None:
        """See an iteration end."""

    def on_switch(self, filter: Filter | None, missed: bool) -> None:
        """Hear, between two taps, which filter holds now: None stands for the session's own.

        Args:
            filter: the filter.
            missed: whether taps of this step may have been missed before.
        """

    def took(self, sequence: int) -> None:
        """Note, from any thread, that what `graft ctl` asked for holds, for whoever asked."""

    def lost(self, call: Call, reason: str) -> None:
        """Hear that a tap could not be handled for a reason nobody foresaw."""

    def close(self) -> None:
        """Finish; called again at exit."""
