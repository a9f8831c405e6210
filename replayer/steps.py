"""A forgotten `step()`: one side counts iterations as steps, the other all in one."""

from __future__ import annotations

from collections.abc import Collection

from recorder.commands.tables import span


def forgotten_step(
    steps: tuple[Collection[int], Collection[int]],
    repeats: tuple[bool, bool],
    sides: tuple[str, str],
    tags: Collection[str],
) -> str:
    """Say that one side has a single step where the other has several, "" where not.

    Args:
        steps: that each side has, as it counts them itself.
        repeats: whether taps of each side come several times within a step.
        sides: what each is called.
        tags: that both sides' taps carry, besides the name.
    """
    for i in (0, 1):
        alone, others = steps[i], steps[1 - i]
        if {*alone} == {0} and repeats[i] and len({*others}) > 1:
            several = span(sorted({*others})).replace("-", " to ")
            match_on = ",".join(["name", *sorted(tags)])
            return (
                f"{sides[i]} has step 0 alone, {sides[1 - i]} steps {several}: call "
                f"step() at the end of an iteration, or give --match-on {match_on}"
            )
    return ""
