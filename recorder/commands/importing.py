"""The command that makes recordings of what other tools have written: `import`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ..errors import UsageError
from ..sizes import count, format_size
from .clicking import expected_errors, note
from .tables import bar

KINDS = ("sglang",)
_UNTRUSTED = 3
_MOST_LINES = 100


def _bytes_in(folder: str) -> int:
    found = 0
    for path, _, names in os.walk(folder):
        sizes = (Path(path, name) for name in names if name.endswith(".pt"))
        found += sum(one.lstat().st_size for one in sizes)
    return found


@click.command("import", short_help="Make a recording of what sglang's dumper has written.")
@click.argument("kind", metavar="KIND")
@click.argument("folder", metavar="DIR")
@click.argument("out", metavar="OUT")
@click.option("--overwrite", is_flag=True, help="Replace the recording that is in OUT already.")
@expected_errors
def import_(kind: str, folder: str, out: str, overwrite: bool) -> None:
    """Make a recording in OUT of what another tool has dumped in DIR; it replays and diffs as any.

    KIND is sglang: the .pt files that its dumper writes (DUMPER_ENABLE=1), below DUMPER_DIR in the
    folder of one experiment. Names, tags, steps, ranks and order are those that each file gives;
    gradients become those of what they are of. Nothing in the files is run.

    Ends with 3 where a file could not be taken; each is named.

    \b
    Example:
      graft import sglang dumper/dump_20260714_101500_123456 runs/base
    """
    if kind not in KINDS:
        raise UsageError(
            f"{kind!r} is no kind of dumps that can be imported; write: graft import sglang DIR OUT"
        )
    from ..importing import import_dumps

    with bar(2 * _bytes_in(folder), "importing") as seen:
        found = import_dumps(folder, out, overwrite=overwrite, seen=seen)
    click.echo(
        f"{out}: {count(found.records, 'record')} from {count(found.ranks, 'rank')}, "
        f"{format_size(found.nbytes)} stored"
    )
    for line in found.notes:
        note(line)
    for one in found.skipped[:_MOST_LINES]:
        note(f"left out {one.path}: {one.reason}")
    if len(found.skipped) > _MOST_LINES:
        note(f"... and {count(len(found.skipped) - _MOST_LINES, 'more such file')}")
    problems = list(found.problems)
    if found.skipped:
        problems.append(f"{count(len(found.skipped), 'file')} left out, see above")
    for problem in problems:
        note(f"not to be trusted: {problem}")
    sys.exit(_UNTRUSTED if problems else 0)
