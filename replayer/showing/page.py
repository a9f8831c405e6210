"""The page of `graft diff --html`: one file, which opens from disk and fetches nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PLACE = "__DATA__"
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def render(data: dict[str, Any]) -> str:
    """The page with `data` in it; infinities come as "inf" and "-inf", unknown figures as None.

    json.dumps leaves nothing but ASCII, so U+2028, U+2029 and lone surrogates are escaped too.

    Raises:
        ValueError: `data` holds a NaN or an infinity as a float.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace(_PLACE, text, 1)
