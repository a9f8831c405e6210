"""The line in the user's code: `tap` and `step`.

Both return at once while no session listens. Otherwise they fire (`firing`), or, where the compiler
traces them, put operators in its graph that do (`tracing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from . import sessions
from .around import is_compiling
from .firing import fire, fire_step

T = TypeVar("T")


def tap(
    name: str,
    value: T,
    *,
    dims: str | None = None,
    extras: Mapping[str, Any] | None = None,
    grad: bool = False,
    rows: Mapping[str, Any] | None = None,
    **tags: Any,
) -> T:
    """Name a tensor, so that it can be recorded and grafted; does nothing when nothing is active.

    Args:
        name: what the tap is called; the same on both systems, or matched by `--match-on`.
        value: a tensor or DTensor of any shape; or a callable returning one, called only if the
            tap is wanted; or a Python scalar, a string or a flat list of these, recorded as a
            value. Anything else is warned about once and left alone.
        dims: the tensor's layout, such as `"b s h[tp] d"`. If it holds several tensors along a dim,
            as in `"b s {q: (h*d) | k: g | v: g}"`, each is a tap of its name, and none of `name`.
        extras: small facts to go with the record, JSON-able; they reach the transform.
        grad: record and graft the gradient of `value` too, when it comes.
        rows: which row is which along some of its dims, as in `{"n": ids[perm]}`; see `rows`, whose
            ids for these dims give way.
        **tags: what tells this firing from others of the name: strings, numbers, booleans, None
            or lists of these.

    Returns:
        `value` itself. A graft overwrites its elements in place.

    Raises:
        ReplayError: only in a replay with `--on-error raise` or `--on-missing raise`.
    """
    if not sessions.listening:
        return value
    if is_compiling():
        from .tracing import traced  # which takes torch's compiler

        return traced(name, value, dims, extras, grad, tags, rows)  # type: ignore[no-any-return]
    fire(name, value, dims, extras, grad, tags, rows=rows)
    return value


def step() -> None:
    """End an iteration; call it on every rank. Steps count from 0."""
    if not sessions.has_any:
        return
    if is_compiling():
        from .tracing import stepped

        stepped()
    else:
        fire_step()
