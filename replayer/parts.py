"""Gradients that come in parts: two backwards of one tensor, each of which brings some of it.

1. The k-th part is grafted from the k-th that was recorded; `Parts` has what came of each.
2. That there are more than were recorded shows with the first too many: the record was whole, or of
   fewer. It is refused (`ZEROS`), and what was grafted before it is none; from then on every part
   of that name is refused (`MORE`).
3. That there are fewer shows at the end of the step (`FEWER`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from recorder.taps.selection import Selected, part_of

from .log import LogRow

_SAME = "call backward as often on both sides, or tap what each loss alone computes"
MORE = (
    "its gradient comes in more backwards here than where it was recorded, so no part of it is the "
    f"record's; {_SAME}"
)
ZEROS = (
    "its gradient comes in more backwards here than where it was recorded: those before this one "
    f"were given all of the record, and this one zeros, which is right in the sum alone; {_SAME}"
)
FEWER = (
    "its gradient comes in fewer backwards here than where it was recorded, so what was grafted is "
    f"less than the whole; {_SAME}"
)


@dataclass
class Parts:
    """The gradient of one tap, and what came of each part.

    Attributes:
        selected: the tap.
        rows: the log's rows.
    """

    selected: Selected
    rows: list[LogRow] = field(default_factory=list)

    def at(self, number: int) -> Selected:
        """Return what a part of it is selected as."""
        return part_of(self.selected, number)

    @property
    def grafted(self) -> list[LogRow]:
        """Rows of parts that were grafted."""
        return [row for row in self.rows if row["outcome"] == "grafted"]
