"""Pieces that the commands share: errors to exit statuses, options, filters, sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from .diagnostics import printable
from .errors import GraftError
from .filters import Filter
from .format import journal
from .sizes import parse_size

F = TypeVar("F", bound=Callable[..., Any])

UNTRUSTED = 3
"""Exit status of a command that ended well while its result is not to be trusted."""

COMMAND = click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)


def note(message: str) -> None:
    """Write one diagnostic line to stderr."""
    click.echo(f"[graft] {printable(message)}", err=True)


class WrappingCommand(click.Command):
    """A command with another COMMAND behind `--`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and name `--` where an option of COMMAND was taken for one of ours."""
        marked = "--" in args
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as err:
            if marked:
                raise
            raise click.UsageError(
                f"no such option {err.option_name}; write -- before COMMAND, and its options after",
                ctx,
            ) from None


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
        journal.is_command = True
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


def text_of(filter: Filter | None) -> str | None:
    """Return a filter's text for a variable."""
    return None if filter is None else filter.text
