"""What localize found, for people and for scripts: a sentence, a table, JSON, markdown, a page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from recorder.commands.tables import console_of, natural_width, short, span, table_of
from recorder.diagnostics import printable
from recorder.provenance import provenance
from recorder.sizes import count

from ..finding.localize import Localized
from ..finding.located import Segment, steps_of
from ..finding.segments import Place
from .output import written
from .page import render

_LEFT = ("segment", "from", "steps", "occ", "ranks", "what")
_MOST_ON_PAGE = 20_000
_NAMED = 3  # segments, where there is room for no more
_LONG = 60  # characters of a name in a table


def verdict(done: Localized) -> str:
    """Return the result in one sentence."""
    faults = done.found.faults
    if faults:
        return f"fault: {_sentence(done, faults[0])}"
    if not done.found.segments:
        return "no segment was judged"
    if done.command_status:
        return f"no fault before COMMAND ended with {done.command_status}"
    return f"no fault: {_rounding(done, 'segment')}"


def lines(done: Localized) -> list[str]:
    """Return what is printed before the table: the verdict, the rest, what to do next."""
    found = [verdict(done)]
    groups = list(steps_of(done.found.faults).values())
    for group in groups[1:_NAMED]:
        found.append(f"also: {_sentence(done, group[0])}")
    if len(groups) > _NAMED:
        found.append(f"and {count(len(groups) - _NAMED, 'more faulty segment')}, see the table")
    if groups:
        rest = _rounding(done, "other segment")
        found.append(rest)
    if done.found.not_judged:
        found.append(_not_judged(done))
    found += done.found.notes
    if not done.was_checked and done.found.segments:
        found.append(
            "not checked whether the baseline replays onto itself unchanged; run graft check "
            f"{shlex.quote(str(done.run.path))} -o CHECK -- BASELINE, then add --floor CHECK"
        )
    if groups:
        found.append(f"next: {_next(groups[0][0])}")
    return found


def _sentence(done: Localized, one: Segment) -> str:
    parts = [f"{one.place.label}{_from(one.begins)}", *_where(done, one)]
    assert one.class_ is not None
    return f"{', '.join(parts)}: {one.class_.evidence}"


def _from(begins: Sequence[Place]) -> str:
    if not begins:
        return ""
    named = " and ".join(dict.fromkeys(place.label for place in begins[:_NAMED]))
    return f" (from {named})"


def _where(done: Localized, one: Segment) -> list[str]:
    """Say on which ranks and in which steps a segment is a fault, where there are several."""
    found = []
    if one.of > 1:
        if len(one.ranks) == one.of:
            found.append("on both ranks" if one.of == 2 else f"on all {one.of} ranks")
        else:
            which = "rank" if len(one.ranks) == 1 else "ranks"
            found.append(f"on {which} {span(list(one.ranks))} of {one.of}")
    everywhere = steps_of(done.found.segments)[one.place.tap]
    steps = sorted({other.place.step for other in everywhere})
    faulty = sorted({other.place.step for other in everywhere if other.is_fault})
    if len(steps) > 1:
        if faulty == steps:
            found.append("in every step")
        else:
            which = "step" if len(faulty) == 1 else "steps"
            found.append(f"in {which} {span(faulty)} of {span(steps)}")
    times = sorted({other.place.occurrence for other in everywhere})
    off = sorted({other.place.occurrence for other in everywhere if other.is_fault})
    if len(times) > 1 and off != times:
        found.append(f"at occurrence {span(off)} of {span(times)}")
    return found


def _rounding(done: Localized, what: str) -> str:
    groups = steps_of(done.found.segments).values()
    sound = [max(one, key=_times) for one in groups if not any(s.is_fault for s in one)]
    if not sound:
        return "no other segment was judged"
    off = [one for one in sound if one.error and one.siblings]
    verb = "is" if len(sound) == 1 else "are"
    if not any(one.error for one in sound):
        return f"{count(len(sound), what)} {verb} equal bit for bit"
    told = f"{count(len(sound), what)} {verb} rounding ({done.found.units}"
    if off:
        worst = max(off, key=_times)
        told += (
            f"; the greatest {_times(worst):.1f} x what its siblings show: {worst.place.label}"
            f"{_step(done, worst)}"
        )
    return f"{told})"


def _times(one: Segment) -> float:
    """Return how many times its siblings' error a segment is off."""
    return one.error / one.siblings if one.siblings else 0.0


def _step(done: Localized, one: Segment) -> str:
    several = len({other.place.step for other in done.found.segments}) > 1
    return f" step={one.place.step}" if several else ""


def _not_judged(done: Localized) -> str:
    not_judged = done.found.not_judged
    names = list(dict.fromkeys(one.place.label for one in not_judged))
    return (
        f"{count(len(not_judged), 'tap')} {'was' if len(not_judged) == 1 else 'were'} not judged "
        f"({', '.join(short(name, _LONG) for name in names[:_NAMED])}"
        f"{', ...' if len(names) > _NAMED else ''}), see --all"
    )


def _next(one: Segment) -> str:
    place = one.place
    if one.is_weight:
        return f"look at how the target loads, converts or updates the parameter {place.label}"
    layer = "".join(f" of {tag} {value}" for tag, value in place.tag_values.items())
    if place.kind == "grad":
        after = f" after that of {one.begins[0].label}" if one.begins else ""
        return f"look at the backward of what follows {place.name}{layer} in the target{after}"
    if not one.begins:
        return (
            f"look at what the target computes before the tap {place.name}{layer}; a tap in "
            "between would halve the segment"
        )
    begins = one.begins[0]
    if begins.tags == place.tags:
        between = f"the taps {begins.name} and {place.name}{layer}"
    else:
        between = f"{begins.label} and {place.label}"
    return (
        f"look at what lies between {between} in the target; a tap between them would halve the "
        "segment"
    )


def rows(done: Localized, limit: int) -> list[dict[str, str]]:
    """Return the table's cells: a line for each segment, of all steps, the worst first."""
    cells = []
    for group in list(steps_of(done.found.segments).values())[:limit]:
        one = group[0]
        same = [other for other in group if other.is_fault == one.is_fault]
        what = one.class_.word if one.class_ else "rounding" if one.error else "equal"
        cells.append(
            {
                "segment": short(one.place.label, _LONG),
                "from": short(" ".join(place.name for place in one.begins[:_NAMED]), 24),
                "steps": span(sorted({other.place.step for other in same})),
                "occ": span(sorted({other.place.occurrence for other in same})),
                "ranks": span(sorted({rank for other in same for rank in other.ranks})),
                "error": f"{one.error:.1e}" if one.error else "0",
                "rounding": f"{one.expected:.1e}" if one.expected else "",
                "what": what,
            }
        )
    return cells


def print_found(done: Localized, width: int, limit: int, everything: bool) -> None:
    """Print the verdict, the table, and with `everything` what was not judged."""
    console = console_of(width)
    for line in lines(done):
        console.print(printable(line), soft_wrap=True)
    cells = rows(done, limit)
    if cells:
        columns = list(cells[0])
        for least in ("steps", "occ", "ranks", "from"):
            is_dull = least != "from" and len({cell[least] for cell in cells}) == 1
            if is_dull or natural_width(columns, cells) > width:
                columns.remove(least)
        console.print()
        table = table_of(*columns, left=_LEFT, folded=("segment",))
        for cell in cells:
            table.add_row(*(printable(cell[column]) for column in columns))
        console.print(table)
        total = len(steps_of(done.found.segments))
        if total > len(cells):
            console.print(f"... and {count(total - len(cells), 'more segment')}; see --limit")
    if everything:
        for one in done.found.not_judged:
            where = f" rank={span(list(one.ranks))}"
            step = f" step={one.place.step}"
            text = f"not judged: {one.place.label}{step}{where}: {one.why}"
            console.print(printable(text), soft_wrap=True)


def _unjudged(done: Localized) -> list[dict[str, object]]:
    return [
        {
            "name": one.place.name,
            "tags": one.place.tag_values,
            "label": one.place.label,
            "kind": one.place.kind,
            "step": one.place.step,
            "occurrence": one.place.occurrence,
            "rank": list(one.ranks),
            "why": one.why,
        }
        for one in done.found.not_judged
    ]


def as_json(done: Localized) -> str:
    """Return one JSON object: the verdict, the segments, the worst first, what was not judged."""
    return json.dumps(
        {
            "verdict": verdict(done),
            "status": done.status,
            "segments": [one.as_dict() for one in done.found.segments],
            "not_judged": _unjudged(done),
            "problems": list(done.problems),
            "notes": list(done.found.notes),
        },
        allow_nan=False,
    )


def write_page(done: Localized, path: Path) -> None:
    """Write a page: own errors over the order of execution, and all segments.

    Raises:
        OSError: it cannot be written.
    """
    kept = done.found.segments[:_MOST_ON_PAGE]
    data = {
        "verdict": verdict(done),
        "lines": lines(done)[1:],
        "problems": list(done.problems),
        "segments": [
            {
                **one.as_dict(),
                "label": one.place.label,
                "begins": [place.label for place in one.begins],
                "of": one.of,
                "order": one.order,
            }
            for one in kept
        ],
        "left_out": len(done.found.segments) - len(kept),
        "not_judged": _unjudged(done)[:_MOST_ON_PAGE],
        "sides": _sides(done),
    }
    written(path, lambda spare: spare.write_text(render(data, "segments"), encoding="utf-8"))


def _sides(done: Localized) -> list[dict[str, object]]:
    known = (
        ("baseline", done.run.meta.get("provenance", {}), done.run.meta.get("command") or []),
        ("target", provenance(), done.command),
    )
    return [
        {
            "title": side,
            "lines": [
                shlex.join(map(str, command)),
                ", ".join(f"{name} {v}" for name, v in about.get("versions", {}).items()),
            ],
        }
        for side, about, command in known
    ]


def markdown(done: Localized, limit: int = 12) -> str:
    """Return what one pastes into an issue: verdict, table, versions, how to reproduce it."""
    text = [f"**{_escaped(verdict(done))}**", ""]
    text += [f"- {_escaped(line)}" for line in lines(done)[1:]]
    text += [f"- not to be trusted: {_escaped(problem)}" for problem in done.problems]
    cells = rows(done, limit)
    if cells:
        columns = list(cells[0])
        text += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        text += [f"| {' | '.join(_escaped(cell[c]) for c in columns)} |" for cell in cells]
    versions = {
        "baseline": done.run.meta.get("provenance", {}).get("versions", {}),
        "target": provenance()["versions"],
    }
    text += ["", "| | " + " | ".join(_programs(versions)) + " |"]
    text.append("|" + "---|" * (1 + len(_programs(versions))))
    for side, known in versions.items():
        told = [str(known.get(program, "?")) for program in _programs(versions)]
        text.append(f"| {side} | " + " | ".join(told) + " |")
    run = Path(done.run.path).name
    baseline = shlex.join(map(str, done.run.meta.get("command") or ["..."]))
    target = shlex.join(done.command) if done.command else "..."
    text += [
        "",
        "```console",
        f"$ graft record -o {shlex.quote(run)} -- {baseline}",
        f"$ graft localize {shlex.quote(run)} -- {target}",
        "```",
    ]
    return "\n".join(text)


def _programs(versions: Mapping[str, Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for known in versions.values() for name in known))


def _escaped(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("<", "&lt;")
