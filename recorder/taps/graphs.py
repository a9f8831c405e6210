"""Taps in CUDA graphs: copied inside the graph, and fired around each run of it.

1. `watch` hears of captures and runs, since nothing of the job's code runs as a graph does.
2. A tap while a graph is captured becomes a `_Site` of it (`hold`): a copy of its tensor, made in
   the graph into memory of its own, and, where something grafts, an overwriting by what other
   memory holds, where a mask says so.
3. Before each run grafts are made and put there, and after it taps fire, in the order in which they
   were captured. A graph that never runs, or is thrown away, fires nothing.

`Cuda` is what this needs of torch; tests put a fake in its place.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from ..bits import as_bits, is_capturing, never_compiled
from ..diagnostics import call_site, say
from ..errors import CaptureError, LayoutError
from ..layouts.parse import parse_dims
from ..layouts.rowed import padded
from . import firing, sessions
from .around import ROWS, TAGS, rows_around
from .call import Run
from .gradients import Heard
from .rows import Ids, over

BARE = (
    "a CUDA graph runs that was captured while nothing listened, so that taps in it, if any, do "
    "not fire; capture it again, or begin before it is captured"
)
UNGRAFTED = (
    "its CUDA graph was captured while nothing grafted, so that nothing is written in it; capture "
    "it again while the replay is on"
)
OVERLAPS = (
    "its elements overlap in memory (an expanded view), so that nothing is written to it in its "
    "CUDA graph; tap a tensor with memory of its own, such as its contiguous()"
)


class Backend(Protocol):
    """What captures and runs graphs."""

    @property
    def kind(self) -> type:
        """The class of a graph, with `capture_begin`, `capture_end`, `replay` and `reset`."""

    def is_there(self) -> bool:
        """Whether there may be graphs."""

    def is_capturing(self, tensor: torch.Tensor) -> bool:
        """Whether a graph is being captured where this tensor is computed."""

    def mark(self, device: torch.device) -> Any:
        """Return what tells that all that is enqueued so far has ended."""

    def wait(self, device: torch.device, mark: Any) -> None:
        """Let what is enqueued next wait for that; the host goes on."""


class Cuda:
    """`Backend` by torch.cuda."""

    @property
    def kind(self) -> type:
        """See `Backend`."""
        return torch.cuda.CUDAGraph

    def is_there(self) -> bool:
        """See `Backend`."""
        return torch.cuda.is_available()

    def is_capturing(self, tensor: torch.Tensor) -> bool:
        """See `Backend`."""
        return is_capturing(tensor)

    def mark(self, device: torch.device) -> Any:
        """See `Backend`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    def wait(self, device: torch.device, mark: Any) -> None:
        """See `Backend`."""
        torch.cuda.current_stream(device).wait_event(mark)


class _Site:
    """A tap in a graph.

    Args:
        held: what was computed there in the graph's latest run; or a value that is no tensor.
        given: what else `tap` was given.
        ids: those of its rows, as they stand in the graph.
    """

    def __init__(self, held: Any, given: _Given, ids: tuple[Ids, ...]) -> None:
        self.held, self.given, self.ids = held, given, ids
        self.new: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        self.why = UNGRAFTED
        self.heard: Heard | None = None
        self.gradient_of: _Site | None = None

    def let_be_grafted(self, value: torch.Tensor) -> None:
        """Have the graph overwrite the tensor where the mask says so; called as it is captured."""
        if any(n > 1 and not stride for n, stride in zip(value.shape, value.stride(), strict=True)):
            self.why = OVERLAPS
            return
        # Not filled: that would be captured too, and done again in each run.
        self.new = torch.empty_like(value)
        self.mask = torch.empty_like(value, dtype=torch.bool)
        bits = as_bits(value.data, in_graph=True)  # which autograd takes for no write to the value
        mask = self.mask.view(*self.mask.shape, *[1] * (bits.dim() - value.dim()))
        bits.copy_(torch.where(mask, as_bits(self.new, in_graph=True), bits))

    def fire(self, run: Run, value: Any) -> None:
        """Fire the tap before a run, or after it."""
        name, dims, extras, grad, tags, site, forward = self.given
        heard = Heard()
        if not run.is_before:
            self.heard = heard
        rows = over(rows_around() if dims else (), tuple(_again(one) for one in self.ids))
        if isinstance(value, torch.Tensor):
            rows = tuple(_padded(one, dims, value.shape) for one in rows)
        firing.offer(name, value, dims, extras, grad, tags, site, forward, rows, heard, run)


_Given = tuple[str, "str | None", "Mapping[str, Any] | None", bool, Mapping[str, Any], str, bool]


class Capture:
    """The taps of one graph."""

    def __init__(self) -> None:
        self.sites: list[_Site] = []
        self.tags, self.rows = TAGS.mark(), ROWS.mark()
        self._mark: Any = None
        self._is_switched_on = False
        self._is_bare = not sessions.listening

    def run(self, plain: Callable[[], Any]) -> Any:
        """Run the graph, with its taps."""
        device = next((s.held.device for s in self.sites if isinstance(s.held, torch.Tensor)), None)
        if not self.sites:
            if self._is_bare:
                _tell_bare()
            return plain()
        if device is not None and self._mark is not None:
            backend.wait(device, self._mark)  # until what was copied of the run before is
        runs = self._prepare()
        made = plain()
        if sessions.listening:
            self._finish(runs)
            self._mark = None if device is None else backend.mark(device)
        return made

    def _prepare(self) -> list[tuple[_Site, Run]]:
        """Make the grafts of a run and put them where it reads them."""
        if sessions.listening != "graft":
            if self._is_switched_on:
                self._switch_off()
            return []
        runs = []
        for site in self.sites:
            if site.gradient_of is not None or not site.given[-1]:
                continue
            run = Run(is_before=True, why=site.why if site.new is None else "")
            value: Any = site.held
            if site.new is not None:
                site.new.copy_(site.held)  # of the run before: what else a transform could be given
                value = site.new
            site.fire(run, value)
            if site.mask is not None and run.mask is not None:
                site.mask.copy_(run.mask)
            elif site.mask is not None:
                site.mask.fill_(run.is_grafted)
            runs.append((site, run))
        self._is_switched_on = True
        return runs

    def _switch_off(self) -> None:
        for site in self.sites:
            if site.mask is not None:
                site.mask.fill_(False)
        self._is_switched_on = False

    def _finish(self, runs: list[tuple[_Site, Run]]) -> None:
        """Fire the taps of a run, and say of its grafts what they changed."""
        for site, run in runs:
            for measure in run.after:
                measure(site.held, site.new)
        for site in self.sites:
            of = site.gradient_of
            if of is None:
                site.fire(Run(is_before=False), site.held)
            elif of.heard is not None:
                of.heard.replaced(site.held.clone())


def _again(ids: Ids) -> Ids:
    """Return ids to be taken anew: a graph writes to them without torch counting it."""
    return Ids(ids.names, ids.of, at_tap=ids.at_tap, block=ids.block)


def _padded(ids: Ids, dims: str | None, shape: torch.Size) -> Ids:
    """Return ids with padding for what a captured batch has more of."""
    try:
        taken = ids.taken()
        more = padded(parse_dims(dims or ""), shape, taken)
    except LayoutError:
        return ids  # which whoever needs them says
    return ids if more is taken else Ids.of_taken(more, at_tap=ids.at_tap)


_captures: weakref.WeakKeyDictionary[Any, Capture] = weakref.WeakKeyDictionary()
_current: dict[int, Capture] = {}
backend: Backend = Cuda()


def hold(
    name: str,
    value: Any,
    dims: str | None,
    extras: Mapping[str, Any] | None,
    grad: bool,
    tags: Mapping[str, Any],
    site: str,
    forward: bool,
    rows: Mapping[str, Any] | tuple[Ids, ...] | None,
) -> bool:
    """Make a tap one of the graph that is being captured; return whether there is such a graph.

    Args:
        name: as all that follow, what `firing.fire` is given.
        value: see there.
        dims: see there.
        extras: see there.
        grad: see there.
        tags: see there.
        site: see there.
        forward: see there.
        rows: see there.
    """
    if not _current:
        return False
    capture = _current.get(threading.get_ident())
    if capture is None:  # in a backward, which has threads of its own
        if len(_current) > 1:
            return False
        (capture,) = _current.values()
    if callable(value):
        value = value()
    is_tensor = isinstance(value, torch.Tensor)
    if is_tensor and not _can_be_held(value):
        return False  # and is refused, with the reason
    inner = {**(TAGS.since(capture.tags) or {}), **tags}
    given = (name, dims, extras, grad, inner, site or call_site(), forward)
    ids = rows if isinstance(rows, tuple) else Ids.given(rows, at_tap=True) if rows else ()
    with torch.no_grad():
        try:
            held = _copied(value) if is_tensor else value
            made = _Site(held, given, over(ROWS.since(capture.rows) or (), ids))
            if is_tensor and forward and sessions.listening == "graft":
                made.let_be_grafted(value)
        except (CaptureError, torch.OutOfMemoryError):
            return False  # and is refused
    capture.sites.append(made)
    if is_tensor and grad and value.requires_grad:
        value.register_hook(functools.partial(_hold_gradient, made))
    return True


def _can_be_held(value: torch.Tensor) -> bool:
    is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
    return is_plain and not value.is_conj() and not value.is_neg() and backend.is_capturing(value)


def _copied(value: torch.Tensor) -> torch.Tensor:
    held = torch.empty_like(value)
    as_bits(held, in_graph=True).copy_(as_bits(value, in_graph=True))
    return held.detach()


def _hold_gradient(of: _Site, gradient: torch.Tensor) -> None:
    if not _current or not _can_be_held(gradient):
        return
    capture = _current.get(threading.get_ident()) or next(iter(_current.values()))
    with torch.no_grad():
        made = _Site(_copied(gradient), of.given, of.ids)
    made.gradient_of = of
    capture.sites.append(made)


def _begin(graph: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    made = plain(graph, *args, **kwargs)
    _current[threading.get_ident()] = _captures[graph] = Capture()
    return made


def _end(graph: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _current.pop(threading.get_ident(), None)
    return plain(graph, *args, **kwargs)


def _replay(graph: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    capture = _captures.get(graph)
    if capture is None:
        _tell_bare()
        return plain(graph, *args, **kwargs)
    return capture.run(lambda: plain(graph, *args, **kwargs))


def _reset(graph: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _captures.pop(graph, None)
    return plain(graph, *args, **kwargs)


_told: tuple[Any, ...] = ()


def _tell_bare() -> None:
    global _told
    if sessions.active and _told != sessions.active:
        _told = sessions.active
        say(BARE)


_WRAPPED = {"capture_begin": _begin, "capture_end": _end, "replay": _replay, "reset": _reset}
_plain: dict[type, Mapping[str, Any]] = {}
_lock = threading.Lock()


def watch() -> None:
    """Hear of captures and runs from now on, where there may be any; twice is fine."""
    if not backend.is_there():
        return
    kind = backend.kind
    with _lock:
        firing.capturing = hold
        if kind in _plain:
            return
        _plain[kind] = {name: vars(kind).get(name) for name in _WRAPPED}
        for name, wrapper in _WRAPPED.items():
            setattr(kind, name, _wrapped(getattr(kind, name), wrapper))


def _wrapped(plain: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(self, plain, *args, **kwargs)

    never_compiled(wrapped)
    return wrapped


def unwatch() -> None:
    """Hear of them no more."""
    with _lock:
        firing.capturing = None
        while _plain:
            kind, calls = _plain.popitem()
            for name, plain in calls.items():
                if plain is None:
                    delattr(kind, name)
                else:
                    setattr(kind, name, plain)
    _captures.clear()
    _current.clear()
