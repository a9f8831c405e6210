"""`graft replay`: parse, one call, print."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

import click

from recorder.commands.clicking import COMMAND, WrappingCommand, expected_errors, note, options_of

from ..settings import ReplaySettings


@click.command(
    cls=WrappingCommand, short_help="Run COMMAND with its taps overwritten from a recording."
)
@click.argument("run", metavar="RUN")
@click.option(
    "-o",
    "--out",
    metavar="OUT",
    help="Folder for the log, and for what --record keeps. [GRAFT_REPLAY_OUT]",
)
@options_of(ReplaySettings)
@COMMAND
@expected_errors
def replay(run: str, out: str | None, command: tuple[str, ...], **options: Any) -> None:
    """Run COMMAND with its tapped tensors overwritten ("grafted") from the recording RUN.

    Nothing of the baseline runs. COMMAND keeps its stdin, stdout, signals and exit status; a graft
    that fails leaves the tensor as it was, and the replay then ends with 3.

    \b
    Example:
      graft replay runs/base -o runs/r1 --filter 'name == "attn_out"' \\
          --transform mytransforms.recut -- torchrun --nproc-per-node 2 infer.py
    """
    from recorder.commands.listing import incomplete_lines
    from recorder.recording import Recording

    from ..foreseen import tell
    from ..trial import replayed

    recording = Recording.open(run)
    tell(run, options, note)
    for line in incomplete_lines(recording):
        note(f"{run}: {line}")
    done = replayed(recording, out, ReplaySettings.named(options), command)
    for line in done.notes:
        note(line)
    for problem in done.problems:
        note(f"not to be trusted: {problem}")
    if done.recording is not None:
        for problem in done.recording.problems:
            note(f"not to be trusted: {problem}")
        for line in done.recording.notes:
            note(line)
    if done.status == 0:
        note(f"next: {_next(run, out, done.recording is not None, options)}")
    sys.exit(done.status)


def _next(run: str, out: str | None, is_recorded: bool, options: Mapping[str, Any]) -> str:
    if out is not None and is_recorded:
        words = ["graft", "diff", run, out]
        words += [word for rule in options["rename"] for word in ("--rename", rule)]
        if options["match_on"] is not None:
            words += ["--match-on", options["match_on"]]
        if options["step_offset"]:
            words += ["--step-offset", str(options["step_offset"])]
        return shlex.join(words)
    return (
        f"the same with {'' if out is not None else '-o OUT '}--record True, to keep what the "
        "target computes after the graft; graft diff then says whether that is right"
    )
