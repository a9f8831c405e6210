"""The rows of a batch of sequences as transformers' models have it: padded, packed, with a cache.

1. `begun` reads a call, and keeps copies of what it says: nothing is computed before a tap, or the
   next call with the same cache, asks.
2. `_Batch` makes the ids: the prefixes that the cache holds (`caches.past_of`), and on from there.
3. As the call ends, the cache is known to hold these prefixes too (`caches.note`).

Where every token sees the whole sequence, as in BERT, a prefix does not say what a row is: the ids
depend on all of it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from ..tokens.batch import packed, positioned
from ..tokens.hashing import named, numbered, seed
from ..tokens.known import with_known
from ..tokens.memory import listed
from . import caches
from .calls import Arguments, Begun, NoRows, Say, tokens_of, whole
from .causal import is_causal
from .heads import kept
from .masks import Real, real_of
from .numbering import FEW, Numbered, all_at_once, one_by_one
from .past import NUMBERS, REAL, SUMS, Past

DIMS = "b s"
_MASKS = "transformers.masking_utils"
_STATES = ("cache_params", "mems", "state", "past_buckets_states", "layer_past")
"""What models of other kinds go on from."""
_HARMLESS = ("attention_mask", "labels", "head_mask", "cache_position")
"""Arguments that may be floats, and of which a row is no other for that."""


def begun(module: torch.nn.Module, given: Arguments, say: Say) -> Begun:
    """Return what is known of the rows of a call.

    Args:
        module: the model.
        given: what it is called with.
        say: says why some rows have no ids, once.

    Raises:
        NoRows: none of them is known.
    """
    tokens = tokens_of(given)
    if tokens.dim() != 2:
        raise NoRows(f"its input_ids are {list(tokens.shape)}; give [batch, sequence]")
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise NoRows(
            "it is an encoder with a decoder, whose rows also depend on the other's tokens; say "
            "which row is which by a function, as in --rows PKG.MOD.FN",
        )
    for name, value in given.items():
        one = value[0] if isinstance(value, (list, tuple)) and value else value
        is_float = isinstance(one, torch.Tensor) and one.is_floating_point()
        if is_float and not name.startswith(("loss", *_HARMLESS)):
            raise NoRows(
                f"it is given {name}, on which its rows depend beside their tokens; say which row "
                "is which by a function, as in --rows PKG.MOD.FN"
            )
    for name in _STATES:
        if name in given:
            raise NoRows(
                f"it goes on from its {name}, which does not say what it holds; say which row is "
                "which by a function, as in --rows PKG.MOD.FN"
            )
    cache = given.get("past_key_values", given.get("cache"))
    batch = _packed(module, given, tokens, cache) or _padded(module, given, tokens, cache, say)
    if isinstance(batch, _Packed) and not is_causal(module):
        raise NoRows("it sees tokens that come later, of sequences that lie in one row")

    def ended(output: Any) -> None:
        held = cache if cache is not None else _cache_in(output)
        if held is not None and isinstance(batch, _Batch) and not batch.is_whole:
            caches.note(held, batch.past)

    return Begun(
        {DIMS: batch.ids},
        kept(batch.ids, given),
        tuple(tokens.shape),
        ended,
    )


class _Once:
    """Ids that are computed when they are first asked for, whoever asks."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._made: torch.Tensor | None = None

    def ids(self) -> torch.Tensor:
        """Return the ids, [rows, tokens]."""
        with self._lock:
            if self._made is None:
                self._made = self._compute()
            return self._made

    def _compute(self) -> torch.Tensor:
        raise NotImplementedError


class _Packed(_Once):
    """Those of sequences that lie one behind the other."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self._make = make

    def _compute(self) -> torch.Tensor:
        return self._make()


def _packed(
    module: torch.nn.Module, given: Arguments, tokens: torch.Tensor, cache: Any
) -> _Packed | None:
    """Return the ids of sequences that lie one behind the other; None where they do not."""
    config = getattr(module, "config", None)
    is_flash = "flash" in str(getattr(config, "_attn_implementation", ""))
    bounds = given.get("cu_seq_lens_q")
    if is_flash and isinstance(bounds, torch.Tensor) and cache is None:
        own, ends = tokens.detach().clone(), bounds.detach().clone()
        return _Packed(lambda: packed(own, ends, None))
    places = given.get("position_ids")
    if given.get("attention_mask") is not None or not isinstance(places, torch.Tensor):
        return None
    if places.dim() != 2 or not bool((places[:, 1:] == 0).any()):
        return None
    # Masks are made of positions where there is no cache, from transformers 4.53 on.
    is_cached = cache is not None or given.get("use_cache", getattr(config, "use_cache", False))
    makes_masks = hasattr(sys.modules.get(_MASKS), "find_packed_sequence_indices")
    if cache is not None or (len(tokens) > 1 if is_flash else is_cached or not makes_masks):
        raise NoRows(
            "its position_ids begin again within a row, and its attention may go on across; give "
            "use_cache=False, or pad it and give attention_mask"
        )
    own, at = tokens.detach().clone(), places.detach().expand(tokens.shape).clone()
    return _Packed(lambda: positioned(own, at, None, None))


def _padded(
    module: torch.nn.Module, given: Arguments, tokens: torch.Tensor, cache: Any, say: Say
) -> _Batch:
    begin = 0
    if cache is not None:
        found = whole(given["cache_position"][0]) if "cache_position" in given else None
        found = caches.length_of(cache) if found is None else found
        if found is None:
            raise NoRows(
                f"its cache is a {type(cache).__name__}, which does not say how much it holds; say "
                "which row is which by a function, as in --rows PKG.MOD.FN"
            )
        begin = found
    past = caches.past_of(cache, begin) if begin else None
    if begin and (past is None or past.rows != len(tokens)):
        raise NoRows(
            f"its cache begins with {begin} tokens that were not seen here; start recording before "
            "it is filled, or say which row is which by a function, as in --rows PKG.MOD.FN"
        )
    is_whole = not is_causal(module)
    if is_whole and begin:
        raise NoRows("it sees tokens that come later, and has a cache")
    return _Batch(
        tokens.detach().clone(),
        real_of(given.get("attention_mask"), begin, tokens),
        _positions(given.get("position_ids"), tokens),
        past,
        given.get("token_type_ids"),
        is_whole,
        say,
    )


def _positions(given: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """Return where the job says that tokens stand; None where it does not."""
    if not isinstance(given, torch.Tensor) or not given.numel():
        return None
    if given.dim() == 3:  # time, height and width, which are one of texts
        if not bool((given == given[:1]).all()):
            raise NoRows("its position_ids are those of images, which its tokens do not say")
        given = given[0]
    assert isinstance(given, torch.Tensor)
    shape = list(given.shape)
    if shape[-1] != tokens.shape[-1] or shape[:-1] not in ([], [1], [len(tokens)]):
        raise NoRows(f"its position_ids are {shape}, and its tokens {list(tokens.shape)}")
    return given.detach().expand(tokens.shape).clone()


class _Batch(_Once):
    """One call with a batch of sequences, a row each.

    Args:
        tokens: a copy of them, [rows, tokens].
        real: which columns are no padding; None for all.
        positions: where the job says that they stand; None where it does not.
        past: what the cache holds; None for nothing.
        types: the job's types of tokens, None for none.
        is_whole: whether a row depends on the whole sequence.
        say: says why some rows have no ids.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        real: Real | None,
        positions: torch.Tensor | None,
        past: Past | None,
        types: Any,
        is_whole: bool,
        say: Say,
    ) -> None:
        super().__init__()
        self._tokens, self._real, self._positions = tokens, real, positions
        self._before, self._say, self.is_whole = past, say, is_whole
        self._types = types.detach().clone() if isinstance(types, torch.Tensor) else None
        self._past: Past | None = None

    def past(self) -> Past:
        """Return what the cache holds after the call."""
        self.ids()
        assert self._past is not None  # with the ids
        return self._past

    @torch.no_grad()
    def _compute(self) -> torch.Tensor:
        tokens = self._tokens.to("cpu", torch.int64)
        before = self._before
        begin = 0 if before is None else before.length
        columns = None if self._real is None else self._real.columns.to("cpu", torch.int64)
        known = [True] * len(tokens)
        if columns is not None and before is not None:
            known = (columns[:, :begin] == before.held[REAL]).all(1).tolist()
        elif before is not None:  # without a mask, what was padding is none any more
            known = [number == begin for number in before.ends[1]]
        if self._real is not None and self._real.fits is not None:
            fits = self._real.fits.tolist()
            known = [one and fit for one, fit in zip(known, fits, strict=True)]
        own = torch.ones_like(tokens) if columns is None else columns[:, begin:]
        places = None if self._positions is None else self._positions.to("cpu", torch.int64)
        types = None if self._types is None else self._types.to("cpu", torch.int64)
        if types is not None and not bool(types.any()):
            types = None
        if types is not None and not self.is_whole:
            known = [
                one and not any_ for one, any_ in zip(known, types.any(1).tolist(), strict=True)
            ]
        batch = Numbered(tokens, own, places, begin, None if before is None else before.ends, known)
        few = tokens.numel() <= FEW and not self.is_whole
        found = one_by_one(batch) if few else all_at_once(batch)
        sums = found.columns[SUMS]
        if self.is_whole:
            seeds = _whole(sums[:, -1], types, found.columns[NUMBERS], own)
            sums = sums + seeds[:, None]
            found = found.named(sums)
        else:
            self._past = (
                Past.of(found.columns, found.ends)
                if before is None
                else before.then(found.columns, found.ends)
            )
        if found.is_new_unknown:
            self._say(
                "some rows have no ids, since their mask, positions, types or cache are not those "
                "of tokens that follow one another; say which row is which by a function, as in "
                "--rows PKG.MOD.FN"
            )
        del self._tokens, self._real, self._positions, self._types  # copies, perhaps on a device
        self._before = None
        return with_known(found.ids, found.positions, found.tokens)


def _whole(
    last: torch.Tensor, types: torch.Tensor | None, numbers: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """Return the seed of rows that depend on their whole sequence, [rows]: its last id."""
    seeds = listed([seed(one) for one in named(last.clone()).tolist()])
    if types is not None:
        ends = (numbered(types, numbers.clamp_min(0)) * own).sum(1) + seeds
        typed = listed([seed(one) for one in named(ends).tolist()])
        seeds = torch.where((types * own).any(1), typed, seeds)
    return seeds


def _cache_in(output: Any) -> Any:
    """Return the cache that a model returns, if it made one."""
    for name in ("cache", "past_key_values"):
        # A dict may warn of its attributes.
        is_dict = isinstance(output, dict)
        found = dict.get(output, name) if is_dict else getattr(output, name, None)
        if found is not None:
            return found
    for one in output if isinstance(output, tuple) else ():
        if caches.length_of(one) is not None and not isinstance(one, torch.Tensor):
            return one
    return None
