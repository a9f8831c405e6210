"""The rows of vLLM's models: what its forward context says of a step.

Which tokens are of which request, and where they go in the cache, stands in the metadata of each
attention layer; one layer's will do. How many tokens a block has is not said there: it is the size
with which the blocks of the requests give the places that the tokens go to.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from . import servers
from .calls import Arguments, Begun, NoRows, Say, on_host, tokens_of
from .servers import Served, rows_at
from .slots import Slots, Step

_SIZES = (16, 32, 64, 128, 8, 256, 512, 1024, 2048, 4096, 4, 2, 1)


def begun(module: torch.nn.Module, given: Arguments, say: Say) -> Begun:
    """Return what is known of the rows of a call; see `batches.begun`.

    Raises:
        NoRows: none of them is known.
    """
    return servers.begun(module, lambda: _served(module, given), say)


def _served(module: torch.nn.Module, given: Arguments) -> Served:
    context = _context()
    every = getattr(context, "attn_metadata", None)
    if every is None:
        raise NoRows("it only warms up", is_quiet=True)
    if isinstance(every, (list, tuple)):
        raise NoRows("it runs in parts of a batch; serve without --enable-dbo")
    tokens = tokens_of(given)
    servers.check(module, has_adapters_told=False)
    transfer = sys.modules.get("vllm.distributed.kv_transfer")
    if transfer is not None and transfer.has_kv_transfer_group():
        raise NoRows("its cache is filled by others too; serve without --kv-transfer-config")
    name, layer = _layer(every)
    if getattr(layer, "causal", True) is False:
        raise NoRows("its tokens see those that come later")
    if getattr(layer, "dcp_context_kv_lens", None) is not None:
        raise NoRows("its cache is cut over ranks; serve without --decode-context-parallel-size")
    places = getattr(layer, "slot_mapping", None)
    if places is None:
        places = rows_at(context, "slot_mapping")
        places = places[name] if isinstance(places, Mapping) else places
    starts, lengths = on_host(layer.query_start_loc), on_host(layer.seq_lens)
    starts = starts[: len(lengths) + 1]
    counts, size = starts.diff(), tokens.numel()
    used = ((counts > 0) & (lengths[: len(counts)] > 0)).nonzero().view(-1)
    counts, firsts, lengths = counts[used], starts[used], lengths[used]
    total = int(counts.sum())
    if total > size or bool((firsts != counts.cumsum(0) - counts).any()):
        raise NoRows("its metadata is not that of its tokens")
    begins = lengths - counts
    request = torch.arange(len(used), device="cpu").repeat_interleave(counts)
    at = torch.arange(total, device="cpu") + (begins - firsts)[request]
    known = None
    if (positions := given.get("positions")) is not None and positions.dim() == 1:
        wrong = (on_host(positions)[:total] != at).to(torch.int64)
        known = torch.zeros_like(counts).index_add_(0, request, wrong) == 0
    places = on_host(places).view(-1)[:total]
    table = on_host(_table(layer))[used]
    slots = servers.slots_of(module, name)
    if not (slots.block and _is_block(slots.block, table, request, at, places)):
        sizes = [one for one in _SIZES if _is_block(one, table, request, at, places)]
        block = _block_size(slots, sizes, is_asked=bool(begins.any()))
    else:
        block = slots.block
    last = (begins - 1).clamp_min(0)
    before = table[torch.arange(len(used), device="cpu"), last // block] * block + last % block
    own = on_host(tokens).view(-1)[:total]
    step = Step(own, counts, begins, before, places, None, known)
    return Served(step, size, len(used), name)


def _context() -> Any:
    module = sys.modules.get("vllm.forward_context")
    try:
        return None if module is None else module.get_forward_context()
    except AssertionError:  # there is none
        return None


def _table(layer: Any) -> Any:
    for name in ("block_table", "block_tables", "block_table_tensor"):
        found = getattr(layer, name, None)
        if isinstance(found, torch.Tensor) and found.dim() == 2:
            return found
    return None


def _layer(every: Any) -> tuple[str, Any]:
    """Return the first layer whose metadata says enough, by name."""
    named = dict(every) if isinstance(every, Mapping) else {"": every}
    for name, layer in named.items():
        has = (getattr(layer, one, None) is not None for one in ("query_start_loc", "seq_lens"))
        if all(has) and _table(layer) is not None:
            return name, layer
    kinds = ", ".join(sorted({type(one).__name__ for one in named.values()})) or "nothing"
    raise NoRows(
        f"its attention's metadata is {kinds}, which has no block_table; serve with "
        "--attention-backend FLASH_ATTN, or say which row is which by a function, as in "
        "--rows PKG.MOD.FN"
    )


def _is_block(
    size: int, table: torch.Tensor, request: torch.Tensor, at: torch.Tensor, places: torch.Tensor
) -> bool:
    """Whether blocks of a size give the places that the tokens go to.

    Args:
        size: how many tokens a block has.
        table: the blocks of each request, [requests, blocks].
        request: that of each token, [t].
        at: where each token stands in its request, [t].
        places: where it goes in the cache, [t].
    """
    number = at // size
    is_within = bool((number < table.shape[1]).all())
    return is_within and torch.equal(table[request, number] * size + at % size, places)


def _block_size(slots: Slots, sizes: list[int], *, is_asked: bool) -> int:
    """Return how many tokens a block of a cache has, which is the same at every step.

    Raises:
        NoRows: it is not known, and is asked for.
    """
    if len(sizes) == 1 and not slots.block:
        slots.block = sizes[0]
        return slots.block
    if not is_asked and sizes:
        return sizes[0]
    raise NoRows("the blocks of its requests are not where its tokens go; is its cache cut?")
