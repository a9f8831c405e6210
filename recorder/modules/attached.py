"""One model with its taps: the rows of a table that fit it, bound to its modules, and the way back.

1. `tapped` chooses the section that fits best, and below which module (`tree.bases`).
2. Each row makes a `Binding` for each module it fits; a row of a value and one of its gradient that
   are called alike become one.
3. `Attached.detach` takes every hook away again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..tags import TagValue
from . import functions
from .bindings import Binding, Model
from .hooks import Hook, Places, Shared, Turns, is_dead
from .settled import Settled
from .table import Row, Section, Table
from .tree import Base, bases, below, is_identity, named

if TYPE_CHECKING:
    from torch.nn import Module

    Number = Callable[[weakref.ref[Module]], int]

Rivals = dict[tuple[int, str], tuple["weakref.ref[Any]", list["weakref.ref[Any]"]]]
"""A module's id and a section's name -> the module, and the models that have taps of that at it."""


class Attached:
    """The taps of one root.

    Attributes:
        label: what it is, for messages: its class.
        names: the qualified names of its modules.
        bindings: its taps.
        bound: each row as its table has it, with what it became at each module.
        sections: what the tables are called that fit it, with how many rows do.
        found: row -> how many modules it fits, and how many of these are identities.
        notes: what is to be said of it.
        is_told: whether that, and which table it has, was said.
    """

    def __init__(self, label: str, names: Mapping[str, Module], rivals: Rivals) -> None:
        self.label = label
        self._root = weakref.ref(names[""])
        self.names = list(names)
        self.bindings: list[Binding] = []
        self.bound: list[tuple[Row, Binding]] = []
        self.sections: list[tuple[Section, int]] = []
        self.found: dict[Row, list[int]] = {}
        self.notes: list[str] = []
        self.is_told = False
        self.base = weakref.ref(names[""])
        self._rivals = rivals
        self._hooks: list[Hook] = []
        self._handles: list[Any] = []
        self._functions: list[functions.Line] = []
        self._rivalries: list[tuple[list[weakref.ref[Any]], weakref.ref[Any]]] = []
        self._before: dict[int, Hook] = {}

    @property
    def is_alive(self) -> bool:
        """Whether its root is still there."""
        return self._root() is not None

    def detach(self) -> None:
        """Take every hook away."""
        for hook in self._hooks:
            hook.is_detached = True
        for handle in self._handles:
            handle.remove()
        functions.unbind(self._functions)
        for rivals, ref in self._rivalries:
            rivals[:] = [one for one in rivals if one is not ref]
        self._hooks, self._handles, self._functions, self._rivalries = [], [], [], []
        self._before = {}

    def on_call(self, module: Any, do: Callable[[], None]) -> None:
        """Do something as a module is called, before its taps."""
        hook = self._before.get(id(module))
        if hook is None:
            hook = self._hook_before(module, (), ())
        hook.ping = do

    def around(
        self, module: Any, before: Callable[..., None], after: Callable[..., None] | None
    ) -> None:
        """Do something before all hooks of a module that are there, and after them.

        Args:
            module: the module.
            before: called with the module, its arguments by position and by name, and None.
            after: called with these and its output, None where it raised; None to do nothing.
        """
        _drop_dead(module)
        first = Hook(module, (), ())
        first.also = before
        self._hooks.append(first)
        hooked = module.register_forward_pre_hook(first, with_kwargs=True, prepend=True)
        self._handles.append(hooked)
        if after is not None:
            last = Hook(module, (), ())
            last.also = after
            self._hooks.append(last)
            hooked = module.register_forward_hook(last, with_kwargs=True, always_call=True)
            self._handles.append(hooked)

    def bind(
        self, section: Section, base: Base, names: Mapping[str, Module], number: Number
    ) -> None:
        """Bind the rows of a section to the modules below a base, which is a model of its own."""
        inner = below(names, base.name)
        settled = Settled(section, inner[""])
        root = weakref.ref(inner[""])

        def begun() -> int:
            if (running := root()) is not None:
                settled.learn_axes(running)  # not of models that never run
            return number(root)

        model = Model(begun, base.name)
        at: dict[int, tuple[Any, list[tuple[Row, Binding]]]] = {}
        for row in section.rows:
            counts = self.found.setdefault(row, [0, 0])
            path = row.path.without(base.without)
            for name, module in inner.items():
                tags = path.fits(name)
                if tags is None:
                    continue
                counts[0] += 1
                if is_identity(module) and not row.takes_identity:
                    counts[1] += 1
                    continue
                row_here = replace(row, path=path)
                binding = self._binding(row_here, settled, model, tags, name, inner)
                at.setdefault(id(module), (module, []))[1].append((row, binding))
        for name, text in settled.unknown.items():
            self.notes.append(
                f"{section.name}: {name} = {text!r} gives no size for {type(inner['']).__name__}; "
                f"neither its config nor its modules have these attributes, so give a number"
            )
        standing = _standing(names)
        for module, bound in at.values():
            bound = _merged(bound)
            self.bound += bound
            bindings = list(dict.fromkeys(binding for _, binding in bound))
            places = standing.get(id(module), ())
            where = Places(places, names, base.name) if len(places) > 1 else None
            try:
                self._hook(module, bindings, where, self._shared(module, inner[""], section))
            except Exception as err:  # as TorchScript's modules, which take no hook with names
                for one in bindings:
                    one.misfit = f"it takes no hook: {type(err).__name__}: {err}"

    def _binding(
        self,
        row: Row,
        settled: Settled,
        model: Model,
        found: Mapping[str, TagValue],
        name: str,
        names: Mapping[str, Module],
    ) -> Binding:
        tags = settled.tags(row, found, name, names)
        parents = [name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1)]
        around = [names[one] for one in (*parents, "") if one in names]
        dims = tuple(settled.dims(text, around) for text in row.dims)
        called = row.taps or (row.path.called(name),)
        binding = Binding(row, model, name, called, dims, tags)
        model.bindings.append(binding)
        return binding

    def _shared(self, module: Any, model: Module, section: Section) -> Shared:
        key = (id(module), section.name)
        known = self._rivals.get(key)
        if known is None or known[0]() is not module:
            known = self._rivals[key] = weakref.ref(module), []
        rivals = known[1]
        rivals[:] = [ref for ref in rivals if ref() is not None]
        if all(ref() is not model for ref in rivals):
            ref = weakref.ref(model)
            rivals.append(ref)
            self._rivalries.append((rivals, ref))
        return Shared(model, rivals)

    def _hook(
        self, module: Any, bindings: list[Binding], places: Places | None, shared: Shared
    ) -> None:
        self.bindings += bindings
        _drop_dead(module)
        own = [one for one in bindings if not one.row.path.function]
        before = [one for one in own if one.row.path.place.side != "output"]
        after = [one for one in own if one.row.path.place.side == "output"]
        of_functions: dict[str, list[Binding]] = {}
        for one in bindings:
            if one.row.path.function:
                of_functions.setdefault(one.row.path.function, []).append(one)
        turns = {path: Turns() for path in of_functions}
        if before or turns:
            self._hook_before(module, before, list(turns.values()), places, shared)
        if after:
            hook = Hook(module, after, (), places, shared)
            self._hooks.append(hook)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        if turns:
            last = Hook(module, (), (), places, shared)
            last.ends = True
            self._hooks.append(last)
            self._handles.append(module.register_forward_hook(last, with_kwargs=True))
        for path, line in of_functions.items():
            rows = functions.Line(line, turns[path], places, shared)
            self._functions.append(rows)
            why = functions.bind(path, module, rows)
            for one in line if why else ():
                one.misfit = why

    def _hook_before(
        self,
        module: Any,
        bindings: Sequence[Binding],
        turns: Sequence[Turns],
        places: Places | None = None,
        shared: Shared | None = None,
    ) -> Hook:
        hook = self._before[id(module)] = Hook(module, bindings, turns, places, shared)
        self._hooks.append(hook)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return hook


def _drop_dead(module: Any) -> None:
    """Take away what is left in a copy of the hooks of the model that it was copied from."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if is_dead(hook)]:
            del hooks[key]


def _standing(names: Mapping[str, Module]) -> dict[int, list[str]]:
    """Return the names of each module."""
    found: dict[int, list[str]] = {}
    for name, module in names.items():
        found.setdefault(id(module), []).append(name)
    return found


def tapped(
    module: Module,
    patterns: Sequence[Row],
    tables: Sequence[Table],
    number: Number,
    rivals: Rivals | None = None,
) -> Attached:
    """Tap a model.

    Args:
        module: its root.
        patterns: rows whose paths are taken below the root itself.
        tables: tables of which the section that fits best is taken; where several are given, one
            whose `roots` name the class of a module.
        number: gives a model its number as its first tap fires.
        rivals: see `Rivals`; of all roots of a request.
    """
    names = named(module)
    found = Attached(type(names[""]).__name__, names, {} if rivals is None else rivals)
    if patterns:
        section = Section("--modules", tuple(patterns))
        found.bind(section, Base("", "", frozenset()), names, number)
        fitting = sum(1 for row in patterns if found.found[row][0])
        if fitting:
            found.sections.append((section, fitting))
    chosen = _chosen(tables, names)
    for section, base in chosen:
        found.bind(section, base, names, number)
        found.sections.append((section, len(base.found)))
    if chosen:
        found.base = weakref.ref(names[chosen[0][1].name])
    return found


def _chosen(tables: Sequence[Table], names: Mapping[str, Module]) -> list[tuple[Section, Base]]:
    """Return the section that fits a model best, with each of its bases."""
    sections = [section for table in tables for section in table.sections]
    if len(tables) > 1:
        sections = _meant(sections, names.values())
    best: list[tuple[Section, Base]] = []
    most = 0
    for section in sections:
        found = bases([row.path for row in section.rows], names)
        fitting = len(found[0].found) if found else 0
        if fitting > most:
            best, most = [(section, one) for one in found], fitting
    return best


def _meant(sections: Iterable[Section], modules: Iterable[Any]) -> list[Section]:
    """Return the sections for the outermost module that any of them is meant for."""
    known = list(sections)
    for module in modules:  # from the root on
        meant = [section for section in known if section.is_meant_for(module)]
        if meant:
            return meant
    return []


def _merged(bound: Sequence[tuple[Row, Binding]]) -> list[tuple[Row, Binding]]:
    """Let the row of a value and that of its gradient be one tap where both are called alike."""
    known: dict[Any, Binding] = {}
    merged = []
    for row, one in bound:
        place = one.row.path.place
        about = (
            one.row.path.function, place.side, place.members, one.names, one.dims,
            tuple(one.tags.items()), place.is_gradient,
        )  # fmt: skip
        other = known.get((*about[:-1], not place.is_gradient))
        known[about] = one
        if other is None:
            merged.append((row, one))
            continue
        plain, gradient = (other, one) if place.is_gradient else (one, other)
        plain.row = replace(plain.row, grad=True)
        merged = [(of, plain if binding is gradient else binding) for of, binding in merged]
        merged.append((row, plain))
    return merged
