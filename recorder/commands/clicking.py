"""Pieces that the commands share: errors to exit statuses, options, filters, sizes, groups."""

from __future__ import annotations

import difflib
import functools
import shutil
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import click

from ..diagnostics import printable
from ..errors import GraftError
from ..filters import Filter
from ..format import tables
from ..settings import Option, Settings
from ..sizes import parse_size

F = TypeVar("F", bound=Callable[..., Any])

COMMAND = click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)


def note(message: str) -> None:
    """Write one diagnostic line to stderr."""
    click.echo(f"[graft] {printable(message)}", err=True)


class Group(click.Group):
    """Commands listed in groups; one that is unknown is answered with the nearest."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._titles: dict[str, list[str]] = {}

    def add_to(self, title: str, command: click.Command) -> None:
        """Add a command under a title; titles and commands are shown in the order they came."""
        self.add_command(command)
        self._titles.setdefault(title, []).append(str(command.name))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names in the order in which they are used."""
        return [name for names in self._titles.values() for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of commands under each title."""
        for title, names in self._titles.items():
            known = [(name, self.commands[name]) for name in names]
            with formatter.section(title):
                formatter.write_dl([(name, one.get_short_help_str(60)) for name, one in known])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that is meant; of one that is unknown, name the nearest."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            close = difflib.get_close_matches(args[0], self.commands, 2, cutoff=0.5)
            hint = f"closest: {', '.join(close)}" if close else "graft --help lists the commands"
            ctx.fail(f"no such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


class WrappingCommand(click.Command):
    """A command with another COMMAND behind `--`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and name `--` where an option of COMMAND was taken for one of ours."""
        marked = "--" in args
        behind = len(args) - args.index("--") - 1 if marked else 0
        try:
            rest = super().parse_args(ctx, args)
        except click.NoSuchOption as err:
            if marked:
                raise
            raise click.UsageError(
                f"no such option {err.option_name}; write -- before COMMAND, and its options after",
                ctx,
            ) from None
        except click.MissingParameter as err:
            if marked and behind and err.param is not None and err.param.name == "command":
                self._check_places(ctx, -1)  # the one word there was taken for RUN
            raise
        if marked and "command" in ctx.params:
            self._check_places(ctx, len(ctx.params["command"]) - behind)
        return rest

    def _check_places(self, ctx: click.Context, surplus: int) -> None:
        """Refuse where not just as many words as belong there stand before `--`."""
        own = (
            " ".join(
                str(p.metavar)
                for p in self.params
                if isinstance(p, click.Argument) and p.name != "command"
            )
            or "-o RUN"
        )
        usage = f"graft {ctx.info_name} {own} [options] -- COMMAND"
        if surplus < 0:  # then RUN was taken from behind it
            raise click.UsageError(f"RUN is missing before --, as in: {usage}", ctx)
        # A program that takes a -- of its own may stand there too.
        if surplus > 0 and shutil.which(ctx.params["command"][0]) is None:
            word = ctx.params["command"][0]
            raise click.UsageError(f"{word!r} before -- is one word too many: {usage}", ctx)


class Failure(click.ClickException):
    """An expected error, worded by itself; exit status 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Print it to stderr; a filter's error points at its place on two more lines."""
        first, *rest = self.message.split("\n")
        click.echo("\n".join(map(printable, ("Error: " + first, *rest))), file=file, err=True)


def expected_errors(function: F) -> F:
    """Turn expected errors into one clear line on stderr and exit status 2."""

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        tables.is_command = True
        try:
            return function(*args, **kwargs)
        except GraftError as err:
            raise Failure(str(err)) from None

    return inner  # type: ignore[return-value]


class FilterType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A filter expression, checked where it is typed."""

    name = "EXPR"

    @expected_errors
    def convert(self, value: Any, param: Any, ctx: Any) -> Filter:
        """Return the parsed filter."""
        return value if isinstance(value, Filter) else Filter.parse(value)


class SizeType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number of bytes such as 20GB."""

    name = "SIZE"

    @expected_errors
    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return the number."""
        return parse_size(value)


class CheckedType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """The value of a session's option, checked where it is typed."""

    def __init__(self, option: Option) -> None:
        self._option = option
        self.name = option.metavar or "TEXT"

    @expected_errors
    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the value that is meant."""
        return self._option.checked(value, self._option.flag)


def count_option(flag: str, default: int, help: str) -> Callable[[F], F]:
    """Return an option that takes a whole number from 1 on."""
    return click.option(
        flag, type=click.IntRange(min=1), default=default, show_default=True, metavar="N", help=help
    )


def options_of(settings: type[Settings], without: Collection[str] = ()) -> Callable[[F], F]:
    """Return a decorator that gives a command the options of a session, by the fields' names."""

    def decorate(function: F) -> F:
        for one in reversed([one for one in settings.options() if one.name not in without]):
            shown: dict[str, Any] = {}
            if one.is_flag:
                shown = {"is_flag": True}
            elif one.choices:
                shown = {"type": click.Choice(one.choices), "show_default": True}
            elif one.is_multiple:  # checked all together
                shown = {"multiple": True, "metavar": one.metavar}
            else:
                shown = {"type": CheckedType(one)}
            text = f"{one.sentence} [{one.assignment}]"
            function = click.option(one.flag, one.name, default=one.default, help=text, **shown)(
                function
            )
        return function

    return decorate
