"""What of a table hangs on the model that is there: sizes, tags and axes that its config gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import FilterError
from ..filters import Filter
from ..mesh import learn_axis, learn_mesh
from ..tags import TagValue
from .table import LAST, Row, Section

_CONFIGS = ("config", "model_args", "args", "cfg", "params", "hparams")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_FUSED = re.compile(r"[({]")
_NAME = re.compile(r"[A-Za-z_]\w*")
_MEGATRON = "layer_number"
"""A layer's number in all stages of a pipeline, from 1, as Megatron-Core's layers know it."""


class Attributes(Mapping[str, Any]):
    """What an object or a mapping holds, for expressions; what it lacks is None."""

    def __init__(self, *holders: Any) -> None:
        self._holders = [one for one in holders if one is not None]

    def __getitem__(self, name: str) -> Any:
        for one in self._holders:
            try:
                found = one.get(name) if isinstance(one, Mapping) else getattr(one, name, None)
            except Exception:  # a property of the job's that fails
                continue
            if found is not None:
                return found
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def config_of(module: Any) -> Attributes:
    """Return what a model's config gives; of one that has none, nothing."""
    holders = []
    for name in _CONFIGS:
        found = vars(module).get(name, None) if hasattr(module, "__dict__") else None
        if found is not None and not isinstance(found, (str, int, float)):
            holders.append(found)
            inner = getattr(found, "text_config", None)  # of a model of images and text
            if inner is not None:
                holders.append(inner)
    return Attributes(*holders)


class Settled:
    """A section at one model.

    Attributes:
        sizes: name -> size, as far as the config gives it.
        unknown: what is to be said of those that it does not give: name -> a clause.
    """

    def __init__(self, section: Section, base: Any) -> None:
        self._section = section
        self._config = config_of(base)
        self.sizes: dict[str, int] = {}
        self.unknown: dict[str, str] = {}
        for name, size in section.sizes.items():
            value = self._value(size) if isinstance(size, Filter) else size
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if type(value) is int and value > 0:
                self.sizes[name] = value
            else:
                text = size.text if isinstance(size, Filter) else size
                self.unknown[name] = f"{name} = {text!r} gives {value} for this model's config"

    def dims(self, text: str) -> str:
        """Return a layout with the sizes of what is fused or in parts in it, behind a `#`."""
        named = re.sub(r"\[[^\]]*\]", "", text.partition("#")[0])
        names: list[str] = []
        depth = 0
        for piece in re.split(r"([(){}])", named):
            depth += (piece in "({") - (piece in ")}") if piece and piece in "(){}" else 0
            if depth and _FUSED.match(piece) is None:
                names += _NAME.findall(piece)
        facts = [
            f"{name}={self.sizes[name]}"
            for name in dict.fromkeys(names)
            if name in self.sizes and f"{name}=" not in text
        ]
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
        for parameter in base.parameters():
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is not None:
                learn_mesh(mesh)
        for axis, (other, condition) in self._section.axes.items():
            if condition is None or self._value(condition):
                learn_axis(axis, other)
        if self._config.get("sequence_parallel"):
            learn_axis("sp", "tp")

    def _number(self, tag: str, value: TagValue, more: int, holder: Any) -> TagValue:
        expression = self._section.numbers.get(tag)
        if expression is not None and holder is not None:
            given = _tried(expression, Attributes(holder, self._config))
            return value if given is None else given - more
        number = getattr(holder, _MEGATRON, None)
        if tag == "layer" and type(number) is int and number > 0:
            return number - 1 - more
        return value

    def _value(self, expression: Filter) -> Any:
        return _tried(expression, self._config)


def _tried(expression: Filter, names: Mapping[str, Any]) -> Any:
    try:
        value = expression.value(names)
    except (FilterError, ZeroDivisionError):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value
