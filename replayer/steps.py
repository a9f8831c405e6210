"""A forgotten `step()`: one side counts iterations as steps, the other all in one."""

from __future__ import annotations

from collections.abc import Collection

from recorder.commands.tables import span


def forgotten_step(
    steps: tuple[Collection[int], Collection[int]],
    sides: tuple[str, str],
    tags: Collection[str],
) -> str:
    """Say that one side has a single step where the other has several, "" where not.

    Args:
        steps: that each side has.
        sides: what each is called.
        tags: that both sides' taps carry, besides the name.
    """
    for i in (0, 1):
        alone, others = steps[i], steps[1 - i]
        if len({*alone}) == 1 and len({*others}) > 1:
            several = span(sorted({*others})).replace("-", " to ")
            match_on = ",".join(["name", *sorted(tags)])
            return (
                f"{sides[i]} has step {span([*alone])} alone, {sides[1 - i]} steps {several}: call "
                f"step() at the end of an iteration, or give --match-on {match_on}"
            )
    return ""
