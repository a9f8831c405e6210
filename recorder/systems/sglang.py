"""The rows of sglang's models: what their `forward_batch` says of a step.

Which place of the cache each token of a request is at, stands in the pool of requests.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..tokens.hashing import seed
from ..tokens.memory import listed
from . import servers
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
    return servers.begun(module, lambda: _served(module, given), say)


def _served(module: torch.nn.Module, given: Arguments) -> Served:
    batch = given.get("forward_batch")
    if batch is None:
        raise NoRows("it is not given a forward_batch")
    mode = rows_at(batch, "forward_mode")
    if mode.is_idle():
        raise NoRows("it has no requests", is_quiet=True)
    _check(module, batch)
    tokens, at = (
        rows_at(batch, name) if given.get(name) is None else given[name]
        for name in ("input_ids", "positions")
    )
    own, at = on_host(tokens).view(-1), on_host(at)
    if at.dim() != 1:
        raise NoRows("its positions are those of images, which its tokens do not say")
    virtual = getattr(batch, "out_cache_loc_virtual", None)
    places = on_host(rows_at(batch, "out_cache_loc") if virtual is None else virtual)
    places, requests = places[: len(own)], on_host(rows_at(batch, "req_pool_indices"))
    counts = _counts(batch, mode, len(requests), places)
    # The first place of a cache is where the tokens go that fill a captured batch up.
    request = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
    real = (places[: len(request)] > 0).nonzero().view(-1)
    used = counts[: int(request[real[-1]]) + 1 if len(real) else 0].nonzero().view(-1)
    every, counts, requests = len(counts), counts[used], requests[used]
    firsts, total = counts.cumsum(0) - counts, int(counts.sum())
    own, at, places = own[:total], at[:total], places[:total]
    places = places.masked_fill(places == 0, -1)
    begins, table = at[firsts], _pool(batch).req_to_token
    which = torch.arange(len(used), device="cpu").repeat_interleave(counts)
    due = torch.arange(total, device="cpu") + (begins - firsts)[which]
    wrong = (at != due) | (on_host(_at(table, requests[which], due)) != places)
    known = torch.zeros_like(counts).index_add_(0, which, wrong.to(torch.int64)) == 0
    if images := getattr(batch, "mm_inputs", None):
        known &= torch.tensor([images[i] is None for i in used.tolist()], device="cpu")
    before = on_host(_at(table, requests, (begins - 1).clamp_min(0)))
    step = Step(own, counts, begins, before, places, _seeds(batch, used), known)
    return Served(step, tokens.numel(), every)


def _check(module: torch.nn.Module, batch: Any) -> None:
    """Refuse a batch whose rows depend on more than the tokens in front of them."""
    servers.check(module)
    for name in ("input_embeds", "replace_embeds", "encoder_lens", "token_type_ids"):
        if getattr(batch, name, None) is not None:
            raise NoRows(f"its batch has {name}, on which rows depend beside their tokens")
    for name in ("attn_cp_metadata", "attn_dcp_metadata"):
        if getattr(batch, name, None) is not None:
            raise NoRows("its requests are cut over ranks")
    if others := _others():
        raise NoRows(f"its cache is filled by others too; serve without {others}")


def _counts(batch: Any, mode: Any, requests: int, places: torch.Tensor) -> torch.Tensor:
    """Return how many tokens of the step each request has, [requests]."""
    lengths = getattr(batch, "extend_seq_lens", None)
    if lengths is not None and not mode.is_decode():
        counts = on_host(lengths)
    else:
        each = len(places) // max(1, requests)
        counts = torch.full((requests,), each, dtype=torch.int64, device="cpu")
    if len(counts) > requests or int(counts.sum()) > len(places):
        raise NoRows("its batch is not that of its tokens")
    return counts


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


def _others() -> str:
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
