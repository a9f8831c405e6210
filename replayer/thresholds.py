"""Thresholds by name: what is within tolerance, as the user writes it."""

from __future__ import annotations

import ast
import difflib
import fnmatch
import re
from collections.abc import Collection
from dataclasses import dataclass

from recorder.errors import FilterError, UsageError
from recorder.filters import Filter

MEASURES = (
    "numel", "changed", "mismatched", "max_beyond", "max_abs", "max_rel", "mean_abs", "bias",
    "rel_diff", "cosine", "p50", "p99", "p999", "max_ulp", "l2_a", "l2_b", "nan_a", "nan_b",
    "inf_a", "inf_b", "error", "error_extreme", "error_row", "error_typical", "error_element",
    "factor", "offset", "times_floor",
)  # fmt: skip
"""What a threshold can speak of, beside the tags."""
_PATTERN = re.compile(r"\s*([^\s:\"'()<>=!,]+)\s*:(.*)", re.DOTALL)


@dataclass(frozen=True)
class Threshold:
    """What is within tolerance, for taps whose name fits a pattern.

    Attributes:
        text: as typed.
        pattern: for the name, as a shell has it; `*` for all.
        holds: the expression that is true of what is within.
    """

    text: str
    pattern: str
    holds: Filter

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Read `[PATTERN:] EXPR`.

        Raises:
            UsageError: the expression cannot be read, or speaks of no measure.
        """
        found = _PATTERN.fullmatch(text)
        pattern, expression = found.groups() if found else ("*", text)
        try:
            holds = Filter.parse(expression)
        except FilterError as err:
            raise err.of("threshold") from None
        if not _is_boolean(ast.parse(holds.text, mode="eval").body):
            raise UsageError(
                f"--threshold {text!r} is neither true nor false; compare, as in rel_diff < 1e-4"
            )
        if not holds.names & set(MEASURES):
            raise UsageError(
                f"--threshold {text!r} speaks of no measure; write what is within tolerance, as in "
                f"'attn_*: rel_diff < 1e-4 and mismatched == 0'; measures: {', '.join(MEASURES)}"
            )
        return cls(text, pattern, holds)

    @property
    def measures(self) -> frozenset[str]:
        """The measures it speaks of."""
        return self.holds.names & set(MEASURES)

    def check(self, names: Collection[str], tags: Collection[str]) -> str:
        """Compare it with what was tapped; return what to say of it.

        Raises:
            UsageError: a name in it is not a tag, and is nearly that of a measure.
        """
        unknown = self.holds.names - {*MEASURES, *tags, "name", "step", "rank", "kind"}
        for name in sorted(unknown):
            close = difflib.get_close_matches(name, MEASURES, 3)
            if close:
                raise UsageError(
                    f"--threshold {self.text!r} speaks of {name!r}, neither a measure nor a tag, "
                    f"closest: {', '.join(close)}"
                )
            return f"--threshold {self.text!r}: no tap carries the tag {name!r}"
        if not any(map(self.fits, names)):
            return f"--threshold {self.text!r} fits no tap; taps: {', '.join(sorted(names)[:6])}"
        return ""

    def fits(self, name: str) -> bool:
        """Whether it is for taps of a name."""
        return fnmatch.fnmatchcase(name, self.pattern)


def _is_boolean(node: ast.expr) -> bool:
    """Whether an expression is true or false by itself, and not a number taken for that."""
    if isinstance(node, ast.BoolOp):
        return all(map(_is_boolean, node.values))
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not) and _is_boolean(node.operand)
    if isinstance(node, ast.IfExp):
        return _is_boolean(node.body) and _is_boolean(node.orelse)
    if isinstance(node, ast.Call):
        return not (isinstance(node.func, ast.Name) and node.func.id == "len")
    return isinstance(node, ast.Compare) or (
        isinstance(node, ast.Constant) and isinstance(node.value, bool)
    )
