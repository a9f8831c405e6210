"""Filter expressions over tags: text to an immutable `Filter`, parsed once.

1. `Filter.parse` hands the text to Python's own parser.
2. `_Compiler` walks the tree and turns each whitelisted node into a small closure; any other node
   is a `FilterError` that points at its place. Nothing is ever passed to `eval`.
3. Calling the filter with a tap's tags runs the closures.

A tag that a tap does not carry is `None`. An ordering against `None` is false, arithmetic with
`None` is `None`, and searching in `None` finds nothing.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from .errors import FilterError

Env = Mapping[str, Any]
Node = Callable[[Env], Any]

_SEARCHES = ("search", "match", "fullmatch")
_FUNCTIONS = (*_SEARCHES, "len")
_METHODS = ("startswith", "endswith")
_MAX_TEXT = 10_000  # far past any real filter, and short enough for Python's parser to survive

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_ORDERINGS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Filter:
    """A parsed filter; call it with a tap's tags, `name` included.

    Attributes:
        text: the expression as typed.
        names: the tags that it reads.
        words: the string literals in it, for hints about misspelt names.
    """

    text: str
    names: frozenset[str]
    words: frozenset[str] = frozenset()
    _run: Node = field(repr=False, compare=False, default=lambda env: True)

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Parse an expression.

        Raises:
            FilterError: it is no Python expression, or uses syntax beyond the whitelist.
        """
        if len(text) > _MAX_TEXT:
            raise FilterError(text[:60] + "...", f"it is longer than {_MAX_TEXT} characters")
        # A filter may be broken over lines in a shell script; columns then still fit one line.
        line = re.sub(r"\s*\n\s*", " ", text.strip())
        if not line:
            raise FilterError(line, "it is empty; leave the option out to select every tap")
        try:
            tree = ast.parse(line, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
            column = (getattr(err, "offset", None) or 1) - 1
            reason = getattr(err, "msg", None) or str(err) or "it is too deeply nested"
            if (meant := _with_comparisons(line)) is not None:
                at = re.search(_ASSIGNMENT, line)
                column = at.start() if at else column
                raise FilterError(line, f"= assigns; compare with ==: {meant}", column) from None
            raise FilterError(line, f"not a Python expression ({reason})", column) from None
        compiler = _Compiler(line)
        try:
            run = compiler.compile(tree.body)
        except RecursionError:
            raise FilterError(line, "it is too deeply nested") from None
        return cls(line, frozenset(compiler.names), frozenset(compiler.words), run)

    @classmethod
    def coerce(cls, value: Filter | str | None) -> Filter | None:
        """Return `value` as a filter; `None` and a filter come back as they are."""
        return cls.parse(value) if isinstance(value, str) else value

    def __call__(self, tags: Env) -> bool:
        """Whether the filter selects these tags.

        Raises:
            FilterError: two values in it cannot be compared or searched.
        """
        return bool(self._run(tags))

    def value(self, names: Env) -> Any:
        """Return what the expression comes to, which need not be a truth.

        Raises:
            FilterError: as in calling it.
        """
        return self._run(names)

    def why_nothing(
        self,
        tag_names: Iterable[str],
        tap_names: Iterable[str],
        values: Mapping[str, Collection[Any]] | None = None,
    ) -> str:
        """Say why this filter may have selected nothing, given what was seen.

        Args:
            tag_names: the tags that taps carried.
            tap_names: what they were called.
            values: the values that tags had, where those are known.
        """
        seen_tags, seen_names = sorted(set(tag_names)), sorted(set(tap_names))
        hints = []
        for name in self.unknown(seen_tags):
            known = list(dict.fromkeys(["name", *seen_tags, "step", "rank"]))
            meant = self.meant(name, known, seen_names)
            hints.append(
                f"no tap carried the tag {name!r}{meant}"
                + (f"; tags seen: {', '.join(known[:8])}" if not meant else "")
            )
        hints += self._unmet(values or {})
        if "name" in self.names:
            for word in sorted(self.words - set(seen_names)):
                close = difflib.get_close_matches(word, seen_names, 3)
                if close:
                    hints.append(f"no tap is named {word!r}, closest: {', '.join(close)}")
        if not hints:
            some = ", ".join(seen_names[:8]) + (", ..." if len(seen_names) > 8 else "")
            hints.append(f"taps seen: {some}" if some else "no tap was seen at all")
        return f"the filter {self.text!r} selected nothing: " + "; ".join(hints)

    def unknown(self, tag_names: Iterable[str]) -> list[str]:
        """Return the tags that it reads and that are none of these, nor always there."""
        return sorted(self.names - {*tag_names} - {"name", "step", "rank", "kind"})

    def meant(self, name: str, tag_names: Iterable[str], tap_names: Iterable[str]) -> str:
        """Return what a tag that nothing carries may have been meant for, "" where that is open."""
        if name in tap_names:
            return f", which is a tap; its name is text: {self._quoted(name)}"
        close = difflib.get_close_matches(name, [*tag_names], 3)
        return f", closest: {', '.join(close)}" if close else ""

    def _quoted(self, name: str) -> str:
        """Return the expression that was meant where a name was not put in quotes."""
        if self.text == name:
            return f'name == "{name}"'
        return re.sub(rf"(?<![\w\"'.]){re.escape(name)}(?![\w\"'.])", f'"{name}"', self.text)

    def _unmet(self, values: Mapping[str, Collection[Any]]) -> list[str]:
        """Say of each comparison that must hold, and that no value of its tag meets, which it has.

        What a tap does not carry is None, and no value.
        """
        found = []
        for node in _required(ast.parse(self.text, mode="eval").body):
            if any(isinstance(one, ast.Constant) and one.value is None for one in ast.walk(node)):
                continue
            names = [one.id for one in ast.walk(node) if isinstance(one, ast.Name)]
            if len(names) != 1 or names[0] == "name" or not values.get(names[0]):
                continue
            part = Filter.parse(ast.unparse(node))
            with contextlib.suppress(FilterError):
                if not any(part({names[0]: value}) for value in values[names[0]]):
                    found.append(f"none has {part.text}: {names[0]} is {_listed(values[names[0]])}")
        return found


def _required(node: ast.expr) -> Iterator[ast.Compare]:
    """Yield the comparisons that all must hold for the whole to."""
    if isinstance(node, ast.Compare):
        yield node
    elif isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        for one in node.values:
            yield from _required(one)


_ASSIGNMENT = r"(?<![=!<>])=(?!=)"


def _with_comparisons(text: str) -> str | None:
    """Return a text with == for each =, None where that makes no expression of it."""
    parts = re.split(r"('[^']*'|\"[^\"]*\")", text)  # every other one is in quotes
    parts[::2] = [re.sub(_ASSIGNMENT, "==", part) for part in parts[::2]]
    meant = "".join(parts)
    if meant == text:
        return None
    try:
        ast.parse(meant, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return meant


def _listed(values: Collection[Any]) -> str:
    """Return values as `0 to 3`, or one by one, at most eight."""
    numbers = sorted(value for value in values if type(value) is int)
    if len(numbers) == len(values) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    some = numbers if len(numbers) == len(values) else sorted(map(repr, values))
    return ", ".join(map(str, some[:8])) + (", ..." if len(some) > 8 else "")


class _Compiler:
    """Turns a syntax tree into closures, collecting the tag names and words it meets."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.names: set[str] = set()
        self.words: set[str] = set()

    def error(self, node: ast.AST, reason: str) -> FilterError:
        # ast counts columns in UTF-8 bytes, people in characters.
        raw = self.text.encode()
        begin = len(raw[: getattr(node, "col_offset", 0)].decode(errors="ignore"))
        end = len(raw[: getattr(node, "end_col_offset", 1) or 1].decode(errors="ignore"))
        return FilterError(self.text, reason, begin, end - begin)

    def compile(self, node: ast.expr) -> Node:
        visit = getattr(self, "visit_" + type(node).__name__, None)
        if visit is None:
            raise self.error(node, f"{_describe(node)} is not allowed here")
        return visit(node)  # type: ignore[no-any-return]

    def visit_Constant(self, node: ast.Constant) -> Node:
        value = node.value
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise self.error(node, f"a {type(value).__name__} literal is not allowed")
        if isinstance(value, str):
            self.words.add(value)
        return lambda env: value

    def visit_Name(self, node: ast.Name) -> Node:
        name = node.id
        if name in _FUNCTIONS:
            raise self.error(node, f"{name} is a function; call it, as in {name}(...)")
        self.names.add(name)
        return lambda env: env.get(name)

    def visit_Tuple(self, node: ast.Tuple | ast.List | ast.Set) -> Node:
        items = [self.compile(item) for item in node.elts]
        if all(isinstance(item, ast.Constant) for item in node.elts):
            fixed = tuple(item({}) for item in items)
            return lambda env: fixed
        return lambda env: tuple(item(env) for item in items)

    visit_List = visit_Set = visit_Tuple  # noqa: N815  # named by ast

    def visit_BoolOp(self, node: ast.BoolOp) -> Node:
        parts = [self.compile(value) for value in node.values]
        ends = isinstance(node.op, ast.Or)

        def chosen(env: Env) -> Any:
            """Return the operand that decides, as Python does: it may be asked if it is None."""
            value: Any = None
            for part in parts:
                value = part(env)
                if bool(value) is ends:
                    break
            return value

        return chosen

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Node:
        operand = self.compile(node.operand)
        if isinstance(node.op, ast.Not):
            return lambda env: not operand(env)
        if isinstance(node.op, (ast.USub, ast.UAdd)):
            sign = operator.neg if isinstance(node.op, ast.USub) else operator.pos

            def signed(env: Env) -> Any:
                value = operand(env)
                return None if value is None else self.attempt(node, sign, value)

            return signed
        raise self.error(node, "the operator ~ is not allowed")

    def visit_BinOp(self, node: ast.BinOp) -> Node:
        function = _ARITHMETIC.get(type(node.op))
        if function is None:
            raise self.error(node, "only + - * / // % are allowed as arithmetic")
        left, right = self.compile(node.left), self.compile(node.right)

        def arithmetic(env: Env) -> Any:
            a, b = left(env), right(env)
            if a is None or b is None:
                return None
            if function is operator.mul and not (_is_number(a) and _is_number(b)):
                raise self.error(node, "only numbers can be multiplied")
            return self.attempt(node, function, a, b)

        return arithmetic

    def visit_IfExp(self, node: ast.IfExp) -> Node:
        test, body, orelse = map(self.compile, (node.test, node.body, node.orelse))
        return lambda env: body(env) if test(env) else orelse(env)

    def visit_Compare(self, node: ast.Compare) -> Node:
        for op, left, right in zip(
            node.ops, [node.left, *node.comparators], node.comparators, strict=False
        ):
            if isinstance(op, (ast.Is, ast.IsNot)) and not (_single(left) or _single(right)):
                raise self.error(node, "`is` compares with None, True or False only; use ==")
            searched = next((one for one in (left, right) if _is_search(one)), None)
            if searched is not None and not (_is_none(left) or _is_none(right)):
                raise self.error(
                    node,
                    f"{ast.unparse(searched.func)} gives a match or None; write it alone, with "
                    "`not` before it, or with `is None` behind it",
                )
        first = self.compile(node.left)
        rest = [
            (self.comparison(node, op), self.compile(right))
            for op, right in zip(node.ops, node.comparators, strict=True)
        ]

        def compare(env: Env) -> bool:
            left = first(env)
            for test, right_node in rest:
                right = right_node(env)
                if not test(left, right):
                    return False
                left = right
            return True

        return compare

    def comparison(self, node: ast.Compare, op: ast.cmpop) -> Callable[[Any, Any], bool]:
        if isinstance(op, ast.Eq):
            return lambda a, b: _flat(a) == _flat(b)
        if isinstance(op, ast.NotEq):
            return lambda a, b: _flat(a) != _flat(b)
        if isinstance(op, ast.Is):
            return operator.is_
        if isinstance(op, ast.IsNot):
            return operator.is_not
        if isinstance(op, (ast.In, ast.NotIn)):

            def contains(a: Any, b: Any) -> bool:
                if b is None or (isinstance(b, str) and a is None):
                    return False
                return bool(self.attempt(node, operator.contains, _flat(b), _flat(a)))

            return contains if isinstance(op, ast.In) else lambda a, b: not contains(a, b)
        order = _ORDERINGS[type(op)]

        def ordering(a: Any, b: Any) -> bool:
            if a is None or b is None:
                return False
            return bool(self.attempt(node, order, _flat(a), _flat(b)))

        return ordering

    def visit_Call(self, node: ast.Call) -> Node:
        if node.keywords:
            raise self.error(node, "keyword arguments are not allowed")
        function = node.func
        if isinstance(function, ast.Attribute):
            return self.method(node, function)
        if not isinstance(function, ast.Name) or function.id not in _FUNCTIONS:
            called = function.id if isinstance(function, ast.Name) else "this"
            raise self.error(
                function,
                f"{called} cannot be called; the functions are {', '.join(_FUNCTIONS)}",
            )
        if function.id == "len":
            if len(node.args) != 1:
                raise self.error(node, "len takes one argument")
            arg = self.compile(node.args[0])

            def length(env: Env) -> Any:
                value = arg(env)
                return None if value is None else self.attempt(node, len, value)

            return length
        return self.regex(node, function.id)

    def regex(self, node: ast.Call, how: str) -> Node:
        if len(node.args) != 2:
            raise self.error(node, f"{how} takes a pattern and a tag, as in {how}('attn', name)")
        pattern = node.args[0]
        if not (isinstance(pattern, ast.Constant) and isinstance(pattern.value, str)):
            raise self.error(pattern, f"the pattern of {how} must be a string literal")
        try:
            find = getattr(re.compile(pattern.value), how)
        except (re.error, OverflowError, RecursionError) as err:
            raise self.error(pattern, f"the pattern is not a regular expression ({err})") from None
        subject = self.compile(node.args[1])

        # A match or None, as `re` has it: many filters are written `search(...) is not None`.
        def found(env: Env) -> Any:
            value = subject(env)
            return None if value is None else find(str(value))

        return found

    def method(self, node: ast.Call, function: ast.Attribute) -> Node:
        if function.attr not in _METHODS:
            raise self.error(function, f"the only methods are {' and '.join(_METHODS)}")
        if len(node.args) != 1:
            raise self.error(node, f"{function.attr} takes one argument")
        subject, arg, how = self.compile(function.value), self.compile(node.args[0]), function.attr

        def test(env: Env) -> bool:
            value, affix = subject(env), arg(env)
            if not isinstance(value, str):
                return False
            return bool(self.attempt(node, getattr(value, how), affix))

        return test

    def attempt(self, node: ast.AST, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except (TypeError, ArithmeticError, ValueError) as err:
            raise self.error(node, str(err)) from None


def _is_search(node: ast.expr) -> TypeGuard[ast.Call]:
    """Whether an expression searches, and so gives a match or None."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return False
    return node.func.id in _SEARCHES


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _single(node: ast.expr) -> bool:
    """Whether a literal is one of those that `is` can be asked about."""
    return (
        isinstance(node, ast.Constant)
        and node.value in (None, True, False)
        and (not isinstance(node.value, (int, float)) or isinstance(node.value, bool))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _flat(value: Any) -> Any:
    """Lists become tuples, so that a list tag equals the tuple a user types."""
    return tuple(map(_flat, value)) if isinstance(value, (list, tuple)) else value


def _describe(node: ast.AST) -> str:
    names = {
        "Attribute": "an attribute",
        "Subscript": "indexing",
        "Lambda": "a lambda",
        "ListComp": "a comprehension",
        "GeneratorExp": "a comprehension",
        "NamedExpr": "an assignment",
        "JoinedStr": "an f-string",
        "Dict": "a dictionary",
        "Starred": "unpacking with *",
    }
    return names.get(type(node).__name__, type(node).__name__.lower())
