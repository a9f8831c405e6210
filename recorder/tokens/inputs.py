"""What callers give, read as tensors and checked; each refusal says what to give instead."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch

from ..bits import dtype_name
from ..errors import UsageError
from .hashing import seed

Integers = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]
"""A tensor of any dtype of integers, or lists of integers."""

Salt = int | str | torch.Tensor | Sequence[int | str | None]
"""One salt for all sequences, or one for each."""

Request = str | int

Requests = torch.Tensor | Sequence[Request | None]
"""An id for each token or each sequence; what stands at padding does not matter."""

_INTEGERS = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def integers(given: object, name: str, or_bools: bool = False) -> torch.Tensor:
    """Return an argument as a tensor of integers, where it is and of the dtype it has.

    Args:
        given: the argument.
        name: what it is called.
        or_bools: whether it may hold truth values instead.

    Raises:
        UsageError: it is anything else.
    """
    found = given if isinstance(given, torch.Tensor) else _from_lists(given, name)
    if type(found) not in _PLAIN_TYPES or found.layout != torch.strided or found.is_nested:
        kind = "sparse or nested" if type(found) in _PLAIN_TYPES else f"a {type(found).__name__}"
        raise UsageError(f"{name} is {kind}; give a plain tensor, such as its local or dense part")
    if found.is_meta:
        raise UsageError(f"{name} is on the meta device and holds nothing; give real tokens")
    if found.dtype not in _INTEGERS and not (or_bools and found.dtype == torch.bool):
        wanted = "integers or booleans" if or_bools else "integers"
        raise UsageError(f"{name} holds {dtype_name(found.dtype)}; give {wanted}")
    return found


def _from_lists(given: object, name: str) -> torch.Tensor:
    if isinstance(given, (str, bytes)) or not isinstance(given, (Iterable, Integral)):
        kind = type(given).__name__
        raise UsageError(f"{name} is of type {kind}; give a tensor or a list of integers")
    try:
        found = torch.tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as err:
        raise UsageError(
            f"{name} is no tensor and no list of integers of one length each ({_line(err)}); "
            "pad it, or pack it and give cu_seqlens"
        ) from err
    return found if found.numel() else found.to(torch.int64)  # an empty list has floats


def _line(err: Exception) -> str:
    return str(err).partition("\n")[0].rstrip(".")


def first_of(wrong: torch.Tensor) -> int | None:
    """Return the first index, of [n], at which something is True; None where nothing is."""
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None


def beside(given: object, name: str, tokens: torch.Tensor, or_bools: bool = False) -> torch.Tensor:
    """Return an argument that says something of each token.

    Raises:
        UsageError: it has another shape than they, or holds no integers.
    """
    found = integers(given, name, or_bools)
    if found.shape != tokens.shape:
        raise UsageError(
            f"{name} has shape {list(found.shape)} and input_ids {list(tokens.shape)}; give both "
            "of the same tokens"
        )
    return found


def mask_of(given: object, tokens: torch.Tensor) -> torch.Tensor:
    """Return the attention mask as booleans of the tokens' shape.

    Integers other than 0 and 1 are refused, which takes a look at them: on an accelerator the host
    waits for that. Booleans spare it.

    Raises:
        UsageError: it has another shape, floats, or numbers that mean something else.
    """
    found = beside(given, "attention_mask", tokens, or_bools=True)
    found = found.to(tokens.device, non_blocking=True)
    if found.dtype == torch.bool:
        return found
    least, most = found.to(torch.int64).aminmax() if found.numel() else (found.sum(),) * 2
    if bool((least < 0) | (most > 1)):
        raise UsageError(
            "attention_mask holds numbers other than 0 and 1; give 1 for tokens and 0 for padding, "
            "and say where packed sequences begin with cu_seqlens or position_ids"
        )
    return found != 0


def lengths_of(given: object, tokens: int) -> torch.Tensor:
    """Return the lengths of packed sequences, int64 on the CPU, from where each begins and ends.

    Args:
        given: `cu_seqlens`, [sequences + 1].
        tokens: how many tokens there are; those behind the last sequence are padding.

    Raises:
        UsageError: it does not say that.
    """
    found = integers(given, "cu_seqlens")
    if found.dim() != 1 or not len(found):
        raise UsageError(
            f"cu_seqlens has shape {list(found.shape)}; give one list of where each sequence "
            "begins, and the end of the last"
        )
    bounds = found.to("cpu", torch.int64)
    lengths = bounds.diff()
    first, last = int(bounds[0]), int(bounds[-1])
    if first != 0:
        raise UsageError(f"cu_seqlens begins with {first}; let it begin with 0")
    at = first_of(lengths < 0)
    if at is not None:
        raise UsageError(
            f"cu_seqlens goes back from {int(bounds[at])} to {int(bounds[at + 1])}; give the "
            "running total of the lengths, such as [0, *itertools.accumulate(lengths)]"
        )
    if last > tokens:
        raise UsageError(
            f"cu_seqlens ends at {last} and there are {tokens} tokens; give both of the same batch"
        )
    return lengths


def seeds_of(salt: Salt | None, count: int, of: str) -> list[int | None] | int | None:
    """Return the sum with which each sequence begins, as int64.

    Args:
        salt: as the caller gave it.
        count: how many sequences there are.
        of: what there is one salt for each of, as in "row of input_ids".

    Returns:
        None where there is no salt, one seed for all, or a list of `count`, with None for those
        without.

    Raises:
        UsageError: a salt is neither an integer nor a string, or there are more or fewer.
    """
    if salt is None:
        return None
    if isinstance(salt, torch.Tensor):
        salt = integers(salt, "salt").tolist()
    if isinstance(salt, (str, bytes)) or not isinstance(salt, Iterable):
        return _seed(salt)
    salts = list(salt)
    if len(salts) != count:
        raise UsageError(
            f"salt has {len(salts)} entries and there are {count}; give one for each {of}, or one "
            "for all"
        )
    return [None if one is None else _seed(one) for one in salts]


def _seed(salt: Any) -> int:
    if isinstance(salt, str):
        return seed(salt)
    if isinstance(salt, bool) or not isinstance(salt, Integral):
        kind = type(salt).__name__
        raise UsageError(f"a salt is of type {kind}; give integers or strings")
    return seed(operator.index(salt))


def names_of(requests: Requests, count: int, of: str) -> list[Any]:
    """Return the ids of requests as a list; what each is, `check_names` looks at.

    Args:
        requests: as the caller gave them.
        count: how many there should be.
        of: what there is one for each of.

    Raises:
        UsageError: they are no list, or more or fewer.
    """
    if isinstance(requests, torch.Tensor):
        found = integers(requests, "requests")
        if found.dim() != 1:
            raise UsageError(f"requests has shape {list(found.shape)}; give one id for each {of}")
        names = found.tolist()
    elif isinstance(requests, (str, bytes)) or not isinstance(requests, Iterable):
        kind = type(requests).__name__
        raise UsageError(f"requests is of type {kind}; give a list with one id for each {of}")
    else:
        names = list(requests)
    if len(names) != count:
        raise UsageError(
            f"requests has {len(names)} ids and there are {count}; give one for each {of}"
        )
    return names


def check_names(names: Sequence[object]) -> None:
    """Refuse what cannot tell one request from another.

    Raises:
        UsageError: an id is neither a string nor an integer.
    """
    if set(map(type, names)) <= {str, int}:
        return
    for name in names:
        if isinstance(name, bool) or not isinstance(name, (str, Integral)):
            raise UsageError(
                f"a request's id is of type {type(name).__name__}; give strings or integers"
            )
