"""What torch.compile is tried with."""

from __future__ import annotations

import shutil

import pytest

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++"))
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler"),
    ),
]
