"""The page that `graft diff --html` writes: as text, and in a browser."""

from __future__ import annotations

import json
import math
import re

import pytest
from pages import (
    EXTREMES,
    comparison,
    faulty,
    hostile,
    row,
)

from replayer.showing.page import render


def embedded(page):
    """The data in a page, as its script reads it."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found[1])


@pytest.mark.parametrize("case", EXTREMES)
def test_holds_the_data_unchanged(case):
    data = EXTREMES[case]()
    assert embedded(render(data)) == data


def test_names_no_address_outside_itself():
    page = render(faulty()).replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
    assert not re.search(r"https?:|\bsrc\s*=|@import|url\(", page)
    assert all(target.startswith("#") for target in re.findall(r'href="(.*?)"', page))


def test_forbids_the_browser_to_fetch_anything():
    assert "content=\"default-src 'none';" in render(faulty())


def test_no_string_ends_the_script_that_holds_it():
    page, plain = render(hostile()), render(faulty())
    assert page.lower().count("<script") == plain.lower().count("<script")
    assert page.lower().count("</script") == plain.lower().count("</script")
    assert "<!--" not in page
    assert not {"\u2028", "\u2029"} & set(page)


def test_holds_a_path_that_is_not_utf_8(tmp_path):
    data = comparison([], floor=["runs/\udcff"])
    (tmp_path / "page.html").write_text(render(data), encoding="utf-8")
    assert embedded(render(data)) == data


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_what_json_cannot_hold(value):
    with pytest.raises(ValueError, match="JSON"):
        render(comparison([row("hidden", 0, "differs", max_abs=value)]))
