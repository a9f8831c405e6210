"""Clean pairs: the two sides compute the same by other ways, so that only rounding differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .decoder_options import Options

f32 = Options(weight_seed=20)
bf16 = replace(f32, dtype="bfloat16", width=128, layers=3, tokens=16)
plain = replace(f32, moe="none", taps="sparse")
BF16 = {"dtype": "bfloat16"}
SDPA, SPLIT = {"attention": "sdpa"}, {"attention": "split"}
SP, EP = {"sequence_parallel": True}, {"expert_parallel": True}
FUSED, SERVER = {"fused": True}, {"fused": True, "residual": "pair", "attention": "sdpa"}
PAIR, IN_PLACE = {"residual": "pair"}, {"in_place": True}

CLEAN: dict[str, tuple[Options, dict[str, Any]]] = {
    "tp f32": (f32, {}),
    "tp bf16": (bf16, {}),
    "tp f32 sparse": (replace(f32, taps="sparse", layers=6), {}),
    "tp bf16 sparse": (replace(bf16, taps="sparse", layers=6), {}),
    "the same f32": (f32, {"tp": 1}),
    "sdpa f32": (f32, SDPA),
    "sdpa bf16": (bf16, SDPA),
    "sdpa alone bf16": (replace(bf16, weight_seed=21), SDPA | {"tp": 1}),
    "split f32": (f32, SPLIT),
    "split bf16": (bf16, SPLIT),
    "split against sdpa bf16": (replace(bf16, attention="sdpa", weight_seed=22), SPLIT),
    "split sparse bf16": (replace(bf16, taps="sparse", weight_seed=23), SPLIT),
    "f32 against bf16": (f32, BF16),
    "f32 against bf16 alone": (replace(f32, width=128, layers=3), BF16 | {"tp": 1}),
    "f32 against bf16 sdpa": (replace(f32, moe="none", weight_seed=24), BF16 | SDPA),
    "f32 against bf16 sparse": (replace(plain, layers=6), BF16),
    "bf16 against f32": (bf16, {"dtype": "float32"}),
    "sequence parallel f32": (f32, SP),
    "sequence parallel bf16": (bf16, SP | SDPA),
    "expert parallel f32": (replace(f32, moe="all", weight_seed=25), EP),
    "expert parallel bf16": (replace(bf16, moe="all", weight_seed=26), EP),
    "sequence and expert parallel bf16": (replace(bf16, moe="all", weight_seed=26), SP | EP),
    "decode f32": (replace(f32, decode=4, tokens=12), {}),
    "decode bf16": (replace(bf16, decode=4, tokens=12), SDPA),
    "decode split bf16 sparse": (replace(bf16, decode=4, tokens=12, taps="sparse"), SPLIT),
    "decode f32 against bf16": (replace(f32, decode=3, tokens=12, moe="none"), BF16),
    "left padding f32": (replace(f32, left_padding=True), SDPA),
    "left padding bf16": (replace(bf16, left_padding=True), SPLIT),
    "left padding decode bf16": (replace(bf16, left_padding=True, tokens=12, decode=3), SDPA),
    "in place f32": (f32, IN_PLACE),
    "in place bf16": (bf16, IN_PLACE),
    "in place both bf16 sparse": (replace(bf16, in_place=True, taps="sparse"), IN_PLACE),
    "in place in the baseline f32": (replace(f32, in_place=True), {"in_place": False}),
    "pair f32": (f32, PAIR),
    "pair bf16": (bf16, PAIR),
    "pair bf16 sparse": (replace(bf16, moe="none", taps="sparse", layers=6), PAIR),
    "pair in the baseline bf16": (replace(bf16, residual="pair"), {"residual": "sum"}),
    "fused f32": (f32, FUSED),
    "fused bf16": (bf16, FUSED),
    "fused experts bf16": (replace(bf16, moe="all", weight_seed=31), FUSED | EP),
    "server bf16": (replace(bf16, layers=4), SERVER),
    "server bf16 sparse": (replace(bf16, layers=6, moe="none", taps="sparse"), SERVER),
    "server massive bf16": (replace(bf16, massive=True, width=64), SERVER),
    "server decode bf16": (replace(bf16, tokens=12, decode=4), SERVER | SPLIT),
    "server f32 against bf16": (replace(f32, width=128, layers=3), SERVER | BF16),
    "massive f32": (replace(f32, massive=True), {}),
    "massive bf16": (replace(bf16, massive=True), SDPA),
    "massive f32 against bf16": (replace(f32, massive=True, moe="none"), BF16),
    "massive bf16 sparse": (replace(bf16, massive=True, taps="sparse", layers=6), SPLIT),
    "small f32": (replace(f32, scale=0.02), {}),
    "small bf16": (replace(bf16, scale=0.02), SDPA),
    "fp8 f32": (replace(f32, quantised=True), {}),
    "fp8 bf16": (replace(bf16, quantised=True), SPLIT),
    "one layer f32": (replace(f32, layers=1), {}),
    "one layer bf16": (replace(bf16, layers=1), SDPA),
    "two layers bf16": (replace(bf16, layers=2, steps=2), SPLIT),
    "six layers bf16": (replace(bf16, layers=6, width=64), SDPA),
    "six layers wide f32": (replace(f32, layers=6, width=192, tokens=16), SDPA),
    "24 layers bf16": (replace(bf16, layers=24, width=64), {}),
    "24 layers f32 sparse": (replace(f32, layers=24, taps="sparse"), SDPA),
    "48 layers bf16 sparse": (replace(bf16, layers=48, width=64, taps="sparse"), SDPA),
    "48 layers f32 against bf16 sparse": (replace(plain, layers=48), BF16),
    "48 layers f32": (replace(f32, layers=48, tokens=16), {}),
    "wide bf16": (replace(bf16, width=192, tokens=48), {}),
    "wide f32": (replace(f32, width=192, layers=2, tokens=48, weight_seed=27), SPLIT),
    "all experts f32": (replace(f32, moe="all", weight_seed=28, token_seed=5), SDPA),
    "other seed bf16": (replace(bf16, weight_seed=29, token_seed=6, layers=4), {}),
    "other seed f32": (replace(f32, weight_seed=30, token_seed=7, steps=2), SPLIT),
}
"""By name: the baseline, and what is other in the target; it has two ranks if nothing is said."""
