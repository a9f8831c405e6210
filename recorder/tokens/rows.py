"""`token_rows`: an id for each token of a batch or a step, the same wherever its prefix is."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, ModuleType

import torch

from ..bits import never_compiled
from ..errors import UsageError
from . import batch, book, chunks, hashing, inputs, known, memory, stepping, sums
from .book import TokenBook
from .inputs import Integers, Requests, Salt, integers
from .stepping import State, stepped


def token_rows(
    input_ids: Integers,
    *,
    attention_mask: object = None,
    cu_seqlens: Integers | None = None,
    position_ids: Integers | None = None,
    requests: Requests | None = None,
    state: State | None = None,
    positions: Integers | None = None,
    salt: Salt | None = None,
) -> torch.Tensor:
    """Return an id for each token, which stands for the whole prefix of its sequence up to it.

    Equal prefixes have equal ids, however they were batched, padded, packed, or cut into chunks and
    steps, in whatever process: an id is a hash of 63 bits, whose definition is in this room's
    README. What an id stands for is found by `known_of`.

    A batch is computed on the tokens' device, and the ids are returned there. A step, which goes on
    where `state` ended, is computed on the CPU, and so are its ids.

    Args:
        input_ids: tokens, [s] or [b, s], of any dtype of integers, or lists; [t] or [1, t] where
            they are packed or a step's.
        attention_mask: of the same shape, 1 or True at tokens and 0 or False at padding, on
            whichever side, or between tokens. Without it nothing is padding.
        cu_seqlens: [sequences + 1], where each packed sequence begins and the last one ends; what
            is behind that is padding.
        position_ids: of the shape of `input_ids`; a packed sequence begins wherever it is 0.
        requests: the request's id for each token, or, with `cu_seqlens`, for each sequence: strings
            or integers.
        state: what is known of these requests from earlier steps, a `TokenBook` or a dict; it is
            changed.
        positions: [t], at which position of its request a server has each token; -1 at padding.
            Without it, every chunk goes on where its request ended.
        salt: an integer or a string that all ids depend on, None for none. Or one for each row of
            `input_ids`, each sequence, or each of `requests`.

    Returns:
        int64 of the shape of `input_ids`, at least 0, and -1 at padding.

    Raises:
        UsageError: an argument cannot be used, or contradicts another or `state`, which then is
            as it was.
    """
    is_plain = cu_seqlens is attention_mask is position_ids is None
    if is_plain and type(state) is TokenBook:
        found = state._decoded(input_ids, requests, positions, salt)
        if found is not None:
            return found
    tokens = integers(input_ids, "input_ids")
    if tokens.dim() not in (1, 2):
        raise UsageError(
            f"input_ids has shape {list(tokens.shape)}; give [tokens] or [batch, sequence]"
        )
    if cu_seqlens is not None and position_ids is not None:
        raise UsageError("cu_seqlens and position_ids both say where sequences begin; give one")
    if cu_seqlens is not None and attention_mask is not None and requests is None:
        raise UsageError(
            "attention_mask and cu_seqlens are of a padded and of a packed batch; give one"
        )
    if requests is not None or state is not None or positions is not None:
        if position_ids is not None:
            raise UsageError("position_ids is of a batch; in a step of requests give positions")
        if requests is None:
            raise UsageError("a step is missing requests; say which request each token is of")
        if state is None:
            raise UsageError(
                "a step is missing state; make one TokenBook() and give it at every step"
            )
        return stepped(tokens, requests, state, cu_seqlens, attention_mask, positions, salt)
    if cu_seqlens is not None:
        return batch.packed(tokens, cu_seqlens, salt)
    if position_ids is not None:
        return batch.positioned(tokens, position_ids, attention_mask, salt)
    return batch.padded(tokens, attention_mask, salt)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Yield a file's functions, and those of its classes."""
    for one in vars(module).values():
        inside = vars(one).values() if isinstance(one, type) else [one]
        for function in inside:
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                yield function


# Up to torch 2.6 the compiler looks at each function that runs below a compiled one.
for _module in (batch, book, chunks, hashing, inputs, known, memory, stepping, sums):
    never_compiled(*_functions(_module))
never_compiled(token_rows)
