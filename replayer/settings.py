"""How to replay: the options of `graft replay` and of `Replayer`, each once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recorder.filters import Filter
from recorder.layouts.dims import REPLICAS
from recorder.settings import TapSettings, expression, option, whole_number

from .match import MatchOn
from .rename import Rename, parsed


def _match_on(value: Any, called: str) -> str:
    MatchOn.parse(value)
    return str(value)


def _renames(value: Any, called: str) -> tuple[Rename, ...]:
    return parsed(value)


@dataclass(frozen=True)
class ReplaySettings(TapSettings):
    """How to replay: the options of `graft replay` and of `Replayer`."""

    PREFIX = "GRAFT_REPLAY"

    filter: Filter | None = option(None, "Graft only these taps.", metavar="EXPR", check=expression)
    transform: Callable[..., Any] | str | None = option(
        None,
        "Function of (g) or of (received_list, target) that makes the tensor to write; by default "
        "what the dims of both sides say, else identity by rank.",
        metavar="PKG.MOD.FN",
    )
    only: str | None = option(
        None,
        "Graft only the taps that this file names, and of each all steps; graft bisect writes it.",
        metavar="FILE",
    )
    record: Filter | None = option(
        None,
        "Also record in OUT what the target itself computed at these taps, before any of them is "
        "overwritten; True for all.",
        metavar="EXPR",
        check=expression,
    )
    match_on: str | None = option(
        None,
        "Tags that count for a match, such as name,layer, or layer=layer_id where the target calls "
        "it so; or order, to pair by position; by default the whole key.",
        metavar="TAGS",
        check=_match_on,
    )
    rename: tuple[Rename, ...] = option(
        (),
        "The recording's name for a tap = the target's, with places in braces: "
        "'h.{layer}.attn=layers.{layer}.self_attn'. A place on one side only is a tag on the "
        "other. May be repeated.",
        metavar="A=B",
        check=_renames,
        is_multiple=True,
    )
    step_offset: int = option(
        0, "Target step s takes from recorded step s + N.", metavar="N", check=whole_number
    )
    on_error: str = option(
        "skip", "What a failed graft does to the job.", choices=("skip", "raise")
    )
    on_missing: str = option(
        "skip", "What a tap without a record does to the job.", choices=("skip", "raise")
    )
    strict: bool = option(
        False, "End with 3 if any selected tap was missed or any selected record was never used."
    )
    metrics: bool = option(
        True, "Log how the target's own values differ from those that replace them."
    )
    own_error: bool = option(
        False, "Log what graft localize goes by: where each tap is off by itself, and how."
    )
    check: bool = option(
        True,
        "Compare each recorded tensor with its digest when it is first used; one that is damaged "
        "fails that graft alone.",
    )
    replicas: str = option(
        "error",
        "What to do where senders that should hold the same block do not, or a row that was "
        "recorded several times is not the same within rounding: fail, take the first, the last, "
        "or their mean.",
        choices=REPLICAS,
    )
    overwrite: bool = option(False, "Replace the replay that is in OUT already.")
