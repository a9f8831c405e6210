"""A page of `--html`: one file, which opens from disk and fetches nothing.

It is put together when it is written: a frame and a style that all kinds share, the kind's own html
and script, and the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TITLES = {"page": "graft diff", "segments": "graft localize"}
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def render(data: Mapping[str, Any], kind: str = "page") -> str:
    """The page with `data` in it; infinities come as "inf" and "-inf", unknown figures as None.

    json.dumps leaves nothing but ASCII, so U+2028, U+2029 and lone surrogates are escaped too.

    Args:
        data: what its script reads.
        kind: `page` of a diff, `segments` of localize.

    Raises:
        ValueError: `data` holds a NaN or an infinity as a float.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    page = _part("frame.html")
    # The data last: what stands in it is nobody's place.
    for place, part in (
        ("__TITLE__", _TITLES[kind]),
        ("__BODY__", _part(f"{kind}.html")),
        ("__STYLE__", _part("page.css")),
        ("__SCRIPT__", _part(f"{kind}.js")),
        ("__DATA__", text),
    ):
        page = page.replace(place, part, 1)
    return page


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
