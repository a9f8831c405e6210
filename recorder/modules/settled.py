"""What of a table hangs on the model that is there: sizes, tags and axes that its config gives."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import FilterError
from ..filters import Filter
from ..layouts import parts
from ..mesh import current_mesh, learn_axis, learn_mesh
from ..ranks import is_group_up
from ..tags import TagValue
from .table import LAST, Row, Section
from .tree import every

_CONFIGS = ("config", "model_args", "args", "cfg", "params", "hparams")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_MEGATRON = "layer_number"
"""A layer's number in all stages of a pipeline, from 1, as Megatron-Core's layers know it."""


class Attributes(Mapping[str, Any]):
    """What an object or a mapping holds, for expressions; what it lacks is None."""

    def __init__(self, *holders: Any) -> None:
        self._holders = [one for one in holders if one is not None]

    def __getitem__(self, name: str) -> Any:
        for one in self._holders:
            found = one.get(name) if isinstance(one, Mapping) else got(one, name)
            if found is not None:
                return found
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def got(holder: Any, name: str) -> Any:
    """Return an attribute of something of the job's; None where there is none, or it fails."""
    try:
        found: Any = getattr(holder, name, None)
        return found.item() if getattr(found, "shape", None) == () else found  # a numpy scalar
    except Exception:  # a property's, or a `__getattr__`'s, of the job's own
        return None


def config_of(module: Any) -> Attributes:
    """Return what a model's config gives; of one that has none, nothing."""
    holders = []
    for name in _CONFIGS:
        found = vars(module).get(name)
        if found is not None and not isinstance(found, (str, int, float)):
            holders.append(found)
            inner = got(found, "text_config")  # of a model of images and text
            if inner is not None:
                holders.append(inner)
    return Attributes(*holders)


class Settled:
    """A section at one model.

    Attributes:
        unknown: names of sizes that nothing gives, though a layout in parts needs them, each with
            the expression.
    """

    def __init__(self, section: Section, base: Any) -> None:
        self._section = section
        self._config = config_of(base)
        self.unknown: dict[str, str] = {}

    def dims(self, text: str, around: Sequence[Any] = ()) -> str:
        """Return a layout with the sizes of what is fused or in parts in it, behind a `#`.

        Args:
            text: as the table has it.
            around: the module and those that hold it, the innermost first: they give what the
                model's config does not.
        """
        if not self._section.sizes:
            return text
        attributes = Attributes(self._config, *around)
        facts = []
        for name in _fused_names(text):
            if name not in self._section.sizes or f"{name}=" in text:
                continue
            size = self._section.sizes[name]
            value = _tried(size, attributes) if isinstance(size, Filter) else size
            if type(value) is int and value > 0:
                facts.append(f"{name}={value}")
            elif parts.has_parts(text) and isinstance(size, Filter):
                self.unknown[name] = size.text
        if not facts:
            return text
        return f"{text} {' '.join(facts)}" if "#" in text else f"{text} # {' '.join(facts)}"

    def tags(
        self, row: Row, found: Mapping[str, TagValue], name: str, names: Mapping[str, Any]
    ) -> dict[str, TagValue]:
        """Return a tap's tags.

        Args:
            row: its row.
            found: what stands in the path's braces.
            name: the module's name.
            names: all modules below the base.
        """
        tags: dict[str, TagValue] = {}
        for tag, value in found.items():
            holder = names.get(row.path.holder(name, tag))
            tags[tag] = self._number(tag, value, dict(row.path.tags)[tag], holder)
        for tag, fixed in row.tags.items():
            given = self._value(fixed) if isinstance(fixed, Filter) else fixed
            tags[tag] = self.last(names) if given == LAST and tag == "layer" else given
        return tags

    def last(self, names: Mapping[str, Any]) -> int:
        """Return the number of the last layer, from 0."""
        for attribute in _LAYERS:
            count = self._config.get(attribute)
            if type(count) is int and count > 0:
                return count - 1
        numbers = [
            value
            for row in self._section.rows
            for name in names
            for tag, value in (row.path.fits(name) or {}).items()
            if tag == "layer" and isinstance(value, int)
        ]
        return max(numbers, default=0)

    def learn_axes(self, base: Any) -> None:
        """Take note of what the model says of axes: those of its tensors, and by other names."""
        for parameter in (p for one in every(base) for p in one._parameters.values()):
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is not None:
                learn_mesh(mesh)
        if current_mesh() is None and is_group_up():
            for mesh in _meshes():
                learn_mesh(mesh)
        for axis, (other, condition) in self._section.axes.items():
            holds = condition is None or self._value(condition)
            learn_axis(axis, other if holds else None)
        is_cut = self._config.get("sequence_parallel")  # Megatron-Core's config, for any table
        if is_cut is not None and "sp" not in self._section.axes:
            learn_axis("sp", "tp" if is_cut else None)

    def _number(self, tag: str, value: TagValue, more: int, holder: Any) -> TagValue:
        expression = self._section.numbers.get(tag)
        if expression is not None and holder is not None:
            given = _tried(expression, Attributes(holder, self._config))
            return given - more if type(given) is int else value
        number = got(holder, _MEGATRON)
        if tag == "layer" and type(number) is int and number > 0:
            return number - 1 - more
        return value

    def _value(self, expression: Filter) -> Any:
        return _tried(expression, self._config)


def _meshes() -> list[Any]:
    """Return the device meshes that the job has made."""
    device_mesh = sys.modules.get("torch.distributed.device_mesh")
    kind = getattr(device_mesh, "DeviceMesh", None)
    return [] if kind is None else [one for one in gc.get_objects() if type(one) is kind]


def _fused_names(text: str) -> list[str]:
    """Return the names in a layout whose sizes its shape may not give, each once.

    They stand in a fused dim or in a part, or are held by several ranks alike if they are few.
    """
    names: dict[str, None] = dict.fromkeys(re.findall(r"(\w+)\[[^\]]*:repeat", text))
    plain = re.sub(r"\[[^\]]*\]", "", text.partition("#")[0])
    depth = 0
    for word in re.findall(r"[(){}]|[A-Za-z_]\w*(?!\w*\s*:)", plain):
        if word in "(){}":
            depth += 1 if word in "({" else -1
        elif depth:
            names[word] = None
    return list(names)


def _tried(expression: Filter, names: Mapping[str, Any]) -> Any:
    try:
        value = expression.value(names)
    except (FilterError, ZeroDivisionError):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value
