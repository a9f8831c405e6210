"""The rows of sglang's models: what their `forward_batch` says of a step.

Which place of the cache each token of a request is at, stands in the pool of requests.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..tokens.hashing import seed
from ..tokens.memory import listed
from . import missed, servers
from .calls import Arguments, Begun, NoRows, Say, on_host
from .servers import Served, rows_at, unknown
from .slots import Step

_CONTEXT = "sglang.srt.model_executor.forward_context"
_FILLED = ("enable_hierarchical_cache", "enable_lmcache", "enable_flexkv", "enable_hisparse")


def begun(module: torch.nn.Module, given: Arguments, say: Say) -> Begun:
    """Return what is known of the rows of a call; see `batches.begun`.

    Raises:
        NoRows: none of them is known.
    """
    try:
        return servers.begun(module, _served(module, given), say)
    except NoRows:
        missed.note()  # it writes to the cache all the same
        raise


def _served(module: torch.nn.Module, given: Arguments) -> Served:
    batch = given.get("forward_batch")
    if batch is None:
        raise NoRows("it is not given a forward_batch")
    mode = rows_at(batch, "forward_mode")
    if mode.is_idle():
        raise NoRows("it has no requests", is_quiet=True)
    servers.check(module)
    for name in ("input_embeds", "replace_embeds", "encoder_lens", "token_type_ids"):
        if getattr(batch, name, None) is not None:
            raise NoRows(f"its batch has {name}, on which rows depend beside their tokens")
    for name in ("attn_cp_metadata", "attn_dcp_metadata"):
        if getattr(batch, name, None) is not None:
            raise NoRows("its requests are cut over ranks")
    if filled := _filled():
        raise NoRows(f"its cache is filled by others too; serve without {filled}")
    tokens = given.get("input_ids")
    tokens = rows_at(batch, "input_ids") if tokens is None else tokens
    own = on_host(tokens).view(-1)
    requests = on_host(rows_at(batch, "req_pool_indices"))
    at = given.get("positions")
    at = on_host(rows_at(batch, "positions") if at is None else at)
    if at.dim() != 1:
        raise NoRows("its positions are those of images, which its tokens do not say")
    virtual = getattr(batch, "out_cache_loc_virtual", None)
    places = on_host(rows_at(batch, "out_cache_loc") if virtual is None else virtual)
    places = places[: len(own)]
    lengths = getattr(batch, "extend_seq_lens", None)
    if lengths is None or mode.is_decode():
        counts = torch.full_like(requests, len(places) // max(1, len(requests)))
    else:
        counts = on_host(lengths)
    requests, total = requests[: len(counts)], int(counts.sum())
    if total > len(places) or total > len(own):
        raise NoRows("its batch is not that of its tokens")
    used = (counts > 0).nonzero().view(-1)
    requests, counts = requests[used], counts[used]
    firsts = counts.cumsum(0) - counts
    which = torch.arange(len(used), device="cpu").repeat_interleave(counts)
    own, at, places = own[:total], at[:total], places[:total]
    begins = at[firsts]
    table = _pool(batch).req_to_token
    due = torch.arange(total, device="cpu") + (begins - firsts)[which]
    is_wrong = at != due
    # The first place of a cache is where the tokens go that fill a captured batch up.
    places = places.masked_fill(places == 0, -1)
    is_wrong |= (places >= 0) & (on_host(_at(table, requests[which], due)) != places)
    is_wrong |= places < 0
    known = torch.zeros_like(counts).index_add_(0, which, is_wrong.to(torch.int64)) == 0
    images = getattr(batch, "mm_inputs", None)
    if images:
        with_images = [i for i, one in enumerate(used.tolist()) if images[one] is not None]
        known[with_images] = False
    before = on_host(_at(table, requests, (begins - 1).clamp_min(0)))
    step = Step(own, counts, begins, before, places, _seeds(batch, used), known)
    return Served(step, tokens.numel())


def _at(table: torch.Tensor, requests: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    device = table.device
    places = places.clamp(0, table.shape[1] - 1)
    return table[requests.to(device), places.to(device)]


def _pool(batch: Any) -> Any:
    found = getattr(batch, "req_to_token_pool", None)
    context = sys.modules.get(_CONTEXT)
    if found is None and context is not None:
        backend = getattr(context.get_forward_context(), "attn_backend", None)
        found = getattr(backend, "req_to_token_pool", None)
    if found is None:
        raise unknown(batch, "req_to_token_pool")
    return found


def _seeds(batch: Any, used: torch.Tensor) -> torch.Tensor | None:
    """Return what the ids of each request begin with: its adapter, if it has one."""
    names = getattr(batch, "lora_ids", None) or getattr(batch, "lora_paths", None)
    if not names or all(one is None for one in names):
        return None
    chosen = [names[i] for i in used.tolist()]
    return listed([0 if one is None else seed(str(one)) for one in chosen])


def _filled() -> str:
    """Return the option that has others write to the cache, "" where there is none."""
    args = _server_args()
    for name in _FILLED:
        if args(name):
            return f"--{name.replace('_', '-')}"
    mode = args("disaggregation_mode")
    return "--disaggregation-mode" if mode not in (None, "null", "") else ""


def _server_args() -> Any:
    module = sys.modules.get("sglang.srt.server_args")
    for name in ("get_global_server_args", "_global_server_args"):
        found = getattr(module, name, None)
        try:
            found = found() if callable(found) else found
        except Exception:  # it is not set
            continue
        if found is not None:
            return lambda name: getattr(found, name, None)
    held = getattr(
        sys.modules.get("sglang.srt.managers.schedule_batch"), "global_server_args_dict", None
    )
    return (held or {}).get
