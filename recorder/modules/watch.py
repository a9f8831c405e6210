"""Find models as they are first called, and tap them; nothing of it is felt by any other module.

1. `begin` makes a `Request`: which tables, and where a step ends. The first arms `_Watch`.
2. `nn.Module.__init__` and `__setstate__` note each module that is made, which arms one hook on all
   modules, for a moment: at the next call of any module `_Watch.first_call` finds its root, gives
   the few modules that have taps their own (`attached`), and takes the hook on all away again.
3. `report_all` says what the tables of the environment found (`request`).

The environment is read again at the first call of a module, since some launchers set it late.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from ..bits import never_compiled
from ..diagnostics import say
from ..errors import GraftError, ReplayError, is_from_the_job
from ..mailbox import LOADED, SURVEY, TAPS, VARIABLE, write_report
from ..mesh import forget_axes
from ..settings import TapSettings
from ..taps import dumper, sessions
from ..taps.firing import outside_dynamo
from .hooks import Hook
from .request import Request
from .survey import Survey, begin_survey
from .told import lines

log = logging.getLogger(__name__)
_PATIENCE, _SHARE = 3, 100
"""After so many looks in vain at modules that stand alone, such as a forward may make, the next is
not before so many times what the last look took."""


class _Watch:
    """The modules that are made, and the hook that sees the next call of any."""

    def __init__(self) -> None:
        self.requests: tuple[Request | Survey, ...] = ()
        # By identity: a job's module may compare and hash as it likes.
        self._seen: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._fresh: set[int] = set()
        self._looked_in_vain = 0
        self._not_before = 0.0
        self._handle: Any = None
        self._lock = threading.RLock()
        self.is_installed = False
        self.is_late = False  # whether the environment may ask for something later
        self._plain: dict[str, Callable[..., Any]] = {}

    def install(self, *, is_late: bool) -> None:
        """Note each module from now on; `is_late`: and those there are."""
        with self._lock:
            if not self.is_installed:
                self.is_installed = True
                functools.update_wrapper(_compile, torch.compile)
                for holder, name, replacement in _PUT:
                    # What somebody, such as the compiler, has put around it meanwhile still has it.
                    if name not in self._plain:
                        self._plain[name] = getattr(holder, name)
                        setattr(holder, name, replacement)
                _hear_of_compiles(True)
                for one in gc.get_objects() if is_late else ():
                    # Not isinstance: it asks objects of others what they are, and some answer.
                    if issubclass(type(one), torch.nn.Module) and "_modules" in vars(one):
                        self._seen[id(one)] = one
            self._fresh.update(self._seen.keys())
            if self._fresh:
                self._arm()

    def uninstall(self) -> None:
        """Leave torch as it was."""
        with self._lock:
            self._disarm()
            _hear_of_compiles(False)
            forget_axes()
            self._seen.clear()
            self._fresh.clear()
            self.is_installed = False
            for holder, name, replacement in _PUT:
                if getattr(holder, name) is replacement:
                    setattr(holder, name, self._plain.pop(name))

    def plain(self, name: str) -> Any:
        """Return what torch had before something was put in its place."""
        return self._plain[name]

    def made(self, module: Any) -> None:
        """Note a module that is made."""
        if not self.requests and not self.is_late:
            return
        self._seen[id(module)] = module
        self._fresh.add(id(module))
        if self._handle is None:
            self._arm()

    def _arm(self) -> None:
        with self._lock:
            if self._handle is None:
                register: Any = register_module_forward_pre_hook
                self._handle = register(_on_call)

    def _disarm(self) -> None:
        with self._lock:
            if self._handle is not None:
                self._handle.remove()
                self._handle = None

    def first_call(self, module: Any, args: tuple[Any, ...]) -> None:
        """Tap what is new, as the first module after it was made is called, before that runs."""
        begun = time.monotonic()
        if begun < self._not_before and not self._has_fresh_holder():
            return
        known = _hooks_of(module)
        try:
            with self._lock:  # whoever calls meanwhile waits here until taps are in their place
                late_environment()
                fresh, self._fresh = self._fresh, set()
                if fresh:
                    found = self._find(module, fresh)
                    self._looked_in_vain = 0 if found else self._looked_in_vain + 1
                if not self._fresh:
                    self._disarm()
                if self._looked_in_vain > _PATIENCE:
                    self._not_before = time.monotonic() + _SHARE * (time.monotonic() - begun)
            for hook in _hooks_of(module):
                if hook not in known:  # torch had listed this call's hooks before it was there
                    hook(module, args, _kwargs_of_call())
        except ReplayError:
            raise
        except Exception as err:
            if is_from_the_job(err):
                raise
            log.debug("at a root", exc_info=True)
            say(f"{type(module).__name__} is not tapped: {type(err).__name__}: {err}")

    def _has_fresh_holder(self) -> bool:
        fresh = (self._seen.get(key) for key in list(self._fresh))
        return any(one is not None and one._modules for one in fresh)

    def look(self) -> None:
        """Tap what is new now, as before it is compiled."""
        with self._lock:
            fresh, self._fresh = self._fresh, set()
            if fresh:
                self._find(None, fresh)
            self._disarm()

    def renew(self) -> None:
        """Begin anew in a child: the thread that held the lock may not be here."""
        self._lock = threading.RLock()

    def _find(self, called: Any, fresh: set[int]) -> bool:
        """Tap the roots of fresh modules; return whether anything was found."""
        # Other threads make modules meanwhile.
        seen = [(id(one), one) for ref in self._seen.valuerefs() if (one := ref()) is not None]
        parents: dict[int, Any] = {}
        for _, one in seen:
            for child in list(vars(one).get("_modules", {}).values()):
                if child is not None:
                    parents.setdefault(id(child), one)

        def top(module: Any) -> Any:
            above = {id(module)}
            while (parent := parents.get(id(module))) is not None and id(parent) not in above:
                module = parent
                above.add(id(module))
            return module

        first = None if called is None else top(called)
        new = [one for key, one in seen if key in fresh]
        roots = {id(root): root for root in map(top, new)}
        is_any = False
        # The one that is called is the first model, whatever was made before it.
        for root in sorted(roots.values(), key=lambda root: root is not first):
            inside = called if root is first else None
            for request in self.requests:
                try:
                    is_any = bool(request.on_root(root, inside)) or is_any
                except Exception as err:
                    if is_from_the_job(err):
                        raise
                    log.debug("at a root", exc_info=True)
                    say(f"{type(root).__name__} is not tapped: {type(err).__name__}: {err}")
        return is_any


def _hooks_of(module: Any) -> list[Hook]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Hook)]


_watch = _Watch()
os.register_at_fork(after_in_child=_watch.renew)
_from_environment: dict[str, Request | None] = {}
sessions.follow(dumper.follow)


def _noting_init(self: Any, *args: Any, **kwargs: Any) -> None:
    _watch.plain("__init__")(self, *args, **kwargs)
    if not torch.compiler.is_compiling():  # what is made in a compiled forward is gone with it
        _watch.made(self)


def _on_call(module: Any, args: tuple[Any, ...]) -> None:
    """What torch calls before the forward of any module, for a moment.

    The compiler may trace this and break no graph: it has been looked before (`_compile`).
    """
    if not torch.compiler.is_compiling():
        outside_dynamo(_first_call)(module, args)


def _compile(*args: Any, **kwargs: Any) -> Any:
    """As `torch.compile`, with the taps of what is there in their place before."""
    _guarded_look()
    compiled = _watch.plain("compile")(*args, **kwargs)
    _hear_of_compiles(True)
    return compiled


def _hear_of_compiles(wanted: bool) -> None:
    """Look, or no more, at what is new also as the compiler begins, if that is there."""
    callback: Any = sys.modules.get("torch._dynamo.callback")
    if not hasattr(callback, "on_compile_start"):
        return
    with suppress(Exception):  # it is not there yet, or `torch._dynamo.reset` has taken it away
        callback.callback_handler.remove_start_callback(_on_compile_start)
    if wanted:
        callback.on_compile_start(_on_compile_start)


def _on_compile_start(*args: Any) -> None:
    _guarded_look()


def _guarded_look() -> None:
    try:
        _watch.look()
    except Exception as err:  # torch does not guard this, and a compile is the job's
        if is_from_the_job(err):
            raise
        log.debug("before a compile", exc_info=True)


def _first_call(module: Any, args: tuple[Any, ...]) -> None:
    _watch.first_call(module, args)


never_compiled(_first_call)


def _noting_setstate(self: Any, state: Any) -> None:
    _watch.plain("__setstate__")(self, state)
    _watch.made(self)


_PUT: tuple[tuple[Any, str, Any], ...] = (
    (torch.nn.Module, "__init__", _noting_init),
    (torch.nn.Module, "__setstate__", _noting_setstate),
    (torch, "compile", _compile),
)
"""What is put in the place of what of torch's, while modules are looked for."""


def _kwargs_of_call() -> Mapping[str, Any]:
    """Return what the module whose hooks are called was called with by name.

    A hook on all modules is not given it; torch's frame that calls it holds it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("_call_impl", "inner") and "kwargs" in frame.f_locals:
            found = frame.f_locals["kwargs"]
            return found if isinstance(found, dict) else {}
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def begin(settings: TapSettings, *, is_late: bool = True, session: str = "") -> Request | None:
    """Tap models as these settings say, from now on; None where they name nothing.

    Args:
        settings: what is wanted.
        is_late: whether models may be there already.
        session: which session's environment asks for it, "" for none.

    Raises:
        UsageError: a table cannot be read, or a function imported; what the environment names is
            not before a model is called, since that may be later than `import torch`.
    """
    if not settings.wants_modules:
        return None
    plain = {one.name: getattr(settings, one.name) for one in TapSettings.options()}
    settings = TapSettings(**plain)
    for known in _watch.requests:  # two that want the same get each tap once
        if isinstance(known, Request) and known.settings == settings:
            known.users += 1
            return known
    request = Request(settings, session)
    if request.following is not None and not session:
        request.following.load()
    _listen(request, is_late=is_late)
    request.watch_steps()
    return request


def _listen(request: Request | Survey, *, is_late: bool) -> None:
    _watch.requests = (*_watch.requests, request)
    _watch.install(is_late=is_late)


def end(request: Request | None) -> None:
    """Take its hooks away."""
    if request is None:
        return
    request.users -= 1
    if request.users:
        return
    request.detach()
    if VARIABLE not in os.environ:
        for line in lines([request.report()], request.settings):
            say(line)
    _watch.requests = tuple(one for one in _watch.requests if one is not request)
    if not _watch.requests:
        _watch.uninstall()


def late_environment() -> None:
    """Begin what `GRAFT_*` asks for, once, as soon as it does.

    Some launchers, Ray's among them, give a process its environment when it runs already.
    """
    sessions.watch_environment()
    for kind in (SURVEY, *TapSettings.PREFIXES):
        if kind in _from_environment or not os.environ.get(kind):
            continue
        _from_environment[kind] = None
        try:
            settings = TapSettings.of_environment(kind)
            if kind == SURVEY:
                _listen(begin_survey(), is_late=not _watch.is_installed)
            is_late = not _watch.is_installed
            request = _from_environment[kind] = begin(settings, is_late=is_late, session=kind)
            if request is not None:
                request.is_environment_s = True
        except GraftError as err:
            say(f"{kind} asks for taps that cannot be made: {err}")
            write_report({"session": kind, "state": "refused", "reason": str(err)})


def _wants_modules(kind: str) -> bool:
    names = (f"{kind}_{one.name.upper()}" for one in TapSettings.options())
    return bool(os.environ.get(kind)) and any(map(os.environ.get, names))


def watch_environment() -> None:
    """Note modules from now on for what the environment asks for, or may ask for later."""
    write_report({"session": LOADED, "pid": os.getpid()})
    is_late = _watch.is_late = "ray" in sys.modules
    if is_late or SURVEY in os.environ or any(map(_wants_modules, TapSettings.PREFIXES)):
        _watch.install(is_late=False)
        late_environment()
    if is_late:
        _read_late()
    sessions.at_exit(report_all)


def _read_late() -> None:
    """Read the environment again as a process group is set up."""
    distributed = sys.modules.get("torch.distributed")
    begin_group = getattr(distributed, "init_process_group", None)
    if begin_group is None:
        return

    @functools.wraps(begin_group)
    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        late_environment()
        return begin_group(*args, **kwargs)

    distributed.init_process_group = init_process_group  # type: ignore[union-attr]


def report_all() -> None:
    """Tell the wrapper, or whoever reads stderr, what the tables of the environment found."""
    for request in _from_environment.values():
        if request is not None and not request.is_reported:
            request.is_reported = True
            found = request.report()
            write_report({"session": TAPS, "pid": os.getpid(), "is_last": True, "taps": found})
            # A launcher has no model, and nothing to say; under a wrapper all is said together.
            is_told = VARIABLE not in os.environ and bool(request.attached or request.others)
            for line in lines([found], request.settings) if is_told else ():
                say(line)
