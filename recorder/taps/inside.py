"""Which blocks of rows no tap inside has the dims of, as where the name of a dim is mistyped.

What a block names and a tap's dims do not have is not meant for that tap; but a block that is meant
for none of them is a mistake. `Blocks.see` notes the taps, `Blocks.told` says at the end which.
"""

from __future__ import annotations

import functools
import re
import threading

from .call import Call

_Block = tuple[tuple[str, ...], ...]
_MOST_TOLD = 64


class Blocks:
    """What one session has seen of the blocks around its taps. Thread-safe.

    Blocks are told apart by the dims that they name: where one of them is meant for a tap, nothing
    is said of the others.
    """

    def __init__(self) -> None:
        self._met: set[_Block] = set()
        self._first: dict[_Block, str] = {}
        self._lock = threading.RLock()  # a signal's handler may tap under it

    def see(self, call: Call, *, is_taken: bool) -> None:
        """Note a tap.

        Args:
            call: the tap.
            is_taken: whether it is a tensor that the session wants. Of what it does not want it is
                seen all the same that a block is meant for it.
        """
        for one in call.inside:
            if one.block in self._met:
                continue
            with self._lock:
                if _has(call.dims, one.names):
                    self._met.add(one.block)
                elif is_taken and one.block not in self._first and len(self._first) < _MOST_TOLD:
                    self._first[one.block] = f"{call.shown} at {call.site}, {_dims_of(call)}"

    def told(self) -> list[str]:
        """Return a message for each block that no tap inside has the dims of."""
        with self._lock:
            return [
                f"rows along {' or '.join(map(' '.join, block))} are of no tap: none of those "
                f"inside has such dims, the first {first}; name the same dims in both"
                for block, first in self._first.items()
                if block not in self._met
            ]


def _dims_of(call: Call) -> str:
    return f"whose dims are {call.dims!r:.200}" if call.dims else "which declares no dims"


@functools.lru_cache(maxsize=1024)
def _has(dims: object, names: tuple[str, ...]) -> bool:
    """Whether dims may have some names: one that only stands among their words will do."""
    return isinstance(dims, str) and {*names} <= {*re.findall(r"\w+", dims)}
