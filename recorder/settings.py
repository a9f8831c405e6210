"""What a session can be told, each option once: its values, its default and what it is for.

1. A settings class is a frozen dataclass whose fields are made by `option`.
2. `Settings.given` checks values, however they come: as arguments, from variables, from a command.
3. `Settings.variables` and `Settings.from_variables` take them through the environment to the
   ranks; `commands.clicking.options_of` makes a command's options of them.

To add an option, add a field here and the argument to the session's signature.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from .errors import UsageError
from .filters import Filter
from .imported import is_path
from .paths import Path, parse_path
from .sizes import format_binary_size, parse_duration, parse_size

S = TypeVar("S", bound="Settings")
Check = Callable[[Any, str], Any]
"""(value, what it is called where it was given) -> the value that is meant; raises `UsageError`."""

_MOST_STAGING = 1 << 50
_STAGING = 256 << 20
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Option:
    """One option of a session.

    Attributes:
        name: of the field and the argument.
        variable: the environment's variable.
        default: what holds where nothing is given.
        help: what it does, a sentence.
        metavar: what stands for its value in a command's usage.
        choices: its values, where there are few.
        is_size: whether it is a number of bytes.
        is_multiple: whether a command may give it several times; its variable has `;` between.
        check: see `Check`.
    """

    name: str
    variable: str
    default: Any
    help: str
    metavar: str
    choices: tuple[str, ...]
    is_size: bool
    is_multiple: bool
    check: Check

    @property
    def is_flag(self) -> bool:
        """Whether it is just on or off."""
        return isinstance(self.default, bool)

    @property
    def flag(self) -> str:
        """What it is called in a command: `--max-bytes`, or `--check/--no-check`."""
        name = self.name.replace("_", "-")
        return f"--{name}/--no-{name}" if self.default is True else f"--{name}"

    @property
    def default_text(self) -> str:
        """The default as a user writes it, "" where that is nothing."""
        if self.default is None or self.is_flag or self.default in (0, ()):
            return ""
        return format_binary_size(self.default) if self.is_size else str(self.default)

    @property
    def sentence(self) -> str:
        """What it does, and its default where nothing else shows it."""
        if self.choices or not self.default_text:
            return self.help
        return f"{self.help.removesuffix('.')}; {self.default_text} by default."

    @property
    def assignment(self) -> str:
        """The variable, with the value that turns a flag from its default."""
        return f"{self.variable}={int(not self.default)}" if self.is_flag else self.variable

    def text(self, value: Any) -> str | None:
        """Return a value as its variable has it; None for the default, which needs no variable.

        Raises:
            UsageError: another process cannot be told of it.
        """
        if value == self.default:
            return None
        if isinstance(value, Filter):
            return value.text
        if callable(value):
            raise UsageError(f"{self.name} is a function; give its path, pkg.mod.fn, to a command")
        if self.is_multiple:
            return ";".join(one.text for one in value)
        return str(int(value) if self.is_flag else value)

    def read(self, text: str | None) -> Any:
        """Return the value that a variable gives; it counts as not given where it is empty.

        Raises:
            UsageError: it cannot be used.
        """
        if not text:
            return self.default
        if self.is_flag:
            word = text.strip().lower()
            if word not in _YES and word not in _NO:
                raise UsageError(f"{self.variable} is {text!r}; give 1 for yes, or 0 for no")
            return word in _YES
        return self.checked(text, self.variable)

    def checked(self, value: Any, called: str) -> Any:
        """Return the value that is meant.

        Args:
            value: as given.
            called: what the option is called where it was given.

        Raises:
            UsageError: it cannot be used.
        """
        if value is self.default:
            return value
        if self.choices and value not in self.choices:
            raise UsageError(f"{called} is {value!r}; choose one of {', '.join(self.choices)}")
        return self.check(value, called)


def option(
    default: Any,
    help: str,
    *,
    metavar: str = "",
    choices: tuple[str, ...] = (),
    check: Check | None = None,
    is_multiple: bool = False,
) -> Any:
    """Return a dataclass field that is an option; see `Option`."""
    about = {
        "help": help,
        "metavar": metavar,
        "choices": choices,
        "is_size": check in (size, _staging),
        "is_multiple": is_multiple,
        "check": check or _as_it_is,
    }
    return field(default=default, metadata=about)


def _as_it_is(value: Any, called: str) -> Any:
    return value


def expression(value: Any, called: str) -> Filter | None:
    """Return a filter from one or its text."""
    return Filter.coerce(value)


def size(value: Any, called: str) -> int:
    """Return a number of bytes from one or text such as `20GB`."""
    return parse_size(value)


def duration(value: Any, called: str) -> float:
    """Return a number of seconds from one or text such as `2s`."""
    return parse_duration(value)


def whole_number(value: Any, called: str) -> int:
    """Return a whole number from one or its text."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError
        return int(value)
    except ValueError:
        raise UsageError(f"{called} is {value!r}; give a whole number, such as 2 or -1") from None


def _steps(value: Any, called: str) -> int:
    number = value
    if isinstance(value, str) and value.isascii() and value.isdigit():
        number = int(value)
    if type(number) is not int or number < 1:
        raise UsageError(f"{called} is {value!r}; give a number of steps, 1 or more")
    return number


def _staging(value: Any, called: str) -> int:
    nbytes = parse_size(value)
    if nbytes > _MOST_STAGING:
        raise UsageError(f"{called} is {value!r}, more than any machine has; try 1GiB")
    return nbytes


class Settings:
    """The options of a session; its subclasses are frozen dataclasses of `option` fields."""

    PREFIX: ClassVar[str]
    """What their variables begin with."""

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """The options, in the order in which they are shown."""
        return tuple(
            Option(
                name=one.name,
                variable=f"{cls.PREFIX}_{one.name.upper()}",
                default=one.default,
                **one.metadata,
            )
            for one in fields(cls)  # type: ignore[arg-type]  # a subclass is a dataclass
        )

    @classmethod
    def given(cls: type[S], values: Mapping[str, Any]) -> S:
        """Return settings from arguments; what is no option among them is left aside.

        Raises:
            UsageError: a value cannot be used.
        """
        options = (one for one in cls.options() if one.name in values)
        return cls(**{one.name: one.checked(values[one.name], one.name) for one in options})

    @classmethod
    def named(cls: type[S], values: Mapping[str, Any]) -> S:
        """Return settings from options by name.

        Raises:
            UsageError: one is unknown, with the nearest, or its value cannot be used.
        """
        known = sorted(one.name for one in cls.options())
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, 2) or known
                raise UsageError(f"{name!r} is no option; there is {', '.join(close)}")
        return cls.given(values)

    @classmethod
    def from_variables(cls: type[S], environ: Mapping[str, str] = os.environ) -> S:
        """Return the settings that the environment gives.

        Raises:
            UsageError: a variable cannot be used.
        """
        return cls(**{one.name: one.read(environ.get(one.variable)) for one in cls.options()})

    def variables(self) -> dict[str, str | None]:
        """Return the environment that says the same; None where a variable is not to be set."""
        return {one.variable: one.text(getattr(self, one.name)) for one in self.options()}

    def described(self) -> dict[str, Any]:
        """Return the options as JSON has them, for whoever reads later how it was done."""
        found = {one.name: getattr(self, one.name) for one in self.options()}
        return {
            name: value.text
            if isinstance(value, Filter)
            else [one.text for one in value]
            if isinstance(value, tuple)
            else f"{value.__module__}.{getattr(value, '__qualname__', value)}"
            if callable(value)
            else value
            for name, value in found.items()
        }


def _name(value: Any, called: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{called} is {value!r}; give the name of a table, or of its file")
    return value


def _paths(value: Any, called: str) -> tuple[Path, ...]:
    """Return paths from some, their texts, or one text with `;` between."""
    if isinstance(value, str):
        value = [piece for piece in value.split(";") if piece.strip()]
    elif isinstance(value, Path):
        value = [value]
    try:
        return tuple(one if isinstance(one, Path) else parse_path(one.strip()) for one in value)
    except (TypeError, AttributeError):
        raise UsageError(f"{called} is {value!r}; give paths of modules, as texts") from None


SYSTEMS = ("auto", "transformers", "vllm", "sglang")
"""What `rows` may name beside a function."""


def _rows(value: Any, called: str) -> Any:
    """Return a function, or the name of a system or a function."""
    if callable(value) or (isinstance(value, str) and (value in SYSTEMS or is_path(value))):
        return value
    raise UsageError(
        f"{called} is {value!r}; give one of {', '.join(SYSTEMS)}, or a function of (module, args, "
        "kwargs) by its path, such as pkg.mod.fn"
    )


@dataclass(frozen=True)
class TapSettings(Settings):
    """Which modules to tap in a program without taps: options of recording and of replaying."""

    PREFIX = "GRAFT"
    PREFIXES: ClassVar[tuple[str, ...]] = ("GRAFT_RECORD", "GRAFT_REPLAY")

    modules: tuple[Path, ...] = option(
        (),
        "Tap the modules of this path, such as 'model.layers.{layer}.mlp' or '*.mlp:input'. May be "
        "repeated.",
        metavar="PATH",
        check=_paths,
        is_multiple=True,
    )
    taps: str | None = option(
        None,
        "Tap what a table names: its file, FILE:SECTION, one that comes with tensorgraft, or auto "
        "to choose by the model's class.",
        metavar="TABLE",
        check=_name,
    )
    step_on: str = option(
        "step",
        "Where an iteration ends: where the program calls step(), as the first model is called "
        "again, or where an optimizer has stepped.",
        choices=("step", "root", "optimizer"),
    )
    rows: Callable[..., Any] | str | None = option(
        None,
        "Say which row of a tensor is which token, so that rows meet wherever they were computed: "
        "auto, transformers, vllm or sglang read it off the calls of such a model; or a function "
        "of (module, args, kwargs) that returns ids by dims.",
        metavar="SYSTEM",
        check=_rows,
    )

    @property
    def wants_modules(self) -> bool:
        """Whether anything is to be done at a program's modules."""
        return bool(self.modules or self.taps or self.rows or self.step_on != "step")

    @classmethod
    def of_environment(cls, prefix: str, environ: Mapping[str, str] = os.environ) -> TapSettings:
        """Return what the variables of one session's settings say.

        Raises:
            UsageError: a variable cannot be used.
        """
        return TapSettings(
            **{
                one.name: one.read(environ.get(f"{prefix}_{one.name.upper()}"))
                for one in TapSettings.options()
            }
        )


@dataclass(frozen=True)
class RecordSettings(TapSettings):
    """How to record: the options of `graft record` and of `Recorder`."""

    PREFIX = "GRAFT_RECORD"

    filter: Filter | None = option(
        None, "Record only these taps.", metavar="EXPR", check=expression
    )
    level: str = option(
        "tensors",
        "What to keep of a tensor: its elements, its statistics and digest, or its digest alone.",
        choices=("tensors", "stats", "digests"),
    )
    max_bytes: int | None = option(
        None,
        "Stop recording, not the job, before RUN's tensors take more than this, 20GB for example; "
        "each rank has an equal share.",
        metavar="SIZE",
        check=size,
    )
    min_free: int | None = option(
        None,
        "Stop recording, not the job, before the file system of RUN has less than this free.",
        metavar="SIZE",
        check=size,
    )
    keep_last: int | None = option(
        None,
        "Keep only the last N complete steps, as step() counts them, and the one under way: a ring "
        "for long jobs.",
        metavar="N",
        check=_steps,
    )
    fsync: str = option(
        "off",
        "When to wait for the device, so that a recording survives a power cut: never, at the end "
        "of each shard, or of each step.",
        choices=("off", "shard", "step"),
    )
    access: str = option(
        "private",
        "Who may read the files: you alone, your group, or all.",
        choices=("private", "group", "all"),
    )
    staging: int = option(
        _STAGING,
        "Memory of each rank for snapshots that wait to be written, and for writing them.",
        metavar="SIZE",
        check=_staging,
    )
    when_full: str = option(
        "hold",
        "What to do with a tap when that memory is full, or what waits in it is half a second old: "
        "hold the job until there is room, or drop the tap and count it.",
        choices=("hold", "drop"),
    )
    max_hold: float | None = option(
        None,
        "Hold the job no longer than this in a step, or in a minute of a longer one, 2s for "
        "example; what finds no room then is dropped and counted, and the status is 3.",
        metavar="TIME",
        check=duration,
    )
    overwrite: bool = option(False, "Replace the recording that is in RUN already.")
