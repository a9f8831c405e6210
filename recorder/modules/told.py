"""What tap tables found, as lines for people: from the reports of one process or of many."""

from __future__ import annotations

from collections.abc import Iterable

from ..mailbox import ModelReport, RowReport
from ..settings import TapSettings
from ..sizes import count
from .table import AUTO, known

_MOST = 6


def lines(reports: Iterable[ModelReport], settings: TapSettings) -> list[str]:
    """Return what is to be said of rows that did nothing, and of models that no table fits.

    Args:
        reports: one of each process.
        settings: what was asked for.
    """
    reports = list(reports)
    if not reports:
        return []
    of_rows = _rows(reports, settings)
    if not (settings.modules or settings.taps):
        return of_rows
    models = {name for one in reports for name in one["models"]}
    others = list(dict.fromkeys(name for one in reports for name in one["others"]))
    rows: dict[str, list[RowReport]] = {}
    for one in reports:
        for row in one["rows"]:
            rows.setdefault(row["where"], []).append(row)
    compiled = any(one["is_compiled"] for one in reports)
    said = [line for same in rows.values() if (line := _row(same, compiled))]
    if len(said) > _MOST:
        said = [*said[:_MOST], f"and {len(said) - _MOST} rows more that tapped nothing"]
    if not models:
        said.insert(0, _nothing(others, settings))
    return [*said, *of_rows]


def _rows(reports: list[ModelReport], settings: TapSettings) -> list[str]:
    """Return what is to be said where no model's rows could be told apart."""
    if settings.rows is None or any(one["followed"] for one in reports):
        return []
    seen = list(dict.fromkeys(name for one in reports for name in one["unfollowed"]))
    models = f"the models seen are {', '.join(seen)}" if seen else "no model was called"
    rows = settings.described()["rows"]
    return [
        f"--rows {rows}: no row is told from another: {models}; transformers, vllm and sglang are "
        "recognised; say which row is which by a function, as in --rows PKG.MOD.FN, or with "
        "recorder.rows"
    ]


def _row(same: list[RowReport], compiled: bool) -> str:
    """Return what is to be said of one row, "" where it did what it should somewhere."""
    one = same[0]
    if any(row["fired"] for row in same):
        return ""
    where = one["where"]
    row = where if one["path"] in where else f"{where}: {one['path']!r}"
    if one["optional"]:
        return ""
    found, ran = sum(r["found"] for r in same), sum(r["ran"] for r in same)
    if not found:
        closest = list(dict.fromkeys(name for r in same for name in r["closest"]))[:3]
        hint = f"; closest: {', '.join(closest)}" if closest else ""
        return f"{row} fits no module{hint}"
    misfit = next((r["misfit"] for r in same if r["misfit"]), "")
    if misfit:
        return f"{row} fits {count(found, 'module')}, and tapped nothing: {misfit}"
    if sum(r["identities"] for r in same) == found:
        return (
            f"{row} fits only modules that hand on their input, whose output another made: left out"
        )
    if not ran:
        anew = "; if it was compiled before, compile it anew: torch._dynamo.reset()"
        return f"{row} fits {count(found, 'module')} that never ran{anew if compiled else ''}"
    return f"{row} fits {count(found, 'module')}, and tapped nothing: what it names was never there"


def _nothing(others: list[str], settings: TapSettings) -> str:
    seen = f"the models seen are {', '.join(others)}" if others else "no model was called"
    if settings.taps == AUTO:
        return (
            f"no table fits: {seen}; there is {', '.join(known())}; see what could be tapped with "
            "graft taps, and write a table"
        )
    return f"no module was tapped: {seen}; graft taps shows what could be"
